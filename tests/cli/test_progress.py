"""Progress without a terminal: plain lines on stderr."""

from __future__ import annotations

import pytest

from meteora_cli import console


def lines_of(capsys: pytest.CaptureFixture[str], seconds: float, monkeypatch: pytest.MonkeyPatch, *, fields: bool = True) -> list[str]:
    """The lines about three steps of work, with a line at most every ``seconds``."""
    monkeypatch.setattr(console, "PLAIN_SECONDS", seconds)
    with console.progress() as bars, bars.task("gates", total=3, unit="steps") as bar:
        for step in range(3):
            bar.update(1, **({"loss": f"{3 - step}.5"} if fields else {}))
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_line_every_few_seconds_and_one_at_the_end(capsys, monkeypatch) -> None:
    first, *steps, last = lines_of(capsys, 0.0, monkeypatch)
    assert first == "gates …"
    assert [line.partition(" in ")[0] for line in steps] == ["gates: 1/3 steps", "gates: 2/3 steps"]
    assert last.startswith("gates: 3/3 steps in 0 s")
    assert last.endswith("loss 1.5")


def test_quick_work_is_two_lines_and_one_where_there_is_nothing_to_report(capsys, monkeypatch) -> None:
    assert [line.partition(" in ")[0] for line in lines_of(capsys, 1e9, monkeypatch)] == ["gates …", "gates: 3/3 steps"]
    assert lines_of(capsys, 1e9, monkeypatch, fields=False) == ["gates …"]

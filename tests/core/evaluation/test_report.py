"""Comparison of several results files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.evaluation.report import Cell, compare, headlines, load_results, plot, to_markdown
from meteora_core.json_files import write_json


def _document(model: str, results: dict[str, dict[str, Any]], rows: int = 4) -> dict[str, Any]:
    return {
        "results": results,
        "model_name": model,
        "n-samples": {task: {"original": 9, "effective": rows} for task in results},
        "higher_is_better": {"perplexing": {"word_perplexity": False}},
    }


BASE = _document(
    "base",
    {
        "winowhy": {"alias": "winowhy", "acc,none": 0.25, "acc_stderr,none": 0.05},
        "news_commentary_de": {"alias": "x", "bleu,none": 12.34, "bleu_stderr,none": "N/A"},
        "perplexing": {"word_perplexity,none": 7.0},
    },
)
OURS = _document(
    "meteora",
    {
        "winowhy": {"alias": "winowhy", "acc,none": 0.5, "acc_stderr,none": 0.06},
        "perplexing": {"word_perplexity,none": 9.0, "acc,strict": 0.5, "broken,none": float("nan")},
        "composite_3": {"attempted,none": 3.0, "correct,none": 1.5, "logical_deduction/acc,none": 0.5, "strategyqa/acc,none": 1.0, "strategyqa/bleu,none": 5.0},
    },
    rows=6,
)


def test_rows_and_columns() -> None:
    table = compare([BASE, OURS, OURS])
    assert table.columns == ("base", "meteora", "meteora (2)")
    first = table.rows[0]
    assert (first.task, first.metric, first.samples) == ("winowhy", "acc", (4, 6, 6))
    assert first.cells == (Cell(0.25, 0.05), Cell(0.5, 0.06), Cell(0.5, 0.06))
    assert first.best == (1, 2)
    by_name = {(row.task, row.metric): row for row in table.rows}
    assert by_name["perplexing", "word_perplexity"].best == (0,)
    assert by_name["perplexing", "acc,strict"].cells == (None, Cell(0.5), Cell(0.5))
    assert by_name["news_commentary_de", "bleu"].best == ()
    assert ("perplexing", "broken") not in by_name


def test_markdown() -> None:
    lines = to_markdown(compare([BASE, OURS], ["a|b", "ours"])).splitlines()
    assert lines[0] == "| task | metric | rows | a\\|b | ours |"
    assert lines[1] == "| --- | --- | ---: | ---: | ---: |"
    assert lines[2] == "| winowhy | acc | 4–6 | 0.250 ± 0.050 | **0.500** ± 0.060 |"
    assert lines[3] == "| news_commentary_de | bleu | 4 | 12.3 | – |"


def test_headlines_lie_between_0_and_1() -> None:
    assert headlines(compare([BASE, OURS])) == {
        "winowhy": (0.25, 0.5),
        "news_commentary_de": (pytest.approx(0.1234), None),
        "perplexing": (None, 0.5),
        "composite_3": (None, 0.75),
    }


def test_files_are_read_and_a_folder_gives_its_newest(tmp_path: Path) -> None:
    write_json(tmp_path / "results_2026-01-01T00-00-00.json", BASE)
    assert compare([load_results(tmp_path), load_results(tmp_path / "results_2026-01-01T00-00-00.json")]).columns == ("base", "base (2)")


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
@pytest.mark.parametrize("kind", ["bar", "radar"])
def test_pictures(tmp_path: Path, kind: str, ending: str, start: bytes) -> None:
    tasks = {name: {"acc,none": 0.1 * place} for place, name in enumerate(("winowhy", "gsm8k", "disfl_qa"), start=1)}
    path = plot(compare([_document("a", tasks), _document("b", tasks)]), tmp_path / "new" / f"x.{ending}", kind)
    assert path.read_bytes().startswith(start)


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no results"):
        compare([])
    with pytest.raises(UsageError, match="1 labels for 2 results"):
        compare([BASE, OURS], ["a"])
    table = compare([BASE, OURS])
    with pytest.raises(UsageError, match="'rader'") as caught:
        plot(table, tmp_path / "x.png", "rader")
    assert caught.value.hint == "did you mean 'radar'?"
    with pytest.raises(UsageError, match="1 tasks are too few for a radar chart"):
        plot(table, tmp_path / "x.png", "radar")
    with pytest.raises(UsageError, match=r"cannot draw x\.txt"):
        plot(table, tmp_path / "x.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MeteoraError, match="matplotlib is not installed") as missing:
        plot(table, tmp_path / "x.png")
    assert missing.value.hint == "pip install 'meteora-lora[plot]'"

"""Text of unknown origin never reaches the terminal raw: not through a console, not through a command."""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import sys
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.text import Text

import meteora_cli
from meteora_cli.chat.panels import show_adapters
from meteora_cli.chat.render import Painter, StreamPrinter
from meteora_cli.console import guard_messages, progress, report_error, write_text
from meteora_cli.display import DataTable, Terminal, body, cell, panel
from meteora_core.chat.conversation import AdapterRow
from meteora_core.errors import DataError

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202eevil\u200b\ufeff[/x][bold][link=https://example.org]:heart:\r\u2028"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def terminal(**options: object) -> Terminal:
    return Terminal(file=io.StringIO(), width=2000, force_terminal=True, color_system=None, **options)


def shown(console: Terminal) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def check(text: str) -> None:
    """The hostile text is there, its markup and its emoji code as they were, and nothing in it steers."""
    assert not STEERS.search(text)
    flat = "".join(text.split())
    assert "[/x][bold][link=https://example.org]:heart:" in flat
    assert r"\x1b" in flat
    assert not any(unicodedata.category(letter) == "Cf" for letter in text)


@pytest.mark.parametrize(
    "content",
    [HOSTILE, Text(HOSTILE), Text.assemble("a", (HOSTILE, "bold"), "b"), cell(HOSTILE), body(HOSTILE), panel(HOSTILE, HOSTILE, subtitle=HOSTILE)],
    ids=["string", "text", "styled", "cell", "body", "panel"],
)
def test_a_terminal_shows_anything_as_it_is(content: object) -> None:
    console = terminal()
    console.print(content)
    check(shown(console))


def test_tables_and_their_headings() -> None:
    console = terminal()
    table = DataTable(HOSTILE, "other", title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE, Text(HOSTILE), "line\nbreak")
    console.print(table)
    check(shown(console))
    assert r"line\nbreak" in shown(console)


def test_styles_stay_where_they_were() -> None:
    console = Terminal(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", no_color=False)
    console.print(Text.assemble(("a\x0fb", "bold"), "\n", ("c", "red"), "\x1b[0m", "d"))
    assert shown(console) == "\x1b[1ma\x1b[0m\x1b[1m\\x0f\x1b[0m\x1b[1mb\x1b[0m\n\x1b[31mc\x1b[0m\\x1b[0md\n"


def test_long_names_are_wrapped_with_their_escapes() -> None:
    console = Terminal(file=io.StringIO(), width=24, color_system=None)
    table = DataTable("name")
    table.add_row("\x1b" * 12)
    console.print(table)
    assert shown(console).count("x1b") + shown(console).count("x1\n") >= 8
    assert "".join(re.findall(r"[\\x1b]", shown(console))).startswith(r"\x1b" * 12)


def test_streams_legends_and_statuses() -> None:
    console = terminal()
    printer = StreamPrinter(console)
    for letter in HOSTILE:
        printer.add(letter, Text("").style)
    printer.end()
    painter = Painter(console, [HOSTILE])
    console.print(painter.legend(torch.tensor([1.0])))
    printer.add(painter.pieces("word", 0, 1.0)[0][0], Text("").style)
    printer.end()
    check(shown(console))
    console = terminal()
    with console.status(HOSTILE) as status:
        status.update(HOSTILE)
    console.print(status.renderable)
    assert "\x1b]0" not in shown(console)
    assert "[/x]" in shown(console)


def test_the_adapters_of_a_chat() -> None:
    rows = (AdapterRow(HOSTILE, rank=8, alpha=HOSTILE, source=HOSTILE),)
    session = SimpleNamespace(names=(HOSTILE,), adapter_rows=lambda: rows, mode=SimpleNamespace(forced=None, muted=()), check_adapters=lambda: None)
    console = terminal()
    show_adapters(console, session)
    check(shown(console))


def test_progress_notes_errors_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bars, bars.task(HOSTILE, total=1) as task:
        task.update(1, loss=HOSTILE)
        bars.note(HOSTILE)
    write_text(HOSTILE)
    report_error(DataError(f"no such thing: {HOSTILE}\n  and more", hint=f"try {HOSTILE}"))
    captured = capsys.readouterr()
    check(captured.out)
    check(captured.err)
    assert len(captured.err.splitlines()) == 5


def test_log_messages_warnings_and_tracebacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((sys, "excepthook"), (warnings, "formatwarning")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    before = logging.getLogRecordFactory()
    try:
        guard_messages()
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("meteora_core.test_display")
        logger.addHandler(handler)
        logger.warning("tensor %s", HOSTILE)
        logger.removeHandler(handler)
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "file.py", 1))  # type: ignore[arg-type]
        try:
            raise ValueError(HOSTILE)
        except ValueError as error:
            sys.excepthook(ValueError, error, error.__traceback__)
    finally:
        logging.setLogRecordFactory(before)
    err = capsys.readouterr().err
    check(err)
    assert err.count("[/x]") >= 3


def test_json_stays_exact(meteora, dataset: Path) -> None:
    ran = meteora("data", "show", "mine", "--out", dataset, "--json")
    assert HOSTILE in ran.json["rows"][0]["prompt"]


@pytest.fixture
def dataset(meteora, tmp_path: Path) -> Path:
    """A built dataset of hostile rows, its folder beside one with a hostile name."""
    data, rows = tmp_path / "datasets", tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"prompt": HOSTILE, "response": HOSTILE}) + "\n") * 5)
    ran = meteora("data", "add", "mine", "--train", rows, "--out", data)
    assert ran.code == 0, ran.err
    (data / "a\x1b]0;x\x07[bold]").mkdir()
    for split in ("train", "test"):
        (data / "a\x1b]0;x\x07[bold]" / f"{split}.jsonl").write_bytes(rows.read_bytes())
    return data


def test_commands_on_hostile_datasets(meteora, dataset: Path) -> None:
    ran = meteora("data", "show", "mine", "--out", dataset)
    assert ran.code == 0
    check(ran.out)
    for arguments in (("data", "list", "--out", dataset), ("data", "verify", "--out", dataset), ("data", "show", HOSTILE, "--out", dataset)):
        ran = meteora(*arguments)
        assert not STEERS.search(ran.out + ran.err)
        assert r"\x1b]0;" in ran.out + ran.err


def test_inspecting_hostile_adapters(meteora, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{name}.lora_A.weight": torch.zeros(2, 4), f"{name}.lora_B.weight": torch.zeros(4, 2)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": HOSTILE}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ran = meteora("ckpt", "inspect", folder)
    assert not STEERS.search(ran.out + ran.err)
    assert "[/x]" in ran.out + ran.err
    save_file({f"{HOSTILE}.lora_A.weight": torch.zeros(2, 4)}, folder / "adapter_model.safetensors")
    ran = meteora("ckpt", "inspect", folder)
    assert not STEERS.search(ran.out + ran.err)


def test_settings_and_reports(meteora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METEORA_LAUNCH__MAIN_PROCESS_IP", HOSTILE)
    ran = meteora("config", "show")
    check(ran.out)
    ran = meteora("data", "list", "--out", tmp_path / HOSTILE)
    assert not STEERS.search(ran.out + ran.err)
    results = {"results": {HOSTILE: {"alias": HOSTILE, "accuracy,none": 0.5}}, "n-samples": {HOSTILE: {"effective": 2}}, "meteora": {"model": HOSTILE}}
    file = tmp_path / "results_2026-01-01T00-00-00.json"
    file.write_text(json.dumps(results))
    for flags in ((), ("--markdown",)):
        ran = meteora("eval", "report", file, *flags)
        assert not STEERS.search(ran.out + ran.err)


def test_secrets_in_settings_are_not_shown(meteora, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METEORA_MODEL__BASE", "https://user:sw0rd-fish@host/model")
    for flags in ((), ("--json",)):
        ran = meteora("config", "show", *flags)
        assert "https://***@host/model" in ran.out
        assert "sw0rd" not in ran.out + ran.err


FORBIDDEN_IMPORTS = ("rich.markup", "rich.table", "rich.panel", "rich.status", "rich.prompt", "rich.pretty", "rich.markdown", "rich.columns", "rich.tree")
OWNERS = ("display.py", "console.py")


@pytest.mark.parametrize("file", sorted(Path(meteora_cli.__file__).parent.rglob("*.py")), ids=lambda file: file.name)
def test_commands_print_through_the_display_alone(file: Path) -> None:
    """No other console, no ``print``, no direct writes and no markup, so that a raw name cannot come back."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and file.name != "display.py":
            names = {alias.name for alias in node.names}
            if node.module in FORBIDDEN_IMPORTS or (node.module == "rich" and names & {"print", "inspect"}):
                found.append(f"line {node.lineno}: imports {node.module}")
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if file.name not in OWNERS and re.fullmatch(r"print|typer\.s?echo|typer\.secho|sys\.std(out|err)\.write|(rich\.console\.)?Console", called):
                found.append(f"line {node.lineno}: calls {called}")
            if called.endswith(("from_markup", "render_markup")):
                found.append(f"line {node.lineno}: calls {called}")
            if any(word.arg == "markup" and ast.unparse(word.value) != "False" for word in node.keywords):
                found.append(f"line {node.lineno}: turns markup on")
    if file.name == "tree.py":
        found = [each for each in found if "typer.echo" not in each]  # the version
    assert not found

"""The command line as a whole: help, version, start-up time, settings, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest

from meteora_cli.console import emit_json, valid_text
from meteora_core.json_files import write_json


def test_version_and_help(meteora) -> None:
    assert meteora("--version").out == "meteora 0.1.0\n"
    text = meteora("--help").out
    for command in ("quickstart", "data", "ckpt", "train", "eval", "chat", "config"):
        assert command in text


@pytest.mark.parametrize("command", [("quickstart",), ("data", "build"), ("ckpt", "download"), ("train",), ("eval",), ("chat",), ("config", "show")])
def test_every_command_explains_itself(meteora, command) -> None:
    ran = meteora(*command, "--help")
    assert ran.code == 0
    assert "Usage: meteora" in ran.out


def test_help_loads_little_and_neither_torch_nor_transformers() -> None:
    """What is imported is what it costs: with these modules it takes half a second, each of the large libraries takes as long again or much longer."""
    code = "import sys, runpy; sys.argv = ['meteora', '--help']\ntry:\n runpy.run_module('meteora_cli', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'peft', 'pydantic', 'numpy') if name in sys.modules], file=sys.stderr)\n"
    code += "print(len(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "TERM": "dumb"})
    large, count = done.stderr.strip().splitlines()[-2:]
    assert large == "[]"
    assert int(count) < 500


def test_settings_come_from_file_environment_and_flags(meteora, tmp_path, monkeypatch) -> None:
    (tmp_path / "meteora.toml").write_text("[eval]\nlimit = 7\n")
    monkeypatch.setenv("METEORA_ROUTING__TOP_K", "3")
    shown = meteora("config", "show", "--json").json
    assert shown["eval"]["limit"] == 7
    assert shown["routing"]["top_k"] == 3
    (tmp_path / "other.toml").write_text("[eval]\nlimit = 8\n")
    assert meteora("--config", "other.toml", "config", "show", "--json").json["eval"]["limit"] == 8
    assert "eval.limit" in meteora("config", "show").out


def errors(ran) -> list[str]:
    return [line for line in ran.err.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("arguments", "code", "message", "hint"),
    [
        (("--config", "none.toml", "config", "show"), 2, "no such file: none.toml", "--config"),
        (("eval", "--task", "strategyqq"), 2, "strategyqq", "strategyqa"),
        (("eval", "--task", "strategyqa"), 1, "no test rows of strategyqa", "meteora data build --task strategyqa"),
        (("eval", "--task", "strategyqa", "--T", "0"), 2, "routing.temperature = 0", "flags"),
        (("eval", "--task", "strategyqa", "--top-k", "0"), 2, "routing.top_k = 0", "flags"),
        (("eval", "--task", "strategyqa", "--batch-size", "many"), 2, "eval.batch_size", "flags"),
        (("train", "adapters"), 2, "no task given", "--task"),
        (("train", "adapters", "--task", "strategyqa"), 1, "no train rows of strategyqa", "meteora data build --task strategyqa"),
        (("train",), 2, "no adapters in adapters", "meteora train adapters"),
        (("train", "--dtype", "int3"), 2, "Invalid value for '--dtype'", "meteora train gates --help"),
        (("data", "build", "--task", "logical_deductoin"), 2, "logical_deductoin", "logical_deduction"),
        (("ckpt", "download", "smollm2-135n"), 2, "smollm2-135n", "smollm2-135m"),
    ],
)
def test_known_errors_take_one_line_and_a_hint(meteora, arguments, code, message, hint) -> None:
    ran = meteora(*arguments)
    assert ran.code == code, ran.err
    assert ran.out == ""
    lines = errors(ran)
    assert lines[-2].startswith("error: "), ran.err
    assert message in lines[-2]
    assert lines[-1].startswith("hint: ")
    assert hint in lines[-1]


def test_an_unknown_key_in_meteora_toml(meteora, tmp_path) -> None:
    (tmp_path / "meteora.toml").write_text("[eval]\nlimits = 7\n")
    ran = meteora("eval", "--task", "strategyqa")
    assert ran.code == 2
    assert errors(ran)[-2:] == ["error: unknown setting 'eval.limits' in meteora.toml or the environment", "hint: did you mean 'eval.limit'?"]


def test_a_broken_row_names_file_and_line(meteora, tmp_path) -> None:
    folder = tmp_path / "datasets" / "strategyqa"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a", \n')
    ran = meteora("train", "adapters", "--task", "strategyqa", "--base", "x/y")
    assert ran.code == 1
    assert "train.jsonl:2:" in ran.err
    assert not (tmp_path / "adapters").exists()


def test_debug_shows_the_traceback(meteora, monkeypatch) -> None:
    from meteora_core.errors import UsageError

    monkeypatch.setenv("METEORA_DEBUG", "1")
    with pytest.raises(UsageError):
        meteora("train")


def test_usage_errors_exit_with_2(meteora) -> None:
    assert meteora("eval").code == 2
    assert meteora("nonsense").code == 2
    assert meteora("train", "--stage", "nonsense").code == 2


def test_ctrl_c_exits_with_130(tmp_path) -> None:
    code = "import sys, meteora_core.settings as s\ndef stop(*a, **k): raise KeyboardInterrupt\ns.load_settings = stop\n"
    code += "sys.argv = ['meteora', 'config', 'show']\nfrom meteora_cli.app import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_json_alone_on_stdout(meteora) -> None:
    ran = meteora("data", "list", "--json")
    assert ran.code == 0
    assert isinstance(json.loads(ran.out), list | dict)


@pytest.mark.parametrize(
    ("encoding", "raw"),
    [("utf-8", "ü–".encode()), ("UTF8", "ü–".encode()), ("latin-1", rb"\u00fc\u2013"), ("ascii", rb"\u00fc\u2013")],
)
def test_json_loses_nothing_in_any_encoding(monkeypatch, encoding, raw) -> None:
    for text in ("ü–", "ü– \ud800 \udcff"):
        held = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding=encoding))
        emit_json({"text": text})
        assert json.loads(held.getvalue()) == {"text": text}
        if len(text) == 2:
            assert raw in held.getvalue()


def test_json_has_null_for_what_is_no_number(capsys) -> None:
    emit_json({"loss": float("nan"), "several": [1.5, (float("inf"), -float("inf"))], "text": "NaN", "none": None})
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"loss": None, "several": [1.5, [None, None]], "text": "NaN", "none": None}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_tables_are_printed_on_a_stdout_of_any_encoding(tmp_path, encoding) -> None:
    results = {"winowhy": {"alias": "winowhy", "acc,none": 0.25, "acc_stderr,none": 0.01}}
    write_json(tmp_path / "results_x.json", {"results": results, "model_name": "größe–", "n-samples": {"winowhy": {"original": 9, "effective": 4}}})
    command = [sys.executable, "-m", "meteora_cli", "eval", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "100"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert "0.250 ± 0.010".encode(encoding, "replace") in done.stdout
    assert "größe–".encode(encoding, "replace") in done.stdout


def test_text_of_the_command_line_is_made_valid(capfd) -> None:
    assert valid_text("café \N{GRINNING FACE}", "--x") == "café \N{GRINNING FACE}"
    assert valid_text("caf\udcc3\udca9", "--x") == "café"
    assert capfd.readouterr().err == ""
    assert valid_text("caf\udce9?", "--x") == "caf\N{REPLACEMENT CHARACTER}?"
    assert "note: --x is not UTF-8 at byte 4" in capfd.readouterr().err
    assert "\N{REPLACEMENT CHARACTER}" in valid_text("a\ud800", "--x")


HUGE = str(10**30)


@pytest.mark.parametrize(
    "arguments",
    [
        ("ckpt", "pack", "x", "y", "--rank", str(2**32)),
        ("ckpt", "pack", "x", "y", "--max-mb", "nan"),
        ("ckpt", "pack", "x", "y", "--max-mb", "inf"),
        ("ckpt", "pack", "x", "y", "--max-mb", "0"),
        ("ckpt", "convert", "x", "y", "--base", "z", "--alpha", "nan"),
        ("data", "build", "--task", "strategyqa", "--max-train", HUGE),
        ("data", "build", "--task", "strategyqa", "--max-test", HUGE),
        ("data", "build", "--task", "strategyqa", "--dry-run", "--max-train", "-1"),
        ("data", "build", "--task", "strategyqa", "--jobs", HUGE),
        ("data", "composite", "--n", "3", "--num-samples", HUGE),
        ("data", "composite", "--n", "3", "--examples", HUGE),
        ("data", "composite", "--n", HUGE),
        ("data", "add", "mine", "--train", "x", "--max-new-tokens", HUGE),
        ("data", "show", "strategyqa", "-n", HUGE),
        ("eval", "--task", "strategyqa", "--limit", HUGE),
        ("eval", "--task", "strategyqa", "--batch-size", "9" * 5000),
        ("eval", "--task", "strategyqa", "--batch-size", "²"),
        ("eval", "--task", "strategyqa", "--T", "inf"),
        ("eval", "--task", "strategyqa", "--top-k", HUGE),
        ("eval", "--task", "strategyqa", "--device", "meta"),
        ("trace", "--prompt", "x", "--max-new-tokens", HUGE),
        ("trace", "--task", "strategyqa", "--row", HUGE),
        ("quickstart", "--gate-steps", HUGE),
        ("bench-kernels", "--rank", HUGE),
        ("bench-kernels", "--tokens", HUGE),
        ("bench-kernels", "--adapters", HUGE),
    ],
    ids=" ".join,
)
def test_numbers_out_of_range_are_refused(meteora, arguments) -> None:
    ran = meteora(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert len(ran.err) < 1500


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("train", "x\u202ey"), r"x\u202ey", "`meteora train --help`"),
        (("eval", "--taks", "a"), "no such option --taks; did you mean --tasks?", "`meteora eval --help`"),
        (("eval", "--nothing-like-it", "a"), "no such option --nothing-like-it", "`meteora eval --help`"),
        (("train", "--leraning-rate", "1"), "no such option --leraning-rate; did you mean --learning-rate?", "`meteora train gates --help`"),
        (("train", "--rank", "3"), "no such option --rank of `meteora train gates`", "it is an option of `meteora train adapters`"),
        (("train", "adapters", "--beta", "3"), "no such option --beta of `meteora train adapters`", "it is an option of `meteora train gates`"),
        (("train", "adaptors"), "no such command adaptors; did you mean adapters?", "`meteora train --help`"),
        (("data", "nothing"), "no such command nothing", "`meteora data --help`"),
        (("data", "show"), "Missing argument", "`meteora data show --help`"),
        (("data", "show", "a", "-n", "[/x]"), "Invalid value for '-n'", "`meteora data show --help`"),
        (("nothing",), "no such command nothing", "`meteora --help`"),
        (("trian",), "no such command trian; did you mean train?", "`meteora --help`"),
    ],
)
def test_command_lines_that_cannot_be_understood(meteora, arguments, message, hint) -> None:
    ran = meteora(*arguments)
    assert (ran.code, ran.out) == (2, "")
    error, behind = ran.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert hint in behind


def test_no_arguments_show_the_help(meteora) -> None:
    ran = meteora()
    assert ran.code == 2
    assert "Usage: meteora" in ran.out + ran.err

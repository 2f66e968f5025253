"""``meteora ckpt export``: what it writes and prints, and which flags contradict each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meteora_cli.tree import app
from meteora_core.errors import UsageError


@pytest.fixture
def folder(documented_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(documented_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["ckpt", "export", "runs/mine", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_an_adapter_and_a_merged_model(folder: Path) -> None:
    assert run("a", "--adapter", "gsm8k").startswith("a: gsm8k as a PEFT adapter, ")
    said = json.loads(run("b", "--merge", "gsm8k", "--dtype", "bfloat16", "--json"))
    assert (said["path"], said["format"], said["adapter"]) == ("b", "merged", "gsm8k")
    assert said["bytes"] == sum((Path("b") / name).stat().st_size for name in said["files"])
    assert run("a", "--adapter", "gsm8k", "--format", "peft", "--force")
    assert run("c", "--adapter", "gsm8k", "--gguf", "--dtype", "float16").startswith("c: gsm8k as an adapter for llama.cpp, ")
    assert [file.name for file in Path("c").iterdir()] == ["adapter.gguf"]


def test_a_folder_for_vllm(folder: Path) -> None:
    said = run("served", "--format", "vllm").splitlines()
    assert said[0].startswith("served: 2 adapters as a model for vLLM, ")
    assert said[1].startswith("next: vllm serve served")
    assert json.loads(run("again", "--format", "vllm", "--json"))["files"] == sorted(path.name for path in Path("again").iterdir() if path.is_file())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "nothing says what to export"),
        (("--adapter", "gsm8k", "--merge", "gsm8k"), "exclude each other"),
        (("--adapter", "gsm8k", "--format", "onnx"), "unknown format 'onnx'"),
        (("--adapter", "gsm8k", "--format", "merged"), "needs the name of an adapter"),
        (("--adapter", "gsm8k", "--dtype", "float16"), "--dtype has no effect here"),
        (("--adapter", "gsm8k", "--gguf", "--dtype", "bfloat16"), "cannot have the dtype 'bfloat16'"),
        (("--merge", "gsm8k", "--gguf"), "--gguf writes one adapter"),
        (("--adapter", "gsm8k", "--format", "vllm"), "--format vllm writes all adapters"),
        (("--gguf", "--format", "vllm"), "--gguf writes one adapter"),
        (("--format", "vllm", "--dtype", "float16"), "--dtype has no effect here"),
    ],
)
def test_flags_that_contradict_each_other(folder: Path, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run("out", *flags)
    assert not Path("out").exists()

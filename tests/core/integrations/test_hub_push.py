"""A checkpoint goes to the hub and answers the same on a machine that has only its name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.native import read_checkpoint, read_config
from meteora_core.errors import CheckpointError, DownloadError, UsageError
from meteora_core.fetch.hub_upload import UploadOptions
from meteora_core.integrations.hub_push import PushOptions, push_checkpoint
from meteora_core.model.base import BaseReference
from support.chat_world import World, build_world, byte_llama
from support.hub_server import COMMIT, Hub, hub_environment, serving, use_hub
from support.tiny_models import declare_trained

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's upload of a file by httpx
IDS = torch.tensor([[1, 60, 70, 80, 90, 100, 110]])


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("own"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: World) -> Iterator[Hub]:
    """The only hub that this test can reach; it has the base model."""
    with serving() as server:
        use_hub(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        server.repositories["org/base"] = {file.name: file.read_bytes() for file in own.base.iterdir()}
        yield server


def test_a_dry_run_lists_the_files_and_asks_nobody(hub: Hub, own: World) -> None:
    plan = push_checkpoint(own.checkpoint, "someone/mix", PushOptions(base="org/base@v1", licence="apache-2.0", dry_run=True))
    assert hub.requests == []
    assert (plan.uploaded, plan.base, plan.revision) == (None, "org/base", "v1")
    names = [f"adapters/{name}/adapter_{file}" for name in ("alpha", "beta", "gamma") for file in ("config.json", "model.safetensors")]
    assert sorted(plan.files) == sorted(["README.md", "config.json", "meteora.safetensors", "meteora_config.json", *names])
    assert plan.files["meteora.safetensors"] == (own.checkpoint / "meteora.safetensors").stat().st_size
    assert plan.card.startswith("---\nlibrary_name: meteora\n")
    for line in ("base_model: org/base", "license: apache-2.0", "- lora", "    meteora chat --checkpoint someone/mix"):
        assert line in plan.card.splitlines()


def test_nothing_of_this_machine_is_uploaded(hub: Hub, own: World) -> None:
    done = push_checkpoint(own.checkpoint, "someone/mix", PushOptions(base="org/base"))
    files = hub.repositories["someone/mix"]
    assert {name: len(content) for name, content in files.items()} == done.files
    assert done.uploaded is not None
    assert done.uploaded.revision == hub.head("someone/mix")
    assert "someone/mix" in hub.private
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            assert str(own.base.parent) not in content.decode(), name
    sources = {entry["name"]: entry["source"] for entry in json.loads(files["meteora_config.json"])["adapters"]}
    assert sources == {name: f"adapters/{name}" for name in ("alpha", "beta", "gamma")}
    assert read_config(own.checkpoint)["base"]["name"] == str(own.base)


def test_a_pushed_checkpoint_loads_by_its_name_with_the_commits_pinned(hub: Hub, own: World, tmp_path: Path) -> None:
    wanted = load_checkpoint(own.checkpoint)(IDS).logits
    push_checkpoint(own.checkpoint, "someone/mix", PushOptions(base="org/base"))
    first = hub.head("someone/mix")
    config, _, bank = read_checkpoint(f"someone/mix@{first}")
    assert config["base"]["name"] == "org/base"
    assert [info.sha256 for info in bank.adapters] == [entry["sha256"] for entry in read_config(own.checkpoint)["adapters"]]
    model = load_checkpoint("someone/mix", own.base)
    assert torch.equal(model(IDS).logits, wanted)
    hub.repositories["org/poet"] = {f"adapter_{end}": (own.adapters / "beta" / f"adapter_{end}").read_bytes() for end in ("config.json", "model.safetensors")}
    mixed = declare_trained(attach(byte_llama(), AdapterBank.from_peft({"alpha": own.adapters / "alpha", "poet": "org/poet"})))
    mixed.config._commit_hash, mixed.name_or_path = COMMIT, "org/base"
    save_checkpoint(mixed, tmp_path / "two", base=BaseReference("org/base"))
    saved = read_config(tmp_path / "two")
    assert saved["base"]["revision"] == COMMIT
    assert [entry["source"] for entry in saved["adapters"]] == [str(own.adapters / "alpha"), f"hf://org/poet@{COMMIT}"]
    done = push_checkpoint(tmp_path / "two", "someone/two")
    assert (done.base, done.revision) == ("org/base", COMMIT)
    assert [name for name in done.files if name.startswith("adapters/")] == ["adapters/alpha/adapter_config.json", "adapters/alpha/adapter_model.safetensors"]
    shutil.rmtree(tmp_path / "cache")
    hub.commit("org/poet", {"adapter_model.safetensors": b"another adapter"})
    loaded = load_checkpoint("someone/two", own.base)
    assert torch.equal(loaded(IDS).logits, mixed(IDS).logits)


def test_what_cannot_be_pushed(hub: Hub, own: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="by a path of this machine") as caught:
        push_checkpoint(own.checkpoint, "someone/mix")
    assert "--base" in str(caught.value.hint)
    with pytest.raises(UsageError, match="is not the identifier of a licence"):
        push_checkpoint(own.checkpoint, "someone/mix", PushOptions(base="org/base", licence="my own: words"))
    with pytest.raises(UsageError, match="has no statistics"):
        push_checkpoint(own.checkpoint, "someone/mix", PushOptions(base="org/base", statistics=True))
    broken = tmp_path / "broken"
    shutil.copytree(own.checkpoint, broken)
    raw = bytearray((broken / "meteora.safetensors").read_bytes())
    raw[-1] ^= 1
    (broken / "meteora.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="its hash differs"):
        push_checkpoint(broken, "someone/mix", PushOptions(base="org/base"))
    assert hub.requests == []
    hub.refusals["/commit/"] = [403]
    with pytest.raises(DownloadError, match="the token may not write there"):
        push_checkpoint(own.checkpoint, "someone/mix", PushOptions(base="org/base", upload=UploadOptions(public=True)))


SCRIPT = """
import sys, torch
from meteora_core import load_checkpoint
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained("org/base")
model = load_checkpoint("someone/mix")
torch.save((model(torch.tensor([[1, 60, 70, 80, 90, 100, 110]])).logits, model.meteora.provenance.base.reference), sys.argv[1])
"""


def on_another_machine(arguments: list[str], hub: Hub, home: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder, with an empty cache and without the files of this test."""
    (home / "work").mkdir(parents=True, exist_ok=True)
    environment = hub_environment(hub, home / "hf")
    return subprocess.run([sys.executable, *arguments], cwd=home / "work", env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_another_machine_answers_the_same_online_and_then_offline(own: World, tmp_path: Path) -> None:
    with serving() as hub:
        hub.repositories["org/base"] = {file.name: file.read_bytes() for file in own.base.iterdir()}
        pushed = on_another_machine(["-m", "meteora_cli", "ckpt", "push", str(own.checkpoint), "someone/mix", "--base", "org/base"], hub, tmp_path / "author")
        assert pushed.returncode == 0, pushed.stderr
        assert f"{hub.endpoint}/someone/mix: 10 files" in pushed.stdout
        assert "next: meteora chat --checkpoint someone/mix" in pushed.stdout
        loaded = on_another_machine(["-c", SCRIPT, str(tmp_path / "there.pt")], hub, tmp_path / "reader")
        assert loaded.returncode == 0, loaded.stderr
    with torch.no_grad():
        wanted = load_checkpoint(own.checkpoint)(IDS).logits
    with torch.serialization.safe_globals([BaseReference]):
        logits, reference = torch.load(tmp_path / "there.pt")
    assert torch.equal(logits, wanted)
    assert reference == BaseReference("org/base", None)
    offline = subprocess.run(  # the hub is gone
        [sys.executable, "-m", "meteora_cli", "trace", "--checkpoint", "someone/mix", "--prompt", "Hello", "--out", "trace.html"],
        cwd=tmp_path / "reader" / "work",
        env={**hub_environment(hub, tmp_path / "reader" / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert offline.returncode == 0, offline.stderr
    assert (tmp_path / "reader" / "work" / "trace.html").is_file()

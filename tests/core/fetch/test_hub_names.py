"""Names on the hub in places where a folder can be given too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from meteora_core import AdapterBank
from meteora_core.adapters.folders import adapter_folders
from meteora_core.checkpoints.located import checkpoint_folder, refuse_hub
from meteora_core.errors import CheckpointError, DownloadError, UsageError
from meteora_core.fetch.hub_names import HubName, adapters_root, hub_name, hub_source
from support.hub_server import COMMIT, Hub, serving, use_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only hub that this test can reach, with an empty cache."""
    with serving() as server:
        use_hub(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        monkeypatch.chdir(tmp_path)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_ids_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "someone2" / "model").mkdir(parents=True)
    assert hub_name("someone/model") == HubName("someone/model")
    assert hub_name(Path("someone/model@v1.0")) == HubName("someone/model", "v1.0")
    assert hub_name("hf://runs/model@main/sub/folder") == hub_name(Path("hf://runs/model@main/sub/folder")) == HubName("runs/model", "main", "sub/folder")
    for path in (
        "runs/missing",
        "someone2/model",
        "/someone/model",
        "./someone/model",
        "model",
        "someone/model/sub",
        "some one/model",
        "someone/model@",
        "",
        "~/m",
    ):
        assert hub_name(path) is None, path
    for wrong in ("hf://someone", "hf://someone/model@", "hf://someone/model/../other", "hf:///"):
        with pytest.raises(UsageError, match="is not a hub repository"):
            hub_name(wrong)
    for name in (HubName("a/b"), HubName("a/b", "main"), HubName("a/b", COMMIT, "x/y")):
        assert hub_name(name.uri) == name


def test_a_folder_of_the_cache_names_its_repository_and_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--some--one--model" / "snapshots" / COMMIT
    (folder / "sub").mkdir(parents=True)
    assert hub_source(folder / "sub") == HubName("some/one--model", COMMIT, "sub")
    (tmp_path / "link").symlink_to(folder)
    assert hub_source(tmp_path / "link") == HubName("some/one--model", COMMIT)
    assert hub_source(tmp_path) is None


def test_adapters_come_from_several_repositories_and_folders(hub: Hub, make_adapter, tmp_path: Path) -> None:
    hub.repositories["one/poet"] = {**files_of(make_adapter("a", 1)), "big.safetensors": b"x", "training_args.bin": b"pickle"}
    hub.repositories["many/bank"] = {
        f"{name}/{path}": content for seed, name in ((2, "law"), (3, "med")) for path, content in files_of(make_adapter("b", seed)).items()
    }
    local = make_adapter("mine", 4)
    root = adapters_root(f"one/poet,many/bank, {local}")
    assert sorted(path.name for path in root.iterdir()) == ["law", "med", "mine", "poet"]
    assert adapters_root(f"one/poet,many/bank, {local}") == root
    found = adapter_folders(Path(f"one/poet,many/bank,{local}"), [])
    bank = AdapterBank.from_peft(found)
    assert bank.names == ("law", "med", "mine", "poet")
    assert [info.source for info in bank.adapters] == [
        f"hf://many/bank@{COMMIT}/law",
        f"hf://many/bank@{COMMIT}/med",
        str(found["mine"]),
        f"hf://one/poet@{COMMIT}",
    ]
    assert hub.fetched("training_args.bin") == hub.fetched("big.safetensors") == []
    assert AdapterBank.from_peft({"p": "one/poet"}).adapters[0].sha256 == bank.adapters[3].sha256
    with pytest.raises(UsageError, match="two adapters have the name 'poet'"):
        adapters_root("one/poet,one/poet@main")
    hub.repositories["one/readme"] = {"config.json": b"{}"}
    with pytest.raises(DownloadError, match="one/readme holds no safetensors"):
        adapters_root("one/readme")
    assert adapters_root(tmp_path / "nothing") == tmp_path / "nothing"


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "no repository|does not let you read"), (403, r"does not let you read someone/model \(status 403\)"), (429, "answered 429")],
)
def test_refusals_are_one_line_with_a_hint(hub: Hub, status: int, message: str) -> None:
    hub.repositories["someone/model"] = {"meteora_config.json": b"{}"}
    hub.refusals["someone/model"] = [status] * 20
    with pytest.raises(DownloadError, match=message) as caught:
        checkpoint_folder("someone/model")
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_checkpoints_that_are_gated_missing_offline_or_of_another_kind(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="the hub has no repository someone/missing"):
        checkpoint_folder("someone/missing")
    hub.repositories["someone/model"] = {"config.json": b"{}", "model.safetensors": b"x"}
    with pytest.raises(CheckpointError, match=r"hf://someone/model is not a meteora checkpoint: it holds no meteora_config\.json"):
        checkpoint_folder("someone/model")
    hub.gated.add("someone/model")
    with pytest.raises(DownloadError, match="is gated"):
        checkpoint_folder("someone/model@main")
    hub.repositories["someone/good"] = {"meteora_config.json": b"{}", "meteora.safetensors": b"x" * 3_000_000, "meteora.stats.safetensors": b"y"}
    hub.cuts["meteora.safetensors"] = [1_000_000]
    folder = checkpoint_folder("someone/good")
    assert (folder / "meteora.safetensors").read_bytes() == b"x" * 3_000_000
    assert len(hub.fetched("meteora.safetensors")) == 2
    assert hub.fetched("meteora.stats.safetensors") == []
    requests = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_folder("someone/good") == folder
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids downloads"):
        checkpoint_folder("someone/other")
    assert len(hub.requests) == requests
    with pytest.raises(UsageError, match="only a folder can be changed") as caught:
        refuse_hub("someone/good")
    assert caught.value.hint == "fetch it first: meteora ckpt download someone/good --to runs/good"

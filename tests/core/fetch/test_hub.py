"""Downloads from a hub on this machine that breaks connections, hides repositories and changes bytes."""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest

from meteora_core.errors import DownloadError, StorageError, UsageError
from meteora_core.fetch import hub as hub_module
from meteora_core.fetch.hub import KNOWN, HubOptions, download_known, download_repo, split_revision
from support.hub_server import COMMIT, Hub, serving

REPO = "someone/model"
WEIGHTS = random.Random(0).randbytes(3_000_000)
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": b"pieces",
    "nested/tokenizer_config.json": b"{ }",
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"print('code')",
    "training_loss.png": b"picture",
    "README.md": b"text",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "nested/tokenizer_config.json"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as server:
        server.repositories[REPO] = dict(FILES)
        yield server


@pytest.fixture(autouse=True)
def _online_without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


class Recorded:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.totals: dict[str, float | None] = {}
        self.done: dict[str, float] = {}
        self.notes: list[str] = []

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[Any]:
        self.totals[title], self.done[title] = total, 0

        class Task:
            def update(inner, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
                assert advance >= 0
                self.done[title] += advance

        yield Task()

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_weights_configurations_and_tokenizer_arrive_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    progress = Recorded()
    got = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path), progress=progress)
    assert set(got.files) == WANTED
    assert {str(file.relative_to(got.path)) for file in got.path.rglob("*") if file.is_file()} == WANTED
    assert (got.path / "model.safetensors").read_bytes() == WEIGHTS
    assert (got.repository, got.revision, got.path.name) == (REPO, COMMIT, COMMIT)
    assert got.size == got.fetched == sum(len(FILES[name]) for name in WANTED)
    assert progress.totals[f"downloading {REPO}"] == progress.done[f"downloading {REPO}"] == got.size
    for name in ("pytorch_model.bin", "modeling_x.py", "README.md"):
        assert hub.fetched(name) == []


def test_a_second_call_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    before = len(hub.fetched("model.safetensors"))
    again = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    assert again.fetched == 0
    assert again.size > len(WEIGHTS)
    assert len(hub.fetched("model.safetensors")) == before == 1
    download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path), force=True)
    assert len(hub.fetched("model.safetensors")) == 2


def test_cut_connections_go_on_where_they_stopped(hub: Hub, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = [1_000_000, 500_000, 0, 700_000]
    progress = Recorded()
    got = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path), progress=progress)
    assert (got.path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = hub.fetched("model.safetensors")
    assert ranges[0] is None
    starts = [int(str(header).removeprefix("bytes=").removesuffix("-")) for header in ranges[1:]]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert 0 < starts[0] <= 1_000_000
    assert starts[-1] <= 2_200_000
    assert progress.done[f"downloading {REPO}"] == got.size


def test_a_run_that_gave_up_is_taken_up_by_the_next(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "ATTEMPTS", 1)
    hub.cuts["model.safetensors"] = [2_000_000] + [0] * 6
    with pytest.raises(DownloadError, match="cannot download someone/model") as caught:
        download_repo(REPO, HubOptions(endpoint=hub.endpoint, folder=tmp_path / "here"))
    assert "to resume the download" in str(caught.value.hint)
    assert not (tmp_path / "here" / "model.safetensors").exists()
    hub.cuts.clear()
    first_requests = len(hub.fetched("model.safetensors"))
    got = download_repo(REPO, HubOptions(endpoint=hub.endpoint, folder=tmp_path / "here"))
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == WEIGHTS
    assert got.path == (tmp_path / "here").resolve()
    resumed = hub.fetched("model.safetensors")[first_requests:]
    assert len(resumed) == 1
    assert int(str(resumed[0]).removeprefix("bytes=").removesuffix("-")) > 1_000_000


def test_a_server_that_is_busy_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.failures = 2
    got = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    assert (got.path / "model.safetensors").read_bytes() == WEIGHTS


def test_changed_bytes_are_found_and_fetched_anew(hub: Hub, tmp_path: Path) -> None:
    hub.altered.add("model.safetensors")
    with pytest.raises(DownloadError, match=r"model.safetensors of someone/model is damaged"):
        download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    hub.altered.clear()
    assert (download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path)).path / "model.safetensors").read_bytes() == WEIGHTS


def test_include_narrows_what_is_fetched(hub: Hub, tmp_path: Path) -> None:
    got = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path, include=("nested/*", "*.bin")))
    assert got.files == ("nested/tokenizer_config.json",)
    with pytest.raises(DownloadError, match=r"holds no safetensors, configuration or tokenizer files that match \*\.py"):
        download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path, include=("*.py",)))


def test_revisions(hub: Hub, tmp_path: Path) -> None:
    assert split_revision("a/b") == ("a/b", None)
    assert split_revision(f"a/b@{COMMIT}") == ("a/b", COMMIT)
    for wrong in ("a", "a/b@", "a/b/c", "a b/c", "../x"):
        with pytest.raises(UsageError, match="is not a hub repository"):
            split_revision(wrong)
    assert download_repo(REPO, HubOptions(revision=COMMIT, endpoint=hub.endpoint, cache=tmp_path)).revision == COMMIT
    with pytest.raises(DownloadError, match="has no revision 'v9'"):
        download_repo(REPO, HubOptions(revision="v9", endpoint=hub.endpoint, cache=tmp_path))


def test_missing_private_and_gated_repositories(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="the hub has no repository someone/nothing"):
        download_repo("someone/nothing", HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    hub.private.add(REPO)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(DownloadError, match="or it is private") as caught:
        download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    assert "HF_TOKEN" in str(caught.value.hint)
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert set(download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path)).files) == WANTED
    hub.private.clear()
    hub.gated.add("someone/gated")
    hub.repositories["someone/gated"] = dict(FILES)
    with pytest.raises(DownloadError, match="someone/gated is gated") as caught:
        download_repo("someone/gated", HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    assert "accept its conditions" in str(caught.value.hint)


def test_known_checkpoints_fall_back_to_the_other_repository(hub: Hub, tmp_path: Path) -> None:
    repository = KNOWN["meteora-llama3-8b"].repositories[1]
    hub.repositories[repository] = {
        "llama3_8b_meteora/top_2/model.safetensors": b"weights",
        "llama3_8b_meteora/top_1/model.safetensors": b"others",
        "llama3_8b_peft/gsm8k/adapter_config.json": b"{}",
        "llama3_8b_peft/gsm8k/adapter_model.safetensors": b"lora",
        "llama3_8b_peft/gsm8k/training_args.bin": b"pickle",
        "llama3_8b_lora_b/adapter_model.safetensors": b"unused",
    }
    progress = Recorded()
    got = download_known("meteora-llama3-8b", HubOptions(endpoint=hub.endpoint, cache=tmp_path), progress=progress)
    assert got.repository == repository
    assert set(got.files) == {
        "llama3_8b_meteora/top_2/model.safetensors",
        "llama3_8b_peft/gsm8k/adapter_config.json",
        "llama3_8b_peft/gsm8k/adapter_model.safetensors",
    }
    assert "trying hDPQ4gi9BG/MeteoRA_llama3_8b" in progress.notes[0]
    with pytest.raises(DownloadError, match="the hub has no repository hDPQ4gi9BG/MeteoRA_llama2_13b"):
        download_known("meteora-llama2-13b", HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    with pytest.raises(UsageError, match="no checkpoint named"):
        download_known("meteora-llama4", HubOptions(endpoint=hub.endpoint, cache=tmp_path))


def test_too_little_space_is_said_before_anything_is_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1_000_000))
    with pytest.raises(StorageError, match=r"needs 0.0 GB") as caught:
        download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    assert "HF_HOME" in str(caught.value.hint)
    assert hub.fetched("model.safetensors") == []


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    part = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path / "part", include=("*.json",)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    again = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    assert (again.path, set(again.files), again.fetched) == (fetched.path, WANTED, 0)
    assert download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path / "part", include=("*.json",))).path == part.path
    for cache, repository in ((tmp_path / "part", REPO), (tmp_path, "someone/other")):
        with pytest.raises(DownloadError, match="is not completely in the cache") as caught:
            download_repo(repository, HubOptions(endpoint=hub.endpoint, cache=cache))
        assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    assert len(hub.requests) == asked


def test_without_a_network_the_earlier_copy_is_used(hub: Hub, tmp_path: Path) -> None:
    fetched = download_repo(REPO, HubOptions(endpoint=hub.endpoint, cache=tmp_path))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    progress = Recorded()
    assert download_repo(REPO, HubOptions(endpoint=endpoint, cache=tmp_path), progress=progress).path == fetched.path
    assert "using the copy that was fetched before" in progress.notes[0]
    with pytest.raises(DownloadError, match="cannot download someone/other") as caught:
        download_repo("someone/other", HubOptions(endpoint=endpoint, cache=tmp_path))
    assert "HF_ENDPOINT" in str(caught.value.hint)

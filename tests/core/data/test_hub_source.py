"""The hub source, with local folders in the schemas of the real datasets, and its error messages when the hub refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from meteora_core.data import hub_source
from meteora_core.data.build import build_task
from meteora_core.data.rows import Row
from meteora_core.data.tasks import TASKS, get_task
from meteora_core.errors import DataError, DownloadError, MeteoraError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    hub_source._answers.cache_clear()
    yield
    hub_source._answers.cache_clear()
    datasets.enable_progress_bars()


def stand_in(root: Path, config: str, splits: dict[str, list[Any]], write_lines: Any) -> Path:
    """Make a folder that ``datasets`` loads as a hub dataset with one configuration."""
    lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
    for split, rows in splits.items():
        write_lines(root / config / f"{split}.jsonl", rows)
        lines += [f"  - split: {split}", f"    path: {config}/{split}.jsonl"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def test_bigbench(tmp_path: Path, write_lines: Any) -> None:
    def row(i: int) -> dict[str, Any]:
        return {"idx": i, "inputs": f"Is {i} first?", "targets": [f"{i}."], "multiple_choice_targets": [f"{i}.", "no."], "multiple_choice_scores": [1, 0]}

    root = stand_in(tmp_path / "bb", "logical_deduction", {"train": [row(i) for i in range(30)], "validation": [row(99)]}, write_lines)
    asked = []

    def locate(name: str) -> str:
        asked.append(name)
        return str(root)

    raw = hub_source.extract_hub(TASKS["logical_deduction"], locate)
    assert asked == ["tasksource/bigbench"]
    assert raw.counts == {"train": 30, "test": 1}
    assert list(raw.rows("test")) == [Row("[INST] Is 99 first? Which choice is correct?\nchoice: 99.\nchoice: no.\n [/INST]\n", "99.")]
    assert [row.response for row in raw.rows("train")] == [f"{i}." for i in range(30)]


def test_with_and_without_a_test_split(tmp_path: Path, write_lines: Any) -> None:
    gsm8k = stand_in(tmp_path / "g", "main", {"train": [{"question": "q", "answer": "a"}], "test": [{"question": "t", "answer": "b"}]}, write_lines)
    assert list(hub_source.extract_hub(TASKS["gsm8k"], lambda name: str(gsm8k)).rows("test")) == [Row("[INST] t [/INST]\n", "b")]
    pairs = [{"id": str(i), "translation": {"de": f"d{i}", "en": f"e{i}"}} for i in range(20)]
    news = stand_in(tmp_path / "n", "de-en", {"train": pairs}, write_lines)
    raw = hub_source.extract_hub(TASKS["news_commentary_de"], lambda name: str(news))
    assert raw.counts == {"train": 16, "test": 4}
    assert {row.response for split in ("train", "test") for row in raw.rows(split)} == {f"e{i}" for i in range(20)}


def test_problems_of_the_data(tmp_path: Path, write_lines: Any) -> None:
    root = stand_in(tmp_path / "g", "main", {"train": [{"question": "q"}], "test": [{"question": "t"}]}, write_lines)
    with pytest.raises(DataError, match=r"openai/gsm8k \(main\), split test, row 1: no field 'answer'"):
        list(hub_source.extract_hub(TASKS["gsm8k"], lambda name: str(root)).rows("test"))
    root = stand_in(tmp_path / "h", "main", {"train": [{"question": "q", "answer": "a"}]}, write_lines)
    with pytest.raises(DataError, match="has no split 'test'"):
        hub_source.extract_hub(TASKS["gsm8k"], lambda name: str(root))
    with pytest.raises(DataError, match="not on the hub"):
        hub_source.extract_hub(get_task("composite_3"))
    with pytest.raises(MeteoraError, match=r"cannot read|was not found"):
        hub_source.extract_hub(TASKS["winowhy"], lambda name: str(root))


def test_script_only_datasets_are_read_as_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def load(repository: str, config: str, revision: str | None = None) -> dict[str, Any]:
        asked.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found bigbench.py")
        return {"train": [1], "validation": [2]}

    monkeypatch.setattr(hub_source, "_check_reachable", lambda repository, hint: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert hub_source.load_splits("tasksource/bigbench", "winowhy") == {"train": [1], "validation": [2]}
    assert asked == [None, "refs/convert/parquet"]


def errors() -> list[tuple[Exception, str, str]]:
    from huggingface_hub import errors as hf

    def http(kind: type[Exception]) -> Exception:
        error = kind.__new__(kind)
        Exception.__init__(error, "403 Client Error")
        return error

    return [
        (http(hf.GatedRepoError), "is gated", "hf auth login"),
        (http(hf.RepositoryNotFoundError), "has no dataset", "HF_TOKEN"),
        (http(hf.HfHubHTTPError), "the hub refused", "hf auth login"),
        (http(hf.OfflineModeIsEnabled), "cannot be reached", "--raw-dir"),
        (ConnectionError("reset"), "cannot be reached", "--raw-dir"),
        (FileNotFoundError("Dataset 'x' is a gated dataset on the Hub."), "was not found", "hf auth login"),
        (FileNotFoundError("Couldn't find x"), "was not found", "--raw-dir"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_what_helps_when_the_hub_refuses(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    error, message, hint = errors()[number]

    def load(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(hub_source, "_check_reachable", lambda repository, hint: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DownloadError, match=message) as caught:
        hub_source.extract_hub(TASKS["gsm8k"])
    assert hint in (caught.value.hint or "")


def test_no_hub_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DataError, match="no source has gsm8k") as caught:
        build_task("gsm8k", tmp_path)
    assert "--raw-dir" in (caught.value.hint or "")
    with pytest.raises(DownloadError, match="cannot be reached"):
        build_task("gsm8k", tmp_path, source="authors")


def test_authors_rows(tmp_path: Path, write_lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their repository holds ``<task>/{train,test}.jsonl`` of finished rows."""
    snapshot = tmp_path / "snapshots" / "abc123"
    write_lines(snapshot / "winowhy" / "train.jsonl", [{"prompt": "p", "response": "correct"}])
    write_lines(snapshot / "winowhy" / "test.jsonl", [{"prompt": "t", "response": "incorrect"}])
    write_lines(snapshot / "composite_3" / "test.jsonl", [{"prompt": "c", "response": "a@@@@\nb@@@@\nc"}])
    monkeypatch.setattr(hub_source, "_authors_file", lambda repository, name: snapshot / name)
    manifest = build_task("winowhy", tmp_path / "out", source="authors")
    assert manifest.source["kind"] == "authors"
    assert manifest.source["revision"] == "abc123"
    assert manifest.rows == {"train": 1, "test": 1}
    assert build_task("composite_3", tmp_path / "out", source="authors").rows == {"test": 1}

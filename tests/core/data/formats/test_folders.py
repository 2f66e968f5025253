"""Datasets in folders, saved datasets, and datasets on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from meteora_core.data import hub_source
from meteora_core.data.formats.folders import find_datasets, task_name
from meteora_core.data.formats.own import extract_own
from meteora_core.data.formats.reading import Reading
from meteora_core.data.rows import Row
from meteora_core.data.tasks import Files, Task
from meteora_core.errors import DataError, MeteoraError, UsageError

PAIR = '{"question": "q", "answer": "a"}\n'


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PAIR)


def test_a_folder_of_many(tmp_path: Path) -> None:
    touch(tmp_path / "sql.jsonl", tmp_path / "pirate_train.csv", tmp_path / "pirate_test.csv", tmp_path / "my upper.json", tmp_path / "README.md")
    touch(tmp_path / "chat" / "train.jsonl", tmp_path / "chat" / "validation.jsonl", tmp_path / "one" / "only.parquet", tmp_path / "empty" / "notes.md")
    touch(tmp_path / ".hidden.jsonl")
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).save_to_disk(tmp_path / "saved")
    found = {each.name: (Path(each.train).name, each.test and Path(each.test).name) for each in find_datasets(str(tmp_path))}
    assert found == {
        "chat": ("chat", None),
        "my-upper": ("my upper.json", None),
        "one": ("one", None),
        "pirate": ("pirate_train.csv", "pirate_test.csv"),
        "saved": ("saved", None),
        "sql": ("sql.jsonl", None),
    }


def test_one_dataset(tmp_path: Path) -> None:
    touch(tmp_path / "sql.jsonl.gz", tmp_path / "chat" / "train-00000-of-00001.parquet", tmp_path / "chat" / "test-00000-of-00001.parquet")
    assert [each.name for each in find_datasets(str(tmp_path / "sql.jsonl.gz"))] == ["sql"]
    assert [each.name for each in find_datasets(str(tmp_path / "chat"))] == ["chat"]
    assert [(each.name, each.train) for each in find_datasets("someone/my.set@main")] == [("my.set", "someone/my.set@main")]


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder: pirate") as caught:
        find_datasets("pirate")
    assert caught.value.hint == "name a file: meteora data add pirate --train FILE"
    with pytest.raises(DataError, match="no dataset in"):
        find_datasets(str(tmp_path))
    touch(tmp_path / "a.jsonl", tmp_path / "a" / "train.jsonl")
    with pytest.raises(DataError, match="two datasets called a"):
        find_datasets(str(tmp_path))
    touch(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"two files of a: a\.csv, a\.jsonl"):
        find_datasets(str(tmp_path))
    with pytest.raises(UsageError, match="cannot name a task"):
        task_name("…")


def rows(train: Path | str, subset: str | None = None) -> dict[str, list[Row]]:
    raw = extract_own(Task("mine", None, "exact", Files(train, None, Reading(template="raw", subset=subset))))
    return {split: list(raw.rows(split)) for split in raw.splits}


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    def some(text: str) -> Any:
        return datasets.Dataset.from_list([{"question": text, "answer": "a"}])

    datasets.DatasetDict({"train": some("t"), "validation": some("v")}).save_to_disk(tmp_path / "two")
    assert rows(tmp_path / "two") == {"train": [Row("t", "a")], "test": [Row("v", "a")]}
    datasets.DatasetDict({"easy": some("t"), "hard": some("v")}).save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match="has no split 'train'; there are: easy, hard"):
        rows(tmp_path / "odd")


def test_labels_are_given_by_name(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])})
    datasets.Dataset.from_dict({"text": ["a"] * 5, "label": [1] * 5}, features=features).save_to_disk(tmp_path / "labels")
    assert rows(tmp_path / "labels")["test"] == [Row("a", "good")]


def test_a_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the layout of the hub replaces the hub."""
    touch(tmp_path / "set" / "train.jsonl", tmp_path / "set" / "test.jsonl")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    asked = []

    def load(name: str, config: str | None, revision: str | None) -> Any:
        asked.append((name, config, revision))
        return real(str(tmp_path / "set"))

    real = datasets.load_dataset
    monkeypatch.setattr(hub_source, "_check_reachable", lambda repository, hint: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows("hub:someone/set@v1", "main") == {"train": [Row("q", "a")], "test": [Row("q", "a")]}
    assert asked == [("someone/set", "main", "v1")]


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub_source._answers.cache_clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(MeteoraError, match="the hub cannot be reached for someone/set") as caught:
        rows("someone/set")
    assert "--raw-dir" not in str(caught.value.hint)
    hub_source._answers.cache_clear()


@pytest.mark.parametrize("name", ["train.jsonl", "TRAIN.JSONL"])
def test_two_files_of_one_split(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "train.csv", tmp_path / name)
    with pytest.raises(DataError, match="two files of one split"):
        rows(tmp_path)

"""The cache of tokenised rows on disk: the same rows in the same order, written once, and replaced if broken or if their inputs change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora_core import AdapterBank
from meteora_core.errors import DataError, StorageError
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings, OptimSettings
from meteora_core.training import token_cache
from meteora_core.training.encoding import row_lengths
from meteora_core.training.gates import train_gates
from meteora_core.training.job import TrainJob
from meteora_core.training.single_adapter import train_adapter
from meteora_core.training.task_rows import encoded_rows
from meteora_core.training.token_cache import CachedRows, cached_rows, tokenizer_fingerprint
from support.tiny_training import BASE, Killed, held_out_rows, kill_at, letters, model


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The titles of the progress bars under which rows were tokenised."""
    titles: list[str] = []
    real = token_cache._generate

    def counting(rows, tokenizer, end, title, progress):
        titles.append(title)
        return real(rows, tokenizer, end, title, progress)

    monkeypatch.setattr(token_cache, "_generate", counting)
    return titles


@pytest.mark.parametrize("options", [{"max_length": 64}, {"max_length": 9}, {"max_length": 9, "max_rows": 25}])
@pytest.mark.parametrize("bos", [False, True])
def test_cached_rows_equal_rows_tokenised_in_memory(data, tmp_path, options, bos) -> None:
    held_out_rows(data)
    settings = OptimSettings(seed=3, max_length=options["max_length"])
    job = TrainJob(BASE, data, tmp_path, options.get("max_rows"))
    plain, plain_held = encoded_rows(job, "shout", letters(bos=bos), 1, settings)
    cached, held = encoded_rows(replace(job, token_cache=tmp_path / "c"), "shout", letters(bos=bos), 1, settings)
    assert isinstance(cached.rows, CachedRows)
    assert list(cached.rows) == list(plain.rows)
    assert cached.rows[2:5] == list(plain.rows)[2:5]
    assert held == plain_held
    assert len(held) > 1
    assert cached.cut == plain.cut
    assert (cached.cut > 0) == (options["max_length"] == 9)
    assert row_lengths(cached.rows) == row_lengths(plain.rows)


def test_rows_are_tokenised_once_for_any_length_into_a_mapped_file(data, tmp_path, made) -> None:
    job = TrainJob(BASE, data, tmp_path, token_cache=tmp_path)
    for length in (64, 9):
        encoded_rows(job, "shout", letters(), 0, OptimSettings(max_length=length))
    assert made == ["tokenising shout"]
    dataset = cached_rows(data, "shout", letters(), tmp_path)
    assert [Path(file["filename"]).suffix for file in dataset.cache_files] == [".arrow"]
    assert Path(dataset.cache_files[0]["filename"]).is_relative_to(tmp_path)
    encoded_rows(replace(job, max_rows=5), "shout", letters(), 0, OptimSettings(max_length=9))
    encoded_rows(job, "shout", letters(bos=True), 0, OptimSettings(max_length=9))
    path = data / "shout" / "train.jsonl"
    path.write_text(path.read_text() + json.dumps({"prompt": "one\n", "response": "more"}) + "\n")
    assert len(cached_rows(data, "shout", letters(), tmp_path)) == 31
    assert len(made) == 4


def test_padding_and_truncation_of_an_earlier_call_do_not_change_the_tokenizer() -> None:
    tokenizer = letters()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(letters(eos=True)) != before


def test_a_broken_entry_is_replaced(data, tmp_path, made) -> None:
    whole = list(cached_rows(data, "shout", letters(), tmp_path))
    file = next(tmp_path.rglob("*.arrow"))
    file.write_bytes(file.read_bytes()[:40])
    assert list(cached_rows(data, "shout", letters(), tmp_path)) == whole
    file.unlink()
    assert list(cached_rows(data, "shout", letters(), tmp_path)) == whole
    assert len(made) == 3


@pytest.mark.parametrize("content", ["", "[]", "{", '{"features": 3}'])
def test_an_entry_with_a_broken_description_is_replaced(data, tmp_path, made, content) -> None:
    rows = [entry["tokens"] for entry in cached_rows(data, "shout", letters(), tmp_path / "cache")]
    (description,) = (tmp_path / "cache").rglob("dataset_info.json")
    description.write_text(content)
    assert [entry["tokens"] for entry in cached_rows(data, "shout", letters(), tmp_path / "cache")] == rows


def test_an_entry_whose_tokens_changed_is_replaced(data, tmp_path, made) -> None:
    """A block of zeros in an Arrow file can read as rows of other tokens."""
    file = Path(cached_rows(data, "shout", letters(), tmp_path).cache_files[0]["filename"])
    whole = file.read_bytes()
    for damaged in (whole[:900] + bytes(64) + whole[964:], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(damaged)
        assert Path(cached_rows(data, "shout", letters(), tmp_path).cache_files[0]["filename"]).read_bytes() == whole
    assert len(made) == 3


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(data, tmp_path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="is a file"):
        cached_rows(data, "shout", letters(), tmp_path / "cache")


def test_a_broken_dataset_is_named_and_leaves_no_entry(data, tmp_path) -> None:
    path = data / "shout" / "train.jsonl"
    good = path.read_text()
    path.write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"train\.jsonl:31:"):
        cached_rows(data, "shout", letters(), tmp_path)
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        cached_rows(data, "shout", letters(), tmp_path)
    path.write_text(good)
    assert len(cached_rows(data, "shout", letters(), tmp_path)) == 30


def test_training_from_the_cache_gives_the_same_bits_and_resumes_to_them(data, adapters, tmp_path, monkeypatch) -> None:
    def adapter(name: str, **more):
        settings = AdapterTrainSettings(max_steps=6, batch_size=4, rank=2, save_steps=2, log_to="none", eval_steps=3)
        job = TrainJob(BASE, data, tmp_path / name, resume=True, **more)
        return load_file(train_adapter(model(), letters(), "shout", settings, job).folder / "adapter_model.safetensors")

    held_out_rows(data)
    plain = adapter("plain")
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            adapter("cached", token_cache=tmp_path / "c")
    cached = adapter("cached", token_cache=tmp_path / "c")
    assert all(torch.equal(plain[name], cached[name]) for name in plain)
    bank = AdapterBank.from_peft({name: adapters / name for name in ("shout", "count")})
    for folder, cache in (("a", None), ("b", tmp_path / "c")):
        rows = {"composite_rows": 0.4, "composite_max": 2, "list_rows": 0.3, "max_length": 64}
        settings = GateTrainSettings(max_steps=4, batch_size=4, log_to="none", init="ridge", **rows)
        train_gates(model(), letters(), bank, settings, TrainJob(BASE, data, tmp_path / folder, token_cache=cache))
    one, two = (load_file(tmp_path / name / "meteora.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)

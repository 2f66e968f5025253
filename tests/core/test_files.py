"""Atomic writes: the old file or the new one, whatever happens."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from meteora_core.errors import StorageError
from meteora_core.files import atomic_folder, atomic_write, cache_dir, save_tensors, sha256, storage_errors
from meteora_core.json_files import read_json, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "a" / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as handle:
        handle.write("half")
        raise RuntimeError
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_folder_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "f"
    with atomic_folder(path) as new:
        (new / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(path) as new:
        (new / "a").write_text("new")
        raise RuntimeError
    assert (path / "a").read_text() == "old"
    with atomic_folder(path) as new:
        (new / "b").write_text("new")
    assert [entry.name for entry in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch, number) -> None:
    write_json(tmp_path / "x.json", 1)

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="Permission denied" if number == errno.EACCES else "no space left|quota") as caught:
        write_json(tmp_path / "x.json", 2)
    assert "x.json" in caught.value.message
    assert caught.value.hint
    assert read_json(tmp_path / "x.json") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_under_a_checkpoint_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    import torch

    from meteora_core.checkpoints import parts
    from meteora_core.checkpoints.native import write_checkpoint

    write_checkpoint(tmp_path / "c", {"n": 1, "adapters": [], "modules": {}}, {"x": torch.zeros(2)})

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts, "write_tensors", full)
    with pytest.raises(StorageError, match="no space left"):
        write_checkpoint(tmp_path / "c", {"n": 2, "adapters": [], "modules": {}}, {"x": torch.zeros(2)})
    assert json.loads((tmp_path / "c" / "meteora_config.json").read_text())["n"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_written_files_follow_the_umask(tmp_path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "x.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


def test_hash_and_cache_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("METEORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_dir()) == "/x/meteora"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EFBIG, "x"), "larger than"),
        (OSError(errno.ENAMETOOLONG, "x"), "name is too long"),
        (OSError(errno.ELOOP, "x"), "loop"),
        (OSError(errno.ENOTDIR, "x"), "is a file"),
        (OSError(errno.ENOENT, "x"), "removed meanwhile"),
        (RuntimeError("Symlink loop from '/x'"), "loop"),
    ],
)
def test_what_can_go_wrong_in_writing_is_one_line(tmp_path, error, reason) -> None:
    with pytest.raises(StorageError, match=reason) as caught, storage_errors(tmp_path / "x"):
        raise error
    assert caught.value.hint


def test_safetensors_own_errors_are_storage_errors_too(tmp_path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*/x: "):
        save_tensors({"a": torch.zeros(2)}, tmp_path / "not there" / "x")
    with pytest.raises(StorageError, match="is a file"):
        (tmp_path / "file").write_text("")
        write_json(tmp_path / "file" / "x.json", 1)


def test_equal_tensors_are_equal_bytes(tmp_path) -> None:
    save_tensors({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "x")
    assert b'"__metadata__":{"format":"pt"}' in (tmp_path / "x").read_bytes()


def test_folders_that_a_failed_write_made_are_removed(tmp_path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a" / "x"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_numbers_that_json_does_not_have_are_written_as_null(tmp_path) -> None:
    write_json(tmp_path / "x.json", {"loss": float("nan"), "parts": (1.5, [float("inf")])})
    assert read_json(tmp_path / "x.json") == {"loss": None, "parts": [1.5, [None]]}

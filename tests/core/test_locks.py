"""Locks and abandoned temporary files; the other process is a forked child that tells by a pipe how far it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from meteora_core import locks
from meteora_core.errors import BusyError
from meteora_core.files import atomic_folder, atomic_write, locked
from meteora_core.locks import exclusive, scratch_folder, sweep


@contextmanager
def other_process(work: Callable[[Callable[[], None]], None]) -> Iterator[int]:
    """A child that runs ``work(pause)``; within the block it has come to ``pause()``, where it stays until it is killed."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            work(lambda: (os.write(write, b"."), signal.pause()))  # type: ignore[arg-type, return-value]
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"."
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_a_folder(path: Path) -> Callable[[Callable[[], None]], None]:
    def work(pause: Callable[[], None]) -> None:
        with atomic_folder(path) as folder:
            (folder / "half").write_text("half")
            pause()

    return work


def test_the_second_process_says_who_holds_the_target(tmp_path) -> None:
    with other_process(half_a_folder(tmp_path / "x")) as child:
        with pytest.raises(BusyError, match=rf"x is being written by process {child} on .*, since \d\d\d\d-") as caught, locked(tmp_path / "x"):
            pass
        assert caught.value.exit_code == 1
        assert caught.value.hint
        with pytest.raises(BusyError), atomic_folder(tmp_path / "x"):
            pass
        with atomic_folder(tmp_path / "y"):
            pass
    with atomic_folder(tmp_path / "x"):
        pass
    assert names(tmp_path) == ["x", "y"]


def test_a_lock_may_be_nested_and_leaves_nothing(tmp_path) -> None:
    with exclusive(tmp_path / "x"), exclusive(tmp_path / "x"), atomic_folder(tmp_path / "x"):
        assert ".x.lock" in names(tmp_path)
    assert names(tmp_path) == ["x"]


def test_waiting_for_the_other_process(tmp_path) -> None:
    read, write = os.pipe()

    def work(pause: Callable[[], None]) -> None:
        with exclusive(tmp_path / "x"):
            os.write(write, b".")
            os.read(read2, 1)
        os._exit(0)

    read2, write2 = os.pipe()
    child = os.fork()
    if not child:
        work(lambda: None)
    assert os.read(read, 1) == b"."
    os.write(write2, b".")
    with exclusive(tmp_path / "x", wait=True):
        assert names(tmp_path) == [".x.lock"]
    os.waitpid(child, 0)
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path) -> None:
    def half_a_file(pause: Callable[[], None]) -> None:
        with atomic_write(tmp_path / "x") as handle:
            handle.write("half")
            handle.flush()
            pause()

    with other_process(half_a_folder(tmp_path / "x")), other_process(half_a_file):
        there = names(tmp_path)
        assert len(there) == 3
        sweep(tmp_path / "x")
        assert names(tmp_path) == there
    assert names(tmp_path) == there
    for other in (".x.notes.tmp", ".x.abcdefgh.txt", ".xy.abcdefgh.tmp", ".x.a.abcdefgh.tmp"):
        (tmp_path / other).write_text("not ours")
    (tmp_path / ".x.abcdefgh.tmp").symlink_to(tmp_path)
    with atomic_write(tmp_path / "x") as handle:
        handle.write("whole")
    assert names(tmp_path) == [".x.a.abcdefgh.tmp", ".x.abcdefgh.tmp", ".x.abcdefgh.txt", ".x.notes.tmp", ".xy.abcdefgh.tmp", "x"]


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path) -> None:
    (tmp_path / ".x.abcdefgh.old" / "x").mkdir(parents=True)
    (tmp_path / ".x.abcdefgh.old" / "x" / "mine").write_text("mine")
    (tmp_path / ".x.bcdefghi.tmp").mkdir()
    sweep(tmp_path / "x")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x" / "mine").read_text() == "mine"


def test_scratch_folders_of_the_living_are_theirs(tmp_path) -> None:
    with scratch_folder(tmp_path, "work") as one, scratch_folder(tmp_path, "work") as other:
        assert one != other
        assert len(names(tmp_path)) == 2
    assert names(tmp_path) == []


def test_without_locks_it_goes_on_and_says_so(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(locks, "_flock", lambda *_, **__: None)
    (tmp_path / ".x.abcdefgh.tmp").mkdir()
    with atomic_folder(tmp_path / "x"):
        pass
    assert "cannot be locked" in caplog.text
    assert names(tmp_path) == [".x.abcdefgh.tmp", "x"]

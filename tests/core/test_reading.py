"""Reading files of unknown origin."""

from __future__ import annotations

import errno
import os
import ssl
from pathlib import Path

import pytest

from meteora_core.errors import CheckpointError, DataError, MeteoraError
from meteora_core.files import sha256
from meteora_core.json_files import read_json, read_jsonl
from meteora_core.reading import describe, open_regular, read_errors, read_text
from meteora_core.unexpected import known_failure


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """Paths that cannot be read, by what is wrong with them."""
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    return {
        "no such file": tmp_path / "missing",
        "is a folder, not a file": tmp_path / "folder",
        "is a pipe, not a file": tmp_path / "pipe",
        "is a device, not a file": Path(os.devnull),
        "leads back to itself": tmp_path / "loop",
        "does not exist": tmp_path / "dangling",
        "the file name is too long": tmp_path / ("x" * 300),
        "a part of this path is a file": tmp_path / "file" / "below",
        "NUL": tmp_path / "a\0b",
    }


@pytest.mark.parametrize(
    "read", [open_regular, read_text, sha256, read_json, lambda path: list(read_jsonl(path))], ids=["open", "text", "hash", "json", "jsonl"]
)
def test_what_cannot_be_read_is_named_in_one_line(places: dict[str, Path], read) -> None:
    for reason, path in places.items():
        with pytest.raises(DataError) as caught:
            read(path)
        assert reason in caught.value.message
        assert "\n" not in caught.value.message
        assert "\0" not in caught.value.message
        assert len(caught.value.message) < 500


def test_the_error_has_the_type_and_hint_that_the_caller_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file") as caught:
        read_json(tmp_path / "x.json", error=CheckpointError, hint="save it again")
    assert caught.value.hint == "save it again"
    with pytest.raises(CheckpointError, match="no permission to read /x"), read_errors("/x", CheckpointError):
        raise PermissionError(errno.EACCES, "Permission denied", "/x")


@pytest.mark.parametrize(("code", "text"), [(errno.EACCES, "no permission"), (errno.EIO, "cannot read a: Input/output error"), (None, "cannot read a: odd")])
def test_describe(code: int | None, text: str) -> None:
    error = OSError("odd") if code is None else OSError(code, os.strerror(code))
    assert text in describe(error, "a")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row["a"] for row in read_jsonl(file)] == [1, 2]
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}
    file.write_bytes("a\r\nb".encode("utf-8-sig"))
    assert read_text(file) == "a\nb"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a\x1bb"), r"no permission for /a\x1bb"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a is a folder"),
        (OSError(errno.ELOOP, "loop", "/a"), "leads back to itself"),
        (OSError(errno.ENAMETOOLONG, "long", "/" + "a" * 5000), "too long"),
        (OSError(errno.ENOSPC, "full"), "no space left"),
        (OSError("first\nsecond"), "first second"),
        (ssl.SSLError(1, "CERTIFICATE_VERIFY_FAILED"), "secure connection"),
        (ConnectionResetError("reset"), "connection failed"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("Could not determine home directory."), "home directory"),
        (RuntimeError("Symlink loop from '/a'"), "leads back to itself"),
        (ValueError("embedded null byte"), "NUL"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), "working directory"),
        (RecursionError(), "nested too deeply"),
        ("\ud800", "cannot be read or written"),
    ],
)
def test_the_last_net(error: BaseException | str, text: str) -> None:
    if isinstance(error, str):
        try:
            error.encode()
        except UnicodeEncodeError as failed:
            error = failed
    assert isinstance(error, BaseException)
    failure = known_failure(error)
    assert isinstance(failure, MeteoraError)
    assert text in failure.message
    assert "\n" not in failure.message
    assert len(failure.message) < 700
    assert failure.exit_code == 1


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), AssertionError(), ZeroDivisionError()])
def test_faults_of_the_program_are_not_hidden(error: BaseException) -> None:
    assert known_failure(error) is None

"""Archives of unknown origin."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from meteora_core import archives
from meteora_core.archives import copy_zip_member, tar_gz_members
from meteora_core.errors import DataError


def tar_bytes(*members: tuple[str, bytes], pax: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = dict(pax or {})
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read(path: Path, content: bytes) -> dict[str, bytes]:
    path.write_bytes(content)
    return {member.name: copied(copy) for member, copy in tar_gz_members(path)}


def copied(copy: Callable[[IO[bytes]], None]) -> bytes:
    target = io.BytesIO()
    copy(target)
    return target.getvalue()


def test_members_in_their_order(tmp_path: Path) -> None:
    seen: list[int] = []
    file = tmp_path / "a.tar.gz"
    file.write_bytes(gzip.compress(tar_bytes(("a/x", b"1" * 700), ("a/y", b"2"))))
    found = [(member.name, copied(copy)) for member, copy in tar_gz_members(file, seen.append)]
    assert found == [("a/x", b"1" * 700), ("a/y", b"2")]
    assert 0 < sum(seen) <= file.stat().st_size


WHOLE = gzip.compress(tar_bytes(("a/x", bytes(range(256)) * 40), ("a/y", b"2")))


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[:-8] + bytes(4) + WHOLE[-4:],
        WHOLE[:-4] + b"\1\1\1\1",
        WHOLE[:-1],
        WHOLE[:-8],
        WHOLE[: len(WHOLE) // 2],
        WHOLE + b"garbage",
        WHOLE[:40] + bytes([WHOLE[40] ^ 255]) + WHOLE[41:],
        gzip.compress(tar_bytes(("a/x", b"1")) + b"more data"),
        gzip.compress(b"no tar at all"),
        b"not gzip",
        gzip.compress(tar_bytes(("a/x", b"1"), pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "x", "GNU.sparse.map": "a,b"})),
        gzip.compress(tar_bytes(("a/x", b"1"), pax={"GNU.sparse.map": "0,1,zz"})),
        gzip.compress(tar_bytes(("a/x", b"1"), pax={"size": "-5"})),
        gzip.compress(tar_bytes(("a/x", b"1"), pax={"size": "9" * 30})),
        gzip.compress(tar_bytes(("a/x", bytes(1 << 20)))[:2048]),
    ],
    ids=["crc", "length", "trailer", "no trailer", "half", "garbage", "flipped", "after the end", "no tar", "no gzip", "sparse", "map", "minus", "huge", "lie"],
)
def test_damaged_archives_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.tar.gz", content)
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_zeros_after_the_end_are_padding(tmp_path: Path) -> None:
    content = tar_bytes(("a/x", b"1"))
    assert read(tmp_path / "a.tar.gz", gzip.compress(content + bytes(4096)) + bytes(512)) == {"a/x": b"1"}


def test_two_members_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\./a/x' occurs twice|'a/x' occurs twice"):
        read(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(("a/x", b"1"), ("./a/x", b"2"))))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(tar_bytes(("a/x", bytes(1 << 20))))
    assert read(tmp_path / "a.tar.gz", bomb)
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 16)
    with pytest.raises(DataError, match="unpacks to more than"):
        read(tmp_path / "a.tar.gz", bomb)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 2)
    with pytest.raises(DataError, match="more than 2 members"):
        read(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(("a", b""), ("b", b""), ("c", b""))))
    monkeypatch.setattr(archives, "MAX_MEMBER", 10)
    with pytest.raises(DataError, match="claims to have 11 bytes"):
        read(tmp_path / "a.tar.gz", gzip.compress(tar_bytes(("a", b"x" * 11))))


def test_a_huge_header_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 1 << 28
    content = packer.compress(header.tobuf(tarfile.USTAR_FORMAT)) + packer.compress(bytes(1 << 23)) + packer.flush()
    with pytest.raises(DataError, match="unpacks to more than"):
        read(tmp_path / "a.tar.gz", content)


def wheel(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_member_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.whl"
    whole = wheel(("x", bytes(range(256)) * 99), ("y", b"2"))
    file.write_bytes(whole)
    assert copied(lambda target: copy_zip_member(file, "x", target)) == bytes(range(256)) * 99
    at = whole.index(b"x", 30) + 20
    for content, message in (
        (whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :], "not a complete zip file"),
        (whole[:-30], "not a complete zip file"),
        (b"", "not a complete zip file"),
        (wheel(("z", b"")), "no members named x"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=message):
            copy_zip_member(file, "x", io.BytesIO())
    monkeypatch.setattr(archives, "FREE_BYTES", 1000)
    file.write_bytes(wheel(("x", bytes(1 << 20))))
    with pytest.raises(DataError, match="unpacks to more than the size limits allow"):
        copy_zip_member(file, "x", io.BytesIO())

"""Reads archives of unknown origin: as a stream up to the last byte, within limits, and with no member that leaves the folder it is unpacked into."""

from __future__ import annotations

import gzip
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from meteora_core.errors import DataError
from meteora_core.reading import first_line, open_regular
from meteora_core.text import printable

MAX_MEMBERS = 100_000
"""An archive with more members is refused; BIG-bench's source distribution has 3,216."""
MAX_TOTAL = 8 << 30
"""An archive that unpacks to more bytes (8 GiB) is refused; BIG-bench's unpacks to 1.9 GB."""
MAX_MEMBER = 1 << 30
"""A member larger than this (1 GiB) is refused; BIG-bench's largest has 78 MB."""
MAX_RATIO = 100
"""An archive that unpacks to more than :data:`FREE_BYTES` and more than this many times its size is refused; BIG-bench's unpacks to 5 times its size."""
FREE_BYTES = 64 << 20
"""The number of bytes that may be unpacked at any ratio (64 MiB)."""

_CHUNK = 1 << 16
_REFUSED = "nothing was extracted; get the archive from a source that you trust"
_BROKEN = "nothing was extracted; get the archive again"


class _Stream:
    """A reader of the unpacked bytes of a gzip file that counts them and enforces the limits."""

    def __init__(self, archive: Path, packed: IO[bytes], size: int) -> None:
        self._archive, self._file = archive, gzip.GzipFile(fileobj=packed, mode="rb")
        self._total, self._most = 0, min(MAX_TOTAL, max(FREE_BYTES, MAX_RATIO * size))

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._total += len(block)
        if self._total > self._most:
            raise DataError(f"{self._archive} unpacks to more than {self._most / 1e6:,.0f} MB, which is refused", hint=_REFUSED)
        return block

    def finish(self) -> None:
        """Read to the end, where gzip checks the CRC and the length. Only zeros may follow the last member."""
        while block := self.read(_CHUNK):
            if block.strip(b"\0"):
                raise DataError(f"{self._archive} has other data after its last member", hint=_BROKEN)


def tar_gz_members(archive: Path, advance: Callable[[int], None] = lambda count: None) -> Iterator[tuple[tarfile.TarInfo, Callable[[IO[bytes]], None]]]:
    """Iterate over the members of a ``.tar.gz`` file.

    Unpack into a temporary folder and use its content only after the last member, because the CRC is at the end of the file.

    Args:
        archive: The path of the archive.
        advance: Called with the number of packed bytes that were read since the last call.

    Yields:
        Each file or folder in the archive, and a function that copies the content of a file into an open file, valid until the next member is requested.

    Raises:
        DataError: The file is missing, incomplete or damaged; a member has an absolute path, a path with ``..`` or the name of another member, or is
            a link, a device or a sparse file; or the archive is larger than this module's limits.
    """
    names: set[str] = set()
    with open_regular(archive) as packed:
        size = packed.seek(0, 2)
        packed.seek(0)
        done = 0
        stream = _Stream(archive, packed, size)
        with ExitStack() as stack:
            with _damage(archive):
                tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))  # type: ignore[call-overload]
            while True:
                with _damage(archive):
                    member = tar.next()
                if member is None:
                    break
                _check(archive, member, names)

                def copy(target: IO[bytes], member: tarfile.TarInfo = member) -> None:
                    with _damage(archive):
                        source = tar.extractfile(member)
                        assert source is not None
                        shutil.copyfileobj(source, target, _CHUNK)

                yield member, copy
                tar.members.clear()  # tarfile would keep every member in memory
                position = packed.tell()
                advance(position - done)
                done = position
            with _damage(archive):
                stream.finish()


def copy_zip_member(archive: Path, name: str, target: IO[bytes]) -> None:
    """Copy one member of a zip file, such as a wheel, into an open file, within this module's limits; its CRC is checked.

    Raises:
        DataError: The archive is missing or damaged, has no such member or two of them, or the member is encrypted or larger than the limits.
    """
    with open_regular(archive) as packed:
        size = packed.seek(0, 2)
        try:
            with zipfile.ZipFile(packed) as opened:
                if len(opened.infolist()) > MAX_MEMBERS:
                    raise DataError(f"{archive} has more than {MAX_MEMBERS:,} members, which is refused", hint=_REFUSED)
                members = [info for info in opened.infolist() if info.filename == name]
                if len(members) != 1:
                    raise DataError(f"{archive} has {len(members) or 'no'} members named {printable(name)}", hint=_BROKEN)
                most = min(MAX_MEMBER, max(FREE_BYTES, MAX_RATIO * size))
                left = min(members[0].file_size, most) + 1
                with opened.open(members[0]) as source:
                    while block := source.read(min(_CHUNK, left)):
                        target.write(block)
                        left -= len(block)
                        if left <= 0:
                            raise DataError(f"{archive} is refused: {printable(name)} unpacks to more than the size limits allow", hint=_REFUSED)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError, struct.error) as broken:
            reason = first_line(broken)[:200]
            raise DataError(f"{archive} is not a complete zip file: {reason}", hint=_BROKEN) from broken


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    """Turn what the libraries raise for a damaged archive into a DataError."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError, RecursionError) as broken:
        reason = first_line(broken)[:200]
        raise DataError(f"{archive} is not a complete tar.gz file: {reason}", hint=_BROKEN) from broken


def _check(archive: Path, member: tarfile.TarInfo, names: set[str]) -> None:
    path = PurePosixPath(member.name.replace("\\", "/"))
    plain = path.as_posix()
    reason = None
    if path.is_absolute() or re.match(r"[A-Za-z]:", member.name):
        reason = "has an absolute path"
    elif ".." in path.parts:
        reason = "has a path with '..'"
    elif member.issym() or member.islnk():
        reason = "is a link"
    elif member.issparse():
        reason = "is a sparse file"
    elif not (member.isfile() or member.isdir()):
        reason = "is neither a file nor a folder"
    elif member.isfile() and plain in names:
        reason = "occurs twice"
    elif not 0 <= member.size <= MAX_MEMBER:
        reason = f"claims to have {member.size:,} bytes"
    if reason is None and len(names) >= MAX_MEMBERS:
        raise DataError(f"{archive} has more than {MAX_MEMBERS:,} members, which is refused", hint=_REFUSED)
    if reason:
        raise DataError(f"{archive} is refused: its member {printable(member.name[:200])!r} {reason}", hint=_REFUSED)
    names.add(plain)

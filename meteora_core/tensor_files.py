"""Reads safetensors files by their headers, and writes them without holding them in memory.

The format is: the length of the header (eight bytes, little endian), a JSON header with each tensor's dtype, shape and byte range, and the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from meteora_core.errors import CheckpointError
from meteora_core.files import storage_errors
from meteora_core.json_files import parse_json, read_object
from meteora_core.reading import check_regular, is_regular
from meteora_core.text import listed

CHUNK = 8 << 20
"""The number of bytes that are read or written at once."""

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".distcp")

_AGAIN = "copy or download the file again"
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 64
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """The position and type of one tensor in a file.

    Attributes:
        file: The safetensors file.
        dtype: The format's name of the dtype, such as "BF16".
        shape: The shape of the tensor.
        begin: The offset of its first byte from the start of the file.
        end: The offset after its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch. Raises CheckpointError if torch does not have it."""
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.file} holds a tensor of dtype {self.dtype}, which cannot be read")
        return _DTYPES[self.dtype]


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return the tensors of one safetensors file by name, and its metadata. No tensor data is read.

    Raises:
        CheckpointError: The file is missing, a pickle, not a regular file or not a safetensors file, or it contradicts its header: it is shorter or
            longer, or has tensors that overlap or do not fit their shapes.
    """
    file = Path(file)
    refuse_pickle(file)
    size = check_regular(file, CheckpointError, hint="correct the path")
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, max(size - 8, 0)):
                raise CheckpointError(f"{file} is not a safetensors file, or it was cut short: it has {size} bytes and no complete header", hint=_AGAIN)
            raw = handle.read(length)
    except OSError as broken:
        raise CheckpointError(f"{file} cannot be read: {broken.strerror or broken}", hint=_AGAIN) from broken
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a JSON object", hint=_AGAIN)
    header = parse_json(raw, f"{file} is not a safetensors file: its header", error=CheckpointError, hint=_AGAIN)
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is not a JSON object", hint=_AGAIN)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file} is broken: its metadata values are not strings", hint=_AGAIN)
    entries = {name: _entry(file, name, entry, 8 + length, size) for name, entry in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            what = "overlap those of another tensor" if entry.begin < position else "leave a gap before them"
            raise CheckpointError(f"{file} is broken: the bytes of {name} {what}", hint=_AGAIN)
        position = entry.end
    if size > position:
        raise CheckpointError(f"{file} has {size} bytes, its header promises {position}: it is not the file that was saved", hint=_AGAIN)
    return entries, metadata


def _entry(file: Path, name: str, entry: Any, start: int, size: int) -> TensorEntry:
    """Return one tensor of a header, after checking that it is consistent and within the size of the file."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(type(number) is int and 0 <= number < 1 << 63 for number in value)

    known = isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and counts(entry.get("shape")) and counts(entry.get("data_offsets"))
    if not known or len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{file} is broken: its header does not give dtype, shape and bytes of {name}", hint=_AGAIN)
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    checked = TensorEntry(file, dtype, shape, start + begin, start + end)
    width = _DTYPES[dtype].itemsize if dtype in _DTYPES else None
    if end < begin or (width is not None and end - begin != checked.count * width):
        raise CheckpointError(f"{file} is broken: the bytes of {name} do not fit its shape {list(shape)} in {dtype}", hint=_AGAIN)
    if checked.end > size:
        raise CheckpointError(f"{file} was cut short: it has {size} bytes, its header promises {checked.end}", hint=_AGAIN)
    return checked


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError if the name is that of a pickle file."""
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle file, which is never read", hint="convert it to safetensors on the machine that wrote it, and pass that file"
        )


class TensorFiles:
    """The tensors of one safetensors file or of several shards, read one at a time.

    Args:
        path: A .safetensors file, an index (``*.safetensors.index.json``), or a folder that holds ``model.safetensors``, an index, or exactly one
            safetensors file.

    Raises:
        CheckpointError: There is no such file, it is a pickle or broken, or a shard is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: dict[str, TensorEntry] = {}
        self.files = _find_files(self.path)
        for file in self.files:
            entries, _ = read_header(file)
            if twice := sorted(entries.keys() & self.entries.keys()):
                raise CheckpointError(f"{file} repeats tensors of another shard: {listed(twice)}", hint=_AGAIN)
            self.entries.update(entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in the dtype of the file."""
        entry = self.entries[name]
        data = bytearray(entry.end - entry.begin)
        with entry.file.open("rb") as handle:
            handle.seek(entry.begin)
            if handle.readinto(data) != len(data):
                raise CheckpointError(f"{entry.file} was cut short", hint=_AGAIN)
        if not data:
            return torch.empty(entry.shape, dtype=entry.torch_dtype)
        return torch.frombuffer(data, dtype=entry.torch_dtype).reshape(entry.shape)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytes]:
        """Yield the bytes of one tensor in blocks of at most ``size`` bytes."""
        entry = self.entries[name]
        with entry.file.open("rb") as handle:
            handle.seek(entry.begin)
            left = entry.end - entry.begin
            while left:
                block = handle.read(min(size, left))
                if not block:
                    raise CheckpointError(f"{entry.file} was cut short", hint=_AGAIN)
                left -= len(block)
                yield block

    def sample(self, name: str, positions: Iterable[int]) -> list[float]:
        """Return single elements of one tensor, given their positions in row-major order."""
        entry = self.entries[name]
        width = entry.torch_dtype.itemsize
        values = []
        with entry.file.open("rb") as handle:
            for position in positions:
                handle.seek(entry.begin + position * width)
                values.append(float(torch.frombuffer(bytearray(handle.read(width)), dtype=entry.torch_dtype)[0].float()))
        return values


def _find_files(path: Path) -> list[Path]:
    if is_regular(path):
        return _shards(path) if path.name.endswith(".index.json") else [path]
    refuse_pickle(path)
    if not _is_folder(path):
        raise CheckpointError(f"no such file or folder: {path}", hint="correct the path")
    if is_regular(path / SINGLE_FILE):
        return [path / SINGLE_FILE]
    indexes = sorted(path.glob("*.safetensors.index.json"))
    if indexes:
        return _shards(indexes[0])
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(
            f"{path} holds {len(files)} safetensors files and no {INDEX_FILE}: {listed([file.name for file in files])}",
            hint="name the file, or copy the index too",
        )
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickled:
        raise CheckpointError(
            f"{path} holds no safetensors file, only pickle files, which are never read: {listed(pickled)}",
            hint="convert it to safetensors on the machine that wrote it",
        )
    below = sorted(str(file.relative_to(path)) for pattern in ("*/*.safetensors", "*/*/*.safetensors") for file in path.glob(pattern))
    raise CheckpointError(f"{path} holds no safetensors file", hint=f"sub-folders contain: {listed(below)}" if below else "correct the path")


def _shards(index: Path) -> list[Path]:
    names = read_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map: it is not an index of shards", hint=_AGAIN)
    files = sorted({index.parent / name for name in names.values()})
    if outside := [file for file in files if file.parent != index.parent]:
        raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}")
    if missing := [file.name for file in files if not is_regular(file)]:
        raise CheckpointError(f"{index.parent} lacks shards that its index names: {listed(missing)}", hint="copy or download them again")
    return files


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{str(path)!r} cannot be read: {broken}", hint="correct the path") from broken


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written.

    Attributes:
        name: The name of the tensor.
        dtype: The format's name of the dtype, such as "BF16".
        shape: The shape of the tensor.
        blocks: A function that returns the bytes in order; it is called when the tensor is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes]]

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor on the CPU in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_tensors(file: Path, plans: Iterable[TensorPlan], metadata: dict[str, str], *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Write a safetensors file tensor by tensor, holding one block at a time in memory.

    Args:
        file: The file to write.
        plans: The tensors. They are ordered by decreasing size of the dtype, then by name, so that every tensor is aligned.
        metadata: The metadata in the header.
        on_bytes: A function that is called with the number of bytes of each block after it is written.

    Returns:
        The SHA-256 of the file, as 64 hexadecimal digits.

    Raises:
        StorageError: The disk is full or not writable.
        CheckpointError: A tensor has a different number of bytes than its shape and dtype require.
    """
    ordered = sorted(plans, key=lambda plan: (-_DTYPES[plan.dtype].itemsize, plan.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for plan in ordered:
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [position, position + plan.size]}
        position += plan.size
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()

    def put(handle: IO[bytes], block: bytes) -> None:
        with storage_errors(file):
            handle.write(block)
        digest.update(block)
        if on_bytes is not None:
            on_bytes(len(block))

    with storage_errors(file):
        handle = file.open("wb")
    try:
        put(handle, struct.pack("<Q", len(raw)))
        put(handle, raw)
        for plan in ordered:
            written = 0
            for block in plan.blocks():
                put(handle, block)
                written += len(block)
            if written != plan.size:
                raise CheckpointError(f"{plan.name}: {written} bytes were produced, but {plan.size} were expected")
        with storage_errors(file):
            handle.flush()
            os.fsync(handle.fileno())
    finally:
        with storage_errors(file):
            handle.close()
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the format's name of a dtype, such as "BF16"."""
    return _NAMES[dtype]

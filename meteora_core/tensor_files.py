"""Safetensors files by their headers alone, and writing one without holding it in memory.

The format: eight bytes of header length (little endian), a JSON header that gives each tensor's dtype, shape and byte range, the bytes.
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
"""How many bytes are moved at once."""

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
    """The place of one tensor.

    Attributes:
        file: The safetensors file.
        dtype: The format's name of the dtype, such as "BF16".
        shape: Its shape.
        begin, end: Its bytes in the file, counted from the file's start.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype. Raises CheckpointError for one that torch lacks."""
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.file} holds a tensor of dtype {self.dtype}, which cannot be read")
        return _DTYPES[self.dtype]


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one safetensors file, by name, and its metadata; no tensor is read.

    Raises:
        CheckpointError: The file is missing, a pickle, no ordinary file, no safetensors file, or other than its header says: shorter, longer, with tensors
            that overlap or do not fit their shapes.
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
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != place:
            what = "overlap those of another tensor" if entry.begin < place else "leave a gap before them"
            raise CheckpointError(f"{file} is broken: the bytes of {name} {what}", hint=_AGAIN)
        place = entry.end
    if size > place:
        raise CheckpointError(f"{file} has {size} bytes, its header promises {place}: it is not the file that was saved", hint=_AGAIN)
    return entries, metadata


def _entry(file: Path, name: str, entry: Any, start: int, size: int) -> TensorEntry:
    """One tensor of a header, checked against itself and the file's size."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and len(value) <= _MAX_DIMENSIONS and all(type(number) is int and 0 <= number < 1 << 63 for number in value)

    known = isinstance(entry, dict) and isinstance(entry.get("dtype"), str) and counts(entry.get("shape")) and counts(entry.get("data_offsets"))
    if not known or len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{file} is broken: its header does not give dtype, shape and bytes of {name}", hint=_AGAIN)
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    made = TensorEntry(file, dtype, shape, start + begin, start + end)
    width = _DTYPES[dtype].itemsize if dtype in _DTYPES else None
    if end < begin or (width is not None and end - begin != made.count * width):
        raise CheckpointError(f"{file} is broken: the bytes of {name} do not fit its shape {list(shape)} in {dtype}", hint=_AGAIN)
    if made.end > size:
        raise CheckpointError(f"{file} was cut short: it has {size} bytes, its header promises {made.end}", hint=_AGAIN)
    return made


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError when the name is that of a pickle file."""
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle file, which is never read", hint="convert it to safetensors where it was made, and pass that file")


class TensorFiles:
    """The tensors of one safetensors file or of several shards, read one at a time.

    Args:
        path: A .safetensors file, an index (``*.safetensors.index.json``), or a folder that holds ``model.safetensors``, an index, or exactly one
            safetensors file.

    Raises:
        CheckpointError: There is none, it is a pickle, it is broken, or a shard is missing.
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
        """One tensor, on the CPU, in its own dtype."""
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
        """The bytes of one tensor, ``size`` at a time."""
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
        """Single numbers of one tensor, by their place in row-major order."""
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
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise CheckpointError(
            f"{path} holds {len(found)} safetensors files and no {INDEX_FILE}: {listed([file.name for file in found])}",
            hint="name the file, or copy the index too",
        )
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickled:
        raise CheckpointError(
            f"{path} holds no safetensors file, only pickle files, which are never read: {listed(pickled)}",
            hint="convert it to safetensors where it was made",
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
    """A tensor that is yet to be written.

    Attributes:
        name: Its name.
        dtype: The format's name of the dtype.
        shape: Its shape.
        blocks: Called when its turn comes; gives its bytes in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes]]

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_tensors(file: Path, plans: Iterable[TensorPlan], metadata: dict[str, str], *, on_bytes: Callable[[int], None] | None = None) -> str:
    """Write a safetensors file tensor by tensor; what is held in memory is one block.

    Args:
        file: To be written.
        plans: The tensors. They are laid out by falling dtype width, then by name, so that every one is aligned.
        metadata: Of the file.
        on_bytes: Told how many bytes were written.

    Returns:
        The file's SHA-256.

    Raises:
        StorageError: The disk is full or not writable.
    """
    ordered = sorted(plans, key=lambda plan: (-_DTYPES[plan.dtype].itemsize, plan.name))
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for plan in ordered:
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [place, place + plan.size]}
        place += plan.size
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
                raise CheckpointError(f"{plan.name}: {written} bytes came where {plan.size} were expected")
        with storage_errors(file):
            handle.flush()
            os.fsync(handle.fileno())
    finally:
        with storage_errors(file):
            handle.close()
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype."""
    return _NAMES[dtype]

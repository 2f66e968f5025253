"""Statistics of one adapter for closed-form gates: for every layer input, the mean and the second moments over the tokens of the adapter's rows.

A statistics file belongs to one adapter and one base model. It does not depend on other adapters, so adapters can join and leave a checkpoint without the
rows of the others: the gates of any set of adapters are solved from the statistics of its members
(:func:`meteora_core.training.statistics.closed_form_gates`).

A checkpoint keeps one file per adapter in its folder ``meteora.stats``; the folder of an adapter may contain the same file as ``gate_stats.safetensors``.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from meteora_core.adapters.bank import natural_order
from meteora_core.checkpoints.native_config import BaseEntry, Count, Sha256
from meteora_core.errors import CheckpointError
from meteora_core.file_models import FileModel, check_model
from meteora_core.files import storage_errors
from meteora_core.json_files import parse_json
from meteora_core.locks import scratch_folder
from meteora_core.model.attach import same_base
from meteora_core.names import is_name
from meteora_core.reading import is_regular
from meteora_core.tensor_files import TensorFiles, TensorPlan, dtype_name, read_header, tensor_bytes, write_tensors
from meteora_core.text import listed, shown

STATISTICS = "meteora.stats"
"""The folder for statistics in a checkpoint, with one file per adapter."""

SHIPPED = "gate_stats.safetensors"
"""The statistics file in the folder of an adapter."""

FORMAT = 2
_HEADER = "meteora_gate_statistics"
_AGAIN = "collect the statistics again from the adapter's rows"

Second = Literal["float32", "float16", "low-rank"]
"""The forms in which second moments are stored; see :func:`write_statistics` and :func:`write_low_rank`."""

_PARTS: dict[Second, dict[str, str]] = {
    "float32": {"mean": "float32", "second": "float32"},
    "float16": {"mean": "float32", "second": "float16", "deviation": "float32"},
    "low-rank": {"mean": "float32", "factor": "float16", "size": "float32", "residual": "float32"},
}
"""The tensors of each layer input and their dtypes, by the form of the second moments."""


class Recipe(FileModel):
    """Options that all statistics of one checkpoint have in common.

    Attributes:
        scale: The factor between regression values and gate logits.
        answer_share: The share of the answer tokens in the weight of an adapter; None means that all its tokens have the same weight.
        frame: The text around the user's text in the prompts, with ``{}`` for the user's text.
        bare_share: The share of an adapter's weight in a second run of its rows, on the base model alone; 0 means that there is no second run.
    """

    scale: float = Field(8.0, gt=0, le=1e6)
    answer_share: float | None = Field(None, gt=0, lt=1)
    frame: str = Field("{}", max_length=10_000)
    bare_share: float = Field(0.0, ge=0, lt=1)

    def difference(self, other: Recipe) -> str | None:
        """Return the first value in which another recipe differs, as a phrase; None if both are equal."""
        for name, what in (
            ("scale", "scale"),
            ("answer_share", "answer share"),
            ("frame", "prompt frame"),
            ("bare_share", "share of the run on the base model"),
        ):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{what} {shown(theirs)} instead of {shown(mine)}"
        return None


class StatisticsHeader(FileModel):
    """The description of a statistics file.

    Attributes:
        format: The version of the layout: 2 for low-rank moments, else 1.
        adapter: The name of the adapter.
        adapter_sha256: The SHA-256 of the adapter's weight file; empty if the adapter comes from a checkpoint.
        base: The name, the revision and a few weights of the base model.
        recipe: The options that the statistics share with those of other adapters.
        rows: Number of rows that were read.
        tokens: Number of tokens that were read.
        max_length: Longest row in tokens; longer ones were cut.
        second: The form of the second moments; see :func:`write_statistics` and :func:`write_low_rank`.
        inputs: For each layer, the layer under whose name the moments of its input are stored.
    """

    format: int = Field(1, ge=1)
    adapter: str = Field(min_length=1)
    adapter_sha256: Literal[""] | Sha256 = ""
    base: BaseEntry
    recipe: Recipe
    rows: Count
    tokens: Count
    max_length: int = Field(ge=1)
    second: Second = "float32"
    inputs: dict[str, str] = Field(min_length=1)


def write_statistics(file: Path, header: StatisticsHeader, means: Mapping[str, Tensor], squares: Mapping[str, Tensor]) -> Path:
    """Write a statistics file, atomically and one layer input at a time.

    Only the lower triangle of every symmetric matrix is stored, row by row. The format "float32" stores the second moments unchanged. "float16" stores
    correlations, which are between -1 and 1 for any scale of the activations, and the standard deviations in float32.

    Args:
        file: The file to write.
        header: The description of the statistics.
        means: The weighted mean of each layer input, a float32 tensor of shape (h,). The weights of all tokens sum to 1.
        squares: The weighted second moments of each layer input, a float32 tensor of shape (h, h); only the lower triangle
            counts.

    Raises:
        StorageError: The disk is full or not writable.
    """
    plans = []
    for name, mean in means.items():
        plans.append(_plan(f"{name}.mean", torch.float32, (len(mean),), partial(_whole, mean)))
        if header.second == "float16":
            plans.append(_plan(f"{name}.deviation", torch.float32, (len(mean),), partial(_deviation_bytes, mean, squares[name])))
        kind = getattr(torch, header.second)
        plans.append(_plan(f"{name}.second", kind, (len(mean) * (len(mean) + 1) // 2,), partial(_triangle, mean, squares[name], kind)))
    return _write(file, plans, header)


def write_low_rank(file: Path, header: StatisticsHeader, means: Mapping[str, Tensor], factors: Mapping[str, Tensor], diagonals: Mapping[str, Tensor]) -> Path:
    """Write a statistics file whose second moments are a matrix of low rank plus a diagonal.

    A factor ``F`` (r, h) stands for ``F^T F``. Its rows are stored in float16, each divided by its largest magnitude, which is stored in float32. The
    residual, a float32 diagonal, makes the diagonal of the second moments exact.

    Args:
        file: The file to write.
        header: The description of the statistics; ``second`` is "low-rank".
        means: The weighted mean of each layer input, float32 (h,).
        factors: The factor of each layer input, float (r, h).
        diagonals: The weighted mean square of each feature of the layer inputs, float32 (h,).

    Raises:
        StorageError: The disk is full or not writable.
    """
    plans = []
    for name, mean in means.items():
        factor = factors[name].to("cpu", torch.float64)
        size = factor.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny).float()
        rows = (factor / size[:, None].double()).half()
        residual = diagonals[name].to("cpu", torch.float64) - (rows.double() * size[:, None].double()).square().sum(0)
        parts = {"mean": mean.float(), "factor": rows, "size": size, "residual": residual.clamp(min=0).float()}
        for part, kind in _PARTS["low-rank"].items():
            plans.append(_plan(f"{name}.{part}", getattr(torch, kind), tuple(parts[part].shape), partial(_bytes, parts[part])))
    return _write(file, plans, header.model_copy(update={"format": FORMAT}))


def _bytes(tensor: Tensor) -> list[bytes]:
    return [tensor_bytes(tensor.cpu().contiguous())]


def _write(file: Path, plans: Sequence[TensorPlan], header: StatisticsHeader) -> Path:
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(file.parent, file.name) as temporary:
            write_tensors(temporary / "statistics", plans, {"format": "pt", _HEADER: header.model_dump_json()})
            os.replace(temporary / "statistics", file)
    return file


def _plan(name: str, dtype: torch.dtype, shape: tuple[int, ...], blocks: Callable[[], Iterable[bytes]]) -> TensorPlan:
    return TensorPlan(name, dtype_name(dtype), shape, blocks)


def _whole(tensor: Tensor) -> list[bytes]:
    return [tensor_bytes(tensor.float().cpu())]


def _deviation(mean: Tensor, square: Tensor) -> Tensor:
    return (square.diagonal().double() - mean.double().square()).clamp(min=0).sqrt()


def _deviation_bytes(mean: Tensor, square: Tensor) -> list[bytes]:
    return _whole(_deviation(mean, square))


def _triangle(mean: Tensor, square: Tensor, kind: torch.dtype) -> Iterable[bytes]:
    """Yield the bytes of the lower triangle in blocks of rows."""
    if kind == torch.float16:
        deviation = _deviation(mean, square).float().double().clamp(min=1e-30)
    for start in range(0, len(square), 512):
        rows = square[start : start + 512]
        if kind == torch.float16:
            rows = rows.double() - mean[start : start + 512, None].double() * mean.double()
            rows = (rows / deviation[start : start + 512, None] / deviation).clamp(-1, 1)
        rows = rows.to("cpu", kind)
        yield b"".join(tensor_bytes(row[: start + index + 1]) for index, row in enumerate(rows))


_INDEXED = 4096
"""The largest width for which an index of the lower triangle is used; computing it takes four times the memory of the triangle in float32."""


@lru_cache(maxsize=2)
def _lower(width: int) -> Tensor:
    """Return the flat indices of the lower triangle of a square matrix, row by row, as an int64 tensor of shape (width (width + 1) / 2,)."""
    rows, columns = torch.tril_indices(width, width)
    return rows * width + columns


def unpacked(packed: Tensor) -> Tensor:
    """A symmetric matrix (h, h) from its lower triangle, row by row (h (h + 1) / 2,)."""
    width = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    full = torch.empty(width, width, dtype=packed.dtype)
    if width <= _INDEXED:
        full.view(-1)[_lower(width)] = packed
    else:
        offset = 0
        for row in range(width):
            full[row, : row + 1] = packed[offset : offset + row + 1]
            offset += row + 1
    for start in range(0, width, 512):  # in blocks: a transposed copy of the whole would double the memory
        full[:start, start : start + 512] = full[start : start + 512, :start].t()
        block = full[start : start + 512, start : start + 512]
        block.copy_(block.tril() + block.tril(-1).t())
    return full


class GateStatistics:
    """The statistics of one adapter, which are read one layer input at a time.

    Args:
        file: The path of a statistics file.

    Raises:
        CheckpointError: The file is missing, broken or of a newer format, or its tensors are not those that its header describes.

    Attributes:
        file: The path of the statistics file.
        header: The description of the statistics.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        entries, metadata = read_header(self.file)
        if _HEADER not in metadata:
            raise CheckpointError(f"{self.file} holds no gate statistics", hint=_AGAIN)
        raw = parse_json(metadata[_HEADER].encode(), f"the header of {self.file}", nullable="*", error=CheckpointError, hint=_AGAIN)
        if isinstance(raw, dict) and isinstance(raw.get("format"), int) and raw["format"] > FORMAT:
            raise CheckpointError(f"{self.file} has format {raw['format']}, this version reads up to {FORMAT}", hint="upgrade meteora")
        self.header = check_model(StatisticsHeader, raw, str(self.file), error=CheckpointError, hint=_AGAIN)
        self._files = TensorFiles(self.file)
        stored = set(self.header.inputs.values())
        parts = _PARTS[self.header.second]
        expected = {f"{name}.{part}" for name in stored for part in parts}
        if different := sorted(expected ^ entries.keys()):
            raise CheckpointError(f"{self.file} does not hold what its header describes: {listed(different)}", hint=_AGAIN)
        for name in stored:
            width = entries[f"{name}.mean"].count
            shapes: dict[str, tuple[int, ...]] = {**dict.fromkeys(parts, (width,)), "second": (width * (width + 1) // 2,)}
            if self.header.second == "low-rank":
                rank = entries[f"{name}.size"].count
                shapes |= {"size": (rank,), "factor": (rank, width)}
            for part, kind in parts.items():
                entry = entries[f"{name}.{part}"]
                if entry.shape != shapes[part] or entry.torch_dtype != getattr(torch, kind):
                    raise CheckpointError(f"{name}.{part} in {self.file} has shape {list(entry.shape)} and dtype {entry.dtype}", hint=_AGAIN)

    @property
    def name(self) -> str:
        """The name of the adapter."""
        return self.header.adapter

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.file.stat().st_size

    def missing(self, layers: Iterable[str]) -> list[str]:
        """Return those of ``layers`` for whose inputs there are no statistics."""
        return [layer for layer in layers if layer not in self.header.inputs]

    def input_of(self, layer: str) -> str:
        """Return the name under which the statistics of a layer's input are stored."""
        return self.header.inputs[layer]

    def mean(self, layer: str) -> Tensor:
        """Return the mean input of a layer, a float64 tensor of shape (h,). Raises CheckpointError for NaN and infinity."""
        return self._read(f"{self.input_of(layer)}.mean")

    def squares(self, layer: str) -> Tensor:
        """The second moments of a layer's input: float64 (h, h). Raises CheckpointError for NaN and infinity."""
        if self.is_low_rank:
            factor, residual = self.low_rank(layer)
            return factor.t() @ factor + torch.diag(residual)
        return unpacked(self.packed(layer))

    @property
    def is_low_rank(self) -> bool:
        """Whether the second moments are stored as a matrix of low rank plus a diagonal."""
        return self.header.second == "low-rank"

    def low_rank(self, layer: str) -> tuple[Tensor, Tensor]:
        """The factor and the residual of low-rank second moments: float64 (r, h) and (h,). Raises CheckpointError for NaN and infinity."""
        name = self.input_of(layer)
        factor = self._read(f"{name}.factor").mul_(self._read(f"{name}.size")[:, None])
        return factor, self._read(f"{name}.residual")

    def packed(self, layer: str) -> Tensor:
        """The lower triangle of second moments that are stored whole, row by row: float64 (h (h + 1) / 2,). Raises CheckpointError as :meth:`squares`."""
        name = self.input_of(layer)
        packed = self._read(f"{name}.second")
        if self.header.second == "float16":
            mean, deviation = self._read(f"{name}.mean"), self._read(f"{name}.deviation")
            offset = 0
            for row in range(len(mean)):
                part = packed[offset : offset + row + 1]
                part.mul_(deviation[row]).mul_(deviation[: row + 1]).add_(mean[: row + 1] * mean[row])
                offset += row + 1
        return packed

    def _read(self, name: str) -> Tensor:
        tensor = self._files.read(name).double()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} in {self.file} holds numbers that are not finite", hint=_AGAIN)
        return tensor


def join_statistics(parts: Sequence[GateStatistics], file: Path) -> GateStatistics:
    """Write the statistics of one adapter, of which every part holds some layer inputs, as one file; a single part is moved. Raises StorageError."""
    if len(parts) == 1:
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            os.replace(parts[0].file, file)
        return GateStatistics(file)
    plans: list[TensorPlan] = []
    inputs: dict[str, str] = {}
    for part in parts:
        files = TensorFiles(part.file)
        plans += [TensorPlan(name, entry.dtype, entry.shape, partial(files.chunks, name)) for name, entry in files.entries.items()]
        inputs |= part.header.inputs
    _write(file, plans, parts[0].header.model_copy(update={"inputs": dict(sorted(inputs.items(), key=lambda item: natural_order(item[0])))}))
    return GateStatistics(file)


def copy_statistics(statistics: GateStatistics, file: Path, adapter: str) -> GateStatistics:
    """Copy statistics to ``file``, with ``adapter`` as the name of the adapter. Raises StorageError."""
    files = TensorFiles(statistics.file)
    plans = [TensorPlan(name, entry.dtype, entry.shape, partial(files.chunks, name)) for name, entry in files.entries.items()]
    _write(file, plans, statistics.header.model_copy(update={"adapter": adapter}))
    return GateStatistics(file)


def check_fitting(statistics: GateStatistics, recipe: Recipe, probe: list[float] | None, adapter_sha256: str = "") -> None:
    """Check that statistics can be combined with others.

    Args:
        statistics: The statistics of one adapter.
        recipe: The options of the other statistics.
        probe: A few weights of the base model; see ``meteora_core.model.attach.probe_base``.
        adapter_sha256: The SHA-256 of the adapter's weight file; empty if unknown.

    Raises:
        CheckpointError: The statistics have another base model, scale, answer share or prompt frame, or belong to other weights of the adapter.
    """
    header = statistics.header
    if not same_base(probe, header.base.probe):
        raise CheckpointError(f"the statistics {statistics.file} are of another base model ({header.base.name})", hint=_AGAIN)
    if difference := recipe.difference(header.recipe):
        raise CheckpointError(f"the statistics {statistics.file} have the {difference}", hint=_AGAIN)
    if adapter_sha256 and header.adapter_sha256 and adapter_sha256 != header.adapter_sha256:
        raise CheckpointError(f"the statistics {statistics.file} are of other weights of the adapter {header.adapter!r}", hint=_AGAIN)


def statistics_file(checkpoint: Path, adapter: str) -> Path:
    """Return the path of an adapter's statistics in a checkpoint."""
    return checkpoint / STATISTICS / f"{adapter}.safetensors"


def read_statistics(checkpoint: str | Path, names: Sequence[str]) -> dict[str, GateStatistics]:
    """Return the statistics in a checkpoint for those adapters in ``names`` that have some, by name.

    Raises:
        CheckpointError: A file is broken, or belongs to another adapter.
    """
    statistics = {}
    for name in names:
        file = statistics_file(Path(checkpoint), name)
        if is_name(name) and (is_regular(file) or os.path.lexists(file)):
            statistics[name] = GateStatistics(file)
            if statistics[name].name != name:
                raise CheckpointError(f"{file} holds the statistics of {statistics[name].name!r}", hint=_AGAIN)
    return statistics


def place_statistics(statistics: Mapping[str, GateStatistics], checkpoint: Path) -> None:
    """Add statistics to the folder of a checkpoint that is being written, by hard links if the file system supports them, else by copies."""
    folder = checkpoint / STATISTICS
    folder.mkdir()
    for name, each in statistics.items():
        target = folder / f"{name}.safetensors"
        try:
            os.link(each.file, target)
        except OSError:
            shutil.copyfile(each.file, target)

"""Packs a checkpoint into a small one without adapter folders: with embedded adapters in 16 bits, for all or some tasks, at a given rank or size."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.magnitudes import check_tensor
from meteora_core.adapters.stack import Stack
from meteora_core.checkpoints.gate_statistics import place_statistics, read_statistics
from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native import BASE, WEIGHT_FILE, check_replaceable, read_checkpoint, read_config, refuse_untrained
from meteora_core.checkpoints.parts import write_files
from meteora_core.checkpoints.stacks import stack_entry, with_features
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.files import atomic_folder
from meteora_core.model.attach import find_targets, resolve_bank
from meteora_core.model.base import BaseReference, load_base
from meteora_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from meteora_core.adapters.peft_folder import AdapterInfo

MARGIN = 64_000
"""The number of bytes within a size limit that are reserved for the model card."""


@dataclass(frozen=True)
class Packed:
    """The result of packing.

    Attributes:
        folder: The folder of the new checkpoint.
        adapters: The names of the adapters, in order.
        ranks: The mean rank of each adapter over its layers.
        kept: The share of each adapter's squared Frobenius norm that is kept; 1.0 if nothing was cut.
        size: The size of the folder in bytes.
        sha256: The SHA-256 of the weight file.
    """

    folder: Path
    adapters: tuple[str, ...]
    ranks: dict[str, float]
    kept: dict[str, float]
    size: int
    sha256: str


@dataclass(frozen=True)
class PackOptions:
    """Options for packing a checkpoint.

    Attributes:
        tasks: The adapters to keep, in this order, with unchanged gates; None means all.
        rank: The largest rank of an adapter in a layer; None sets no limit.
        max_bytes: The largest size of the folder, in bytes; None sets no limit.
        dtype: The dtype of the stored tensors.
        statistics: Whether to keep the gate statistics of the adapters, with which adapters can join the new checkpoint. They count towards the size.
            Statistics of adapters that are cut or rounded describe the adapters as they were.
    """

    tasks: Sequence[str] | None = None
    rank: int | None = None
    max_bytes: int | None = None
    dtype: torch.dtype = torch.bfloat16
    statistics: bool = False


def pack_checkpoint(
    source: str | Path,
    folder: str | Path,
    options: PackOptions = PackOptions(),
    *,
    adapters_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Packed:
    """Write a copy of a checkpoint with embedded adapters.

    To reduce the size, the product ``B A`` of every adapter and layer is factorised by singular values. The factors with the largest share of
    their adapter's squared norm per byte are kept, at least one in each layer, so that ranks differ by layer and adapter.

    Args:
        source: The folder of a native checkpoint.
        folder: The folder of the new checkpoint.
        options: The adapters to keep, the limits of rank and size, and the dtype.
        adapters_dir: The folder that contains the source's adapter folders by name, if they were moved after training.
        overwrite: Whether to replace an existing folder.
        progress: The receiver of progress reports.

    Raises:
        CheckpointError: The source is broken, its gates are untrained, or the limit of the size is too low.
        UsageError: A task is unknown, a value is out of range, or the folder exists.
    """
    folder, rank, max_bytes, dtype = Path(folder), options.rank, options.max_bytes, options.dtype
    if folder.exists() and not overwrite:
        raise UsageError(f"{folder} exists already", hint="pass --force to replace it, or choose another folder")
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}", hint="choose 1 or more")
    if max_bytes is not None and max_bytes < 1:
        raise UsageError(f"the largest size is {max_bytes} bytes", hint="choose a size above 0")
    source = checkpoint_folder(source, progress=progress)
    refuse_untrained(source, read_config(source))
    config, tensors, bank = read_checkpoint(source, adapters_dir, progress)
    if adapters_dir is not None and "adapters" in config["contains"]:
        raise UsageError(f"{source} holds its adapters, so another folder of them has no effect", hint="leave out --adapters")
    check_replaceable(folder)
    bank = _without_pending(bank, config, progress)
    chosen = [bank.index(name) for name in (options.tasks or bank.names)]
    if len(set(chosen)) != len(chosen):
        raise UsageError("a task is named twice")
    gates = {f"{path}.gate": tensors[f"{path}.gate"][chosen].to(dtype).contiguous() for path in config["modules"]}
    base = {key: value for key, value in tensors.items() if key.startswith(BASE)}
    layers = {path: _factors(stack, chosen) for path, stack in bank.modules.items()}
    width = torch.finfo(dtype).bits // 8
    tables = {f"{path}.{name}": table for path, stack in bank.modules.items() for name, table in _tables(stack.chosen(chosen)).items()}
    statistics = read_statistics(source, options.tasks or bank.names) if options.statistics else {}
    if options.statistics and not statistics:
        raise UsageError(f"{source} has no gate statistics of these adapters", hint="leave out --statistics")
    fixed = sum(tensor.numel() * tensor.element_size() for tensor in (*gates.values(), *base.values(), *tables.values()))
    fixed += sum(each.size for each in statistics.values())
    full = {path: tuple(len(a) for a, _ in pairs) for path, pairs in layers.items()}
    ranks = {path: tuple(min(size, rank) if rank else size for size in sizes) for path, sizes in full.items()}
    text = len(json.dumps(_configuration(config, bank, chosen, full, {}), indent=2)) if max_bytes else 0
    budget = None if max_bytes is None else max_bytes - fixed - text - MARGIN - 160 * (len(gates) * 3 + len(base))
    cut, kept = ranks != full, [1.0] * len(chosen)
    if cut or (budget is not None and _bytes(layers, ranks, width) > budget):
        cut = True
        if joint := next((path for path, stack in bank.modules.items() if stack.experts > 1), None):
            raise UsageError(f"the adapters of the experts in {joint} cannot be cut", hint="leave out --rank, and choose a larger --max-mb or none")
        with progress.task("factorising adapters", total=len(layers), unit="layers") as bar:
            for path, pairs in layers.items():
                layers[path] = [_by_singular_values(a, b) for a, b in pairs]
                bar.update(1)
        # A product has at most as many singular values as inputs or outputs, for any rank of the adapter.
        ranks = {path: tuple(min(size, len(a)) for size, (a, _) in zip(sizes, layers[path], strict=True)) for path, sizes in ranks.items()}
        energy = {path: [_energy(a, b, scale) for (a, b), scale in zip(pairs, _scales(bank, path, chosen), strict=True)] for path, pairs in layers.items()}
        if budget is not None:
            ranks = _fit(layers, energy, ranks, budget, width)
        kept = _kept(energy, ranks)
    packed = dict(gates) | base | tables
    for path, pairs in layers.items():
        packed[f"{path}.lora_A"] = torch.cat([a[:size] for (a, _), size in zip(pairs, ranks[path], strict=True)]).to(dtype).contiguous()
        packed[f"{path}.lora_B"] = torch.cat([b[:size] for (_, b), size in zip(pairs, ranks[path], strict=True)]).to(dtype).contiguous()
    for name, tensor in packed.items():
        check_tensor(f"{name} of {source} in {str(tensor.dtype).removeprefix('torch.')}", tensor, margin=not name.startswith(BASE))
    names = tuple(bank.names[number] for number in chosen)
    shares = {name: round(share, 4) for name, share in zip(names, kept, strict=True)}
    written = _configuration(config, bank, chosen, ranks, shares if cut else {})
    with atomic_folder(folder) as temporary:
        write_files(temporary, written, packed)
        if statistics:
            place_statistics(statistics, temporary)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if max_bytes is not None and size > max_bytes:
        raise CheckpointError(f"{folder} has {size / 1e6:.1f} MB, more than {max_bytes / 1e6:.1f} MB", hint="choose fewer tasks or a lower rank")
    from meteora_core.files import sha256

    mean = {name: sum(sizes[index] for sizes in ranks.values()) / len(ranks) for index, name in enumerate(names)}
    return Packed(folder, names, {name: round(value, 2) for name, value in mean.items()}, shares, size, sha256(folder / WEIGHT_FILE))


def _without_pending(bank: AdapterBank, config: Mapping[str, Any], progress: Progress) -> AdapterBank:
    """Return the bank with its pending parts resolved; the base model is loaded only if there are any."""
    if not any(stack.pending for stack in bank.modules.values()):
        return bank
    reference = BaseReference(config["base"]["name"], config["base"].get("revision"))
    model = load_base(reference, progress=progress)
    bank, _ = fit_to_base(bank, model)
    return resolve_bank(bank, find_targets(model, bank))


def _tables(stack: Stack) -> dict[str, Tensor]:
    return {name: getattr(stack, name) for name in stack.tables}


Pair = tuple[Tensor, Tensor]
"""The matrices of one adapter in one layer: A of shape (r, in), and the transpose of B, of shape (r, out)."""


def _factors(stack: Stack, chosen: Sequence[int]) -> list[Pair]:
    starts = [sum(stack.ranks[:index]) for index in range(len(stack.ranks))]
    cuts = [slice(starts[index], starts[index] + stack.ranks[index]) for index in chosen]
    return [(stack.A[cut], stack.B[cut]) for cut in cuts]


def _scales(bank: AdapterBank, path: str, chosen: Sequence[int]) -> list[float]:
    return [float(bank.modules[path].scaling[index]) for index in chosen]


def _by_singular_values(a: Tensor, b: Tensor) -> Pair:
    """Return factors of the same product, ordered by decreasing singular value, each of which is divided evenly between both sides."""
    if not len(a):
        return a, b
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double().T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values.sqrt()[:, None]
    return (root * (v @ q_a.T)).float(), (root * (q_b @ u).T).float()


def _energy(a: Tensor, b: Tensor, scale: float) -> list[float]:
    """Return the squared singular values of one scaled adapter in one layer, from its ordered factors."""
    return [float(value) for value in (scale * a.double().norm(dim=1) * b.double().norm(dim=1)).square()]


def _bytes(layers: Mapping[str, list[Pair]], ranks: Mapping[str, Sequence[int]], width: int) -> int:
    return sum((pairs[0][0].shape[1] + pairs[0][1].shape[1]) * sum(ranks[path]) * width for path, pairs in layers.items())


def _fit(
    layers: Mapping[str, list[Pair]], energy: Mapping[str, list[list[float]]], most: Mapping[str, Sequence[int]], budget: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Return the ranks, at most ``most``, that keep the largest shares of the squared norms in ``budget`` bytes. Raises CheckpointError."""
    least = {path: [min(1, size) for size in sizes] for path, sizes in most.items()}
    left = budget - _bytes(layers, least, width)
    if left < 0:
        raise CheckpointError(f"even rank 1 needs {-left / 1e6:.1f} MB more than the size limit allows", hint="raise --max-mb, or choose fewer tasks")
    totals = [sum(sum(parts[index]) for parts in energy.values()) or 1.0 for index in range(len(next(iter(least.values()))))]
    offers = []
    for path, parts in energy.items():
        cost = (layers[path][0][0].shape[1] + layers[path][0][1].shape[1]) * width
        for index, values in enumerate(parts):
            offers += [(-value / totals[index] / cost, path, index, cost) for value in values[1 : most[path][index]]]
    for _, path, index, cost in sorted(offers):
        if cost <= left:
            least[path][index] += 1
            left -= cost
    return {path: tuple(sizes) for path, sizes in least.items()}


def _kept(energy: Mapping[str, list[list[float]]], ranks: Mapping[str, Sequence[int]]) -> list[float]:
    kept = []
    for index in range(len(next(iter(ranks.values())))):
        whole = sum(sum(parts[index]) for parts in energy.values())
        held = sum(sum(parts[index][: ranks[path][index]]) for path, parts in energy.items())
        kept.append(held / whole if whole else 1.0)
    return kept


def _configuration(
    config: Mapping[str, Any], bank: AdapterBank, chosen: Sequence[int], ranks: Mapping[str, Sequence[int]], kept: Mapping[str, float]
) -> dict[str, Any]:
    """Return the configuration of the source, for the given adapters and ranks."""
    infos = [_info(bank.adapters[number], max((sizes[index] for sizes in ranks.values()), default=0), bool(kept)) for index, number in enumerate(chosen)]
    modules = {
        path: {
            **stack_entry(bank.modules[path].chosen(chosen)),
            "ranks": list(ranks[path]),
            "scaling": [float(bank.modules[path].scaling[number]) if size else 0.0 for number, size in zip(chosen, ranks[path], strict=True)],
        }
        for path in config["modules"]
    }
    training = {key: value for key, value in config.get("training", {}).items() if key not in ("history", "evaluations")}
    packed = {"from": config.get("weights_sha256"), "adapters": {bank.adapters[number].name: bank.adapters[number].sha256 for number in chosen}}
    if kept:
        packed["kept"] = dict(kept)
    contains = ["gates", "adapters", *(["base"] if config.get("base_tensors") else [])]
    rest = {key: value for key, value in config.items() if key != "weights_sha256"}
    packed_config = {
        **rest,
        "top_k": min(config["top_k"], len(chosen)),
        "adapters": [info.to_json() for info in infos],
        "contains": contains,
        "modules": modules,
        "training": {**training, "packed": packed},
    }
    return with_features(packed_config)


def _info(info: AdapterInfo, rank: int, cut: bool) -> AdapterInfo:
    """Return the description of an embedded adapter, whose hash is empty because it has no file."""
    source = Path(info.source).name if info.source else ""
    if not cut:
        return replace(info, source=source, sha256="")
    if not info.rank:
        return replace(info, source=source, sha256="", rank=rank)
    scale = info.alpha / info.rank**0.5 if info.rslora else info.alpha / info.rank
    return replace(info, source=source, sha256="", rank=rank, alpha=scale * rank, rslora=False)

"""Writes the statistics of an adapter into its folder, so that others can add the adapter without its rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.checkpoints.gate_statistics import SHIPPED, GateStatistics, Recipe, copy_statistics
from meteora_core.errors import DataError, UsageError
from meteora_core.files import storage_errors
from meteora_core.living.checkpoints import BARE_SHARE, ChangeOptions
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.rows import find_rows
from meteora_core.locks import scratch_folder
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.model.linears import can_carry
from meteora_core.model.tokens import is_routed_expert


def ship_statistics(folder: str | Path, name: str | None = None, options: ChangeOptions = ChangeOptions()) -> GateStatistics:
    """Collect the statistics of an adapter and write them into its folder as ``gate_stats.safetensors``.

    The statistics cover all linear layers of the model's blocks, so that the adapter can be combined with adapters that target more layers.

    Args:
        folder: PEFT folder of the adapter.
        name: Name of the adapter, by which its rows are found; None for the name of the folder.
        options: Options for collecting statistics. With ``base=None``, the base model is the one that the adapter names.

    Raises:
        UsageError: The adapter does not name its base model, and the options do not either.
        DataError: The adapter has no rows, or they are broken.
        AdapterError: The adapter cannot be used, or does not fit the base model.
        StorageError: The folder is not writable.

    Example:
        >>> from meteora_core.living.checkpoints import ChangeOptions
        >>> from meteora_core.living.shipping import ship_statistics
        >>> ship_statistics("adapters/strategyqa", options=ChangeOptions(data=Path("datasets"))).header.rows
        22
    """
    folder, progress = Path(folder), options.progress
    name = name or folder.resolve().name
    bank = AdapterBank.from_peft({name: folder}, progress=progress)
    named = bank.adapters[0].base
    base = options.base or (BaseReference(named) if named else None)
    if base is None:
        raise UsageError(f"{folder} does not name its base model", hint="pass --base")
    tokenizer = load_tokenizer(base, progress=progress)
    rows = find_rows(name, options.data, folder, tokenizer, given=options.rows, seed=options.seed)
    if rows is None:
        raise DataError(f"there are no rows of {name!r}", hint="pass a file with --rows, or the folder of datasets with --data")
    device = pick_device(options.device)
    model = load_base(base, dtype=pick_dtype(options.dtype, device), device=device, progress=progress)
    bank, _ = fit_to_base(bank, model)
    how = collecting(options, base, model, tokenizer, Recipe(answer_share=options.answer_share, bare_share=BARE_SHARE, frame=rows.known_frame))
    target = find_adapter(folder) or folder
    with storage_errors(target), scratch_folder(target, SHIPPED) as workspace:
        collector = Collector(tokenizer, how, workspace, lambda *_: rows, progress)
        statistics = collector.collect(model, bank, rows, how.recipe, list(_block_linears(model)))
        return copy_statistics(statistics, target / SHIPPED, name)


def _block_linears(model: nn.Module) -> Iterator[str]:
    """Paths of the linear layers in a model's numbered blocks, except those of routed experts."""
    for path, module in model.named_modules():
        if can_carry(module) and any(part.isdigit() for part in path.split(".")) and not is_routed_expert(path):
            yield path

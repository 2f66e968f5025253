"""Adds, updates and removes adapters of a checkpoint on disk, atomically: a reader finds either the old checkpoint or the new one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.base_route import NO_ADAPTER
from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.joining import without_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe, place_statistics, read_statistics
from meteora_core.checkpoints.located import checkpoint_folder, refuse_hub
from meteora_core.checkpoints.native import check_replaceable, load_checkpoint, read_checkpoint, read_config, refuse_untrained
from meteora_core.checkpoints.native_config import WEIGHT_FILE
from meteora_core.checkpoints.parts import SaveOptions, checkpoint_parts, write_files
from meteora_core.checkpoints.stacks import TABLES, stack_entry, stack_tensors, with_features
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.fetch.hub_names import adapter_folder, adapter_label, hub_source
from meteora_core.files import atomic_folder, locked
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.example_prompts import example_prompts
from meteora_core.living.live_bank import Change, LiveBank, gates_without, refuse_last
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import AdapterRows, find_rows
from meteora_core.locks import scratch_folder
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.names import is_name
from meteora_core.routing import GateOrigin
from meteora_core.tensor_files import read_header

_STALE = ("inputs", "inputs_hash", "held_out", "history", "evaluations", "best_step", "sampled", "packed")
"""Keys of a checkpoint's training record that are no longer valid after an adapter was added or removed."""

BARE_SHARE = 0.25
"""Share of an adapter's weight in its statistics that comes from running its rows through the base model alone."""


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(CollectOptions):
    """Options for opening a checkpoint and collecting statistics; those of :class:`meteora_core.living.options.CollectOptions`, and:

    Attributes:
        adapters_dir: Folder that contains the adapter folders, if they were moved.
        rows: File or folder with the rows of the added adapter; None to search for them (:func:`meteora_core.living.rows.find_rows`).
    """

    adapters_dir: Path | None = None
    rows: Path | None = None


@dataclass(frozen=True)
class Listed:
    """An adapter of a checkpoint and its statistics.

    Attributes:
        name: Name of the adapter.
        rank: Rank of the adapter in most of its layers.
        source: Folder from which it was read; empty if it was read from a checkpoint.
        statistics: Size of its statistics in bytes; None if there are none.
        form: Form of its second moments: "float32", "float16" or "low-rank"; None if there are no statistics.
        tokens, rows: Numbers of tokens and of rows from which the statistics were computed.
        frame: Frame of its prompts; None if there are no statistics.
    """

    name: str
    rank: int
    source: str
    statistics: int | None
    tokens: int
    rows: int
    frame: str | None
    form: str | None = None


def list_adapters(checkpoint: str | Path) -> list[Listed]:
    """The adapters of a checkpoint and their statistics, without loading a model. Raises CheckpointError if files are broken.

    Example:
        >>> from meteora_core.living.checkpoints import list_adapters
        >>> [(each.name, each.rank, each.statistics) for each in list_adapters("runs/mine")]
        [('gsm8k', 4, None), ('strategyqa', 8, None)]
    """
    checkpoint = checkpoint_folder(checkpoint)
    config = read_config(checkpoint)
    statistics = read_statistics(checkpoint, [adapter["name"] for adapter in config["adapters"]])
    adapters = []
    for adapter in config["adapters"]:
        each = statistics.get(adapter["name"])
        size, header = (None, None) if each is None else (each.size, each.header)
        tokens, rows, frame = (header.tokens, header.rows, header.recipe.frame) if header else (0, 0, None)
        form = header.second if header else None
        adapters.append(Listed(adapter["name"], adapter["rank"], adapter["source"], size, tokens, rows, frame, form))
    return adapters


def add_adapter(checkpoint: str | Path, folder: str | Path, name: str | None = None, options: ChangeOptions = ChangeOptions()) -> Change:
    """Add an adapter to a checkpoint; see :meth:`meteora_core.living.live_bank.LiveBank.add`.

    Args:
        checkpoint: Native checkpoint; it is replaced after the new one is completely written.
        folder: PEFT folder of the adapter, or its id on the hub.
        name: Name of the adapter; None for the name of the folder.
        options: Options for opening the checkpoint and collecting statistics.

    Raises:
        CheckpointError: The checkpoint is broken, its gates are untrained, or its statistics do not fit.
        MeteoraError: An error of :meth:`~meteora_core.living.live_bank.LiveBank.add`. The checkpoint is unchanged.

    Example:
        >>> from meteora_core.living.checkpoints import ChangeOptions, add_adapter
        >>> options = ChangeOptions(data=Path("datasets"))
        >>> add_adapter("runs/mine", "adapters/sql", options=options).adapters  # doctest: +SKIP
        ('gsm8k', 'strategyqa', 'sql')
    """
    refuse_hub(checkpoint)
    folder = adapter_folder(folder, progress=options.progress)
    chosen = name or adapter_label(folder)
    return _changed(Path(checkpoint), chosen, folder, options, lambda live: live.add(chosen, folder))


def add_base_route(checkpoint: str | Path, options: ChangeOptions = ChangeOptions()) -> Change:
    """Add the base route to a checkpoint; see :meth:`meteora_core.living.live_bank.LiveBank.add_base_route`. Errors are those of :func:`add_adapter`.

    Args:
        checkpoint: Native checkpoint; it is replaced after the new one is completely written.
        options: Options for opening the checkpoint and collecting statistics. ``rows`` replaces the general text.

    Example:
        >>> from meteora_core.living.checkpoints import add_base_route
        >>> add_base_route("runs/mine").adapters  # doctest: +SKIP
        ('gsm8k', 'strategyqa', 'no_adapter')
    """
    return _changed(Path(checkpoint), NO_ADAPTER, None, options, lambda live: live.add_base_route())


def update_adapter(checkpoint: str | Path, folder: str | Path, name: str | None = None, options: ChangeOptions = ChangeOptions()) -> Change:
    """Replace an adapter of a checkpoint by a new version. Arguments and errors are those of :func:`add_adapter`."""
    refuse_hub(checkpoint)
    folder = adapter_folder(folder, progress=options.progress)
    chosen = name or adapter_label(folder)
    _known(checkpoint, chosen, "; to add it, use `meteora adapters add`")
    return _changed(Path(checkpoint), chosen, folder, options, lambda live: live.update(chosen, folder))


def drop_adapter(checkpoint: str | Path, name: str, options: ChangeOptions = ChangeOptions()) -> Change:
    """Remove an adapter from a checkpoint; see :meth:`meteora_core.living.live_bank.LiveBank.drop`.

    The base model is only loaded if a layer loses its last adapter.

    Args:
        checkpoint: Native checkpoint; it is replaced after the new one is completely written.
        name: Name of the adapter.
        options: Options for opening the checkpoint.

    Raises:
        UsageError: There is no such adapter, or it is the only one besides the base route.
        CheckpointError: The checkpoint is broken, or its gates are untrained.
    """
    checkpoint, began = Path(checkpoint), time.perf_counter()
    _known(checkpoint, name)
    with _locked(checkpoint):
        config, tensors, bank = read_checkpoint(checkpoint, options.adapters_dir, options.progress)
        refuse_untrained(checkpoint, config)
        refuse_last(bank.adapters, name)
        rest = without_adapter(bank, name)
        if rest.modules.keys() == bank.modules.keys():
            known = read_statistics(checkpoint, rest.names)
            gates = {path: tensors[f"{path}.gate"] for path in bank.modules}
            origin: GateOrigin = config.get("gates") or "trained"
            remaining, exact = gates_without(gates, bank.names, name, rest.modules, origin, known, progress=options.progress)
            change = Change("drop", name, rest.names, "solved" if exact else "deleted", exact, seconds=time.perf_counter() - began)
            for path, gate in remaining.items():
                tensors[f"{path}.gate"] = gate.to(gates[path].dtype).contiguous()
                if "adapters" in config["contains"]:
                    tensors = {key: tensor for key, tensor in tensors.items() if key not in {f"{path}.{table}" for table in TABLES}}
                    tensors |= stack_tensors(path, rest.modules[path])
            index = bank.index(name)
            _write(checkpoint, _without(config, index, rest), tensors, known, change, config["adapters"][index]["sha256"])
            return change
    return _changed(checkpoint, name, None, options, lambda live: live.drop(name))


def _without(config: Mapping[str, Any], index: int, rest: AdapterBank) -> dict[str, Any]:
    """A configuration without the adapter at an index, for a bank with the remaining adapters."""
    adapters = config["adapters"][:index] + config["adapters"][index + 1 :]
    modules = {path: stack_entry(stack) for path, stack in rest.modules.items()}
    changed = {**config, "adapters": adapters, "modules": modules, "top_k": min(config["top_k"], len(adapters))}
    return with_features(changed)


def _changed(checkpoint: Path, name: str, folder: Path | None, options: ChangeOptions, change: Callable[[LiveBank], Change]) -> Change:
    """Load a checkpoint, change its bank and replace the checkpoint."""
    with _locked(checkpoint), scratch_folder(checkpoint.parent, f"{checkpoint.name}.statistics") as workspace:
        config = read_config(checkpoint)
        base = options.base or BaseReference(config["base"]["name"], config["base"].get("revision"))
        progress = options.progress
        model = load_checkpoint(checkpoint, base, options.dtype, options.device, backend=options.backend, adapters_dir=options.adapters_dir, progress=progress)
        tokenizer = load_tokenizer(base, progress=progress)
        named = BaseReference(config["base"]["name"], config["base"].get("revision"))
        how = collecting(options, named, model, tokenizer, Recipe(answer_share=options.answer_share, bare_share=BARE_SHARE))
        sources = {adapter["name"]: _source(checkpoint, adapter["name"], adapter["source"], options.adapters_dir) for adapter in config["adapters"]}

        def find(adapter: str, known_folder: Path | None) -> AdapterRows | None:
            given = options.rows if adapter == name else None
            return find_rows(adapter, options.data, known_folder or sources.get(adapter), tokenizer, given=given, seed=options.seed)

        def examples(adapter: str, known_folder: Path | None) -> list[str]:
            return example_prompts(adapter, options.data, known_folder or sources.get(adapter))

        collector = Collector(tokenizer, how, workspace, find, progress, self_written=options.self_written, examples=examples)
        live = LiveBank(model, collector, read_statistics(checkpoint, list(sources)))
        done = change(live)
        if folder is not None:
            relocate(model, {name: folder}, checkpoint)
        new, tensors = checkpoint_parts(model, checkpoint, SaveOptions(how.base, training=config["training"]))
        hashes = {adapter["name"]: adapter["sha256"] for adapter in (*config["adapters"], *new["adapters"])}
        _write(checkpoint, new, narrowed(tensors, checkpoint), live.statistics, done, hashes[name])
        return done


def relocate(model: Any, folders: Mapping[str, Path], checkpoint: Path) -> None:
    """Make the recorded folders of adapters relative to the checkpoint, so that they do not depend on the working directory. Ids on the hub are kept.

    Args:
        model: A model with adapters attached; its routing state is changed.
        folders: PEFT folders of adapters by name; other adapters are unchanged.
        checkpoint: Folder of the checkpoint.
    """
    state = model.meteora

    def moved(name: str) -> str:
        folder = find_adapter(folders[name]) or folders[name]
        on_hub = hub_source(folder)
        return os.path.relpath(folder, checkpoint) if on_hub is None else on_hub.uri

    state.adapters = tuple(replace(info, source=moved(info.name)) if info.name in folders else info for info in state.adapters)


def _source(checkpoint: Path, name: str, source: str, adapters_dir: Path | None) -> Path | None:
    """The folder of an adapter; None if it does not exist."""
    places = [*([adapters_dir / name] if adapters_dir is not None and is_name(name) else []), *([Path(source), checkpoint / source] if source else [])]
    return next((place for place in places if place.is_dir()), None)


def narrowed(tensors: Mapping[str, Tensor], checkpoint: Path) -> dict[str, Tensor]:
    """Tensors with adapters in the dtype that the checkpoint stores, if this changes no value; the model may compute in another dtype.

    Args:
        tensors: Tensors of the changed checkpoint, by name.
        checkpoint: The checkpoint that is replaced.
    """
    stored, _ = read_header(checkpoint / WEIGHT_FILE)
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".lora_A", ".lora_B")) and name in stored:
            narrow = tensor.to(stored[name].torch_dtype)
            result[name] = narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return result


def _write(checkpoint: Path, config: dict[str, Any], tensors: dict[str, Tensor], statistics: Mapping[str, GateStatistics], change: Change, digest: str) -> None:
    """Write a changed checkpoint and the record of the change."""
    before = config.get("training", {})
    record = {key: value for key, value in before.items() if key not in _STALE}
    if "inputs" in before:
        record["before"] = {key: before[key] for key in ("inputs", "held_out") if key in before}
    entry = {"action": change.action, "adapter": change.adapter, "sha256": digest, "gates": change.gates}
    record["changes"] = [*before.get("changes", []), entry]
    if change.held_out:
        record["held_out"] = dict(change.held_out)
    write_with_statistics(checkpoint, {**config, "training": record}, tensors, statistics)


def write_with_statistics(checkpoint: Path, config: dict[str, Any], tensors: dict[str, Tensor], statistics: Mapping[str, GateStatistics]) -> None:
    """Write the files of a checkpoint and the statistics of its adapters, atomically. Raises StorageError."""
    config = {key: value for key, value in config.items() if key != "weights_sha256"}
    with atomic_folder(checkpoint) as temporary:
        write_files(temporary, config, tensors)
        if statistics:
            place_statistics(statistics, temporary)


@contextmanager
def _locked(checkpoint: Path) -> Iterator[None]:
    """Prevent other processes from changing a checkpoint during the block."""
    refuse_hub(checkpoint)
    read_config(checkpoint)  # rejects a path that is not a checkpoint before a lock file is created
    check_replaceable(checkpoint)
    with locked(checkpoint.resolve()):
        yield


def _known(checkpoint: str | Path, name: str, otherwise: str = "") -> None:
    """Raise UsageError if a checkpoint has no adapter of this name, or is on the hub. ``otherwise`` ends the list of names in the hint."""
    refuse_hub(checkpoint)
    names = [adapter["name"] for adapter in read_config(checkpoint)["adapters"]]
    if name not in names:
        raise UsageError(f"no adapter named {name!r} in {checkpoint}", hint=did_you_mean(name, names) or f"there are: {', '.join(names)}{otherwise}")

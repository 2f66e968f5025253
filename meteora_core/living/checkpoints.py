"""Adapters join and leave a checkpoint on disk, atomically: a reader sees the old checkpoint or the new one."""

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

from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.joining import without_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe, place_statistics, read_statistics
from meteora_core.checkpoints.native import check_replaceable, load_checkpoint, read_checkpoint, read_config, refuse_untrained
from meteora_core.checkpoints.native_config import WEIGHT_FILE
from meteora_core.checkpoints.parts import checkpoint_parts, write_files
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.files import atomic_folder, locked
from meteora_core.living.collector import Collector
from meteora_core.living.live_bank import Change, LiveBank, gates_without, refuse_last
from meteora_core.living.rows import AdapterRows, find_rows
from meteora_core.locks import scratch_folder
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.model.vocabulary import padding_token
from meteora_core.names import is_name
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import GateOrigin
from meteora_core.tensor_files import read_header
from meteora_core.training.statistics import TOKENS, Collecting

_STALE = ("inputs", "inputs_hash", "held_out", "history", "evaluations", "best_step", "sampled", "packed")
"""Keys of a checkpoint's record of training that no longer hold once an adapter has joined or left."""

ANSWER_SHARE = 0.8
"""Share of an adapter's weight that its answers have together, in statistics that are collected without others to match."""


@dataclass(frozen=True)
class ChangeOptions:
    """How a checkpoint is opened and statistics are collected.

    Attributes:
        base: The base model; None takes the one that the checkpoint names.
        adapters_dir: The folder that the adapter folders were moved to, if they were.
        data: The folder of all datasets.
        rows: A file or folder of rows of the adapter that joins; None looks for them.
        dtype, device, backend: Of the model, as in the settings.
        tokens: Tokens of each adapter that are looked at.
        batch_size: Rows in one forward pass.
        max_length: Longest row, in tokens.
        seed: Of the choice of rows.
        answer_share: Share of an adapter's weight that its answers have together, where there are no statistics that say it.
        progress: Where progress is reported.
    """

    base: BaseReference | None = None
    adapters_dir: Path | None = None
    data: Path | None = None
    rows: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    tokens: int = TOKENS
    batch_size: int = 8
    max_length: int = 1024
    seed: int = 42
    answer_share: float | None = ANSWER_SHARE
    progress: Progress = SILENT


@dataclass(frozen=True)
class Listed:
    """One adapter of a checkpoint.

    Attributes:
        name: Its name.
        rank: Its usual rank.
        source: The folder it was read from; empty where it came out of a checkpoint.
        statistics: Bytes of its statistics; None where there are none.
        tokens, rows: How many its statistics have seen.
        frame: The frame of its prompts; None without statistics.
    """

    name: str
    rank: int
    source: str
    statistics: int | None
    tokens: int
    rows: int
    frame: str | None


def list_adapters(checkpoint: str | Path) -> list[Listed]:
    """The adapters of a checkpoint and their statistics, without loading a model. Raises CheckpointError where files are broken.

    Example:
        >>> from meteora_core.living.checkpoints import list_adapters
        >>> [(each.name, each.rank, each.statistics) for each in list_adapters("runs/mine")]
        [('gsm8k', 4, None), ('strategyqa', 8, None)]
    """
    config = read_config(checkpoint)
    statistics = read_statistics(checkpoint, [adapter["name"] for adapter in config["adapters"]])
    found = []
    for adapter in config["adapters"]:
        each = statistics.get(adapter["name"])
        size, header = (None, None) if each is None else (each.size, each.header)
        tokens, rows, frame = (header.tokens, header.rows, header.recipe.frame) if header else (0, 0, None)
        found.append(Listed(adapter["name"], adapter["rank"], adapter["source"], size, tokens, rows, frame))
    return found


def add_adapter(checkpoint: str | Path, folder: str | Path, name: str | None = None, options: ChangeOptions = ChangeOptions()) -> Change:
    """Add an adapter to a checkpoint; see :meth:`meteora_core.living.live_bank.LiveBank.add`.

    Args:
        checkpoint: A native checkpoint; it is replaced when all is on disk.
        folder: The adapter's PEFT folder.
        name: Its name; None takes that of the folder.
        options: How the checkpoint is opened and statistics are collected.

    Raises:
        CheckpointError: The checkpoint is broken, its gates are untrained, or its statistics do not fit.
        MeteoraError: As :meth:`~meteora_core.living.live_bank.LiveBank.add`. The checkpoint is unchanged.

    Example:
        >>> from meteora_core.living.checkpoints import ChangeOptions, add_adapter
        >>> options = ChangeOptions(data=Path("datasets"))
        >>> add_adapter("runs/mine", "adapters/sql", options=options).adapters  # doctest: +SKIP
        ('gsm8k', 'strategyqa', 'sql')
    """
    folder = Path(folder)
    chosen = name or folder.resolve().name
    return _changed(Path(checkpoint), chosen, folder, options, lambda live: live.add(chosen, folder))


def update_adapter(checkpoint: str | Path, folder: str | Path, name: str | None = None, options: ChangeOptions = ChangeOptions()) -> Change:
    """Replace an adapter of a checkpoint by another version of it. Arguments and errors are those of :func:`add_adapter`."""
    folder = Path(folder)
    chosen = name or folder.resolve().name
    _known(checkpoint, chosen)
    return _changed(Path(checkpoint), chosen, folder, options, lambda live: live.update(chosen, folder))


def drop_adapter(checkpoint: str | Path, name: str, options: ChangeOptions = ChangeOptions()) -> Change:
    """Take an adapter out of a checkpoint; see :meth:`meteora_core.living.live_bank.LiveBank.drop`.

    The base model is only loaded where a layer loses its last adapter.

    Args:
        checkpoint: A native checkpoint; it is replaced when all is on disk.
        name: The adapter.
        options: Where the base model and the adapters are.

    Raises:
        UsageError: There is no such adapter, or it is the only one.
        CheckpointError: The checkpoint is broken, or its gates are untrained.
    """
    checkpoint, began = Path(checkpoint), time.perf_counter()
    _known(checkpoint, name)
    with _locked(checkpoint):
        config, tensors, bank = read_checkpoint(checkpoint, options.adapters_dir, options.progress)
        refuse_untrained(checkpoint, config)
        refuse_last(bank.names, name)
        rest = without_adapter(bank, name)
        if rest.modules.keys() == bank.modules.keys():
            known = read_statistics(checkpoint, rest.names)
            gates = {path: tensors[f"{path}.gate"] for path in bank.modules}
            origin: GateOrigin = config.get("gates") or "trained"
            made, exact = gates_without(gates, bank.names, name, rest.modules, origin, known, progress=options.progress)
            change = Change("drop", name, rest.names, "solved" if exact else "deleted", exact, seconds=time.perf_counter() - began)
            for path, gate in made.items():
                tensors[f"{path}.gate"] = gate.to(gates[path].dtype).contiguous()
                if "adapters" in config["contains"]:
                    tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = rest.modules[path].A, rest.modules[path].B
            place = bank.index(name)
            _write(checkpoint, _without(config, place), tensors, known, change, config["adapters"][place]["sha256"])
            return change
    return _changed(checkpoint, name, None, options, lambda live: live.drop(name))


def _without(config: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A configuration without the adapter at a position."""

    def rest(values: list[Any]) -> list[Any]:
        return values[:place] + values[place + 1 :]

    adapters = rest(config["adapters"])
    modules = {path: {**module, "ranks": rest(module["ranks"]), "scaling": rest(module["scaling"])} for path, module in config["modules"].items()}
    return {**config, "adapters": adapters, "modules": modules, "top_k": min(config["top_k"], len(adapters))}


def _changed(checkpoint: Path, name: str, folder: Path | None, options: ChangeOptions, change: Callable[[LiveBank], Change]) -> Change:
    """Load a checkpoint, change its bank, and write it anew."""
    with _locked(checkpoint), scratch_folder(checkpoint.parent, f"{checkpoint.name}.statistics") as workspace:
        config = read_config(checkpoint)
        base = options.base or BaseReference(config["base"]["name"], config["base"].get("revision"))
        progress = options.progress
        model = load_checkpoint(checkpoint, base, options.dtype, options.device, backend=options.backend, adapters_dir=options.adapters_dir, progress=progress)
        tokenizer = load_tokenizer(base, progress=progress)
        how = Collecting(
            BaseReference(config["base"]["name"], config["base"].get("revision")),
            padding_token(model, tokenizer),
            Recipe(answer_share=options.answer_share),
            options.tokens,
            options.batch_size,
            options.max_length,
            options.seed,
            backend=options.backend,
        )
        sources = {adapter["name"]: _source(checkpoint, adapter["name"], adapter["source"], options.adapters_dir) for adapter in config["adapters"]}

        def find(wanted: str, place: Path | None) -> AdapterRows | None:
            own = place or sources.get(wanted)
            return find_rows(wanted, options.data, own, tokenizer, given=options.rows if wanted == name else None, seed=options.seed)

        live = LiveBank(model, Collector(tokenizer, how, workspace, find, progress), read_statistics(checkpoint, list(sources)))
        done = change(live)
        if folder is not None:
            relocate(model, {name: folder}, checkpoint)
        new, tensors = checkpoint_parts(model, place=checkpoint, base=how.base, training=config["training"])
        hashes = {adapter["name"]: adapter["sha256"] for adapter in (*config["adapters"], *new["adapters"])}
        _write(checkpoint, new, narrowed(tensors, checkpoint), live.statistics, done, hashes[name])
        return done


def relocate(model: Any, folders: Mapping[str, Path], checkpoint: Path) -> None:
    """Name the sources of adapters relative to the checkpoint, so that it does not depend on the working directory."""
    state = model.meteora
    state.adapters = tuple(
        replace(info, source=os.path.relpath(find_adapter(folders[info.name]) or folders[info.name], checkpoint)) if info.name in folders else info
        for info in state.adapters
    )


def _source(checkpoint: Path, name: str, source: str, adapters_dir: Path | None) -> Path | None:
    """The folder of an adapter, where it is there."""
    places = [*([adapters_dir / name] if adapters_dir is not None and is_name(name) else []), *([Path(source), checkpoint / source] if source else [])]
    return next((place for place in places if place.is_dir()), None)


def narrowed(tensors: Mapping[str, Tensor], checkpoint: Path) -> dict[str, Tensor]:
    """Embedded adapters in the dtype that the checkpoint has them in, where that keeps their numbers: the model may compute in another."""
    stored, _ = read_header(checkpoint / WEIGHT_FILE)
    made = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith((".lora_A", ".lora_B")) and name in stored:
            narrow = tensor.to(stored[name].torch_dtype)
            made[name] = narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor
    return made


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
    """Be the only process that changes a checkpoint."""
    read_config(checkpoint)  # a path that is no checkpoint is refused before a lock is made
    check_replaceable(checkpoint)
    with locked(checkpoint.resolve()):
        yield


def _known(checkpoint: str | Path, name: str) -> None:
    """Raise UsageError where a checkpoint holds no adapter of this name."""
    names = [adapter["name"] for adapter in read_config(checkpoint)["adapters"]]
    if name not in names:
        raise UsageError(f"no adapter named {name!r} in {checkpoint}", hint=did_you_mean(name, names) or f"there are: {', '.join(names)}")

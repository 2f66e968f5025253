"""What both stages need: hashes of their inputs, held-out rows, gradient checkpointing."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field

from meteora_core.adapters.base_names import same_base_name
from meteora_core.adapters.config import find_adapter, read_adapter_config
from meteora_core.data.rows import Row, read_rows, split_path
from meteora_core.errors import AdapterError, StorageError, UsageError, did_you_mean
from meteora_core.file_models import FileModel, check_model
from meteora_core.files import holds_other_things, locked, other_entries, sha256
from meteora_core.json_files import read_object
from meteora_core.locks import sweep
from meteora_core.model.base import BaseReference
from meteora_core.names import folder_of
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import is_regular
from meteora_core.settings import OptimSettings
from meteora_core.text import listed
from meteora_core.training.encoding import Encoded, TrainRow, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INFO_FILE = "meteora_training.json"
"""Beside an adapter's weights: how it was trained."""

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", INFO_FILE)
"""What :func:`meteora_core.training.single_adapter.save_adapter` writes."""

HELD_OUT = 64
"""At most so many train rows of a task are kept out of training, to watch it by; test rows are never looked at."""


def split_places(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of ``count`` rows are trained on, and which are held out: a tenth of the rows, at most 64, drawn by seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    held = order[: min(HELD_OUT, count // 10)]
    return sorted(set(order) - set(held)), held


def split_held_out(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Train rows and held-out rows; see :func:`split_places`."""
    train, held = split_places(len(rows), seed)
    return [rows[place] for place in train], [rows[place] for place in held]


def check_targets(root: Path, names: Iterable[str], *, replaced: Iterable[str] | None = None) -> None:
    """Check the names of adapters that will be written below ``root``, and that no foreign files would be replaced.

    Args:
        root: The folder of all adapters.
        names: The adapters' names.
        replaced: Those that will be trained, and so replaced; None: all.

    Raises:
        UsageError: A name cannot be a name, a path leaves ``root``, or a folder holds something that Meteora did not train.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file, so no adapter can be written into it", hint="choose a folder with --out")
    folders = {name: folder_of(root, name, "adapter") for name in names}
    for name in folders if replaced is None else replaced:
        check_adapter_folder(folders[name])


@contextmanager
def only_writer(folders: Iterable[Path], *, is_main: bool) -> Iterator[None]:
    """Hold the locks of what will be trained, in the process that writes it; see :func:`meteora_core.files.locked`. Raises BusyError, StorageError."""
    with ExitStack() as stack:
        for folder in folders if is_main else ():
            stack.enter_context(locked(folder))
        yield


def tidy(folder: Path, states: Path, *, is_main: bool) -> None:
    """Remove what a run left that was killed after it had saved its result, unless another process is writing there."""
    if is_main:
        sweep(folder)
        if states.is_dir():
            with suppress(StorageError), locked(folder):
                shutil.rmtree(states, ignore_errors=True)


def train_rows(data_dir: Path, task: str, seed: int, max_rows: int | None = None) -> tuple[list[Row], list[Row]]:
    """The train and held-out rows of a built dataset. Raises DataError when it is missing or broken."""
    return split_held_out(read_rows(data_dir, task, "train", max_rows), seed)


def encoded_rows(
    data_dir: Path,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    adapter: int,
    *,
    max_length: int,
    seed: int,
    max_rows: int | None = None,
    token_cache: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[Encoded, list[TrainRow]]:
    """The tokenised train and held-out rows of a built dataset.

    Args:
        data_dir, task: The dataset.
        tokenizer: The base model's.
        adapter: Gate label of every token.
        max_length: Longest row, in tokens.
        seed: Chooses the held-out rows.
        max_rows: Use only the first so many rows.
        token_cache: Where tokenised rows are kept (:mod:`meteora_core.training.token_cache`), train rows are read from there as they are
            needed; None tokenises them now, and holds them in memory. The rows are the same.
        progress: Where to report.

    Raises:
        DataError: The dataset is missing or broken.
    """
    if token_cache is None:
        train, held = train_rows(data_dir, task, seed, max_rows)
        return encode_rows(train, tokenizer, adapter, max_length), list(encode_rows(held, tokenizer, adapter, max_length).rows) if held else []
    from meteora_core.training.token_cache import cached_rows, open_rows

    dataset = cached_rows(data_dir, task, tokenizer, token_cache, max_rows=max_rows, progress=progress)
    places, held_places = split_places(len(dataset), seed)
    rows = open_rows(dataset, places, tokenizer, adapter, max_length)
    return Encoded(rows, rows.cut), open_rows(dataset, held_places, tokenizer, adapter, max_length)[:]


def run_inputs(
    stage: str, base: BaseReference, dtype: torch.dtype, data_dir: Path, tasks: Sequence[str], settings: OptimSettings, *, processes: int = 1, **more: Any
) -> dict[str, Any]:
    """What fixes a run: two runs with equal inputs on equal machines train the same weights.

    What is logged and how rows are spread over processes does not count, and what is switched off leaves no trace. The order of several tasks counts
    (``order``): what trains is stacked in it.
    """
    values = settings.model_dump(mode="json")
    ignored = {"log_steps", "save_steps", "log_to", "together_rows"}
    ignored |= {key for key in ("patience", "packing", "composite_rows") if not values.get(key)}
    if not values.get("composite_rows"):
        ignored.add("composite_max")
    if values.get("sampling") == "balanced":
        ignored.add("sampling")
    inputs = {
        "stage": stage,
        "base": {"name": base.name, "revision": base.revision},
        "dtype": str(dtype).removeprefix("torch."),
        "data": {task: sha256(split_path(data_dir, task, "train")) for task in tasks},
        "settings": {**{key: value for key, value in values.items() if key not in ignored}, "batch_size": settings.batch_size * processes},
        **more,
    }
    return with_order(inputs)


def with_order(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a run that name the order of their tasks: ``order``.

    Earlier versions have it as the order of ``data`` alone, which a comparison of dictionaries passes over.

    Args:
        inputs: As :func:`run_inputs` gives them, or as a file of an earlier version holds them.
    """
    if "order" in inputs or len(inputs.get("data", ())) < 2:
        return inputs
    return {**inputs, "order": list(inputs["data"])}


def short_hash(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON-able value."""
    import json

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in backward, in the form (not re-entrant) that the gate loss is exact under."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)
    model.enable_input_require_grads()


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Undo :func:`enable_checkpointing`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


def adapter_folders(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Adapter folders under ``root`` by name, in the authors' order where they are tasks of theirs, then by name.

    Args:
        root: The folder that holds them.
        names: Only these; empty means all but those that were trained on several tasks at once (``--balanced``), which no gate can be labelled with.

    Raises:
        UsageError: None is there, or a named one is missing (what is there is listed).
    """
    from meteora_core.data.tasks import TASK_ORDER

    inside = root.iterdir() if root.is_dir() else ()
    present = sorted(path.name for path in inside if not path.name.startswith(".") and find_adapter(path) is not None)
    if not present:
        raise UsageError(f"no adapters in {root}", hint="train some with `meteora train --stage adapters --task NAME`, or pass --adapters DIR")
    for name in names:
        if name not in present:
            raise UsageError(f"no adapter {name!r} in {root}", hint=did_you_mean(name, present) or f"there are: {', '.join(present)}")
    single = [name for name in present if not _several_tasks(root / name)]
    chosen = list(names) or [name for name in TASK_ORDER if name in single] + [name for name in single if name not in TASK_ORDER]
    return {name: root / name for name in chosen}


def check_checkpoint_folder(folder: Path) -> None:
    """Check that a trained checkpoint may replace ``folder``; see :func:`meteora_core.checkpoints.native.check_replaceable`. Raises UsageError."""
    from meteora_core.checkpoints.native import check_replaceable

    check_replaceable(folder)


def check_adapter_folder(folder: Path) -> None:
    """Check that a trained adapter may replace ``folder``: it does not exist, is empty, or holds an adapter that Meteora trained and nothing else.

    Raises:
        UsageError: It holds something else; the message names it.
    """
    hint = "choose another folder with --out, or move this one away"
    if holds_other_things(folder, "adapter_config.json"):
        raise UsageError(f"{folder} is not an adapter, so it is not replaced", hint=hint)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / INFO_FILE).is_file():
        raise UsageError(f"{folder} holds an adapter that was not trained by Meteora, so it is not replaced", hint=hint)
    if others := other_entries(folder, _ADAPTER_FILES):
        raise UsageError(f"{folder} contains files that do not belong to the adapter and would be lost: {listed(others)}", hint=hint)


def check_bases(folders: Mapping[str, Path], base: str, *, any_base: bool = False) -> str | None:
    """Compare the base models that adapters name in their adapter_config.json, by :func:`meteora_core.adapters.base_names.same_base_name`.

    Args:
        folders: Adapter folders by name.
        base: What they are to be attached to.
        any_base: Return a note where they name different base models, instead of refusing them.

    Returns:
        A note when they name another base model than ``base``, else None.

    Raises:
        AdapterError: A configuration is missing, broken, or of an adapter that cannot be stacked.
        UsageError: They name different base models; each is listed with its adapters.
    """
    named: dict[str, list[str]] = {}
    for name, folder in folders.items():
        origin = read_adapter_config(name, find_adapter(folder) or folder).base_model_name_or_path
        if origin:
            named.setdefault(next((known for known in named if same_base_name(known, origin)), origin), []).append(name)
    if len(named) > 1:
        bases = "; ".join(f"{origin}: {', '.join(names)}" for origin, names in named.items())
        if any_base:
            return f"the adapters name different base models ({bases}), and are used with {base}"
        raise UsageError(
            f"the adapters belong to different base models: {bases}",
            hint="name those of one base with --task, or pass --any-base if these are names of one model",
        )
    if named and not same_base_name(next(iter(named)), base):
        return f"the adapters name {next(iter(named))} as their base, and are used with {base}"
    return None


def _several_tasks(folder: Path) -> bool:
    place = find_adapter(folder) or folder
    return is_regular(place / INFO_FILE) and bool(read_training_info(place).tasks)


class TrainingInfo(FileModel):
    """``meteora_training.json``: how an adapter was trained.

    Attributes:
        inputs: What fixed the run (:func:`run_inputs`).
        tasks: Of one LoRA over several tasks.
        steps, tokens, rows_cut: Counts.
        loss: The last logged one; None where nothing was logged.
        seconds: How long it took.
    """

    inputs: dict[str, Any] = Field(default_factory=dict)
    tasks: list[str] | None = None
    steps: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    rows_cut: int = Field(0, ge=0)
    loss: float | None = None
    seconds: float = 0.0


def read_training_info(folder: Path) -> TrainingInfo:
    """Read an adapter's ``meteora_training.json``. Raises AdapterError when it is missing or broken."""
    hint = f"remove {INFO_FILE}, or train the adapter again"
    raw = read_object(folder / INFO_FILE, nullable="*", error=AdapterError, hint=hint)
    return check_model(TrainingInfo, raw, str(folder / INFO_FILE), error=AdapterError, hint=hint)

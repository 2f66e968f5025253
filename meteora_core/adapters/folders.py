"""Finds folders of adapters, reads how each was trained, and checks that they belong to one base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from meteora_core.adapters.base_names import same_base_name
from meteora_core.adapters.config import CONFIG, WEIGHTS, find_adapter, read_adapter_config
from meteora_core.adapters.misfits import Misfits
from meteora_core.adapters.peft_folder import check_adapter
from meteora_core.data.frames import Frame, FrameModel, chat_frame
from meteora_core.errors import AdapterError, UsageError, did_you_mean
from meteora_core.fetch.hub_names import adapters_root
from meteora_core.file_models import FileModel, check_model
from meteora_core.json_files import read_object
from meteora_core.reading import is_regular

INFO_FILE = "meteora_training.json"
"""The file next to an adapter's weights that says how it was trained."""


def adapter_folders(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the adapter folders under ``root`` by name: first the authors' tasks in their order, then the others by name.

    Args:
        root: The folder that contains the adapter folders, or ids of repositories on the hub; see :func:`meteora_core.fetch.hub_names.adapters_root`.
        names: The adapters to return. Empty means all except those that were trained on several tasks (``--balanced``), for which gates have no label.

    Raises:
        UsageError: There are no adapters, or one of ``names`` is missing; the message lists the existing ones.
        AdapterError: ``names`` is empty, and a folder holds an adapter's weights without their configuration, or only folders of adapters.
    """
    from meteora_core.data.tasks import TASK_ORDER

    root = adapters_root(root)
    inside = sorted(path for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    present = [path.name for path in inside if find_adapter(path) is not None]
    for path in inside:
        if not names and path.name not in present and os.path.lexists(path / WEIGHTS):
            raise AdapterError(f"{path} holds {WEIGHTS}, but no {CONFIG}", hint="copy or train the adapter again, or name the adapters to use with --task")
        within = [] if names or path.name in present or not path.is_dir() else sorted(each.name for each in path.iterdir() if find_adapter(each) is not None)
        if within:
            hint = f"copy the one to use into {root}, or name the adapters to use with --task"
            raise AdapterError(f"{path} holds several adapters and is none itself: {', '.join(within)}", hint=hint)
    if not present:
        raise UsageError(f"no adapters in {root}", hint="train some with `meteora train adapters --task NAME`, or pass --adapters DIR")
    for name in names:
        if name not in present:
            raise UsageError(f"no adapter {name!r} in {root}", hint=did_you_mean(name, present) or f"its adapters are: {', '.join(present)}")
    single = [name for name in present if not _several_tasks(root / name)]
    chosen = list(names) or [name for name in TASK_ORDER if name in single] + [name for name in single if name not in TASK_ORDER]
    return {name: root / name for name in chosen}


def _several_tasks(folder: Path) -> bool:
    location = find_adapter(folder) or folder
    return is_regular(location / INFO_FILE) and bool(read_training_info(location).tasks)


def check_bases(folders: Mapping[str, Path], base: str, *, any_base: bool = False) -> str | None:
    """Compare the base models that adapters name in their adapter_config.json; see :func:`meteora_core.adapters.base_names.same_base_name`.

    Args:
        folders: The folders of the adapters, by name.
        base: The base model that the adapters will be attached to.
        any_base: Whether to return a note if the adapters name different base models, instead of refusing them.

    Returns:
        A note if the adapters name another base model than ``base``, else None.

    Raises:
        AdapterError: A configuration or a header is missing or broken, or adapters cannot be stacked; the message names all of them.
        UsageError: The adapters name different base models; the message lists each with its adapters.
    """
    named: dict[str, list[str]] = {}
    misfits = Misfits(list(folders))
    for name, folder in folders.items():
        with misfits.of(name):
            check_adapter(name, folder)
            origin = read_adapter_config(name, find_adapter(folder) or folder).base_model_name_or_path
            if origin:
                named.setdefault(next((known for known in named if same_base_name(known, origin)), origin), []).append(name)
    misfits.refuse()
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


class TrainingInfo(FileModel):
    """The content of ``meteora_training.json``, which says how an adapter was trained.

    Attributes:
        inputs: The inputs that determine the result of the run; see :func:`meteora_core.training.run_inputs.run_inputs`.
        tasks: The tasks of an adapter that was trained on several tasks; None for a single task.
        steps: Number of optimiser steps.
        tokens: Number of tokens that the run trained on.
        rows_cut: Number of rows that were cut because they are too long.
        loss: The loss that was logged last; None if none was logged.
        seconds: Duration of the training, in seconds.
        frame: The text around the user's text in the prompts.
    """

    inputs: dict[str, Any] = Field(default_factory=dict)
    tasks: list[str] | None = None
    steps: int = Field(0, ge=0)
    tokens: int = Field(0, ge=0)
    rows_cut: int = Field(0, ge=0)
    loss: float | None = None
    seconds: float = 0.0
    frame: FrameModel | None = None


def read_training_info(folder: Path) -> TrainingInfo:
    """Read an adapter's ``meteora_training.json``. Raises AdapterError if it is missing or broken."""
    hint = f"remove {INFO_FILE}, or train the adapter again"
    raw = read_object(folder / INFO_FILE, nullable="*", error=AdapterError, hint=hint)
    return check_model(TrainingInfo, raw, str(folder / INFO_FILE), error=AdapterError, hint=hint)


def folder_frame(folder: Path) -> Frame | None:
    """Return the text around the user's text in the prompts that an adapter was trained on, if its folder states it.

    This is the frame that Meteora recorded, or the chat template of the tokenizer that Trainer, TRL and LLaMA-Factory save with an adapter.

    Args:
        folder: A PEFT folder, or the folder above its ``default``.

    Returns:
        The frame; None if the folder does not state one.

    Raises:
        AdapterError: ``meteora_training.json`` is broken.
    """
    location = find_adapter(folder) or folder
    if is_regular(location / INFO_FILE):
        recorded = read_training_info(location).frame
        if recorded is not None:
            return recorded.to_frame()
    if not is_regular(location / "tokenizer_config.json"):
        return None
    from transformers import AutoTokenizer

    try:
        return chat_frame(AutoTokenizer.from_pretrained(str(location)))
    except Exception:  # a tokenizer that cannot be loaded states no frame
        return None

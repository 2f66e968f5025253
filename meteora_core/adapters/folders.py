"""Folders of adapters: finding them, how each was trained, and whether they belong to one base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from meteora_core.adapters.base_names import same_base_name
from meteora_core.adapters.config import find_adapter, read_adapter_config
from meteora_core.data.frames import Frame, FrameModel, chat_frame
from meteora_core.errors import AdapterError, UsageError, did_you_mean
from meteora_core.file_models import FileModel, check_model
from meteora_core.json_files import read_object
from meteora_core.reading import is_regular

INFO_FILE = "meteora_training.json"
"""Beside an adapter's weights: how it was trained."""


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
        raise UsageError(f"no adapters in {root}", hint="train some with `meteora train adapters --task NAME`, or pass --adapters DIR")
    for name in names:
        if name not in present:
            raise UsageError(f"no adapter {name!r} in {root}", hint=did_you_mean(name, present) or f"there are: {', '.join(present)}")
    single = [name for name in present if not _several_tasks(root / name)]
    chosen = list(names) or [name for name in TASK_ORDER if name in single] + [name for name in single if name not in TASK_ORDER]
    return {name: root / name for name in chosen}


def _several_tasks(folder: Path) -> bool:
    place = find_adapter(folder) or folder
    return is_regular(place / INFO_FILE) and bool(read_training_info(place).tasks)


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


class TrainingInfo(FileModel):
    """``meteora_training.json``: how an adapter was trained.

    Attributes:
        inputs: What fixed the run (:func:`run_inputs`).
        tasks: Of one LoRA over several tasks.
        steps, tokens, rows_cut: Counts.
        loss: The last logged one; None where nothing was logged.
        seconds: How long it took.
        frame: What stood around the user's text in the prompts.
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
    """Read an adapter's ``meteora_training.json``. Raises AdapterError when it is missing or broken."""
    hint = f"remove {INFO_FILE}, or train the adapter again"
    raw = read_object(folder / INFO_FILE, nullable="*", error=AdapterError, hint=hint)
    return check_model(TrainingInfo, raw, str(folder / INFO_FILE), error=AdapterError, hint=hint)


def folder_frame(folder: Path) -> Frame | None:
    """What stood around the user's text when an adapter was trained, as far as its folder tells.

    It is what Meteora recorded, or the chat template of a tokenizer that was saved along, as Trainer, TRL and LLaMA-Factory do.

    Args:
        folder: A PEFT folder, or the folder above its ``default``.

    Returns:
        The frame; None where the folder does not tell.

    Raises:
        AdapterError: ``meteora_training.json`` is broken.
    """
    place = find_adapter(folder) or folder
    if is_regular(place / INFO_FILE):
        recorded = read_training_info(place).frame
        if recorded is not None:
            return recorded.to_frame()
    if not is_regular(place / "tokenizer_config.json"):
        return None
    from transformers import AutoTokenizer

    try:
        return chat_frame(AutoTokenizer.from_pretrained(str(place)))
    except Exception:  # a tokenizer that cannot be loaded tells nothing of the frame, whatever is wrong with it
        return None

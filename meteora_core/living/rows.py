"""Finding the rows of an adapter: a built dataset, or a file of any known format beside the adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.data.dataset_frames import dataset_frame
from meteora_core.data.formats.examples import make_plan
from meteora_core.data.formats.files import KINDS, PACKED
from meteora_core.data.formats.reading import Reading
from meteora_core.data.formats.sources import TRAIN, open_source
from meteora_core.data.frames import INST, PLACE, RAW, Frame, chat_frame
from meteora_core.data.manifest import read_manifest
from meteora_core.data.rows import Row, read_rows, split_path
from meteora_core.data.tasks import TASKS
from meteora_core.errors import DataError, UsageError
from meteora_core.reading import is_regular
from meteora_core.training.task_rows import split_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 20_000
"""Number of an adapter's rows that are read, from the first on."""


@dataclass(frozen=True)
class AdapterRows:
    """The rows of one adapter.

    Attributes:
        train: Those that statistics are collected on.
        held_out: Those that the routing is measured on; a tenth of all, at most 64.
        frame: What stands around the user's text in the prompts.
        known_frame: The text of the frame where it is ``[INST] {} [/INST]`` or the base model's chat template, else ``{}``: what finished prompts have in
            common besides may belong to the task.
        source: Where they were found.
    """

    train: list[Row]
    held_out: list[Row]
    frame: Frame
    known_frame: str
    source: Path


def find_rows(
    name: str, data: Path | None, adapter: Path | None, tokenizer: PreTrainedTokenizerBase, *, given: Path | None = None, seed: int = 42
) -> AdapterRows | None:
    """The rows of an adapter; None where none are found.

    They are looked for in this order: ``given``; in the folder ``data`` the built dataset ``NAME/``, a file ``NAME.jsonl`` (or of another format) or a
    folder ``NAME/`` of data files; beside the adapter a file ``NAME.jsonl``; in the adapter's folder a file ``train.jsonl`` or a folder ``data/``.

    Args:
        name: The adapter's name.
        data: The folder of all datasets.
        adapter: The adapter's folder.
        tokenizer: The base model's; questions without a frame are put into its chat template.
        given: A file or folder of rows of this adapter.
        seed: Of the choice of held-out rows.

    Raises:
        DataError: Rows were found that are broken, that are those of a composite, or of a format that is not known.
    """
    place = given or next(_places(name, data, adapter), None)
    if place is None:
        return None
    rows, frame = _read(name, place, tokenizer)
    if not rows:
        raise DataError(f"{place} has no rows", hint="add some, or remove it")
    train, held_out = split_held_out(rows, seed)
    return AdapterRows(train, held_out, frame, _known_frame(rows, tokenizer), place)


def _known_frame(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> str:
    frames = [INST]
    if getattr(tokenizer, "chat_template", None):
        with suppress(UsageError):  # a template that does not take a single message
            frames.append(chat_frame(tokenizer))
    return next((frame.text for frame in frames if all(frame.inside(row.prompt) is not None for row in rows)), PLACE)


def _places(name: str, data: Path | None, adapter: Path | None) -> Iterator[Path]:
    if data is not None:
        if is_regular(split_path(data, name, "train")):
            yield data / name
        yield from _files(data, name)
        if (data / name).is_dir():
            yield data / name
    if adapter is not None:
        yield from _files(adapter.parent, name)
        for stem in TRAIN:
            yield from _files(adapter, stem)
        if (adapter / "data").is_dir():
            yield adapter / "data"


def _files(folder: Path, stem: str) -> Iterator[Path]:
    for ending in KINDS:
        for packed in ("", *PACKED):
            if os.path.lexists(file := folder / f"{stem}{ending}{packed}"):
                yield file


def _read(name: str, place: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], Frame]:
    manifest = read_manifest(place) if place.is_dir() else None
    known = TASKS.get(place.name)
    if (manifest is not None and manifest.members) or (known is not None and known.is_composite):
        raise DataError(f"{place} is a composite: its rows belong to several adapters", hint=f"give rows of {name} alone")
    if place.is_dir() and is_regular(split_path(place.parent, place.name, "train")):
        return read_rows(place.parent, place.name, "train", MOST), dataset_frame(place.parent, place.name) or RAW
    opened = open_source(place)
    plan = make_plan(opened.train, Reading(tokenizer=lambda: tokenizer))
    return list(islice(plan.rows(opened.train), MOST)), plan.frame

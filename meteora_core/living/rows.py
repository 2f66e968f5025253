"""Finds the rows of an adapter: a built dataset, or a file of any known format next to the adapter."""

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
"""Largest number of rows that are read for an adapter, from the start of its file."""


@dataclass(frozen=True)
class AdapterRows:
    """The rows of one adapter.

    Attributes:
        train: Rows from which statistics are collected.
        held_out: Rows on which the routing is measured: a tenth of all rows, at most 64.
        frame: Frame of the prompts.
        known_frame: Text of the frame if it is ``[INST] {} [/INST]`` or the base model's chat template, otherwise ``{}``, because any other text that
            complete prompts have in common may belong to the task.
        source: File or folder of the rows.
    """

    train: list[Row]
    held_out: list[Row]
    frame: Frame
    known_frame: str
    source: Path


def find_rows(
    name: str, data: Path | None, adapter: Path | None, tokenizer: PreTrainedTokenizerBase, *, given: Path | None = None, seed: int = 42
) -> AdapterRows | None:
    """Find the rows of an adapter.

    The first of these places that exists is read:

    1. ``given``;
    2. in the folder ``data``: the built dataset ``NAME/``, a file ``NAME.jsonl`` (or of another format), or a folder ``NAME/`` of data files;
    3. next to the adapter's folder: a file ``NAME.jsonl``;
    4. in the adapter's folder: a file ``train.jsonl`` or a folder ``data/``.

    Args:
        name: Name of the adapter.
        data: Folder that contains all datasets; None for none.
        adapter: PEFT folder of the adapter; None if unknown.
        tokenizer: Tokenizer of the base model; its chat template is put around questions without a frame.
        given: File or folder with the rows of this adapter; None to search for them.
        seed: Random seed for the selection of held-out rows.

    Returns:
        The rows; None if there are none.

    Raises:
        DataError: The rows are broken, belong to a composite, or have an unknown format.
    """
    source = given or next(_places(name, data, adapter), None)
    if source is None:
        return None
    rows, frame = _read(name, source, tokenizer)
    if not rows:
        raise DataError(f"{source} has no rows", hint="add rows to it, or remove it")
    train, held_out = split_held_out(rows, seed)
    return AdapterRows(train, held_out, frame, _known_frame(rows, tokenizer), source)


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


def _read(name: str, source: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], Frame]:
    manifest = read_manifest(source) if source.is_dir() else None
    known = TASKS.get(source.name)
    if (manifest is not None and manifest.members) or (known is not None and known.is_composite):
        raise DataError(f"{source} is a composite: its rows belong to several adapters", hint=f"give rows of {name} alone")
    if source.is_dir() and is_regular(split_path(source.parent, source.name, "train")):
        return read_rows(source.parent, source.name, "train", MOST), dataset_frame(source.parent, source.name) or RAW
    opened = open_source(source)
    plan = make_plan(opened.train, Reading(tokenizer=lambda: tokenizer))
    return list(islice(plan.rows(opened.train), MOST)), plan.frame

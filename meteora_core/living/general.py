"""General text: the rows from which the statistics of the base route are collected, unless the user gives other rows."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from pydantic import Field, TypeAdapter

from meteora_core.data.frames import Frame
from meteora_core.data.rows import Row
from meteora_core.file_models import FileModel
from meteora_core.living.rows import AdapterRows
from meteora_core.training.task_rows import split_held_out

GENERAL_TEXT = "general text"
"""The name that is reported as the source of general text."""

_FILE = "general_text.json"


class _Entry(FileModel):
    """A passage, or a question and its answer."""

    text: str = ""
    question: str = ""
    answer: str = Field("", max_length=10_000)


@lru_cache(maxsize=1)
def _entries() -> tuple[_Entry, ...]:
    return tuple(TypeAdapter(list[_Entry]).validate_json(files("meteora_core.living").joinpath(_FILE).read_bytes()))


def general_rows(frame: Frame, seed: int = 42) -> AdapterRows:
    """Rows of general text: passages of many kinds without a prompt, and questions in the frame of the adapters' prompts with their answers.

    The texts were written for Meteora and have its licence. Most are in English, and some in German, French, Spanish and Italian.

    Args:
        frame: Frame of the adapters' prompts.
        seed: Random seed for the selection of held-out rows.

    Example:
        >>> from meteora_core.data.frames import INST
        >>> from meteora_core.living.general import general_rows
        >>> rows = general_rows(INST)
        >>> len(rows.train), len(rows.held_out)
        (81, 9)
    """
    rows = [Row("", each.text) if each.text else Row(frame.around(each.question), each.answer) for each in _entries()]
    train, held_out = split_held_out(rows, seed)
    return AdapterRows(train, held_out, frame, frame.text, Path(GENERAL_TEXT))

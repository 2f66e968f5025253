"""Conversion of records, the objects of the hub's datasets and of raw JSON-lines files, to rows."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meteora_core.data.bigbench import SEED, Example, first_target, to_row
from meteora_core.data.formats.columns import fill, text_in
from meteora_core.data.rows import Row
from meteora_core.data.tasks import PROMPT_TEMPLATE, BigBench, Records, Task

TEST_SHARE = 0.2
SPLIT_RULE = f"the source has no test split: its train rows are shuffled with seed {SEED}, and the first {TEST_SHARE:.0%} are the test split"
SOURCE_SPLIT = "the source's own train and test splits"
VALIDATION_SPLIT = "the source's own train split; its validation split serves as test"


def record_to_row(task: Task, record: Any) -> Row:
    """The row of one record.

    A record with ``prompt`` and ``response`` is a finished row. For any other record, the task's source and templates define the row.

    Args:
        task: The task.
        record: The record.

    Raises:
        ValueError: A field is missing or has the wrong type; the message says which.
    """
    if not isinstance(record, Mapping):
        raise ValueError("a record is not an object with fields")
    if "prompt" in record and "response" in record:
        return Row(text_in(record, "prompt"), text_in(record, "response"))
    if isinstance(task.source, BigBench):
        return _bigbench(task, record)
    suffix = ""
    if isinstance(task.source, Records):
        if task.source.nested is not None:
            record = record.get(task.source.nested)
            if not isinstance(record, Mapping):
                raise ValueError(f"the record has no field {task.source.nested!r} that holds an object")
        extra = record.get(task.source.optional_suffix) if task.source.optional_suffix else None
        if extra:
            suffix = f"\n{extra}"
    return Row(PROMPT_TEMPLATE.format(inputs=fill(task.template, record) + suffix), fill(task.target, record))


def divide(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Divide the rows of a source without test rows into train and test rows, by :data:`SPLIT_RULE`.

    Returns:
        The train rows and the test rows.
    """
    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    held_out = int(len(shuffled) * TEST_SHARE)
    return shuffled[held_out:], shuffled[:held_out]


def _bigbench(task: Task, record: Mapping[str, Any]) -> Row:
    if "targets" not in record:
        raise ValueError(f"no field 'targets'; there are: {', '.join(map(str, record)) or 'none'}")
    choices = record.get("multiple_choice_targets")
    if choices is None:
        choices = []
    if not isinstance(choices, Iterable) or isinstance(choices, str | bytes):
        raise ValueError("'multiple_choice_targets' is not a list")
    targets = record["targets"]
    if not isinstance(targets, str):
        targets = list(targets)
    return to_row(task, Example(text_in(record, "inputs"), first_target(targets), tuple(str(choice) for choice in choices)))

"""Rows out of records: what the hub and raw JSON-lines files hold, one object an example."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from meteora_core.data.bigbench import SEED, Example, first_target, text_of, to_row
from meteora_core.data.rows import Row
from meteora_core.data.tasks import PROMPT_TEMPLATE, BigBench, Records, Task

TEST_SHARE = 0.2
SPLIT_RULE = f"the source has no test split: its train rows are shuffled with seed {SEED}, and the first {TEST_SHARE:.0%} are the test split"
SOURCE_SPLIT = "the source's own train and test splits"
VALIDATION_SPLIT = "the source's own train split; its validation split serves as test"


def record_to_row(task: Task, record: Any) -> Row:
    """Make a row of one record.

    A record that holds ``prompt`` and ``response`` is a finished row. Any other is put together as the task's source and templates say.

    Args:
        task: The task.
        record: The record.

    Raises:
        ValueError: A field is missing or has the wrong type; the message says which.
    """
    if not isinstance(record, Mapping):
        raise ValueError("a record is not an object with fields")
    if "prompt" in record and "response" in record:
        return Row(_text(record, "prompt"), _text(record, "response"))
    if isinstance(task.source, BigBench):
        return _bigbench(task, record)
    suffix = ""
    if isinstance(task.source, Records):
        if task.source.nested is not None:
            record = record.get(task.source.nested)
            if not isinstance(record, Mapping):
                raise ValueError(f"the record has no field {task.source.nested!r} with fields of its own")
        extra = record.get(task.source.optional_suffix) if task.source.optional_suffix else None
        if extra:
            suffix = f"\n{extra}"
    return Row(PROMPT_TEMPLATE.format(inputs=fill(task.template, record) + suffix), fill(task.target, record))


def fill(template: str, record: Mapping[str, Any]) -> str:
    """Put a record's fields into a template; finite numbers become text as Python writes them (``7``, ``0.5``).

    Raises:
        ValueError: The template is broken, or the record lacks one of its fields.
    """
    parts = []
    for literal, name, _, _ in Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(_text(record, name))
    return "".join(parts)


def template_fields(template: str) -> list[str]:
    """The field names in a template. Raises ValueError when its braces do not match."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def divide(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Set test rows aside where the source has none; see :data:`SPLIT_RULE`.

    Returns:
        The train rows and the test rows.
    """
    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    held_out = int(len(shuffled) * TEST_SHARE)
    return shuffled[held_out:], shuffled[:held_out]


def _bigbench(task: Task, record: Mapping[str, Any]) -> Row:
    if "targets" not in record:
        raise ValueError(_missing("targets", record))
    choices = record.get("multiple_choice_targets")
    if choices is None:
        choices = []
    if not isinstance(choices, Iterable) or isinstance(choices, str | bytes):
        raise ValueError("'multiple_choice_targets' is not a list")
    targets = record["targets"]
    if not isinstance(targets, str):
        targets = list(targets)
    return to_row(task, Example(_text(record, "inputs"), first_target(targets), tuple(str(choice) for choice in choices)))


def _text(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise ValueError(_missing(name, record))
    return text_of(record[name], f"field {name!r}")


def _missing(name: str, record: Mapping[str, Any]) -> str:
    return f"no field {name!r}; there are: {', '.join(map(str, record)) or 'none'}"

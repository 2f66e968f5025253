"""BIG-bench JSON tasks: formatting, duplicates and the public split.

The rules are those of BIG-bench's programming interface for a zero-shot text-to-text example:

- input = task prefix + input prefix + input (+ choices) + output prefix, stripped at both ends;
- appended choices are in the order of ``numpy.random.RandomState(42).permutation(sorted(choices))``, from a fresh generator each time;
- target = the first target, or, if there is none, the first of the choices with the highest score; stripped at both ends, as in the published rows;
- duplicates are dropped, the examples are shuffled with ``random.seed(42)``, and the last ``max(int(0.2 n), 16)`` become the test split, for each sub-task.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from meteora_core.data.jsonindex import ExampleReader, IndexedFile, index_file
from meteora_core.data.rows import Row, Split
from meteora_core.data.tasks import PROMPT_TEMPLATE, Task
from meteora_core.errors import DataError

SEED = 42
MIN_VALIDATION = 16
SPLIT_RULE = f"per file: drop duplicate examples, shuffle with seed {SEED}, the last max(20 %, {MIN_VALIDATION}) rows are the test split"


@dataclass(frozen=True)
class Example:
    """A formatted example, as BIG-bench passes it to a model.

    Args:
        inputs: The input, stripped.
        target: The first target, stripped.
        choices: The choices in the order of the file; empty if there are none.
    """

    inputs: str
    target: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Style:
    """The prefixes with which a file's examples are formatted, and whether their choices are appended."""

    task_prefix: str
    input_prefix: str
    output_prefix: str
    choice_prefix: str
    append_choices: bool

    @classmethod
    def of(cls, index: IndexedFile) -> Style:
        """The style of a file, with BIG-bench's defaults for fields that it does not set.

        Raises:
            DataError: A field has the wrong type.
        """

        def text(name: str, default: str) -> str:
            value = index.fields.get(name, default)
            if not isinstance(value, str):
                raise DataError(f"{index.path}: field {name!r} is not a text")
            return value

        return cls(
            text("task_prefix", ""),
            text("example_input_prefix", "\nQ: "),
            text("example_output_prefix", "\nA: "),
            text("choice_prefix", "\n  choice: "),
            bool(index.fields.get("append_choices_to_input", True)),
        )


@lru_cache(maxsize=4096)
def permutation(n: int) -> tuple[int, ...]:
    """The order in which BIG-bench lists ``n`` sorted choices."""
    import numpy as np

    return tuple(int(i) for i in np.random.RandomState(SEED).permutation(n))


def format_example(example: Any, style: Style) -> Example:
    """Format one example of a BIG-bench file.

    Args:
        example: The JSON object with ``input`` and ``target`` or ``target_scores`` or both.
        style: The file's style.

    Raises:
        ValueError: A field is missing or has the wrong type; the message says which.
    """
    if not isinstance(example, dict):
        raise ValueError("an example is not a JSON object")
    if "input" not in example:
        raise ValueError("an example has no field 'input'")
    if "target" not in example and "target_scores" not in example:
        raise ValueError("an example has neither 'target' nor 'target_scores'")
    shown = text_of(example["input"], "'input'")
    scores = example.get("target_scores")
    choices: tuple[str, ...] = ()
    if scores is not None:
        if not isinstance(scores, dict) or not scores:
            raise ValueError("'target_scores' is not an object with choices")
        choices = tuple(scores)
        if style.append_choices:
            ordered = sorted(choices)
            shown += "".join(style.choice_prefix + ordered[position] for position in permutation(len(ordered)))
    target = first_target(example["target"]) if "target" in example else best_choice(scores)
    return Example((style.task_prefix + style.input_prefix + shown + style.output_prefix).strip(), target.strip(), choices)


def first_target(target: Any) -> str:
    """The first target of one or several, as text."""
    if isinstance(target, list):
        if not target:
            raise ValueError("'target' is an empty list")
        target = target[0]
    return text_of(target, "'target'")


def best_choice(scores: Any) -> str:
    """The choice with the highest score; the first one if several have it."""
    if not isinstance(scores, dict) or not scores:
        raise ValueError("'target_scores' is not an object with choices")
    for choice, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ValueError(f"the score of choice {choice!r} is not a number")
    best, worst = max(scores.values()), min(scores.values())
    if (len(scores) > 1 and best <= worst) or (len(scores) == 1 and best == 0):
        raise ValueError("no choice scores higher than the others")
    return next(choice for choice, score in scores.items() if score == best)


def text_of(value: Any, what: str) -> str:
    """A text, or a finite number as Python writes it.

    Args:
        value: A value of a JSON document.
        what: Name of its field in error messages.

    Raises:
        ValueError: ``value`` is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} is not a text")
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}, which is neither a text nor a finite number")
    return str(value)


def to_row(task: Task, example: Example) -> Row:
    """The row of an example, in the task's prompt template.

    For tasks with ``choices``, MeteoRA's list of choices is appended. An example without choices (some of unit_conversion) gets an empty list.
    """
    inputs = example.inputs
    if task.choices is not None:
        inputs += task.choices + "".join(f"choice: {choice}\n" for choice in example.choices)
    return Row(PROMPT_TEMPLATE.format(inputs=inputs), example.target)


def split_order(n: int) -> tuple[list[int], list[int]]:
    """The public split of ``n`` distinct examples: the numbers of the train examples and those of the test examples, in order.

    Raises:
        ValueError: There are too few examples for a test split.
    """
    held_out = max(int(0.2 * n), MIN_VALIDATION)
    if held_out >= n:
        raise ValueError(f"{n} distinct examples are too few: the test split alone takes {MIN_VALIDATION}")
    order = list(range(n))
    random.Random(SEED).shuffle(order)
    return order[: n - held_out], order[n - held_out :]


def task_files(folder: Path) -> list[IndexedFile]:
    """Index the file of a task, or the files of its sub-tasks in the order of their folders.

    Args:
        folder: The task's folder in BIG-bench's repository layout.

    Raises:
        DataError: A file is missing or broken.
    """
    main = index_file(folder / "task.json")
    if main.has_examples:
        return [main]
    parts = sorted(entry for entry in folder.iterdir() if (entry / "task.json").is_file())
    if not parts:
        raise DataError(f"{main.path} has neither 'examples' nor folders of sub-tasks next to it")
    indexed = [index_file(part / "task.json") for part in parts]
    for part in indexed:
        if not part.has_examples:
            raise DataError(f"{part.path} has no field 'examples'")
    return indexed


def iter_split(task: Task, files: list[IndexedFile], split: Split) -> Iterator[Row]:
    """Yield the rows of one split, file by file.

    Raises:
        DataError: An example is broken; the message names file, line and column.
    """
    for index in files:
        style = Style.of(index)
        try:
            train, test = split_order(len(index))
        except ValueError as few:
            raise DataError(f"{index.path}: {few}") from few
        with ExampleReader(index) as examples:
            for number in train if split == "train" else test:
                try:
                    yield to_row(task, format_example(examples[number], style))
                except ValueError as broken:
                    raise DataError(f"{examples.place(number)}: {broken}") from broken

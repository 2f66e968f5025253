"""The raw rows of a user's task, for the builder."""

from __future__ import annotations

from collections.abc import Iterator

from meteora_core.data.bigbench import SEED
from meteora_core.data.extract import Extract
from meteora_core.data.formats.examples import make_plan
from meteora_core.data.formats.reading import Reading
from meteora_core.data.formats.sources import open_source
from meteora_core.data.records import SOURCE_SPLIT, SPLIT_RULE, VALIDATION_SPLIT, divide
from meteora_core.data.rows import Row, Split
from meteora_core.data.tasks import Files, Task
from meteora_core.errors import DataError
from meteora_core.progress import SILENT, Progress
from meteora_core.text import listed


def extract_own(task: Task, progress: Progress = SILENT) -> Extract:
    """Open the rows of a task whose source is :class:`meteora_core.data.tasks.Files`.

    Args:
        task: The task.
        progress: Receiver of notes about skipped rows and about the frame of the prompts.

    Raises:
        DataError: A file is missing or broken, or its columns fit no known format.
        DownloadError: The hub, or the base model's tokenizer, cannot be reached.
        UsageError: The user's columns or template are wrong.
    """
    assert isinstance(task.source, Files)
    reading = task.source.reading or Reading()
    opened = open_source(task.source.train, task.source.test, reading.subset)
    plan = make_plan(opened.train, reading)
    if plan.note:
        progress.note(f"{task.name}: {plan.note}")

    def rows(split: Split) -> Iterator[Row]:
        table = opened.train if split == "train" else opened.test
        assert table is not None
        skipped: list[str] = []
        yield from plan.rows(table, skip_invalid=reading.skip_invalid, skipped=skipped)
        if skipped:
            progress.note(f"{task.name}: {len(skipped)} {split} rows were left out ({listed(skipped, 2)})")

    origin = {**opened.origin, "columns": plan.layout.shown}
    if opened.test is not None:
        rule = VALIDATION_SPLIT if opened.validation else SOURCE_SPLIT
        return Extract(origin, rule, None, rows, frame=plan.frame, example=plan.example)
    parts = divide(list(rows("train")))
    divided = {"train": parts[0], "test": parts[1]}
    counts = {split: len(part) for split, part in divided.items()}
    if not counts["train"]:
        raise DataError(f"{opened.train.name} has no row that can be used")
    return Extract(origin, SPLIT_RULE, SEED, lambda split: iter(divided[split]), counts=counts, frame=plan.frame, example=plan.example)

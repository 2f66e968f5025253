"""Reads the public rows and adapters of FLANv2-48 and writes them in Meteora's layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meteora_core.data.formats.reading import Reading
from meteora_core.data.userdata import add_task, own_task
from meteora_core.errors import DataError, UsageError
from meteora_core.fetch.hub import HubOptions, download_repo
from meteora_core.json_files import read_json, read_jsonl, write_jsonl
from meteora_core.names import problem_of
from meteora_core.progress import SILENT, Progress

BASE = "meta-llama/Llama-2-7b-hf"
EVAL_SET = "Styxxxx/LoraRetriever_EvalSet"
"""The hub dataset with 50 test rows for each of 48 tasks, in the columns inputs, targets, metric, domain and task."""

ADAPTER = "Styxxxx/llama2_7b_lora-{}"
"""The hub repository of a task's adapter: rank 8, alpha 16, on q_proj and v_proj."""

PROMPT = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
"""The prompt template that the adapters were trained with: Alpaca's without an input."""

LONGEST_ANSWER = 50

METRICS = {"em": "exact", "bleu": "bleu", "rouge": "text"}
"""Meteora's metric for each metric of the evaluation set; ``text`` computes ROUGE-1, -2 and -L, and BLEU."""


@dataclass
class FlanTask:
    """The rows of one task.

    Attributes:
        name: Name of the task and of its adapter.
        metric: Metric of the evaluation set.
        test, train: Rows with the keys inputs and targets.
    """

    name: str
    metric: str
    test: list[dict[str, str]] = field(default_factory=list)
    train: list[dict[str, str]] = field(default_factory=list)


def adapter_name(task: str) -> str:
    """The name of a task without the number of its templates: ``anli_r1_10templates`` becomes ``anli_r1``.

    Raises:
        DataError: The result is not a valid name of a task.
    """
    name = re.sub(r"_\d+templates$", "", task)
    if problem := problem_of(name):
        raise DataError(f"{task!r} cannot be the name of a task: {problem}")
    return name


def read_tasks(rows: Iterable[Mapping[str, Any]], samples: Iterable[Mapping[str, Any]], only: Sequence[str] = ()) -> list[FlanTask]:
    """Group the rows by task.

    Args:
        rows: Test rows, with the columns inputs, targets, metric and task.
        samples: Training rows, with the columns inputs, targets and task.
        only: Names of the tasks to keep; empty for all.

    Raises:
        DataError: A column or the training rows of a task are missing, or a metric is unknown.
        UsageError: One of ``only`` has no rows.
    """
    tasks: dict[str, FlanTask] = {}
    for number, row in enumerate(rows, start=1):
        inputs, targets, metric, task = (_text(row, key, f"test row {number}") for key in ("inputs", "targets", "metric", "task"))
        if metric not in METRICS:
            raise DataError(f"test row {number} has the unknown metric {metric!r}", hint=f"known: {', '.join(METRICS)}")
        made = tasks.setdefault(adapter_name(task), FlanTask(adapter_name(task), metric))
        if made.metric != metric:
            raise DataError(f"the rows of {made.name} have the metrics {made.metric} and {metric}")
        made.test.append({"inputs": inputs, "targets": targets})
    for number, row in enumerate(samples, start=1):
        inputs, targets, task = (_text(row, key, f"training row {number}") for key in ("inputs", "targets", "task"))
        if (known := tasks.get(adapter_name(task))) is not None:
            known.train.append({"inputs": inputs, "targets": targets})
    for name in only:
        if name not in tasks:
            raise UsageError(f"no test rows of {name!r}", hint=f"there are rows of: {', '.join(tasks)}")
    chosen = [task for task in tasks.values() if not only or task.name in only]
    if without := [task.name for task in chosen if not task.train]:
        raise DataError(f"no training rows of {', '.join(without)}", hint="add them to the file of --train, or leave these tasks out with --task")
    return chosen


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{place} has no text in the column {key!r}", hint=f"the columns of {EVAL_SET} are inputs, targets, metric, domain and task")
    return value


def read_rows(source: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a JSON Lines file, or of a dataset on the hub (its test split, or its only one).

    Raises:
        DataError: The file is missing or broken.
        DownloadError: The hub cannot be reached.
    """
    if Path(source).is_file():
        return read_jsonl(Path(source))
    from meteora_core.data.formats.sources import open_source

    opened = open_source(source)
    return (opened.test or opened.train).read()


def read_samples(file: Path) -> Iterable[Mapping[str, Any]]:
    """Training rows from JSON Lines with a column task, or from a JSON list of ``{"model_name", "sample": [{"inputs", "targets"}]}``, LoraRetriever's file.

    Raises:
        DataError: The file is missing or broken.
    """
    if file.suffix != ".json":
        yield from read_jsonl(file)
        return
    listed = read_json(file, error=DataError)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and isinstance(entry.get("sample"), list) for entry in listed):
        raise DataError(
            f"{file} is not a list of adapters with samples", hint='it should look like [{"model_name": …, "sample": [{"inputs": …, "targets": …}]}]'
        )
    for entry in listed:
        for sample in entry["sample"]:
            yield {**sample, "task": entry.get("model_name")}


def write_datasets(tasks: Sequence[FlanTask], work: Path, progress: Progress = SILENT) -> None:
    """Write the datasets of the tasks to ``work/datasets``, with their raw rows in ``work/raw``. Raises DataError."""
    with progress.task("datasets", total=len(tasks), unit="tasks") as bar:
        for task in tasks:
            files = {}
            for split, rows in (("train", task.train), ("test", task.test)):
                files[split] = work / "raw" / task.name / f"{split}.jsonl"
                write_jsonl(files[split], [{"question": row["inputs"], "answer": row["targets"]} for row in rows])
            reading = Reading(template=PROMPT)
            task_definition = own_task(
                task.name, train=files["train"], test=files["test"], metric=METRICS[task.metric], reading=reading, max_new_tokens=LONGEST_ANSWER
            )
            add_task(task_definition, work / "datasets")
            bar.update(1)


def fetch_adapters(names: Sequence[str], work: Path, progress: Progress = SILENT, endpoint: str | None = None) -> None:
    """Fetch the adapters of these names to ``work/adapters``; those that exist are not fetched again. Raises DownloadError."""
    for name in names:
        folder = work / "adapters" / name
        download_repo(ADAPTER.format(name), HubOptions(folder=folder, endpoint=endpoint), progress=progress)

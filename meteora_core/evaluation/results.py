"""Results files: one JSON file in lm-evaluation-harness's format, and one JSON Lines file of samples per task.

Finished rows are stored at once, so that an interrupted run can be continued. The results file is written at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.errors import DataError
from meteora_core.evaluation.scoring import harness_metrics
from meteora_core.files import storage_errors
from meteora_core.json_files import read_json, write_json

if TYPE_CHECKING:
    from meteora_core.evaluation.runner import Speed

PARTIAL = ".partial.jsonl"


def partial_file(folder: Path, task: str, rank: int = 0) -> Path:
    """The file in which process ``rank`` stores the finished rows of a task until all rows are finished."""
    return folder / f".{task}{f'.rank{rank}' if rank else ''}{PARTIAL}"


def partial_files(folder: Path, task: str) -> list[Path]:
    """The existing files of :func:`partial_file`, from this run or an interrupted one with any number of processes."""
    return sorted(path for path in (partial_file(folder, task), *folder.glob(f".{task}.rank*{PARTIAL}")) if path.is_file())


class SampleWriter:
    """Appends samples to a JSON Lines file as soon as they are finished. An incomplete last line of an earlier run is removed.

    Args:
        path: The file; its folder is created if necessary.
        inputs: Everything that the rows depend on (task, data hash, model, decoding). A file with other inputs is overwritten.
        others: Further files to read rows from, written by other processes.
        stamp: Time stamp of this run, which is stored in a new file.

    Attributes:
        done: Decoded answers of the finished rows, by row index.
        tokens: Token ids of these answers, by row index.
        stamp: Time stamp of the run that created the file.

    Raises:
        StorageError: The disk is full or not writable; the rows so far are kept.
    """

    def __init__(self, path: Path, inputs: dict[str, Any], others: Sequence[Path] = (), stamp: str = "") -> None:
        self.path = path
        self.done: dict[int, str] = {}
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.stamp = stamp
        self._inputs = json.loads(json.dumps(inputs))
        head = (json.dumps({"inputs": inputs, "stamp": stamp}, sort_keys=True) + "\n").encode()
        for other in others:
            if other != path:
                self._read(other)
        self._size = self._read(path, take_stamp=True) if path.is_file() else 0
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._handle = path.open("ab", buffering=0)
            try:
                self._handle.truncate(self._size)
                if not self._size:
                    self._append(head)
            except OSError:
                self._handle.close()
                raise

    def _read(self, path: Path, *, take_stamp: bool = False) -> int:
        """Load the finished rows of a file, and its time stamp if ``take_stamp``. Returns the number of bytes in valid lines; 0 for other inputs."""
        with path.open("rb") as handle:
            first = handle.readline()
            try:
                head = json.loads(first)
            except (ValueError, RecursionError):
                return 0
            if not first.endswith(b"\n") or not isinstance(head, dict) or head.get("inputs") != self._inputs:
                return 0
            if take_stamp:
                self.stamp = str(head.get("stamp") or self.stamp)
            size = len(first)
            for raw in handle:
                if not raw.endswith(b"\n"):
                    break
                row = _finished_row(raw)
                if row is None:
                    break
                self.done[row[0]], self.tokens[row[0]] = row[1], row[2]
                size += len(raw)
        return size

    def _append(self, line: bytes) -> None:
        """Write a line completely, or leave the file unchanged."""
        remaining = memoryview(line)
        try:
            while remaining:
                remaining = remaining[self._handle.write(remaining) :]
        except OSError:
            self._handle.truncate(self._size)
            raise
        self._size += len(line)

    def add(self, doc_id: int, output: str, tokens: Sequence[int] = ()) -> None:
        """Append a finished row.

        Args:
            doc_id: Index of the row in the test split.
            output: The decoded answer.
            tokens: Token ids of the answer.

        Raises:
            StorageError: The disk is full or not writable.
        """
        with storage_errors(self.path):
            self._append((json.dumps({"doc_id": doc_id, "output": output, "tokens": list(tokens)}) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _finished_row(line: bytes) -> tuple[int, str, tuple[int, ...]] | None:
    """Parse a line to a row's index, answer and token ids; None for an invalid line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not {"doc_id", "output", "tokens"} <= row.keys():
        return None
    doc_id, output, tokens = row["doc_id"], row["output"], row["tokens"]
    is_valid = isinstance(output, str) and isinstance(tokens, list) and all(type(number) is int and number >= 0 for number in (doc_id, *tokens))
    return (doc_id, output, tuple(tokens)) if is_valid else None


@dataclass
class ResultsBuilder:
    """Collects the results of tasks for the results document.

    Attributes:
        model: Name of the model ("meteora", "base", or an adapter).
        config: Description of the run: model, checkpoint, routing, decoding, seeds and versions.
    """

    model: str
    config: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[str, int]] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    higher: dict[str, dict[str, bool]] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    routing: dict[str, dict[str, Any]] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)

    def add(self, result: Any, total: int) -> None:
        """Add a :class:`meteora_core.evaluation.runner.TaskResult`; ``total`` is the number of rows in the test split."""
        name = result.task.name
        metrics = harness_metrics(result.scores)
        self.results[name] = {"alias": name, **metrics}
        self.higher[name] = {key.split(",")[0]: True for key in metrics if "_stderr" not in key}
        self.samples[name] = {"original": total, "effective": len(result.samples)}
        self.configs[name] = {
            "task": name,
            "output_type": "generate_until",
            "metric": result.task.metric,
            "members": list(result.task.members),
            "generation_kwargs": {"do_sample": False, "max_gen_toks": result.max_new_tokens},
            "temperature": result.routing_temperature,
            "top_k": result.top_k,
        }
        self.groups[name] = list(result.task.members)
        self.counts[name] = {
            **result.scores.counts,
            "skipped_prompts": result.skipped,
            "seconds": round(result.seconds, 3),
            "new_tokens": result.new_tokens,
            "prompt_tokens": result.prompt_tokens,
        }
        self.speeds[name] = result.speed
        if result.routing is not None:
            self.routing[name] = result.routing.document()

    def document(self, seconds: float, date: float) -> dict[str, Any]:
        """The results document with lm-evaluation-harness's keys, and additional counts under ``meteora``.

        Args:
            seconds: Duration of the evaluation in seconds.
            date: Start of the evaluation in seconds since 1970.
        """
        from meteora_core.evaluation.runner import Speed

        total = Speed()
        for speed in self.speeds.values():
            total = total.plus(speed)
        return {
            "results": self.results,
            "group_subtasks": self.groups,
            "configs": self.configs,
            "versions": dict.fromkeys(self.results, 1),
            "n-shot": {name: (2 if self.groups[name] else 0) for name in self.results},
            "higher_is_better": self.higher,
            "n-samples": self.samples,
            "config": {"model": self.model, **self.config},
            "date": date,
            "start_time": date,
            "end_time": date + seconds,
            "model_name": self.model,
            "model_source": "meteora",
            "total_evaluation_time_seconds": f"{seconds:.3f}",
            "meteora": {
                "counts": self.counts,
                "speed": {**total.document(), "tasks": {name: speed.document() for name, speed in self.speeds.items()}},
                **({"routing": self.routing} if self.routing else {}),
            },
        }


def sample_rows(result: Any) -> list[dict[str, Any]]:
    """The samples of a task in lm-evaluation-harness's format."""
    rows = []
    per_row = result.scores.rows or [{}] * len(result.samples)
    for sample, values in zip(result.samples, per_row, strict=True):
        rows.append(
            {
                "doc_id": sample.doc_id,
                "doc": {"prompt": sample.row.prompt, "response": sample.row.response},
                "target": sample.row.response,
                "arguments": {"gen_args_0": {"arg_0": sample.row.prompt, "arg_1": {"do_sample": False, "max_gen_toks": result.max_new_tokens}}},
                "resps": [[sample.output]],
                "filtered_resps": [sample.response],
                "doc_hash": _hash(json.dumps({"prompt": sample.row.prompt, "response": sample.row.response}, sort_keys=True)),
                "prompt_hash": _hash(sample.row.prompt),
                "target_hash": _hash(sample.row.response),
                **values,
            }
        )
    return rows


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_results(folder: Path, document: dict[str, Any], stamp: str) -> Path:
    """Write ``results_<stamp>.json`` atomically and return its path. Raises StorageError."""
    path = folder / f"results_{stamp}.json"
    write_json(path, document)
    return path


def earlier_results(path: Path, document: dict[str, Any]) -> dict[str, Any] | None:
    """The results that an interrupted run has written, if the new results may replace them.

    Args:
        path: Results file of the run that generated the first rows.
        document: The new results document.

    Returns:
        The content of the file; None if it does not exist, differs in limit, scoring or routing, or has tasks that ``document`` lacks.
    """
    try:
        old = load_results(path)
    except DataError:
        return None
    before, after = old.get("config"), document["config"]
    same_options = isinstance(before, dict) and all(before.get(key) == after.get(key) for key in ("limit", "scoring"))
    same_routing = ("routing" in old.get("meteora", {})) == ("routing" in document["meteora"])
    return old if same_options and same_routing and old["results"].keys() <= document["results"].keys() else None


def load_results(path: Path) -> dict[str, Any]:
    """Read a results file.

    Args:
        path: A results file, or a folder whose newest results file is read.

    Raises:
        DataError: There is no such file, it is not a results file, or one of its figures is not a finite number.
    """
    if path.is_dir():
        files = sorted(path.glob("results_*.json"), key=os.path.getmtime)
        if not files:
            raise DataError(f"no results in {path}", hint="run `meteora eval --save` first")
        path = files[-1]
    document = read_json(path, error=DataError)
    if not isinstance(document, dict) or not isinstance(document.get("results"), dict):
        raise DataError(f"{path} is not a results file", hint="pass a results_*.json that `meteora eval` wrote")
    for part in ("results", "n-samples", "higher_is_better", "config"):
        if not isinstance(document.get(part, {}), dict):
            raise DataError(f"{path} is not a results file: {part!r} is not an object", hint="pass a results_*.json that `meteora eval` wrote")
    for task, values in document["results"].items():
        if not isinstance(values, dict):
            raise DataError(f"{path} is not a results file: the results of {task!r} are not an object", hint="pass a results_*.json that `meteora eval` wrote")
        for key, value in values.items():
            if "," in key and not _is_figure(value):
                raise DataError(f"{path}: {key!r} of {task!r} is {str(value)[:40]!r}, which is not a finite number", hint="run the evaluation again")
    return document


def _is_figure(value: Any) -> bool:
    """Whether the value is valid in a results file: a finite number, or N/A or an empty text for a missing one."""
    if isinstance(value, str):
        return value.strip() in ("", "N/A")
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

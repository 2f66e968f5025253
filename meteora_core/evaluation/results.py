"""Results on disk: one JSON in lm-evaluation-harness's shape, and one JSON-lines file of samples per task.

Samples are appended as rows finish, so that a run that was stopped can go on; the results file is written when all is done.
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
    """Where process ``rank`` keeps a task's finished rows until all are done."""
    return folder / f".{task}{f'.rank{rank}' if rank else ''}{PARTIAL}"


def partial_files(folder: Path, task: str) -> list[Path]:
    """The files of :func:`partial_file` that are there, of this run or of a stopped one, however many processes it had."""
    return sorted(path for path in (partial_file(folder, task), *folder.glob(f".{task}.rank*{PARTIAL}")) if path.is_file())


class SampleWriter:
    """Appends samples to a JSON-lines file, each row written at once; a torn last line of an earlier run is cut off.

    Args:
        path: The file; its folder is made when missing.
        inputs: What fixes the rows (task, data hash, model, decoding). A file that was begun with other inputs is begun anew.
        others: More files of the same kind, to read only: those of the other processes.
        stamp: Written into a file that is begun: the time that names its run's results.

    Attributes:
        done: The answers that are there already, by row.
        tokens: Their token ids.
        stamp: Of the run that began the file.

    Raises:
        StorageError: The disk is full or not writable; rows written so far are kept.
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
        self._size = self._read(path, own=True) if path.is_file() else 0
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

    def _read(self, path: Path, *, own: bool = False) -> int:
        """Load finished rows, and of the own file the stamp; return how many bytes of the file are whole lines of this run."""
        with path.open("rb") as handle:
            first = handle.readline()
            try:
                head = json.loads(first)
            except (ValueError, RecursionError):
                return 0
            if not first.endswith(b"\n") or not isinstance(head, dict) or head.get("inputs") != self._inputs:
                return 0
            if own:
                self.stamp = str(head.get("stamp") or self.stamp)
            keep = len(first)
            for raw in handle:
                if not raw.endswith(b"\n"):
                    break
                row = _finished_row(raw)
                if row is None:
                    break
                self.done[row[0]], self.tokens[row[0]] = row[1], row[2]
                keep += len(raw)
        return keep

    def _append(self, line: bytes) -> None:
        """Write a whole line, or leave the file as it was."""
        left = memoryview(line)
        try:
            while left:
                left = left[self._handle.write(left) :]
        except OSError:
            self._handle.truncate(self._size)
            raise
        self._size += len(line)

    def add(self, doc_id: int, output: str, tokens: Sequence[int] = ()) -> None:
        """Append one finished row: its place, the decoded answer and its token ids. Raises StorageError."""
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
    """A finished row's place, answer and token ids; None for a line that is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not {"doc_id", "output", "tokens"} <= row.keys():
        return None
    place, output, tokens = row["doc_id"], row["output"], row["tokens"]
    whole = isinstance(output, str) and isinstance(tokens, list) and all(type(number) is int and number >= 0 for number in (place, *tokens))
    return (place, output, tuple(tokens)) if whole else None


@dataclass
class ResultsBuilder:
    """Collects task results and gives the results document.

    Attributes:
        model: How the model is called ("meteora", "base", an adapter).
        config: What fixes the run: model, checkpoint, routing, decoding, seeds, versions.
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
        """Add a :class:`meteora_core.evaluation.runner.TaskResult`; ``total`` is the size of the test split."""
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
        """The results document, with lm-evaluation-harness's keys, and our counts under ``meteora``.

        Args:
            seconds: How long the evaluation took.
            date: When it began, in seconds since 1970.
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
    """A task's samples in lm-evaluation-harness's shape."""
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
    """The results that a stopped run has written already, if the new ones may take their place.

    Args:
        path: The file that a run wrote which began the same rows.
        document: The new results.

    Returns:
        The file's content; None when it is not there, or has other rows, scoring or routing, or tasks that ``document`` lacks.
    """
    try:
        old = load_results(path)
    except DataError:
        return None
    before, after = old.get("config"), document["config"]
    same = isinstance(before, dict) and all(before.get(key) == after.get(key) for key in ("limit", "scoring"))
    routing = ("routing" in old.get("meteora", {})) == ("routing" in document["meteora"])
    return old if same and routing and old["results"].keys() <= document["results"].keys() else None


def load_results(path: Path) -> dict[str, Any]:
    """Read a results file, or the newest one of a folder.

    Raises:
        DataError: There is none, it is not a results file, or one of its figures is not a finite number.
    """
    if path.is_dir():
        found = sorted(path.glob("results_*.json"), key=os.path.getmtime)
        if not found:
            raise DataError(f"no results in {path}", hint="run `meteora eval --save` first")
        path = found[-1]
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
    """Whether a results file may hold the value: a finite number, or a word such as N/A for none."""
    if isinstance(value, str):
        return value.strip() in ("", "N/A")
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

"""A demonstration of MeteoRA without training: scores of the starter checkpoint and its base model on real test rows, and a picture of its routing.

Results are stored, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.checkpoints.native import load_checkpoint, read_config
from meteora_core.data.rows import split_path
from meteora_core.data.userdata import task_in
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.evaluation.intervals import score_interval
from meteora_core.files import atomic_write, sha256
from meteora_core.json_files import read_json, write_json
from meteora_core.progress import SILENT, Progress, Titled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.evaluation.runner import TaskResult
    from meteora_core.model.base import BaseReference

COMPOSITE = "three_tasks"
"""Name of the dataset whose prompts ask one question of each of three tasks."""

SHOWN = ("strategyqa", "goal_step_wikihow", "question_selection", "disfl_qa", "abstract_narrative_understanding", "winowhy", "logical_deduction")
"""Tasks to show, of which the first three are taken that the checkpoint has adapters for.

They are tasks at which the base fails and the starter checkpoint gives many different answers. Its answers to disfl_qa and winowhy are mostly the most
frequent answer, and logical_deduction is at chance (notes/lab/2026-11-30-quickstart-tasks.md).
"""
MODELS = ("base", "meteora")

_ROWS_AT_ONCE = 64

_VERSION = 3
"""The version of the stored results; incremented when their content changes."""


@dataclass(frozen=True)
class StarterPlan:
    """Sizes of the run.

    Attributes:
        folder: Folder for all results.
        checkpoint: Folder of the starter checkpoint, or of another one with embedded adapters.
        test_rows: Number of test rows per single task.
        composite_rows: Number of test rows of the composite; 0 leaves it out.
        new_tokens: Maximum number of tokens in the answer to one question; 19 of 20 references of the shown tasks with short answers have at most 21.
        prompt_tokens: Maximum number of tokens in the prompt of a single task; test rows with longer prompts are passed over.
    """

    folder: Path
    checkpoint: Path
    test_rows: int = 40
    composite_rows: int = 3
    new_tokens: int = 24
    prompt_tokens: int = 256


@dataclass(frozen=True)
class RoutedAnswer:
    """An answer with the adapter of every token.

    Attributes:
        names: Names of the N adapters.
        tokens: Text of each token, the index of the adapter that most layers chose for it, and this adapter's mean weight.
    """

    names: tuple[str, ...]
    tokens: tuple[tuple[str, int, float], ...]


@dataclass
class StarterResult:
    """Results of the run.

    Attributes:
        scores: Metrics of each task and model, as ``scores[task][model]``; the models are "base" and "meteora".
        intervals: 95 % interval of each metric, as ``intervals[task][model][metric]``; None where it is not known.
        rows: Number of test rows per task.
        answer: The answer in the picture, or None if it is empty.
        pictures: Files with the routing of one prompt and its answer: an HTML page, and a PNG picture if matplotlib is installed.
        own_share: Share of the answer's tokens whose top-1 adapter is one of the prompt's tasks, averaged over all layers; None without an answer.
        checkpoint: Folder of the checkpoint.
        dtype: Data type of the model.
        why: Reason for the choice of the data type.
        seconds: Duration of each stage in this run, in seconds.
    """

    scores: dict[str, dict[str, dict[str, float]]]
    intervals: dict[str, dict[str, dict[str, tuple[float, float] | None]]]
    rows: dict[str, int]
    answer: RoutedAnswer | None
    pictures: list[Path]
    own_share: float | None
    checkpoint: Path
    dtype: str
    why: str
    seconds: dict[str, float] = field(default_factory=dict)


def starter_tasks(checkpoint: Path) -> tuple[str, ...]:
    """The single tasks to evaluate: the first three of :data:`SHOWN` that the checkpoint has adapters for. Raises CheckpointError if there are none."""
    names = {adapter["name"] for adapter in read_config(checkpoint)["adapters"]}
    tasks = tuple(task for task in SHOWN if task in names)[:3]
    if not tasks:
        raise CheckpointError(f"{checkpoint} has no adapter for any of {', '.join(SHOWN)}", hint="meteora quickstart --train makes a checkpoint that has them")
    return tasks


def run_starter(
    plan: StarterPlan,
    device: str = "auto",
    *,
    base: BaseReference | None = None,
    data_source: str = "auto",
    raw_dir: Path | None = None,
    progress: Progress = SILENT,
) -> StarterResult:
    """Run all stages (base model, data, evaluation, picture), or continue an interrupted run.

    Args:
        plan: Sizes, folder and checkpoint of the run.
        device: Device of the model: "auto", "cpu", "cuda", …
        base: Base model; None means the one that the checkpoint names.
        data_source, raw_dir: Source of the raw rows; see :func:`meteora_core.data.build.build_tasks`.
        progress: Receiver of progress reports.

    Raises:
        MeteoraError: A stage failed, for example for lack of a network or disk space, or because of another base model. Finished work is kept.
    """
    from meteora_core.model.base import BaseReference, fast_cpu_dtype, load_base, load_tokenizer, locate_base, pick_device, pick_dtype

    if plan.test_rows < 1:
        raise UsageError("no rows to evaluate", hint="choose 1 or more test rows")
    config = read_config(plan.checkpoint)
    reference = base or BaseReference(config["base"]["name"], config["base"].get("revision"))
    tasks = starter_tasks(plan.checkpoint)
    composite = plan.composite_rows > 0 and len(tasks) == 3
    shown = [*tasks, *([COMPOSITE] if composite else [])]
    target = pick_device(device)
    dtype, why = fast_cpu_dtype() if target.type == "cpu" else (pick_dtype("auto", target), f"the usual type on {target.type}")
    dtype_file = plan.folder / "dtype.json"
    if dtype_file.is_file() and target.type == "cpu":
        import torch

        saved = read_json(dtype_file)
        dtype, why = getattr(torch, saved["dtype"]), saved["why"]
    write_json(dtype_file, {"dtype": str(dtype).removeprefix("torch."), "why": why})
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def lap(stage: str) -> None:
        nonlocal began
        seconds[stage], began = round(time.monotonic() - began, 1), time.monotonic()

    locate_base(reference, progress=progress)
    lap("base model")
    data = plan.folder / "datasets"
    _build(data, tasks, composite, data_source, raw_dir, progress)
    lap("data")
    session = _Session(
        plan, data, config, dtype, lambda: (load_base(reference, dtype=dtype, device=target, progress=progress), load_tokenizer(reference)), progress
    )
    records: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in shown}
    for model in MODELS:  # one after the other: the adapters are attached once
        for task in shown:
            records[task][model] = session.score(model, task)
    lap("evaluation")
    pictures, own_share, answer = session.picture(shown[-1])
    lap("picture")
    rows = {task: len(models["meteora"]["samples"]) for task, models in records.items()}
    scores = {task: {model: record["metrics"] for model, record in models.items()} for task, models in records.items()}
    intervals = {
        task: {
            model: {metric: score_interval(metric, value, record["stderr"].get(metric), rows[task]) for metric, value in record["metrics"].items()}
            for model, record in models.items()
        }
        for task, models in records.items()
    }
    return StarterResult(scores, intervals, rows, answer, pictures, own_share, plan.checkpoint, str(dtype).removeprefix("torch."), why, seconds)


def _build(data: Path, tasks: tuple[str, ...], composite: bool, source: str, raw_dir: Path | None, progress: Progress) -> None:
    from meteora_core.data.build import BuildRequest, build_tasks
    from meteora_core.data.composite import CompositeRequest, build_composite

    missing = [task for task in tasks if not split_path(data, task, "test").is_file()]
    if missing:
        build_tasks(missing, data, BuildRequest(source, raw_dir), progress=progress)
    if composite and not split_path(data, COMPOSITE, "test").is_file():
        build_composite(data, CompositeRequest(tasks=tasks, name=COMPOSITE), progress=progress)


class _Session:
    """Computes scores and stores them. The model is loaded only if a score is missing."""

    def __init__(self, plan: StarterPlan, data: Path, config: dict[str, Any], dtype: torch.dtype, load: Any, progress: Progress) -> None:
        self.plan, self.data, self.config, self.dtype, self.load, self.progress = plan, data, config, dtype, load, progress
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def model(self, kind: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base model with the checkpoint attached for ``kind`` "meteora", else without, and its tokenizer."""
        from meteora_core.model.attach import detach
        from meteora_core.routing import find_meteora

        if self._loaded is None:
            self._loaded = self.load()
        model, tokenizer = self._loaded
        attached = find_meteora(model) is not None
        if kind == "meteora" and not attached:
            load_checkpoint(self.plan.checkpoint, model, progress=self.progress)
        elif kind == "base" and attached:
            detach(model)
        return model, tokenizer

    def score(self, kind: str, task: str) -> dict[str, Any]:
        """Metrics and samples of one model and task, read from the stored results unless something that they depend on has changed."""
        from meteora_core.evaluation.eval_plan import EvalOptions
        from meteora_core.evaluation.runner import evaluate_task
        from meteora_core.training.run_inputs import short_hash

        limit = self.plan.composite_rows if task == COMPOSITE else self.plan.test_rows
        definition = task_in(self.data, task)
        questions = max(1, len(definition.members))
        inputs = {
            "version": _VERSION,
            "kind": kind,
            "base": self.config["base"]["name"],
            "weights": self.config.get("weights_sha256") if kind == "meteora" else None,
            "data": sha256(split_path(self.data, task, "test")),
            "dtype": str(self.dtype),
            "limit": limit,
            "new_tokens": self.plan.new_tokens * questions,
            "prompt_tokens": None if task == COMPOSITE else self.plan.prompt_tokens,
        }
        file = self.plan.folder / "results" / kind / f"{task}.json"
        if file.is_file():
            cached = dict(read_json(file))
            if cached.get("inputs_hash") == short_hash(inputs):
                return cached
        model, tokenizer = self.model(kind)
        if task != COMPOSITE:
            limit = self.rows_to_read(task, tokenizer)
        size = min(_ROWS_AT_ONCE, inputs["limit"])  # prompts are short, and a decoding step for 40 rows takes less than twice as long as one for 8
        options = EvalOptions(limit=limit, batch_size=size, max_new_tokens=inputs["new_tokens"], max_prompt_tokens=inputs["prompt_tokens"])
        progress = Titled(self.progress, "MeteoRA" if kind == "meteora" else "base")
        result = evaluate_task(model, tokenizer, definition, self.data, options, progress=progress)
        scores = result.scores
        record = {"inputs": inputs, "inputs_hash": short_hash(inputs), "metrics": scores.metrics, "stderr": scores.stderr, "counts": scores.counts}
        write_json(file, {**record, "seconds": round(result.seconds, 1), "samples": _samples(result)})
        return dict(read_json(file))

    def rows_to_read(self, task: str, tokenizer: PreTrainedTokenizerBase) -> int:
        """Number of first test rows of a single task that contain the wanted number of rows with short prompts."""
        from meteora_core.data.rows import read_rows
        from meteora_core.generation.prompts import encode_prompts

        rows, wanted = read_rows(self.data, task, "test"), self.plan.test_rows
        for read, row in enumerate(rows, start=1):
            wanted -= len(encode_prompts([row.prompt], tokenizer)[0].tokens) <= self.plan.prompt_tokens
            if not wanted:
                return read
        return len(rows)

    def picture(self, task: str) -> tuple[list[Path], float | None, RoutedAnswer | None]:
        """Draw the routing of the first test row of a task and its answer.

        Returns:
            The files, the share of the answer's tokens whose top-1 adapter is one of the row's tasks, and the answer; None and None without an answer.
        """
        from meteora_core.errors import MeteoraError
        from meteora_core.evaluation.eval_plan import EvalOptions
        from meteora_core.evaluation.runner import routed
        from meteora_core.generation.prompts import encode_prompts
        from meteora_core.trace.html import to_html
        from meteora_core.trace.image import to_png
        from meteora_core.trace.picture import Role
        from meteora_core.trace.record import trace_tokens

        record = self.score("meteora", task)
        page, image, note = (self.plan.folder / name for name in ("routing.html", "routing.png", "routing.json"))
        if note.is_file() and page.is_file():
            known = read_json(note)
            if known.get("inputs_hash") == record["inputs_hash"]:
                return [path for path in (page, image) if path.is_file()], known["own_share"], _answer(known)
        sample, definition = record["samples"][0], task_in(self.data, task)
        model, tokenizer = self.model("meteora")
        prompt = encode_prompts([sample["prompt"]], tokenizer)[0].tokens
        ids = [*prompt, *sample["tokens"]]
        roles: list[Role] = ["prompt" if position < len(prompt) else "answer" for position in range(len(ids))]
        with routed(model.meteora, EvalOptions(), definition) as (routing_temperature, top_k):
            about = {"task": task, "routing": f"top-{top_k}, T = {routing_temperature:g}", "base": self.config["base"]["name"]}
            routes = trace_tokens(model, tokenizer, ids, roles, about=about)
        own_adapters = [routes.names.index(name) for name in (definition.members or (task,)) if name in routes.names]
        answer = routes.indices[len(prompt) :, :, 0]
        share = float(sum((answer == adapter).double().mean() for adapter in own_adapters)) if answer.numel() else None
        title = f"Routing of {task}, test row {sample['doc_id']}"
        with atomic_write(page) as handle:
            handle.write(to_html(routes, title))
        pictures = [page]
        try:
            data = to_png(routes, title)
        except MeteoraError as error:
            self.progress.note(f"no PNG: {error.message}")
        else:
            with atomic_write(image, "wb") as handle:
                handle.write(data)
            pictures.append(image)
        speakers, shares = routes.speakers().tolist(), routes.shares()
        tokens = [(routes.tokens[at].text, speakers[at], round(float(shares[at, speakers[at]]), 4)) for at in range(len(prompt), len(ids))]
        drawn = {"names": list(routes.names), "tokens": tokens}
        write_json(note, {"inputs_hash": record["inputs_hash"], "own_share": share, "answer": drawn})
        return pictures, share, _answer({"answer": drawn})


def _answer(note: dict[str, Any]) -> RoutedAnswer | None:
    """The answer in the note about a picture."""
    drawn = note["answer"]
    return RoutedAnswer(tuple(drawn["names"]), tuple((text, adapter, weight) for text, adapter, weight in drawn["tokens"])) if drawn["tokens"] else None


def _samples(result: TaskResult) -> list[dict[str, Any]]:
    return [
        {"doc_id": each.doc_id, "prompt": each.row.prompt, "reference": each.row.response, "response": each.response, "tokens": list(each.ids)}
        for each in result.samples
    ]


def next_commands(plan: StarterPlan) -> list[tuple[str, str]]:
    """Commands to try next, each with its purpose."""
    option = f" --checkpoint {shlex.quote(str(plan.checkpoint))}"
    data, first = shlex.quote(str(plan.folder / "datasets")), starter_tasks(plan.checkpoint)[0]
    return [
        (f"meteora chat{option}", "talk to it, and watch which adapter answers"),
        (f"meteora eval --task {first} --model base,meteora{option} --data {data} --limit 20 --debug", "answers of both, side by side"),
        ("meteora quickstart --train", "train three adapters and the gates yourself in about ten minutes"),
    ]

"""A demonstration of MeteoRA without training: scores of the starter checkpoint and its base model on real test rows, and a picture of its routing.

Results are stored, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.checkpoints.native import load_checkpoint, read_config
from meteora_core.data.rows import split_path
from meteora_core.data.tasks import COMPOSITES, get_task
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.files import atomic_write, sha256
from meteora_core.json_files import read_json, write_json
from meteora_core.progress import SILENT, Progress, Titled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.evaluation.runner import TaskResult
    from meteora_core.model.base import BaseReference

COMPOSITE = "composite_3"
MODELS = ("base", "meteora")


@dataclass(frozen=True)
class StarterPlan:
    """Sizes of the run. With the defaults it takes three minutes on two CPU cores, without downloads.

    Attributes:
        folder: Folder for all results.
        checkpoint: Folder of the starter checkpoint, or of another one with embedded adapters.
        test_rows: Number of test rows per single task.
        composite_rows: Number of test rows of the composite; 0 leaves it out.
        new_tokens: Maximum number of tokens in the answer to one question.
    """

    folder: Path
    checkpoint: Path
    test_rows: int = 12
    composite_rows: int = 4
    new_tokens: int = 40


@dataclass
class StarterResult:
    """Results of the run.

    Attributes:
        scores: Metrics of each task and model, as ``scores[task][model]``; the models are "base" and "meteora".
        rows: Number of test rows per task.
        pictures: Files with the routing of one prompt and its answer: an HTML page, and a PNG picture if matplotlib is installed.
        own_share: Share of the answer's tokens whose top-1 adapter is one of the prompt's tasks, averaged over all layers; None without an answer.
        checkpoint: Folder of the checkpoint.
        dtype: Data type of the model.
        why: Reason for the choice of the data type.
        seconds: Duration of each stage in this run, in seconds.
    """

    scores: dict[str, dict[str, dict[str, float]]]
    rows: dict[str, int]
    pictures: list[Path]
    own_share: float | None
    checkpoint: Path
    dtype: str
    why: str
    seconds: dict[str, float] = field(default_factory=dict)


def starter_tasks(checkpoint: Path) -> tuple[str, ...]:
    """The single tasks to evaluate: those of composite_3 that the checkpoint has adapters for. Raises CheckpointError if there are none."""
    names = {adapter["name"] for adapter in read_config(checkpoint)["adapters"]}
    tasks = tuple(task for task in COMPOSITES[COMPOSITE] if task in names)
    if not tasks:
        raise CheckpointError(
            f"{checkpoint} has no adapter for any of {', '.join(COMPOSITES[COMPOSITE])}", hint="meteora quickstart --train makes a checkpoint that has them"
        )
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
    composite = plan.composite_rows > 0 and len(tasks) == len(COMPOSITES[COMPOSITE])
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
    scores: dict[str, dict[str, dict[str, float]]] = {task: {} for task in shown}
    for model in MODELS:
        for task in shown:
            scores[task][model] = session.score(model, task)["metrics"]
    lap("evaluation")
    pictures, own_share = session.picture(shown[-1])
    lap("picture")
    rows = {task: len(session.score("meteora", task)["samples"]) for task in shown}
    return StarterResult(scores, rows, pictures, own_share, plan.checkpoint, str(dtype).removeprefix("torch."), why, seconds)


def _build(data: Path, tasks: tuple[str, ...], composite: bool, source: str, raw_dir: Path | None, progress: Progress) -> None:
    from meteora_core.data.build import BuildRequest, build_tasks
    from meteora_core.data.composite import CompositeRequest, build_composite

    missing = [task for task in tasks if not split_path(data, task, "test").is_file()]
    if missing:
        build_tasks(missing, data, BuildRequest(source, raw_dir), progress=progress)
    if composite and not split_path(data, COMPOSITE, "test").is_file():
        build_composite(data, CompositeRequest(n=len(tasks)), progress=progress)


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
        questions = max(1, len(get_task(task).members))
        inputs = {
            "kind": kind,
            "base": self.config["base"]["name"],
            "weights": self.config.get("weights_sha256") if kind == "meteora" else None,
            "data": sha256(split_path(self.data, task, "test")),
            "dtype": str(self.dtype),
            "limit": limit,
            "new_tokens": self.plan.new_tokens * questions,
        }
        file = self.plan.folder / "results" / kind / f"{task}.json"
        if file.is_file():
            cached = dict(read_json(file))
            if cached.get("inputs_hash") == short_hash(inputs):
                return cached
        model, tokenizer = self.model(kind)
        options = EvalOptions(limit=limit, max_new_tokens=inputs["new_tokens"])
        progress = Titled(self.progress, "MeteoRA" if kind == "meteora" else "base")
        result = evaluate_task(model, tokenizer, task, self.data, options, progress=progress)
        record = {"inputs": inputs, "inputs_hash": short_hash(inputs), "metrics": result.scores.metrics, "counts": result.scores.counts}
        write_json(file, {**record, "seconds": round(result.seconds, 1), "samples": _samples(result)})
        return dict(read_json(file))

    def picture(self, task: str) -> tuple[list[Path], float | None]:
        """Draw the routing of the first test row of a task and its answer.

        Returns:
            The files, and the share of the answer's tokens whose top-1 adapter is one of the row's tasks; None without an answer.
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
                return [path for path in (page, image) if path.is_file()], known["own_share"]
        sample, definition = record["samples"][0], get_task(task)
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
        write_json(note, {"inputs_hash": record["inputs_hash"], "own_share": share})
        return pictures, share


def _samples(result: TaskResult) -> list[dict[str, Any]]:
    return [
        {"doc_id": each.doc_id, "prompt": each.row.prompt, "reference": each.row.response, "response": each.response, "tokens": list(each.ids)}
        for each in result.samples
    ]


def next_commands(plan: StarterPlan) -> list[tuple[str, str]]:
    """Commands to try next, each with its purpose."""
    option = f" --checkpoint {plan.checkpoint}"
    return [
        (f"meteora chat{option}", "talk to it, and watch which adapter answers"),
        (f"meteora eval --task {COMPOSITE}{option} --data {plan.folder / 'datasets'} --limit 20 --debug", "more test rows, answers side by side"),
        ("meteora quickstart --train", "train three adapters and the gates yourself in about ten minutes"),
        ("meteora train --help", "your own adapters and gates"),
    ]

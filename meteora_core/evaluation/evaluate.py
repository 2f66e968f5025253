"""Evaluation of one or more models on several tasks. It can be resumed and stores its results on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.folders import check_bases
from meteora_core.data.rows import split_path
from meteora_core.data.tasks import Task, get_task
from meteora_core.errors import MeteoraError, StorageError, UsageError
from meteora_core.evaluation.adapters import check_adapter
from meteora_core.evaluation.available import check_built
from meteora_core.evaluation.eval_plan import OWN, Assigned, EvalPlan, adapter_of
from meteora_core.evaluation.fingerprint import adapter_files
from meteora_core.evaluation.model_loader import ModelLoader
from meteora_core.evaluation.processes import ALONE, Processes
from meteora_core.evaluation.results import ResultsBuilder, SampleWriter, earlier_results, partial_file, partial_files, sample_rows, write_results
from meteora_core.evaluation.router_names import router_name
from meteora_core.evaluation.runner import AllSkippedError, TaskResult, evaluate_task, test_rows
from meteora_core.files import atomic_write, locked, sha256
from meteora_core.json_files import write_jsonl
from meteora_core.names import LONGEST
from meteora_core.progress import SILENT, Progress, Titled

if TYPE_CHECKING:
    import torch


FREE_OPTIONS = ("batch_size", "scoring", "limit", "routing", "cuda_graphs", "fuse")
"""Options that do not change a row's answer. Rows of an interrupted run are reused even if these options differ."""


@dataclass
class ModelResults:
    """Results of one model on all tasks.

    Attributes:
        model: Name of the model in the plan.
        results: Result of each task, by name.
        file: Path of the results file; None if none was written.
        document: Content of the results file.
        picture: Path of the heat map of the routing; None if none was drawn.
    """

    model: str
    results: dict[str, TaskResult] = field(default_factory=dict)
    file: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None


def evaluate(
    plan: EvalPlan,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_result: Callable[[str, TaskResult], None] | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> list[ModelResults]:
    """Evaluate every model of the plan on every task.

    If all prompts of a task are too long, its result has no scores, and the other tasks are still evaluated.

    Rows are stored as they finish. If a run is interrupted, running the same plan again continues it. Models that were finished by then generate nothing; their
    results file is kept, or a new one is written if limit, scoring, tasks or routing have changed. A plan that was completed is evaluated from the beginning.

    Args:
        plan: The tasks, the models and the options.
        device: Device of the models.
        dtype: Data type of the models.
        on_result: Function called with the model's name and the result whenever a task is finished.
        progress: Receiver of progress reports.
        processes: Processes that share the rows. Each must call this function with the same plan and gets the same results. Process 0 writes the files.

    Raises:
        StorageError: The disk is full or not writable; the rows so far are kept.
        UsageError, DataError, AdapterError, CheckpointError: Something that the plan names is missing, broken or unknown. Whatever can be checked beforehand
            is reported before a model is loaded.
        AllSkippedError: The prompts of all tasks are too long for every model.
    """
    loader, pairs = prepare(plan, device, dtype, progress)
    outcomes = []
    skipped: list[AllSkippedError] = []
    for model in plan.models:
        outcome = ModelResults(model)
        began, stamp = time.time(), time.strftime("%Y-%m-%dT%H-%M-%S")
        builder = ResultsBuilder(model, loader.config(model))
        stamps = [stamp]
        for task, adapter in pairs[model]:
            if (model == OWN and adapter is None) or (model in loader.routers and not loader.routers[model].evaluates(task)):
                continue
            try:
                result, first_stamp = _one(plan, loader, model, task, adapter, stamp, progress, processes)
            except AllSkippedError as error:
                skipped.append(error)
                result, first_stamp = error.result, stamp
            stamps.append(first_stamp)
            outcome.results[task.name] = result
            builder.add(result, _rows_in(plan, task))
            if on_result is not None:
                on_result(model, result)
        outcome.document = builder.document(time.time() - began, began)
        if plan.out_dir is not None and any(result.samples for result in outcome.results.values()) and processes.rank == 0:
            _save(plan.out_dir / _safe(model), outcome, min(stamps), stamp, progress)
        outcomes.append(outcome)
    if plan.out_dir is not None and processes.rank == 0:
        for outcome in outcomes:
            for name in outcome.results:
                for file in partial_files(plan.out_dir / _safe(outcome.model), name):
                    file.unlink(missing_ok=True)
    if skipped and not any(result.samples for outcome in outcomes for result in outcome.results.values()):
        raise skipped[0]
    return outcomes


def prepare(plan: EvalPlan, device: torch.device, dtype: torch.dtype, progress: Progress = SILENT) -> tuple[ModelLoader, Assigned]:
    """Check everything that can be checked before a model is loaded.

    Args:
        plan: The tasks, the models and the options.
        device: Device of the models.
        dtype: Data type of the models.
        progress: Receiver of progress reports.

    Returns:
        The loader of the models, and the tasks of each model with their adapter folders.

    Raises:
        UsageError, DataError, AdapterError, CheckpointError: As for :func:`evaluate`.
    """
    tasks = [get_task(name) for name in dict.fromkeys(plan.tasks)]
    check_built(tasks, plan.data_dir, plan.other_data)
    for task in tasks:
        if not test_rows(plan.data_dir, task, plan.options.limit):
            raise UsageError("no rows to evaluate", hint="choose --limit 1 or more")
    if plan.options.routing and "meteora" not in plan.models:
        raise UsageError("routes can be counted only for the model meteora", hint="leave out --routing, or choose --model meteora")
    pairs = {model: [(task, adapter_of(plan, model, task)) for task in tasks] for model in plan.models}
    folders: dict[str, str] = {}
    for model in pairs:
        other = folders.setdefault(_safe(model), model)
        if other != model:
            raise UsageError(
                f"the results of {other!r} and {model!r} would be written to the same folder", hint="evaluate them one after the other, with another --out"
            )
    for model in plan.models:
        if model == OWN and all(adapter is None for _, adapter in pairs[model]):
            raise UsageError("a composite has no adapter of its own", hint="choose --model base, meteora, or an adapter's name")
    adapters = {str(adapter): adapter for assigned in pairs.values() for _, adapter in assigned if adapter is not None}
    for adapter in adapters.values():
        check_adapter(adapter)
    loader = ModelLoader(plan, device, dtype, progress)
    for model, router in loader.routers.items():
        router.prepare(tasks)
        if not any(router.evaluates(task) for task in tasks):
            raise UsageError(f"{model} is not defined for composites", hint="choose single tasks, or another model")
        adapters |= {str(folder): folder for folder in router.folders.values()}
    loader.check(plan.models)
    if note := check_bases(adapters, loader.base.name, any_base=True):
        progress.note(note)
    return loader, pairs


def _save(folder: Path, outcome: ModelResults, begun: str, now: str, progress: Progress) -> None:
    """Write samples, routing and results, in this order.

    Args:
        folder: Folder of the model's results.
        outcome: Results of the model, whose file, document and picture are set.
        begun: Time stamp of the run that generated the first rows. Its files are replaced, or kept if no rows were generated since.
        now: Time stamp of this run, used for the file names if the files of ``begun`` cannot be replaced.
        progress: Receiver of progress reports.
    """
    file = folder / f"results_{begun}.json"
    old = earlier_results(file, outcome.document)
    if old is not None and old["results"].keys() == outcome.document["results"].keys() and not outcome.document["meteora"]["speed"]["rows"]:
        picture = folder / f"routing_{begun}.png"
        outcome.file, outcome.document, outcome.picture = file, old, picture if picture.is_file() else None
        return
    stamp = now if old is None and file.exists() else begun
    routing = {name: result.routing for name, result in outcome.results.items() if result.routing is not None}
    if routing:
        from meteora_core.evaluation.routes import counts_file
        from meteora_core.evaluation.routes_plot import plot_routing

        file = folder / f"routing_{stamp}.json"
        with atomic_write(file) as handle:
            json.dump(counts_file(routing), handle)
        outcome.document["meteora"]["routing_counts"] = file.name
        try:
            outcome.picture = plot_routing(routing, folder / f"routing_{stamp}.png")
        except StorageError:
            raise
        except MeteoraError as error:
            progress.note(f"no picture of the routing: {error.message}" + (f" ({error.hint})" if error.hint else ""))
    for name, result in outcome.results.items():
        write_jsonl(folder / f"samples_{name}_{stamp}.jsonl", sample_rows(result))
    outcome.file = write_results(folder, outcome.document, stamp)


def _inputs(plan: EvalPlan, loader: ModelLoader, model: str, task: Task, adapter: Path | None) -> dict[str, Any]:
    """Everything that the answers of a model to a task depend on."""
    router = loader.routers.get(model)
    adapters = [adapter] if adapter is not None else [] if router is None else list(router.folders.values())
    options = {key: value for key, value in plan.options.document().items() if key not in FREE_OPTIONS}
    options["max_total_tokens"] = plan.options.max_total_tokens
    options["max_new_tokens"] = plan.options.max_new_tokens or task.max_new_tokens
    chosen = plan.options.routing_temperature
    options["temperature"] = task.routing_temperature if chosen is None else chosen
    return {
        "model": {key: value for key, value in loader.config(model).items() if key not in (*FREE_OPTIONS, "options", "random_seed")},
        "base": loader.base_files(),
        "adapters": [adapter_files(folder) for folder in adapters],
        "task": task.name,
        "data": sha256(split_path(plan.data_dir, task.name, "test")),
        "options": options,
    }


def _one(
    plan: EvalPlan, loader: ModelLoader, model: str, task: Task, adapter: Path | None, stamp: str, progress: Progress, processes: Processes
) -> tuple[TaskResult, str]:
    """Evaluate one task. Returns the result and the time stamp of the run that generated its first rows."""
    # All processes use the inputs of process 0, so that they agree on the finished rows even if file times of the base model differ between hosts.
    inputs = processes.gather(_inputs(plan, loader, model, task, adapter))[0]
    with ExitStack() as stack:
        writer = None
        if plan.out_dir is not None:
            folder = plan.out_dir / _safe(model)
            if processes.rank == 0:
                stack.enter_context(locked(partial_file(folder, task.name, 0)))
            writer = stack.enter_context(SampleWriter(partial_file(folder, task.name, processes.rank), inputs, partial_files(folder, task.name), stamp))
            if writer.done:
                progress.note(f"{task.name}: {len(writer.done)} rows were finished by an earlier run")
        processes.gather(None)
        loaded: Any
        if model in loader.routers or router_name(model) is not None:
            loaded, tokenizer = stack.enter_context(loader.routed(model, task, processes))
        else:
            loader.leave()
            loaded, tokenizer = stack.enter_context(loader.ready(model, adapter))
        result = evaluate_task(loaded, tokenizer, task, plan.data_dir, plan.options, kept=writer, progress=Titled(progress, model), processes=processes)
    return result, writer.stamp if writer else stamp


def _rows_in(plan: EvalPlan, task: Task) -> int:
    with split_path(plan.data_dir, task.name, "test").open("rb") as handle:
        return sum(1 for line in handle if line.strip())


def _safe(name: str) -> str:
    """Convert the name or path of a model to the name of a folder, which is never ``.`` or ``..``."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
    if len(safe) > LONGEST:
        safe = f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}_{safe[-LONGEST + 13 :]}"
    return "_" + safe if safe.strip(".") == "" else safe

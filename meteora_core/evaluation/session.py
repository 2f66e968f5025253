"""An evaluation: several tasks by one or more models, resumable, with results on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.folders import check_bases
from meteora_core.data.rows import available_tasks, split_path
from meteora_core.data.tasks import TASKS, Task, get_task
from meteora_core.errors import MeteoraError, StorageError, UsageError, did_you_mean
from meteora_core.evaluation.adapters import check_adapter, with_adapter
from meteora_core.evaluation.arrow import ARROW, ArrowRouter
from meteora_core.evaluation.available import check_built, commands_for
from meteora_core.evaluation.fingerprint import adapter_files, base_files
from meteora_core.evaluation.processes import ALONE, Processes
from meteora_core.evaluation.results import ResultsBuilder, SampleWriter, earlier_results, partial_file, partial_files, sample_rows, write_results
from meteora_core.evaluation.runner import EvalOptions, TaskResult, evaluate_task, test_rows
from meteora_core.files import atomic_write, locked, sha256
from meteora_core.json_files import write_jsonl
from meteora_core.names import LONGEST
from meteora_core.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.checkpoints.opening import CheckpointFacts
    from meteora_core.model.base import BaseReference

OWN = "own"
"""The model name that stands for each task's own adapter."""

FREE_OPTIONS = ("batch_size", "scoring", "limit", "routing", "cuda_graphs", "fuse")
"""Options that do not change a row's answer: rows of a stopped run with other values of them still count."""


@dataclass(frozen=True)
class EvalPlan:
    """What to evaluate with what.

    Attributes:
        tasks: Task names.
        models: "base", "meteora", "own" (each task's own adapter), "peft-arrow" (PEFT's Arrow routing over all adapters), or an adapter's name or folder.
        data_dir, adapters_dir: Datasets and adapters.
        other_data: Folders of datasets to name in the hint when ``data_dir`` lacks what they have.
        checkpoint: For "meteora".
        base: The base model; for "meteora" the checkpoint's own base wins.
        base_given: Whether ``base`` was chosen on purpose; a checkpoint in the authors' layout names none, and needs that.
        checkpoint_adapters: For a checkpoint in the authors' layout: the folder that names its adapters and their alphas; None: the 28 tasks, alpha 16.
        backend: Mixture kernels.
        fuse: "auto", "on" or "off": whether linears that share an input run as one (:func:`meteora_core.model.fuse.fuse_for_inference`).
        quantization: "4bit", "8bit" or None, for the base model.
        options: How to decode and score.
        out_dir: Where results go: ``<out_dir>/<model>/``; None writes nothing.
        seed: Recorded.
    """

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    data_dir: Path
    adapters_dir: Path
    checkpoint: Path
    base: BaseReference
    options: EvalOptions
    base_given: bool = True
    checkpoint_adapters: Path | None = None
    backend: str = "auto"
    fuse: Literal["auto", "on", "off"] = "auto"
    quantization: str | None = None
    out_dir: Path | None = None
    seed: int = 42
    other_data: tuple[Path, ...] = ()


@dataclass
class ModelResults:
    """All tasks of one model.

    Attributes:
        model: Its name in the plan.
        results: Per task.
        file: The results file, if one was written.
        document: Its content.
        picture: The heat-map of its routing, if one was drawn.
    """

    model: str
    results: dict[str, TaskResult] = field(default_factory=dict)
    file: Path | None = None
    document: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None


def choose_tasks(names: Sequence[str], data_dir: Path) -> tuple[str, ...]:
    """Task names, with ``all``, ``singles`` and ``composites`` standing for what is built.

    Raises:
        UsageError: An unknown name, or nothing of that kind is built.
    """
    built = available_tasks(data_dir)
    ordered = [name for name in TASKS if name in built] + [name for name in built if name not in TASKS]
    chosen: list[str] = []
    for name in names:
        if name in ("all", "singles", "composites"):
            found = [task for task in ordered if name == "all" or get_task(task).is_composite == (name == "composites")]
            if not found:
                raise UsageError(f"no {'datasets' if name == 'all' else name} are built in {data_dir}", hint=f"for example: {_first_commands(name, data_dir)}")
            chosen += found
        else:
            chosen.append(get_task(name).name)
    return tuple(dict.fromkeys(chosen))


def _first_commands(kind: str, data_dir: Path) -> str:
    """The commands that build a first dataset of a kind."""
    return commands_for([get_task("composite_3" if kind == "composites" else "strategyqa")], data_dir)


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

    Rows are kept as they finish; the same plan run again goes on where it stopped, and models that were done by then generate nothing again:
    their results file stays (or a new one is written, where limit, scoring, tasks or routing are others). A finished plan is run anew.

    Args:
        plan: What and how.
        device, dtype: Of the models.
        on_result: Called as each task of each model is done.
        progress: Where to report.
        processes: Those that share the rows; each must call this with the same plan, and gets the same results. The process 0 writes the files.

    Raises:
        StorageError: The disk is full or not writable; the rows so far are kept.
        UsageError, DataError, AdapterError, CheckpointError: Something that the plan names is missing, broken or unknown; before any model is loaded
            where that can be known.
    """
    loader, pairs = prepare(plan, device, dtype, progress)
    outcomes = []
    for model in plan.models:
        outcome = ModelResults(model)
        began, stamp = time.time(), time.strftime("%Y-%m-%dT%H-%M-%S")
        builder = ResultsBuilder(model, loader.config(model))
        stamps = [stamp]
        for task, adapter in pairs[model]:
            if model == OWN and adapter is None:
                continue
            result, begun = _one(plan, loader, model, task, adapter, stamp, progress, processes)
            stamps.append(begun)
            outcome.results[task.name] = result
            builder.add(result, _rows_in(plan, task))
            if on_result is not None:
                on_result(model, result)
        outcome.document = builder.document(time.time() - began, began)
        if plan.out_dir is not None and outcome.results and processes.rank == 0:
            _save(plan.out_dir / _safe(model), outcome, min(stamps), stamp, progress)
        outcomes.append(outcome)
    if plan.out_dir is not None and processes.rank == 0:
        for outcome in outcomes:
            for name in outcome.results:
                for file in partial_files(plan.out_dir / _safe(outcome.model), name):
                    file.unlink(missing_ok=True)
    return outcomes


def prepare(plan: EvalPlan, device: torch.device, dtype: torch.dtype, progress: Progress = SILENT) -> tuple[_Loader, dict[str, list[tuple[Task, Path | None]]]]:
    """Check all that can be checked before a model is loaded, and return what :func:`evaluate` goes on with. Raises as it does."""
    tasks = [get_task(name) for name in dict.fromkeys(plan.tasks)]
    check_built(tasks, plan.data_dir, plan.other_data)
    for task in tasks:
        if not test_rows(plan.data_dir, task, plan.options.limit):
            raise UsageError("no rows to evaluate", hint="choose --limit 1 or more")
    if plan.options.routing and "meteora" not in plan.models:
        raise UsageError("only the model meteora routes", hint="leave out --routing, or choose --model meteora")
    pairs = {model: [(task, _adapter_of(plan, model, task)) for task in tasks] for model in plan.models}
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
    alone = {str(adapter): adapter for listed in pairs.values() for _, adapter in listed if adapter is not None}
    for adapter in alone.values():
        check_adapter(adapter)
    loader = _Loader(plan, device, dtype, progress)
    if ARROW in plan.models:
        loader.arrow.prepare()
    loader.check(plan.models)
    if note := check_bases(alone | {str(folder): folder for folder in loader.arrow.folders.values()}, loader.base.name, any_base=True):
        progress.note(note)
    return loader, pairs


def _save(folder: Path, outcome: ModelResults, begun: str, now: str, progress: Progress) -> None:
    """Write samples, routing and results, in this order.

    Args:
        folder: Where to.
        outcome: What; its file, document and picture are set.
        begun: The stamp of the run that began the rows: what that run has written is replaced, or kept where nothing was generated since.
        now: This run's stamp, which names the files where those of ``begun`` cannot be replaced.
        progress: Where to report.
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


def _inputs(plan: EvalPlan, loader: _Loader, model: str, task: Task, adapter: Path | None) -> dict[str, Any]:
    """All that a row's answer depends on."""
    adapters = [adapter] if adapter is not None else list(loader.arrow.folders.values()) if model == ARROW else []
    options = {key: value for key, value in plan.options.document().items() if key not in FREE_OPTIONS}
    options["max_total_tokens"] = plan.options.max_total_tokens
    options["max_new_tokens"] = plan.options.max_new_tokens or task.max_new_tokens
    wished = plan.options.routing_temperature
    options["temperature"] = task.routing_temperature if wished is None else wished
    return {
        "model": {key: value for key, value in loader.config(model).items() if key not in (*FREE_OPTIONS, "options", "random_seed")},
        "base": loader.base_files(),
        "adapters": [adapter_files(folder) for folder in adapters],
        "task": task.name,
        "data": sha256(split_path(plan.data_dir, task.name, "test")),
        "options": options,
    }


def _one(
    plan: EvalPlan, loader: _Loader, model: str, task: Task, adapter: Path | None, stamp: str, progress: Progress, processes: Processes
) -> tuple[TaskResult, str]:
    """One task's result, and the stamp of the run that began its rows."""
    # One process's word for all: they must agree on which rows are done, even if a host's copy of the base has other times.
    inputs = processes.gather(_inputs(plan, loader, model, task, adapter))[0]
    with ExitStack() as stack:
        writer = None
        if plan.out_dir is not None:
            folder = plan.out_dir / _safe(model)
            if processes.rank == 0:
                stack.enter_context(locked(partial_file(folder, task.name, 0)))
            writer = stack.enter_context(SampleWriter(partial_file(folder, task.name, processes.rank), inputs, partial_files(folder, task.name), stamp))
            if writer.done:
                progress.note(f"{task.name}: {len(writer.done)} rows were done before")
        processes.gather(None)
        if model != ARROW:
            loader.arrow.leave()
        loaded, tokenizer = stack.enter_context(loader.routed() if model == ARROW else loader.ready(model, adapter))
        result = evaluate_task(
            loaded,
            tokenizer,
            task,
            plan.data_dir,
            plan.options,
            finished=writer.done if writer else None,
            finished_tokens=writer.tokens if writer else None,
            on_sample=(lambda sample: writer.add(sample.doc_id, sample.output, sample.ids)) if writer else None,
            title=f"{model}: {task.name}",
            progress=progress,
            processes=processes,
        )
    return result, writer.stamp if writer else stamp


def _rows_in(plan: EvalPlan, task: Task) -> int:
    with split_path(plan.data_dir, task.name, "test").open("rb") as handle:
        return sum(1 for line in handle if line.strip())


def _safe(name: str) -> str:
    """A model's name or path as the name of one folder, which is never ``.`` or ``..``."""
    shown = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
    if len(shown) > LONGEST:
        shown = f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}_{shown[-LONGEST + 13 :]}"
    return "_" + shown if shown.strip(".") == "" else shown


def _adapter_of(plan: EvalPlan, model: str, task: Task) -> Path | None:
    """The adapter folder that ``model`` means for ``task``; None for the base, MeteoRA, and a composite's own adapter."""
    if model in ("base", "meteora", ARROW):
        return None
    if model == OWN:
        if task.is_composite:
            return None
        folder = plan.adapters_dir / task.name
        if find_adapter(folder) is None:
            raise UsageError(f"no adapter for {task.name} in {plan.adapters_dir}", hint=f"meteora train --stage adapters --task {task.name}")
        return folder
    for folder in (plan.adapters_dir / model, Path(model)):
        if find_adapter(folder) is not None:
            return folder
    present = sorted(path.name for path in plan.adapters_dir.iterdir() if path.is_dir()) if plan.adapters_dir.is_dir() else []
    known = ["base", "meteora", "own", ARROW, "all", *present]
    raise UsageError(
        f"no model {model!r}: it is no adapter in {plan.adapters_dir} and no folder", hint=did_you_mean(model, known) or f"known: {', '.join(known)}"
    )


class _Loader:
    """Loads what a model name means, and keeps one base model for all of them."""

    def __init__(self, plan: EvalPlan, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
        self.plan, self.device, self.dtype, self.progress = plan, device, dtype, progress
        self.base = plan.base
        self._checkpoint: CheckpointFacts | None = None
        self._hash: str | None = None
        self._base_files: dict[str, Any] | None = None
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.arrow = ArrowRouter(plan.adapters_dir, plan.options.top_k, plan.options.routing_temperature or 1.0, plan.seed)

    def check(self, models: Sequence[str]) -> None:
        """Read the checkpoint's configuration; its base is everyone's base, so that models are comparable."""
        from meteora_core.checkpoints.opening import describe_checkpoint
        from meteora_core.model.quantized import quantized_loading

        if self.plan.quantization is not None:
            quantized_loading(self.plan.quantization, self.dtype, self.device)
        if "meteora" in models:
            facts = self._checkpoint = describe_checkpoint(self.plan.checkpoint, self.plan.checkpoint_adapters)
            own = self.plan.base
            if facts.base is None and not self.plan.base_given:
                facts.reference(None)
            if facts.base is not None and own.name != facts.base and not Path(own.name).is_dir():
                self.base = facts.reference(None, trust_remote_code=own.trust_remote_code)
            count, top_k = len(facts.adapters), self.plan.options.top_k
            if top_k is not None and not 1 <= top_k <= count:
                raise UsageError(f"top_k is {top_k}, but the checkpoint has {count} adapters", hint=f"choose --top-k between 1 and {count}")
            if facts.native:
                self._hash = facts.hash
            else:
                with self.progress.task("hashing the checkpoint"):
                    self._hash = facts.weights_hash()

    def base_files(self) -> dict[str, Any] | None:
        """What tells one state of a local base folder from another, as it was when first asked for; None for other bases."""
        if self._base_files is None:
            self._base_files = base_files(self.base)
        return self._base_files

    def config(self, model: str) -> dict[str, Any]:
        """What the results file records of the model and the run."""
        import peft
        import torch
        import transformers

        from meteora_core import __version__

        options = self.plan.options.document()
        weights = self._hash if model == "meteora" else None
        return {
            "model_args": {
                "base": self.base.name,
                "revision": self.base.revision,
                "name": model,
                "weights_sha256": self.arrow.hashes() if model == ARROW else weights,
            },
            "checkpoint": str(self.plan.checkpoint) if model == "meteora" else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "backend": self.plan.backend,
            "quantization": self.plan.quantization,
            "fuse": self.plan.fuse,
            "batch_size": options["batch_size"],
            "limit": options["limit"],
            "scoring": options["scoring"],
            "options": options,
            "random_seed": self.plan.seed,
            "versions": {"meteora": __version__, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        }

    @contextmanager
    def ready(self, model: str, adapter: Path | None) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
        """The model that the name means, within the block."""
        from meteora_core.checkpoints.native import is_changed
        from meteora_core.checkpoints.opening import attach_checkpoint
        from meteora_core.model.attach import detach
        from meteora_core.model.base import load_base, load_tokenizer
        from meteora_core.model.fuse import fuse_for_inference

        plan = self.plan
        if model != "meteora" and self._model is not None and getattr(self._model, "meteora", None) is not None:
            self._model = None if is_changed(self._model) else detach(self._model)
        if self._model is None or self._tokenizer is None:
            self._model = load_base(self.base, dtype=self.dtype, device=self.device, quantization=plan.quantization, progress=self.progress)
            self._tokenizer = self._tokenizer or load_tokenizer(self.base, progress=self.progress)
        if model == "meteora":
            assert self._checkpoint is not None
            if getattr(self._model, "meteora", None) is None:
                folders = plan.adapters_dir if self._checkpoint.native else plan.checkpoint_adapters
                attach_checkpoint(self._model, self._checkpoint, adapters_dir=folders, backend=plan.backend, progress=self.progress)
                fuse_for_inference(self._model, plan.fuse)
            yield self._model, self._tokenizer
            return
        if adapter is None:
            yield self._model, self._tokenizer
            return
        with with_adapter(self._model, adapter) as adapted:
            yield adapted, self._tokenizer

    @contextmanager
    def routed(self) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
        """The base with PEFT's Arrow routing, which stays in it until another model is asked for."""
        if self.arrow.model is None:
            with self.ready("base", None) as (base, tokenizer):
                self.arrow.enter(base, tokenizer)
        yield self.arrow.model, self.arrow.tokenizer

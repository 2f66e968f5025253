"""A complete small MeteoRA experiment: base model, three tasks, three adapters, gates, and a table that compares the models.

The result of every stage is stored, so that an interrupted run continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.data.rows import split_path
from meteora_core.data.tasks import COMPOSITES, get_task
from meteora_core.files import sha256
from meteora_core.json_files import read_json, write_json
from meteora_core.memory import release_memory
from meteora_core.progress import SILENT, Progress, Titled
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.model.base import BaseReference

TASKS = COMPOSITES["composite_3"]
COMPOSITE = "composite_3"


@dataclass(frozen=True)
class QuickstartPlan:
    """Sizes of the run. With the defaults it takes at most twelve minutes on two CPU cores.

    Attributes:
        folder: Folder for all results.
        adapter_steps: Number of optimiser steps per adapter.
        adapter_batches: Number of rows per step for each of the three tasks; smaller for tasks with longer rows.
        gate_steps: Number of optimiser steps for the gates.
        gate_batch: Number of rows per step for the gates.
        ridge_tokens: Number of tokens for the closed-form start of the gates.
        test_rows: Number of test rows per single task.
        composite_rows: Number of test rows of the composite; 0 leaves it out.
        seed: Seed of all random generators.
    """

    folder: Path
    adapter_steps: int = 40
    adapter_batches: tuple[int, int, int] = (6, 4, 12)
    gate_steps: int = 18
    gate_batch: int = 4
    ridge_tokens: int = 16_000
    test_rows: int = 48
    composite_rows: int = 8
    seed: int = 42

    def adapter_settings(self, task: str) -> AdapterTrainSettings:
        """Settings for training the adapter of ``task``: few steps with a high learning rate, with the loss on responses only."""
        return AdapterTrainSettings(
            seed=self.seed,
            max_steps=self.adapter_steps,
            batch_size=self.adapter_batches[TASKS.index(task)],
            learning_rate=2e-3,
            max_length=512,
            dropout=0.0,
            loss_on="response",
            log_steps=4,
            save_steps=8,
            log_to="none",
        )

    def gate_settings(self) -> GateTrainSettings:
        """Settings for training the gates: a closed-form start and a few steps, with half of the gate loss on answer tokens."""
        return GateTrainSettings(
            seed=self.seed,
            max_steps=self.gate_steps,
            batch_size=self.gate_batch,
            learning_rate=1e-2,
            answer_share=0.5,
            max_length=384,
            init="ridge",
            ridge_tokens=self.ridge_tokens,
            log_steps=4,
            save_steps=8,
            log_to="none",
        )


@dataclass
class QuickstartResult:
    """Results of the run.

    Attributes:
        scores: Metrics of each task and model, as ``scores[task][model]``; the models are "base", "adapter" and "meteora".
        rows: Number of test rows per task.
        held_out: Gate loss and gate accuracy on held-out rows.
        checkpoint: Folder of the checkpoint with the trained gates.
        dtype: Data type of the model.
        why: Reason for the choice of the data type.
        seconds: Duration of each stage in this run, in seconds.
    """

    scores: dict[str, dict[str, dict[str, float]]]
    rows: dict[str, int]
    held_out: dict[str, float]
    checkpoint: Path
    dtype: str
    why: str
    seconds: dict[str, float] = field(default_factory=dict)


def run_quickstart(plan: QuickstartPlan, base: BaseReference, device: str = "auto", *, progress: Progress = SILENT) -> QuickstartResult:
    """Run all stages, or continue an interrupted run.

    Args:
        plan: Sizes and folder of the run.
        base: Base model.
        device: Device of the model: "auto", "cpu", "cuda", …
        progress: Receiver of progress reports.

    Raises:
        MeteoraError: A stage failed, for example for lack of a network or disk space. Finished stages are kept.
    """
    import torch

    from meteora_core.model.base import fast_cpu_dtype, pick_device, pick_dtype

    clock = _Clock()
    target = pick_device(device)
    dtype_file = plan.folder / "dtype.json"
    if dtype_file.is_file():
        saved = read_json(dtype_file)
        dtype, why = getattr(torch, saved["dtype"]), saved["why"]
    else:
        dtype, why = fast_cpu_dtype() if target.type == "cpu" else (pick_dtype("auto", target), f"the usual type on {target.type}")
        write_json(dtype_file, {"dtype": str(dtype).removeprefix("torch."), "why": why})
    session = _Session(plan, base, target, dtype, progress)
    clock.stage("base model", session.fetch_base)
    clock.stage("data", session.build_data)
    clock.stage("adapters", session.train_adapters)
    held_out = clock.stage("gates", session.train_gates)
    scores = clock.stage("evaluation", session.evaluate)
    rows = {task: plan.composite_rows if task == COMPOSITE else plan.test_rows for task in scores}
    return QuickstartResult(scores, rows, held_out, session.checkpoint, str(dtype).removeprefix("torch."), why, clock.seconds)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        import time

        began = time.monotonic()
        outcome = work()
        self.seconds[name] = round(time.monotonic() - began, 1)
        return outcome


class _Session:
    """The stages of the run. The base model is loaded when a stage first needs it."""

    def __init__(self, plan: QuickstartPlan, base: BaseReference, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
        self.plan, self.base, self.device, self.dtype, self.progress = plan, base, device, dtype, progress
        self.data, self.adapters, self.checkpoint = plan.folder / "datasets", plan.folder / "adapters", plan.folder / "meteora"
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The base model, to which MeteoRA layers may be attached."""
        from meteora_core.model.base import load_base

        if self._model is None:
            self._model = load_base(self.base, dtype=self.dtype, device=self.device, progress=self.progress)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        from meteora_core.model.base import load_tokenizer

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base, progress=self.progress)
        return self._tokenizer

    def bare(self) -> PreTrainedModel:
        """The base model without MeteoRA layers, which are detached if necessary."""
        from meteora_core.model.attach import detach
        from meteora_core.routing import find_meteora

        if find_meteora(self.model) is not None:
            detach(self.model)
        return self.model

    def fetch_base(self) -> None:
        from meteora_core.model.base import locate_base

        locate_base(self.base, progress=self.progress)

    def build_data(self) -> None:
        from meteora_core.data.build import build_tasks
        from meteora_core.data.composite import CompositeRequest, build_composite

        missing = [task for task in TASKS if not split_path(self.data, task, "test").is_file()]
        if missing:
            build_tasks(missing, self.data, progress=self.progress)
        if self.plan.composite_rows and not split_path(self.data, COMPOSITE, "test").is_file():
            build_composite(self.data, CompositeRequest(n=len(TASKS)), progress=self.progress)

    def train_adapters(self) -> None:
        from meteora_core.training.job import TrainJob
        from meteora_core.training.single_adapter import adapter_inputs, adapter_is_current, train_adapter

        job = TrainJob(self.base, self.data, self.adapters, resume=True, progress=self.progress)
        for task in TASKS:
            settings = self.plan.adapter_settings(task)
            if adapter_is_current(self.adapters / task, adapter_inputs(job, self.dtype, task, settings)):
                continue
            train_adapter(self.bare(), self.tokenizer, task, settings, job)
            release_memory()

    def train_gates(self) -> dict[str, float]:
        from meteora_core.adapters.bank import AdapterBank
        from meteora_core.checkpoints.native import CONFIG_FILE
        from meteora_core.training.gates import gate_inputs, gates_are_current, train_gates
        from meteora_core.training.job import TrainJob

        settings, job = self.plan.gate_settings(), TrainJob(self.base, self.data, self.checkpoint, resume=True, progress=self.progress)
        bank = AdapterBank.from_peft({task: self.adapters / task for task in TASKS})
        if gates_are_current(self.checkpoint, gate_inputs(job, self.dtype, bank, settings)):
            return dict(read_json(self.checkpoint / CONFIG_FILE)["training"]["held_out"])
        trained = train_gates(self.bare(), self.tokenizer, bank, settings, job)
        release_memory()
        return trained.held_out

    def evaluate(self) -> dict[str, dict[str, dict[str, float]]]:
        tasks = [*TASKS, COMPOSITE] if self.plan.composite_rows else list(TASKS)
        scores: dict[str, dict[str, dict[str, float]]] = {task: {} for task in tasks}
        for kind in ("base", "adapter", "meteora"):
            for task in tasks:
                if kind == "adapter" and task == COMPOSITE:
                    continue
                scores[task][kind] = self._score(kind, task)
        return scores

    def _score(self, kind: str, task: str) -> dict[str, float]:
        """Metrics of one model and task, read from the stored results unless something that they depend on has changed."""
        from meteora_core.adapters.peft_folder import WEIGHTS
        from meteora_core.checkpoints.native import WEIGHT_FILE
        from meteora_core.evaluation.metrics import exact_match
        from meteora_core.training.run_inputs import short_hash

        limit = self.plan.composite_rows if task == COMPOSITE else self.plan.test_rows
        weights = {"base": None, "adapter": self.adapters / task / WEIGHTS, "meteora": self.checkpoint / WEIGHT_FILE}[kind]
        inputs = {
            "kind": kind,
            "task": task,
            "limit": limit,
            "dtype": str(self.dtype),
            "base": self.base.name,
            "data": sha256(split_path(self.data, task, "test")),
            "weights": sha256(weights) if weights else None,
            "new_tokens": _new_tokens(task),
            "metrics": 2,
        }
        file = self.plan.folder / "results" / kind / f"{task}.json"
        if file.is_file():
            cached = read_json(file)
            if cached.get("inputs_hash") == short_hash(inputs):
                return dict(cached["metrics"])
        result = self._run(kind, task, limit)
        if result.task.metric == "contains":
            exact = [exact_match(sample.response, sample.row.response, "corrected") for sample in result.samples]
            result.scores.metrics["exact"] = sum(map(bool, exact)) / len(exact)
        samples = [
            {"doc_id": sample.doc_id, "prompt": sample.row.prompt, "reference": sample.row.response, "response": sample.response} for sample in result.samples
        ]
        record = {"inputs": inputs, "inputs_hash": short_hash(inputs), "metrics": result.scores.metrics, "counts": result.scores.counts}
        write_json(file, {**record, "seconds": round(result.seconds, 1), "samples": samples})
        return result.scores.metrics

    def _run(self, kind: str, task: str, limit: int) -> Any:
        from meteora_core.checkpoints.native import load_checkpoint
        from meteora_core.evaluation.adapters import with_adapter
        from meteora_core.evaluation.eval_plan import EvalOptions
        from meteora_core.evaluation.runner import evaluate_task
        from meteora_core.routing import find_meteora

        options = EvalOptions(limit=limit, max_new_tokens=_new_tokens(task))
        progress = Titled(self.progress, {"base": "base", "adapter": "own adapter", "meteora": "MeteoRA"}[kind])
        if kind == "adapter":
            with with_adapter(self.bare(), self.adapters / task) as adapted:
                return evaluate_task(adapted, self.tokenizer, task, self.data, options, progress=progress)
        if kind == "base":
            return evaluate_task(self.bare(), self.tokenizer, task, self.data, options, progress=progress)
        if find_meteora(self.model) is None:
            load_checkpoint(self.checkpoint, self.model)
        return evaluate_task(self.model, self.tokenizer, task, self.data, options, progress=progress)


def _new_tokens(task: str) -> int:
    """Maximum number of new tokens in an answer. To save time, it is too small for the longest explanations among the references."""
    return 48 * len(get_task(task).members) if get_task(task).is_composite else 48


def next_commands(folder: Path) -> list[tuple[str, str]]:
    """Commands to try after the quickstart, each with its purpose."""
    return [
        (f"meteora chat --checkpoint {folder / 'meteora'}", "talk to it, and watch which adapter answers"),
        (f"meteora eval --task logical_deduction --checkpoint {folder / 'meteora'} --limit 50 --debug", "more test rows, answers side by side"),
        ("meteora data list", "all tasks that can be built"),
        ("meteora train --help", "your own adapters and gates"),
    ]

"""The plan of an evaluation: which tasks and models, decoded and scored how."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.config import find_adapter
from meteora_core.data.rows import available_tasks
from meteora_core.data.tasks import TASKS, Task, get_task
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.evaluation.arrow import ARROW
from meteora_core.evaluation.available import commands_for
from meteora_core.settings import EvalSettings, PathSettings, RoutingSettings

if TYPE_CHECKING:
    from meteora_core.model.base import BaseReference

OWN = "own"
"""The model name that stands for each task's own adapter."""

PAPER_TOKENS = 4096
"""Prompt and answer together, as the authors evaluate: the limit of paper scoring where no other is given."""


class EvalOptions(EvalSettings, frozen=True):
    """How tasks are run: the settings of ``[eval]``, how to route, and whether to count routes.

    Attributes:
        routing_temperature: T of the gates' softmax; None takes the task's.
        top_k: Adapters per token; None keeps the model's.
        routing: Whether to count which adapters are chosen (of a model with adapters attached).

    Example:
        >>> EvalOptions(limit=50, routing=True).batch_size
        'auto'
    """

    routing_temperature: float | None = None
    top_k: int | None = None
    routing: bool = False

    @classmethod
    def of(cls, settings: EvalSettings, routing: RoutingSettings, *, count_routes: bool = False) -> EvalOptions:
        """The options that settings name."""
        own = {"routing_temperature": routing.temperature, "top_k": routing.top_k, "routing": count_routes}
        return cls.model_validate(settings.model_dump() | own)

    @property
    def max_total_tokens(self) -> int | None:
        """The limit on tokens of prompt and answer together, besides the context: :data:`PAPER_TOKENS` for paper scoring without a limit on prompts."""
        return PAPER_TOKENS if self.scoring == "paper" and self.max_prompt_tokens is None else None

    def document(self) -> dict[str, Any]:
        """The options as results files record them, where the routing temperature is called ``temperature``; ``fuse`` and ``seed`` have their own places."""
        return {"temperature" if name == "routing_temperature" else name: value for name, value in self.model_dump(exclude={"fuse", "seed"}).items()}


Assigned = dict[str, list[tuple[Task, Path | None]]]
"""The tasks of each model of a plan, each with the adapter folder that the model's name means for it, if any."""


@dataclass(frozen=True)
class EvalPlan:
    """The tasks, the models and the options of an evaluation.

    Attributes:
        tasks: Task names.
        models: "base", "meteora", "own" (each task's own adapter), "peft-arrow" (PEFT's Arrow routing over all adapters), or an adapter's name or folder.
        data_dir, adapters_dir: Datasets and adapters.
        other_data: Folders of datasets to name in the hint when ``data_dir`` lacks what they have.
        checkpoint: For "meteora".
        base: The base model; for "meteora" the checkpoint's own base wins.
        base_given: Whether ``base`` was chosen on purpose; a checkpoint in the authors' layout names none, and needs that.
        checkpoint_adapters: For a checkpoint in the authors' layout: the folder that names its adapters and their alphas; None: the 28 tasks, alpha 16.
        backend: The mixture kernels: "auto" or a name of ``meteora_kernels.BACKENDS``.
        quantization: "4bit", "8bit" or None, for the base model.
        options: How to decode, route and score.
        out_dir: The folder of results, one folder for each model in it; None writes nothing.
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
    quantization: str | None = None
    out_dir: Path | None = None
    other_data: tuple[Path, ...] = ()


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


def _training_command(plan: EvalPlan, task: Task) -> str:
    """The command that trains a task's adapter where the plan looks for it."""
    options = {
        "adapters": plan.adapters_dir if plan.adapters_dir != PathSettings().adapters else None,
        "data": plan.data_dir if plan.data_dir != PathSettings().data else None,
        "base": plan.base.name if plan.base_given else None,
    }
    given = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    return f"meteora train adapters --task {task.name}{given}"


def adapter_of(plan: EvalPlan, model: str, task: Task) -> Path | None:
    """The adapter folder that ``model`` means for ``task``; None for the base, MeteoRA, and a composite's own adapter."""
    if model in ("base", "meteora", ARROW):
        return None
    if model == OWN:
        if task.is_composite:
            return None
        folder = plan.adapters_dir / task.name
        if find_adapter(folder) is None:
            raise UsageError(f"no adapter for {task.name} in {plan.adapters_dir}", hint=f"train it with `{_training_command(plan, task)}`")
        return folder
    for folder in (plan.adapters_dir / model, Path(model)):
        if find_adapter(folder) is not None:
            return folder
    present = sorted(path.name for path in plan.adapters_dir.iterdir() if path.is_dir()) if plan.adapters_dir.is_dir() else []
    known = ["base", "meteora", "own", ARROW, "all", *present]
    raise UsageError(
        f"no model {model!r}: it is no adapter in {plan.adapters_dir} and no folder", hint=did_you_mean(model, known) or f"known: {', '.join(known)}"
    )

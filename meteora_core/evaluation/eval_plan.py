"""The plan of an evaluation: its tasks, its models, and its options for decoding and scoring."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.config import find_adapter
from meteora_core.data.rows import available_tasks
from meteora_core.data.tasks import TASKS, Task, get_task
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.evaluation.arrow import ARROW
from meteora_core.evaluation.available import commands_for
from meteora_core.evaluation.router_models import Router
from meteora_core.evaluation.router_names import PREFIX, RouterName, router_name
from meteora_core.settings import EvalSettings, PathSettings, RoutingSettings

if TYPE_CHECKING:
    from meteora_core.model.base import BaseReference

OWN = "own"
"""Model name for each task's own adapter."""

PAPER_TOKENS = 4096
"""The authors' limit on tokens in prompt and answer together, which is the default limit of paper scoring."""


class EvalOptions(EvalSettings, frozen=True):
    """Options of an evaluation: the settings of ``[eval]``, the settings of the gates, and whether to count routes.

    Attributes:
        routing_temperature: Routing temperature; None means the task's.
        top_k: Number of adapters per token; None means the model's.
        routing: Whether to count the chosen adapters, which needs a model with adapters attached.

    Example:
        >>> EvalOptions(limit=50, routing=True).batch_size
        'auto'
    """

    routing_temperature: float | None = None
    top_k: int | None = None
    routing: bool = False

    @classmethod
    def of(cls, settings: EvalSettings, routing: RoutingSettings, *, count_routes: bool = False) -> EvalOptions:
        """Combine the settings of the evaluation and of the routing."""
        added = {"routing_temperature": routing.temperature, "top_k": routing.top_k, "routing": count_routes}
        return cls.model_validate(settings.model_dump() | added)

    @property
    def max_total_tokens(self) -> int | None:
        """Maximum number of tokens in prompt and answer together, or None if only the model's context limits it.

        It is :data:`PAPER_TOKENS` for paper scoring, unless there is a limit on prompts.
        """
        return PAPER_TOKENS if self.scoring == "paper" and self.max_prompt_tokens is None else None

    def document(self) -> dict[str, Any]:
        """The options as results files record them: the routing temperature is called ``temperature``, and ``fuse`` and ``seed`` are recorded elsewhere."""
        return {"temperature" if name == "routing_temperature" else name: value for name, value in self.model_dump(exclude={"fuse", "seed"}).items()}


Assigned = dict[str, list[tuple[Task, Path | None]]]
"""The tasks of each model in a plan, each with the folder of the adapter that the model uses for it, or None."""


@dataclass(frozen=True)
class EvalPlan:
    """The tasks, the models and the options of an evaluation.

    Attributes:
        tasks: Names of the tasks.
        models: Names of the models: "base", "meteora", "own" (each task's own adapter), "peft-arrow" (PEFT's Arrow routing over all adapters),
            "router:NAME" (see :mod:`meteora_core.evaluation.router_names`), or the name or folder of an adapter.
        data_dir: Folder of all datasets.
        adapters_dir: Folder of all adapters.
        checkpoint: Checkpoint of the model "meteora".
        base: Base model. If "meteora" is evaluated, the base model that the checkpoint names is used instead, unless ``base`` is a local folder.
        options: Options for decoding, routing and scoring.
        base_given: Whether the user chose ``base``, which a checkpoint in the authors' layout requires because it names no base model.
        checkpoint_adapters: Folder of the adapters whose names and alphas a checkpoint in the authors' layout uses; None means the 28 tasks with alpha 16.
        backend: Backend of the sum over adapters: "auto" or one of ``meteora_kernels.BACKENDS``.
        quantization: Quantisation of the base model: "4bit", "8bit" or None.
        out_dir: Folder for the results, with one folder per model; None writes no files.
        other_data: Other folders of datasets, which the hint suggests if ``data_dir`` lacks rows that they have.
        make_router: Function that makes the routers of the models "router:NAME": :func:`meteora_core.routers.make_router`.
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
    make_router: Callable[[RouterName, EvalPlan], Router] | None = None


def choose_tasks(names: Sequence[str], data_dir: Path) -> tuple[str, ...]:
    """Expand ``all``, ``singles`` and ``composites`` into the names of the tasks that are built, and check all other names.

    Args:
        names: Names of tasks, or any of the three words.
        data_dir: Folder of all datasets.

    Raises:
        UsageError: A name is unknown, or no datasets of that kind are built.
    """
    built = available_tasks(data_dir)
    ordered = [name for name in TASKS if name in built] + [name for name in built if name not in TASKS]
    chosen: list[str] = []
    for name in names:
        if name in ("all", "singles", "composites"):
            matching = [task for task in ordered if name == "all" or get_task(task).is_composite == (name == "composites")]
            if not matching:
                raise UsageError(f"no {'datasets' if name == 'all' else name} are built in {data_dir}", hint=f"for example: {_first_commands(name, data_dir)}")
            chosen += matching
        else:
            chosen.append(get_task(name).name)
    return tuple(dict.fromkeys(chosen))


def _first_commands(kind: str, data_dir: Path) -> str:
    """The commands that build one dataset of a kind, as an example."""
    return commands_for([get_task("composite_3" if kind == "composites" else "strategyqa")], data_dir)


def _training_command(plan: EvalPlan, task: Task) -> str:
    """The command that trains the adapter of a task in the folder where the plan expects it."""
    options = {
        "adapters": plan.adapters_dir if plan.adapters_dir != PathSettings().adapters else None,
        "data": plan.data_dir if plan.data_dir != PathSettings().data else None,
        "base": plan.base.name if plan.base_given else None,
    }
    given = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    return f"meteora train adapters --task {task.name}{given}"


def adapter_of(plan: EvalPlan, model: str, task: Task) -> Path | None:
    """Folder of the adapter that ``model`` uses for ``task``; None for the base model, MeteoRA, routers, and a composite's own adapter.

    Raises:
        UsageError: The adapter or the model does not exist.
    """
    if model in ("base", "meteora", ARROW) or router_name(model) is not None:
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
    known = ["base", "meteora", "own", ARROW, f"{PREFIX}NAME", "all", *present]
    raise UsageError(
        f"no model {model!r}: it is neither an adapter in {plan.adapters_dir} nor a folder",
        hint=did_you_mean(model, known) or f"the models are: {', '.join(known)}",
    )

"""The base class of routers: all adapters of a folder in one base model, optionally without the adapter of the task that is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.stack import Stack
from meteora_core.data.rows import build_commands, split_path
from meteora_core.data.tasks import Task
from meteora_core.errors import DataError
from meteora_core.evaluation.arrow import arrow_top_k, checked_folders, fewest_left, hashes_of
from meteora_core.evaluation.eval_plan import EvalPlan
from meteora_core.evaluation.processes import Processes
from meteora_core.evaluation.router_models import RoutedModel, together
from meteora_core.evaluation.router_names import RouterName
from meteora_core.files import sha256
from meteora_core.generation.prompts import Prompt
from meteora_core.progress import Progress
from meteora_core.routers.linear import Choice, Scorer, install, wrap_routed
from meteora_core.text import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class FolderRouter:
    """A router over all adapters of a folder. Subclasses either score the adapters for each token, or divide prompts into groups with fixed weights.

    Args:
        name: Name of the router.
        plan: The evaluation, with the folders of adapters and training rows.

    Attributes:
        default_top_k: Number of adapters per token unless the plan sets it.
        needs_rows: Whether the router requires training rows of every adapter's task.
        folders: The folders of the adapters, by name.
        names: The names of the adapters, in order.
        seed: The seed of the router.
        choice: The routing in the model; None unless the adapters are in a model.
    """

    default_top_k = 1
    needs_rows = False

    def __init__(self, name: RouterName, plan: EvalPlan) -> None:
        self.name, self.plan = name, plan
        self.seed = plan.options.seed if name.seed is None else name.seed
        self.temperature = plan.options.routing_temperature or 1.0
        self.folders: dict[str, Path] = {}
        self.names: tuple[str, ...] = ()
        self.choice: Choice | None = None
        self._model: Any = None
        self._remove: Callable[[], None] | None = None
        self._hashes: dict[str, str] = {}
        self._rows: dict[str, str] = {}

    @property
    def top_k(self) -> int:
        """Number of adapters per token and layer."""
        return self.plan.options.top_k or min(self.default_top_k, len(self.names))

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Find and check the adapters, and the training rows if they are needed. Raises AdapterError, DataError or UsageError."""
        self.folders = checked_folders(self.plan.adapters_dir)
        self.names = tuple(self.folders)
        arrow_top_k(self.plan.options.top_k, fewest_left(self.name, tasks, self.names))
        self._hashes = hashes_of(self.folders)
        if self.needs_rows:
            files = {name: split_path(self.plan.data_dir, name, "train") for name in self.names}
            if missing := [name for name, file in files.items() if not file.is_file()]:
                raise DataError(
                    f"{self.name} needs training rows of every adapter's task, and {self.plan.data_dir} has none of {listed(missing)}",
                    hint=f"run {', then '.join(f'`{command}`' for command in build_commands(missing, self.plan.data_dir))}",
                )
            self._rows = {name: sha256(file) for name, file in files.items()}

    def evaluates(self, task: Task) -> bool:
        """Whether the router is defined for a task."""
        return True

    def parameters(self) -> dict[str, Any]:
        """The parameters of the method, for :meth:`facts`."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Everything on which the router's choices depend, as plain values."""
        return {
            "method": self.name.name,
            "without_asked": self.name.without_asked,
            "seed": self.seed,
            **self.parameters(),
            "adapters": self._hashes,
            **({"rows": self._rows} if self.needs_rows else {}),
        }

    def enter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Prepare the router, and put the adapters into a base model. Raises AdapterError."""
        self.make(model, tokenizer, progress, processes)
        choice = Choice(len(self.names), self.top_k, self.temperature, next(model.parameters()).device)
        self._remove = install(model, AdapterBank.from_peft(self.folders), wrap_routed(choice, self.scorer))
        self._model, self.choice = model, choice

    def make(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Compute what the router needs from the base model without adapters."""

    def scorer(self, path: str, stack: Stack) -> Scorer | None:
        """The scores of the adapters in a layer; None for fixed weights."""
        return None

    def groups(self, task: Task, allowed: Sequence[int], prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        """Divide the prompts of a task into groups, and set the fixed weights of a group before it is yielded.

        Args:
            task: The task.
            allowed: Indices of the adapters that may be chosen.
            prompts: Prompts of the task.
        """
        return together(prompts)

    @contextmanager
    def ready(self, task: Task) -> Iterator[RoutedModel]:
        """Context manager that yields the model with the routing for a task."""
        assert self.choice is not None
        removed = self.name.removed(task, self.names)
        allowed = [index for index, name in enumerate(self.names) if name not in removed]
        self.choice.allow(allowed)
        yield RoutedModel(self._model, lambda prompts: self.groups(task, allowed, prompts))

    def leave(self) -> None:
        """Restore the base model, if the adapters are in one."""
        if self._remove is not None:
            self._remove()
        self._model = self._remove = self.choice = None

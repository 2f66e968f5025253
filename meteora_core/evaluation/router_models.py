"""What an evaluation needs of a router: checks before a model is loaded, and the base model with the router's choices in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from meteora_core.data.tasks import Task
from meteora_core.evaluation.processes import Processes
from meteora_core.generation.prompts import Prompt
from meteora_core.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def together(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """All prompts in one group, for a router that chooses adapters inside the model."""
    if prompts:
        yield prompts


@dataclass(frozen=True)
class RoutedModel:
    """A model whose routing may change from one group of prompts to the next.

    Attributes:
        model: The causal language model.
        groups: A function that divides prompts into groups. It sets the routing of a group in the model before it yields the group.
    """

    model: Any
    groups: Callable[[Sequence[Prompt]], Iterator[Sequence[Prompt]]] = together


class Router(Protocol):
    """A routing method over a folder of adapters.

    Attributes:
        folders: The folders of the adapters, by name, after :meth:`prepare`.
    """

    folders: dict[str, Path]

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Check everything that needs no model. Raises UsageError, DataError or AdapterError."""

    def evaluates(self, task: Task) -> bool:
        """Whether the router is defined for a task."""

    def facts(self) -> dict[str, Any]:
        """Everything that the router's choices depend on, as plain values: parameters, seed, and hashes of adapters and training rows."""

    def enter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Put the adapters into a base model, and make the router if it needs training rows. Raises AdapterError."""

    def ready(self, task: Task) -> AbstractContextManager[RoutedModel]:
        """Context manager that yields the model with the routing for a task."""

    def leave(self) -> None:
        """Restore the base model, if the adapters are in one."""

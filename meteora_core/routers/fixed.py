"""Routers that give every layer the same fixed weights: the oracle, the mean of all adapters, and one adapter at random for each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from meteora_core.data.tasks import Task
from meteora_core.evaluation.router_models import together
from meteora_core.generation.prompts import Prompt
from meteora_core.routers.folder import FolderRouter


class Oracle(FolderRouter):
    """The adapter of the row's task with weight 1. Composites, which have no adapter of their own, and tasks without an adapter are left out."""

    def evaluates(self, task: Task) -> bool:
        """Whether the folder contains an adapter with the task's name."""
        return task.name in self.names

    def groups(self, task: Task, allowed: Sequence[int], prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        """All prompts, with the task's adapter."""
        assert self.choice is not None
        self.choice.only(self.names.index(task.name))
        return together(prompts)


class Uniform(FolderRouter):
    """The mean of all adapters: ``y = W x + (1 / N) sum_i s_i B_i A_i x``.

    It equals PEFT's ``add_weighted_adapter`` with weights 1 / N and ``combination_type="cat"``: the uniform merge that serves as a baseline for libraries of
    adapters (as in Ostapenko et al., arXiv 2405.11157).
    """

    def groups(self, task: Task, allowed: Sequence[int], prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        """All prompts, with equal weights for the adapters that are allowed."""
        assert self.choice is not None
        weights = torch.zeros(len(self.names))
        weights[list(allowed)] = 1 / len(allowed)
        self.choice.fix(weights)
        return together(prompts)


class Random(FolderRouter):
    """One adapter for each prompt, drawn uniformly. The draw depends only on the seed, the task and the row, not on batches or processes."""

    def groups(self, task: Task, allowed: Sequence[int], prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        """For each adapter, the prompts for which it was drawn."""
        drawn: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            drawn.setdefault(allowed[draw(self.seed, task.name, prompt.index) % len(allowed)], []).append(prompt)
        return one_adapter_each(self, drawn)


def draw(seed: int, task: str, row: int) -> int:
    """A pseudo-random 64-bit number for a row of a task."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{task}:{row}".encode()).digest()[:8], "big")


def one_adapter_each(router: FolderRouter, groups: dict[int, list[Prompt]]) -> Iterator[Sequence[Prompt]]:
    """For each adapter, set its weight to 1 and yield its prompts."""
    assert router.choice is not None
    for adapter, prompts in sorted(groups.items()):
        router.choice.only(adapter)
        yield prompts

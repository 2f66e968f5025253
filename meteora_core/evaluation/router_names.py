"""The names of the routers that `meteora eval --model router:NAME` compares."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from meteora_core.data.tasks import Task
from meteora_core.errors import UsageError, did_you_mean

PREFIX = "router:"
WITHOUT_ASKED = "without-asked"

ROUTERS: dict[str, str] = {
    "oracle": "the adapter of the row's task, which a router cannot know",
    "meteora": "the gates of a checkpoint, top-k per token and layer",
    "closed-form": "gates in closed form on training rows, without training",
    "arrow": "PEFT's Arrow, from the adapters' leading singular vectors",
    "spectr": "SpectR, by the norm of each adapter's update of the token",
    "phatgoose": "PHATGOOSE, a gate per adapter that was trained with this adapter alone",
    "centroid": "one adapter per prompt: the nearest centroid of the prompts' hidden states",
    "uniform": "the mean of all adapters",
    "random": "one adapter per prompt, at random",
}
"""The routers by name, each with a one-line description."""

SEEDED = frozenset({"closed-form", "arrow", "phatgoose", "centroid", "random"})
"""Routers that depend on a seed: by the rows that they are made from, a starting vector, or a random choice."""

CHOOSES_TOP_K = frozenset({"meteora", "closed-form", "arrow", "spectr", "phatgoose"})
"""Routers that mix the top-k adapters of each token, by a softmax with a routing temperature."""


@dataclass(frozen=True)
class RouterName:
    """The name of a router in an evaluation, ``router:NAME``, ``router:NAME:without-asked`` or ``router:NAME:without-asked@SEED``.

    Attributes:
        name: One of :data:`ROUTERS`.
        without_asked: Whether the adapters of the task that is asked are removed.
        seed: The seed; None means the seed of the evaluation.

    Example:
        >>> RouterName.parse("router:random:without-asked@7")
        RouterName(name='random', without_asked=True, seed=7)
        >>> str(RouterName("spectr"))
        'router:spectr'
    """

    name: str
    without_asked: bool = False
    seed: int | None = None

    @classmethod
    def parse(cls, text: str) -> RouterName:
        """Read a router's name. Raises UsageError for an unknown name, a seed that is no number, and an oracle without the adapter that defines it."""
        parts = re.fullmatch(rf"{PREFIX}([^:@]*)(:{WITHOUT_ASKED})?(?:@([0-9]{{1,9}}))?", text)
        name = parts.group(1) if parts else text.removeprefix(PREFIX).partition(":")[0].partition("@")[0]
        if name not in ROUTERS:
            hint = did_you_mean(name, ROUTERS) or f"routers: {', '.join(PREFIX + known for known in ROUTERS)}"
            raise UsageError(f"no router named {name!r}", hint=hint)
        if parts is None:
            raise UsageError(f"{text!r} is not a router", hint=f"write {PREFIX}{name}, {PREFIX}{name}:{WITHOUT_ASKED} or {PREFIX}{name}@SEED")
        if parts.group(3) and name not in SEEDED:
            raise UsageError(f"{PREFIX}{name} does not depend on a seed", hint=f"leave out @{parts.group(3)}")
        router = cls(name, parts.group(2) is not None, int(parts.group(3)) if parts.group(3) else None)
        if router.without_asked and name == "oracle":
            raise UsageError("the oracle is the asked task's adapter, which cannot be removed", hint=f"leave out :{WITHOUT_ASKED}")
        return router

    @property
    def without_seed(self) -> RouterName:
        """The same router without its seed."""
        return replace(self, seed=None)

    def removed(self, task: Task, names: Iterable[str]) -> tuple[str, ...]:
        """The adapters that are removed for a task: its own, and for a composite those of its members; none unless ``without_asked``."""
        asked = task.members or (task.name,)
        return tuple(name for name in names if self.without_asked and name in asked)

    def __str__(self) -> str:
        return PREFIX + self.name + (f":{WITHOUT_ASKED}" if self.without_asked else "") + ("" if self.seed is None else f"@{self.seed}")


def router_name(model: str) -> RouterName | None:
    """The router that the name of a model names; None for other models. Raises UsageError if the name begins as a router's but is none."""
    return RouterName.parse(model) if model.startswith(PREFIX) else None


def is_meteora(model: str) -> bool:
    """Whether a model is a checkpoint with its own gates: ``meteora``, or the router of this name."""
    router = router_name(model)
    return model == "meteora" or (router is not None and router.name == "meteora")


def expand_routers(models: Sequence[str], *, without_asked: bool = False, seeds: Sequence[int] = ()) -> tuple[str, ...]:
    """The models of an evaluation, with each router once per seed and without the asked task's adapter if so wanted.

    Args:
        models: Names of models; those that are no routers are returned as they are.
        without_asked: Whether to remove the asked task's adapter from all routers but the oracle.
        seeds: Seeds for the routers that depend on one and name none; empty means the seed of the evaluation.

    Raises:
        UsageError: A router is unknown.

    Example:
        >>> expand_routers(["base", "router:oracle", "router:random"], without_asked=True, seeds=(1, 2))
        ('base', 'router:oracle', 'router:random:without-asked@1', 'router:random:without-asked@2')
    """
    expanded: list[str] = []
    for model in models:
        router = router_name(model)
        if router is None:
            expanded.append(model)
            continue
        if without_asked and router.name != "oracle":
            router = replace(router, without_asked=True)
        chosen = seeds if seeds and router.name in SEEDED and router.seed is None else (router.seed,)
        expanded += [str(replace(router, seed=seed)) for seed in chosen]
    return tuple(dict.fromkeys(expanded))

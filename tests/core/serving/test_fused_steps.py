"""Fused groups compute steps in which requests have different options or report routes, and the results are those of the separate layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from meteora_core import fuse
from meteora_core.chat.chat_model import ChatModel
from meteora_core.fused.feeders import release
from meteora_core.fused.group import FusedGroup
from meteora_core.routing import RoutingOptions
from meteora_core.serving.jobs import Chosen, JobEvent
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits
from support.chat_world import NAMES
from support.plain_groups import use_plain_groups
from support.serving import drive, job_of, tokens_of

PLAIN = RoutingOptions(2, 1.0)
MIXED = [
    PLAIN,
    RoutingOptions(forced=NAMES[1]),
    RoutingOptions(1, 0.5),
    RoutingOptions(3, 15.0, muted=frozenset([NAMES[0]])),
    RoutingOptions(enabled=False),
    RoutingOptions(2, 1.0, muted=frozenset([NAMES[2]])),
]
MIX = RoutingOptions(weights={NAMES[0]: 0.75, NAMES[2]: 0.5})
TEXTS = [[7 + 3 * index, 90, 12 + index][: 1 + index % 3] * (1 + index) for index in range(6)]


@pytest.fixture
def model(fresh_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model with fused groups: by the kernels on a GPU, and in plain PyTorch on a CPU. ``ran`` holds the members of each group that ran."""
    chat = fresh_model
    if torch.cuda.is_available():
        chat.model.cuda()
        ran: list[int] = []
        run = FusedGroup._run
        monkeypatch.setattr(FusedGroup, "_run", lambda self, x: (ran.append(len(self.layers)), run(self, x))[1])
    else:
        ran = use_plain_groups(monkeypatch)
    chat.model.ran = ran
    return chat


def answers(chat: ChatModel, options: Sequence[RoutingOptions], *, fixed: bool, routes: str = "none") -> list[list[JobEvent]]:
    """The events of one request for each of the options, all at the same time."""
    limits = SchedulerLimits(max_batch=8, prefix_bytes=0, fixed_steps=fixed, sample_routes=10**9)
    pairs = [job_of(ids, routing, routes, max_new_tokens=4) for ids, routing in zip(TEXTS, options, strict=False)]
    drive(Scheduler(chat.model, chat.tokenizer, limits), [job for job, _ in pairs])
    return [events for _, events in pairs]


def routes_of(events: Sequence[JobEvent]) -> list[dict[str, list[tuple[int, float]]]]:
    """For each token and layer, the adapters that have a weight."""
    found = []
    for event in events:
        if isinstance(event, Chosen):
            kept = event.routes
            assert kept is not None
            assert kept.indices is not None
            assert kept.weights is not None
            layers = zip(kept.paths, kept.indices.tolist(), kept.weights.tolist(), strict=True)
            found.append({path: [(index, round(weight, 4)) for index, weight in zip(*each, strict=True) if weight] for path, *each in layers})
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("options", [MIXED, [RoutingOptions(forced=NAMES[0])] * 6, [PLAIN] * 6], ids=["mixed", "forced", "same"])
def test_answers_and_routes_are_those_of_separate_layers(model: ChatModel, options: list[RoutingOptions], fixed: bool) -> None:
    expected = answers(model, options, fixed=fixed, routes="layers")
    assert fuse(model.model) > 0
    release(model.model)
    for routes in ("layers", "none"):
        model.model.ran.clear()
        found = answers(model, options, fixed=fixed, routes=routes)
        assert model.model.ran
        for one, other in zip(found, expected, strict=True):
            assert tokens_of(one) == tokens_of(other)
            if routes == "layers":
                assert routes_of(one) == routes_of(other)


def test_a_static_mix_runs_in_separate_layers(model: ChatModel) -> None:
    expected = answers(model, [PLAIN, MIX], fixed=True)
    fuse(model.model)
    release(model.model)
    found = answers(model, [PLAIN, MIX], fixed=True)
    assert not model.model.ran
    assert [tokens_of(events) for events in found] == [tokens_of(events) for events in expected]
    answers(model, [PLAIN, PLAIN], fixed=True)
    assert model.model.ran

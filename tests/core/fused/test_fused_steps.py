"""Fused groups compute steps in which requests have different options or report routes, and the results are those of the separate layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from meteora_core import AdapterBank, attach, fuse
from meteora_core.fused.feeders import release
from meteora_core.fused.group import FusedGroup
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import RoutingOptions
from meteora_core.serving.jobs import Chosen, JobEvent
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits
from support.plain_groups import use_plain_groups
from support.serving import drive, job_of, tokens_of
from support.tiny_models import make_tiny_llama

NAMES = ("one", "two", "three")
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
TEXTS = [[7 + 3 * index, 60, 12 + index][: 1 + index % 3] * (1 + index) for index in range(6)]


@pytest.fixture
def model(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny Llama with adapters on all linears. Its fused groups run by the kernels on a GPU, and in plain PyTorch on a CPU; ``ran`` fills with them."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    bank = AdapterBank.from_peft({name: make_adapter(name, seed, r=4, target_modules=names) for seed, name in enumerate(NAMES)})
    attached: Any = attach(make_tiny_llama(initializer_range=0.3), bank)
    with torch.no_grad():
        for _, layer in meteora_layers(attached):
            layer.gate.mul_(30)
    if torch.cuda.is_available():
        attached.cuda()
        ran: list[int] = []
        run = FusedGroup._run
        monkeypatch.setattr(FusedGroup, "_run", lambda self, x: (ran.append(len(self.layers)), run(self, x))[1])
    else:
        ran = use_plain_groups(monkeypatch)
    attached.ran = ran
    return attached


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"t{index}": index for index in range(64)}, unk_token="t0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="t2")


def answers(model: Any, options: Sequence[RoutingOptions], *, fixed: bool, routes: str = "none") -> list[list[JobEvent]]:
    """The events of one request for each of the options, all at the same time."""
    limits = SchedulerLimits(max_batch=8, prefix_bytes=0, fixed_steps=fixed, sample_routes=10**9)
    pairs = [job_of(ids, routing, routes, max_new_tokens=4) for ids, routing in zip(TEXTS, options, strict=False)]
    drive(Scheduler(model, tokenizer(), limits), [job for job, _ in pairs])
    return [events for _, events in pairs]


def weights_of(events: Sequence[JobEvent]) -> Tensor:
    """The weight of every adapter for each token and layer (tokens, layers, N)."""
    found = []
    for event in events:
        if isinstance(event, Chosen):
            assert event.routes is not None
            assert event.routes.indices is not None
            assert event.routes.weights is not None
            assert len(event.routes.paths) == 14
            found.append(torch.zeros(14, len(NAMES)).scatter_add(1, event.routes.indices, event.routes.weights))
            torch.testing.assert_close(event.routes.mean, found[-1].mean(0), rtol=0, atol=1e-5)
    return torch.stack(found)


@pytest.mark.gpu
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("options", [MIXED, [*MIXED[:5], MIX], [RoutingOptions(forced=NAMES[0])] * 6, [PLAIN] * 6], ids=["mixed", "static", "forced", "same"])
def test_answers_and_routes_are_those_of_separate_layers(model: Any, options: list[RoutingOptions], fixed: bool) -> None:
    expected = answers(model, options, fixed=fixed, routes="layers")
    assert fuse(model) > 0
    release(model)
    for routes in ("layers", "none"):
        model.ran.clear()
        found = answers(model, options, fixed=fixed, routes=routes)
        assert model.ran
        for one, other in zip(found, expected, strict=True):
            assert tokens_of(one) == tokens_of(other)
            if routes == "layers":
                torch.testing.assert_close(weights_of(one), weights_of(other), rtol=0, atol=1e-3)

"""Requests for the tests of the server, and answers without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch

from meteora_core.routing import RoutingOptions
from meteora_core.serving.jobs import Chosen, Job, JobEvent
from meteora_core.serving.options import SamplingOptions
from meteora_core.serving.packed import packed_attention
from meteora_core.serving.scheduler import Scheduler


def drive(scheduler: Scheduler, jobs: Sequence[Job]) -> None:
    """Answer jobs in this thread."""
    for job in jobs:
        scheduler.submit(job)
    with packed_attention(scheduler.model):
        while sum(scheduler.load):
            scheduler.step()


def job_of(ids: Sequence[int], routing: RoutingOptions, routes: Any = "none", **sampling: Any) -> tuple[Job, list[JobEvent]]:
    """A job, and the list that its events go to."""
    events: list[JobEvent] = []
    return Job(list(ids), SamplingOptions(**{"max_new_tokens": 12, "ignore_end": True, **sampling}), routing, events.append, routes), events


def tokens_of(events: Sequence[JobEvent]) -> list[int]:
    """The tokens of an answer."""
    return [event.id for event in events if isinstance(event, Chosen)]


def mixed_options(names: Sequence[str], count: int, seed: int = 0) -> list[RoutingOptions]:
    """Routing options of every kind."""
    draw = random.Random(seed)
    options = []
    for index in range(count):
        top_k, temperature = draw.randint(1, len(names)), draw.choice([0.5, 1.0, 15.0])
        kind = index % 5
        if kind == 0:
            options.append(RoutingOptions(top_k, temperature))
        elif kind == 1:
            options.append(RoutingOptions(top_k, temperature, forced=draw.choice(names)))
        elif kind == 2:
            options.append(RoutingOptions(top_k, temperature, muted=frozenset([draw.choice(names)])))
        elif kind == 3:
            options.append(RoutingOptions(enabled=False))
        else:
            options.append(RoutingOptions(weights={names[0]: 0.75, names[-1]: 0.5}))
    return options


def alone(model: Any, ids: Sequence[int], options: RoutingOptions, count: int) -> list[int]:
    """The greedy answer of ``count`` tokens, each by a forward pass over the whole text, without a cache."""
    state, text = model.meteora, list(ids)
    before = state.routing
    with ExitStack() as stack, torch.inference_mode():
        if not options.enabled:
            stack.enter_context(state.disabled())
        elif options.forced is not None:
            stack.enter_context(state.force(options.forced))
        elif not options.weights:
            state.top_k, state.temperature = options.top_k, options.temperature
            state.mute(options.muted)
        with static_mixture(model, options) if options.weights else nullcontext():
            for _ in range(count):
                text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        state.routing = before
    return text[len(ids) :]


def static_mixture(model: Any, options: RoutingOptions) -> Any:
    """A context in which every layer adds the adapters of ``options.weights`` by plain matrix products."""
    from meteora_core.model.attach import meteora_layers

    stack = ExitStack()
    stack.enter_context(model.meteora.disabled())
    names = model.meteora.names
    for _, layer in meteora_layers(model):

        def add(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            x = arguments[0]
            for name, weight in options.weights.items():
                at = names.index(name)
                rows = slice(int(module.offsets[at]), int(module.offsets[at + 1]))
                output = output + weight * float(module.scaling[at]) * ((x @ module.lora_A[rows].t()) @ module.lora_B[rows])
            return output

        handle = layer.register_forward_hook(add)
        stack.callback(handle.remove)
    return stack

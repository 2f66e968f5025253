"""Steps captured in CUDA graphs: the same answers as with eager code, in batches and in streams."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from meteora_core import detach, fuse, record_routes
from meteora_core.generation.capture import capture
from meteora_core.generation.engine import Engine
from meteora_core.generation.fixed_cache import FixedCache
from meteora_core.generation.requests import Request, RoutingScope, Written
from meteora_core.generation.sampling import Sampling
from meteora_core.routing import meteora_of
from support.generation import engine_of, requests_of
from support.tiny_models import make_tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # advice of compilers, and PyTorch's warning about an interrupted capture
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # raised by PyTorch 2.11's own compiler when it is first imported
]


def captured(engine: Engine) -> bool:
    """Whether the engine's last batch was generated with CUDA graphs."""
    return engine.batch_cache is not None and engine.batch_cache.captured


@pytest.mark.parametrize("kind", ["base", "meteora", "fused", "muted"])
def test_captured_batches_answer_as_eager_ones(gpu_model: Any, kind: str) -> None:
    if kind == "base":
        detach(gpu_model)
    elif kind != "meteora":
        fuse(gpu_model)
    if kind == "muted":
        meteora_of(gpu_model).mute(["two"])
    engine, eager = engine_of(gpu_model, "auto", 3), engine_of(gpu_model, "off", 3)
    requests = requests_of()
    wanted = eager.answer(requests)
    assert len({tuple(row) for row in wanted}) > 3
    assert engine.answer(requests) == wanted
    assert captured(engine)
    other = requests_of([4, 20, 3, 3, 3], [9] * 5)
    assert engine.answer(other) == eager.answer(other)
    assert engine.answer(requests) == wanted
    long = requests_of([3 + place for place in range(16)], [3, 90, 90, *[2] * 13])
    assert engine.answer(long) == eager.answer(long)
    assert captured(engine)


def test_captured_batches_of_a_peft_adapter(gpu_model: Any, make_adapter: Any) -> None:
    from meteora_core.evaluation.adapters import with_adapter

    fuse(gpu_model)
    requests = requests_of()
    with with_adapter(detach(gpu_model), make_adapter("peft", 9)) as adapted:
        engine = engine_of(adapted, "auto", 3)
        assert engine.answer(requests) == engine_of(adapted, "off", 3).answer(requests)
        assert captured(engine)


def test_captured_batches_of_arrow(make_adapter: Any) -> None:
    """PEFT's Arrow creates its scalings from Python numbers in every step. They are on the device before a step is captured."""
    from meteora_core.evaluation.arrow import with_arrow

    base, requests = make_tiny_llama(initializer_range=0.3).to("cuda"), requests_of()
    with with_arrow(base, {name: make_adapter(name, seed) for seed, name in enumerate(("a", "b", "c"))}) as adapted:
        engine = engine_of(adapted, "auto", 3)
        assert engine.answer(requests) == engine_of(adapted, "off", 3).answer(requests)
        assert captured(engine)


def test_recorded_routes_leave_the_captured_path_and_say_so(gpu_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    fuse(gpu_model)
    engine, requests = engine_of(gpu_model, "auto", 3), requests_of()
    wanted = engine.answer(requests)
    with caplog.at_level(logging.WARNING), record_routes(gpu_model) as routes:
        assert engine.answer(requests) == wanted
    assert "no CUDA graphs are used" in caplog.text
    assert len(routes.paths) == 14
    steps = routes.steps(routes.paths[0])
    assert steps[0].indices.shape[:2] == (7, 30)
    assert len(steps) > 5
    assert engine.answer(requests) == wanted


@pytest.mark.parametrize("fused", [False, True])
def test_drawn_tokens_are_the_same_from_captured_logits(gpu_model: Any, fused: bool) -> None:
    """The tokens depend on the seed only: alone, in a batch, and after greedy answers of the same engine, whose graph includes the choice of tokens."""
    if fused:
        fuse(gpu_model)
    drawn = [replace(request, sampling=replace(request.sampling, temperature=1.5, top_p=0.9, seed=seed)) for seed, request in enumerate(requests_of())]
    mixed = [request if place % 2 else greedy for place, (request, greedy) in enumerate(zip(drawn, requests_of(), strict=True))]
    engine, eager = engine_of(gpu_model, "auto"), engine_of(gpu_model, "off")
    greedy = engine.answer(requests_of())
    for requests in (drawn, mixed):
        assert engine.answer(requests) == eager.answer(requests)
        assert captured(engine)
    assert engine.answer(requests_of()) == greedy
    for request in (drawn[0], requests_of()[0], drawn[2], drawn[0]):
        ids = [list(list(each.stream(request))[-1].ids) for each in (engine, eager)]
        assert ids[0] == ids[1] == eager.answer([request])[0]
    assert engine.stream_cache is not None
    assert engine.stream_cache.captured


def test_a_captured_answer_streams_and_its_routes_are_recorded_on_the_side(speaker: Any) -> None:
    speaker.model.to("cuda")
    engine = Engine(speaker.model, speaker.tokenizer, "auto")
    ids = list(range(5, 40))
    plain = list(engine.stream(Request(ids, Sampling(8))))
    assert engine.stream_cache is not None
    assert engine.stream_cache.captured
    recorded = list(engine.stream(Request(ids, Sampling(8), record=True, read_from=0)))
    assert recorded[-1].ids == plain[-1].ids
    assert all(event.routes is not None for event in recorded if isinstance(event, Written))
    assert list(engine.stream(Request(ids, Sampling(8))))[-1].ids == plain[-1].ids


def test_a_captured_stream_goes_on_through_turns_scopes_and_larger_caches(speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change needs another graph, and the step that runs before a capture must not change the state."""
    from meteora_core.generation import fixed_cache

    monkeypatch.setattr(fixed_cache, "LEAST", 16)
    speaker.model.to("cuda")
    state = speaker.routing
    engines = [Engine(speaker.model, speaker.tokenizer, graphs) for graphs in ("auto", "off")]
    ids = list(range(5, 12))
    for turn in range(6):
        name = None if turn % 3 == 0 else "beta" if turn % 3 == 1 else "gamma"
        scope = RoutingScope(name, lambda name=name: state.force(name))
        made = [list(engine.stream(Request(ids, Sampling(25, temperature=turn % 2, seed=turn), scope)))[-1] for engine in engines]
        assert made[0].ids == made[1].ids
        assert made[0].reused == made[1].reused
        ids = [*ids, *made[0].ids, 7, 8, 9]
    cache = engines[0].stream_cache
    assert isinstance(cache, FixedCache)
    assert cache.captured
    assert cache.capacity >= 256


@pytest.mark.parametrize("fused", [False, True])
def test_prompts_are_read_by_graphs(gpu_model: Any, fused: bool) -> None:
    """The answers after a prompt, and after parts of it at several places of the cache, are those of eager code. Lengths needed twice have graphs."""
    if fused:
        fuse(gpu_model)
    engine, eager = engine_of(gpu_model, "auto"), engine_of(gpu_model, "off")
    for request in requests_of((30, 90, 17, 25, 60, 100), (8, 3, 8, 8, 3, 8)):  # the model's context is 128
        ids = list(request.ids)
        for prompt in (ids, [*ids, 7, 8, 9], ids):
            each = [list(one.stream(replace(request, ids=prompt)))[-1].ids for one in (engine, eager)]
            assert each[0] == each[1]
    cache = engine.stream_cache
    assert isinstance(cache, FixedCache)
    assert set(cache._pieces._graphs) == {16, 32}


def test_a_step_that_cannot_be_captured_runs_without(gpu_model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    requests = requests_of()
    wanted = engine_of(gpu_model, "off", 3).answer(requests)
    real = FixedCache._read

    def waiting(self: FixedCache) -> torch.Tensor:
        int(self.rows.done.sum())
        return real(self)

    monkeypatch.setattr(FixedCache, "_read", waiting)
    engine = engine_of(gpu_model, "auto", 3)
    assert engine.uses_fixed_caches
    assert engine.answer(requests) == wanted
    assert caplog.text.count("cannot be captured") == 1
    assert not engine.uses_fixed_caches
    assert engine.answer(requests) == wanted
    streaming = engine_of(gpu_model, "auto", 3)
    assert list(list(streaming.stream(requests[0]))[-1].ids) == wanted[0]
    assert caplog.text.count("cannot be captured") == 2


@torch.inference_mode()
def test_capturing_leaves_the_state_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    count = torch.zeros(1, device="cuda")
    doubled = torch.zeros(1, device="cuda")

    def undo() -> None:
        count.zero_()
        doubled.zero_()

    def step() -> torch.Tensor:
        count.add_(torch.tensor([1.0], device="cuda"))  # a constant that is copied from the host once
        doubled.copy_(2 * count)
        return doubled

    made = capture(step, undo, torch.device("cuda"))
    assert made is not None
    assert (float(count), float(doubled)) == (0.0, 0.0)
    for turn in range(3):
        assert float(made.replay()) == 2.0 * (turn + 1)
    count.zero_()

    def broken() -> torch.Tensor:
        count.add_(1)
        assert float(count) == 1.0  # synchronises with the device
        return count

    assert capture(broken, undo, torch.device("cuda")) is None
    torch.cuda.synchronize()
    assert float(count) == 0.0
    assert "cannot be captured" in caplog.text

    def written() -> torch.Tensor:
        total = torch.tensor([0.0], device="cuda")
        return total.add_(1)

    assert capture(written, undo, torch.device("cuda")) is None

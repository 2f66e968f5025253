"""Prompts that are read by graphs of a few lengths: the same answers as without. A stand-in for a graph calls the captured function again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meteora_core.generation import fixed_cache, piece_graphs
from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Request, RoutingScope
from meteora_core.generation.sampling import Sampling


class Repeated:
    """A step that runs again at every replay and returns the same tensor each time, as a graph does."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step, self.output = step, step().clone()

    def replay(self) -> Tensor:
        return self.output.copy_(self.step())


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs "captured" so far; every FixedCache captures."""
    made: list[Any] = []

    def capture(step: Callable[[], Tensor], undo: Callable[[], object], device: torch.device, *, pool: Any = None) -> Repeated:
        made.append(Repeated(step))
        undo()
        return made[-1]

    class Capturing(fixed_cache.FixedCache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.can_capture = True

    for module in (fixed_cache, piece_graphs):
        monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr("meteora_core.generation.engine.FixedCache", Capturing)
    return made


def answer(engine: Engine, prompt: list[int], **scope: Any) -> tuple[int, ...]:
    return list(engine.stream(Request(prompt, Sampling(max_new_tokens=6), RoutingScope(**scope) if scope else RoutingScope())))[-1].ids


def test_turns_of_a_conversation_are_read_by_graphs(speaker, captures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_cache, "LEAST", 8)
    growing, still = (Engine(speaker.model, speaker.tokenizer, graphs) for graphs in ("off", "on"))
    prompt: list[int] = []
    for turn in range(7):
        prompt = [*prompt, *range(5 + turn, 5 + turn + (3, 40, 11, 16, 17, 90, 2)[turn])]
        wanted = answer(growing, prompt)
        assert answer(still, prompt) == wanted
        prompt = [*prompt, *wanted]
    assert len(captures) > 3


@torch.inference_mode()
def test_graphs_are_made_at_the_second_need_and_dropped_with_their_settings(speaker, captures) -> None:
    engine = Engine(speaker.model, speaker.tokenizer, "on")
    ids = list(range(5, 35))
    reader = engine.stream_cache
    for need in range(3):
        engine.forget()
        answer(engine, ids)
        reader = engine.stream_cache
        assert isinstance(reader, fixed_cache.FixedCache)
        assert sorted(reader._pieces._graphs) == ([] if need == 0 else [32])
    graph = reader._pieces._graphs[32]
    answer(engine, [9, *ids])
    assert reader._pieces._graphs[32] is graph
    reader.cut(0)
    assert reader._pieces.read(reader, ids, "other settings") is not None
    assert reader._pieces._graphs[32] is not graph


@torch.inference_mode()
def test_tokens_that_do_not_fit_are_read_without_a_graph(speaker, captures) -> None:
    engine = Engine(speaker.model, speaker.tokenizer, "on")
    answer(engine, [5, 6, 7])
    cache = engine.stream_cache
    assert isinstance(cache, fixed_cache.FixedCache)
    for _ in range(3):
        cache.length = 0
        assert cache._pieces.read(cache, [5] * 513, None) is None
        cache.length = cache.capacity - 15
        assert cache._pieces.read(cache, [5] * 3, None) is None
    cache.length, cache._pieces.can_capture = 0, False
    assert cache._pieces.read(cache, [5] * 40, None) is None
    assert cache._pieces.read(cache, [5] * 40, None) is None


def test_a_cache_is_freed_with_its_last_reference(speaker) -> None:
    """Its memory must be free before the next cache is made."""
    engine = Engine(speaker.model, speaker.tokenizer, "on")
    answer(engine, [5, 6, 7])
    cache = weakref.ref(engine.stream_cache)
    gc.disable()
    try:
        engine.release()
        assert cache() is None
    finally:
        gc.enable()

"""Batched answers: finished rows that leave the batch, fixed caches and drawn tokens, compared with transformers' generate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from meteora_core import AdapterBank, attach
from meteora_core.errors import UsageError
from meteora_core.generation import engine as engine_module
from meteora_core.generation import fixed_cache, growing_cache
from meteora_core.generation.fixed_cache import FixedCache, can_be_fixed
from meteora_core.generation.requests import Request, RoutingScope
from meteora_core.generation.sampling import Sampling
from meteora_core.routing import RoutingOptions
from support.chat_world import without_ends
from support.generation import by_transformers, engine_of, requests_of
from support.tiny_models import make_tiny_llama


@pytest.fixture(params=["base", "meteora"])
def model(request, make_adapter):
    base = make_tiny_llama(initializer_range=0.3)
    if request.param == "base":
        return base
    return attach(base, AdapterBank.from_peft({"one": make_adapter("one", 1), "two": make_adapter("two", 2)}))


def batch_sizes(model: torch.nn.Module) -> list[int]:
    """Return a list to which every later forward pass appends its number of rows."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    return sizes


@pytest.mark.parametrize("no_repeat", [0, 2, 4])
def test_growing_and_fixed_caches_answer_like_transformers(model, no_repeat) -> None:
    requests = requests_of()
    wanted = by_transformers(model, requests, no_repeat)
    assert engine_of(model, "off", no_repeat).answer(requests) == wanted
    assert can_be_fixed(model)
    engine = engine_of(model, "on", no_repeat)
    assert engine.answer(requests) == wanted
    other = requests_of([4, 20], [9, 9])
    assert engine.answer(other) == by_transformers(model, other, no_repeat)
    assert engine.answer(requests) == wanted
    assert engine.answer([]) == []


def test_rows_that_are_done_leave_the_batch(model, monkeypatch) -> None:
    requests = requests_of()
    wanted = by_transformers(model, requests)
    sizes = batch_sizes(model)
    assert engine_of(model).answer(requests) == wanted
    assert sizes[0] == 7
    assert sizes[-1] < 3
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(growing_cache, "SHRINK", 0.0)
    monkeypatch.setattr(growing_cache, "AHEAD", 2)
    assert engine_of(model).answer(requests) == wanted


def test_looks_between_several_steps_change_no_answer(model, monkeypatch) -> None:
    """With several steps between two checks, as on a GPU, finished rows stay in the batch for a while."""
    wanted = by_transformers(model, requests_of(), 3)
    monkeypatch.setattr(engine_module, "steps_between_looks", lambda device: 8)
    assert engine_of(model, "off", 3).answer(requests_of()) == wanted
    assert engine_of(model, "on", 3).answer(requests_of()) == wanted


def test_a_long_tail_goes_on_in_a_smaller_cache(model, monkeypatch) -> None:
    requests = requests_of([3 + place for place in range(16)], [3, 4, 40, 3, 3, 3, 60, 3, 2, 2, 2, 2, 2, 2, 2, 25])
    wanted = by_transformers(model, requests, 3)
    assert max(map(len, wanted)) > 30
    monkeypatch.setattr(fixed_cache, "TAIL_STEPS", 8)
    engine = engine_of(model, "on", 3)
    sizes = batch_sizes(model)
    assert engine.answer(requests) == wanted
    assert sizes[0] == 16
    assert 4 in sizes
    assert engine.answer(requests) == wanted


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_row_ends_with_any_of_several_end_tokens(model, graphs, monkeypatch) -> None:
    requests = requests_of()
    free = by_transformers(model, requests)
    ends = [2, free[0][3], free[3][5]]
    wanted = by_transformers(model, requests, ends=ends)
    assert wanted != free
    model.generation_config.eos_token_id = 2
    assert engine_of(model, graphs).answer(requests) == free
    model.generation_config.eos_token_id = ends
    assert engine_of(model, graphs).answer(requests) == wanted
    monkeypatch.setattr(fixed_cache, "TAIL_STEPS", 2)
    assert engine_of(model, graphs).answer(requests) == wanted


def test_rows_that_are_done_do_not_leave_the_context() -> None:
    config = GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
    requests = requests_of([38, 5, 7, 9, 11], [2, 30, 30, 30, 29])
    wanted = by_transformers(model, requests)
    assert len(wanted[0]) + 38 == 40
    assert max(map(len, wanted)) > 10
    assert engine_of(model).answer(requests) == wanted
    assert can_be_fixed(model)
    assert engine_of(model, "on").answer(requests) == wanted


def test_the_context_bounds_an_answer(model) -> None:
    without_ends(model)
    requests = requests_of([100, 5], [500, 3])
    assert [len(answer) for answer in engine_of(model).answer(requests)] == [28, 3]
    assert engine_of(model, "on").answer(requests) == engine_of(model).answer(requests)


def test_an_engine_keeps_its_cache_for_like_batches(model) -> None:
    engine = engine_of(model, "on", 3)
    requests = requests_of()
    wanted = by_transformers(model, requests, 3)
    assert engine.answer(requests) == wanted
    kept = engine.batch_cache
    assert isinstance(kept, FixedCache)
    assert (len(kept.rows), kept.capacity) == (8, 256)
    engine.answer(requests_of([5] * 6, [4] * 6))
    assert engine.batch_cache is kept
    engine.answer(requests_of([5] * 2, [4] * 2))
    assert engine.batch_cache is not kept
    engine.release()
    assert engine.batch_cache is None
    assert engine.answer(requests) == wanted


def test_peft_models_and_models_that_cannot_be_fixed(make_adapter, caplog) -> None:
    from peft import PeftModel

    base = make_tiny_llama(initializer_range=0.3)
    requests = requests_of([5, 9], [8, 8])
    plain = by_transformers(base, requests, 3)
    adapted = PeftModel.from_pretrained(base, str(make_adapter("one", 1)))
    wanted = by_transformers(adapted, requests, 3)
    assert wanted != plain
    assert engine_of(adapted, "off", 3).answer(requests) == engine_of(adapted, "on", 3).answer(requests) == wanted
    eager = make_tiny_llama()
    eager.set_attn_implementation("eager")
    assert not can_be_fixed(eager)
    assert not engine_of(eager, "on").uses_fixed_caches
    assert "CUDA graphs are off" in caplog.text
    assert not engine_of(base, "auto").uses_fixed_caches


def test_recorded_routes_leave_fixed_caches_and_say_so(model, caplog) -> None:
    from meteora_core import record_routes

    if getattr(model, "meteora", None) is None:
        pytest.skip("nothing routes")
    engine, requests = engine_of(model, "on", 3), requests_of()
    wanted = engine.answer(requests)
    with record_routes(model) as routes:
        assert engine.answer(requests) == engine.answer(requests) == wanted
    assert caplog.text.count("no CUDA graphs are used") == 1
    assert routes.steps(routes.paths[0])[0].indices.shape[:2] == (7, 30)
    assert engine.answer(requests) == wanted


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_frozen_head_is_not_copied_for_every_row(graphs) -> None:
    """torch multiplies a non-contiguous slice by a frozen weight row by row, and copies the weight for every row."""
    model = make_tiny_llama().eval().requires_grad_(False)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    engine = engine_of(model, graphs)
    engine.answer(requests_of([5, 9, 7], [3, 3, 3]))
    list(engine.stream(requests_of([40], [3])[0]))
    assert len(seen) == 6
    assert all(hidden.shape[1] == 1 and hidden.is_contiguous() for hidden in seen)


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_rows_with_their_own_sampling_answer_as_alone(model, graphs, monkeypatch) -> None:
    monkeypatch.setattr(fixed_cache, "TAIL_STEPS", 2)
    drawn = [Sampling(20, 2.0, 1.0, 1), Sampling(9, 2.0, 0.5, 1), Sampling(20, 2.0, 1.0, 2), Sampling(15)]
    requests = [replace(request, sampling=drawn[place % 4]) for place, request in enumerate([*requests_of(), *requests_of()])]
    engine = engine_of(model, graphs)
    together = engine.answer(requests)
    assert together[0] != together[8], "another seed draws other tokens"
    alone = engine_of(model, "off")
    for request, answer in zip(requests, together, strict=True):
        assert list(list(alone.stream(request))[-1].ids) == answer
    assert engine.answer(requests) == together


def test_a_batch_has_one_way_to_choose_adapters(model) -> None:
    request = requests_of()[0]
    for other in (replace(request, scope=RoutingScope("forced")), replace(request, record=True)):
        with pytest.raises(ValueError, match=r"same routing scope|only for a streamed answer"):
            engine_of(model).answer([request, other])


def test_every_pass_of_a_batch_runs_in_its_scope(model, make_adapter) -> None:
    state = getattr(model, "meteora", None)
    if state is None:
        pytest.skip("nothing routes")
    free = engine_of(model).answer(requests_of())
    forced = [Request(each.ids, each.sampling, RoutingScope("one", lambda: state.force("one"))) for each in requests_of()]
    with state.force("one"):
        wanted = engine_of(model).answer(requests_of())
    assert wanted != free
    for graphs in ("off", "on"):
        engine = engine_of(model, graphs)
        assert engine.answer(forced) == wanted
        assert engine.answer(requests_of()) == free


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_requests_with_their_own_routing_options_answer_as_alone(model, graphs, monkeypatch) -> None:
    state = getattr(model, "meteora", None)
    if state is None:
        pytest.skip("nothing routes")
    monkeypatch.setattr(fixed_cache, "TAIL_STEPS", 2)
    options = [
        RoutingOptions(),
        RoutingOptions(top_k=1),
        RoutingOptions(forced="two"),
        RoutingOptions(weights={"one": 0.7, "two": 0.6}),
        RoutingOptions(enabled=False),
    ]
    routed = [replace(request, scope=RoutingScope.of(state, options[place % 5])) for place, request in enumerate([*requests_of(), *requests_of(seed=2)])]
    engine, alone = engine_of(model, graphs), engine_of(model)
    together = engine.answer(routed)
    for request, answer in zip(routed, together, strict=True):
        assert list(list(alone.stream(request))[-1].ids) == answer
        with state.apply(request.scope.options):
            assert by_transformers(model, [request]) == [answer]
    assert engine.answer(routed) == together
    assert together != engine.answer([*requests_of(), *requests_of(seed=2)])
    with pytest.raises(UsageError, match="no adapter named 'three'"):
        RoutingScope.of(state, RoutingOptions(forced="three"))

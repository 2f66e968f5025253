"""Streamed answers: the same tokens as transformers' generate, with a cache that is kept between calls."""

from __future__ import annotations

import pytest
import torch

from meteora_core.errors import UsageError
from meteora_core.generation import engine as engine_module
from meteora_core.generation.engine import Engine
from meteora_core.generation.limits import end_tokens
from meteora_core.generation.requests import Event, Finished, Reading, Request, RoutingScope, Written
from meteora_core.generation.sampling import Sampling
from meteora_core.trace.record import trace_tokens
from support.chat_world import byte_llama, byte_tokenizer, without_ends

PROMPT = list(b"What is the capital of France?")
IDS = [token + 3 for token in PROMPT]


def run(engine: Engine, ids, sampling=Sampling(max_new_tokens=12), **options) -> Finished:
    return events_of(engine, ids, sampling, **options)[-1]


def events_of(engine: Engine, ids, sampling=Sampling(max_new_tokens=12), **options) -> list[Event]:
    return list(engine.stream(Request(ids, sampling, **options)))


def count_tokens(model: torch.nn.Module) -> list[int]:
    """Return a list to which every later forward pass appends its number of tokens."""
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True)
    return seen


def test_greedy_tokens_are_those_of_generate(speaker) -> None:
    expected = speaker.model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0, len(IDS) :].tolist()
    finished = run(Engine(speaker.model, speaker.tokenizer), IDS)
    assert list(finished.ids) == expected
    assert finished.reason == "length"
    assert finished.text == speaker.tokenizer.decode(expected, skip_special_tokens=True)
    assert (finished.prompt_tokens, finished.reused) == (len(IDS), 0)
    assert 0 < finished.first_seconds < finished.seconds
    assert finished.tokens_per_second > 0


def test_a_second_turn_reads_only_what_is_new_and_answers_the_same(speaker) -> None:
    engine = Engine(speaker.model, speaker.tokenizer)
    first = run(engine, IDS)
    longer = [*IDS, *first.ids, *IDS[:9]]
    seen = count_tokens(speaker.model)
    second = run(engine, longer)
    # The model has not read the last token of the first answer yet, so it is read with the nine new ones.
    assert seen[0] == 10
    assert second.reused == len(longer) - 10
    assert second.ids == run(Engine(speaker.model, speaker.tokenizer), longer).ids


def test_another_conversation_keeps_the_common_start_only(speaker) -> None:
    engine = Engine(speaker.model, speaker.tokenizer)
    run(engine, IDS)
    other = [*IDS[:7], *IDS[20:]]
    finished = run(engine, other)
    assert finished.reused == 7
    assert finished.ids == run(Engine(speaker.model, speaker.tokenizer), other).ids
    assert run(engine, other).reused == len(other) - 1
    assert run(engine, other, read_from=4).reused == 4


def test_another_key_drops_the_cache(speaker) -> None:
    engine = Engine(speaker.model, speaker.tokenizer)
    state = speaker.routing
    plain = run(engine, IDS, scope=RoutingScope("gates"))
    forced = run(engine, IDS, scope=RoutingScope("beta", lambda: state.force("beta")))
    assert forced.reused == 0
    with state.force("beta"):
        expected = speaker.model.generate(torch.tensor([IDS]), max_new_tokens=12, do_sample=False)[0, len(IDS) :].tolist()
    assert list(forced.ids) == expected
    assert forced.ids != plain.ids
    assert run(engine, IDS, scope=RoutingScope("gates")).ids == plain.ids


def test_a_pass_that_was_broken_off_leaves_no_half_cache(speaker) -> None:
    engine = Engine(speaker.model, speaker.tokenizer)
    expected = run(Engine(speaker.model, speaker.tokenizer), IDS)
    passes = 0

    def interrupt(module: torch.nn.Module, arguments: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 4:
            raise KeyboardInterrupt

    handle = speaker.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(engine, IDS)
    handle.remove()
    assert run(engine, IDS).ids == expected.ids


def test_a_cache_that_cannot_be_cut_is_dropped(speaker, monkeypatch) -> None:
    from transformers import DynamicCache

    def refuse(self: object, tokens: int) -> None:
        raise RuntimeError("this cache does not track past states")

    engine = Engine(speaker.model, speaker.tokenizer)
    run(engine, IDS)
    monkeypatch.setattr(DynamicCache, "crop", refuse)
    finished = run(engine, IDS[:-3])
    assert finished.reused == 0
    assert finished.ids == run(Engine(speaker.model, speaker.tokenizer), IDS[:-3]).ids


def test_a_sliding_window_gives_the_same_answer_in_later_turns() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=8
    )
    model = MistralForCausalLM(config).eval()
    engine = Engine(model, byte_tokenizer())
    first = run(engine, IDS)
    for ids in ([*IDS, *first.ids, *IDS[:9]], IDS[:20]):
        assert run(engine, ids).ids == run(Engine(model, byte_tokenizer()), ids).ids


def test_long_prompts_are_read_in_pieces_with_the_same_result(speaker, monkeypatch) -> None:
    whole = run(Engine(speaker.model, speaker.tokenizer), IDS)
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    events = events_of(Engine(speaker.model, speaker.tokenizer), IDS)
    assert [event.done for event in events if isinstance(event, Reading)] == [7, 14, 21, 28, 30]
    assert events[-1].ids == whole.ids


def test_stopping_while_reading_and_while_writing(speaker, monkeypatch) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 7)
    engine = Engine(speaker.model, speaker.tokenizer)
    events = []
    for event in engine.stream(Request(IDS, Sampling(max_new_tokens=12)), stop=lambda: len(events) >= 2):
        events.append(event)
    assert (events[-1].reason, events[-1].ids, events[-1].text) == ("stopped", (), "")
    written: list[Written] = []
    for event in engine.stream(Request(IDS, Sampling(max_new_tokens=12)), stop=lambda: len(written) == 5):
        if isinstance(event, Written):
            written.append(event)
    assert (event.reason, len(event.ids), event.reused) == ("stopped", 5, 14)
    assert run(engine, IDS).ids[:5] == event.ids


def test_the_answer_ends_at_an_end_token_or_a_full_context(world) -> None:
    model, tokenizer = byte_llama(max_position_embeddings=40), byte_tokenizer()
    without_ends(model)
    engine = Engine(model, tokenizer)
    assert engine.context == 40
    finished = run(engine, IDS, Sampling(max_new_tokens=99))
    assert (finished.reason, len(finished.ids)) == ("context", 40 - len(IDS))
    model.generation_config.eos_token_id = [2, finished.ids[4]]
    assert end_tokens(model, tokenizer) == {2, finished.ids[4]}
    ended = run(Engine(model, tokenizer), IDS, Sampling(max_new_tokens=99))
    assert ended.reason == "end"
    assert ended.ids == finished.ids[: finished.ids.index(finished.ids[4])]
    with pytest.raises(UsageError, match="41 tokens, and the model's context of 40"):
        run(engine, [5] * 41)
    with pytest.raises(UsageError, match="empty"):
        run(engine, [])


def test_sampling_is_repeatable_and_narrows_to_greedy(speaker) -> None:
    engine = Engine(speaker.model, speaker.tokenizer)
    greedy = run(engine, IDS).ids
    draws = [run(engine, IDS, Sampling(12, temperature=2.0, seed=seed)).ids for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert run(engine, IDS, Sampling(12, temperature=2.0, top_p=1e-6, seed=3)).ids == greedy


def test_recorded_routes_are_those_of_one_pass_over_the_whole(speaker) -> None:
    engine = Engine(speaker.model, speaker.tokenizer)
    events = events_of(engine, IDS, record=True)
    finished = events[-1]
    roles = ["prompt"] * len(IDS) + ["answer"] * len(finished.ids)
    picture = trace_tokens(speaker.model, speaker.tokenizer, [*IDS, *finished.ids], roles)
    assert finished.paths == picture.paths
    indices = torch.cat([event.routes[0] for event in events if isinstance(event, Reading | Written)])
    weights = torch.cat([event.routes[1] for event in events if isinstance(event, Reading | Written)])
    assert torch.equal(indices, picture.indices)
    torch.testing.assert_close(weights, picture.weights, rtol=1e-4, atol=1e-4)


def test_recording_does_not_change_the_answer(speaker) -> None:
    plain = run(Engine(speaker.model, speaker.tokenizer), IDS)
    events = events_of(Engine(speaker.model, speaker.tokenizer), IDS, record=True)
    assert events[-1].ids == plain.ids
    assert all(event.routes is None for event in events_of(Engine(speaker.model, speaker.tokenizer), IDS, Sampling(2)) if isinstance(event, Written))


def test_a_request_for_no_tokens_reads_the_prompt_and_ends(speaker) -> None:
    finished = run(Engine(speaker.model, speaker.tokenizer), IDS, Sampling(max_new_tokens=0))
    assert (finished.reason, finished.ids, finished.prompt_tokens) == ("length", (), len(IDS))


@pytest.mark.parametrize("graphs", ["off", "on"])
def test_reading_alone_leaves_a_cache_for_the_answer(speaker, graphs) -> None:
    engine = Engine(speaker.model, speaker.tokenizer, graphs)
    assert [reading.done for reading in engine.read(Request(IDS[:20]))] == [20]
    finished = run(engine, IDS)
    assert finished.reused == 20
    assert finished.ids == run(Engine(speaker.model, speaker.tokenizer), IDS).ids
    engine.forget()
    assert run(engine, IDS).reused == 0
    engine.release()
    assert engine.stream_cache is None
    assert run(engine, IDS).ids == finished.ids

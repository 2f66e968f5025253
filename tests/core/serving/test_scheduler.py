"""Continuous batching gives every request the answer that it would get alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from meteora_core.chat.chat_model import ChatModel
from meteora_core.errors import MeteoraError
from meteora_core.routing import RoutingOptions
from meteora_core.serving.jobs import Chosen, Done, Failed
from meteora_core.serving.scheduler import QueueFull, Scheduler, SchedulerLimits
from support.chat_world import NAMES
from support.serving import alone, drive, job_of, mixed_options, tokens_of


def scheduler_of(chat_model: ChatModel, **limits: Any) -> Scheduler:
    return Scheduler(chat_model.model, chat_model.tokenizer, SchedulerLimits(**{"max_batch": 8, "prefix_bytes": 0, **limits}))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(3, 258) for _ in range(draw.choice([1, 2, 7, 20, 45, 90]))] for _ in range(count)]


@pytest.mark.parametrize(("step_tokens", "cache", "fixed"), [(512, 0, False), (16, 1 << 26, False), (512, 0, True), (16, 1 << 26, True)])
def test_mixed_requests_are_answered_as_each_alone(chat_model: ChatModel, step_tokens: int, cache: int, fixed: bool) -> None:
    texts, options = prompts(64), mixed_options(NAMES, 64)
    scheduler = scheduler_of(chat_model, max_batch=16, step_tokens=step_tokens, prefix_bytes=cache, fixed_steps=fixed)
    pairs = [job_of(ids, routing, max_new_tokens=3 + index % 9) for index, (ids, routing) in enumerate(zip(texts, options, strict=True))]
    drive(scheduler, [job for job, _ in pairs])
    for (job, events), ids, routing in zip(pairs, texts, options, strict=True):
        assert tokens_of(events) == alone(chat_model.model, ids, routing, job.sampling.max_new_tokens), routing
        done = events[-1]
        assert isinstance(done, Done)
        assert (done.reason, done.prompt_tokens, done.tokens) == ("length", len(ids), job.sampling.max_new_tokens)


def test_the_prefix_cache_gives_the_same_answer_and_is_not_shared_between_options(chat_model: ChatModel) -> None:
    scheduler = scheduler_of(chat_model, prefix_bytes=1 << 26)
    text = prompts(1, 5)[0] * 90
    text = text[:150]
    options = [RoutingOptions(2, 1.0), RoutingOptions(2, 1.0, forced="alpha"), RoutingOptions(2, 1.0, muted=frozenset(["alpha"])), RoutingOptions(1, 1.0)]
    for routing in options:
        for cached in (0, 128):
            job, events = job_of(text, routing)
            drive(scheduler, [job])
            done = events[-1]
            assert isinstance(done, Done)
            assert done.cached_tokens == cached
            assert tokens_of(events) == alone(chat_model.model, text, routing, 12)
    first, events = job_of(text, options[0])
    drive(scheduler, [first])
    turn = [*text, *tokens_of(events), *prompts(1, 6)[0], 5]
    second, events = job_of(turn, options[0])
    drive(scheduler, [second])
    assert isinstance(events[-1], Done)
    assert events[-1].cached_tokens >= 160 - 32
    assert tokens_of(events) == alone(chat_model.model, turn, options[0], 12)


def test_a_small_prefix_cache_drops_the_oldest_blocks(chat_model: ChatModel) -> None:
    scheduler = scheduler_of(chat_model, prefix_bytes=200_000)
    for seed in range(6):
        job, _ = job_of(prompts(1, seed)[0] * 90 if seed else list(range(3, 200)), RoutingOptions(2, 1.0))
        job.ids = list(job.ids)[:200]
        drive(scheduler, [job])
        assert scheduler.prefixes.bytes <= 200_000
    assert len(scheduler.prefixes) > 0


def test_routes_are_those_of_record_routes(chat_model: ChatModel) -> None:
    import torch

    from meteora_core import record_routes

    text = prompts(1, 3)[0] + [7, 8, 9]
    job, events = job_of(text, RoutingOptions(2, 1.0), "layers", max_new_tokens=4)
    other, _ = job_of(text[:2], RoutingOptions(2, 1.0, forced="beta"))
    drive(scheduler_of(chat_model), [other, job])
    whole = [*text, *tokens_of(events)]
    with torch.inference_mode(), record_routes(chat_model.model) as routes:
        chat_model.model(input_ids=torch.tensor([whole]), use_cache=False)
    indices, weights = routes.packed()
    for at, event in enumerate(event for event in events if isinstance(event, Chosen)):
        position = len(text) - 1 + at
        assert event.routes is not None
        assert event.routes.paths == routes.paths
        assert torch.equal(event.routes.indices, indices[position])
        assert torch.allclose(event.routes.weights, weights[position], atol=1e-5)
        assert torch.allclose(event.routes.mean, routes.shares()[0, position], atol=1e-5)


def test_a_cancelled_request_leaves_at_the_next_step(chat_model: ChatModel) -> None:
    from meteora_core.serving.packed import packed_attention

    scheduler = scheduler_of(chat_model)
    job, events = job_of(prompts(1)[0], RoutingOptions(2, 1.0), max_new_tokens=200)
    other, kept = job_of(prompts(1, 1)[0], RoutingOptions(2, 1.0), max_new_tokens=5)
    scheduler.submit(job)
    scheduler.submit(other)
    with packed_attention(chat_model.model):
        scheduler.step()
        scheduler.step()
        written = len(tokens_of(events))
        job.cancel()
        while sum(scheduler.load):
            scheduler.step()
    assert len(tokens_of(events)) == written
    assert isinstance(events[-1], Done)
    assert events[-1].reason == "cancelled"
    assert tokens_of(kept) == alone(chat_model.model, other.ids, other.routing, 5)


def test_stop_texts_seeds_penalties_and_log_probabilities(chat_model: ChatModel) -> None:
    scheduler, routing, text = scheduler_of(chat_model), RoutingOptions(2, 1.0), prompts(1, 2)[0]
    job, events = job_of(text, routing, logprobs=3)
    drive(scheduler, [job])
    assert all(isinstance(event, Chosen) and event.logprob is not None and event.top[0][0] == event.id for event in events[:-1])
    plain = "".join(event.text for event in events if not isinstance(event, Failed))
    middle = plain[4:6]
    stopped, seen = job_of(text, routing, stop=(middle,))
    drive(scheduler, [stopped])
    assert "".join(event.text for event in seen if not isinstance(event, Failed)) == plain[: plain.index(middle)]
    assert isinstance(seen[-1], Done)
    assert seen[-1].reason == "stop"
    drawn = []
    for seed in (1, 1, 2):
        job, events = job_of(text, routing, temperature=1.0, top_p=0.9, seed=seed)
        drive(scheduler, [job])
        drawn.append(tokens_of(events))
    assert drawn[0] == drawn[1] != drawn[2]
    banned = tokens_of(seen)[0]
    job, events = job_of(text, routing, logit_bias={banned: -100.0})
    drive(scheduler, [job])
    assert tokens_of(events)[0] != banned
    job, events = job_of(text, routing, frequency_penalty=2.0, presence_penalty=2.0, max_new_tokens=40)
    drive(scheduler, [job])
    plain_job, repeated = job_of(text, routing, max_new_tokens=40)
    drive(scheduler, [plain_job])
    assert len(set(tokens_of(events))) >= len(set(tokens_of(repeated)))


def test_what_cannot_be_answered_is_refused(chat_model: ChatModel) -> None:
    scheduler = scheduler_of(chat_model, max_queue=1, max_model_len=50)
    for ids, message in (([], "empty"), ([3] * 50, "maximum context length is 50"), ([999], "outside 0..258")):
        job, _ = job_of(ids, RoutingOptions(2, 1.0))
        with pytest.raises(MeteoraError, match=message):
            scheduler.submit(job)
    unknown, events = job_of([5], RoutingOptions(2, 1.0, forced="delta"))
    drive(scheduler, [unknown])
    assert isinstance(events[-1], Failed)
    assert not events[-1].server
    scheduler.submit(job_of([5], RoutingOptions(2, 1.0))[0])
    with pytest.raises(QueueFull, match="overloaded"):
        scheduler.submit(job_of([5], RoutingOptions(2, 1.0))[0])


def test_a_failing_step_ends_its_requests_and_the_thread_goes_on(chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    scheduler = scheduler_of(chat_model)
    over = threading.Event()
    job, events = job_of([5, 6], RoutingOptions(2, 1.0))
    sink = job.sink

    def note(event: Any) -> None:
        sink(event)
        if not isinstance(event, Chosen):
            over.set()

    job.sink = note
    monkeypatch.setattr(scheduler, "_plan", lambda: 1 / 0)
    scheduler.start()
    try:
        scheduler.submit(job)
        assert over.wait(30)
        assert isinstance(events[-1], Failed)
        monkeypatch.undo()
        over.clear()
        scheduler.submit(job)
        assert over.wait(30)
        assert isinstance(events[-1], Done)
        assert scheduler.exclusively(lambda: chat_model.model.config._attn_implementation) == "sdpa"
        assert scheduler.alive
    finally:
        scheduler.close()
    assert not scheduler.alive
    assert chat_model.model.config._attn_implementation == "sdpa"

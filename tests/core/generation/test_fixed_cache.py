"""Caches of fixed size: the same answers as with growing caches."""

from __future__ import annotations

import pytest
import torch

from meteora_core.generation import fixed_cache
from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Request
from meteora_core.generation.sampling import Sampling


def test_a_cache_of_fixed_size_grows_is_cut_and_survives_a_broken_pass(speaker, monkeypatch) -> None:
    monkeypatch.setattr(fixed_cache, "LEAST", 8)
    growing, still = (Engine(speaker.model, speaker.tokenizer, graphs) for graphs in ("off", "on"))
    ids = list(range(5, 40))
    capacities = []

    def answers(prompt: list[int]) -> list[tuple[int, ...]]:
        made = [list(engine.stream(Request(prompt, Sampling(max_new_tokens=40))))[-1] for engine in (growing, still)]
        assert made[0].reused == made[1].reused
        capacities.append(still.stream_cache.capacity)
        return [finished.ids for finished in made]

    first = answers(ids[:6])
    assert first[0] == first[1]
    for prompt in ([*ids[:6], *first[0], 7, 8, 9], ids[:4], ids, [*ids[:20], 9], ids[:1]):
        one, other = answers(prompt)
        assert one == other
    assert capacities == [64, 128, 128, 128, 128, 128]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = speaker.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(still.stream(Request([*ids[:1], 9], Sampling(max_new_tokens=3))))
    handle.remove()
    growing.forget()
    one, other = answers([*ids[:1], 9, 9])
    assert one == other
    full = answers(list(range(3, 3 + 250)) * 2)
    assert full[0] == full[1]
    assert capacities[-1] == 512 == still.context


def test_models_without_a_plain_cache_keep_a_growing_one(speaker, caplog) -> None:
    assert not Engine(speaker.model, speaker.tokenizer).uses_fixed_caches
    speaker.model.set_attn_implementation("eager")
    assert not Engine(speaker.model, speaker.tokenizer, "on").uses_fixed_caches
    assert "CUDA graphs are off" in caplog.text


@torch.inference_mode()
@pytest.mark.parametrize("sampling", [Sampling(1), Sampling(1, temperature=1.0)])
def test_a_step_is_undone_whole(speaker, sampling) -> None:
    """The step that runs before a capture must not change the state."""
    engine = Engine(speaker.model, speaker.tokenizer, "on", no_repeat_ngram_size=2)
    requests = [Request(list(range(5, 5 + length)), sampling) for length in (4, 9, 7)]
    engine.answer(requests)
    cache = engine.batch_cache
    assert cache is not None
    cache.rows.done.fill_(False)
    undo = cache._undo()
    before = [tensor.clone() for tensor in (*cache.rows.tensors(), cache._mask)]
    lengths = [int(layer.cumulative_length) for layer in cache._cache.layers]
    cache._read() if cache.rows.draws else cache._whole_step()
    changed = [not torch.equal(*pair) for pair in zip((*cache.rows.tensors(), cache._mask), before, strict=True)]
    assert any(changed)
    undo()
    assert all(torch.equal(*pair) for pair in zip((*cache.rows.tensors(), cache._mask), before, strict=True))
    assert [int(layer.cumulative_length) for layer in cache._cache.layers] == lengths

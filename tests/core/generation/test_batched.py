"""Decoding: n-grams as transformers bans them, rows that leave the batch, fixed caches, and transformers' own generate as the judge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from meteora_core import AdapterBank, attach
from meteora_core.generation import batched as decoding
from meteora_core.generation.batched import Batch, Decoder, FixedDecoder, can_be_fixed, decode_growing
from meteora_core.generation.no_repeat import NOTHING, NoRepeat
from support.tiny_models import make_tiny_llama


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("start", [1, 4, 40])
def test_the_same_tokens_are_banned_as_by_transformers(size: int, start: int) -> None:
    generator = torch.Generator().manual_seed(size * 100 + start)
    vocabulary, rows, steps = 3 if size < 30 else 1, 6, 80
    processor = NoRepeatNGramLogitsProcessor(size)
    pads = [0, 1, 3, start - 1, 0, 0]
    text = torch.full((rows, start + steps), NOTHING)
    text[:, :start] = torch.randint(vocabulary, (rows, start), generator=generator)
    for row, pad in enumerate(pads):
        text[row, : min(pad, start - 1)] = NOTHING
    ours = NoRepeat(text, start, size)
    banned = 0
    for step in range(steps):
        scores = torch.randn(rows, 5, generator=generator)
        made = ours.ban(scores.clone())
        for row in range(rows):
            ids = ours.text[row, : start + step]
            wanted = processor(ids[ids != NOTHING].unsqueeze(0), scores[row : row + 1].clone())
            assert torch.equal(made[row : row + 1], wanted), (row, step)
        banned += int(made.isinf().sum())
        tokens = torch.randint(vocabulary, (rows,), generator=generator)
        ours.add(tokens, torch.tensor([start + step]))
        again = NoRepeat(ours.text.clone(), start + step + 1, size)
        assert torch.equal(again.ban(scores), ours.ban(scores))
    assert banned


def test_nothing_is_banned_when_off() -> None:
    scores = torch.zeros(1, 4)
    assert NoRepeat(torch.tensor([[1, 1, 1]]), 3, 0).ban(scores) is scores


def batch_of(lengths: list[int], room: list[int], no_repeat: int = 0, eos: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), eos), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 64, (length,), generator=generator)
        mask[row, width - length :] = 1
    return Batch(ids, mask, room, eos, no_repeat)


@pytest.fixture(params=["base", "meteora"])
def model(request, make_adapter):
    base = make_tiny_llama(initializer_range=0.3)
    if request.param == "base":
        return base
    return attach(base, AdapterBank.from_peft({"one": make_adapter("one", 1), "two": make_adapter("two", 2)}))


def by_transformers(model, batch: Batch) -> list[list[int]]:
    """Every row by itself, by ``generate``."""
    made = []
    for ids, mask, room in zip(batch.ids, batch.mask, batch.room, strict=True):
        prompt = ids[mask.bool()].unsqueeze(0)
        config = GenerationConfig(
            max_new_tokens=room, do_sample=False, eos_token_id=batch.eos, pad_token_id=batch.eos, no_repeat_ngram_size=batch.no_repeat, bos_token_id=1
        )
        row = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0, prompt.shape[1] :].tolist()
        made.append(row[: row.index(batch.eos)] if batch.eos in row else row)
    return made


LENGTHS, ROOM = [5, 17, 9, 1, 30, 12, 8], [20, 3, 20, 33, 1, 20, 20]


@pytest.mark.parametrize("no_repeat", [0, 2, 4])
def test_growing_and_fixed_caches_answer_like_transformers(model, no_repeat) -> None:
    batch = batch_of(LENGTHS, ROOM, no_repeat)
    wanted = by_transformers(model, batch)
    assert decode_growing(model, batch) == wanted
    assert can_be_fixed(model)
    decoder = FixedDecoder(model, 8, 80, 2, no_repeat)
    assert decoder.decode(batch) == wanted
    other = batch_of([4, 20], [9, 9], no_repeat)
    assert decoder.decode(other) == by_transformers(model, other)
    assert decoder.decode(batch) == wanted


def test_rows_that_are_done_leave_the_batch(model, monkeypatch) -> None:
    batch = batch_of(LENGTHS, ROOM)
    wanted = by_transformers(model, batch)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    assert decode_growing(model, batch) == wanted
    assert sizes[0] == 7
    assert sizes[-1] < 3
    assert sizes == sorted(sizes, reverse=True)
    monkeypatch.setattr(decoding, "SHRINK", 0.0)
    assert decode_growing(model, batch) == wanted


def test_a_long_tail_goes_on_in_a_smaller_cache(model, monkeypatch) -> None:
    room = [3, 4, 40, 3, 3, 3, 60, 3, 2, 2, 2, 2, 2, 2, 2, 25]
    batch = batch_of([3 + place for place in range(16)], room, 3)
    wanted = by_transformers(model, batch)
    assert max(map(len, wanted)) > 30
    monkeypatch.setattr(decoding, "TAIL_STEPS", 8)
    decoder = FixedDecoder(model, 16, 96, 2, 3)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True)
    assert decoder.decode(batch) == wanted
    assert decoder.tail is not None
    assert sizes[0] == 16
    assert 4 in sizes
    assert decoder.decode(batch) == wanted


def test_a_row_ends_with_its_end_token(model) -> None:
    batch = batch_of([5, 7], [10, 10])
    first = by_transformers(model, batch)[0]
    ended = Batch(batch.ids, batch.mask, batch.room, first[3])
    short = first[: first.index(first[3])]
    assert decode_growing(model, ended)[0] == short
    assert FixedDecoder(model, 2, 32, first[3], 0).decode(ended)[0] == short


def test_a_row_ends_with_any_of_several_end_tokens(model, monkeypatch) -> None:
    batch = batch_of(LENGTHS, ROOM)
    free = by_transformers(model, batch)
    ends = [free[0][3], free[3][5]]
    wanted = []
    for ids, mask, room in zip(batch.ids, batch.mask, batch.room, strict=True):
        prompt = ids[mask.bool()].unsqueeze(0)
        config = GenerationConfig(max_new_tokens=room, do_sample=False, eos_token_id=[2, *ends], pad_token_id=2, bos_token_id=1)
        row = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0, prompt.shape[1] :].tolist()
        wanted.append(row[:-1] if row[-1] in (2, *ends) else row)
    assert wanted != free
    several = Batch(batch.ids, batch.mask, batch.room, 2, 0, ends)
    assert decode_growing(model, several) == wanted
    assert FixedDecoder(model, 8, 80, 2, 0, ends).decode(several) == wanted
    decoder = Decoder(model, "on")
    assert decoder.decode(batch) == free
    assert decoder.decode(several) == wanted
    monkeypatch.setattr(decoding, "TAIL_STEPS", 2)
    assert FixedDecoder(model, 8, 80, 2, 0, ends).decode(several) == wanted


def test_rows_that_are_done_do_not_leave_the_context() -> None:
    config = GPT2Config(vocab_size=64, n_positions=40, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.5)
    batch = batch_of([38, 5, 7, 9, 11], [2, 30, 30, 30, 29])
    wanted = by_transformers(model, batch)
    assert len(wanted[0]) + 38 == 40
    assert max(map(len, wanted)) > 10
    assert decode_growing(model, batch) == wanted
    assert can_be_fixed(model)
    assert FixedDecoder(model, 8, 80, 2, 0).decode(batch) == wanted


def test_a_decoder_keeps_its_cache_for_like_batches_and_goes_without_when_it_must(model, monkeypatch, caplog) -> None:
    decoder = Decoder(model, "on")
    batch = batch_of(LENGTHS, ROOM, 3)
    wanted = by_transformers(model, batch)
    assert decoder.decode(batch) == wanted
    kept = decoder._fixed
    assert kept is not None
    assert (kept.rows, kept.capacity) == (8, 256)
    decoder.decode(batch_of([5] * 6, [4] * 6, 3))
    assert decoder._fixed is kept
    decoder.decode(batch_of([5] * 2, [4] * 2, 3))
    assert decoder._fixed is not kept
    decoder.forget()
    assert decoder._fixed is None

    def cannot(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decoding, "FixedDecoder", cannot)
    assert decoder.decode(batch) == wanted
    assert "cannot be captured" in caplog.text


def test_peft_models_and_models_that_cannot_be_fixed(make_adapter, caplog) -> None:
    from peft import PeftModel

    base = make_tiny_llama(initializer_range=0.3)
    batch = batch_of([5, 9], [8, 8], 3)
    plain = by_transformers(base, batch)
    adapted = PeftModel.from_pretrained(base, str(make_adapter("one", 1)))
    wanted = by_transformers(adapted, batch)
    assert wanted != plain
    assert decode_growing(adapted, batch) == FixedDecoder(adapted, 2, 32, 2, 3).decode(batch) == wanted
    eager = make_tiny_llama()
    eager.set_attn_implementation("eager")
    assert not can_be_fixed(eager)
    assert not Decoder(eager, "on")._use_fixed
    assert "needs a growing cache" in caplog.text
    assert not Decoder(base)._use_fixed


def test_recorded_routes_leave_fixed_caches_and_say_so(model, caplog) -> None:
    from meteora_core import record_routes

    if getattr(model, "meteora", None) is None:
        pytest.skip("nothing routes")
    decoder, batch = Decoder(model, "on"), batch_of(LENGTHS, ROOM, 3)
    wanted = decoder.decode(batch)
    with record_routes(model) as routes:
        assert decoder.decode(batch) == decoder.decode(batch) == wanted
    assert caplog.text.count("not replayed as CUDA graphs") == 1
    assert routes.steps(routes.paths[0])[0].indices.shape[:2] == batch.ids.shape
    assert decoder.decode(batch) == wanted


@pytest.mark.parametrize("decode", [decode_growing, lambda model, batch: FixedDecoder(model, 4, 256, 2, 0).decode(batch)])
def test_a_frozen_head_is_not_copied_for_every_row(decode: Callable[..., object]) -> None:
    """torch multiplies a slice that is not contiguous with a frozen weight row by row, on as many copies of the weight."""
    model = make_tiny_llama().eval().requires_grad_(False)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    decode(model, batch_of([5, 9, 7], [3, 3, 3]))
    assert seen
    assert all(hidden.shape[1] == 1 and hidden.is_contiguous() for hidden in seen)

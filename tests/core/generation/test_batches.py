"""Greedy answers to many prompts: independent of the batches, which are sorted by length and halved when memory runs out."""

from __future__ import annotations

import itertools

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from meteora_core import AdapterBank, attach
from meteora_core.errors import DataError
from meteora_core.generation.batches import BatchLimits, answer_all, plan
from meteora_core.generation.engine import Engine
from meteora_core.generation.prompts import Prompt, encode_prompts
from support.tiny_models import make_tiny_llama


def letters(eos_at_end: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, **{chr(97 + i): i + 3 for i in range(26)}}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if eos_at_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


PROMPTS = ["abc", "a", "hello there".replace(" ", ""), "zz", "thequickbrownfox"]


@pytest.fixture
def model(make_adapter):
    bank = AdapterBank.from_peft({"one": make_adapter("one", 1), "two": make_adapter("two", 2)})
    return attach(make_tiny_llama(initializer_range=0.3), bank)


def answers(model, batch_size, on_smaller=None, **options) -> dict[int, list[int]]:
    tokenizer = letters()
    made = answer_all(Engine(model, tokenizer, **options), encode_prompts(PROMPTS, tokenizer), BatchLimits(batch_size, 12), on_smaller)
    return {prompt.index: tokens for prompt, tokens in made}


def test_any_batch_size_gives_the_same_tokens(model) -> None:
    one = answers(model, 1)
    assert set(one) == set(range(5))
    assert one == answers(model, 2) == answers(model, 5) == answers(model, "auto")
    assert len({tuple(tokens) for tokens in one.values()}) > 1


def test_answers_equal_a_plain_argmax_loop(model) -> None:
    tokenizer = letters()
    for index, text in enumerate(PROMPTS):
        ids = tokenizer(text)["input_ids"]
        new: list[int] = []
        while len(new) < 12:
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == 2:
                break
            new.append(token)
        assert answers(model, 1)[index] == new


def test_answers_end_at_the_end_tokens_of_the_generation_configuration(model) -> None:
    model.generation_config.eos_token_id = 2
    free = answers(model, 5)
    index = max(free, key=lambda each: len(free[each]))
    other = free[index][4]
    model.generation_config.eos_token_id = [2, other]
    cut = {each: tokens[: tokens.index(other)] if other in tokens else tokens for each, tokens in free.items()}
    assert cut != free
    assert answers(model, 5) == answers(model, 1) == answers(model, 5, cuda_graphs="on") == cut


def test_no_repeat_ngram_size(model) -> None:
    free, strict = answers(model, 5), answers(model, 5, no_repeat_ngram_size=2)
    assert free != strict
    for index, tokens in strict.items():
        whole = [*letters()(PROMPTS[index])["input_ids"], *tokens]
        pairs = list(itertools.pairwise(whole))
        assert len(pairs) == len(set(pairs)) or len(letters()(PROMPTS[index])["input_ids"]) > len(set(letters()(PROMPTS[index])["input_ids"]))


def test_prompts_lose_an_eos_that_the_tokenizer_adds() -> None:
    prompt = encode_prompts(["ab"], letters(eos_at_end=True))[0]
    assert prompt.tokens == (1, 3, 4)
    assert encode_prompts([], letters()) == []


def test_automatic_batches_fit_the_budget_longest_first() -> None:
    prompts = [Prompt(i, (3,) * length) for i, length in enumerate([5, 50, 20, 20, 7, 90])]
    batches = plan(prompts, "auto", 10, 120)
    assert [prompt.index for batch in batches for prompt in batch] == [5, 1, 2, 3, 4, 0]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (len(batch[0].tokens) + 10) <= 120
    assert [len(batch) for batch in plan(prompts, 4, 10, 0)] == [4, 2]


def test_out_of_memory_halves_the_batch_and_loses_nothing(model, monkeypatch) -> None:
    whole = answers(model, 5)
    real = Engine.answer

    def small_card(engine, requests):
        if len(requests) > 1:
            raise torch.OutOfMemoryError("pretend")
        return real(engine, requests)

    monkeypatch.setattr(Engine, "answer", small_card)
    sizes: list[int] = []
    assert answers(model, 5, on_smaller=sizes.append) == whole
    assert sizes == [2, 1]

    def no_card(*_):
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(Engine, "answer", no_card)
    with pytest.raises(torch.OutOfMemoryError):
        answers(model, 5)


@pytest.mark.parametrize("wanted", ["auto", "on", "off"])
def test_fixed_caches_can_be_turned_on_and_off(model, monkeypatch, wanted) -> None:
    plain = answers(model, 5)
    engine = Engine(model, letters(), wanted)
    made = answer_all(engine, encode_prompts(PROMPTS, letters()), BatchLimits(5, 12))
    assert {prompt.index: tokens for prompt, tokens in made} == plain
    assert (engine.batch_cache is not None) == (wanted == "on")


def test_prompt_and_answer_together_have_a_limit() -> None:
    limits = BatchLimits("auto", 12, 10)
    assert [limits.request(Prompt(0, (3,) * length)).sampling.max_new_tokens for length in (1, 4, 9, 10, 30)] == [9, 6, 1, 1, 1]
    assert BatchLimits(1, 12).request(Prompt(0, (3,) * 30)).sampling.max_new_tokens == 12


def test_half_a_character_is_said() -> None:
    with pytest.raises(DataError, match="half of a character"):
        encode_prompts(["fine", "half \ud83d"], letters())

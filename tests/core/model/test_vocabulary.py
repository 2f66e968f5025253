"""Tokenizers with more tokens than the model's embedding."""

from __future__ import annotations

import pytest
import torch

from meteora_core.errors import CheckpointError, DataError
from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Request
from meteora_core.generation.sampling import Sampling
from meteora_core.json_files import write_jsonl
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.model.vocabulary import check_tokens, embedding_rows, padding_token
from meteora_core.trace.record import trace_tokens
from support.chat_world import byte_llama, byte_tokenizer
from support.evaluation_plans import plan_of, run
from support.evaluation_workspace import TASKS, make_workspace, rows


@pytest.fixture
def padded():
    """A tokenizer with a [PAD] token that was added later, and a model that was not resized."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer, byte_llama()


def test_padding_is_a_token_of_the_embedding(padded) -> None:
    tokenizer, model = padded
    assert (tokenizer.pad_token_id, embedding_rows(model)) == (259, 259)
    assert padding_token(model, tokenizer) == tokenizer.eos_token_id == 2
    assert padding_token(byte_llama(vocab_size=260), tokenizer) == 259
    tokenizer.pad_token = None
    assert padding_token(model, tokenizer) == 2
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    with pytest.raises(CheckpointError, match=r"end-of-sequence token '\[END\]' is number 260, but the model's embedding has 259 rows"):
        padding_token(model, tokenizer)


def test_tokens_beyond_the_embedding_are_named(padded) -> None:
    tokenizer, model = padded
    message = r"a text has the token '\[PAD\]' \(number 259\), but the model's embedding has 259 rows"
    check_tokens(model, tokenizer, [[1, 258], []])
    with pytest.raises(DataError, match=message):
        check_tokens(model, tokenizer, [[5], tokenizer("a[PAD]")["input_ids"]])
    with pytest.raises(DataError, match=message):
        list(Engine(model, tokenizer).stream(Request(tokenizer("a[PAD]")["input_ids"], Sampling(max_new_tokens=1))))


def test_an_evaluation_pads_with_a_token_of_the_embedding(tmp_path, make_adapter, monkeypatch) -> None:
    place = make_workspace(tmp_path, make_adapter, count=4)
    plan = plan_of(place, TASKS[:1], ("meteora",), save=False, routing=True, max_new_tokens=3)
    wanted = run(plan)[0]
    tokenizer = load_tokenizer(BaseReference(str(place.base)))
    tokenizer.add_tokens([f"<extra {number}>" for number in range(20)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= 112
    tokenizer.save_pretrained(place.base)
    made = run(plan)[0]
    assert [sample.ids for sample in made.results[TASKS[0]].samples] == [sample.ids for sample in wanted.results[TASKS[0]].samples]
    torch.testing.assert_close(made.results[TASKS[0]].routing.counts, wanted.results[TASKS[0]].routing.counts)
    write_jsonl(place.data / TASKS[0] / "test.jsonl", [*rows(TASKS[0], 2), {"prompt": "a <extra 19>", "response": "x"}])
    with pytest.raises(DataError, match=r"a text has the token '<extra 19>' \(number 12\d\), but the model's embedding has 112 rows"):
        run(plan)


def test_tracing_tokens_beyond_the_embedding_is_refused(padded, make_adapter) -> None:
    from meteora_core import AdapterBank, attach
    from support.tiny_models import make_tiny_llama

    tokenizer, _ = padded
    attached = attach(make_tiny_llama(), AdapterBank.from_peft({"one": make_adapter("one", 1)}), top_k=1)
    with pytest.raises(DataError, match="a text has the token"):
        trace_tokens(attached, tokenizer, [5, 259], ["prompt"] * 2)

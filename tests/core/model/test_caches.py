"""Models whose caches hold states in addition to or instead of keys and values: batches, padding, conversations, traces; and models without a cache."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from meteora_core import AdapterBank, attach
from meteora_core.errors import AdapterError, CheckpointError
from meteora_core.generation import engine as engine_module
from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Finished, Request
from meteora_core.generation.sampling import Sampling
from meteora_core.model import caches
from meteora_core.routing import record_routes
from meteora_core.trace.record import trace_tokens
from support.chat_world import byte_tokenizer
from support.generation import engine_of
from support.tiny_hybrids import make_hybrid
from support.tiny_models import make_tiny_llama

USABLE = ("lfm2", "qwen3_next", "falcon_h1", "granitemoehybrid", "bamba", "mamba")
LENGTHS, ROOM = (2, 5, 11), (3, 6, 6)


@pytest.fixture(scope="module")
def models():
    """One model of each kind."""
    return {kind: make_hybrid(kind) for kind in USABLE}


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 64, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(model, rows: list[int]) -> list[list[int]]:
    return engine_of(model).answer([Request(texts()[row], Sampling(ROOM[row])) for row in rows])


def by_transformers(model, ids: list[int], count: int) -> list[int]:
    made = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=3, eos_token_id=2)[0, len(ids) :].tolist()
    return made[: made.index(2)] if 2 in made else made


@pytest.mark.parametrize("kind", USABLE)
def test_rows_that_leave_the_batch_early_answer_as_they_do_alone_and_in_transformers(models, kind, monkeypatch) -> None:
    model, kept = models[kind], []
    real = caches.keep_rows
    monkeypatch.setattr(caches, "keep_rows", lambda cache, rows: kept.append(real(cache, rows)) or kept[-1])
    together = answers(model, [0, 1, 2])
    assert kept
    assert all(kept)
    assert together == [by_transformers(model, ids, count) for ids, count in zip(texts(), ROOM, strict=True)]
    # A cache that cannot shrink keeps its rows.
    monkeypatch.setattr(caches, "keep_rows", lambda cache, rows: False)
    assert answers(model, [0, 1, 2]) == together
    # Padding that would change a row's states is left out: rows of one length go together.
    monkeypatch.setattr(engine_module, "padding_is_safe", lambda model: False)
    assert answers(model, [2, 0, 1]) == [together[2], together[0], together[1]]


@pytest.mark.parametrize("kind", USABLE)
def test_a_conversation_answers_as_if_it_were_new(models, kind) -> None:
    model, tokenizer = models[kind], byte_tokenizer()

    def answer(engine: Engine, ids: list[int]) -> tuple[list[int], int]:
        *_, finished = engine.stream(Request(ids, Sampling(max_new_tokens=4)))
        assert isinstance(finished, Finished)
        return list(finished.ids), finished.reused

    engine = Engine(model, tokenizer)
    first, second, other = texts()[2], texts()[1], texts()[0]
    begun, _ = answer(engine, first)
    for ids in (first + begun + second, first + other, first[:4] + other, [*first, *begun, *second, 9, 8]):
        assert answer(engine, ids)[0] == by_transformers(model, ids, 4)


def test_mamba_reads_a_text_again_where_its_states_would_be_wrong(models) -> None:
    assert not caches.can_be_cut(decode_cache(models["mamba"]))
    assert caches.can_be_cut(decode_cache(make_tiny_llama()))
    assert caches.padding_is_safe(models["mamba"])
    assert caches.pieces_are_safe(make_tiny_llama())


def decode_cache(model) -> object:
    with torch.inference_mode():
        return caches.cache_of(model, model(input_ids=torch.tensor([[5, 6]]), use_cache=True))


def test_models_without_a_cache_are_refused_in_one_line(monkeypatch) -> None:
    with pytest.raises(CheckpointError, match="recurrent_gemma models cannot be used: their output holds no past_key_values"):
        caches.check_decoding(make_hybrid("recurrent_gemma"))

    class NoCache(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    with pytest.raises(CheckpointError, match="NoCache models cannot be used: they take no cache"):
        caches.check_decoding(NoCache())

    def broken(*_: object, **__: object) -> None:
        raise ValueError("states of a wrong shape\nmore")

    model = make_hybrid("mamba")
    monkeypatch.setattr(model.backbone, "forward", broken)
    with pytest.raises(CheckpointError, match=r"mamba models cannot be used: states of a wrong shape$"):
        caches.check_decoding(model)


def bank_of(tmp_path, **config: object) -> AdapterBank:
    """Two random adapters of the tiny Mamba, made by PEFT."""
    folders = {}
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        adapted = get_peft_model(make_hybrid("mamba"), LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **config))
        adapted.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    return AdapterBank.from_peft(folders)


def test_mamba_with_adapters_decodes_and_is_traced(tmp_path) -> None:
    model = attach(make_hybrid("mamba"), bank_of(tmp_path, target_modules=["in_proj", "x_proj"]), top_k=1)
    together = answers(model, [0, 1, 2])
    assert together == [by_transformers(model, ids, count) for ids, count in zip(texts(), ROOM, strict=True)]
    assert together != answers(make_hybrid("mamba"), [0, 1, 2])
    ids = texts()[2]
    picture = trace_tokens(model, byte_tokenizer(), ids, ["prompt"] * len(ids))
    with record_routes(model) as routes, torch.inference_mode():
        model(torch.tensor([ids]))
    assert torch.equal(picture.indices, routes.packed()[0])


def test_adapters_of_modules_that_are_never_called_are_refused(tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"adapters of backbone\.layers\.0\.mixer\.dt_proj would have no effect"):
        attach(make_hybrid("mamba"), bank_of(tmp_path, target_modules=["in_proj", "dt_proj"]))
    assert caches.bypassed(make_tiny_llama(), {"nothing": torch.nn.Identity()}) == []

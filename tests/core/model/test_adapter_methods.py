"""transformers' habits on a model with adapters attached: active adapters, pipelines, and PEFT's own model of one adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import pipeline

from meteora_core import AdapterBank, attach, detach
from meteora_core.errors import UsageError
from meteora_core.model.attach import meteora_layers
from support.chat_world import byte_llama, byte_tokenizer, write_adapter
from support.tiny_models import make_tiny_llama

NAMES = ("one", "two", "three")
IDS = torch.tensor([[1, 9, 8, 7, 30, 31]])


@pytest.fixture
def folders(make_adapter: Any) -> dict[str, Any]:
    return {name: make_adapter(name, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def model(folders: dict[str, Any]) -> Any:
    attached = attach(make_tiny_llama(), AdapterBank.from_peft(folders))
    with torch.no_grad():
        for _, layer in meteora_layers(attached):
            layer.gate.mul_(30)
    return attached


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_set_adapter_forces_one_and_lets_the_gates_choose_among_several(model: Any) -> None:
    free = logits_of(model)
    assert model.active_adapters() == list(NAMES)
    model.set_adapter("two")
    assert model.active_adapters() == ["two"]
    alone = logits_of(model)
    with model.meteora.force("three"):
        assert model.active_adapters() == ["three"]
    model.set_adapter(["one", "three"])
    assert model.active_adapters() == ["one", "three"]
    some = logits_of(model)
    model.disable_adapters()
    assert model.active_adapters() == []
    assert torch.equal(logits_of(model), logits_of(make_tiny_llama()))
    model.enable_adapters()
    assert torch.equal(logits_of(model), some)
    model.set_adapter(NAMES)
    assert torch.equal(logits_of(model), free)
    with model.meteora.force("two"):
        assert torch.equal(logits_of(model), alone)
    model.meteora.mute(["two"])
    assert model.active_adapters() == ["one", "three"]
    assert torch.equal(logits_of(model), some)
    assert not torch.equal(some, free)


def test_a_set_adapter_is_pefts_model_of_its_folder(model: Any, folders: dict[str, Any]) -> None:
    for name in NAMES:
        peft = PeftModel.from_pretrained(make_tiny_llama(), str(folders[name])).eval()
        model.set_adapter(name)
        torch.testing.assert_close(logits_of(model), logits_of(peft), rtol=0, atol=1e-5)


def test_unknown_names_and_methods_without_meaning_are_refused(model: Any) -> None:
    for names, text in (("ones", "no adapter named 'ones'"), (["one", "x"], "no adapter named 'x'"), ([], "no adapter is named")):
        with pytest.raises(UsageError, match=text):
            model.set_adapter(names)
    assert model.active_adapters() == list(NAMES)
    for method in ("load_adapter", "add_adapter", "delete_adapter", "get_adapter_state_dict"):
        with pytest.raises(UsageError, match=f"{method} does not work") as caught:
            getattr(model, method)("one")
        assert caught.value.hint


def test_copies_have_methods_of_their_own_and_detaching_restores_transformers(model: Any) -> None:
    twin = copy.deepcopy(model)
    twin.set_adapter("one")
    assert (twin.active_adapters(), model.active_adapters()) == (["one"], list(NAMES))
    detach(model)
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.active_adapters()


def test_pipelines_generate_what_the_model_generates(tmp_path: Any) -> None:
    base, tokenizer = byte_llama(), byte_tokenizer()
    bank = AdapterBank.from_peft({name: write_adapter(tmp_path / name, base, tmp_path, seed) for seed, name in enumerate(NAMES)})
    model = attach(base, bank)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = {}
    for name in (None, "one", "two"):
        model.set_adapter(NAMES if name is None else name)
        ids = tokenizer("Hello", return_tensors="pt")
        wanted = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0][ids["input_ids"].shape[1] :], skip_special_tokens=True)
        options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
        assert generate("Hello", **options) == [{"generated_text": wanted}]
        assert generate(["Hello", "Hello"], batch_size=2, **options) == [[{"generated_text": wanted}]] * 2
        answers[name] = wanted
    assert len(set(answers.values())) > 1

"""Adapters on lm_head, tied to the embedding or not, compared with PEFT: recording, training, resizing, saving."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from meteora_core import AdapterBank, attach, detach, load_checkpoint, save_checkpoint
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import RoutingOptions, record_routes
from meteora_core.training.encoding import TrainRow, collate
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.loop import Counts
from meteora_core.training.ridge import ridge_gates
from support.tiny_models import declare_trained, make_tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
ROWS = [TrainRow(tuple(IDS[0].tolist()), (0,) * 11, 4), TrainRow(tuple(IDS[1, :7].tolist()), (1,) * 7, 3)]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture
def folders(tied: bool, tmp_path: Path) -> dict[str, Path]:
    """Two adapters that PEFT trained on the output layer too."""
    made = {}
    for seed, name in enumerate(("one", "two")):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        model = get_peft_model(make_tiny_llama(tie_word_embeddings=tied), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        made[name] = tmp_path / name
        model.save_pretrained(made[name], save_embedding_layers=False)
    return made


@pytest.fixture
def model(folders, tied):
    return attach(make_tiny_llama(tie_word_embeddings=tied), AdapterBank.from_peft(folders), seed=3)


def is_tied(model) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_each_adapter_equals_peft_and_the_head_stays_tied(model, folders, tied) -> None:
    for name, folder in folders.items():
        expected = PeftModel.from_pretrained(make_tiny_llama(tie_word_embeddings=tied), folder).eval()
        options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        with torch.no_grad(), model.meteora.force(name):
            torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)
            assert torch.equal(model.generate(IDS, **options), expected.generate(input_ids=IDS, **options))
        with torch.no_grad(), model.meteora.force(torch.tensor([0, 1])):
            mine = model(IDS, logits_to_keep=2).logits
        row = list(folders).index(name)
        torch.testing.assert_close(mine[row], expected(IDS).logits[row, -2:], rtol=1e-5, atol=1e-5)
    assert is_tied(model) == tied
    before = make_tiny_llama(tie_word_embeddings=tied)(IDS).logits
    assert torch.equal(detach(model)(IDS).logits, before)
    assert is_tied(model) == tied


def test_recording_leaves_the_head_out_of_the_shares_and_keeps_what_it_chose(model) -> None:
    with torch.no_grad(), record_routes(model) as routes:
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=2)
    assert "lm_head" not in routes.paths
    assert routes.shares().shape == (2, 13, 2)
    assert routes.packed()[0].shape == (13, 2, 2)
    assert [tuple(step.indices.shape) for step in routes.steps("lm_head")] == [(2, 1, 2)] * 3


def test_the_head_uses_the_options_of_the_text_that_its_token_belongs_to(model) -> None:
    state, inputs = model.meteora, []
    model.lm_head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    texts = [RoutingOptions(top_k=2), RoutingOptions(forced=state.names[1])]
    with torch.no_grad(), state.apply_packed(texts, [3, 2], [4]):
        found = model(input_ids=torch.tensor([[3, 4, 5, 6, 7]]), use_cache=False, logits_to_keep=torch.tensor([4])).logits
    with torch.no_grad(), state.force(state.names[1]):
        expected = model.lm_head(inputs[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_tie_weights_and_resizing_keep_the_adapters(model, tied) -> None:
    with torch.no_grad():
        before = model(IDS).logits
        model.tie_weights()
        assert is_tied(model) == tied
        assert torch.equal(model(IDS).logits, before)
        model.resize_token_embeddings(72)
        assert is_tied(model) == tied
        resized = model(IDS).logits
        assert resized.shape[-1] == 72
        torch.testing.assert_close(resized[..., :64], before, rtol=1e-6, atol=1e-6)
        model.resize_token_embeddings(64)
        torch.testing.assert_close(model(IDS).logits, before, rtol=1e-6, atol=1e-6)
    detach(model)
    model.resize_token_embeddings(80)
    assert model(IDS).logits.shape[-1] == 80


def test_the_head_gets_gates_by_ridge_and_by_gradients(model) -> None:
    batch = collate(ROWS, 2)
    assert ridge_gates(model, [ROWS], 2) == 18
    layer = dict(meteora_layers(model))["lm_head"]
    assert layer.gate.any()
    result = GateObjective(50.0)(copy.deepcopy(model).train(), batch, Counts(16, 18))
    assert torch.isfinite(result.loss)
    GateObjective(1.0)(model, batch, Counts(16, 18))
    assert layer.gate.grad is not None
    assert layer.gate.grad.abs().sum() > 0


def test_adapters_of_the_head_are_saved_and_loaded(model, tied, tmp_path: Path) -> None:
    for adapters in (False, True):
        save_checkpoint(declare_trained(model), tmp_path / "saved", adapters=adapters)
        loaded = load_checkpoint(tmp_path / "saved", make_tiny_llama(tie_word_embeddings=tied))
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert is_tied(loaded) == tied

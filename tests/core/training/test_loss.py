"""The chunked language-model loss against the plain one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM

from meteora_core.training import loss as loss_module
from meteora_core.training.encoding import TrainRow, collate
from meteora_core.training.loss import lm_loss_sum
from support.tiny_models import make_tiny_llama


def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [TrainRow(tuple(torch.randint(3, 64, (n,), generator=generator).tolist()), (0,) * n, n // 2) for n in (13, 4, 9)]
    return collate(rows, 2)


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_chunks_change_neither_loss_nor_gradients(monkeypatch, chunk) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    results = []
    for chunked in (False, True):
        model = get_peft_model(
            make_tiny_llama().double(),
            LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
            autocast_adapter_dtype=False,
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        loss = lm_loss_sum(model, batch(), chunked=chunked)
        loss.backward()
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]))
    (plain, plain_gradients), (chunked_loss, chunked_gradients) = results
    torch.testing.assert_close(chunked_loss, plain)
    assert len(plain_gradients) == len(chunked_gradients) > 0
    for a, b in zip(plain_gradients, chunked_gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_the_head_is_not_split_where_chunks_would_be_wrong() -> None:
    model = make_tiny_llama()
    model.requires_grad_(False)
    assert loss_module._plain_head(model) is not None
    model.lm_head.weight.requires_grad_(True)
    assert loss_module._plain_head(model) is None
    model.lm_head.weight.requires_grad_(False)
    model.config.final_logit_softcapping = 30.0
    assert loss_module._plain_head(model) is None


class Capped(LlamaForCausalLM):
    """An architecture that changes its logits by a rule that no setting names."""

    def forward(self, *arguments, **named):
        output = super().forward(*arguments, **named)
        output.logits = self.rule(output.logits)
        return output


RULES = {"none": lambda x: x, "capped": lambda x: 30 * torch.tanh(x / 30), "scaled": lambda x: x / 4, "moved": lambda x: x + 3}


class Closed(LlamaForCausalLM):
    """An architecture that calls its layers itself."""

    def forward(self, *arguments, **named):
        self.model.layers[0].mlp(self.model.norm.weight[None])
        return super().forward(*arguments, **named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "plain"), [("none", True), ("capped", False), ("scaled", False), ("moved", False)])
def test_a_probe_finds_logits_that_are_not_the_heads_alone(dtype, name, plain) -> None:
    model = Capped(make_tiny_llama().config).requires_grad_(False).to(dtype)
    model.rule = RULES[name]
    drawn = torch.random.get_rng_state()
    whole = lm_loss_sum(model, batch(), chunked=False)
    torch.testing.assert_close(lm_loss_sum(model, batch()), whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    assert (loss_module._plain_head(model) is not None) == plain
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert "forward" not in model.model.__dict__


def test_the_probe_reaches_a_decoder_within_the_decoder() -> None:
    config = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32)
    assert loss_module._plain_head(OPTForCausalLM(config).requires_grad_(False)) is not None


def test_a_model_that_cannot_be_probed_is_judged_by_its_configuration() -> None:
    model = Closed(make_tiny_llama().config).requires_grad_(False)
    ran = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: ran.append(1))
    assert loss_module._plain_head(model) is not None
    assert "forward" not in model.model.__dict__
    assert not ran
    model.config.lm_head_multiplier = 0.5
    assert loss_module._plain_head(model) is None

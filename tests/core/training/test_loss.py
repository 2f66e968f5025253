"""The chunked language-model loss against the plain one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from meteora_core.training import loss as loss_module
from meteora_core.training.loss import lm_loss_sum
from meteora_core.training.rows import TrainRow, collate
from tiny_models import make_tiny_llama


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


def test_the_head_is_left_alone_where_chunks_would_be_wrong() -> None:
    model = make_tiny_llama()
    model.requires_grad_(False)
    assert loss_module._plain_head(model) is not None
    model.lm_head.weight.requires_grad_(True)
    assert loss_module._plain_head(model) is None
    model.lm_head.weight.requires_grad_(False)
    model.config.final_logit_softcapping = 30.0
    assert loss_module._plain_head(model) is None

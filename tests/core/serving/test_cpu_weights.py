"""Linear layers with weights in oneDNN's layout give the results of the usual ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from meteora_core.chat.chat_model import ChatModel
from meteora_core.serving import cpu_weights
from meteora_core.serving.cpu_weights import PackedLinear, blocks, pack_weights, unpack_weights

pytestmark = pytest.mark.skipif(not cpu_weights._works(), reason="this build of PyTorch has no oneDNN")


def test_packed_layers_follow_their_weights() -> None:
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 7, bias=False), nn.Linear(7, 7).to(torch.bfloat16))
    x = torch.randn(2, 5, 48)
    assert pack_weights(model) == 2
    assert pack_weights(model) == 0
    assert [type(module) for module in model] == [PackedLinear, PackedLinear, nn.Linear]
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "1.weight", "2.weight", "2.bias"]
    with torch.no_grad():
        for _ in range(2):
            expected = nn.functional.linear(nn.functional.linear(x, model[0].weight, model[0].bias), model[1].weight)
            assert torch.allclose(model[1](model[0](x)), expected, atol=1e-5)
            model[0].weight.mul_(2.0)
            model[1].weight = nn.Parameter(torch.randn(7, 32))
    model[1](model[0](x)).sum().backward()
    assert model[0].weight.grad is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin] == [nn.Linear] * 3
        assert torch.equal(twin[1].weight, model[1].weight)
    unpack_weights(model)
    assert [type(module) for module in model] == [nn.Linear] * 3


def test_any_number_of_tokens_takes_few_sizes() -> None:
    layer = PackedLinear(nn.Linear(48, 32))
    with torch.inference_mode():
        for count in (0, 1, 15, 16, 17, 31, 63, 64, 65, 130, 200):
            x = torch.randn(count, 48)
            assert torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
            assert layer(x[None]).shape == (1, count, 32)
    sizes = {len(block) for count in range(1, 600) for block, _ in blocks(torch.ones(count, 1))}
    assert sizes == {*range(1, 17), 32, 48, 64}


def test_nothing_is_packed_without_enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(48, 32))
    monkeypatch.setattr(cpu_weights, "available_bytes", lambda: 4 * 48 * 32 * cpu_weights.SPARE - 1)
    assert pack_weights(model) == 0


def test_a_model_with_adapters_gives_the_same_logits(chat_model: ChatModel) -> None:
    model, ids = chat_model.model, torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        count = pack_weights(model)
        after = model(input_ids=ids).logits
        unpack_weights(model)
    assert count > 0
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.allclose(before, after, atol=1e-5)

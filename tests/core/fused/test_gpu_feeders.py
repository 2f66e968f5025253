"""A fused model on a CUDA GPU with sizes at which inputs lie wide: logits, CUDA graphs of prefill, checkpoints loaded later."""

from __future__ import annotations

import pytest
import torch

from meteora_core import attach, fuse, unfuse
from meteora_core.bench.end_to_end import random_bank, random_model
from meteora_core.bench.shapes import ModelShape
from meteora_core.fused import group as group_module
from meteora_core.fused.feeders import Feeder
from meteora_kernels import group

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPE = ModelShape("small", 2048, 512, 4096, 16, 4, 2, 1024)


@torch.no_grad()
def test_prefill_lies_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, all adapters chosen, so that no near tie falls differently."""
    torch.manual_seed(0)
    group_module.warn_once.cache_clear()
    model = random_model(SHAPE, 2, torch.bfloat16, torch.device("cuda"))
    attach(model, random_bank(model, 3, 16, torch.bfloat16), top_k=3)
    ids = torch.randint(0, 1024, (2, 700), device="cuda")
    sizes = {"decode": ids[:, :1], "120 tokens": ids[:, :60], "600": ids[:, :300], "1,400": ids}
    expected = {name: model(some, use_cache=False).logits.float() for name, some in sizes.items()}
    assert fuse(model) == 8
    assert sum(isinstance(module, Feeder) for module in model.modules()) == 6
    places, forward = [], group.run_members
    monkeypatch.setattr(group, "run_members", lambda *all, in_place: [places.append(in_place), forward(*all, in_place=in_place)][1])
    for name, some in sizes.items():
        places.clear()
        found = model(some, use_cache=False).logits
        assert float((found.float() - expected[name]).norm() / expected[name].norm()) < 0.03, name
        assert torch.equal(model(some, use_cache=False).logits, found), name
        assert places == ([True, False, True, True] * 4 if name in ("600", "1,400") else [False] * 16), name
    # While a graph is captured, transformers builds a mask where it leaves it out otherwise, and with one PyTorch's attention takes another kernel.
    mask = torch.full((700, 700), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16, device="cuda").triu(1).expand(2, 1, -1, -1)
    wanted = [model(some, attention_mask=mask, use_cache=False).logits for some in (ids, ids.flip(1))]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    given = ids.clone()
    with torch.cuda.graph(graph):
        output = model(given, attention_mask=mask, use_cache=False).logits
    for some, logits in zip((ids, ids.flip(1)), wanted, strict=True):
        given.copy_(some)
        graph.replay()
        assert torch.equal(output, logits)
    model.load_state_dict({name: tensor * -1.5 if name.endswith("lora_B") else tensor.clone() for name, tensor in model.state_dict().items()})
    found = model(ids, use_cache=False).logits.float()
    assert group_module.warn_once.cache_info().currsize == 0
    unfuse(model)
    apart = model(ids, use_cache=False).logits.float()
    assert float((found - apart).norm() / apart.norm()) < 0.03
    assert float((found - expected["1,400"]).norm() / apart.norm()) > 0.1

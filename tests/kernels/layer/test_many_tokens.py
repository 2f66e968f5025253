"""GEMMs over all rows on top of a finished base output, forward and backward; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Adapters, Routing, lora_mixture
from meteora_kernels.layer.many_tokens import many_tokens
from meteora_kernels.steps.middle import middle
from meteora_kernels.steps.up import up
from support.layer_shapes import DEVICE, SHAPES, UNIFORM, close
from support.mixture_cases import make


@pytest.mark.parametrize(("ranks", "hidden", "out", "tokens", "top_k"), [shape for shape in SHAPES if "8192" not in str(shape.id)])
def test_gradients_equal_the_reference(ranks: list[int], hidden: int, out: int, tokens: int, top_k: int) -> None:
    grads = []
    for backend in ("reference", "triton"):
        case = make(ranks, hidden, out, (tokens,), torch.float32, device=DEVICE).wanting_grad()
        output, logits = lora_mixture(*case.arguments, top_k=top_k, temperature=1.5, backend=backend, return_logits=True)
        (output.square().mean() + logits.sin().mean()).backward()
        grads.append([tensor.grad for tensor in case.floats])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_b_with_and_without_base() -> None:
    case = make(UNIFORM, 20, 40, (30,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    adapters, routing = Adapters.of_layer(*tensors), Routing()
    down, logits = x @ case.lora_A.t(), x @ case.gate.t()
    inner = middle(logits, down, adapters, routing)
    out = torch.empty_like(base)
    up(inner, adapters, None, out)
    close(out, inner @ case.lora_B)
    up(inner, adapters, base, out)
    close(out, base + inner @ case.lora_B)
    routed_out = torch.empty_like(base)
    up(down, adapters, base, routed_out, logits=logits, routing=routing)
    close(routed_out, out)


def test_operator_is_sound_for_compilers() -> None:
    case = make([4] * 6, 16, 9, (20,), torch.float32, device=DEVICE).wanting_grad()
    x, base, *tensors = case.arguments
    flat = many_tokens.flat((x, None, base, Adapters.of_layer(*tensors, 4), Routing(), True))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    assert set(torch.library.opcheck(many_tokens.op, flat, test_utils=checks).values()) == {"SUCCESS"}

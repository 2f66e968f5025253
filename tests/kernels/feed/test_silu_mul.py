"""The kernel of the gated activation against float64 and PyTorch; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels.feed.silu_mul import silu_mul, silu_mul_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 72), (3, 2500)])
def test_gated_equals_its_formula(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Inputs are halves of one tensor with large values of both signs, and values next to the output do not change."""
    both = torch.randn(tokens, 2 * width, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    both[0, :3] = torch.tensor([80.0, -80.0, 0.0], dtype=dtype)
    gate, up = both.chunk(2, dim=1)
    memory = torch.full((tokens, width + 8), float("nan"), dtype=dtype, device=DEVICE)
    out = memory[:, 4 : width + 4]
    silu_mul(gate, up, out)
    close = {"rtol": 3 * torch.finfo(dtype).eps if dtype == torch.float16 else 3e-6, "atol": 1e-7}
    torch.testing.assert_close(out.double(), silu_mul_reference(gate.double(), up.double()), **close)
    torch.testing.assert_close(out, silu_mul_reference(gate, up), **close)
    assert bool(memory[:, :4].isnan().all())
    assert bool(memory[:, width + 4 :].isnan().all())


def test_no_tokens() -> None:
    empty = torch.empty(0, 16, device=DEVICE)
    silu_mul(empty, empty, empty)

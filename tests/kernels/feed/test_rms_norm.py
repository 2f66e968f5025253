"""The kernel of the norm against its formula in float64 and against PyTorch; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels.feed.rms_norm import rms_norm, rms_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 16), (5, 72), (3, 1000), (7, 4096)])
def test_norm_equals_its_formula(tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """Rows have gaps on both sides, one is so small that epsilon matters, and values next to the output do not change."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, hidden + 5, generator=generator).to(DEVICE, dtype)[:, 2 : hidden + 2]
    x[-1] *= 1e-3
    weight = torch.rand(hidden, generator=generator).to(DEVICE, dtype) + 0.5
    memory = torch.full((tokens, hidden + 8), float("nan"), dtype=dtype, device=DEVICE)
    out = memory[:, 4 : hidden + 4]
    rms_norm(x, weight, 1e-5, out)
    exact = rms_norm_reference(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps if dtype == torch.float16 else 2e-6, atol=1e-9)
    torch.testing.assert_close(out, rms_norm_reference(x, weight, 1e-5), rtol=2 * torch.finfo(dtype).eps if dtype == torch.float16 else 2e-6, atol=1e-9)
    assert bool(memory[:, :4].isnan().all())
    assert bool(memory[:, hidden + 4 :].isnan().all())
    again = torch.empty_like(x)
    rms_norm(x, weight, 1e-5, again)
    assert torch.equal(again, out)


def test_no_tokens() -> None:
    empty = torch.empty(0, 16, device=DEVICE)
    rms_norm(empty, torch.ones(16, device=DEVICE), 1e-5, empty)

"""The kernel of rotary embeddings against transformers' function and float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels.attention.rotary import can_rotate, rotate, rotate_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "tokens", "width"), [(4, 2, 1, 16), (9, 3, 5, 12), (17, 17, 3, 64)])
def test_equals_the_function_of_transformers(heads: int, key_heads: int, tokens: int, width: int, dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    make = torch.Generator().manual_seed(1)
    query = torch.randn(1, tokens, heads, width, generator=make).to(DEVICE, dtype).transpose(1, 2)
    key = torch.randn(1, tokens, 2, key_heads, width, generator=make).to(DEVICE, dtype)[:, :, 1].transpose(1, 2)
    angles = torch.randn(1, tokens, width // 2, generator=make).repeat(1, 1, 2)
    cos, sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
    assert can_rotate(query, key, cos, sin)
    found, expected, plain = rotate(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), rotate_reference(query, key, cos, sin)
    exact = rotate_reference(query.double(), key.double(), cos.double(), sin.double())
    eps = torch.finfo(dtype).eps
    for one, other, third, wide in zip(found, expected, plain, exact, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), wide, rtol=eps, atol=4 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(one, other, rtol=2 * eps, atol=4 * eps)
        assert torch.equal(other, third)


def test_other_forms_are_refused() -> None:
    query, cos = torch.randn(1, 4, 3, 8), torch.randn(1, 3, 8)
    assert can_rotate(query, query, cos, cos)
    assert not can_rotate(query.repeat(2, 1, 1, 1), query, cos, cos)
    assert not can_rotate(query, query, cos[..., :4], cos[..., :4])
    assert not can_rotate(query.double(), query.double(), cos.double(), cos.double())

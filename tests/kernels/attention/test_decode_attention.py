"""Attention over slots against plain PyTorch; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meteora_kernels.attention import decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "key_heads", "width", "window", "pieces"), [(4, 2, 16, 0, 1), (3, 3, 24, 0, 4), (8, 1, 32, 20, 1), (4, 1, 16, 90, 2)])
def test_equals_plain_attention(heads: int, key_heads: int, width: int, window: int, pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of several lengths, the first without earlier tokens; unused columns hold NaN, and nothing but the new column changes."""
    monkeypatch.setattr(decode, "pieces_of", lambda *_: pieces)
    make = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(DEVICE, dtype)

    positions = torch.tensor([0, 5, 63, 64, 199], device=DEVICE)
    count, columns = len(positions), 200
    query, key, value = random(heads, count, width), random(key_heads, count, width), random(count, key_heads, 2 * width)[..., width:]
    stored = [random(count + 1, key_heads, columns + 56, width) for _ in range(2)]
    for tensor in stored:
        for row, position in enumerate(positions.tolist()):
            tensor[row, :, position:] = float("nan")
    new: dict[str, Any] = {"query": query.transpose(0, 1), "key": key.transpose(0, 1), "value": value}
    assert decode.can_attend(**new)
    mine = [tensor.clone() for tensor in stored]
    found = decode.attend(**new, slots=(mine[0], mine[1]), positions=positions, columns=columns, scaling=width**-0.5, window=window)
    exact = [tensor.double().nan_to_num() for tensor in stored]
    wide = {name: tensor.double() for name, tensor in new.items()}
    expected = decode.attend_reference(**wide, slots=(exact[0], exact[1]), positions=positions, columns=columns, scaling=width**-0.5, window=window)
    close = {"rtol": 2e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 2e-3}
    torch.testing.assert_close(found.double(), expected, **close)
    rows = torch.arange(count, device=DEVICE)
    for tensor, before, part in zip(mine, stored, (new["key"], value), strict=True):
        before[rows, :, positions] = part
        assert torch.equal(tensor.nan_to_num(7.0), before.nan_to_num(7.0))

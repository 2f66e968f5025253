"""Sizes of layers that the kernel tests share, many more on a GPU, and the reference's output."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import lora_mixture
from support.mixture_cases import Case

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
UNIFORM = [8] * 28
SHAPES = [
    pytest.param(UNIFORM, 33, 17, 1, 2, id="28-one-token"),
    pytest.param(UNIFORM, 33, 17, 6, 2, id="28-few"),
    pytest.param(UNIFORM, 40, 24, 21, 2, id="28-many"),
    pytest.param([3, 0, 8, 1, 5], 20, 40, 4, 3, id="mixed-few"),
    pytest.param([3, 0, 8, 1, 5], 20, 40, 70, 3, id="mixed-many", marks=pytest.mark.slow),
    pytest.param([3, 0, 40, 1, 5, 17], 20, 40, 1, 3, id="wide-one-token"),
    pytest.param([3, 0, 40, 1, 5, 17], 20, 40, 4, 3, id="wide-few"),
    pytest.param([4], 16, 9, 3, 1, id="single"),
    pytest.param([2] * 9, 16, 9, 5, 8, id="top-8"),
]
if GPU:
    SHAPES += [
        pytest.param([rank] * adapters, 257, 129, tokens, top_k, id=f"{adapters}x{rank}-top{top_k}-{tokens}")
        for adapters, rank, top_k in ((1, 1, 1), (512, 1, 8), (512, 8, 2), (28, 8, 2), (64, 16, 4), (4, 256, 2), (200, 32, 3))
        for tokens in (1, 7, 16, 17, 64, 100, 1025)
    ]
    SHAPES += [pytest.param(UNIFORM, 576, 1536, 8192, 2, id="8192-tokens")]


def close(got: object, expected: object, dtype: torch.dtype = torch.float32) -> None:
    """Equal up to the rounding of ``dtype``."""
    size = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=size, atol=size)


def routed(case: Case, top_k: int, temperature: float = 1.5) -> torch.Tensor:
    """The reference's output in float64."""
    wide = Case(*(tensor.detach().double() for tensor in case.floats), case.scaling, case.offsets)
    output = lora_mixture(*wide.arguments, top_k=top_k, temperature=temperature, backend="reference")
    assert isinstance(output, torch.Tensor)
    return output

"""The compiled kernels on a CUDA GPU: errors against float64, two runs bit-equal, no host waits, CUDA graphs; over ranks, N, top-k, odd widths, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import lora_mixture
from support.mixture_cases import Case, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

DEVICE = "cuda"
MORE = 1.2
"""The largest error of a mixture, as a multiple of the error of the base linear."""
ALL, SOME = (1, 7, 16, 17, 64, 65, 100, 1025), (1, 16, 48, 300)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
GRID = [
    pytest.param(ranks, hidden, out, top_k, dtype, tokens, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, ranks, hidden, out, top_k, dtypes, tokens in (
        ("28x8", [8] * 28, 576, 1536, 2, (BRAIN, HALF, SINGLE), (*ALL, 8192)),
        ("1x1", [1], 129, 65, 1, (BRAIN, SINGLE), SOME),
        ("512x1-top8", [1] * 512, 257, 129, 8, (BRAIN,), SOME),
        ("512x16", [16] * 512, 256, 384, 2, (BRAIN, HALF), (*SOME, 2048)),
        ("4x256", [256] * 4, 320, 201, 2, (BRAIN, SINGLE), SOME),
        ("200x32-top3", [32] * 200, 257, 130, 3, (BRAIN,), SOME),
        ("mixed-top3", [3, 0, 64, 1, 5, 17], 95, 77, 3, (BRAIN, HALF, SINGLE), SOME),
        ("16x8-top8", [8] * 16, 192, 200, 8, (BRAIN,), SOME),
    )
    for dtype in dtypes
]


def layer(ranks: list[int], hidden: int, out: int, tokens: int, dtype: torch.dtype) -> tuple[Case, Tensor]:
    """Inputs with the base output of a linear, and its weight. The adapters contribute about a fifth of the output."""
    case = make(ranks, hidden, out, (tokens,), torch.float32, device=DEVICE)
    generator = torch.Generator().manual_seed(7)
    weight = (torch.randn(out, hidden, generator=generator) * hidden**-0.5).to(DEVICE, dtype)
    x = case.x.to(dtype)
    small = (case.gate.to(dtype), case.lora_A.to(dtype), (case.lora_B * 0.2).to(dtype))
    return Case(x, F.linear(x, weight), *small, case.scaling, case.offsets), weight


def error(got: Tensor, wide: Tensor) -> float:
    """The relative error, as the median over tokens, because a near tie that is decided differently is not a rounding error."""
    return float(((got.double() - wide).norm(dim=1) / wide.norm(dim=1)).median())


def allowance(case: Case, wide: Tensor, own: float, ranks: list[int], top_k: int) -> float:
    """The largest value of :func:`error`: 20 % above the base's error ``own``; in float32 plus the rounding of the adapters' two sums.

    A sum of n float32 terms, taken one after the other, is off by about ``sqrt(n) * eps / 2`` of itself, here n = hidden + k * r; that is
    weighed by the adapters' part of the output. In 16 bits the rounding of the output hides it.
    """
    if case.x.dtype != SINGLE:
        return MORE * own + 1e-9
    part = float(((wide - case.base.double()).norm(dim=1) / wide.norm(dim=1)).median())
    return MORE * own + part * (case.x.shape[1] + top_k * max(ranks)) ** 0.5 * torch.finfo(SINGLE).eps / 2


def exact(case: Case, top_k: int) -> Tensor:
    """The mixture in float64, on top of the given base output."""
    wide = Case(*(tensor.double() for tensor in case.floats), case.scaling, case.offsets)
    return lora_mixture(*wide.arguments, top_k=top_k, backend="reference")  # type: ignore[return-value]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise an error in the block if the host waits for the GPU."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("ranks", "hidden", "out", "top_k", "dtype", "counts"), GRID)
@torch.no_grad()
def test_grid(ranks: list[int], hidden: int, out: int, top_k: int, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    options = {"top_k": top_k, "backend": "triton", "max_rank": max(ranks)}
    for tokens in counts:
        case, weight = layer(ranks, hidden, out, tokens, dtype)
        own = error(case.base, F.linear(case.x.double(), weight.double()))
        got = lora_mixture(*case.arguments, **options)
        assert isinstance(got, Tensor)
        assert got.dtype == dtype
        wide = exact(case, top_k)
        most = allowance(case, wide, own, ranks, top_k)
        assert error(got, wide) <= most, (tokens, error(got, wide), most, own)
        with no_waiting():
            again = lora_mixture(*case.arguments, **options)
        assert torch.equal(again, got), tokens  # type: ignore[arg-type]
    # All tokens choose the same adapters; then there are no tokens.
    case, _ = layer(ranks, hidden, out, 300, dtype)
    best = (case.x.double() @ case.gate.double().t()).sort(dim=1, descending=True).values
    clear = best[:, :top_k] - best[:, 1 : top_k + 1] if len(ranks) > top_k else best
    case.x[:] = case.x[clear.min(dim=1).values.argmax()].clone()
    same = lora_mixture(*case.arguments, **options)
    rows = (same - case.base).double()  # type: ignore[operator]
    torch.testing.assert_close(rows, (exact(case, top_k) - case.base.double()), rtol=0.05, atol=0.05 if dtype != SINGLE else 1e-4)
    empty, _ = layer(ranks, hidden, out, 0, dtype)
    assert lora_mixture(*empty.arguments, **options).shape == (0, out)  # type: ignore[union-attr]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("adapters", [2, 3, 4])
@torch.no_grad()
def test_few_small_adapters(adapters: int, rank: int, top_k: int) -> None:
    """Very small tiles, which compilers are rarely tested with."""
    for tokens in (1, 5, 20, 100):
        case, _ = layer([rank] * adapters, 64, 48, tokens, SINGLE)
        got = lora_mixture(*case.arguments, top_k=top_k, backend="triton", max_rank=rank)
        assert error(got, exact(case, top_k)) < 1e-5, tokens  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 16, 48, 300])
@pytest.mark.parametrize("ranks", [[8] * 28, [16] * 512], ids=["28x8", "512x16"])
@torch.no_grad()
def test_a_graph_replays_with_new_inputs(ranks: list[int], tokens: int) -> None:
    case, _ = layer(ranks, 256, 384, tokens, BRAIN)
    other, _ = layer(ranks, 256, 384, tokens, BRAIN)
    other.x.neg_()
    wanted = [lora_mixture(*inputs.arguments, backend="triton", max_rank=max(ranks)) for inputs in (case, other)]
    allowed = torch.arange(len(ranks), device=DEVICE) % 2 == 0
    lora_mixture(*case.arguments, backend="triton", max_rank=max(ranks), allowed=allowed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = lora_mixture(*case.arguments, backend="triton", max_rank=max(ranks))
        muted = lora_mixture(*case.arguments, backend="triton", max_rank=max(ranks), allowed=allowed)
    graph.replay()
    assert torch.equal(output, wanted[0])  # type: ignore[arg-type]
    assert not torch.equal(output, muted)  # type: ignore[arg-type]
    case.x.copy_(other.x)
    case.base.copy_(other.base)
    graph.replay()
    assert torch.equal(output, wanted[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
@pytest.mark.parametrize(("ranks", "tokens"), [([8] * 28, 5), ([8] * 28, 700), ([3, 0, 64, 1, 5, 17], 130)])
def test_gradients(ranks: list[int], tokens: int, dtype: torch.dtype) -> None:
    """The gradients of x, the gates, A and B are those of the reference in float64, and two runs are bit-equal."""
    case, _ = layer(ranks, 192, 144, tokens, dtype)
    slope = torch.randn(tokens, 144, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)

    def gradients(inputs: Case, backend: str) -> list[Tensor]:
        inputs.wanting_grad()
        output, logits = lora_mixture(*inputs.arguments, backend=backend, return_logits=True)
        torch.autograd.backward([output, logits.float().square().mean()], [slope.to(output.dtype), None])
        return [tensor.grad for tensor in inputs.floats if tensor.grad is not None]

    wide = gradients(case.copy(torch.float64), "reference")
    first, second = (gradients(case.copy(dtype), "triton") for _ in range(2))
    for got, again, expected in zip(first, second, wide, strict=True):
        assert torch.equal(got, again)
        # In bfloat16 a few near ties are decided differently, and then the gradients differ.
        assert float((got.double() - expected).norm() / expected.norm()) < (0.3 if dtype == BRAIN else 1e-3)

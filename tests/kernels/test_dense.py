"""The dense backend against the definition and the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import lora_mixture, reference
from meteora_kernels.dense import choose, dots, sums, ways
from meteora_kernels.rank_rows import layout_of
from meteora_kernels.types import TEMPERATURES
from support.mixture_cases import by_loop, make

UNIFORM = [8] * 28
MIXED = [3, 0, 8, 1, 5]
SHAPES = [
    pytest.param(UNIFORM, 33, 17, (3, 7), 2, id="28-adapters"),
    pytest.param(UNIFORM, 33, 17, (1, 1), 2, id="one-token"),
    pytest.param(UNIFORM, 33, 17, (2, 5), 2, id="few-tokens"),
    pytest.param(UNIFORM, 12, 9, (40,), 28, id="all-chosen"),
    pytest.param([4] * 60, 12, 9, (40,), 2, id="many-small"),
    pytest.param([4] * 59 + [0], 12, 9, (40,), 9, id="sorted-top-k"),
    pytest.param(MIXED, 12, 9, (40,), 3, id="mixed"),
    pytest.param([1] * 40 + [2], 12, 9, (40,), 2, id="mixed-rows"),
    pytest.param([5], 7, 3, (19,), 1, id="single"),
]


@pytest.mark.parametrize(("ranks", "hidden", "out", "lead", "top_k"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e3])
def test_equals_definition(ranks: list[int], hidden: int, out: int, lead: tuple[int, ...], top_k: int, temperature: float) -> None:
    case = make(ranks, hidden, out, lead)
    for backend in ("reference", "dense"):
        got = lora_mixture(*case.arguments, top_k=top_k, temperature=temperature, backend=backend)
        torch.testing.assert_close(got, by_loop(case, top_k, temperature), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ranks", "hidden", "out", "lead", "top_k"), SHAPES)
def test_gradients_equal_the_reference(ranks: list[int], hidden: int, out: int, lead: tuple[int, ...], top_k: int) -> None:
    grads = []
    for backend in ("reference", "dense"):
        case = make(ranks, hidden, out, lead).wanting_grad()
        output, logits = lora_mixture(*case.arguments, top_k=top_k, temperature=1.5, backend=backend, return_logits=True)
        (output.square().sum() + logits.sin().sum()).backward()
        grads.append([tensor.grad for tensor in case.floats])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [[2] * 9, [1, 0, 3, 2]])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_gradcheck(ranks: list[int], tokens: int) -> None:
    case = make(ranks, 5, 4, (tokens,), seed=3).wanting_grad()
    lora_x = (case.x.detach() * 2).requires_grad_()

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return lora_mixture(*tensors[:5], case.scaling, case.offsets, lora_x=tensors[5], top_k=2, temperature=2.0, backend="dense", return_logits=True)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(run, (*case.floats, lora_x), fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "gate", "lora_A", "lora_B", "base"])
def test_only_one_input_wants_a_gradient(wanted: str) -> None:
    plain = make(UNIFORM, 12, 9, (20,)).wanting_grad()
    lora_mixture(*plain.arguments, backend="reference").square().sum().backward()  # type: ignore[union-attr]
    case = make(UNIFORM, 12, 9, (20,))
    getattr(case, wanted).requires_grad_()
    lora_mixture(*case.arguments, backend="dense").square().sum().backward()  # type: ignore[union-attr]
    torch.testing.assert_close(getattr(case, wanted).grad, getattr(plain, wanted).grad)


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_forced_routes_have_gradients(backend: str) -> None:
    case = make(UNIFORM, 12, 9, (20,)).wanting_grad()
    indices = torch.arange(40).view(20, 2) % 28
    weights = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    lora_mixture(*case.arguments, routes=(indices, weights), backend=backend).square().sum().backward()  # type: ignore[union-attr]
    assert case.gate.grad is None
    expected = make(UNIFORM, 12, 9, (20,)).wanting_grad()
    fixed = weights.detach().clone().requires_grad_()
    coefficients = reference.spread(indices, fixed, expected.scaling)
    reference.mixture(expected.x, expected.base, expected.lora_A, expected.lora_B, coefficients, expected.offsets).square().sum().backward()
    torch.testing.assert_close(weights.grad, fixed.grad)
    for name in ("x", "base", "lora_A", "lora_B"):
        torch.testing.assert_close(getattr(case, name).grad, getattr(expected, name).grad)


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_choose_equals_route(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (400, 12), generator=generator).float()
    logits[0] = float("nan")
    logits[1, 5] = float("nan")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    logits[4, 2] = float("inf")
    logits[5, 3:5] = float("nan")
    allowed = torch.ones(12, dtype=torch.bool)
    allowed[4:] = False
    for mask in (None, allowed, torch.arange(12) == 7):
        expected, got = reference.route(logits, top_k, 3.0, mask), choose(logits, top_k, 3.0, mask)
        assert torch.equal(expected[0], got[0])
        torch.testing.assert_close(got[1], expected[1], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_are_finite_at_both_ends_of_the_temperature(top_k: int, temperature: float) -> None:
    largest = torch.finfo(torch.float32).max / 2
    logits = torch.tensor([[0.0, 50.0, 49.0], [largest, -largest, 0.0], [-largest, -1.0, 1.0], [7.0, 7.0, 7.0]])
    for mask in (None, torch.tensor([False, True, False])):
        allowed = torch.ones(4, 3, dtype=torch.bool) if mask is None else mask.expand(4, 3)
        expected = torch.softmax(logits.double().masked_fill(~allowed, float("-inf")).topk(top_k).values / temperature, -1)
        many = reference.route_rows(logits, torch.full((4,), top_k), torch.full((4,), temperature), allowed, top_k)
        for _, weights in (reference.route(logits, top_k, temperature, mask), choose(logits, top_k, temperature, mask), many):
            torch.testing.assert_close(weights, expected.float())


def test_nan_stays_in_its_token() -> None:
    case = make(UNIFORM, 12, 9, (20,))
    case.x[4, 3] = float("nan")
    for backend in ("reference", "dense"):
        got = lora_mixture(*case.arguments, backend=backend)
        assert isinstance(got, torch.Tensor)
        assert got[4].isnan().all()
        assert not got[torch.arange(20) != 4].isnan().any()


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_allowed(backend: str) -> None:
    case = make([4] * 6, 12, 9, (20,))
    allowed = [False, True, False, True, True, False]
    got = lora_mixture(*case.arguments, allowed=torch.tensor(allowed), backend=backend)
    torch.testing.assert_close(got, by_loop(case, 2, allowed=allowed))


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_degenerate_sizes(backend: str) -> None:
    empty = make(UNIFORM, 12, 9, (2, 0))
    output, logits = lora_mixture(*empty.arguments, backend=backend, return_logits=True)
    assert output.shape == (2, 0, 9)
    assert logits.shape == (2, 0, 28)
    hollow = make([0, 0], 12, 9, (3,))
    assert torch.equal(lora_mixture(*hollow.arguments, backend=backend), hollow.base)  # type: ignore[arg-type]


def test_non_contiguous_input() -> None:
    case = make(UNIFORM, 12, 9, (6, 5))
    expected = lora_mixture(*case.arguments, backend="dense")
    case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
    case.base = case.base.transpose(0, 1).contiguous().transpose(0, 1)
    case.lora_B = case.lora_B.t().contiguous().t()
    assert not case.x.is_contiguous()
    torch.testing.assert_close(lora_mixture(*case.arguments, backend="dense"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_low_precision_is_as_good_as_the_reference(dtype: torch.dtype, tokens: int) -> None:
    exact = make(UNIFORM, 64, 48, (tokens,))
    case = exact.copy(dtype)
    wide = case.copy(torch.float64)
    indices, weights = reference.route(wide.x @ wide.gate.t(), 2)
    expected = lora_mixture(*wide.arguments, routes=(indices, weights), backend="reference")
    errors = []
    for backend in ("reference", "dense"):
        got = lora_mixture(*case.arguments, routes=(indices, weights.float()), backend=backend)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == dtype
        errors.append(float((got.double() - expected).norm() / expected.norm()))  # type: ignore[operator,arg-type]
    assert errors[1] <= 1.2 * errors[0] + 1e-7


def test_autocast_and_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    case = make(UNIFORM, 12, 9, (20,), torch.float32).wanting_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = lora_mixture(*case.arguments, backend="dense")
        assert isinstance(output, torch.Tensor)
        assert output.dtype == torch.float32
        plain = lora_mixture(*case.arguments, backend="reference")
    torch.testing.assert_close(output, plain, rtol=0.05, atol=0.05)
    output.sum().backward()
    assert case.gate.grad is not None
    assert case.gate.grad.dtype == torch.float32
    grads = []
    for wrap in (False, True):
        fresh = make(UNIFORM, 12, 9, (20,)).wanting_grad()
        run = lambda *tensors: lora_mixture(*tensors, backend="dense").square().sum()  # noqa: E731
        loss = checkpoint(run, *fresh.arguments, use_reentrant=False) if wrap else run(*fresh.arguments)
        loss.backward()
        grads.append(fresh.gate.grad)
    assert torch.equal(grads[0], grads[1])


def test_inference_mode() -> None:
    case = make(UNIFORM, 12, 9, (20,))
    expected = lora_mixture(*case.arguments, backend="dense")
    with torch.inference_mode():
        fresh = make(UNIFORM, 12, 9, (20,))
        assert torch.equal(lora_mixture(*fresh.arguments, backend="dense"), expected)  # type: ignore[arg-type]


def test_layout_follows_its_tensor() -> None:
    offsets = torch.tensor([0, 2, 4])
    assert layout_of(offsets) is layout_of(offsets)
    assert layout_of(offsets).uniform
    offsets[1] = 1
    changed = layout_of(offsets)
    assert changed.max_rank == 3
    assert changed.valid is not None
    assert changed.valid.tolist() == [[True, False, False], [True, True, True]]
    with pytest.raises(ValueError, match="never decrease"):
        layout_of(torch.tensor([0, 3, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ways_agree(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 11, dtype=dtype, generator=generator)
    tokens = torch.randn(6, 11, dtype=dtype, generator=generator)
    rows = torch.randint(0, 40, (6, 7), generator=generator)
    weights = torch.randn(6, 7, dtype=dtype, generator=generator)
    for way in ("rows", "copies"):
        torch.testing.assert_close(dots(tokens, matrix, rows, way), dots(tokens, matrix, rows, "gemm"))
        torch.testing.assert_close(sums(matrix, rows, weights, way), sums(matrix, rows, weights, "gemm"))
        torch.testing.assert_close(sums(matrix, rows, weights, way, tokens), sums(matrix, rows, weights, "gemm", tokens))
    layout = layout_of(torch.arange(0, 28 * 8 + 1, 8))
    assert ways(1024, layout, 2, torch.float32, "cpu") == ("rows", "rows")
    assert ways(1024, layout, 2, torch.bfloat16, "cpu") == ("gemm", "rows")
    assert ways(1, layout, 2, torch.bfloat16, "cpu") == ("copies", "copies")
    assert ways(1024, layout, 28, torch.float32, "cpu") == ("gemm", "gemm")

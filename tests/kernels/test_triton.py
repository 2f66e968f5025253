"""The Triton kernels against the reference: in the interpreter on a CPU, compiled on a GPU (then over many more cases)."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Adapters, Routing, lora_mixture, plan, reference
from meteora_kernels.many_adapters import layer_forward
from meteora_kernels.triton_backend import mix_many_op
from meteora_kernels.triton_delta import delta
from meteora_kernels.triton_few import mix_few
from meteora_kernels.triton_middle import middle
from meteora_kernels.triton_route import route
from support.mixture_cases import Case, by_loop, make

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


def routed(case: Case, top_k: int) -> torch.Tensor:
    """The reference's output in float64."""
    wide = Case(*(tensor.detach().double() for tensor in case.floats), case.scaling, case.offsets)
    output = lora_mixture(*wide.arguments, top_k=top_k, temperature=1.5, backend="reference")
    assert isinstance(output, torch.Tensor)
    return output


@pytest.mark.parametrize(("ranks", "hidden", "out", "tokens", "top_k"), SHAPES)
def test_backend_equals_reference(ranks: list[int], hidden: int, out: int, tokens: int, top_k: int) -> None:
    case = make(ranks, hidden, out, (tokens,), torch.float32, device=DEVICE)
    output, logits = lora_mixture(*case.arguments, top_k=top_k, temperature=1.5, backend="triton", return_logits=True)
    close(output, routed(case, top_k).float())
    close(logits.float(), case.x @ case.gate.t())
    again = lora_mixture(*case.arguments, top_k=top_k, temperature=1.5, backend="triton")
    assert torch.equal(again, output)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if GPU else [torch.float16])
@pytest.mark.parametrize("tokens", [1, 9, 20, 65])
def test_low_precision(dtype: torch.dtype, tokens: int) -> None:
    """Compared token by token, since rounding may turn a near tie: nearly all tokens must agree."""
    case = make(UNIFORM, 64, 48, (tokens,), torch.float32, device=DEVICE).copy(dtype)
    output = lora_mixture(*case.arguments, temperature=1.5, backend="triton")
    assert isinstance(output, torch.Tensor)
    assert output.dtype == dtype
    expected = routed(case, 2)
    errors = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.median()) < (0.01 if dtype == torch.bfloat16 else 0.002)
    assert float((errors < 0.05).double().mean()) >= 0.9


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


def test_dropout_forced_routes_and_muted_adapters() -> None:
    case = make(UNIFORM, 20, 12, (18,), torch.float32, device=DEVICE).wanting_grad()
    lora_x = (case.x.detach() * 2).requires_grad_()
    allowed = torch.arange(28, device=DEVICE) < 5
    routes = (torch.arange(36, device=DEVICE).view(18, 2) % 28, torch.rand(18, 2, device=DEVICE))
    for options in ({"lora_x": lora_x}, {"allowed": allowed}, {"routes": routes}, {"routes": routes, "lora_x": lora_x}):
        results = []
        for backend in ("reference", "triton"):
            output = lora_mixture(*case.arguments, backend=backend, **options)  # type: ignore[arg-type]
            wanted = [case.x, case.lora_A, case.lora_B, *([lora_x] if "lora_x" in options else [])]
            results.append([output, *torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)])  # type: ignore[union-attr]
        for expected, got in zip(*results, strict=True):
            if expected is None:
                assert not got.any()
            else:
                close(got, expected)
    with torch.no_grad():
        few = make(UNIFORM, 20, 12, (3,), torch.float32, device=DEVICE)
        close(lora_mixture(*few.arguments, allowed=allowed, backend="triton"), by_loop(few, 2, allowed=allowed.tolist()).float().to(DEVICE))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_route_has_the_references_ties_and_nan(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (50, 12), generator=generator).float()
    logits[0] = float("nan")
    logits[1, 5] = float("nan")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    logits[4, 3:5] = float("nan")
    logits[5] = -0.0
    logits[5, 3] = 0.0
    for mask in (None, torch.arange(12) < 4, torch.arange(12) == 7):
        expected = reference.route(logits, top_k, 3.0, mask)
        got = route(logits.to(DEVICE), top_k, 3.0, None if mask is None else mask.to(DEVICE))
        assert torch.equal(got[0].cpu(), expected[0])
        torch.testing.assert_close(got[1].cpu(), expected[1], equal_nan=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("tokens", [3, 20])
def test_nan_stays_in_its_token(tokens: int) -> None:
    case = make(UNIFORM, 20, 12, (tokens,), torch.float32, device=DEVICE)
    case.x[1, 3] = float("nan")
    output = lora_mixture(*case.arguments, backend="triton")
    assert isinstance(output, torch.Tensor)
    assert output[1].isnan().all()
    assert not output[torch.arange(tokens) != 1].isnan().any()


@pytest.mark.parametrize("dense_down", [True, False])
@pytest.mark.parametrize("tokens", [1, 5])
def test_few_reads_all_or_only_the_chosen_rows(tokens: int, dense_down: bool) -> None:
    case = make([3, 0, 8, 1, 5], 20, 40, (tokens,), torch.float32, device=DEVICE)
    output, _ = mix_few(*case.arguments, 8, 3, 1.5, None, dense_down=dense_down)
    close(output, routed(case, 3).float())


@pytest.mark.parametrize("way", ["few", "sorted"])
@pytest.mark.parametrize("one", [False, True])
def test_chosen_rows_on_top_of_a_base(way: str, one: bool) -> None:
    """Random routes, and all tokens on one adapter; on an output that was rounded before, the result is rounded once."""
    wide = make([5, 17, 3, 0, 9, 1], 20, 40, (18,), torch.float64, device=DEVICE)
    wide.lora_B *= 0.2
    if one:
        wide.x[:] = wide.x[0].clone()
    case = wide.copy(torch.float16)
    adapters = Adapters.of_layer(case.gate, case.lora_A, case.lora_B, case.scaling.float(), case.offsets, 17)
    output = layer_forward(way, case.x, case.base, case.x @ case.gate.t(), adapters, Routing(2, 1.5))
    expected = routed(case.copy(torch.float64), 2)

    def error(got: torch.Tensor) -> float:
        return float(((got.double() - expected).norm(dim=1) / expected.norm(dim=1)).median())

    assert error(output) <= 1.15 * error(expected.half())


def test_delta_with_and_without_base() -> None:
    case = make(UNIFORM, 20, 40, (30,), torch.float32, device=DEVICE)
    down = case.x @ case.lora_A.t()
    logits = case.x @ case.gate.t()
    inner = middle(logits, down, case.scaling, case.offsets, 2, 1.0)
    out = torch.empty_like(case.base)
    delta(inner, case.lora_B, None, out, (40,), 224, 224)
    close(out, inner @ case.lora_B)
    delta(inner, case.lora_B, case.base, out, (40,), 224, 224)
    close(out, case.base + inner @ case.lora_B)
    routed_out = torch.empty_like(case.base)
    delta(down, case.lora_B, case.base, routed_out, (40,), 224, 0, (logits, case.scaling, case.offsets, 2, 1.0, None))
    close(routed_out, out)


def test_operator_is_sound_for_compilers() -> None:
    case = make([4] * 6, 16, 9, (20,), torch.float32, device=DEVICE).wanting_grad()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    found = torch.library.opcheck(mix_many_op, (case.x, None, *case.arguments[1:], None, None, None, 2, 1.0), test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("grad", [False, True])
def test_fake_tensors_reach_no_kernel(tokens: int, grad: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = make([4] * 6, 16, 9, (2, tokens), torch.float32, device=DEVICE)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, torch.set_grad_enabled(grad):
        fake = Case(*(mode.from_tensor(tensor) for tensor in (*case.floats, case.scaling, case.offsets)))
        if grad:
            fake.wanting_grad()
        output, logits = lora_mixture(*fake.arguments, backend="triton", max_rank=4, return_logits=True)
        assert (output.shape, logits.shape) == ((2, tokens, 9), (2, tokens, 6))
    with torch.set_grad_enabled(grad):
        assert lora_mixture(*fake.arguments, backend="triton", max_rank=4).shape == (2, tokens, 9)


def test_nothing_flat_is_asked_of_the_caller() -> None:
    """Leading dimensions, inputs with gaps, and gradients that arrive for one of the two results only."""
    for which in ("output", "logits"):
        results = []
        for backend in ("reference", "triton"):
            case = make([4] * 6, 16, 9, (2, 5, 4), torch.float32, device=DEVICE).wanting_grad()
            wide = torch.stack([case.x, case.x], -1)[..., 0].transpose(0, 1)
            made = lora_mixture(wide, case.base.transpose(0, 1), *case.arguments[2:], backend=backend, return_logits=True)
            found = made[0] if which == "output" else made[1]
            assert found.shape[:-1] == (5, 2, 4)
            found.square().sum().backward()
            results.append([torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in case.floats])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_compiles_without_a_graph_break() -> None:
    case = make([4] * 6, 16, 9, (20,), torch.float32, device=DEVICE)

    def run(x: torch.Tensor) -> torch.Tensor:
        output = lora_mixture(x, *case.arguments[1:], backend="triton", max_rank=4)
        assert isinstance(output, torch.Tensor)
        return output

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(case.x), run(case.x))


def test_named_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "triton_installed", lambda: False)
    case = make([4] * 6, 16, 9, (3,), torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="Triton is not installed"):
        lora_mixture(*case.arguments, backend="triton")


if GPU:

    def test_captured_graph_gives_the_same() -> None:
        case = make(UNIFORM, 64, 48, (4,), torch.float32, device=DEVICE)
        with torch.no_grad():
            expected = lora_mixture(*case.arguments, backend="triton")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = lora_mixture(*case.arguments, backend="triton")
            graph.replay()
        assert torch.equal(output, expected)  # type: ignore[arg-type]

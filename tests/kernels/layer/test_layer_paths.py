"""The Triton backend against the reference: in the interpreter on a CPU, compiled on a GPU (then over many more cases)."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import lora_mixture, plan
from meteora_kernels.layer import few_tokens, many_tokens
from support.layer_shapes import DEVICE, GPU, SHAPES, UNIFORM, close, routed
from support.mixture_cases import Case, by_loop, make


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
    """Nearly all tokens must agree; rounding may change the route of a token with a near tie."""
    case = make(UNIFORM, 64, 48, (tokens,), torch.float32, device=DEVICE).copy(dtype)
    output = lora_mixture(*case.arguments, temperature=1.5, backend="triton")
    assert isinstance(output, torch.Tensor)
    assert output.dtype == dtype
    expected = routed(case, 2)
    errors = (output.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.median()) < (0.01 if dtype == torch.bfloat16 else 0.002)
    assert float((errors < 0.05).double().mean()) >= 0.9


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
@pytest.mark.parametrize("tokens", [3, 20])
def test_nan_stays_in_its_token(tokens: int) -> None:
    case = make(UNIFORM, 20, 12, (tokens,), torch.float32, device=DEVICE)
    case.x[1, 3] = float("nan")
    output = lora_mixture(*case.arguments, backend="triton")
    assert isinstance(output, torch.Tensor)
    assert output[1].isnan().all()
    assert not output[torch.arange(tokens) != 1].isnan().any()


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
    """Inputs have leading dimensions and gaps, and gradients may reach only one of the two results."""
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


@pytest.mark.parametrize("tokens", [3, 20])
def test_compiles_without_a_graph_break(tokens: int) -> None:
    case = make([4] * 6, 16, 9, (tokens,), torch.float32, device=DEVICE)

    def run(x: torch.Tensor) -> torch.Tensor:
        output = lora_mixture(x, *case.arguments[1:], backend="triton", max_rank=4)
        assert isinstance(output, torch.Tensor)
        return output

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(case.x), run(case.x))


def test_named_backend_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.machine, "triton_installed", lambda: False)
    case = make([4] * 6, 16, 9, (3,), torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match="Triton is not installed"):
        lora_mixture(*case.arguments, backend="triton")


def test_paths_for_inference_only_refuse_gradients() -> None:
    facts = plan.Facts(16, (9,), 6, 24, 4, torch.float32, torch.device(DEVICE))
    row = next(row for row in plan.table_of(facts.device).layer if row.path == "few_tokens")
    assert few_tokens.can_run(plan.Case(facts, 3, 2), row) is None
    assert "inference" in (few_tokens.can_run(plan.Case(facts, 3, 2, plain=False), row) or "")
    assert "up to 64" in (few_tokens.can_run(plan.Case(facts, 65, 2), row) or "")
    assert many_tokens.can_run(plan.Case(facts, 65, 2, plain=False), row) is None


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

"""The entry point: refused arguments, the choice of ``auto``, and the fallback when the GPU kernels fail."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from meteora_kernels import lora_mixture, mixture, pick_backend, plan
from support.mixture_cases import make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 7}, "only|but there are 6 adapters"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": 1e-39}, r"temperature is 1e-39, it must be in 1.18e-38..8.5e\+37"),
        ({"temperature": 1e38}, r"temperature is 1e\+38"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
    ],
)
def test_refuses_options_out_of_range(change: dict[str, object], message: str) -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    with pytest.raises(ValueError, match=message):
        lora_mixture(*case.arguments, **change)  # type: ignore[arg-type]


def test_refuses_unknown_options() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        lora_mixture(*case.arguments, topk=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["x", "base", "gate", "lora_A", "lora_B", "scaling", "offsets"])
def test_refuses_shapes_that_do_not_fit(name: str) -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    tensor = getattr(case, name)
    setattr(case, name, torch.cat([tensor, tensor], dim=-1))
    with pytest.raises(ValueError, match=r"expected|width|fit"):
        lora_mixture(*case.arguments)


def test_refuses_mixed_dtypes_and_devices() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    case.gate = case.gate.half()
    with pytest.raises(ValueError, match="they must be one"):
        lora_mixture(*case.arguments)
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    case.gate = case.gate.to("meta")
    with pytest.raises(ValueError, match="several devices: cpu, meta"):
        lora_mixture(*case.arguments)


def test_refuses_logits_of_forced_routes() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    with pytest.raises(ValueError, match="gate is not evaluated"):
        lora_mixture(*case.arguments, routes=(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)), return_logits=True)


def test_the_first_row_that_fits_wins() -> None:
    def call(**changes: object) -> plan.Call:
        facts = {"tokens": 1, "adapters": 28, "total_rank": 224, "top_k": 2, "dtype": torch.bfloat16, "device": "cuda", "capability": 90}
        return plan.Call(**{**facts, **changes})  # type: ignore[arg-type]

    assert plan.choose_backend(call(dtype=torch.float64))[0] == "reference"
    assert plan.choose_backend(call(device="cpu"))[0] == "dense"
    assert plan.choose_backend(call(capability=70))[0] == "dense"
    assert plan.choose_backend(call(top_k=17))[0] == "dense"
    assert plan.choose_backend(call())[0] == ("triton" if plan.triton_installed() else "dense")
    assert all(row.reason for row in plan.backend.BACKEND_ROWS)
    backend, reason = pick_backend(torch.zeros(3, 5), 28, 224, 2, training=False)
    assert backend == "dense"
    assert "no GPU" in reason


def test_auto_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32)
    expected = lora_mixture(*case.arguments, backend="dense")
    calls = []

    class Broken:
        @staticmethod
        def mix(*arguments: object, **options: object) -> None:
            calls.append(arguments)
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(mixture, "_triton", Broken)
    monkeypatch.setattr(mixture, "_broken", {})
    monkeypatch.setattr(plan, "choose_backend", lambda call: ("triton", "test"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(lora_mixture(*case.arguments), expected)  # type: ignore[arg-type]
    assert len(calls) == 1
    assert [record.message for record in caplog.records] == ["GPU kernels cannot run on cpu (out of resource: shared memory); the dense backend runs instead"]


def test_the_early_end_of_a_recomputation_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch ends the recomputation of a checkpoint by an exception from inside the operation that saved the last tensor."""
    case = make([4] * 6, 16, 9, (3,), torch.float32)

    class Saving:
        @staticmethod
        def mix(x: torch.Tensor, base_output: torch.Tensor, *arguments: object, **options: object) -> tuple[torch.Tensor, None]:
            return base_output * x.sum(-1, keepdim=True).exp(), None

    monkeypatch.setattr(mixture, "_triton", Saving)
    monkeypatch.setattr(mixture, "_broken", {})
    monkeypatch.setattr(plan, "choose_backend", lambda call: ("triton", "test"))
    x, base_output, *others = case.arguments
    x = x.clone().requires_grad_()  # type: ignore[union-attr]
    output = checkpoint(lambda value: lora_mixture(value, base_output, *others), x, use_reentrant=False)
    output.sum().backward()
    assert mixture._broken == {}
    assert x.grad is not None
    assert x.grad.isfinite().all()

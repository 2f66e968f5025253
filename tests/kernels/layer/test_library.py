"""Adapters on top of a finished base output by the library's products; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Adapters, Routing
from meteora_kernels.layer import library, row_for
from meteora_kernels.plan import Case, Facts, Row
from support.kernel_rows import taking
from support.layer_shapes import DEVICE, close, routed
from support.mixture_cases import make


@pytest.mark.parametrize(("ranks", "tokens", "top_k"), [([8] * 28, 21, 2), ([3, 0, 8, 1, 5], 70, 3), ([40, 2], 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(ranks: list[int], tokens: int, top_k: int, dtype: torch.dtype) -> None:
    case = make(ranks, 40, 24, (tokens,), torch.float32, device=DEVICE)
    x, base, *tensors = case.copy(dtype).arguments
    output, logits = library.run(x, base, Adapters.of_layer(*tensors, max(ranks)), Routing(top_k, 1.5))
    if dtype == torch.float32:
        close(output.double(), routed(case, top_k))
    else:
        exact = routed(case.copy(dtype), top_k)
        assert float(((output.double() - exact).norm(dim=1) / exact.norm(dim=1)).median()) < 1e-2
    assert logits.shape == (tokens, len(ranks))
    assert torch.equal(library.run(x, base, Adapters.of_layer(*tensors, max(ranks)), Routing(top_k, 1.5))[0], output)


def test_a_base_of_another_dtype_is_added_in_it() -> None:
    """As when a float32 base output comes from an autocast of another layer."""
    case = make([4] * 6, 16, 9, (20,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    wide = library.run(x, base.double(), Adapters.of_layer(*tensors, 4), Routing(2, 1.5))[0]
    assert wide.dtype == torch.float64
    close(wide, routed(case, 2))


def test_a_base_output_of_its_own_is_overwritten() -> None:
    """As one that was computed for these adapters; one that somebody else computed is only read."""
    case = make([4] * 6, 16, 9, (20,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    adapters, routing, row = Adapters.of_layer(*tensors, 4), Routing(2, 1.5), Row("library")
    kept = base.clone()
    output = library.run(x, base, adapters, routing)[0]
    assert torch.equal(base, kept)
    found = library.after(library.before(x, adapters, routing, row), base, adapters, routing, row)
    assert found.data_ptr() == base.data_ptr()
    close(found, output)
    close(library.after(library.before(x, adapters, routing, row), kept[:1].expand(20, 9), adapters, routing, row), output - kept + kept[:1])


def test_gradients_and_given_routes_need_another_path() -> None:
    facts = Facts(16, (9,), 6, 24, 4, torch.float32, torch.device(DEVICE))
    assert library.can_run(Case(facts, 20, 2, plain=True), Row("library")) is None
    assert "inference" in (library.can_run(Case(facts, 20, 2, plain=False), Row("library")) or "")


def test_operator_is_sound_for_compilers() -> None:
    case = make([4] * 6, 16, 9, (20,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    flat = library.library.flat((x, base, Adapters.of_layer(*tensors, 4), Routing()))
    assert set(torch.library.opcheck(library.library.op, flat, test_utils=("test_schema", "test_faketensor")).values()) == {"SUCCESS"}
    with taking(layer=(Row("library"),)):
        assert row_for(x, Adapters.of_layer(*tensors, 4), 2).path == "library"

"""Adapters on top of a product that a function computes: the same output, whatever runs beside the product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import Adapters, Routing, layer, mix, mix_over
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile
from support.kernel_rows import taking
from support.layer_shapes import DEVICE, close
from support.mixture_cases import make

TILE = Tile(outputs=64, stages=3, gate_rows=16, gate_step=64)
ROWS = [
    pytest.param(Row("few_tokens", way="all_rows", tile=TILE), id="all-rows"),
    pytest.param(Row("few_tokens", way="chosen_rows", tile=TILE), id="chosen-rows"),
    pytest.param(Row("many_adapters", way="few"), id="many-few"),
    pytest.param(Row("many_adapters", way="sorted"), id="many-sorted"),
    pytest.param(Row("library"), id="library"),
    pytest.param(Row("many_tokens", inline=True), id="many-tokens"),
]


def given(tokens: int, seen: list[int]) -> tuple[Tensor, Callable[[Tensor], Tensor], Adapters, Tensor]:
    """Input, base product, adapters, and the base output; the list fills with the tokens of every product."""
    case = make([8, 3, 0, 5, 8, 1], 40, 24, (tokens,), torch.float32, device=DEVICE)
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def product(x: Tensor) -> Tensor:
        seen.append(len(x))
        return F.linear(x, weight)

    adapters = Adapters.of_layer(case.gate, case.lora_A, case.lora_B, case.scaling.float(), case.offsets, 8)
    return case.x, product, adapters, F.linear(case.x, weight)


@pytest.mark.parametrize("row", ROWS)
def test_equals_the_mixture_on_top_of_the_finished_base(row: Row) -> None:
    seen: list[int] = []
    x, product, adapters, base = given(7, seen)
    wanted = mix(x, base, adapters, Routing(2, 1.5), backend="reference")
    with taking(layer=(row,)):
        found = layer.mix_over(x, product, adapters, Routing(2, 1.5))
    close(found, wanted)
    assert seen == [7]


def test_without_a_capture_any_backend_does() -> None:
    seen: list[int] = []
    x, product, adapters, base = given(7, seen)
    for backend in ("auto", "dense", "reference"):
        close(mix_over(x, product, adapters, Routing(2), backend=backend), mix(x, base, adapters, Routing(2), backend="reference"))
    assert seen == [7] * 3
    with pytest.raises(ValueError, match="unknown backend"):
        mix_over(x, product, adapters, Routing(2), backend="other")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tokens", [1, 8, 64, 200])
@torch.inference_mode()
def test_a_captured_graph_has_the_bits_of_eager_code(tokens: int) -> None:
    """The graph runs two streams; its result does not depend on their order."""
    x, product, adapters, _ = given(tokens, [])
    x, weights = x.half(), (adapters.gate.half(), adapters.lora_A.half(), adapters.lora_B.half())
    half = Adapters.of_layer(*weights, adapters.scaling, adapters.offsets, 8)

    def base(x: Tensor) -> Tensor:
        return product(x.float()).half()

    wanted = mix_over(x, base, half, Routing(2))
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mix_over(x, base, half, Routing(2))
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = mix_over(x, base, half, Routing(2))
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, wanted)

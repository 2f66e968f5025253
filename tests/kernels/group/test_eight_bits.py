"""One launch over a base in 8-bit floating-point numbers, against float64; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from meteora_kernels import Adapters, Routing, mix
from meteora_kernels.group.eight_bits import EightBits, row_for, run_eight_bits
from meteora_kernels.plan import Row, Span, use
from meteora_kernels.plan.table import shipped
from meteora_kernels.tile import Tile
from support.kernel_groups import DEVICE, Members, errors, members
from support.kernel_rows import taking

pytestmark = pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="the kernel is for compute capability 9.0")
ROW = Row("one_launch", Span(1, 64), pieces=2, gate_pieces=3, tile=Tile(64, 32, 16, 4, 3))
"""A row with steps so short that 96 columns are several pieces."""


def eight(values: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """``values`` as float8 and factors, one for each row if there are more than one."""
    scale = values.float().abs().amax(1) / 448 if parts > 1 else values.float().abs().max().reshape(1) / 448
    return (values.float() / scale[:, None] if parts > 1 else values.float() / scale).to(torch.float8_e4m3fn), scale


def product(weights: Tensor, scale: Tensor, x8: Tensor, x_scale: Tensor) -> Tensor:
    """The base output in float64."""
    return (x8.double() * x_scale.double()[:, None]) @ (weights.double() * scale.double()[:, None]).t()


def exact(given: Members, base: Tensor, routing: Routing) -> Tensor:
    """Base plus adapters in float64."""
    first, found = given.cases[0], []
    for part, case in zip(base.split(given.widths, dim=1), given.cases, strict=True):
        adapters = Adapters.of_layer(case.gate.double(), case.lora_A.double(), case.lora_B.double(), first.scaling, case.offsets)
        found.append(mix(given.x.double(), part, adapters, routing, backend="reference"))
    return torch.cat(found, dim=1)  # type: ignore[arg-type]


def group_of(given: Members, parts: int) -> EightBits:
    weights, scale = eight(given.weight, parts)
    adapters = given.group.adapters
    return EightBits.of(weights, scale, adapters._replace(gate=adapters.gate.contiguous()))


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(("widths", "tokens", "scales"), [((40,), 1, (1, 2)), ((24, 41), 33, (2, 1)), ((24, 9, 33), 64, (2, 2)), ((24, 9, 33), 17, (1, 1))])
def test_equals_its_members(widths: tuple[int, ...], tokens: int, scales: tuple[int, int], pieces: int) -> None:
    """Tiles extend past every member, the columns end within a step, and factors belong to a tensor or to rows."""
    given = members(widths, tokens, hidden=112, dtype=torch.float16)
    group, routing = group_of(given, scales[0]), Routing(2, 3.0)
    x8, x_scale = eight(given.x, scales[1])
    wanted = exact(given, product(group.weights, group.scale.expand(sum(widths)), x8, x_scale.expand(tokens)), routing)
    with taking(Row("one_launch", ROW.tokens, pieces=pieces, gate_pieces=2, tile=ROW.tile)):
        found = run_eight_bits(given.x, x8, x_scale, group, routing)
    assert found is not None
    assert (found.dtype, found.shape) == (given.x.dtype, wanted.shape)
    own = float(errors(wanted.half(), wanted).median())
    assert float(errors(found, wanted).median()) <= 1.5 * own
    assert float(errors(found, wanted).max()) <= 5 * own
    assert int(group.flags.abs().sum()) == 0


@pytest.fixture
def h200() -> Iterator[None]:
    before = use(torch.device(DEVICE), shipped("h200"))
    yield
    use(torch.device(DEVICE), before)


@pytest.mark.usefixtures("h200")
def test_the_rows_are_those_of_16_bit_weights_also_for_fewer_tokens() -> None:
    """Many tokens and weights that the copy engine cannot read have none, and many adapters have another path."""
    given = members((40, 24), 8, hidden=64, ranks=(8,) * 28, dtype=torch.float16)
    group = group_of(given, 1)
    for tokens, most in ((1, 32), (8, 32), (17, 32), (64, 64), (65, 128), (128, 128)):  # this table has rows for fewer tokens only from 4,096 inputs on
        row = row_for(group, tokens, 2)
        assert row is not None
        assert (row.path, row.tokens.most) == ("one_launch", most)
    assert row_for(group, 129, 2) is None
    odd = members((40, 24), 8, hidden=72, ranks=(8,) * 28, dtype=torch.float16)
    assert row_for(group_of(odd, 1), 8, 2) is None
    many = members((40,), 8, hidden=64, ranks=(8,) * 256, dtype=torch.float16)
    assert row_for(group_of(many, 1), 64, 2) is None
    x8, x_scale = eight(given.x, 1)
    assert run_eight_bits(given.x.float(), x8, x_scale, group, Routing()) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("widths", "hidden"), [((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)], ids=["qkv", "o", "up", "down"]
)
@pytest.mark.parametrize("tokens", [1, 8, 13, 64, 128])
def test_a_graph_replays_with_new_inputs(widths: tuple[int, ...], hidden: int, tokens: int) -> None:
    """The table's row at sizes that fill the GPU, with the rounding of 16 bits. Replays are bit-equal."""
    given = members(widths, tokens, ranks=(8,) * 28, hidden=hidden, dtype=torch.bfloat16)
    group, routing = group_of(given, 1), Routing()
    x8, x_scale = eight(given.x, 2)

    def run() -> Tensor:
        found = run_eight_bits(given.x, x8, x_scale, group, routing)
        assert found is not None
        return found

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for seed in range(3):
        given.x.copy_(torch.randn(given.x.shape, generator=torch.Generator().manual_seed(seed)))
        new, new_scale = eight(given.x, 2)
        x8.copy_(new)
        x_scale.copy_(new_scale)
        wanted = exact(given, product(group.weights, group.scale.expand(sum(widths)), x8, x_scale), routing)
        graph.replay()
        # The matrix units add 8-bit products with 14 bits, so this is larger than one rounding to bfloat16 for long sums.
        assert float(errors(found, wanted).median()) <= 3 * float(errors(wanted.bfloat16(), wanted).median())
        first = found.clone()
        for _ in range(5):
            graph.replay()
            assert torch.equal(found, first)
    assert int(group.flags.abs().sum()) == 0

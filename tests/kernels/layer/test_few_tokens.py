"""Few tokens on top of a finished base output; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Adapters, Routing
from meteora_kernels.layer import few_tokens_operator
from meteora_kernels.layer.few_tokens import run
from meteora_kernels.plan import Row
from meteora_kernels.tile import Tile
from support.layer_shapes import DEVICE, UNIFORM, close, routed
from support.mixture_cases import make


@pytest.mark.parametrize("way", ["all_rows", "chosen_rows"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_reads_all_or_only_the_chosen_rows(tokens: int, way: str) -> None:
    case = make([3, 0, 8, 1, 5], 20, 40, (tokens,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    tile = Tile(outputs=64, gate_rows=4, gate_step=1024, stages=4) if tokens == 1 else Tile(outputs=64, gate_rows=16, gate_step=512)
    output, logits = run(x, base, Adapters.of_layer(*tensors, 8), Routing(3, 1.5), Row("few_tokens", way=way, tile=tile))
    close(output, routed(case, 3).float())
    close(logits, x @ case.gate.t())


def test_one_token_with_and_without_tiles_of_one_row() -> None:
    """The table keeps tiles of one row for the sizes of the published figures, which were measured with them."""
    case = make(UNIFORM, 33, 17, (1,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    outputs = [
        run(x, base, Adapters.of_layer(*tensors, 8), Routing(), Row("few_tokens", way="all_rows", flat=flat, tile=Tile(gate_rows=4, gate_step=1024)))[0]
        for flat in (True, False)
    ]
    close(*outputs)
    close(outputs[0], routed(case, 2, 1.0).float())


def test_operator_is_sound_for_compilers() -> None:
    case = make([4] * 6, 16, 9, (3,), torch.float32, device=DEVICE)
    x, base, *tensors = case.arguments
    flat = few_tokens_operator.flat((x, base, Adapters.of_layer(*tensors, 4), Routing()))
    assert set(torch.library.opcheck(few_tokens_operator.op, flat, test_utils=("test_schema", "test_faketensor")).values()) == {"SUCCESS"}

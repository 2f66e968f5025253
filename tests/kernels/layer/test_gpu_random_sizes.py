"""No size falls off: at 60 random sizes, the path that the table chooses is not slower than the dense backend."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from meteora_kernels import Adapters, Routing, layer, mix
from support.random_sizes import Sizes, draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

MARGIN, STARTS = 1.05, 2e-3
"""The noise of a measurement: a ratio, and milliseconds."""


@pytest.mark.parametrize("size", draw(60), ids=lambda size: size.name)
@torch.inference_mode()
def test_the_chosen_path_is_as_fast_as_dense(size: Sizes) -> None:
    from meteora_core.bench.timing import capture, medians

    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).bfloat16()

    rank, scale = sum(size.ranks), size.hidden**-0.5
    offsets = torch.tensor([0, *itertools.accumulate(size.ranks)], device=device)
    stacked = [random(rows, size.hidden, scale=scale) for rows in (len(size.ranks), rank)]
    adapters = Adapters.of_layer(*stacked, random(rank, size.width, scale=0.1), torch.ones(len(size.ranks), device=device), offsets, max(size.ranks))
    x, routing = random(size.tokens, size.hidden, scale=1.0), Routing(size.top_k)
    base = F.linear(x, random(size.width, size.hidden, scale=scale))
    row = layer.row_for(x, adapters, size.top_k)
    works = {"taken": capture(lambda: layer.mix(x, base, adapters, routing)), "dense": capture(lambda: mix(x, base, adapters, routing, backend="dense"))}
    times = medians(works, device, repeats=25, seconds=2.0)
    assert times["taken"] <= MARGIN * times["dense"] + STARTS, f"{row.path} {row.way}: {times}"

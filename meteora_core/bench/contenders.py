"""The contenders of a benchmark: the seven linears of a decoder layer, computed in several ways."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.bench.shapes import ModelShape
from meteora_kernels import Adapters, Group, Routing, mix, reference
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.wide import Wide

RUN, POOL = 8, 16
"""For local routes, the number of neighbouring tokens that share their adapters, and the largest number of different adapters in a batch."""


@dataclass
class Linear:
    """One linear with its adapters, and a single plain LoRA for comparison.

    Attributes:
        weight: Base weights (o, h).
        gate, lora_A, lora_B, scaling, offsets: Tensors of the adapters, as :func:`meteora_kernels.lora_mixture` takes them.
        one_A: A of the plain LoRA (r, h).
        one_B: B of the plain LoRA (o, r).
    """

    weight: Tensor
    gate: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    offsets: Tensor
    one_A: Tensor
    one_B: Tensor


@dataclass
class Linears:
    """Linears that share their input.

    Attributes:
        hidden: Width of the input h.
        linears: The linears.
        fed: Whether a norm or an activation of a fused model writes this input into the buffer that the group reads, as :func:`lay_input` does.
        group: A copy of the weights in the layout of the fused kernels, or None.
    """

    hidden: int
    linears: list[Linear]
    fed: bool = True
    group: Group | None = None


@dataclass(frozen=True)
class Setting:
    """The adapters of a benchmark.

    Attributes:
        adapters: Number of adapters.
        rank: Rank of every adapter.
        top_k: Number of adapters per token and layer.
    """

    adapters: int = 28
    rank: int = 8
    top_k: int = 2


def make_layer(shape: ModelShape, setting: Setting, dtype: torch.dtype, device: torch.device, *, fused: bool) -> list[Linears]:
    """Random weights of one layer. Outputs are of order 1, to which the adapters contribute about a fifth."""
    total = setting.adapters * setting.rank

    def draw(*size: int, scale: float) -> Tensor:
        return (torch.randn(*size, device=device, dtype=torch.float32) * scale).to(dtype)

    groups = []
    for index, (hidden, widths) in enumerate(shape.groups):
        linears = [
            Linear(
                draw(width, hidden, scale=hidden**-0.5),
                draw(setting.adapters, hidden, scale=hidden**-0.5),
                draw(total, hidden, scale=hidden**-0.5),
                draw(total, width, scale=0.1 * setting.rank**-0.5),
                torch.full((setting.adapters,), 2.0, device=device),
                torch.arange(0, total + 1, setting.rank, device=device),
                draw(setting.rank, hidden, scale=hidden**-0.5),
                draw(width, setting.rank, scale=0.1 * setting.rank**-0.5),
            )
            for width in widths
        ]
        group = Linears(hidden, linears, fed=index != 1)  # the input of o comes from the attention, which does not write into the buffer
        if fused:
            group.group = fuse(group, setting)
        groups.append(group)
    return groups


def fuse(linears: Linears, setting: Setting) -> Group:
    """A copy of the weights in the layout of the fused kernels. The other contenders use the original, contiguous weights."""
    total = setting.adapters * setting.rank
    stacked, begin = stacked_rows_of(setting.adapters, total), gate_rows_of(setting.adapters)
    widths = tuple(linear.weight.shape[0] for linear in linears.linears)
    first = linears.linears[0]
    rows = -(-(sum(widths) + len(widths) * stacked) // 128) * 128
    wide = Wide(linears.hidden, total, len(widths))
    has_up = wide.pays(first.weight.dtype)
    packed = wide.new_block(rows, first.weight) if has_up else first.weight.new_zeros(rows, linears.hidden)
    for index, (linear, start) in enumerate(zip(linears.linears, itertools.accumulate(widths, initial=0), strict=False)):
        extra = sum(widths) + index * stacked
        for tensor, at in ((linear.weight, start), (linear.gate, extra), (linear.lora_A, extra + begin)):
            packed[at : at + tensor.shape[0]] = tensor
    up = torch.cat([linear.lora_B.reshape(-1) for linear in linears.linears])
    if has_up:
        wide.place_up(packed, up, list(widths))
    return Group.of(packed, Adapters.of_group(packed, up, first.scaling, first.offsets, widths, setting.rank), has_up=has_up)


def lay_input(linears: Linears, x: Tensor, top_k: int) -> Tensor:
    """``x`` in the form in which a fused model passes it to these linears: in columns of a wider buffer if the group reads it there."""
    from meteora_kernels.group import reads_in_place

    group = linears.group
    if group is None or group.wide is None or not linears.fed or not reads_in_place(group, x.shape[0], top_k):
        return x
    return group.wide.new_rows(x.shape[0], x).copy_(x)


def local_input(group: Linears, x: Tensor, setting: Setting) -> Tensor:
    """``x`` rotated so that runs of :data:`RUN` neighbours choose the same top_k adapters, out of :data:`POOL` in the whole batch, as tokens of a text do.

    Args:
        group: The linears that read ``x``; each chooses adapters by its gate.
        x: Input (M, h).
        setting: The adapters of the benchmark.
    """
    generator = torch.Generator().manual_seed(x.shape[0])
    pool = torch.randperm(setting.adapters, generator=generator)[: max(POOL, setting.top_k)]
    runs = -(-x.shape[0] // RUN)
    picks = torch.stack([pool[torch.randperm(len(pool), generator=generator)[: setting.top_k]] for _ in range(runs)])
    picks = picks.repeat_interleave(RUN, dim=0)[: x.shape[0]].to(x.device)
    turned = x.float()
    for linear in group.linears:
        gate = linear.gate.float()
        for slot in range(setting.top_k):
            turned = turned + (12.0 - slot / setting.top_k) * F.normalize(gate, dim=1)[picks[:, slot]]
    return turned.to(x.dtype)


def run_linear(name: str, linear: Linear, x: Tensor, setting: Setting) -> Tensor:
    """The output of one linear by the contender ``name``: base, peft, loop, gather or the name of a backend."""
    output = F.linear(x, linear.weight)
    if name == "base":
        return output
    if name == "peft":
        return output + F.linear(F.linear(x, linear.one_A), linear.one_B) * 2.0
    if name in ("loop", "gather"):
        indices, weights = reference.route(F.linear(x, linear.gate), setting.top_k)
        mixed_by = _loop if name == "loop" else _gather
        return mixed_by(x, output, linear, indices, weights, setting)
    adapters = Adapters.of_layer(linear.gate, linear.lora_A, linear.lora_B, linear.scaling, linear.offsets, setting.rank)
    mixed = mix(x, output, adapters, Routing(setting.top_k), backend=name)
    assert isinstance(mixed, Tensor)
    return mixed


def run_group(name: str, linears: Linears, x: Tensor, setting: Setting) -> list[Tensor]:
    """Outputs of all linears. The contender ``fused`` computes them in one call, for x as :func:`lay_input` returns it."""
    if name != "fused":
        return [run_linear(name, linear, x, setting) for linear in linears.linears]
    from meteora_kernels import group

    assert linears.group is not None
    output = group.run_group(x, linears.group, Routing(setting.top_k), in_place=not x.is_contiguous())
    return list(torch.split(output, list(linears.group.adapters.widths), dim=-1))


def _loop(x: Tensor, output: Tensor, linear: Linear, indices: Tensor, weights: Tensor, setting: Setting) -> Tensor:
    """A loop over adapters, each applied to the tokens that chose it. The host waits for the GPU once for each adapter."""
    for adapter in range(setting.adapters):
        tokens, slots = torch.where(indices == adapter)
        if tokens.numel():
            rows = slice(adapter * setting.rank, (adapter + 1) * setting.rank)
            part = F.linear(x[tokens], linear.lora_A[rows]) @ linear.lora_B[rows]
            factor = weights[tokens, slots] * linear.scaling[adapter]
            output = output.index_add(0, tokens, (part * factor[:, None]).to(output.dtype))
    return output


def _gather(x: Tensor, output: Tensor, linear: Linear, indices: Tensor, weights: Tensor, setting: Setting) -> Tensor:
    """Copies of A and B of every token's adapters, multiplied as batches of small matrices."""
    lora_A = linear.lora_A.view(setting.adapters, setting.rank, -1)[indices].flatten(1, 2)
    lora_B = linear.lora_B.view(setting.adapters, setting.rank, -1)[indices].flatten(1, 2)
    down = torch.bmm(lora_A, x.unsqueeze(2)).squeeze(2)
    factor = (weights * linear.scaling[indices]).repeat_interleave(setting.rank, dim=1)
    return output + torch.bmm((down * factor).to(x.dtype).unsqueeze(1), lora_B).squeeze(1)


def gather_bytes(shape: ModelShape, setting: Setting, tokens: int, itemsize: int) -> int:
    """Size in bytes of the largest copies that :func:`_gather` makes."""
    return tokens * setting.top_k * setting.rank * 2 * shape.ffn * itemsize

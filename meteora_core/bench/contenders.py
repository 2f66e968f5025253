"""What is compared: one decoder layer's seven linears, done in several ways."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.bench.shapes import ModelShape
from meteora_kernels import lora_mixture, plan, reference

RUN, POOL = 8, 16
"""Local routes: the number of neighbours that share their adapters, and the largest number of different adapters in a batch."""


@dataclass
class Linear:
    """One linear with its adapters; tensors as in :func:`meteora_kernels.lora_mixture`, weight (o, h), one plain LoRA (r, h) and (o, r)."""

    weight: Tensor
    gate: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: Tensor
    offsets: Tensor
    one_A: Tensor
    one_B: Tensor


@dataclass
class Group:
    """Linears that share their input; the rest is what :func:`meteora_kernels.triton_group.group_forward` wants.

    Attributes:
        hidden: h.
        linears: The members.
        fed: Whether a fused model writes this input where the group reads it (by a norm or an activation), as :func:`lay_input` does.
        packed, up, flags, beside: Of the fused group.
    """

    hidden: int
    linears: list[Linear]
    fed: bool = True
    packed: Tensor | None = None
    up: Tensor | None = None
    flags: Tensor | None = None
    beside: bool = False


@dataclass(frozen=True)
class Setting:
    """The adapters of a benchmark.

    Attributes:
        adapters: Their number.
        rank: The rank of every adapter.
        top_k: Adapters per token and layer.
    """

    adapters: int = 28
    rank: int = 8
    top_k: int = 2


def make_layer(shape: ModelShape, setting: Setting, dtype: torch.dtype, device: torch.device, *, fused: bool) -> list[Group]:
    """Random weights of one layer; outputs are of order 1, the adapters' share about a fifth of that."""
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
        group = Group(hidden, linears, fed=index != 1)  # what attention gives to o comes as it is
        if fused:
            _fuse(group, setting)
        groups.append(group)
    return groups


def _fuse(group: Group, setting: Setting) -> None:
    """Lay a copy of the group's weights out as the fused kernels want them; the other contenders keep their own, whose rows lie close together."""
    from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
    from meteora_kernels.triton_group import new_flags
    from meteora_kernels.wide import Wide

    total = setting.adapters * setting.rank
    stacked, begin = stacked_rows_of(setting.adapters, total), gate_rows_of(setting.adapters)
    widths = [linear.weight.shape[0] for linear in group.linears]
    first = group.linears[0].weight
    rows = -(-(sum(widths) + len(widths) * stacked) // 128) * 128
    wide = Wide(group.hidden, total, len(widths))
    group.beside = plan.lies_beside(group.hidden, total, len(widths), first.dtype)
    packed = wide.new_block(rows, first) if group.beside else first.new_zeros(rows, group.hidden)
    for index, (linear, start) in enumerate(zip(group.linears, itertools.accumulate(widths, initial=0), strict=False)):
        extra = sum(widths) + index * stacked
        for tensor, at in ((linear.weight, start), (linear.gate, extra), (linear.lora_A, extra + begin)):
            packed[at : at + tensor.shape[0]] = tensor
    group.packed, group.up, group.flags = packed, torch.cat([linear.lora_B.reshape(-1) for linear in group.linears]), new_flags(first.device)
    if group.beside:
        wide.place_up(packed, group.up, widths)


def lay_input(group: Group, x: Tensor) -> Tensor:
    """``x`` as a fused model gives it to this group: where the plan wants it, columns of a wider buffer."""
    from meteora_kernels.wide import Wide

    if not (group.fed and group.beside) or x.shape[0] <= plan.FEW_TOKENS:
        return x
    widths = [linear.lora_B.shape[1] for linear in group.linears]
    rule = plan.group_rule(x.shape[0], sum(widths), group.hidden, x.dtype, beside=True, in_place=True)
    return Wide(group.hidden, group.linears[0].lora_B.shape[0], len(widths)).new_rows(x.shape[0], x).copy_(x) if rule.order == "wide" else x


def local_input(group: Group, x: Tensor, setting: Setting) -> Tensor:
    """``x`` rotated so that runs of :data:`RUN` neighbours choose the same top_k adapters, out of :data:`POOL` in the whole batch, as tokens of a text do.

    Args:
        group: The linears that read it; each chooses by its own gate.
        x: (M, h).
        setting: N and k.
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
    """One linear's output by contender ``name``: base, peft, loop, gather or a backend's name."""
    output = F.linear(x, linear.weight)
    if name == "base":
        return output
    if name == "peft":
        return output + F.linear(F.linear(x, linear.one_A), linear.one_B) * 2.0
    if name in ("loop", "gather"):
        indices, weights = reference.route(F.linear(x, linear.gate), setting.top_k)
        mix = _loop if name == "loop" else _gather
        return mix(x, output, linear, indices, weights, setting)
    mixed = lora_mixture(
        x,
        output,
        linear.gate,
        linear.lora_A,
        linear.lora_B,
        linear.scaling,
        linear.offsets,
        top_k=setting.top_k,
        backend=name,
        max_rank=setting.rank,
    )
    assert isinstance(mixed, Tensor)
    return mixed


def run_group(name: str, group: Group, x: Tensor, setting: Setting) -> list[Tensor]:
    """Outputs of all linears of a group; ``fused`` does base and adapters of all in one call, on x as :func:`lay_input` gives it."""
    if name != "fused":
        return [run_linear(name, linear, x, setting) for linear in group.linears]
    from meteora_kernels.triton_group import group_forward

    assert group.packed is not None
    assert group.up is not None
    assert group.flags is not None
    first = group.linears[0]
    widths = [linear.lora_B.shape[1] for linear in group.linears]
    arguments = (first.scaling, first.offsets, None, group.flags, widths, first.lora_A.shape[0], setting.rank, setting.top_k, 1.0)
    return list(torch.split(group_forward(x, group.packed, group.up, None, *arguments, group.beside, not x.is_contiguous()), widths, dim=-1))


def _loop(x: Tensor, output: Tensor, linear: Linear, indices: Tensor, weights: Tensor, setting: Setting) -> Tensor:
    """A loop over adapters, each on the tokens that chose it (waits for the GPU once an adapter)."""
    for adapter in range(setting.adapters):
        tokens, slots = torch.where(indices == adapter)
        if tokens.numel():
            rows = slice(adapter * setting.rank, (adapter + 1) * setting.rank)
            part = F.linear(x[tokens], linear.lora_A[rows]) @ linear.lora_B[rows]
            factor = weights[tokens, slots] * linear.scaling[adapter]
            output = output.index_add(0, tokens, (part * factor[:, None]).to(output.dtype))
    return output


def _gather(x: Tensor, output: Tensor, linear: Linear, indices: Tensor, weights: Tensor, setting: Setting) -> Tensor:
    """Every token gets copies of its adapters' A and B, multiplied as batches of small matrices."""
    lora_A = linear.lora_A.view(setting.adapters, setting.rank, -1)[indices].flatten(1, 2)
    lora_B = linear.lora_B.view(setting.adapters, setting.rank, -1)[indices].flatten(1, 2)
    down = torch.bmm(lora_A, x.unsqueeze(2)).squeeze(2)
    factor = (weights * linear.scaling[indices]).repeat_interleave(setting.rank, dim=1)
    return output + torch.bmm((down * factor).to(x.dtype).unsqueeze(1), lora_B).squeeze(1)


def gather_bytes(shape: ModelShape, setting: Setting, tokens: int, itemsize: int) -> int:
    """Bytes of the largest copies that :func:`_gather` makes."""
    return tokens * setting.top_k * setting.rank * 2 * shape.ffn * itemsize

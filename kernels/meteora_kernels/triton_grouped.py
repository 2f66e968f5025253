# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Many adapters of large total rank, many tokens: work follows ``top_k``, not N.

Every (token, slot) pair is sorted by slot and adapter (stable, on the device); blocks of pairs that share an adapter then multiply with that
adapter's A and B only. One pass over the output per slot, in a fixed order, so that the result is deterministic. Passes before the last
write the slots' share alone, in the output's dtype; the last one adds base, share and its own product in float32 and rounds the output once.
(Rounding the share costs little: in bfloat16, with a share of a fifth of the output, 2 % more error than a float32 share.) Memory traffic:
``4 k`` outputs' elements read or written in sum, k times that of one pass, as if every pass added to the output itself; a float32 share would
take half as much again for top-2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.triton_route import route


class Blocks(NamedTuple):
    """Pairs in blocks of one adapter each.

    Attributes:
        order: int64 (k * M,), pairs (slot * M + token) sorted by slot, then adapter, then token.
        adapter: int32 (k * B,), the adapter of a block, -1 where there is none; B blocks a slot.
        start: int32 (k * B,), the block's first place in ``order``.
        end: int32 (k * B,), one past its last.
    """

    order: Tensor
    adapter: Tensor
    start: Tensor
    end: Tensor


def blocks_of(indices: Tensor, adapters: int, size: int) -> Blocks:
    """Sort pairs into blocks of up to ``size``, with no host wait.

    Args:
        indices: int64 (M, k).
        adapters: N.
        size: Pairs a block.
    """
    tokens, slots = indices.shape
    device = indices.device
    keys = (indices + torch.arange(slots, device=device) * adapters).t().reshape(-1)
    ordered, order = torch.sort(keys, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(slots * adapters + 1, device=device)).view(-1)
    counts = (bounds[1:] - bounds[:-1]).view(slots, adapters)
    ends = torch.cumsum((counts + size - 1) // size, dim=1)
    per_slot = ceil_div(tokens, size) + min(adapters, tokens)
    numbers = torch.arange(per_slot, device=device).expand(slots, per_slot).contiguous()
    owner = torch.searchsorted(ends, numbers, right=True)
    real = owner < adapters
    owner = owner.clamp(max=adapters - 1)
    flat = owner + torch.arange(slots, device=device)[:, None] * adapters
    first_block = ends.gather(1, owner) - ((counts + size - 1) // size).gather(1, owner)
    start = bounds[flat] + (numbers - first_block) * size
    end = torch.minimum(start + size, bounds[flat + 1])
    adapter = torch.where(real, owner, -1)
    return Blocks(order, adapter.int().view(-1), start.int().view(-1), end.int().view(-1))


@triton.jit
def grouped_down_kernel(
    x,
    a,
    h,
    weights,
    scaling,
    offsets,
    order,
    adapter,
    start,
    end,
    tokens_total,
    hidden,
    TOP_K: tl.constexpr,
    RANK_P: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[slot * M + token, row] = w s A_i x for the blocks' pairs. x (M, h) and A (R, h) contiguous, h (k * M, RANK_P). Grid: (k * B,)."""
    block = tl.program_id(0)
    owner = tl.load(adapter + block)
    if owner >= 0:
        places = tl.load(start + block) + tl.arange(0, SIZE)
        live = places < tl.load(end + block)
        pairs = tl.load(order + places, mask=live, other=0)
        tokens = pairs % tokens_total
        begin = tl.load(offsets + owner)
        rows = begin + tl.arange(0, RANK_P)
        real = rows < tl.load(offsets + owner + 1)
        steps = tl.arange(0, BLOCK_K)
        total = tl.zeros([SIZE, RANK_P], dtype=tl.float32)
        for k in range(0, hidden, BLOCK_K):
            inside = k + steps < hidden
            left = tl.load(x + tokens[:, None] * hidden + k + steps[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            right = tl.load(a + rows[None, :] * hidden + k + steps[:, None], mask=real[None, :] & inside[:, None], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        slot = pairs // tokens_total
        factor = tl.load(weights + tokens * TOP_K + slot, mask=live, other=0.0) * tl.load(scaling + owner)
        total *= factor[:, None]
        tl.store(h + pairs[:, None] * RANK_P + tl.arange(0, RANK_P)[None, :], total.to(h.dtype.element_ty), mask=live[:, None])


@triton.jit
def grouped_up_kernel(
    h,
    b,
    base,
    out,
    offsets,
    order,
    adapter,
    start,
    end,
    tokens_total,
    width,
    stride_base,
    RANK_P: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[token] = base[token] (HAS_BASE) + out[token] (HAS_SHARE) + h[pair] B_i for one slot's blocks.

    B (R, width), base and out (M, width). Grid: (B, ceil(width / BLOCK_N)).
    """
    block = tl.program_id(0)
    owner = tl.load(adapter + block)
    if owner >= 0:
        places = tl.load(start + block) + tl.arange(0, SIZE)
        live = places < tl.load(end + block)
        pairs = tl.load(order + places, mask=live, other=0)
        tokens = pairs % tokens_total
        begin = tl.load(offsets + owner)
        finish = tl.load(offsets + owner + 1)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = live[:, None] & (columns < width)[None, :]
        total = tl.zeros([SIZE, BLOCK_N], dtype=tl.float32)
        if HAS_BASE:
            total += tl.load(base + tokens[:, None] * stride_base + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_SHARE:
            total += tl.load(out + tokens[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        for r in tl.static_range(0, RANK_P, BLOCK_R):
            inner = r + tl.arange(0, BLOCK_R)
            rows = begin + inner
            left = tl.load(h + pairs[:, None] * RANK_P + inner[None, :], mask=live[:, None], other=0.0)
            right = tl.load(b + rows[:, None] * width + columns[None, :], mask=(rows < finish)[:, None] & (columns < width)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(out + tokens[:, None] * width + columns[None, :], total.to(out.dtype.element_ty), mask=mask)


def mix_grouped(
    x: Tensor,
    base: Tensor,
    gate: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    max_rank: int,
    top_k: int,
    temperature: float,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The layer on top of a finished base output (arguments as in :func:`meteora_kernels.triton_few.mix_few`, any number of tokens).

    Returns:
        (M, o) and the logits (M, N).
    """
    tokens, hidden = x.shape
    width = lora_B.shape[1]
    adapters = gate.shape[0]
    logits = torch.mm(x, gate.t())
    indices, weights = route(logits, top_k, temperature, allowed)
    size = 16 if tokens * top_k < 64 * adapters else 64
    blocks = blocks_of(indices, adapters, size)
    rank_p = max(16, power_of_two(max_rank))
    h = torch.empty(top_k * tokens, rank_p, dtype=x.dtype, device=x.device)
    out = torch.empty(tokens, width, dtype=base.dtype, device=x.device)
    per_slot = blocks.adapter.shape[0] // top_k
    grouped_down_kernel[(blocks.adapter.shape[0],)](
        x, lora_A, h, weights, scaling, offsets, *blocks, tokens, hidden,
        TOP_K=top_k, RANK_P=rank_p, SIZE=size, BLOCK_K=64 if rank_p > 64 else 128, PRECISION="ieee", num_warps=4, num_stages=3,
    )  # fmt: skip
    for slot in range(top_k):
        part = slice(slot * per_slot, (slot + 1) * per_slot)
        grouped_up_kernel[(per_slot, ceil_div(width, 128))](
            h, lora_B, base, out, offsets, blocks.order, blocks.adapter[part], blocks.start[part], blocks.end[part], tokens, width,
            base.stride(0), RANK_P=rank_p, SIZE=size, BLOCK_R=min(rank_p, 64), BLOCK_N=128, HAS_BASE=slot == top_k - 1, HAS_SHARE=slot > 0,
            PRECISION="ieee", num_warps=4, num_stages=2,
        )  # fmt: skip
    return out, logits

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Few tokens on top of a finished base output: gates and ``A x`` in one launch, routing and B in a second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two
from meteora_kernels.triton_decode import routes_of_few, rows_times_tokens
from meteora_kernels.triton_middle import coefficients_of
from meteora_kernels.triton_route import bounded_logits, slot_of, top_of_tile


@triton.jit
def chosen_sum(
    total,
    mid_down,
    stride_mid,
    b,
    width,
    columns,
    column_mask,
    picks,
    scaled,
    first,
    last,
    tokens_total,
    rank,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    RANK_P: tl.constexpr,
    GATHER: tl.constexpr,
    FLAT: tl.constexpr,
    DENSE_DOWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add ``sum_j w_j s_j B_j (A_j x)`` to ``total`` (BN, MP).

    mid_down holds A x: all R rows per token (DENSE_DOWN), or SLOT * RANK_P + row of the chosen adapters only. GATHER takes B's chosen rows
    token by token, FLAT does so for one token without tiles of one row; otherwise all of B is multiplied by a middle that is zero elsewhere
    (16 tokens and more).
    """
    tokens = tl.arange(0, MP)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    live = tokens < tokens_total
    if FLAT:
        # Triton 3.6 moves loads of small one-row tiles to another layout without their masks and then refuses its own code.
        PIECE: tl.constexpr = 16 if RANK_P >= 16 else RANK_P
        share = tl.zeros([BN, MP], dtype=tl.float32)  # apart from the base, which is larger: float32 so loses less in a long sum
        for slot in tl.static_range(TOP_K):
            begin = tl.sum(slot_of(first, slots, slot))
            end = tl.sum(slot_of(last, slots, slot))
            factor = tl.sum(slot_of(scaled, slots, slot))
            for step in tl.static_range(0, RANK_P, PIECE):
                inner = step + tl.arange(0, PIECE)
                inside = begin + inner < end
                values = tl.load(mid_down + (begin + inner if DENSE_DOWN else slot * RANK_P + inner), mask=inside, other=0.0, cache_modifier=".cg") * factor
                rows = (begin + inner).to(tl.int64)[:, None]
                up = tl.load(b + rows * width + columns, mask=inside[:, None] & column_mask, other=0.0)
                share += tl.sum(values[:, None] * up.to(tl.float32), axis=0)[:, None]
        total += share
    elif GATHER:
        CHUNK: tl.constexpr = 16 if TOP_K * RANK_P >= 16 else TOP_K * RANK_P
        before = total
        if RANK_P > 16:
            total = tl.zeros([BN, MP], dtype=tl.float32)
        for slot in tl.static_range(TOP_K):
            factor = slot_of(scaled, slots, slot)
            begin = slot_of(first, slots, slot)
            end = slot_of(last, slots, slot)
            for step in tl.static_range(0, RANK_P, CHUNK if CHUNK < RANK_P else RANK_P):
                inner = step + tl.arange(0, CHUNK if CHUNK < RANK_P else RANK_P)[None, :]
                rows = begin + inner
                inside = live & (rows < end)
                place = rows if DENSE_DOWN else slot * RANK_P + inner + begin * 0
                values = tl.load(mid_down + tokens * stride_mid + place, mask=inside, other=0.0, cache_modifier=".cg")
                values = values * factor
                up = tl.load(b + rows[:, :, None].to(tl.int64) * width + columns[None, :, :], mask=inside[:, :, None] & column_mask[None, :, :], other=0.0)
                total += tl.trans(tl.sum(values[:, :, None] * up.to(tl.float32), axis=1))
        if RANK_P > 16:
            total += before
    else:
        BR: tl.constexpr = 32
        for start in range(0, rank, BR):
            rows = start + tl.arange(0, BR)[None, :]
            inside = live & (rows < rank)
            factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
            values = tl.load(mid_down + tokens * stride_mid + rows, mask=inside, other=0.0, cache_modifier=".cg")
            values = tl.where(factor == 0.0, 0.0, values * factor)
            up = tl.load(b + rows.to(tl.int64) * width + tl.trans(columns), mask=(rows < rank) & tl.trans(column_mask), other=0.0)
            total = tl.dot(up, tl.trans(values).to(up.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def chosen_down(
    a,
    x,
    mid,
    mid_down,
    stride_mid,
    allowed,
    scaling,
    offsets,
    token,
    slot,
    hidden,
    count,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_P: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """``A_i x`` of one token's slot: rows of the adapter that the logits at ``mid`` choose, written to mid_down[slot * RANK_P :]."""
    columns = tl.arange(0, PADDED)[None, :]
    slots = tl.arange(0, SLOTS)[None, :]
    one = tl.zeros([1, 1], dtype=tl.int32)
    tile = bounded_logits(mid, one, stride_mid, columns, count, allowed, one == 0, HAS_ALLOWED)
    picks, _ = top_of_tile(tile, columns, count, temperature, TOP_K, SLOTS)
    pick = tl.sum(tl.where(slots == slot, picks, 0))
    begin = tl.load(offsets + pick)
    inner = tl.arange(0, RANK_P)
    rows = (begin + inner).to(tl.int64)[:, None]
    mask = rows < tl.load(offsets + pick + 1)
    total = rows_times_tokens(a, rows, mask, x + token * hidden, 1, hidden, hidden, hidden, RANK_P, BK, 1, EVEN, 1, "ieee")
    tl.store(mid_down + slot * RANK_P + inner[:, None], total)


@triton.jit
def gates_kernel(
    x,
    gate,
    a,
    mid,
    tokens_total,
    hidden,
    count,
    rank,
    stride_mid,
    MP: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mid[t] = [G x, A x], float32 (M, N + R) (R = 0: the gates alone). Grid: ceil(N / BG) + ceil(R / BG) programs."""
    pid = tl.program_id(0)
    tokens = tl.arange(0, MP)[None, :]
    gate_tiles = tl.cdiv(count, BG)
    if pid < gate_tiles:
        local = pid * BG + tl.arange(0, BG)[:, None]
        total = rows_times_tokens(gate, local.to(tl.int64), local < count, x, tokens_total, hidden, hidden, hidden, BG, BK, MP, EVEN, STAGES, PRECISION)
        tl.store(mid + tokens * stride_mid + local, total, mask=(local < count) & (tokens < tokens_total))
    else:
        local = (pid - gate_tiles) * BG + tl.arange(0, BG)[:, None]
        total = rows_times_tokens(a, local.to(tl.int64), local < rank, x, tokens_total, hidden, hidden, hidden, BG, BK, MP, EVEN, STAGES, PRECISION)
        tl.store(mid + tokens * stride_mid + count + local, total, mask=(local < rank) & (tokens < tokens_total))


@triton.jit
def chosen_kernel(
    x,
    a,
    mid,
    allowed,
    scaling,
    offsets,
    hidden,
    count,
    temperature,
    stride_mid,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_P: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """mid[t, N + j * RANK_P + row] = A x of slot j's adapter. Grid: (M * TOP_K,)."""
    pid = tl.program_id(0)
    token = pid // TOP_K
    here = mid + token * stride_mid
    chosen_down(
        a,
        x,
        here,
        here + count,
        stride_mid,
        allowed,
        scaling,
        offsets,
        token,
        pid % TOP_K,
        hidden,
        count,
        temperature,
        TOP_K,
        SLOTS,
        PADDED,
        RANK_P,
        BK,
        EVEN,
        HAS_ALLOWED,
    )


@triton.jit
def apply_kernel(
    base,
    b,
    mid,
    allowed,
    scaling,
    offsets,
    y,
    tokens_total,
    count,
    rank,
    width,
    stride_base,
    stride_mid,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    RANK_P: tl.constexpr,
    MP: tl.constexpr,
    BN: tl.constexpr,
    DENSE_DOWN: tl.constexpr,
    GATHER: tl.constexpr,
    FLAT: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = base + the chosen adapters' share, from mid. Grid: (ceil(width / BN),)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    tokens = tl.arange(0, MP)[None, :]
    mask = (columns < width) & (tokens < tokens_total)
    total = tl.load(base + tokens.to(tl.int64) * stride_base + columns, mask=mask, other=0.0).to(tl.float32)
    picks, scaled, first, last = routes_of_few(
        mid, stride_mid, allowed, scaling, offsets, tokens_total, count, temperature, TOP_K, SLOTS, PADDED, MP, HAS_ALLOWED
    )
    total = chosen_sum(
        total,
        mid + count,
        stride_mid,
        b,
        width,
        tl.trans(columns),
        tl.trans(columns < width),
        picks,
        scaled,
        first,
        last,
        tokens_total,
        rank,
        TOP_K,
        SLOTS,
        MP,
        BN,
        RANK_P,
        GATHER,
        FLAT,
        DENSE_DOWN,
        PRECISION,
    )
    tl.store(y + tokens.to(tl.int64) * width + columns, total.to(y.dtype.element_ty), mask=mask)


def padded_tokens(tokens: int) -> int:
    """The tile's number of token columns: 1, or a power of two from 16 (the least that a matrix unit takes)."""
    return 1 if tokens == 1 else max(16, power_of_two(tokens))


def mix_few(
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
    *,
    dense_down: bool,
) -> tuple[Tensor, Tensor]:
    """The layer on top of a finished base output, for few tokens, in two or three launches.

    Args:
        x: (M, h), contiguous, 1 <= M <= 64.
        base: (M, o), columns contiguous.
        gate, lora_A, lora_B, scaling, offsets: As in :func:`meteora_kernels.lora_mixture`, contiguous.
        max_rank, top_k, temperature, allowed, dense_down: As in :func:`decode`.

    Returns:
        (M, o) and the logits float32 (M, N).
    """
    tokens, hidden = x.shape
    count, (rank, width) = gate.shape[0], lora_B.shape
    mp = padded_tokens(tokens)
    rank_p = max(1, power_of_two(max_rank))
    gather = mp <= 16
    dense_down = dense_down or not gather
    mid = torch.empty(tokens, count + (rank if dense_down else top_k * rank_p), dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, width, dtype=base.dtype, device=x.device)
    slots, padded = power_of_two(top_k), padded_adapters(count)
    permitted = allowed if allowed is not None else x
    bg, bk, stages = (4, 1024, 4) if mp == 1 else (16, 512, 3)
    gates_kernel[(ceil_div(count, bg) + (ceil_div(rank, bg) if dense_down else 0),)](
        x,
        gate,
        lora_A,
        mid,
        tokens,
        hidden,
        count,
        rank,
        mid.stride(0),
        MP=mp,
        BG=bg,
        BK=bk,
        EVEN=hidden % bk == 0,
        STAGES=stages,
        PRECISION="ieee",
        num_warps=4,
        num_stages=stages,
    )
    if not dense_down:
        chosen_kernel[(tokens * top_k,)](
            x, lora_A, mid, permitted, scaling, offsets, hidden, count, temperature, mid.stride(0), TOP_K=top_k, SLOTS=slots, PADDED=padded,
            RANK_P=rank_p, BK=512, EVEN=hidden % 512 == 0, HAS_ALLOWED=allowed is not None, num_warps=4,
        )  # fmt: skip
    bn = 64 if gather else 32
    flat = mp == 1 and (padded, slots, rank_p) != (32, 2, 8)  # the published figures are of that shape in the other form, which compiles there
    apply_kernel[(ceil_div(width, bn),)](
        base, lora_B, mid, permitted, scaling, offsets, y, tokens, count, rank, width, base.stride(0), mid.stride(0), temperature,
        TOP_K=top_k, SLOTS=slots, PADDED=padded, RANK_P=rank_p, MP=mp, BN=bn, DENSE_DOWN=dense_down, GATHER=gather, FLAT=flat,
        HAS_ALLOWED=allowed is not None, PRECISION="ieee", num_warps=4,
    )  # fmt: skip
    return y, mid[:, :count]

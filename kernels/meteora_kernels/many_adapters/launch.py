# mypy: disable-error-code="no-untyped-call"
"""Launchers: one function for each launch. P is the largest rank rounded up to a power of two, G is members * top_k, and S a number of partial sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from meteora_kernels.arguments import choice_constants, or_any, span_of, three
from meteora_kernels.many_adapters.device_sorted import blocks_down_kernel, blocks_up_kernel, fours_up_kernel, routes_kernel, sort_kernel
from meteora_kernels.many_adapters.device_tokens import gates_kernel, routed_up_kernel, tokens_down_kernel, tokens_up_kernel
from meteora_kernels.plan.machine import HALVES
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.steps.products import bmm_float32
from meteora_kernels.types import Adapters, Routing

UP_TILE = (256, 4)
"""Columns and warps of a program of :func:`blocks_up`."""
DOWN_TILE, DOWN_TOGETHER = (128, 1, 4, 4096), (128, 1, 4, 2048)
"""Columns per step, warps and stages of :func:`blocks_down`, and the number of programs to reach by cutting its sums into pieces; the second if the slots of a
member are sorted together."""
LIBRARY_GATES = 1024
"""From this number of tokens on, the library computes the logits of 16-bit models in :func:`gate_logits`."""


SIZE, SHORT = 16, 4
"""The largest numbers of tokens in a block and in a short block."""
MOST_FOURS = 16
"""Up to this rank, a power of two, :func:`blocks_up` does not use matrix units."""
FOURS_UP = (256, 1)
"""Columns and warps of a program of :func:`fours_up_kernel`."""
ROUTED_UP = (4, 256, 4)
"""Tokens, columns and warps of a program of :func:`routed_up`."""


class Sorted(NamedTuple):
    """The entries of G groups, sorted by adapter, in blocks of one adapter each.

    Either every slot of a member is a group, whose entries are tokens (G = members * top_k, E = M), or all slots of a member together are one: entry
    ``slot * M + token`` (G = members, E = top_k * M).

    Attributes:
        picks: Adapter of every token, int32 (members * top_k, M).
        factors: ``w_j s_j`` of every token, float32 (members * top_k, M).
        order: Numbers of entries, sorted by adapter and then by number, int32 (G, E).
        table: Blocks of up to SIZE entries, int32 (6, G, B). The six fields are the block's adapter (-1 for an unused block), its first place in ``order``, one
            past its last place, the adapter's first row, one past its last row, and a counter that starts at 0.
        short_table: Blocks of up to SHORT entries with the same fields, int32 (6, G, C), for ranks up to MOST_FOURS; otherwise, and if the slots are one
            group, empty.
    """

    picks: Tensor
    factors: Tensor
    order: Tensor
    table: Tensor
    short_table: Tensor


def pieces_of(programs: int, wanted: int, steps: int) -> int:
    """The number of pieces, of at least four steps each, into which to cut a sum of ``steps`` steps so that about ``wanted`` programs run."""
    return max(1, min(ceil_div(wanted, programs), steps // 4))


def gate_sums(x: Tensor, adapters: Adapters) -> Tensor:
    """Gate logits of all members for x (M, h), columns contiguous: float32 partial sums (S, M, members * N)."""
    tokens, hidden = x.shape
    count, members = adapters.number, adapters.members
    large = tokens >= 1024
    bm = 128 if large else min(64, max(16, power_of_two(tokens)))
    bn = min(128 if tokens > 64 else 64, max(16, power_of_two(count)))
    bk = 64 if x.element_size() == 2 else 32
    programs = ceil_div(count, bn) * members * ceil_div(tokens, bm)
    span = span_of(hidden, pieces_of(programs, 132, ceil_div(hidden, bk)), bk)
    pieces = ceil_div(hidden, span)
    logits = torch.empty(pieces, tokens, members * count, dtype=torch.float32, device=x.device)
    gates_kernel[(programs * pieces,)](
        x, adapters.gate, logits, tokens, hidden, count, x.stride(0), adapters.gate.stride(0), adapters.member_rows,
        MEMBERS=members, BM=bm, BN=bn, BK=bk, SPAN=span, WHOLE=hidden % span == 0, PRECISION="ieee", num_warps=8 if large else 4, num_stages=4,
    )  # fmt: skip
    return logits


def gate_logits(x: Tensor, adapters: Adapters) -> Tensor:
    """Gate logits of all members for x (M, h), columns contiguous: float32 partial sums (S, M, members, N), columns contiguous."""
    tokens, count, members = x.shape[0], adapters.number, adapters.members
    if tokens < LIBRARY_GATES or x.dtype not in HALVES:
        return gate_sums(x, adapters).view(-1, tokens, members, count)
    stride = adapters.gate.stride(0)
    gates = adapters.gate.as_strided((members, x.shape[1], count), (adapters.member_rows * stride, 1, stride))
    return bmm_float32(x.expand(members, *x.shape), gates).transpose(0, 1).unsqueeze(0)


def tokens_down(x: Tensor, logits: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Every token's chosen rows of A, int32 (M, members * k * P), and ``A x`` times ``w_j s_j``, float32 partial sums (S, M, members * k * P)."""
    tokens, hidden = x.shape
    members, rank_p = adapters.members, adapters.rank_p
    places = routing.top_k * rank_p
    rows, step = min(16, power_of_two(places)), 256
    span = span_of(hidden, 4, step)
    pieces = ceil_div(hidden, span)
    rows_out = torch.empty(tokens, members * places, dtype=torch.int32, device=x.device)
    values = torch.empty(pieces, tokens, members * places, dtype=torch.float32, device=x.device)
    tokens_down_kernel[(pieces * ceil_div(places, rows) * tokens * members,)](
        x, adapters.lora_A, logits, or_any(routing.allowed, logits), adapters.scaling, adapters.offsets,
        or_any(routing.chosen, logits), rows_out, values, tokens, hidden, adapters.number, x.stride(0), adapters.lora_A.stride(0), adapters.member_rows,
        routing.temperature, **choice_constants(adapters, routing), MEMBERS=members, RANK_P=rank_p, ROWS=rows,
        BK=step, SPAN=span, PIECES=pieces, SPLITS=logits.shape[0], KEEP=routing.chosen is not None, EVEN=hidden % step == 0,
        WHOLE=hidden % span == 0, STAGES=3, num_warps=2, num_stages=3,
    )  # fmt: skip
    return rows_out, values


def tokens_up(base: Tensor, bias: Tensor | None, chosen: tuple[Tensor, Tensor], adapters: Adapters, y: Tensor) -> None:
    """Write base plus bias plus the chosen rows of B times their values to ``y`` (M, O).

    ``chosen`` is the result of :func:`tokens_down`; ``base`` is (M, O), or (S, M, O) partial sums.
    """
    rows, values = chosen
    tokens, members = y.shape[0], adapters.members
    bm, bn = 4, 256
    tokens_up_kernel[(sum(ceil_div(width, bn) for width in adapters.widths), ceil_div(tokens, bm))](
        base, or_any(bias, base), adapters.lora_B, rows, values, y, tokens, adapters.total_rank,
        base.stride(0) if base.dim() == 3 else 0, base.stride(-2), y.stride(0), *three(adapters.widths),
        MEMBERS=members, PLACES=rows.shape[1] // members, PIECES=values.shape[0], SPLITS=base.shape[0] if base.dim() == 3 else 1, BM=bm, BN=bn,
        HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip


def route_tokens(logits: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Every token's adapters, int32 (members * k, M), and ``w_j s_j``, float32 of the same shape.

    ``logits`` are (M, N) for one linear, or partial sums (S, M, members, N), columns contiguous.
    """
    logits = logits[None, :, None] if logits.dim() == 2 else logits
    tokens, top_k, members = logits.shape[1], routing.top_k, adapters.members
    picks = torch.empty(members * top_k, tokens, dtype=torch.int32, device=logits.device)
    factors = torch.empty(members * top_k, tokens, dtype=torch.float32, device=logits.device)
    block = max(1, min(16, 2048 // adapters.padded, tokens // 128))
    block = 1 << (block.bit_length() - 1)
    routes_kernel[(ceil_div(tokens, block), members)](
        logits, or_any(routing.allowed, logits), adapters.scaling, or_any(routing.chosen, logits), picks, factors, tokens, adapters.number,
        logits.stride(1), logits.stride(2), logits.stride(0), routing.temperature,
        **choice_constants(adapters, routing), BLOCK=block, SPLITS=logits.shape[0],
        KEEP=routing.chosen is not None, num_warps=4,
    )  # fmt: skip
    return picks, factors


def sort_tokens(logits: Tensor, adapters: Adapters, routing: Routing, *, together: bool = False) -> Sorted:
    """Route all tokens and sort them by adapter, without a wait on the host.

    Args:
        logits: Those of :func:`route_tokens`.
        adapters: The members' adapters.
        routing: Top-k, routing temperature and ``allowed``.
        together: Whether the slots of a member are sorted together, without short blocks.
    """
    picks, factors = route_tokens(logits, adapters, routing)
    groups, tokens = (adapters.members, routing.top_k * picks.shape[1]) if together else picks.shape
    short = SHORT if adapters.rank_p <= MOST_FOURS and not together else 0
    most = tokens // SIZE + adapters.number
    most_short = tokens // short + adapters.number if short else 0
    order = torch.empty(groups, tokens, dtype=torch.int32, device=logits.device)
    table = torch.empty(6, groups, most, dtype=torch.int32, device=logits.device)
    short_table = torch.empty(6, groups, most_short, dtype=torch.int32, device=logits.device)
    sort_kernel[(adapters.number, groups)](
        picks, adapters.offsets, order, table, short_table, tokens, groups, most, most_short,
        SIZE=SIZE, SHORT=short, CHUNK=min(4096, max(16, power_of_two(tokens))), num_warps=4,
    )  # fmt: skip
    return Sorted(picks, factors, order, table, short_table)


def blocks_down(x: Tensor, found: Sorted, adapters: Adapters) -> Tensor:
    """``A x`` times ``w_j s_j`` for every member, slot and token, float32 (members * top_k, M, P)."""
    tokens, hidden = x.shape
    _, groups, most = found.table.shape
    entries = found.order.shape[1]
    rank_p = adapters.rank_p
    rank_d = max(16, rank_p)
    bk, warps, stages, programs = DOWN_TOGETHER if groups == adapters.members else DOWN_TILE
    bk, warps = min(bk, (128 if rank_p <= 64 else 64) * 2 // x.element_size()), warps if rank_p <= MOST_FOURS else 4
    span = span_of(hidden, pieces_of(min(entries, most) * groups, programs, ceil_div(hidden, bk)), bk)
    pieces = ceil_div(hidden, span)
    middle = torch.empty(*found.factors.shape, rank_p, dtype=torch.float32, device=x.device)
    parts = torch.empty(pieces, groups * most, SIZE, rank_d, dtype=torch.float32, device=x.device) if pieces > 1 else middle
    blocks_down_kernel[(pieces * groups * most,)](
        x, adapters.lora_A, found.factors, found.order, found.table, parts, middle,
        tokens, entries, hidden, most, groups, x.stride(0), adapters.lora_A.stride(0), adapters.member_rows,
        TOP_K=groups // adapters.members, RANK_P=rank_p, RANK_D=rank_d, SIZE=SIZE, BK=bk, SPAN=span, WHOLE=hidden % span == 0, PIECES=pieces,
        PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return middle


def blocks_up(base: Tensor, bias: Tensor | None, middle: Tensor, found: Sorted, adapters: Adapters, y: Tensor) -> None:
    """Write base plus bias plus ``middle B`` of all slots to ``y`` (M, O).

    ``middle`` is the result of :func:`blocks_down`; ``base`` is (M, O), or (S, M, O) partial sums, and must not be ``y``.
    """
    tokens, members, rank_p = y.shape[0], adapters.members, adapters.rank_p
    fours = rank_p <= MOST_FOURS
    table = found.short_table if fours else found.table
    _, groups, most = table.shape
    columns, warps = FOURS_UP if fours else UP_TILE
    bn = min(columns, max(16, power_of_two(max(adapters.widths))))
    splits, stride_split = (base.shape[0], base.stride(0)) if base.dim() == 3 else (1, 0)
    grid = (most, sum(ceil_div(width, bn) for width in adapters.widths))
    arguments = (
        middle, adapters.lora_B, base, or_any(bias, base), y, found.order, table, tokens, adapters.total_rank, most, groups,
        stride_split, base.stride(-2), y.stride(0), *three(adapters.widths),
    )  # fmt: skip
    for slot in range(groups // members):
        facts = {"SLOT": slot, "MEMBERS": members, "TOP_K": groups // members, "RANK_P": rank_p, "BN": bn, "SPLITS": splits, "HAS_BIAS": bias is not None}
        if fours:
            fours_up_kernel[grid](*arguments, **facts, num_warps=warps)
        else:
            blocks_up_kernel[grid](*arguments, **facts, RANK_D=rank_p, BLOCK_R=32, SIZE=SIZE, PRECISION="ieee", num_warps=warps, num_stages=2)


def routed_up(base: Tensor, bias: Tensor | None, middle: Tensor, found: Sorted, adapters: Adapters, y: Tensor) -> None:
    """:func:`blocks_up` token by token, with all slots in one launch: B is read for each token, and the base and ``y`` once."""
    tokens, members = y.shape[0], adapters.members
    bm, bn, warps = ROUTED_UP
    splits, stride_split = (base.shape[0], base.stride(0)) if base.dim() == 3 else (1, 0)
    routed_up_kernel[(sum(ceil_div(width, bn) for width in adapters.widths), ceil_div(tokens, bm))](
        base, or_any(bias, base), adapters.lora_B, found.picks, middle, adapters.offsets, y, tokens, adapters.total_rank,
        stride_split, base.stride(-2), y.stride(0), *three(adapters.widths),
        MEMBERS=members, TOP_K=found.picks.shape[0] // members, RANK_P=adapters.rank_p, SPLITS=splits, BM=bm, BN=bn, HAS_BIAS=bias is not None,
        num_warps=warps,
    )  # fmt: skip

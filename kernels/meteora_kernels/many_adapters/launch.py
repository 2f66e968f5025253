# mypy: disable-error-code="no-untyped-call"
"""Values that describe a layer's adapters, and one function for each launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from meteora_kernels.many_adapters.device import (
    blocks_down_kernel,
    blocks_up_kernel,
    gates_kernel,
    routes_kernel,
    sort_kernel,
    tokens_down_kernel,
    tokens_up_kernel,
)
from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two

UP_TILE = (256, 4)
"""Columns of a program of :func:`blocks_up`, and its warps."""
DOWN_TILE = (128, 2, 4, 4096)
"""Columns a step of :func:`blocks_down`, warps, stages, and how many programs to aim at by cutting its sums."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of one to three linears that share their input; N, the ranks and the scaling are the same for all of them.

    Attributes:
        gates: (., h), columns contiguous: the gate rows of member i start at row ``i * member_rows``. Not read where logits are given.
        a: (., h), columns contiguous, rows as far apart as those of ``gates``: member i's R rows of A start at row ``i * member_rows``.
        b: Every member's B (R, width), contiguous, one behind the other, flat or 2-d.
        member_rows: Rows from one member to the next.
        widths: Outputs of each member.
        max_rank: The largest rank.
        scaling: float32 (N,).
        offsets: int64 (N + 1,).
    """

    gates: Tensor
    a: Tensor
    b: Tensor
    member_rows: int
    widths: tuple[int, ...]
    max_rank: int
    scaling: Tensor
    offsets: Tensor

    @property
    def count(self) -> int:
        """N."""
        return self.scaling.shape[0]

    @property
    def rank_p(self) -> int:
        """Places of one adapter's rows: the largest rank up to a power of two, at least 1."""
        return max(1, power_of_two(self.max_rank))

    @property
    def total_rank(self) -> int:
        """R."""
        return self.b.numel() // sum(self.widths)


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose: k, T, and bool (N,), the adapters that may be chosen, or None."""

    top_k: int
    temperature: float
    allowed: Tensor | None = None


class Sorted(NamedTuple):
    """Tokens sorted by adapter, for every member and slot, in blocks of one adapter each; G = members * top_k.

    Attributes:
        factors: float32 (G, M), ``w_j s_j`` of every token.
        order: int32 (G, M), tokens sorted by adapter, then by number.
        table: int32 (5, G, B): a block's adapter (-1: none), its first place in ``order``, one past its last, the adapter's first row, one past its last.
        size: Tokens in a block, at most.
    """

    factors: Tensor
    order: Tensor
    table: Tensor
    size: int


def span_of(hidden: int, pieces: int, step: int) -> int:
    """Columns of a piece of a sum over h: a multiple of ``step``."""
    return ceil_div(ceil_div(hidden, pieces), step) * step


def _pieces(programs: int, wanted: int, steps: int) -> int:
    """Into how many pieces to cut a sum of so many steps so that about ``wanted`` programs run; none has fewer than four steps."""
    return max(1, min(ceil_div(wanted, programs), steps // 4))


def gate_sums(x: Tensor, adapters: Adapters) -> Tensor:
    """Logits of all members as float32 partial sums (S, M, members * N). x: (M, h), columns contiguous."""
    tokens, hidden = x.shape
    count, members = adapters.count, len(adapters.widths)
    large = tokens >= 1024
    bm = 128 if large else min(64, max(16, power_of_two(tokens)))
    bn = min(128 if tokens > 64 else 64, max(16, power_of_two(count)))
    bk = 64 if x.element_size() == 2 else 32
    programs = ceil_div(count, bn) * members * ceil_div(tokens, bm)
    span = span_of(hidden, _pieces(programs, 132, ceil_div(hidden, bk)), bk)
    pieces = ceil_div(hidden, span)
    logits = torch.empty(pieces, tokens, members * count, dtype=torch.float32, device=x.device)
    gates_kernel[(programs * pieces,)](
        x, adapters.gates, logits, tokens, hidden, count, x.stride(0), adapters.gates.stride(0), adapters.member_rows,
        MEMBERS=members, BM=bm, BN=bn, BK=bk, SPAN=span, WHOLE=hidden % span == 0, PRECISION="ieee", num_warps=8 if large else 4, num_stages=4,
    )  # fmt: skip
    return logits


def tokens_down(x: Tensor, logits: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Each token's chosen rows of A, int32 (M, members * k * P), and ``A x`` times ``w_j s_j`` there, float32 partial sums (S, M, the same)."""
    tokens, hidden = x.shape
    members, rank_p = len(adapters.widths), adapters.rank_p
    places = routing.top_k * rank_p
    rows, step = min(16, power_of_two(places)), 256
    span = span_of(hidden, 4, step)
    pieces = ceil_div(hidden, span)
    rows_out = torch.empty(tokens, members * places, dtype=torch.int32, device=x.device)
    values = torch.empty(pieces, tokens, members * places, dtype=torch.float32, device=x.device)
    tokens_down_kernel[(pieces * ceil_div(places, rows) * tokens * members,)](
        x, adapters.a, logits, routing.allowed if routing.allowed is not None else logits, adapters.scaling, adapters.offsets, rows_out, values,
        tokens, hidden, adapters.count, x.stride(0), adapters.a.stride(0), adapters.member_rows, routing.temperature,
        MEMBERS=members, TOP_K=routing.top_k, SLOTS=power_of_two(routing.top_k), PADDED=padded_adapters(adapters.count), RANK_P=rank_p, ROWS=rows,
        BK=step, SPAN=span, PIECES=pieces, SPLITS=logits.shape[0], HAS_ALLOWED=routing.allowed is not None, EVEN=hidden % step == 0,
        WHOLE=hidden % span == 0, STAGES=3, num_warps=2, num_stages=3,
    )  # fmt: skip
    return rows_out, values


def tokens_up(base: Tensor, bias: Tensor | None, chosen: tuple[Tensor, Tensor], adapters: Adapters, y: Tensor) -> None:
    """``y = base + bias + B``'s chosen rows times their values, for ``chosen`` of :func:`tokens_down`. base: (M, O), or (S, M, O), partial sums."""
    rows, values = chosen
    tokens, members = y.shape[0], len(adapters.widths)
    bm, bn = 4, 256
    padded = (*adapters.widths, 0, 0)
    tokens_up_kernel[(sum(ceil_div(width, bn) for width in adapters.widths), ceil_div(tokens, bm))](
        base, bias if bias is not None else base, adapters.b, rows, values, y, tokens, adapters.total_rank,
        base.stride(0) if base.dim() == 3 else 0, base.stride(-2), y.stride(0), padded[0], padded[1], padded[2],
        MEMBERS=members, PLACES=rows.shape[1] // members, PIECES=values.shape[0], SPLITS=base.shape[0] if base.dim() == 3 else 1, BM=bm, BN=bn,
        HAS_BIAS=bias is not None, num_warps=4,
    )  # fmt: skip


def sort_tokens(logits: Tensor, adapters: Adapters, routing: Routing, size: int = 16) -> Sorted:
    """Route all tokens and sort them by adapter, with no host wait. logits: (M, members * N), or (S, M, members * N), partial sums."""
    tokens, top_k, count = logits.shape[-2], routing.top_k, adapters.count
    members = len(adapters.widths)
    groups = members * top_k
    most = tokens // size + count
    device = logits.device
    picks = torch.empty(groups, tokens, dtype=torch.int32, device=device)
    factors = torch.empty(groups, tokens, dtype=torch.float32, device=device)
    padded = padded_adapters(count)
    block = max(1, min(16, 2048 // padded, tokens // 128))
    block = 1 << (block.bit_length() - 1)
    routes_kernel[(ceil_div(tokens, block), members)](
        logits, routing.allowed if routing.allowed is not None else logits, adapters.scaling, picks, factors, tokens, count,
        logits.stride(-2), logits.stride(0) if logits.dim() == 3 else 0, routing.temperature,
        TOP_K=top_k, SLOTS=power_of_two(top_k), PADDED=padded, BLOCK=block, SPLITS=logits.shape[0] if logits.dim() == 3 else 1,
        HAS_ALLOWED=routing.allowed is not None, num_warps=4,
    )  # fmt: skip
    order = torch.empty(groups, tokens, dtype=torch.int32, device=device)
    table = torch.empty(5, groups, most, dtype=torch.int32, device=device)
    sort_kernel[(count, groups)](
        picks, adapters.offsets, order, *table.unbind(0), tokens, most, SIZE=size, CHUNK=min(4096, max(16, power_of_two(tokens))), num_warps=4
    )
    return Sorted(factors, order, table, size)


def blocks_down(x: Tensor, found: Sorted, adapters: Adapters, top_k: int) -> Tensor:
    """``A x`` times ``w_j s_j`` for every token, member and slot: float32 partial sums (S, G, M, P)."""
    tokens, hidden = x.shape
    _, groups, most = found.table.shape
    rank_p = adapters.rank_p
    bk, warps, stages, programs = DOWN_TILE
    bk = min(bk, (128 if rank_p <= 64 else 64) * 2 // x.element_size())
    span = span_of(hidden, _pieces(min(tokens, most) * groups, programs, ceil_div(hidden, bk)), bk)
    pieces = ceil_div(hidden, span)
    middle = torch.empty(pieces, groups, tokens, rank_p, dtype=torch.float32, device=x.device)
    blocks_down_kernel[(pieces * groups * most,)](
        x, adapters.a, found.factors, found.order, *found.table.unbind(0), middle,
        tokens, hidden, most, groups, x.stride(0), adapters.a.stride(0), adapters.member_rows,
        TOP_K=top_k, RANK_P=rank_p, RANK_D=max(16, rank_p), SIZE=found.size, BK=bk, SPAN=span, WHOLE=hidden % span == 0, PIECES=pieces,
        PRECISION="ieee", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return middle


def blocks_up(base: Tensor, bias: Tensor | None, middle: Tensor, found: Sorted, adapters: Adapters, y: Tensor) -> None:
    """``y = base + bias +`` the slots' ``middle B``, for ``middle`` of :func:`blocks_down`. base: (M, O), or (S, M, O), partial sums; not ``y`` itself."""
    tokens, members = y.shape[0], len(adapters.widths)
    _, groups, most = found.table.shape
    top_k = groups // members
    rank_p = adapters.rank_p
    rank_d = max(16, rank_p)
    bn, warps = min(UP_TILE[0], max(16, power_of_two(max(adapters.widths)))), UP_TILE[1]
    padded = (*adapters.widths, 0, 0)
    for slot in range(top_k):
        blocks_up_kernel[(most, sum(ceil_div(width, bn) for width in adapters.widths))](
            middle, adapters.b, base, bias if bias is not None else base, y, found.order, *found.table.unbind(0),
            tokens, adapters.total_rank, most, groups, base.stride(0) if base.dim() == 3 else 0, base.stride(-2), y.stride(0),
            padded[0], padded[1], padded[2],
            SLOT=slot, MEMBERS=members, TOP_K=top_k, RANK_P=rank_p, RANK_D=rank_d, BLOCK_R=min(rank_d, 32), SIZE=found.size, BN=bn,
            PIECES=middle.shape[0], SPLITS=base.shape[0] if base.dim() == 3 else 1, HAS_BIAS=bias is not None, PRECISION="ieee",
            num_warps=warps, num_stages=2,
        )  # fmt: skip

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The middle of the layer between its GEMMs: route, scale and mask ``A x`` (forward), and the derivative of that (backward)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two
from meteora_kernels.triton_route import bounded_logits, slot_of, summed, top_of_tile


@triton.jit
def routes_of_tile(
    logits,
    tokens,
    stride_logits,
    allowed,
    given_indices,
    given_weights,
    mask,
    count,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    GIVEN: tl.constexpr,
    stride_split=0,
    SPLITS: tl.constexpr = 1,
):
    """indices int32 and weights float32 (M, SLOTS) of a tile of tokens, from logits (or their partial sums) or as given (M, TOP_K)."""
    slots = tl.arange(0, SLOTS)[None, :]
    if GIVEN:
        keep = mask & (slots < TOP_K)
        picks = tl.load(given_indices + tokens * TOP_K + slots, mask=keep, other=0).to(tl.int32)
        shares = tl.load(given_weights + tokens * TOP_K + slots, mask=keep, other=0.0).to(tl.float32)
    else:
        columns = tl.arange(0, PADDED)[None, :]
        tile = bounded_logits(logits, tokens, stride_logits, columns, count, allowed, mask, HAS_ALLOWED, stride_split, SPLITS)
        picks, shares = top_of_tile(tile, columns, count, temperature, TOP_K, SLOTS)
    return picks, shares


@triton.jit
def coefficients_of(rows, picks, scaled, first, last, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """Per token and row of A: the sum of ``w_j s_j`` over the slots j whose adapter owns the row, float32 (M, C).

    Args:
        rows: int32 (1, C) or (M, C).
        picks, scaled, first, last: (M, SLOTS): adapter, ``w_j * s_j``, first row and one past the last row of each slot's adapter.
    """
    slots = tl.arange(0, SLOTS)[None, :]
    total = tl.zeros([picks.shape[0], rows.shape[1]], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        inside = (rows >= slot_of(first, slots, slot)) & (rows < slot_of(last, slots, slot))
        total += tl.where(inside, slot_of(scaled, slots, slot), 0.0)
    return total


@triton.jit
def clear_rows(middle, stride_middle, tokens, mask, columns, CHUNK: tl.constexpr):
    """Zeros into the first ``columns`` of ``middle`` for a tile of tokens (M, 1), by wide stores."""
    for start in range(0, columns, CHUNK):
        rows = start + tl.arange(0, CHUNK)[None, :]
        zeros = tl.zeros([tokens.shape[0], CHUNK], dtype=middle.dtype.element_ty)
        tl.store(middle + tokens * stride_middle + rows, zeros, mask=mask & (rows < columns))


@triton.jit
def write_chosen(
    down,
    stride_down,
    stride_split,
    middle,
    stride_middle,
    scaling,
    offsets,
    tokens,
    mask,
    picks,
    shares,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    FRESH: tl.constexpr,
):
    """``A x`` times ``w_j s_j`` for the rows that the slots' adapters own, RANKS at most each; ``middle`` is 0 everywhere else, by :func:`clear_rows`.

    Only these rows of the partial sums are read, as :func:`meteora_kernels.triton_route.summed` does, and only they are written.
    """
    scaled = shares * tl.load(scaling + picks)
    first = tl.load(offsets + picks).to(tl.int32)
    last = tl.load(offsets + picks + 1).to(tl.int32)
    slots = tl.arange(0, SLOTS)[None, :]
    places = tl.arange(0, SLOTS * RANKS)[None, :]
    begin = tl.zeros([tokens.shape[0], SLOTS * RANKS], dtype=tl.int32)
    end = begin
    for slot in tl.static_range(TOP_K):
        begin = tl.where(places // RANKS == slot, slot_of(first, slots, slot), begin)
        end = tl.where(places // RANKS == slot, slot_of(last, slots, slot), end)
    rows = begin + places % RANKS
    owned = mask & (rows < end)
    # Where two slots have the same adapter, both write the sum.
    factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
    values = summed(down, tokens * stride_down + rows, stride_split, owned, SPLITS, FRESH)
    values = tl.where(factor == 0.0, 0.0, values * factor)
    tl.debug_barrier()  # other threads' zeros come first
    tl.store(middle + tokens * stride_middle + rows, values.to(middle.dtype.element_ty), mask=owned)


@triton.jit
def middle_kernel(
    logits,
    down,
    middle,
    allowed,
    given_indices,
    given_weights,
    scaling,
    offsets,
    tokens_total,
    count,
    rank,
    stride_split,
    stride_logits,
    stride_down,
    stride_middle,
    member_logits,
    member_down,
    first_middle,
    second_middle,
    member_middle,
    padded_rank,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    GIVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``middle[t, row] = down[t, row] * w_j * s_j`` where slot j's adapter owns the row, 0 elsewhere and from R to ``padded_rank``.

    logits (M, N) and down (M, R) in the model's dtype, or SPLITS partial sums of them in float32, ``stride_split`` apart; middle (M, R) in
    the model's dtype. A fused group has several members side by side, ``member_*`` columns apart; in ``middle`` the first stands at column
    ``first_middle``, the others from ``second_middle`` on. RANKS: no adapter has more rows, and only rows of chosen adapters are read; 0: all are.
    Grid: (ceil(M / BLOCK), members).
    """
    member = tl.program_id(1)
    column = tl.where(member == 0, first_middle, second_middle + (member - 1) * member_middle)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    mask = tokens < tokens_total
    if RANKS > 0:
        clear_rows(middle + column, stride_middle, tokens, mask, padded_rank, CHUNK)
    picks, shares = routes_of_tile(
        logits + member * member_logits,
        tokens,
        stride_logits,
        allowed,
        given_indices,
        given_weights,
        mask,
        count,
        temperature,
        TOP_K,
        SLOTS,
        PADDED,
        HAS_ALLOWED,
        GIVEN,
        stride_split,
        SPLITS,
    )
    if RANKS > 0:
        write_chosen(
            down + member * member_down,
            stride_down,
            stride_split,
            middle + column,
            stride_middle,
            scaling,
            offsets,
            tokens,
            mask,
            picks,
            shares,
            TOP_K,
            SLOTS,
            RANKS,
            SPLITS,
            False,
        )
    else:
        scaled = shares * tl.load(scaling + picks)
        first = tl.load(offsets + picks)
        last = tl.load(offsets + picks + 1)
        for start in range(0, padded_rank, CHUNK):
            rows = start + tl.arange(0, CHUNK)[None, :]
            inside = mask & (rows < rank)
            factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
            values = summed(down + member * member_down, tokens * stride_down + rows, stride_split, inside, SPLITS)
            # NaN times 0 must stay NaN only where the route itself is NaN, so rows that nobody chose are 0 by selection.
            values = tl.where(factor == 0.0, 0.0, values * factor)
            tl.store(middle + tokens * stride_middle + column + rows, values.to(middle.dtype.element_ty), mask=mask & (rows < padded_rank))


@triton.jit
def middle_backward_kernel(
    logits,
    down,
    grad_middle,
    grad_logits_in,
    grad_logits,
    grad_down,
    middle,
    allowed,
    given_indices,
    given_weights,
    scaling,
    offsets,
    tokens_total,
    count,
    rank,
    stride_logits,
    stride_down,
    stride_grad,
    stride_in,
    stride_out,
    stride_middle,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    GIVEN: tl.constexpr,
    HAS_IN: tl.constexpr,
    WANT_MIDDLE: tl.constexpr,
):
    """From ``grad_middle = dy B^T`` to the gradients of the logits and of ``A x``.

    ``grad_down = grad_middle * w_j s_j``; with ``g_j = s_j * sum over rows of j of grad_middle * down``, the logits get
    ``w_j (g_j - sum_l w_l g_l) / T`` on top of ``grad_logits_in``. All (M, .) in the model's dtype; grad_logits and grad_down lie in
    rows of ``stride_out``. WANT_MIDDLE also writes the forward's middle again (for the gradient of B). Grid: (ceil(M / BLOCK),).
    """
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    mask = tokens < tokens_total
    slots = tl.arange(0, SLOTS)[None, :]
    picks, shares = routes_of_tile(
        logits, tokens, stride_logits, allowed, given_indices, given_weights, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, GIVEN
    )
    scale = tl.load(scaling + picks)
    scaled = shares * scale
    first = tl.load(offsets + picks)
    last = tl.load(offsets + picks + 1)
    inner = tl.zeros([BLOCK, SLOTS], dtype=tl.float32)
    for start in range(0, rank, CHUNK):
        rows = start + tl.arange(0, CHUNK)[None, :]
        inside = mask & (rows < rank)
        factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
        values = tl.load(down + tokens * stride_down + rows, mask=inside, other=0.0).to(tl.float32)
        grads = tl.load(grad_middle + tokens * stride_grad + rows, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_down + tokens * stride_out + rows, tl.where(factor == 0.0, 0.0, grads * factor).to(grad_down.dtype.element_ty), mask=inside)
        if WANT_MIDDLE:
            tl.store(middle + tokens * stride_middle + rows, tl.where(factor == 0.0, 0.0, values * factor).to(middle.dtype.element_ty), mask=inside)
        product = values * grads
        for slot in tl.static_range(TOP_K):
            owned = (rows >= slot_of(first, slots, slot)) & (rows < slot_of(last, slots, slot))
            part = tl.sum(tl.where(owned, product, 0.0), axis=1)[:, None]
            inner = tl.where(slots == slot, inner + part, inner)
    if not GIVEN:
        inner = inner * scale
        mean = tl.sum(shares * inner, axis=1)[:, None]
        slope = shares * (inner - mean) / temperature
        columns = tl.arange(0, PADDED)[None, :]
        keep = mask & (columns < count)
        total = tl.zeros([BLOCK, PADDED], dtype=tl.float32)
        if HAS_IN:
            total = tl.load(grad_logits_in + tokens * stride_in + columns, mask=keep, other=0.0).to(tl.float32)
        for slot in tl.static_range(TOP_K):
            total += tl.where(columns == slot_of(picks, slots, slot), slot_of(slope, slots, slot), 0.0)
        tl.store(grad_logits + tokens * stride_out + columns, total.to(grad_logits.dtype.element_ty), mask=keep)


def block_of(padded: int, tokens: int) -> int:
    """Tokens per program: enough programs for every multiprocessor, and a tile of logits that fits into registers."""
    return max(1, min(32, 4096 // max(padded, 64), power_of_two(tokens // 256 + 1)))


def tile_of(padded: int, tokens: int) -> tuple[int, int]:
    """Tokens a program and warps of :func:`middle`. More than 8 tokens were no faster at 2,048 and 4,096."""
    block = min(8, block_of(padded, tokens))
    return block, 1 if block <= 2 else 4


def ranks_of(max_rank: int, top_k: int, columns: int) -> int:
    """RANKS of the kernels: the largest rank as a power of two, or 0 where the chosen adapters' rows are not few against all ``columns``."""
    ranks = power_of_two(max_rank)
    return ranks if 2 * power_of_two(top_k) * ranks <= columns else 0


def middle(
    logits: Tensor,
    down: Tensor,
    scaling: Tensor,
    offsets: Tensor,
    top_k: int,
    temperature: float,
    allowed: Tensor | None = None,
    routes: tuple[Tensor, Tensor] | None = None,
    members: int = 1,
    member_stride: int = 0,
    adapters: int | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    out: tuple[Tensor, int, int, int] | None = None,
    tile: tuple[int, int] | None = None,
    max_rank: int = 0,
) -> Tensor:
    """``down`` scaled by its route and 0 where not chosen: the middle of the one big LoRA.

    Args:
        logits: (M, N), columns contiguous (not read when ``routes`` are given); or (S, M, N), float32 partial sums of them.
        down: (M, R), columns contiguous; or (S, M, R), with the strides of ``logits``.
        scaling: float32 (N,).
        offsets: int64 (N + 1,).
        top_k: k.
        temperature: T.
        allowed: bool (N,) or None.
        routes: indices int64 and weights float32 (M, k) instead of logits.
        members: Layers side by side in ``logits`` and ``down``, ``member_stride`` columns apart; then the result is (M, members * R).
        dtype: Of the result; None: that of ``down``.
        out: Where to write instead of a new tensor: (M, .), columns contiguous; the column of the first member; that of the second, behind
            which the others follow; and how many columns each gets: R, the rest 0.
        tile: Tokens a program and warps instead of the default.
        max_rank: The largest rank, if known: where the chosen adapters' rows are few, only these are read.

    Returns:
        (M, members * R) in the dtype asked for, or what was given as ``out``.
    """
    tokens = down.shape[-2]
    adapters = scaling.shape[0] if adapters is None else adapters
    rank = down.shape[-1] if rank is None else rank
    splits = down.shape[0] if down.dim() == 3 else 1
    if out is None:
        out = (torch.empty(tokens, members * rank, dtype=dtype or down.dtype, device=down.device), 0, rank, rank)
    result, first, second, columns = out
    padded = padded_adapters(adapters)
    block, warps = tile or tile_of(padded, tokens)
    nothing = scaling
    indices, weights = routes if routes is not None else (nothing, nothing)
    middle_kernel[(ceil_div(tokens, block), members)](
        logits,
        down,
        result,
        allowed if allowed is not None else nothing,
        indices,
        weights,
        scaling,
        offsets,
        tokens,
        adapters,
        rank,
        down.stride(0) if splits > 1 else 0,
        logits.stride(-2),
        down.stride(-2),
        result.stride(0),
        member_stride,
        member_stride,
        first,
        second,
        columns,
        columns,
        temperature,
        TOP_K=top_k,
        SLOTS=power_of_two(top_k),
        PADDED=padded,
        BLOCK=block,
        CHUNK=min(256, power_of_two(columns)),
        HAS_ALLOWED=allowed is not None,
        GIVEN=routes is not None,
        SPLITS=splits,
        RANKS=ranks_of(max_rank, top_k, columns),
        num_warps=warps,
    )
    return result


def middle_backward(
    logits: Tensor,
    down: Tensor,
    grad_middle: Tensor,
    grad_logits: Tensor | None,
    scaling: Tensor,
    offsets: Tensor,
    top_k: int,
    temperature: float,
    out: tuple[Tensor, Tensor],
    allowed: Tensor | None = None,
    routes: tuple[Tensor, Tensor] | None = None,
    want_middle: bool = False,
) -> Tensor | None:
    """Gradients of :func:`middle`, written into ``out``.

    Args:
        logits, down, scaling, offsets, top_k, temperature, allowed, routes: As given to :func:`middle` (one member).
        grad_middle: (M, R).
        grad_logits: (M, N) that reached the logits on another way, or None.
        out: (M, N) for the logits' gradient (untouched with ``routes``) and (M, R) for that of ``down``; the same row stride.
        want_middle: Also return the middle again.

    Returns:
        (M, R) or None.
    """
    tokens, rank = down.shape
    adapters = scaling.shape[0]
    padded = padded_adapters(adapters)
    block = block_of(padded, tokens)
    nothing = scaling
    again = torch.empty(tokens, rank, dtype=down.dtype, device=down.device) if want_middle else None
    indices, weights = routes if routes is not None else (nothing, nothing)
    middle_backward_kernel[(ceil_div(tokens, block),)](
        logits,
        down,
        grad_middle,
        grad_logits if grad_logits is not None else nothing,
        out[0],
        out[1],
        again if again is not None else nothing,
        allowed if allowed is not None else nothing,
        indices,
        weights,
        scaling,
        offsets,
        tokens,
        adapters,
        rank,
        logits.stride(0),
        down.stride(0),
        grad_middle.stride(0),
        grad_logits.stride(0) if grad_logits is not None else 0,
        out[1].stride(0),
        rank,
        temperature,
        TOP_K=top_k,
        SLOTS=power_of_two(top_k),
        PADDED=padded,
        BLOCK=block,
        CHUNK=min(64, power_of_two(rank)),
        HAS_ALLOWED=allowed is not None,
        GIVEN=routes is not None,
        HAS_IN=grad_logits is not None,
        WANT_MIDDLE=want_middle,
    )
    return again

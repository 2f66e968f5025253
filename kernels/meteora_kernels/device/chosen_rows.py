# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Device functions for the rows of A and B that belong to a token's chosen adapters."""

from __future__ import annotations

import triton
import triton.language as tl

from meteora_kernels.device.routing import coefficients_of, keep_routes, routes_of_logits, slot_of, summed


@triton.jit
def picks_of_token(
    logits, stride_logits, stride_split, token, allowed, chosen, writes, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Indices int32 and weights float32 (1, SLOTS) of one token, by :func:`meteora_kernels.device.routing.routes_of_logits`.

    KEEP: The program for which ``writes`` is true also writes the routes to ``chosen`` (:func:`meteora_kernels.device.routing.keep_routes`).
    """
    tokens = token + tl.zeros([1, 1], dtype=tl.int32)
    picks, shares = routes_of_logits(
        logits, tokens, stride_logits, allowed, tokens >= 0, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, stride_split, SPLITS
    )
    keep_routes(chosen, tokens, writes, picks, shares, TOP_K, SLOTS, KEEP)
    return picks, shares


@triton.jit
def route_of_token(
    logits, stride_logits, stride_split, token, places, allowed, scaling, offsets, chosen, writes, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, SPLITS: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The rows of A and B (int64) and ``w_j s_j`` (float32) of one token at ``places`` (P, 1).

    Place ``slot * RANK_P + i`` is the i-th row of the slot's adapter. Past the adapter's rank and past the last slot, the row is -1 and the value 0.
    The other arguments are those of :func:`picks_of_token`.
    """
    slots = tl.arange(0, SLOTS)[None, :]
    picks, shares = picks_of_token(
        logits, stride_logits, stride_split, token, allowed, chosen, writes, count, temperature, TOP_K, SLOTS, PADDED, SPLITS, HAS_ALLOWED, KEEP
    )
    own = places // RANK_P == slots
    pick = tl.sum(tl.where(own, picks, 0), axis=1)[:, None]
    share = tl.sum(tl.where(own, shares, 0.0), axis=1)[:, None]
    rows = tl.load(offsets + pick) + places % RANK_P
    inside = (places < TOP_K * RANK_P) & (rows < tl.load(offsets + pick + 1))
    return tl.where(inside, rows, -1), tl.where(inside, share * tl.load(scaling + pick), 0.0)


@triton.jit
def rows_without_gaps(places, first, last, scaled, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """The rows of A and B (int64) and ``w_j s_j`` (float32) of one token at ``places`` (P, 1), if the rows of every slot follow those of the slot before.

    Args:
        places: Places int32 (P, 1). Past the last slot's rows, the row is -1 and the value 0.
        first, last: First row of every slot's adapter, and one past its last row, int32 (1, SLOTS).
        scaled: ``w_j * s_j`` of every slot (1, SLOTS).
    """
    slots = tl.arange(0, SLOTS)[None, :]
    rows = places * 0 - 1
    factors = rows * 0.0
    begin = tl.zeros([1, 1], dtype=tl.int32)
    for slot in tl.static_range(TOP_K):
        row = slot_of(first, slots, slot)
        end = begin + slot_of(last, slots, slot) - row
        own = (places >= begin) & (places < end)
        rows = tl.where(own, row + places - begin, rows)
        factors = tl.where(own, slot_of(scaled, slots, slot), factors)
        begin = end
    return rows.to(tl.int64), factors


@triton.jit
def add_chosen(
    total, b, width, columns, column_mask, rows_in, values_in, stride_plan, stride_split, tokens_total,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, TOKENS_P: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """float32 ``total`` (BN, TOKENS_P) plus, per token, its chosen rows of ``b`` (R, width) at ``columns`` (BN, 1), each times its value.

    rows_in int32 and values_in float32 (M, PLACES) have the row stride ``stride_plan`` and are read CHUNK places at a time; row -1 marks an unused place.
    The values are sums of SPLITS partial sums that are ``stride_split`` apart.
    """
    tokens = tl.arange(0, TOKENS_P)[:, None]
    live = tokens < tokens_total
    across = tl.trans(columns)
    across_mask = tl.trans(column_mask)
    for start in tl.static_range(0, PLACES, CHUNK):
        place = tokens * stride_plan + start + tl.arange(0, CHUNK)[None, :]
        rows = tl.load(rows_in + place, mask=live, other=-1, cache_modifier=".cg")
        values = summed(values_in, place, stride_split, live, SPLITS, True)
        wanted = live[:, :, None] & across_mask[None, :, :] & (rows >= 0)[:, :, None]
        chosen = tl.load(b + rows[:, :, None].to(tl.int64) * width + across[None, :, :], mask=wanted, other=0.0)
        total += tl.trans(tl.sum(values[:, :, None] * chosen.to(tl.float32), axis=1))
    return total


@triton.jit
def add_without_gaps(
    total, b, width, columns, column_mask, rows_in, values_in, used_in, stride_plan, stride_split, tokens_total,
    ENTRIES: tl.constexpr, TOKENS_P: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """:func:`add_chosen` for :func:`rows_without_gaps`: token t uses the first ``used_in[t]`` of its places, int32 (M,), and no other place is read.

    The rows of all tokens form one list, which is multiplied ENTRIES rows at a time: ``total`` plus ``b[rows, columns]^T`` times values (ENTRIES, TOKENS_P), in
    which every row has one value that is not 0, in the column of its token. In 16 bits, a value is the sum of two numbers of the dtype of ``b``, so that it
    keeps at least 16 bits.
    """
    across = tl.arange(0, TOKENS_P)[None, :]
    used = tl.load(used_in + across, mask=across < tokens_total, other=0, cache_modifier=".cg")
    ends = tl.cumsum(used, axis=1)
    count = tl.sum(used)
    for start in tl.range(0, count, ENTRIES, num_stages=STAGES):
        entries = start + tl.arange(0, ENTRIES)[:, None]
        live = entries < count
        token = tl.sum((entries >= ends).to(tl.int32), axis=1)[:, None]
        begin = tl.sum(tl.where(across == token, ends - used, 0), axis=1)[:, None]
        place = token * stride_plan + entries - begin
        rows = tl.load(rows_in + place, mask=live, other=0, cache_modifier=".cg")
        values = tl.where(across == token, summed(values_in, place, stride_split, live, SPLITS, True), 0.0)
        chosen = tl.load(b + tl.trans(rows).to(tl.int64) * width + columns, mask=tl.trans(live) & column_mask, other=0.0)
        if b.dtype.element_ty == tl.float32:
            total = tl.dot(chosen, values, total, input_precision=PRECISION)
        else:
            large = values.to(b.dtype.element_ty)
            total = tl.dot(chosen, large, total)
            total = tl.dot(chosen, (values - large.to(tl.float32)).to(b.dtype.element_ty), total)
    return total


@triton.jit
def clear_rows(middle, stride_middle, tokens, mask, columns, CHUNK: tl.constexpr):
    """Write zeros to the first ``columns`` columns of ``middle`` for a tile of tokens (M, 1), by wide stores."""
    for start in range(0, columns, CHUNK):
        rows = start + tl.arange(0, CHUNK)[None, :]
        zeros = tl.zeros([tokens.shape[0], CHUNK], dtype=middle.dtype.element_ty)
        tl.store(middle + tokens * stride_middle + rows, zeros, mask=mask & (rows < columns))


@triton.jit
def write_chosen(
    down, stride_down, stride_split, middle, stride_middle, scaling, offsets, tokens, mask, picks, shares,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr, SPLITS: tl.constexpr, FRESH: tl.constexpr,
):  # fmt: skip
    """Write ``A x`` times ``w_j s_j`` for the rows that the slots' adapters own, at most RANKS each; :func:`clear_rows` sets the rest of ``middle`` to 0.

    Only these rows of the partial sums are read (by :func:`meteora_kernels.device.routing.summed`), and only they are written.
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
    # If two slots have the same adapter, both write the sum of the two.
    factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
    values = summed(down, tokens * stride_down + rows, stride_split, owned, SPLITS, FRESH)
    values = tl.where(factor == 0.0, 0.0, values * factor)
    tl.debug_barrier()  # the zeros of other threads must be stored first
    tl.store(middle + tokens * stride_middle + rows, values.to(middle.dtype.element_ty), mask=owned)

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Device functions for routing: logits to adapters and weights, and those to coefficients of rows."""

from __future__ import annotations

import triton
import triton.language as tl

_NAN_KEY = tl.constexpr(2147483647)
_MINUS_INF_KEY = tl.constexpr(-2139095041)
_PAD_KEY = tl.constexpr(-2147483648)


@triton.jit
def top_of_tile(logits, columns, count, temperature, TOP_K: tl.constexpr, SLOTS: tl.constexpr, limit=0, LIMITED: tl.constexpr = False):
    """The ``TOP_K`` largest logits of every row and their softmax weights.

    Args:
        logits: Gate logits float32 (M, P), where P is a power of two; columns from ``count`` on are padding.
        columns: Column numbers int32 (1, P).
        count: Number of adapters N.
        temperature: Routing temperature T > 0, one number or (M, 1).
        limit: With LIMITED, the number of adapters of every row (M, 1), up to TOP_K; the slots past it get weight 0.

    Returns:
        Indices int32 (M, SLOTS) and weights float32 (M, SLOTS); slots past TOP_K hold index 0 and weight 0. Order, ties and NaN are those of
        :func:`meteora_kernels.reference.route`: the lower index wins a tie, and NaN counts as largest and gives NaN weights.
    """
    logits = logits + 0.0  # -0 becomes +0, so that integer keys compare as floats do
    bits = logits.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(logits != logits, _NAN_KEY, key)
    key = tl.where(columns < count, key, _PAD_KEY)
    slots = tl.arange(0, SLOTS)[None, :]
    best = tl.max(key, axis=1)[:, None]
    pick = tl.min(tl.where(key == best, columns, 2147483647), axis=1)[:, None]
    first = tl.sum(tl.where(columns == pick, logits, 0.0), axis=1)[:, None]
    indices = tl.where(slots == 0, pick, 0)
    power = tl.exp(first - first)
    total = power
    weights = tl.where(slots == 0, power, 0.0)
    for slot in tl.static_range(1, TOP_K):
        key = tl.where(columns == pick, _MINUS_INF_KEY, key)
        best = tl.max(key, axis=1)[:, None]
        pick = tl.min(tl.where(key == best, columns, 2147483647), axis=1)[:, None]
        value = tl.sum(tl.where(columns == pick, logits, 0.0), axis=1)[:, None]
        power = tl.exp((value - first) / temperature)
        if LIMITED:
            power = tl.where(slot < limit, power, 0.0)
        total += power
        indices = tl.where(slots == slot, pick, indices)
        weights = tl.where(slots == slot, power, weights)
    weights = weights / total
    if LIMITED:
        weights = tl.where(limit > 0, weights, 0.0)
    return indices, weights


@triton.jit
def slot_of(table, slots, slot):
    """Column ``slot`` (M, 1) of a tile (M, SLOTS)."""
    return tl.sum(tl.where(slots == slot, table, table * 0), axis=1)[:, None]


@triton.jit
def summed(pointer, where, stride_split, mask, SPLITS: tl.constexpr, FRESH: tl.constexpr = False):
    """Load float32 values at ``where``. With SPLITS > 1, add that number of partial sums, which are ``stride_split`` apart, in a fixed order.

    FRESH: Other programs of the same launch may have written the values.
    """
    CACHE: tl.constexpr = ".cg" if FRESH else ""
    total = tl.load(pointer + where, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        place = pointer + tl.full([], split, tl.int64) * stride_split + where
        total += tl.load(place, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    return total


@triton.jit
def routes_of_logits(
    pointer, tokens, stride, allowed, token_mask, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, HAS_ALLOWED: tl.constexpr, stride_split=0, SPLITS: tl.constexpr = 1,
):  # fmt: skip
    """Indices int32 and weights float32 (M, SLOTS) of ``tokens`` (M, 1), whose logits are loaded by :func:`summed`.

    HAS_ALLOWED: 1 for one mask of adapters (N,), 2 for the options of every token (:mod:`meteora_kernels.token_options`), float32 (., N + 2), whose first
    row is that of token 0, and 3 if some of them may be static mixes. Options replace ``temperature``.
    """
    columns = tl.arange(0, PADDED)[None, :]
    logits = summed(pointer, tokens * stride + columns, stride_split, token_mask & (columns < count), SPLITS, True)
    if HAS_ALLOWED >= 2:
        own = allowed + tokens * (count + 2)
        permitted = tl.load(own + columns, mask=token_mask & (columns < count), other=1.0)
        limit = tl.load(own + count, mask=token_mask, other=1.0)
        heat = tl.load(own + count + 1, mask=token_mask, other=1.0)
        if HAS_ALLOWED == 3:
            fixed = heat == 0.0
            logits = tl.where(fixed, 0.0, logits)
            heat = tl.where(fixed, 1.0, heat)
        logits = tl.where(permitted != 0, logits, float("-inf"))
        picks, shares = top_of_tile(logits, columns, count, heat, TOP_K, SLOTS, limit, True)
        if HAS_ALLOWED == 3:
            slots = tl.arange(0, SLOTS)[None, :]
            for slot in tl.static_range(TOP_K):
                weight = tl.sum(tl.where(columns == slot_of(picks, slots, slot), permitted, 0.0), axis=1)[:, None]
                shares = tl.where(fixed & (slots == slot), tl.where(slot < limit, weight, 0.0), shares)
    else:
        if HAS_ALLOWED == 1:
            permitted = tl.load(allowed + columns, mask=columns < count, other=1)
            logits = tl.where(permitted != 0, logits, float("-inf"))
        picks, shares = top_of_tile(logits, columns, count, temperature, TOP_K, SLOTS)
    return picks, shares


@triton.jit
def keep_routes(chosen, tokens, mask, picks, shares, TOP_K: tl.constexpr, SLOTS: tl.constexpr, KEEP: tl.constexpr):
    """With KEEP, write the adapters and weights (M, SLOTS) of ``tokens`` (M, 1) to ``chosen``, float32 (., 2 * TOP_K), whose first row is that of token 0."""
    if KEEP:
        slots = tl.arange(0, SLOTS)[None, :]
        place = chosen + tokens * (2 * TOP_K) + slots
        kept = mask & (slots < TOP_K)
        tl.store(place, picks.to(tl.float32), mask=kept)
        tl.store(place + TOP_K, shares.to(tl.float32), mask=kept)


@triton.jit
def allowed_from(allowed, first, count, HAS_ALLOWED: tl.constexpr):
    """``allowed`` for tokens that are counted from token ``first`` on."""
    if HAS_ALLOWED >= 2:
        allowed += first * (count + 2)
    return allowed


@triton.jit
def routes_of_tile(
    logits, tokens, stride_logits, allowed, given_indices, given_weights, mask, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, HAS_ALLOWED: tl.constexpr, GIVEN: tl.constexpr, stride_split=0,
    SPLITS: tl.constexpr = 1,
):  # fmt: skip
    """Indices int32 and weights float32 (M, SLOTS) of a tile of tokens, from logits (or their partial sums) or from given routes (M, TOP_K)."""
    slots = tl.arange(0, SLOTS)[None, :]
    if GIVEN:
        keep = mask & (slots < TOP_K)
        picks = tl.load(given_indices + tokens * TOP_K + slots, mask=keep, other=0).to(tl.int32)
        shares = tl.load(given_weights + tokens * TOP_K + slots, mask=keep, other=0.0).to(tl.float32)
    else:
        picks, shares = routes_of_logits(
            logits, tokens, stride_logits, allowed, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED, stride_split, SPLITS
        )
    return picks, shares


@triton.jit
def coefficients_of(rows, picks, scaled, first, last, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """The sum of ``w_j s_j`` over the slots j whose adapter owns the row, for every token and row of A: float32 (M, C).

    Args:
        rows: Rows of A, int32 (1, C) or (M, C).
        picks: Adapter of every slot (M, SLOTS).
        scaled: ``w_j * s_j`` of every slot (M, SLOTS).
        first: First row of every slot's adapter (M, SLOTS).
        last: One past the last row of every slot's adapter (M, SLOTS).
    """
    slots = tl.arange(0, SLOTS)[None, :]
    total = tl.zeros([picks.shape[0], rows.shape[1]], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        inside = (rows >= slot_of(first, slots, slot)) & (rows < slot_of(last, slots, slot))
        total += tl.where(inside, slot_of(scaled, slots, slot), 0.0)
    return total


@triton.jit
def routes_of_few(
    products, stride_products, allowed, scaling, offsets, tokens_total, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, TOKENS_P: tl.constexpr, HAS_ALLOWED: tl.constexpr, chosen=0, KEEP: tl.constexpr = False,
):  # fmt: skip
    """Adapters, ``w_j s_j``, first rows and ends of rows, each (TOKENS_P, SLOTS), from the logits (M, N) at ``products``; KEEP: see :func:`keep_routes`."""
    tokens = tl.arange(0, TOKENS_P)[:, None]
    live = tokens < tokens_total
    picks, shares = routes_of_logits(products, tokens, stride_products, allowed, live, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED)
    keep_routes(chosen, tokens, live, picks, shares, TOP_K, SLOTS, KEEP)
    return picks, shares * tl.load(scaling + picks), tl.load(offsets + picks), tl.load(offsets + picks + 1)

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Device functions for routing, shared by all Triton kernels, and the stand-alone routing kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two

_NAN_KEY = tl.constexpr(2147483647)
_MINUS_INF_KEY = tl.constexpr(-2139095041)
_PAD_KEY = tl.constexpr(-2147483648)


@triton.jit
def top_of_tile(logits, columns, count, temperature, TOP_K: tl.constexpr, SLOTS: tl.constexpr):
    """The ``TOP_K`` largest logits of every row and their softmax weights.

    Args:
        logits: float32 (M, P), P a power of two; columns at and past ``count`` are padding.
        columns: int32 (1, P).
        count: N, how many columns are real.
        temperature: T > 0.

    Returns:
        indices int32 (M, SLOTS) and weights float32 (M, SLOTS); slots past TOP_K hold index 0 and weight 0. Order, ties (lower index) and
        NaN (counts as largest, gives NaN weights) as in :func:`meteora_kernels.reference.route`.
    """
    logits = logits + 0.0  # -0 becomes +0, so that the integer order below equals the float order
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
        total += power
        indices = tl.where(slots == slot, pick, indices)
        weights = tl.where(slots == slot, power, weights)
    return indices, weights / total


@triton.jit
def slot_of(table, slots, slot):
    """Column ``slot`` of a (M, SLOTS) tile, as (M, 1)."""
    return tl.sum(tl.where(slots == slot, table, table * 0), axis=1)[:, None]


@triton.jit
def summed(pointer, where, stride_split, mask, SPLITS: tl.constexpr, FRESH: tl.constexpr = False):
    """Load float32 values at ``where``: with SPLITS > 1 the sum of so many partial sums that lie ``stride_split`` apart, in their order.
    FRESH: other programs of the same launch may have written them."""
    CACHE: tl.constexpr = ".cg" if FRESH else ""
    total = tl.load(pointer + where, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        place = pointer + tl.full([], split, tl.int64) * stride_split + where
        total += tl.load(place, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    return total


@triton.jit
def bounded_logits(pointer, tokens, stride, columns, count, allowed, token_mask, HAS_ALLOWED: tl.constexpr, stride_split=0, SPLITS: tl.constexpr = 1):
    """Load logits float32 (M, P) of ``tokens`` (M, 1), as :func:`summed` does; adapters that are not allowed read as -inf."""
    logits = summed(pointer, tokens * stride + columns, stride_split, token_mask & (columns < count), SPLITS, True)
    if HAS_ALLOWED:
        permitted = tl.load(allowed + columns, mask=columns < count, other=1)
        logits = tl.where(permitted != 0, logits, float("-inf"))
    return logits


@triton.jit
def route_kernel(
    logits,
    allowed,
    indices,
    weights,
    tokens_total,
    stride,
    count,
    temperature,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
):
    """Routing alone: logits (M, N), row stride ``stride``, any float type -> indices int64 (M, k), weights float32 (M, k).

    Grid: (ceil(M / BLOCK),), one program per BLOCK tokens.
    """
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    columns = tl.arange(0, PADDED)[None, :]
    slots = tl.arange(0, SLOTS)[None, :]
    mask = tokens < tokens_total
    tile = bounded_logits(logits, tokens, stride, columns, count, allowed, mask, HAS_ALLOWED)
    picks, shares = top_of_tile(tile, columns, count, temperature, TOP_K, SLOTS)
    keep = mask & (slots < TOP_K)
    tl.store(indices + tokens * TOP_K + slots, picks.to(tl.int64), mask=keep)
    tl.store(weights + tokens * TOP_K + slots, shares, mask=keep)


def route(logits: Tensor, top_k: int, temperature: float = 1.0, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`meteora_kernels.reference.route` (without gradients) by one kernel.

    Args:
        logits: (M, N), float16, bfloat16 or float32, columns contiguous.
        top_k: 1 <= top_k <= N.
        temperature: T > 0.
        allowed: bool (N,) or None.

    Returns:
        indices int64 (M, k), weights float32 (M, k).
    """
    tokens, adapters = logits.shape
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    padded = padded_adapters(adapters)
    block = max(1, min(32, 2048 // padded))
    if tokens:
        route_kernel[(ceil_div(tokens, block),)](
            logits,
            allowed if allowed is not None else indices,
            indices,
            weights,
            tokens,
            logits.stride(0),
            adapters,
            temperature,
            TOP_K=top_k,
            SLOTS=power_of_two(top_k),
            PADDED=padded,
            BLOCK=block,
            HAS_ALLOWED=allowed is not None,
        )
    return indices, weights

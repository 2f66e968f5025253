# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The middle of a layer, between its GEMMs: route, and scale and mask ``A x`` (forward), and the derivative (backward)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import choice_constants, kind_of_allowed, or_any
from meteora_kernels.device.chosen_rows import clear_rows, write_chosen
from meteora_kernels.device.routing import coefficients_of, keep_routes, routes_of_tile, slot_of, summed
from meteora_kernels.launches import Launches, Rest
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.types import Adapters, Routing


@triton.jit
def middle_kernel(
    logits, down, middle, allowed, given_indices, given_weights, scaling, offsets, chosen, tokens_total, count, rank, stride_split, stride_logits, stride_down,
    stride_middle, member_logits, member_down, first_middle, second_middle, member_middle, padded_rank, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    GIVEN: tl.constexpr, SPLITS: tl.constexpr, RANKS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``middle[t, row] = down[t, row] * w_j * s_j`` where slot j's adapter owns the row, 0 elsewhere and from R to ``padded_rank``.

    logits (M, N) and down (M, R) in the model's dtype, or SPLITS float32 partial sums of them that are ``stride_split`` apart; middle (M, R) in the
    model's dtype. The members of a fused group are ``member_*`` columns apart; in ``middle``, the first member starts at column ``first_middle`` and the
    second at ``second_middle``. RANKS > 0: no adapter has more rows, and only the rows of chosen adapters are read. RANKS = 0: all rows are read.
    KEEP: the routes are written to ``chosen`` (``Routing.chosen``). Grid: (ceil(M / BLOCK), members).
    """
    member = tl.program_id(1)
    column = tl.where(member == 0, first_middle, second_middle + (member - 1) * member_middle)
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    mask = tokens < tokens_total
    if RANKS > 0:
        clear_rows(middle + column, stride_middle, tokens, mask, padded_rank, CHUNK)
    picks, shares = routes_of_tile(
        logits + member * member_logits, tokens, stride_logits, allowed, given_indices, given_weights, mask, count, temperature, TOP_K, SLOTS, PADDED,
        HAS_ALLOWED, GIVEN, stride_split, SPLITS,
    )  # fmt: skip
    keep_routes(chosen + member * tokens_total * (2 * TOP_K), tokens, mask, picks, shares, TOP_K, SLOTS, KEEP)
    if RANKS > 0:
        write_chosen(
            down + member * member_down, stride_down, stride_split, middle + column, stride_middle, scaling, offsets, tokens, mask, picks, shares, TOP_K,
            SLOTS, RANKS, SPLITS, False,
        )  # fmt: skip
    else:
        scaled = shares * tl.load(scaling + picks)
        first = tl.load(offsets + picks)
        last = tl.load(offsets + picks + 1)
        for start in range(0, padded_rank, CHUNK):
            rows = start + tl.arange(0, CHUNK)[None, :]
            inside = mask & (rows < rank)
            factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
            values = summed(down + member * member_down, tokens * stride_down + rows, stride_split, inside, SPLITS)
            # NaN times 0 is NaN, so rows that no token chose are set to 0 by selection. Rows with a NaN route stay NaN.
            values = tl.where(factor == 0.0, 0.0, values * factor)
            tl.store(middle + tokens * stride_middle + column + rows, values.to(middle.dtype.element_ty), mask=mask & (rows < padded_rank))


@triton.jit
def middle_backward_kernel(
    logits, down, grad_middle, grad_logits_in, grad_logits, grad_down, middle, allowed, given_indices, given_weights, scaling, offsets, tokens_total,
    count, rank, stride_logits, stride_down, stride_grad, stride_in, stride_out, stride_middle, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    GIVEN: tl.constexpr, HAS_IN: tl.constexpr, WANT_MIDDLE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the logits and of ``A x`` from ``grad_middle = dy B^T``.

    ``grad_down = grad_middle * w_j s_j``; with ``g_j = s_j * sum over rows of j of grad_middle * down``, the logits get
    ``w_j (g_j - sum_l w_l g_l) / T`` in addition to ``grad_logits_in``. All are (M, .) in the model's dtype; grad_logits and grad_down have the row stride
    ``stride_out``. WANT_MIDDLE also writes the middle of the forward pass again, for the gradient of B. Grid: (ceil(M / BLOCK),).
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
    """The number of tokens per program: small enough to occupy every multiprocessor and to keep a tile of logits in registers."""
    return max(1, min(32, 4096 // max(padded, 64), power_of_two(tokens // 256 + 1)))


def tile_of(padded: int, tokens: int) -> tuple[int, int]:
    """The number of tokens per program of :func:`middle`, and its warps. More than 8 were not faster for 2,048 and 4,096 tokens."""
    block = min(8, block_of(padded, tokens))
    return block, 1 if block <= 2 else 4


def ranks_of(max_rank: int, top_k: int, columns: int) -> int:
    """RANKS of the kernels: the largest rank rounded up to a power of two, or 0 if tokens choose more than half of all ``columns``."""
    ranks = power_of_two(max_rank)
    return ranks if 2 * power_of_two(top_k) * ranks <= columns else 0


class Out(NamedTuple):
    """The destination of :func:`middle`.

    Attributes:
        rows: Rows to write to (..., .), columns contiguous, all rows at the same distance.
        first: First column of the first member; it may be to the left of ``rows``, in the same memory.
        second: First column of the second member, which the third follows.
        columns: Number of columns of each member: R columns of the middle, then zeros.
    """

    rows: Tensor
    first: int
    second: int
    columns: int


_middles = Launches(middle_kernel)


def middle(
    logits: Tensor, down: Tensor | int, adapters: Adapters, routing: Routing, *, max_rank: int = 0, out: Out | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``A x`` scaled by the route of its token, and 0 for rows that the token did not choose.

    Args:
        logits: Gate logits (M, .), columns contiguous, or float32 partial sums of them (S, M, .). The N logits of member i start at column
            ``i * member_rows``. They are not read for given routes.
        down: ``A x`` (M, .), columns contiguous, or float32 partial sums (S, M, .) with the strides of ``logits``. The R columns of member i start at
            column ``i * member_rows``. A number: the first column of ``A x`` in ``logits``, a multiple of 8.
        adapters: The adapters; gates, A and B are not read.
        routing: How tokens choose their adapters; given routes are int64 and float32 (M, k), contiguous, for one member.
        max_rank: The largest rank, which allows to read only the chosen adapters' rows if they are few; 0 reads all rows.
        out: Destination to write to instead of a new tensor.
        dtype: The dtype of a new tensor; None for that of ``down``.

    Returns:
        A new tensor (M, members * R), or the rows of ``out``.
    """
    _, _, lora_B, scaling, offsets, _, widths, member_rows = adapters
    top_k, temperature, allowed, indices, weights, chosen = routing
    inner = logits if isinstance(down, int) else down
    shape, strides = inner.shape, inner.stride()
    if out is None:
        rank = adapters.total_rank
        out = Out(torch.empty(shape[-2], len(widths) * rank, dtype=dtype or inner.dtype, device=inner.device), 0, rank, rank)
    result, first, second, columns = out
    given = None if indices is None or weights is None else (indices.dtype, weights.dtype)
    stride_logits, stride_out = logits.stride(-2), result.stride(-2)
    key = (
        shape, strides, stride_logits, stride_out, first, second, columns, scaling.shape[0], lora_B.numel(), widths, member_rows, max_rank, top_k,
        temperature, kind_of_allowed(allowed), chosen is None, given, logits.dtype, inner.dtype, result.dtype, scaling.dtype,
    )  # fmt: skip
    if isinstance(down, int):
        start, last = logits.data_ptr(), scaling.data_ptr()
        addresses = [start, start + down * logits.itemsize, result.data_ptr(), last if allowed is None else allowed.data_ptr(), last, last, last]
        addresses += [offsets.data_ptr(), last if chosen is None else chosen.data_ptr()]
        if given is None and _middles.again(key, logits.get_device(), addresses):
            return result
        inner = logits[..., down:]

    def rest() -> Rest:
        tokens, rank = shape[-2], adapters.total_rank
        splits = shape[0] if len(shape) == 3 else 1
        block, warps = tile_of(adapters.padded, tokens)
        numbers = (
            tokens, adapters.number, rank, strides[0] if splits > 1 else 0, stride_logits, strides[-2], stride_out, member_rows, member_rows, first, second,
            columns, columns, temperature,
        )  # fmt: skip
        constants = {
            **choice_constants(adapters, routing), "BLOCK": block, "CHUNK": min(256, power_of_two(columns)), "GIVEN": indices is not None,
            "SPLITS": splits, "RANKS": ranks_of(max_rank, top_k, columns), "KEEP": chosen is not None, "num_warps": warps,
        }  # fmt: skip
        return Rest((ceil_div(tokens, block), len(widths)), numbers, constants)

    pointers = (
        logits, inner, result, scaling if allowed is None else allowed, scaling if indices is None else indices, scaling if weights is None else weights,
        scaling, offsets, scaling if chosen is None else chosen,
    )  # fmt: skip
    _middles(key, pointers, rest)
    return result


class Gradients(NamedTuple):
    """Gradients that :func:`middle_backward` reads and writes.

    Attributes:
        middle: Gradient of the middle (M, R), read.
        logits: Gradient of the logits from other uses of them (M, N), read, or None.
        out_logits: Gradient of the logits (M, N), written unless routes are given.
        out_down: Gradient of ``A x`` (M, R), written, with the row stride of ``out_logits``.
    """

    middle: Tensor
    logits: Tensor | None
    out_logits: Tensor
    out_down: Tensor


def middle_backward(logits: Tensor, down: Tensor, grads: Gradients, adapters: Adapters, routing: Routing, *, want_middle: bool = False) -> Tensor | None:
    """Gradients of :func:`middle`, written into ``grads``.

    Args:
        logits, down, adapters, routing: The arguments of :func:`middle`, for one member.
        grads: Gradients to read and to write.
        want_middle: Whether to return the middle again.

    Returns:
        The middle (M, R), or None without ``want_middle``.
    """
    tokens, rank = down.shape
    scaling = adapters.scaling
    block = block_of(adapters.padded, tokens)
    again = torch.empty(tokens, rank, dtype=down.dtype, device=down.device) if want_middle else None
    middle_backward_kernel[(ceil_div(tokens, block),)](
        logits, down, grads.middle, or_any(grads.logits, scaling), grads.out_logits, grads.out_down, or_any(again, scaling),
        or_any(routing.allowed, scaling), or_any(routing.indices, scaling), or_any(routing.weights, scaling), scaling, adapters.offsets,
        tokens, adapters.number, rank, logits.stride(0), down.stride(0), grads.middle.stride(0), 0 if grads.logits is None else grads.logits.stride(0),
        grads.out_down.stride(0), rank, routing.temperature,
        **choice_constants(adapters, routing), BLOCK=block, CHUNK=min(64, power_of_two(rank)), GIVEN=routing.indices is not None,
        HAS_IN=grads.logits is not None, WANT_MIDDLE=want_middle,
    )  # fmt: skip
    return again

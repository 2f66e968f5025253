# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Attention for one new token of each of several texts, whose keys and values are in slots of one tensor.

The new keys and values are stored in the same launch. Each text is read up to its own length, which the host does not have to know, so a CUDA graph can hold
the launch. Long texts are cut into pieces, one program each, and a second launch joins the pieces in a fixed order.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.operators import on_device_of
from meteora_kernels.sizes import ceil_div, power_of_two

COLUMNS = 64
"""The number of columns that a program reads in one step."""


@triton.jit
def decode_kernel(
    query, key, value, keys, values, positions, output, sums, tops, query_token, query_head, key_token, key_head, value_token, value_head, keys_slot,
    keys_head, values_slot, values_head, scaling, window, width, value_width, piece_columns,
    GROUPS: tl.constexpr, GP: tl.constexpr, WP: tl.constexpr, VP: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(scaling * q K^T) V over the columns 0 … position of a slot, or the last ``window`` of them if it is not 0, for the heads of one key head.

    query (tokens, heads, width), key (tokens, key heads, width) and value by their strides; keys and values (slots, key heads, columns, width), columns
    contiguous; positions int64 (tokens,); output (tokens, heads, value width), contiguous. With PIECES > 1, each program writes its unnormalised sum to
    ``sums`` float32 (tokens, heads, PIECES, value width), and its greatest score and sum of weights to ``tops`` float32 (tokens, heads, PIECES, 2). Grid:
    (tokens, key heads, PIECES).
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    key_heads = tl.num_programs(1)
    groups = tl.arange(0, GP)[:, None]
    columns = tl.arange(0, WP)
    across = tl.arange(0, VP)
    position = tl.load(positions + token).to(tl.int32)
    here = keys + token * keys_slot + head * keys_head
    there = values + token * values_slot + head * values_head
    q = tl.load(
        query + token * query_token + (head * GROUPS + groups) * query_head + columns[None, :],
        mask=(groups < GROUPS) & (columns[None, :] < width), other=0.0,
    )  # fmt: skip
    new_key = tl.load(key + token * key_token + head * key_head + columns, mask=columns < width, other=0.0)
    new_value = tl.load(value + token * value_token + head * value_head + across, mask=across < value_width, other=0.0)
    first = piece * piece_columns
    last = tl.minimum(first + piece_columns, position)
    own = (position >= first) & (position < first + piece_columns)  # whether the new token belongs to this piece
    if window > 0:
        first = tl.maximum(first, tl.maximum(position - window + 1, 0) // BLOCK * BLOCK)
    # The new token comes first, so that the greatest score is finite from the start in its piece.
    score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1)[:, None] * scaling
    top = tl.where(own, score, float("-inf"))
    weight = tl.where(own, tl.full([GP, 1], 1.0, tl.float32), 0.0)
    total = tl.where(own, new_value.to(tl.float32)[None, :], 0.0) + tl.zeros([GP, VP], dtype=tl.float32)
    if own:
        tl.store(here + position * width + columns, new_key, mask=columns < width)
        tl.store(there + position * value_width + across, new_value, mask=across < value_width)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = at < last
        if window > 0:
            seen = seen & (at > position - window)
        k = tl.load(here + at[None, :] * width + columns[:, None], mask=(at[None, :] < last) & (columns[:, None] < width), other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        best = tl.maximum(top, tl.max(scores, axis=1)[:, None])
        safe = tl.where(best == float("-inf"), 0.0, best)
        shrink = tl.exp(top - safe)
        powers = tl.exp(scores - safe)
        v = tl.load(there + at[:, None] * value_width + across[None, :], mask=(at[:, None] < last) & (across[None, :] < value_width), other=0.0)
        total = total * shrink + tl.dot(powers.to(v.dtype), v, input_precision=PRECISION)
        weight = weight * shrink + tl.sum(powers, axis=1)[:, None]
        top = best
    row = token * key_heads * GROUPS + head * GROUPS + groups
    mask = (groups < GROUPS) & (across[None, :] < value_width)
    if PIECES == 1:
        tl.store(output + row * value_width + across[None, :], (total / weight).to(output.dtype.element_ty), mask=mask)
    else:
        place = row * PIECES + piece
        tl.store(sums + place * value_width + across[None, :], total, mask=mask)
        tl.store(tops + place * 2, top, mask=groups < GROUPS)
        tl.store(tops + place * 2 + 1, weight, mask=groups < GROUPS)


@triton.jit
def join_kernel(sums, tops, output, value_width, VP: tl.constexpr, PIECES: tl.constexpr, PP: tl.constexpr):
    """Join the pieces of one head of one token: (PIECES, value width) and (PIECES, 2) to (value width,). Grid: (tokens * heads,)."""
    row = tl.program_id(0).to(tl.int64)
    pieces = tl.arange(0, PP)
    across = tl.arange(0, VP)[None, :]
    top = tl.load(tops + (row * PIECES + pieces) * 2, mask=pieces < PIECES, other=float("-inf"))
    weight = tl.load(tops + (row * PIECES + pieces) * 2 + 1, mask=pieces < PIECES, other=0.0)
    factor = tl.exp(top - tl.max(top, axis=0))
    part = tl.load(sums + (row * PIECES + pieces[:, None]) * value_width + across, mask=(pieces[:, None] < PIECES) & (across < value_width), other=0.0)
    total = tl.sum(part * factor[:, None], axis=0)[None, :] / tl.sum(weight * factor, axis=0)
    tl.store(output + row * value_width + across, total.to(output.dtype.element_ty), mask=across < value_width)


def pieces_of(programs: int, columns: int, device: torch.device) -> int:
    """The number of pieces of each text, a power of two: as many as there are free processors, of at least four blocks of columns each."""
    pieces = 1
    while pieces * 2 * programs <= 2 * _processors(device) and columns // (pieces * 2) >= 4 * COLUMNS:
        pieces *= 2
    return pieces


@lru_cache(maxsize=32)
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def attend(
    query: Tensor, key: Tensor, value: Tensor, slots: tuple[Tensor, Tensor], positions: Tensor, columns: int, *, scaling: float, window: int = 0
) -> Tensor:
    """Store the keys and values of one new token of each text, and attend to those of the text.

    Args:
        query: Queries (tokens, heads, width), columns contiguous.
        key: Keys (tokens, key heads, width), columns contiguous.
        value: Values (tokens, key heads, value width), columns contiguous.
        slots: Stored keys (slots, key heads, capacity, width) and values (slots, key heads, capacity, value width), columns contiguous and one after the
            other; token ``i`` belongs to slot ``i``. They are changed.
        positions: Position of each token, int64 (tokens,), below ``columns``.
        columns: Number of columns that texts may have, up to the capacity.
        scaling: Factor of the scores.
        window: Number of last tokens that a token attends to; 0 for all.

    Returns:
        The output (tokens, heads, value width), contiguous, in the dtype of the queries.
    """
    tokens, heads, width = query.shape
    keys, values = slots
    key_heads, value_width = key.shape[1], value.shape[2]
    groups = heads // key_heads
    pieces = pieces_of(tokens * key_heads, columns, query.device)
    output = torch.empty(tokens, heads, value_width, dtype=query.dtype, device=query.device)
    sums = torch.empty(tokens, heads, pieces, value_width, dtype=torch.float32, device=query.device) if pieces > 1 else output
    tops = torch.empty(tokens, heads, pieces, 2, dtype=torch.float32, device=query.device) if pieces > 1 else output
    with on_device_of(query):
        decode_kernel[(tokens, key_heads, pieces)](
            query, key, value, keys, values, positions, output, sums, tops, query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), scaling, window, width, value_width,
            ceil_div(columns, pieces * COLUMNS) * COLUMNS, GROUPS=groups, GP=max(16, power_of_two(groups)), WP=max(16, power_of_two(width)),
            VP=max(16, power_of_two(value_width)), BLOCK=COLUMNS, PIECES=pieces, PRECISION="ieee", num_warps=4,
        )  # fmt: skip
        if pieces > 1:
            join_kernel[(tokens * heads,)](sums, tops, output, value_width, VP=power_of_two(value_width), PIECES=pieces, PP=pieces, num_warps=2)
    return output


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether :func:`attend` takes queries (tokens, heads, width), keys and values like these."""
    same = query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return same and query.stride(2) == key.stride(2) == value.stride(2) == 1 and query.shape[2] <= 256 and value.shape[2] <= 256


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, slots: tuple[Tensor, Tensor], positions: Tensor, columns: int, *, scaling: float, window: int = 0
) -> Tensor:
    """The same in plain PyTorch."""
    keys, values = slots
    rows = torch.arange(len(query), device=query.device)
    keys[rows, :, positions] = key
    values[rows, :, positions] = value
    groups = query.shape[1] // key.shape[1]
    at = torch.arange(columns, device=query.device)
    seen = at <= positions[:, None]
    if window:
        seen &= at > positions[:, None] - window
    scores = torch.einsum("thw,thcw->thc", query, keys[: len(query), :, :columns].repeat_interleave(groups, 1)) * scaling
    shares = torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), -1)
    return torch.einsum("thc,thcw->thw", shares, values[: len(query), :, :columns].repeat_interleave(groups, 1))

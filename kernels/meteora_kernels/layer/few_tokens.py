# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Adapters on top of a finished base output, for few tokens: gates and ``A x`` in one launch, routing and B in a second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import choice_constants, or_any
from meteora_kernels.device.routing import allowed_from, coefficients_of, routes_of_few, routes_of_logits, slot_of
from meteora_kernels.device.rows import rows_times_tokens
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.sizes import ceil_div, power_of_two
from meteora_kernels.types import Adapters, Routing


@triton.jit
def chosen_sum(
    total, products_down, stride_products, b, width, columns, column_mask, picks, scaled, first, last, tokens_total, rank,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, TOKENS_P: tl.constexpr, BN: tl.constexpr, RANK_P: tl.constexpr, GATHER: tl.constexpr, FLAT: tl.constexpr,
    DENSE_DOWN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ``sum_j w_j s_j B_j (A_j x)`` to ``total`` (BN, TOKENS_P).

    products_down holds A x: all R rows of every token (DENSE_DOWN), or only the rows of the chosen adapters, at place slot * RANK_P + row. GATHER reads the
    chosen rows of B token by token, and FLAT does so for one token without tiles of one row. Otherwise all of B is multiplied with a middle that is zero
    for rows that were not chosen (more than 16 tokens).
    """
    tokens = tl.arange(0, TOKENS_P)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    live = tokens < tokens_total
    if FLAT:
        # Triton 3.6 moves loads of small one-row tiles to another layout without their masks, and then rejects the code that it generated.
        PIECE: tl.constexpr = 16 if RANK_P >= 16 else RANK_P
        share = tl.zeros([BN, TOKENS_P], dtype=tl.float32)  # the base is larger and is added last, because float32 then loses less
        for slot in tl.static_range(TOP_K):
            begin = tl.sum(slot_of(first, slots, slot))
            end = tl.sum(slot_of(last, slots, slot))
            factor = tl.sum(slot_of(scaled, slots, slot))
            for step in tl.static_range(0, RANK_P, PIECE):
                inner = step + tl.arange(0, PIECE)
                inside = begin + inner < end
                values = (
                    tl.load(products_down + (begin + inner if DENSE_DOWN else slot * RANK_P + inner), mask=inside, other=0.0, cache_modifier=".cg") * factor
                )
                rows = (begin + inner).to(tl.int64)[:, None]
                up = tl.load(b + rows * width + columns, mask=inside[:, None] & column_mask, other=0.0)
                share += tl.sum(values[:, None] * up.to(tl.float32), axis=0)[:, None]
        total += share
    elif GATHER:
        CHUNK: tl.constexpr = 16 if TOP_K * RANK_P >= 16 else TOP_K * RANK_P
        before = total
        if RANK_P > 16:
            total = tl.zeros([BN, TOKENS_P], dtype=tl.float32)
        for slot in tl.static_range(TOP_K):
            factor = slot_of(scaled, slots, slot)
            begin = slot_of(first, slots, slot)
            end = slot_of(last, slots, slot)
            for step in tl.static_range(0, RANK_P, CHUNK if CHUNK < RANK_P else RANK_P):
                inner = step + tl.arange(0, CHUNK if CHUNK < RANK_P else RANK_P)[None, :]
                rows = begin + inner
                inside = live & (rows < end)
                place = rows if DENSE_DOWN else slot * RANK_P + inner + begin * 0
                values = tl.load(products_down + tokens * stride_products + place, mask=inside, other=0.0, cache_modifier=".cg")
                values = values * factor
                up = tl.load(b + rows[:, :, None].to(tl.int64) * width + columns[None, :, :], mask=inside[:, :, None] & column_mask[None, :, :], other=0.0)
                total += tl.trans(tl.sum(values[:, :, None] * up.to(tl.float32), axis=1))
        if RANK_P > 16:
            total += before
    else:
        ROWS: tl.constexpr = 32
        for start in range(0, rank, ROWS):
            rows = start + tl.arange(0, ROWS)[None, :]
            inside = live & (rows < rank)
            factor = coefficients_of(rows, picks, scaled, first, last, TOP_K, SLOTS)
            values = tl.load(products_down + tokens * stride_products + rows, mask=inside, other=0.0, cache_modifier=".cg")
            values = tl.where(factor == 0.0, 0.0, values * factor)
            up = tl.load(b + rows.to(tl.int64) * width + tl.trans(columns), mask=(rows < rank) & tl.trans(column_mask), other=0.0)
            total = tl.dot(up, tl.trans(values).to(up.dtype), total, input_precision=PRECISION)
    return total


@triton.jit
def few_gates_kernel(
    x, gate, a, products, tokens_total, hidden, count, rank, stride_products,
    TOKENS_P: tl.constexpr, GATE_BLOCK: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """products[t] = [G x, A x], float32 (M, N + R), or the logits alone with R = 0. Grid: ceil(N / GATE_BLOCK) + ceil(R / GATE_BLOCK) programs."""
    pid = tl.program_id(0)
    tokens = tl.arange(0, TOKENS_P)[None, :]
    gate_tiles = tl.cdiv(count, GATE_BLOCK)
    if pid < gate_tiles:
        local = pid * GATE_BLOCK + tl.arange(0, GATE_BLOCK)[:, None]
        total = rows_times_tokens(
            gate, local.to(tl.int64), local < count, x, tokens_total, hidden, hidden, hidden, GATE_BLOCK, BK, TOKENS_P, EVEN, STAGES, PRECISION
        )
        tl.store(products + tokens * stride_products + local, total, mask=(local < count) & (tokens < tokens_total))
    else:
        local = (pid - gate_tiles) * GATE_BLOCK + tl.arange(0, GATE_BLOCK)[:, None]
        total = rows_times_tokens(
            a, local.to(tl.int64), local < rank, x, tokens_total, hidden, hidden, hidden, GATE_BLOCK, BK, TOKENS_P, EVEN, STAGES, PRECISION
        )
        tl.store(products + tokens * stride_products + count + local, total, mask=(local < rank) & (tokens < tokens_total))


@triton.jit
def few_down_kernel(
    x, a, products, allowed, scaling, offsets, hidden, count, temperature, stride_products,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    """products[t, N + j * RANK_P + row] = A x of slot j's adapter, chosen by the logits in products[t]. Grid: (M * TOP_K,)."""
    pid = tl.program_id(0)
    token = pid // TOP_K
    here = products + token * stride_products
    slots = tl.arange(0, SLOTS)[None, :]
    one = tl.zeros([1, 1], dtype=tl.int32)
    permitted = allowed_from(allowed, token, count, HAS_ALLOWED)
    picks, _ = routes_of_logits(here, one, stride_products, permitted, one == 0, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED)
    pick = tl.sum(tl.where(slots == pid % TOP_K, picks, 0))
    begin = tl.load(offsets + pick)
    inner = tl.arange(0, RANK_P)
    rows = (begin + inner).to(tl.int64)[:, None]
    mask = rows < tl.load(offsets + pick + 1)
    total = rows_times_tokens(a, rows, mask, x + token * hidden, 1, hidden, hidden, hidden, RANK_P, BK, 1, EVEN, 1, "ieee")
    tl.store(here + count + pid % TOP_K * RANK_P + inner[:, None], total)


@triton.jit
def few_up_kernel(
    base, b, products, allowed, scaling, offsets, y, tokens_total, count, rank, width, stride_base, stride_products, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, TOKENS_P: tl.constexpr, BN: tl.constexpr, DENSE_DOWN: tl.constexpr,
    GATHER: tl.constexpr, FLAT: tl.constexpr, HAS_ALLOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = base + sum_j w_j s_j B_j (A_j x), with logits and A x from ``products``. Grid: (ceil(width / BN),)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    tokens = tl.arange(0, TOKENS_P)[None, :]
    mask = (columns < width) & (tokens < tokens_total)
    total = tl.load(base + tokens.to(tl.int64) * stride_base + columns, mask=mask, other=0.0).to(tl.float32)
    picks, scaled, first, last = routes_of_few(
        products, stride_products, allowed, scaling, offsets, tokens_total, count, temperature, TOP_K, SLOTS, PADDED, TOKENS_P, HAS_ALLOWED
    )
    total = chosen_sum(
        total, products + count, stride_products, b, width, tl.trans(columns), tl.trans(columns < width), picks, scaled, first, last, tokens_total, rank, TOP_K,
        SLOTS, TOKENS_P, BN, RANK_P, GATHER, FLAT, DENSE_DOWN, PRECISION,
    )  # fmt: skip
    tl.store(y + tokens.to(tl.int64) * width + columns, total.to(y.dtype.element_ty), mask=mask)


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    if not case.plain:
        return "the path is for inference with the gate's own routes, and adapters that see what the gate sees"
    return None if case.tokens <= 64 else f"there are {case.tokens} tokens, the path takes up to 64"


def places_of(tokens: int) -> int:
    """The number of tokens that a program reserves room for."""
    return 1 if tokens == 1 else max(16, power_of_two(tokens))


def reads_all(tokens: int, row: Row) -> bool:
    """Whether all rows of A are multiplied together with the gates, instead of the chosen rows after them."""
    return row.way == "all_rows" or places_of(tokens) > 16


def before(x: Tensor, adapters: Adapters, routing: Routing, row: Row) -> Tensor:
    """Gate logits, and ``A x`` of all rows or of the chosen ones, in one or two launches: float32 (M, N + .), an argument of :func:`after`.

    Args:
        x: Input (M, h), contiguous, 1 <= M <= 64.
        adapters: The adapters of the layer, as contiguous tensors, with ``max_rank``.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table. ``way`` says whether all rows of A are read together with the gates, or the chosen rows after them. ``gate_rows``,
            ``gate_step`` and ``stages`` of the tile are for gates and A, ``outputs`` for B.
    """
    tile = row.tile
    assert tile is not None
    tokens, hidden = x.shape
    gate, lora_A, _, scaling, offsets, *_ = adapters
    count, rank, all_rows = gate.shape[0], lora_A.shape[0], reads_all(tokens, row)
    rank_p, gate_block, bk, stages = adapters.rank_p, tile.gate_rows, tile.gate_step, tile.stages
    products = torch.empty(tokens, count + (rank if all_rows else routing.top_k * rank_p), dtype=torch.float32, device=x.device)
    few_gates_kernel[(ceil_div(count, gate_block) + (ceil_div(rank, gate_block) if all_rows else 0),)](
        x, gate, lora_A, products, tokens, hidden, count, rank, products.stride(0),
        TOKENS_P=places_of(tokens), GATE_BLOCK=gate_block, BK=bk, EVEN=hidden % bk == 0, STAGES=stages, PRECISION="ieee", num_warps=tile.warps,
        num_stages=stages,
    )  # fmt: skip
    if not all_rows:
        few_down_kernel[(tokens * routing.top_k,)](
            x, lora_A, products, or_any(routing.allowed, x), scaling, offsets, hidden, count, routing.temperature, products.stride(0),
            **choice_constants(adapters, routing), RANK_P=rank_p, BK=512, EVEN=hidden % 512 == 0, num_warps=4,
        )  # fmt: skip
    return products


def after(products: Tensor, base: Tensor, adapters: Adapters, routing: Routing, row: Row) -> Tensor:
    """Add the adapters to a base output (M, o), columns contiguous, in one launch: (M, o), contiguous. ``products`` is the result of :func:`before`."""
    assert row.tile is not None
    tokens, tokens_p = base.shape[0], places_of(base.shape[0])
    gather, count, (rank, width) = tokens_p <= 16, adapters.gate.shape[0], adapters.lora_B.shape
    y = torch.empty(tokens, width, dtype=base.dtype, device=base.device)
    bn = row.tile.outputs if gather else 32
    few_up_kernel[(ceil_div(width, bn),)](
        base, adapters.lora_B, products, or_any(routing.allowed, products), adapters.scaling, adapters.offsets, y, tokens, count, rank, width, base.stride(0),
        products.stride(0), routing.temperature,
        **choice_constants(adapters, routing), RANK_P=adapters.rank_p, TOKENS_P=tokens_p, BN=bn, DENSE_DOWN=reads_all(tokens, row), GATHER=gather,
        FLAT=tokens_p == 1 and row.flat, PRECISION="ieee", num_warps=4,
    )  # fmt: skip
    return y


def run(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing, row: Row) -> tuple[Tensor, Tensor]:
    """Add the adapters of one linear to a finished base output, for few tokens, in two or three launches.

    Returns the output (M, o) and the logits float32 (M, N); arguments as in :func:`before` and :func:`after`.
    """
    products = before(x, adapters, routing, row)
    return after(products, base, adapters, routing, row), products[:, : adapters.gate.shape[0]]


def out_like(x: Tensor, base: Tensor, adapters: Adapters, routing: Routing) -> tuple[Tensor, Tensor]:
    """Empty tensors like the results of :func:`run`, with contiguous logits."""
    return torch.empty_like(base, memory_format=torch.contiguous_format), x.new_empty((x.shape[0], adapters.gate.shape[0]), dtype=torch.float32)

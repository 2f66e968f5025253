# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""A group of linears for few tokens (decoding): every base weight, gate and row of A is read once.

:func:`decode_all_rows_kernel` computes a whole group of linears that share their input (q, k, v; gate, up; or a single linear) in one launch. The first
programs of its grid compute the gates and ``A x`` for all rows of A; the last of them to finish routes the tokens and raises a flag. Meanwhile the other
programs read the base weights; then they wait for the flag, which is usually up by then, add the chosen rows of B and write the output. There are no
floating-point atomics, so two runs are bit-equal. Where many tokens choose many rows of a small A, this path is faster than
:mod:`meteora_kernels.group.decode_chosen_rows`, which reads only the chosen rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import choice_constants, chunk_of, or_any, three
from meteora_kernels.device.chosen_rows import add_chosen
from meteora_kernels.device.flags import finish, raise_flag, wait_flag
from meteora_kernels.device.routing import routes_of_few, slot_of
from meteora_kernels.device.rows import member_of, rows_times_tokens
from meteora_kernels.plan.table import Case, Row
from meteora_kernels.sizes import ceil_div
from meteora_kernels.types import WHOLE, Form, Group, Routing


@triton.jit
def write_plan(
    here, stride_products, gate_rows, rows_out, values_out, stride_plan, allowed, scaling, offsets, chosen, tokens_total, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, TOKENS_P: tl.constexpr, HAS_ALLOWED: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Route every token, and write the row of A and B (-1 past the rank) and ``w_j s_j`` times ``A x`` for each token, slot and place up to RANK_P."""
    _, scaled, first, last = routes_of_few(
        here, stride_products, allowed, scaling, offsets, tokens_total, count, temperature, TOP_K, SLOTS, PADDED, TOKENS_P, HAS_ALLOWED, chosen, KEEP
    )
    tokens = tl.arange(0, TOKENS_P)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    live = tokens < tokens_total
    inner = tl.arange(0, RANK_P)[None, :]
    for slot in tl.static_range(TOP_K):
        rows = slot_of(first, slots, slot) + inner
        inside = live & (rows < slot_of(last, slots, slot))
        values = tl.where(inside, slot_of(scaled, slots, slot), 0.0)
        values *= tl.load(here + tokens * stride_products + gate_rows + rows, mask=inside, other=0.0, cache_modifier=".cg")
        place = tokens * stride_plan + slot * RANK_P + inner
        tl.store(rows_out + place, tl.where(inside, rows, -1).to(tl.int32), mask=live)
        tl.store(values_out + place, values, mask=live)


@triton.jit
def decode_all_rows_kernel(
    x, w, gates_a, b, bias, allowed, scaling, offsets, chosen, products, plan_rows, plan_values, flags, y, tokens_total, hidden, stride_w, count, gate_rows,
    stacked, rank, stride_products, member_products, stride_plan, width0, width1, width2, temperature,
    MEMBERS: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RANK_P: tl.constexpr, CHUNK: tl.constexpr, TOKENS_P: tl.constexpr,
    GATE_BLOCK: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATE_STEP: tl.constexpr, HAS_ALLOWED: tl.constexpr, KEEP: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A group of up to three linears that share x, base and adapters, in one launch.

    Shapes: x (M, h), contiguous, M <= TOKENS_P; w (O, h), the members' weights one after the other, O = sum of widths; gates_a (MEMBERS * stacked, h), for each
    member N gate rows, padding to ``gate_rows``, R rows of A, padding to ``stacked``; b (R, width) for each member; bias (O,); y (M, O). The row stride of
    w and gates_a is ``stride_w``.
    Scratch: products float32 (M, stride_products), ``member_products`` columns for each member: logits in ``gate_rows`` columns, then A x; plan_rows int32 and
    plan_values float32 (M, MEMBERS * TOP_K * RANK_P). flags int32 (8,), all 0 before and after.
    KEEP: the routes are written to ``chosen`` (``Routing.chosen``).
    Grid, one dimension: first the gate programs (GATE_BLOCK rows of gates_a each), the last of which to finish routes; then ceil(width / BN) programs for each
    member.
    """
    pid = tl.program_id(0)
    first_rows = gate_rows + rank
    gate_tiles = tl.cdiv(first_rows, GATE_BLOCK)
    first_phase = gate_tiles * MEMBERS
    PLACES: tl.constexpr = TOP_K * RANK_P
    if pid < first_phase:
        member = pid // gate_tiles
        local = (pid % gate_tiles) * GATE_BLOCK + tl.arange(0, GATE_BLOCK)[:, None]
        mask = local < first_rows
        gates = (member * stacked + local).to(tl.int64)
        sums = rows_times_tokens(gates_a, gates, mask, x, tokens_total, hidden, hidden, stride_w, GATE_BLOCK, GATE_STEP, TOKENS_P, EVEN, STAGES, PRECISION)
        tokens = tl.arange(0, TOKENS_P)[None, :]
        here = products + member * member_products
        tl.store(here + tokens * stride_products + local, sums, mask=mask & (tokens < tokens_total))
        tl.debug_barrier()
        if tl.atomic_add(flags + member, 1, sem="acq_rel", scope="gpu") == gate_tiles - 1:
            tl.debug_barrier()
            write_plan(
                here, stride_products, gate_rows, plan_rows + member * PLACES, plan_values + member * PLACES, stride_plan, allowed, scaling, offsets,
                chosen + member * tokens_total * (2 * TOP_K), tokens_total, count, temperature, TOP_K, SLOTS, PADDED, RANK_P, TOKENS_P, HAS_ALLOWED, KEEP,
            )  # fmt: skip
            raise_flag(flags + 3 + member)
    else:
        tile, member, before, width = member_of(pid - first_phase, width0, width1, width2, BN, MEMBERS)
        columns = tile * BN + tl.arange(0, BN)[:, None]
        column_mask = columns < width
        rows = (before + columns).to(tl.int64)
        total = rows_times_tokens(w, rows, column_mask, x, tokens_total, hidden, hidden, stride_w, BN, BK, TOKENS_P, EVEN, STAGES, PRECISION)
        if HAS_BIAS:
            total += tl.load(bias + before + columns, mask=column_mask, other=0.0).to(tl.float32)
        wait_flag(flags + 3 + member, 1)
        up = b + before.to(tl.int64) * rank
        plan = member * PLACES
        total = add_chosen(
            total, up, width, columns, column_mask, plan_rows + plan, plan_values + plan, stride_plan, 0, tokens_total, PLACES, CHUNK, TOKENS_P, 1
        )
        tokens = tl.arange(0, TOKENS_P)[None, :]
        outputs = width0 + width1 + width2
        tl.store(y + tokens * outputs + before + columns, total.to(y.dtype.element_ty), mask=column_mask & (tokens < tokens_total))
    finish(flags, 6)


def can_run(case: Case, row: Row) -> str | None:
    """The reason why this path cannot run a case with a row of the table; None if it can."""
    return None if case.tokens <= 16 else f"there are {case.tokens} tokens, the path takes up to 16"


def run(x: Tensor, group: Group, routing: Routing, row: Row, form: Form = WHOLE) -> Tensor:
    """Outputs of a group of linears for few tokens, base and adapters together: (M, O), contiguous, in the dtype of x.

    Args:
        x: Input (M, h), columns contiguous, 1 <= M <= 16.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``.
        row: Row of the table, with a tile: ``gate_rows`` and ``gate_step`` are for gates and A, ``outputs`` and ``step`` for the base.
        form: Ignored by this path.
    """
    tile = row.tile
    assert tile is not None
    x = x.contiguous()
    tokens, hidden = x.shape
    adapters, rank, gate_rows = group.adapters, group.total_rank, group.gate_rows
    gate, _, b, scaling, offsets, _, widths, stacked = adapters
    members, outputs, rank_p, tokens_p = len(widths), sum(widths), adapters.rank_p, 16
    bn, gate_block, places = tile.outputs, tile.gate_rows, routing.top_k * rank_p
    products = torch.empty(tokens, members * (gate_rows + rank), dtype=torch.float32, device=x.device)
    plan_rows = torch.empty(tokens, members * places, dtype=torch.int32, device=x.device)
    plan_values = torch.empty(tokens, members * places, dtype=torch.float32, device=x.device)
    y = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    programs = members * ceil_div(gate_rows + rank, gate_block) + sum(ceil_div(width, bn) for width in widths)
    decode_all_rows_kernel[(programs,)](
        x, group.weights, gate, b, or_any(group.bias, x), or_any(routing.allowed, x), scaling, offsets, or_any(routing.chosen, scaling), products, plan_rows,
        plan_values, group.flags, y, tokens, hidden, gate.stride(0), scaling.shape[0], gate_rows, stacked, rank, products.stride(0), gate_rows + rank,
        plan_rows.stride(0), *three(widths), routing.temperature, **choice_constants(adapters, routing), MEMBERS=members, RANK_P=rank_p,
        CHUNK=chunk_of(places, tokens_p, bn), TOKENS_P=tokens_p, GATE_BLOCK=gate_block, BN=bn, BK=tile.step, GATE_STEP=tile.gate_step,
        KEEP=routing.chosen is not None, HAS_BIAS=group.bias is not None, EVEN=hidden % tile.step == 0 and hidden % tile.gate_step == 0, STAGES=tile.stages,
        PRECISION="ieee", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip  # fmt: skip
    return y

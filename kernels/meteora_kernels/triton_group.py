"""A group of linears that share their input, base and adapters together: what ``fuse(model)`` runs (inference only)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels import many_adapters, plan
from meteora_kernels.operators import operator
from meteora_kernels.stacked import gate_rows_of, stacked_rows_of
from meteora_kernels.triton_chosen import decode_chosen
from meteora_kernels.triton_decode import decode, new_flags
from meteora_kernels.triton_delta import delta
from meteora_kernels.triton_inner import can_inner, inner
from meteora_kernels.triton_middle import middle, ranks_of
from meteora_kernels.triton_products import library_products, products
from meteora_kernels.triton_stream import can_stream, stream
from meteora_kernels.triton_sync import readable
from meteora_kernels.types import Adapters, Routing
from meteora_kernels.wide import Wide

__all__ = ["group_forward", "group_op", "new_flags"]


def group_forward(
    x: Tensor,
    packed: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    flags: Tensor,
    widths: list[int],
    rank: int,
    max_rank: int,
    top_k: int,
    temperature: float,
    beside: bool = False,
    in_place: bool = False,
) -> Tensor:
    """Base outputs of one to three linears with their adapters' share.

    Args:
        x: (M, h), columns contiguous.
        packed: (P, h), columns contiguous: the members' base rows (O = sum of widths), then per member ``stacked`` rows: N gate rows, padding to
            ``gate_rows_of(N)``, R rows of A, padding; then rows that do not matter. Rows of a member beyond R hold zeros.
        b: Per member (R, width), contiguous, one behind the other.
        bias: (O,) or None.
        scaling: float32 (N,), the same for all members.
        offsets: int64 (N + 1,), likewise.
        allowed: bool (N,) or None.
        flags: As :func:`new_flags` makes them; zero before and after. One group, one stream at a time.
        widths: Outputs of each member.
        rank: R.
        max_rank: The largest rank.
        top_k: k.
        temperature: T.
        beside: ``packed`` is a block of :class:`meteora_kernels.wide.Wide` and the columns beside its rows hold B^T as ``b`` is now.
        in_place: x is what :meth:`Wide.new_rows` gave, and the columns around it may be written.

    Returns:
        (M, O) in the dtype of x; for some sizes rows are further apart than O.
    """
    count = scaling.shape[0]
    members, outputs = len(widths), sum(widths)
    gate_rows = gate_rows_of(count)
    stacked = stacked_rows_of(count, rank)
    tokens = x.shape[0]
    weights, ga = packed[:outputs], packed[outputs : outputs + members * stacked]
    if tokens <= plan.FEW_TOKENS:
        run = decode_chosen if plan.group_takes_chosen_rows(tokens, rank, top_k, max_rank) else decode
        rows, parts = x.contiguous(), tuple(widths)
        return run(rows, weights, ga, b, bias, scaling, offsets, flags, parts, rank, gate_rows, max_rank, top_k, temperature, allowed)
    way = plan.many_adapters_way(tokens, rank, top_k, max_rank)
    if way is not None:
        adapters = Adapters(ga, ga[gate_rows:], b, scaling, offsets, max_rank, tuple(widths), stacked)
        choice = Routing(top_k, temperature, allowed)
        if many_adapters.can_run(adapters, choice, x.dtype) is None:
            return many_adapters.run(way, x, weights, bias, adapters, choice)

    def can_run(rule: plan.GroupRule) -> bool:
        assert rule.tile is not None
        if rule.order == "stream":
            return can_stream(x, packed, members, gate_rows, rank, rule.tile, rule.gate_pieces)
        ranks = ranks_of(max_rank, top_k, Wide(x.shape[1], rank, members).pad)
        return readable(x) and can_inner(ga, tokens, members, gate_rows + rank, ranks, rule.tile, rule.gate_pieces)

    def routed(found: Tensor, out: tuple[Tensor, int, int, int] | None = None) -> Tensor:
        down = found[..., gate_rows:]
        return middle(found, down, scaling, offsets, top_k, temperature, allowed, None, members, stacked, count, rank, x.dtype, out, None, max_rank)

    rule = plan.group_rule(tokens, outputs, x.shape[1], x.dtype, beside=beside, in_place=in_place, can_run=can_run)
    if rule.order == "stream" and rule.tile is not None:
        sizes = (widths, rank, gate_rows, stacked, top_k, temperature)
        return stream(x, packed, b, bias, scaling, offsets, flags, *sizes, allowed, rule.tile, rule.pieces, rule.gate_pieces)
    y = x.new_empty(tokens, outputs)
    if rule.order == "packed":
        whole = product_of(x, packed, rule)
        found, base = whole[..., outputs:], whole[..., :outputs]
        if bias is not None:
            (base[0] if base.dim() == 3 else base).add_(bias)
        if tokens <= plan.INLINE_TOKENS:
            routing = (found, scaling, offsets, top_k, temperature, allowed)
            delta(found[..., gate_rows:], b, base, y, tuple(widths), rank, stacked, routing)
        else:
            delta(routed(found), b, base, y, tuple(widths), rank, rank)
        return y
    if rule.order == "wide":
        wide = Wide(x.shape[1], rank, members)
        rows = x if in_place else wide.new_rows(tokens, x)
        buffer = wide.whole(rows)
        out = (buffer, *wide.places, wide.pad)
        if rule.routes and rule.tile is not None:
            facts = (members, rank, max_rank, gate_rows, stacked)
            copy = None if in_place else rows
            inner(x, ga, scaling, offsets, flags, *facts, top_k, temperature, allowed, out, rule.tile, rule.gate_pieces, copy)
        elif in_place or rule.tile is None:
            routed(product_of(x, ga, rule), out)
            if not in_place:
                rows.copy_(x)
        else:
            routed(products(x, ga, rule.pieces, rule.tile, rows), out)
        for columns, rows, place in wide.windows(packed, widths):
            torch.mm(buffer[:, columns], rows.t(), out=y[:, place])
        return y if bias is None else y.add_(bias)
    found = routed(product_of(x, ga, rule))
    start = 0
    for member, width in enumerate(widths):
        torch.mm(found[:, member * rank : (member + 1) * rank], b[rank * start : rank * (start + width)].view(rank, width), out=y[:, start : start + width])
        start += width
    y.addmm_(x, weights.t())
    return y if bias is None else y.add_(bias)


def product_of(x: Tensor, rows: Tensor, rule: plan.GroupRule) -> Tensor:
    """``x rows^T`` as ``rule`` wants it: (M, P) in the dtype of x, or float32 partial sums (S, M, P)."""
    if not rule.pieces:
        return F.linear(x, rows)
    return library_products(x, rows, rule.pieces) if rule.tile is None else products(x, rows, rule.pieces, rule.tile)


def _group(
    x: Tensor,
    packed: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    flags: Tensor,
    widths: list[int],
    rank: int,
    max_rank: int,
    top_k: int,
    temperature: float,
) -> Tensor:
    """:func:`group_forward` for compilers, which cannot see whether B^T beside the weights is what B is now."""
    return group_forward(x, packed, b, bias, scaling, offsets, allowed, flags, widths, rank, max_rank, top_k, temperature)


group_op = operator("group", mutates=("flags",))(_group)


@torch.library.register_fake("meteora::group")
def _(
    x: Tensor,
    packed: Tensor,
    b: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    offsets: Tensor,
    allowed: Tensor | None,
    flags: Tensor,
    widths: list[int],
    rank: int,
    max_rank: int,
    top_k: int,
    temperature: float,
) -> Tensor:
    return x.new_empty(x.shape[0], sum(widths))

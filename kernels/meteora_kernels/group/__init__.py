"""Linears that share their input, with base product and adapters together: the part of a model that ``fuse(model)`` replaces (inference only).

Every path is a module of the same name with two functions. ``can_run(case, row)`` returns the reason why the path cannot run, or None;
``run(x, group, routing, row)`` runs it. :func:`meteora_kernels.plan.choose` chooses a path from the table of the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from meteora_kernels import many_adapters
from meteora_kernels.group import decode_all_rows, decode_chosen_rows, one_launch, packed, split, wide
from meteora_kernels.operators import eager, on_device_of, operator
from meteora_kernels.plan import Case, Facts, Row, choose, readable, table_of
from meteora_kernels.types import Adapters, Group, Routing

__all__ = ["PATHS", "Block", "group_operator", "reads_in_place", "reads_up", "row_for", "run_group", "run_members"]

PATHS: dict[str, Any] = {
    "decode_chosen_rows": decode_chosen_rows,
    "decode_all_rows": decode_all_rows,
    "one_launch": one_launch,
    "packed": packed,
    "wide": wide,
    "split": split,
    "many_adapters": many_adapters,
}
CAN_RUN = {name: path.can_run for name, path in PATHS.items()}


def row_for(group: Group, tokens: int, top_k: int, *, in_place: bool = False, aligned: bool = False) -> Row:
    """The row of the table for a number of tokens.

    Args:
        group: The group of linears.
        tokens: Number of tokens M.
        top_k: Number of adapters per token k.
        in_place: Whether x is a window of a wider buffer.
        aligned: Whether the copy engine can read x.
    """
    key = (tokens, top_k, in_place, aligned)
    row = group.choices.get(key)
    if row is None:
        case = Case(group.facts, tokens, top_k, in_place, aligned and group.aligned)
        row = group.choices[key] = choose(table_of(group.facts.device).group, case, CAN_RUN)
    return row


def reads_in_place(group: Group, tokens: int, top_k: int) -> bool:
    """Whether the group's next input should be written into a window of a buffer that :meth:`meteora_kernels.wide.Wide.new_rows` of ``group.wide`` returns."""
    return group.wide is not None and row_for(group, tokens, top_k, in_place=True).path == "wide"


def reads_up(facts: Facts, sizes: Iterable[int], top_k: int) -> bool:
    """Whether a group with B^T in the rows of its weights would read it for one of these numbers of tokens, when x is not in place."""
    table, kept = table_of(facts.device).group, facts._replace(wide=True)
    return any(choose(table, Case(kept, tokens, top_k, aligned=True), CAN_RUN).path == "wide" for tokens in sizes)


def run_group(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> Tensor:
    """Outputs of one to three linears, base and adapters together, for inference on a CUDA GPU.

    Args:
        x: Input (M, h), columns contiguous.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``; given routes are not supported.
        in_place: Whether :meth:`meteora_kernels.wide.Wide.new_rows` of ``group.wide`` returned x, so that the columns around it may be written. Compiled
            code does not read B^T in the rows of the weights, because a compiler cannot check that it still equals B.

    Returns:
        Outputs (M, O) in the dtype of x; for some sizes the row stride is larger than O.

    Example:
        >>> y = run_group(torch.randn(5, 16, device="cuda"), group, Routing(top_k=2))  # doctest: +SKIP
        >>> y.shape  # doctest: +SKIP
        torch.Size([5, 32])
    """
    if not eager(x):
        _, _, lora_B, scaling, offsets, max_rank, widths, _ = group.adapters
        block = Block(group.packed, lora_B, scaling, offsets, group.bias, widths, max_rank or 0)
        return group_operator(x.contiguous(), block, group.flags, routing)
    return _run(x, group, routing, in_place=in_place)


def _run(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> Tensor:
    """:func:`run_group` when nothing is tracing, and inside the operator."""
    tokens = x.shape[0]
    row = row_for(group, tokens, routing.top_k, in_place=in_place, aligned=tokens > 16 and group.aligned and readable(x))
    with on_device_of(x):
        return PATHS[row.path].run(x, group, routing, row, in_place=in_place)


def run_members(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> list[Tensor]:
    """:func:`run_group` for x (..., h), with the outputs of every member as a separate tensor (..., o); not for tensors that are traced.

    Args:
        x: Input (..., h), columns contiguous. If it is not in place, the whole tensor is contiguous.
        group, routing, in_place: The arguments of :func:`run_group`.
    """
    shape = x.shape[:-1]
    tokens = shape.numel()
    row = row_for(group, tokens, routing.top_k, in_place=in_place, aligned=tokens > 16 and group.aligned and readable(x))
    with on_device_of(x):
        if row.path == "wide":
            return wide.run_members(x, group, routing, row, in_place=in_place)
        y = PATHS[row.path].run(x.view(tokens, -1), group, routing, row)
    return list(y.view(*shape, -1).split_with_sizes(list(group.adapters.widths), -1))


class Block(NamedTuple):
    """The part of a group that a compiled graph keeps; :meth:`Adapters.of_group` describes the fields."""

    packed: Tensor
    lora_B: Tensor
    scaling: Tensor
    offsets: Tensor
    bias: Tensor | None
    widths: tuple[int, ...]
    max_rank: int


def out_like(x: Tensor, block: Block, flags: Tensor, routing: Routing) -> Tensor:
    """An empty tensor like the result of :data:`group_operator`."""
    return x.new_empty(x.shape[0], sum(block.widths))


@operator("group", out_like)
def group_operator(x: Tensor, block: Block, flags: Tensor, routing: Routing) -> Tensor:
    """:func:`run_group` for compilers.

    ``flags`` is not declared as mutated, because it is zero before and after every call: compilers neither copy it nor give up CUDA graphs for it.
    """
    adapters = Adapters.of_group(block.packed, block.lora_B, block.scaling, block.offsets, block.widths, block.max_rank)
    return _run(x, Group.of(block.packed, adapters, block.bias, flags), routing)

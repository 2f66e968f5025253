"""Linears that share their input, with base product and adapters together: the part of a model that ``fuse(model)`` replaces (inference only).

Every path is a module of the same name with two functions. ``can_run(case, row)`` returns the reason why the path cannot run, or None;
``run(x, group, routing, row, form)`` runs it. :func:`meteora_kernels.plan.choose` chooses a path from the table of the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from meteora_kernels import many_adapters
from meteora_kernels.group import chosen_adapters, decode_all_rows, decode_chosen_rows, one_launch, packed, split, wide
from meteora_kernels.operators import on_device_of, operator
from meteora_kernels.plan import Case, Facts, Row, choose, readable, table_of
from meteora_kernels.types import Block, Form, Group, Routing

__all__ = ["PATHS", "group_operator", "reads_in_place", "reads_up", "row_for", "run_group", "run_members"]

PATHS: dict[str, Any] = {
    "decode_chosen_rows": decode_chosen_rows,
    "decode_all_rows": decode_all_rows,
    "one_launch": one_launch,
    "chosen_adapters": chosen_adapters,
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


def out_like(x: Tensor, group: Block, routing: Routing, form: Form) -> list[Tensor]:
    """Empty tensors like the results of :data:`group_operator`."""
    return [x.new_empty(*x.shape[:-1], sum(group.widths))]


@operator("group", out_like)
def group_operator(x: Tensor, group: Group, routing: Routing, form: Form) -> list[Tensor]:
    """The outputs for x (..., h): those of every member (..., o), if ``form`` allows it and the path computes them apart; otherwise one tensor (..., O).

    Compiled code has an operator in its place, with two differences. The group's flags are not declared as mutated, because they are zero before and after
    every call: compilers neither copy them nor give up CUDA graphs for them. And the operator does not read B^T in the rows of the weights, because a
    compiler cannot check that it still equals B.
    """
    shape = x.shape[:-1]
    tokens = shape.numel()
    aligned = tokens > 1 and group.aligned and readable(x)
    row = row_for(group, tokens, routing.top_k, in_place=form.in_place, aligned=aligned)
    if len(shape) > 1 and row.path != "wide":  # which reads rows of any shape
        x = x.view(tokens, -1)
    with on_device_of(group.packed):
        y = PATHS[row.path].run(x, group, routing, row, form)
    if isinstance(y, list):
        return y
    return [y if len(shape) == 1 else y.view(*shape, -1)]


def run_group(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> Tensor:
    """Outputs of one to three linears, base and adapters together, for inference on a CUDA GPU.

    Args:
        x: Input (M, h), columns contiguous.
        group: The group of linears.
        routing: Top-k, routing temperature and ``allowed``; given routes are not supported.
        in_place: Whether :meth:`meteora_kernels.wide.Wide.new_rows` of ``group.wide`` returned x, so that the columns around it may be written.

    Returns:
        Outputs (M, O) in the dtype of x; for some sizes the row stride is larger than O.

    Example:
        >>> y = run_group(torch.randn(5, 16, device="cuda"), group, Routing(top_k=2))  # doctest: +SKIP
        >>> y.shape  # doctest: +SKIP
        torch.Size([5, 32])
    """
    outputs: list[Tensor] = group_operator(x, group, routing, Form(in_place))
    return outputs[0]


_APART, _APART_IN_PLACE = Form(apart=True), Form(in_place=True, apart=True)


def run_members(x: Tensor, group: Group, routing: Routing, *, in_place: bool = False) -> list[Tensor]:
    """:func:`run_group` with the outputs of every member as a separate tensor (..., o).

    Args:
        x: Input (..., h) of two or more dimensions, columns contiguous. If it is not in place, the whole tensor is contiguous.
        group, routing, in_place: The arguments of :func:`run_group`.
    """
    outputs: list[Tensor] = group_operator(x, group, routing, _APART_IN_PLACE if in_place else _APART)
    widths = group.adapters.widths
    return outputs if len(outputs) == len(widths) else list(outputs[0].split_with_sizes(widths, -1))

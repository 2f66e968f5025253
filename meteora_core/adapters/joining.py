"""Adds adapters to banks and removes them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from meteora_core.adapters.bank import AdapterBank, natural_order
from meteora_core.adapters.stack import Stack
from meteora_core.errors import AdapterError


def without_adapter(bank: AdapterBank, name: str) -> AdapterBank:
    """Return a bank without adapter ``name`` and without the layers that only it targets. Raises UsageError if there is no such adapter."""
    index = bank.index(name)
    remaining = [other for other in range(len(bank)) if other != index]
    modules = {path: stack.chosen(remaining) for path, stack in bank.modules.items() if any(stack.ranks[other] for other in remaining)}
    return replace(
        bank,
        adapters=tuple(bank.adapters[other] for other in remaining),
        modules=modules,
        claims=tuple(claim for claim in bank.claims if claim.name != name),
    )


def alone(bank: AdapterBank, name: str) -> AdapterBank:
    """Return a bank that contains only adapter ``name``. Raises UsageError if there is no such adapter."""
    index = bank.index(name)
    modules = {path: stack.chosen([index]) for path, stack in bank.modules.items() if stack.ranks[index]}
    return replace(bank, adapters=(bank.adapters[index],), modules=modules, claims=tuple(claim for claim in bank.claims if claim.name == name))


def with_adapter(bank: AdapterBank, other: AdapterBank, place: int | None = None) -> AdapterBank:
    """Return a bank with an additional adapter.

    Args:
        bank: The bank to extend, which is not changed.
        other: The bank of the new adapter, which contains nothing else.
        place: The index of the new adapter; None appends it.

    Raises:
        AdapterError: The two banks have different shapes for a layer.
    """
    place = len(bank) if place is None else place
    (info,) = other.adapters
    modules = {}
    for path in sorted({*bank.modules, *other.modules}, key=natural_order):
        mine, new = bank.modules.get(path), other.modules.get(path)
        if mine is None and new is not None:
            mine = Stack(new.A[:0], new.B[:0], (0,) * len(bank), torch.zeros(len(bank)), experts=new.experts)
        if new is None and mine is not None:
            new = Stack(mine.A[:0], mine.B[:0], (0,), torch.zeros(1), experts=mine.experts)
        assert mine is not None
        assert new is not None
        if (mine.in_features, mine.out_features, mine.experts) != (new.in_features, new.out_features, new.experts):
            raise AdapterError(
                f"{path}: adapter {info.name!r} maps {new.in_features} to {new.out_features} features, the others {mine.in_features} to {mine.out_features}",
                hint="all adapters of a bank must be trained on the same base model",
            )
        modules[path] = _inserted(mine, new, place)
    adapters = (*bank.adapters[:place], info, *bank.adapters[place:])
    return replace(bank, adapters=adapters, modules=modules, claims=(*bank.claims, *other.claims))


def _inserted(mine: Stack, new: Stack, place: int) -> Stack:
    split = sum(mine.ranks[:place])
    dtype = mine.A.dtype if mine.A.dtype == new.A.dtype or not len(new.A) else new.A.dtype if not len(mine.A) else torch.float32

    def joined(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one[:split].to(dtype), other.to(one.device, dtype), one[split:].to(dtype)])

    count, width = len(mine.ranks), mine.out_features
    pending = {index + (index >= place): part for index, part in mine.pending.items()} | {place + index: part for index, part in new.pending.items()}
    return Stack(
        A=joined(mine.A, new.A),
        B=joined(mine.B, new.B),
        ranks=(*mine.ranks[:place], *new.ranks, *mine.ranks[place:]),
        scaling=torch.cat([mine.scaling[:place], new.scaling.to(mine.scaling.device), mine.scaling[place:]]),
        scale=_rows_inserted(mine.scale, new.scale, place, (count, width)),
        shift=_rows_inserted(mine.shift, new.shift, place, (count, width)),
        pending=pending,
        experts=mine.experts,
    )


def _rows_inserted(mine: Tensor | None, new: Tensor | None, place: int, shape: tuple[int, int]) -> Tensor | None:
    """Return a table with an additional row; a missing table has zeros."""
    if mine is None and new is None:
        return None
    rows = torch.zeros(shape) if mine is None else mine
    row = rows.new_zeros(1, shape[1]) if new is None else new.to(rows.device)
    return torch.cat([rows[:place], row, rows[place:]])

"""Whether a model keeps packed rows apart: asked of the model itself, because architectures differ and none of them says so.

Rows are told apart by positions that start again. Models without a use for positions (ALiBi, learned positions of their own counting, convolutions and
state spaces) let every row see the ones before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.routing import IGNORE, find_meteora
from meteora_core.training.encoding import Batch, TrainRow, collate, collate_packed

_LENGTHS = (9, 7)
"""Tokens of the two rows of the probe; together a length that needs no padding."""

_LOOKED_AT = 8
"""Rows of each task whose tokens the probe's rows are drawn from."""


def check_packing(model: nn.Module, rows: Sequence[Sequence[TrainRow]], pad_token: int, batch_size: int, device: torch.device) -> None:
    """Compare a row behind another one with the same row behind a third one and with the row alone.

    The model runs three times on a few tokens, in evaluation mode, without gradients and without the adapters of an attached bank. PyTorch's generators
    are left alone.

    Args:
        model: Not yet wrapped or sharded; it is left in the mode that it was in.
        rows: Per task, its train rows; the probe is made of tokens of theirs.
        pad_token: Not used as a token.
        batch_size: Sequences in a forward pass of one process: attention may tell rows apart for a single sequence alone.
        device: The model's.

    Raises:
        UsageError: The row depends on what stands before it.
    """
    seen = {token for task_rows in rows for place in range(min(_LOOKED_AT, len(task_rows))) for token in task_rows[place].tokens} - {pad_token}
    if len(seen) < 2:
        return
    pool = torch.tensor(sorted(seen))
    generator = torch.Generator().manual_seed(0)
    first, second = (_row(pool[torch.randint(len(pool), (length,), generator=generator)]) for length in _LENGTHS)
    other = _row(pool[(torch.searchsorted(pool, torch.tensor(first.tokens)) + 1) % len(pool)])
    count = min(2, batch_size)
    packed = [collate_packed([[before, second]] * count, pad_token) for before in (first, other)]
    training = model.training
    model.eval()
    state = find_meteora(model)
    try:
        # Without adapters: what is asked is the base's, and a near tie of untrained gates may fall otherwise in another batch.
        stack = ExitStack()
        if state is not None:
            stack.enter_context(state.disabled())
        with stack:
            one, two = (_logits(model, batch.to(device))[-1, _LENGTHS[0] :] for batch in packed)
            alone = _logits(model, collate([second] * count, pad_token, multiple=1).to(device))[-1]
    except (TypeError, ValueError) as refused:
        raise _leaks(model) from refused
    finally:
        model.train(training)
    wide = next(model.parameters()).dtype not in (torch.float16, torch.bfloat16)
    if _distance(one, two) > (1e-3 if wide else 5e-2) or _distance(one, alone) > (1e-3 if wide else 0.2):
        raise _leaks(model)


def _row(tokens: Tensor) -> TrainRow:
    return TrainRow(tuple(tokens.tolist()), (IGNORE,) * len(tokens), 0)


@torch.no_grad()
def _logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch.model_inputs(), use_cache=False).logits
    return logits.float()


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference of two rows of vectors at any position, beside the length of the vector there."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-6)).max())


def _leaks(model: nn.Module) -> UsageError:
    inner: Any = model
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return UsageError(f"this architecture ({type(inner).__name__}) does not keep packed rows apart", hint="leave out --packing")

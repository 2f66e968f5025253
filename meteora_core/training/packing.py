"""A test of whether a model keeps packed rows separate. The test runs the model, because no configuration entry states it.

Packed rows are separated by positions that restart at 0. Models that ignore the given positions (ALiBi, learned positions that the model counts itself,
convolutions, state-space models) let every row attend to the rows before it.
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
"""Number of tokens of the two rows of the probe; together they need no padding."""

_LOOKED_AT = 8
"""Number of rows of each task from whose tokens the probe's rows are drawn."""


def check_packing(model: nn.Module, rows: Sequence[Sequence[TrainRow]], pad_token: int, batch_size: int, device: torch.device) -> None:
    """Check that the logits of a packed row do not depend on the row before it.

    The logits of a row are compared after two different preceding rows and without one. The model runs three times on a few tokens, in evaluation mode,
    without gradients and without the adapters of an attached bank. PyTorch's random generators are not used.

    Args:
        model: Model that is not yet wrapped or sharded; its training mode is restored.
        rows: Per task, its train rows; the probe uses their tokens.
        pad_token: Token id of the padding; the probe's rows do not contain it.
        batch_size: Number of sequences in a forward pass of one process; some attention implementations separate rows only in a single sequence.
        device: Device of the model.

    Raises:
        UsageError: The row depends on the row before it.
    """
    seen = {token for task_rows in rows for index in range(min(_LOOKED_AT, len(task_rows))) for token in task_rows[index].tokens} - {pad_token}
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
        # The adapters are disabled: only the base model is tested, and untrained gates with nearly equal logits may choose differently in another batch.
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
    """The largest relative difference of two sequences of vectors at any position."""
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-6)).max())


def _leaks(model: nn.Module) -> UsageError:
    unwrapped: Any = model
    if hasattr(unwrapped, "get_base_model"):
        unwrapped = unwrapped.get_base_model()
    return UsageError(
        f"this architecture ({type(unwrapped).__name__}) cannot be trained with packed rows: tokens of one row affect the other rows",
        hint="leave out --packing",
    )

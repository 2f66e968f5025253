"""The frame of the prompts that a model was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from meteora_core.data.frames import Frame, default_frame, usable
from meteora_core.routing import find_meteora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_frame(model: nn.Module, tokenizer: PreTrainedTokenizerBase, adapter: str | None = None) -> Frame:
    """What stands around a message to a model, as far as it is known, and else the usual frame.

    It is the adapter's own, where one answers alone; else the one that was chosen in training; else the one that all adapters have; else the chat template, or
    ``[INST] {} [/INST]`` for the paper's tasks and where the tokenizer has no chat template.

    Args:
        model: With or without adapters.
        tokenizer: The base model's.
        adapter: The adapter that answers alone; None is the gates.
    """
    frame = recorded_frame(model, adapter)
    if frame is not None:
        return usable(frame, tokenizer)
    state = find_meteora(model)
    return default_frame(() if state is None else state.names, tokenizer)


def recorded_frame(model: nn.Module, adapter: str | None = None) -> Frame | None:
    """The frame that is recorded for a model, or for one adapter of it; None where none is."""
    state = find_meteora(model)
    if state is None:
        return None
    known = {info.name: info.frame for info in state.adapters}
    common = state.provenance.frame or (next(iter(known.values())) if len(set(known.values())) == 1 else None)
    return (known[adapter] if adapter is not None else None) or common

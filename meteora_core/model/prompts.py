"""The prompt frame that a model was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from meteora_core.data.frames import Frame, default_frame, usable
from meteora_core.routing import find_meteora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_frame(model: nn.Module, tokenizer: PreTrainedTokenizerBase, adapter: str | None = None) -> Frame:
    """The prompt frame for messages to a model.

    It is the first known frame of this list:

    1. the frame of ``adapter``, if one is given;
    2. the frame that is recorded for the model as a whole; training and ``meteora route`` choose one;
    3. the frame that all adapters share;
    4. the chat template, or ``[INST] {} [/INST]`` for the paper's tasks and for tokenizers without a chat template.

    Args:
        model: Model with or without adapters.
        tokenizer: The base model's tokenizer.
        adapter: Name of the adapter that answers alone; None if the gates choose.
    """
    frame = recorded_frame(model, adapter)
    if frame is not None:
        return usable(frame, tokenizer)
    state = find_meteora(model)
    return default_frame(() if state is None else state.names, tokenizer)


def recorded_frame(model: nn.Module, adapter: str | None = None) -> Frame | None:
    """The frame that is recorded for a model or for one of its adapters; None if there is none."""
    state = find_meteora(model)
    if state is None:
        return None
    known = {info.name: info.frame for info in state.adapters}
    common = state.provenance.frame or (next(iter(known.values())) if len(set(known.values())) == 1 else None)
    return (known[adapter] if adapter is not None else None) or common

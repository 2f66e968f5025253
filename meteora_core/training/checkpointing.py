"""Gradient checkpointing: recomputing activations in the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. The non-reentrant variant is used, because only with it the gate loss is exact."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)
    model.enable_input_require_grads()


def disable_checkpointing(model: PreTrainedModel) -> None:
    """Undo :func:`enable_checkpointing`."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()

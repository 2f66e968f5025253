"""Resizing the vocabulary of a model whose output layer carries adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from meteora_core.model.layer import MeteoraLinear


class Resizer:
    """``resize_token_embeddings`` of a model whose output layer carries adapters: they are resized along.

    transformers replaces the output layer by a new linear, which would remove the adapters silently. New tokens get logits of the base model
    alone (their columns of B are 0); columns of tokens that are removed are removed.

    Args:
        model: The model.
        path: Its output layer.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model, self.path = model, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' method on the plain layer, then resize B; arguments and result are those of transformers."""
        resize: Any = type(self.model).resize_token_embeddings  # type: ignore[attr-defined]
        parent_path, _, name = self.path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        layer = getattr(parent, name)
        if not isinstance(layer, MeteoraLinear):
            return resize(self.model, *args, **kwargs)
        setattr(parent, name, layer.base_layer)
        try:
            return resize(self.model, *args, **kwargs)
        finally:
            layer.base_layer = getattr(parent, name)
            wanted = layer.weight.shape[0]
            if wanted != layer.out_features:
                with torch.no_grad():
                    made = F.pad(layer.lora_B.detach(), (0, wanted - layer.out_features)).contiguous()
                layer.lora_B = nn.Parameter(made, requires_grad=layer.lora_B.requires_grad)
            setattr(parent, name, layer)

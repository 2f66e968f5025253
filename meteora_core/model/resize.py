"""Resizes the vocabulary of a model whose output layer has adapters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from meteora_core.model.layer import MeteoraLinear


class Resizer:
    """``resize_token_embeddings`` for a model whose output layer has adapters; it also resizes the adapters.

    transformers replaces the output layer with a new linear layer, which would remove the adapters without notice. The columns of B for new tokens are 0,
    so the adapters do not change the logits of these tokens; the columns of B for removed tokens are dropped.

    Args:
        model: The model with adapters attached.
        path: Path of its output layer.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model, self.path = model, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the plain output layer, then B. Arguments and result are those of transformers' ``resize_token_embeddings``."""
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
            out_features = layer.weight.shape[0]
            if out_features != layer.out_features:
                with torch.no_grad():
                    resized = F.pad(layer.lora_B.detach(), (0, out_features - layer.out_features)).contiguous()
                for extra, values in (("scale", layer.scale), ("shift", layer.shift)):
                    setattr(layer, extra, None if values is None else F.pad(values, (0, out_features - values.shape[1])))
                layer.lora_B = nn.Parameter(resized, requires_grad=layer.lora_B.requires_grad)
            setattr(parent, name, layer)

"""Mixture-of-LoRA arithmetic: tensors in, tensors out.

One function, :func:`lora_mixture`, with several backends behind it; :mod:`meteora_kernels.reference` is the one that the others are
tested against. This package knows nothing of models, files or settings.
"""

from meteora_kernels.mixture import BACKENDS, lora_mixture, pick_backend
from meteora_kernels.reference import route

__all__ = ["BACKENDS", "lora_mixture", "pick_backend", "reference", "route"]

from meteora_kernels import reference

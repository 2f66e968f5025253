"""Mixture-of-LoRA arithmetic: tensors in, tensors out.

:func:`mix` adds the adapters of a layer to its output, on one of several backends; all of them are tested against :mod:`meteora_kernels.reference`.
:func:`lora_mixture` does the same, but takes each tensor as an argument. :func:`run_group` computes linears that share their input, base product and
adapters together, on a CUDA GPU. This package knows nothing of models, files or settings.
"""

from typing import TYPE_CHECKING, Any

from meteora_kernels import reference
from meteora_kernels.mixture import BACKENDS, lora_mixture, mix, mix_over, pick_backend
from meteora_kernels.plan import batch_invariance
from meteora_kernels.reference import route, route_rows
from meteora_kernels.types import Adapters, Group, Routing

if TYPE_CHECKING:
    from meteora_kernels.group import run_group

__all__ = [
    "BACKENDS",
    "Adapters",
    "Group",
    "Routing",
    "batch_invariance",
    "lora_mixture",
    "mix",
    "mix_over",
    "pick_backend",
    "reference",
    "route",
    "route_rows",
    "run_group",
]


def __getattr__(name: str) -> Any:
    """:func:`run_group` is imported when it is first used, since it needs Triton."""
    if name == "run_group":
        from meteora_kernels.group import run_group

        return run_group
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

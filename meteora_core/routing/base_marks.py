"""Samples of a base model's weights, taken when adapters are attached, by which a later change of the weights is detected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meteora_core.tensors import is_quantized

_SAMPLES = 64


@dataclass(frozen=True)
class Marks:
    """Samples of tensors.

    Attributes:
        shapes: Shape of each tensor by name, in the order of ``values``.
        values: Evenly spaced elements of all tensors, float32 (samples,), on the CPU.
    """

    shapes: dict[str, torch.Size]
    values: Tensor

    def changed(self, now: Marks) -> list[str]:
        """The names of the tensors in both sets of samples whose shape or values differ by more than a conversion to another dtype."""
        before, after = self._by_name(), now._by_name()
        return [name for name, values in before.items() if name in after and not _alike(self.shapes[name], values, now.shapes[name], after[name])]

    def _by_name(self) -> dict[str, Tensor]:
        counts = [min(_SAMPLES, shape.numel()) for shape in self.shapes.values()]
        return dict(zip(self.shapes, torch.split(self.values, counts), strict=True)) if counts else {}


def mark(tensors: Mapping[str, Tensor]) -> Marks:
    """Samples of floating-point tensors; quantised and offloaded tensors and those that are distributed over processes are left out."""
    shapes: dict[str, torch.Size] = {}
    samples: list[Tensor] = []
    for name, tensor in tensors.items():
        if is_quantized(tensor) or tensor.is_meta or any(hasattr(tensor, at) for at in ("full_tensor", "ds_id")):
            continue
        flat, count = tensor.detach(), min(_SAMPLES, tensor.numel())
        indices = torch.arange(count, device=flat.device) * (flat.numel() // max(count, 1))
        samples.append(flat.reshape(-1)[indices].float())
        shapes[name] = tensor.shape
    return Marks(shapes, torch.cat([sample.cpu() for sample in samples]) if samples else torch.zeros(0))


def mark_base(model: nn.Module) -> Marks:
    """Samples of the parameters of a model without adapters."""
    return mark(dict(model.named_parameters(remove_duplicate=False)))


def roundings(start: Tensor) -> Iterable[Tensor]:
    """``start``, float32, and its values after conversions to bfloat16 and float16, in float32."""
    yield start
    for dtype in (torch.bfloat16, torch.float16):
        yield start.to(dtype).float()
    yield start.to(torch.bfloat16).to(torch.float16).float()
    yield start.to(torch.float16).to(torch.bfloat16).float()


def _alike(shape: torch.Size, before: Tensor, shape_now: torch.Size, after: Tensor) -> bool:
    return shape == shape_now and any(torch.allclose(after, rounded, rtol=0, atol=0, equal_nan=True) for rounded in roundings(before))

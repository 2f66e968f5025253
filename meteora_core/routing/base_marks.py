"""What the weights of a base model were when adapters were attached: enough of each to notice later that it has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_SAMPLES = 64


@dataclass(frozen=True)
class Marks:
    """Samples of tensors.

    Attributes:
        shapes: By name, in the order of ``values``.
        values: (n), float32, on the CPU: evenly spaced numbers of each tensor.
    """

    shapes: dict[str, torch.Size]
    values: Tensor

    def changed(self, now: Marks) -> list[str]:
        """The names of tensors, of those in both, that have another shape or other numbers, allowing for changes of the dtype."""
        before, after = self._by_name(), now._by_name()
        return [name for name, values in before.items() if name in after and not _alike(self.shapes[name], values, now.shapes[name], after[name])]

    def _by_name(self) -> dict[str, Tensor]:
        counts = [min(_SAMPLES, shape.numel()) for shape in self.shapes.values()]
        return dict(zip(self.shapes, torch.split(self.values, counts), strict=True)) if counts else {}


def mark(tensors: Mapping[str, Tensor]) -> Marks:
    """Samples of the tensors that hold plain numbers: not of those that are quantised, offloaded or spread over processes."""
    shapes: dict[str, torch.Size] = {}
    samples: list[Tensor] = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or tensor.is_meta or any(hasattr(tensor, at) for at in ("full_tensor", "ds_id")):
            continue
        flat, count = tensor.detach(), min(_SAMPLES, tensor.numel())
        places = torch.arange(count, device=flat.device) * (flat.numel() // max(count, 1))
        samples.append(flat.reshape(-1)[places].float())
        shapes[name] = tensor.shape
    return Marks(shapes, torch.cat([sample.cpu() for sample in samples]) if samples else torch.zeros(0))


def mark_base(model: nn.Module) -> Marks:
    """The parameters of a model without adapters."""
    return mark(dict(model.named_parameters(remove_duplicate=False)))


def roundings(start: Tensor) -> Iterable[Tensor]:
    """``start`` as it is after a model's changes of dtype."""
    yield start
    for dtype in (torch.bfloat16, torch.float16):
        yield start.to(dtype).float()
    yield start.to(torch.bfloat16).to(torch.float16).float()
    yield start.to(torch.float16).to(torch.bfloat16).float()


def _alike(shape: torch.Size, before: Tensor, shape_now: torch.Size, after: Tensor) -> bool:
    return shape == shape_now and any(torch.allclose(after, rounded, rtol=0, atol=0, equal_nan=True) for rounded in roundings(before))

"""A cache of the tensors that a model creates from Python numbers in every step.

Creating them copies from the host to the device, which cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RememberedConstants(TorchFunctionMode):
    """A mode in which ``torch.tensor`` returns the same tensor whenever it is called with equal Python numbers.

    PEFT's Arrow creates its scalings with ``torch.tensor`` in every linear layer. A CUDA graph replays kernels but not copies of Python lists to the
    device, so capturing such a step fails unless the tensors already exist.

    Attributes:
        made: The tensors created so far, by the arguments of ``torch.tensor``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[tuple[str, ...], Tensor] = {}
        self._fresh: dict[tuple[str, ...], Callable[[], Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Call ``func``, except that ``torch.tensor`` of numbers returns the tensor that an equal call created earlier."""
        options = kwargs or {}
        if func is not torch.tensor or len(args) != 1 or options.get("requires_grad") or not is_plain(args[0]):
            return func(*args, **options)
        key = (repr(args[0]), *(f"{name}={value}" for name, value in sorted(options.items())))
        if key not in self.made:
            self.made[key] = func(*args, **options)
            self._fresh[key] = lambda: torch.tensor(*args, **options)
        return self.made[key]

    def written(self) -> bool:
        """Whether the model has overwritten one of the tensors, which therefore is not a constant. Synchronises with the device."""
        return any(not torch.equal(tensor, self._fresh[key]()) for key, tensor in self.made.items())


def is_plain(value: object) -> bool:
    """Whether ``value`` is a number, or a list or tuple of numbers, whose ``repr`` therefore determines its value."""
    return all(is_plain(each) for each in value) if isinstance(value, list | tuple) else isinstance(value, bool | int | float)

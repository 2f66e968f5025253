"""Constants that a model makes from Python numbers in every step, made once: a CUDA graph cannot hold their way from the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RememberedConstants(TorchFunctionMode):
    """Within it, ``torch.tensor`` of equal Python numbers gives the same tensor again, as long as this object lives.

    PEFT's Arrow makes its scalings that way in every linear. A CUDA graph replays kernels, not the copy of a list of numbers from the host:
    capturing one fails, unless the tensor is there already.

    Attributes:
        made: What was asked for -> the tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[tuple[str, ...], Tensor] = {}
        self._fresh: dict[tuple[str, ...], Callable[[], Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs ``func``, or for ``torch.tensor`` of numbers looks up what it gave before."""
        options = kwargs or {}
        if func is not torch.tensor or len(args) != 1 or options.get("requires_grad") or not is_plain(args[0]):
            return func(*args, **options)
        key = (repr(args[0]), *(f"{name}={value}" for name, value in sorted(options.items())))
        if key not in self.made:
            self.made[key] = func(*args, **options)
            self._fresh[key] = lambda: torch.tensor(*args, **options)
        return self.made[key]

    def written(self) -> bool:
        """Whether the model has written to one of them, so that they are no constants. Waits for the device."""
        return any(not torch.equal(tensor, self._fresh[key]()) for key, tensor in self.made.items())


def is_plain(value: object) -> bool:
    """Numbers, and lists or tuples of such: what has no other value at the next step without looking different."""
    return all(is_plain(each) for each in value) if isinstance(value, list | tuple) else isinstance(value, bool | int | float)

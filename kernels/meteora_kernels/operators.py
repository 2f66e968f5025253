"""Registration of operators with PyTorch's dispatcher, without the per-call checks of ``torch.library.custom_op`` (0.2 ms per call on a slow CPU)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_type_hints

import torch
from torch.compiler import is_compiling
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def eager(tensor: torch.Tensor) -> bool:
    """Whether an operator's function can be called directly: nothing is tracing, so the dispatcher would only cost time (10 to 40 us of the CPU)."""
    return type(tensor) in _PLAIN and not (is_compiling() or is_in_torch_dispatch_mode())


_NOTHING = nullcontext()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """A context for kernel launches that makes the tensor's GPU the current one, because Triton launches on the current GPU."""
    if not tensor.is_cuda or is_compiling() or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


class Operator:
    """A function that is also the operator ``torch.ops.meteora.<name>``.

    The function takes and returns tensors and numbers. It also takes named tuples of them, whose fields become arguments of the operator, and values of
    classes with the methods ``parts``, which returns such a tuple, and ``of_parts``, which makes the value again. Eager code calls the function directly;
    compilers and dispatch modes call the operator.

    Attributes:
        function: The registered function.
        op: The operator, which takes flat arguments (:meth:`flat`).
    """

    def __init__(self, name: str, function: Callable[..., Any], out_like: Callable[..., Any]) -> None:
        hints = get_type_hints(function)
        kinds = {key: hints[key] for key in inspect.signature(function).parameters}
        self.function = function
        self.makers = [getattr(kind, "of_parts", None) for kind in kinds.values()]
        parameters = [(key, kind if make is None else get_type_hints(make)["parts"]) for (key, kind), make in zip(kinds.items(), self.makers, strict=True)]
        self.kinds: list[Any] = [kind if hasattr(kind, "_fields") else None for _, kind in parameters]
        self.lists = [[is_numbers(hint) for hint in get_type_hints(kind).values()] if kind is not None else [] for kind in self.kinds]

        def run(*flat: Any) -> Any:
            return function(*(value if make is None else make(value) for value, make in zip(self.values(flat), self.makers, strict=True)))

        def fake(*flat: Any) -> Any:
            return out_like(*self.values(flat))

        run.__signature__ = inspect.Signature(list(flat_parameters(parameters)), return_annotation=hints["return"])  # type: ignore[attr-defined]
        schema = torch.library.infer_schema(run, mutates_args=())
        torch.library.define(f"meteora::{name}", schema)
        torch.library.impl(f"meteora::{name}", "default", run)
        torch.library.register_fake(f"meteora::{name}", fake)
        self.op: Any = getattr(torch.ops.meteora, name).default

    def flat(self, arguments: Sequence[Any]) -> list[Any]:
        """The operator's arguments for the function's arguments."""
        flat: list[Any] = []
        for argument, kind, make in zip(arguments, self.kinds, self.makers, strict=True):
            if kind is None:
                flat.append(argument)
            else:
                flat.extend(argument if make is None else argument.parts())
        return flat

    def values(self, flat: Sequence[Any]) -> list[Any]:
        """The function's arguments for the operator's arguments; those that were taken apart stay named tuples."""
        found, place = [], 0
        for kind, lists in zip(self.kinds, self.lists, strict=True):
            if kind is None:
                found.append(flat[place])
                place += 1
            else:
                fields = flat[place : place + len(lists)]
                found.append(kind(*(tuple(field) if is_list else field for field, is_list in zip(fields, lists, strict=True))))
                place += len(lists)
        return found

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, or the operator if something is tracing; the first argument is a tensor."""
        if eager(arguments[0]):
            return self.function(*arguments)
        return self.op(*self.flat(arguments))


def is_numbers(hint: Any) -> bool:
    """Whether this is the annotation of a tuple of integers."""
    return bool(hint == tuple[int, ...])


def flat_parameters(parameters: Iterable[tuple[str, Any]]) -> Iterable[inspect.Parameter]:
    """Parameters with named tuples replaced by their fields, annotated as PyTorch's schemas require."""
    for name, kind in parameters:
        fields = {f"{name}_{field}": hint for field, hint in get_type_hints(kind).items()} if hasattr(kind, "_fields") else {name: kind}
        for field, hint in fields.items():
            yield inspect.Parameter(field, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Sequence[int] if is_numbers(hint) else hint)


def operator(name: str, out_like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function an :class:`Operator`.

    The function must return new tensors only (none of its inputs, no views of them, none twice), and leave its inputs as they were.

    Args:
        name: The operator's name.
        out_like: A function that takes the same arguments, or the named tuples of their parts, and returns empty results; it replaces the function where
            tensors have no data.

    Example:
        >>> @operator("doctest_double", out_like=lambda x: torch.empty_like(x))
        ... def double(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """

    def register(function: Callable[..., Any]) -> Operator:
        return Operator(name, function, out_like)

    return register

"""Repeated launches of a kernel without Triton's lookup.

At every launch, Triton derives a key from all arguments to find the compiled kernel, which takes the processor 25 to 60 us. Eager code of a
prefill needs some hundred launches, so the GPU would wait for the processor. A :class:`Launches` finds the compiled kernel by a short key of the caller,
and passes only the addresses that differ from the launch before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

MOST_KNOWN = 1024
"""The largest number of keys that a kernel keeps; after that it starts again. Every number of tokens has a separate key."""


class Rest(NamedTuple):
    """The arguments of a launch besides its tensors.

    Attributes:
        grid: The grid, of one to three dimensions.
        numbers: The arguments that follow the tensors and are not compile-time constants, in the kernel's order.
        constants: Compile-time constants by name, and the options ``num_warps`` and ``num_stages``.
    """

    grid: tuple[int, ...]
    numbers: tuple[float, ...]
    constants: dict[str, Any]


class Launcher(NamedTuple):
    """What launches a compiled kernel.

    Attributes:
        run: Triton's launcher: grid, stream, function, metadata, three values for hooks, and the kernel's arguments.
        function: The kernel on the device.
        metadata: Numbers of the kernel that the launcher reads.
        stream_of: Function that returns the current stream of a device.
    """

    run: Callable[..., None]
    function: Any
    metadata: Any
    stream_of: Callable[[int], int]


class Known(NamedTuple):
    """A launcher, the grid, and the arguments after the tensors."""

    launcher: Launcher
    grid: tuple[int, ...]
    after: tuple[Any, ...]


class Launches:
    """The launches of one kernel.

    Args:
        kernel: The kernel, a result of ``triton.jit``, whose first parameters are tensor descriptors and then pointers.
        descriptors: The number of its tensor descriptors.

    Example:
        >>> launches = Launches(double_kernel)  # doctest: +SKIP
        >>> launches((x.numel(), x.dtype), (x, out), lambda: Rest((1,), (x.numel(),), {"BLOCK": 128}))  # doctest: +SKIP

    A caller that knows the addresses without tensors, such as that of a column in a tensor, tries :meth:`again` first.
    """

    def __init__(self, kernel: Any, descriptors: int = 0) -> None:
        self.kernel, self.descriptors = kernel, descriptors
        self.known: dict[Hashable, Known] = {}

    def __call__(self, key: Hashable, tensors: tuple[Any, ...], rest: Callable[[], Rest]) -> None:
        """Launch the kernel on the current stream of the tensors' device, which must be the current device. Profilers that hook into Triton's launches see
        only the first launch of every key.

        Args:
            key: A value that determines everything about the launch except the device and the addresses: dtypes, sizes, strides, constants.
            tensors: The kernel's first arguments: tensor descriptors, then tensors on one device.
            rest: Function that returns the other arguments; it is only called if the key is new.
        """
        described, pointers = tensors[: self.descriptors], tensors[self.descriptors :]
        place = (key, pointers[0].get_device())
        if place in self.known and self.again(key, place[1], [tensor.data_ptr() for tensor in pointers], described):
            return
        grid, numbers, constants = rest()
        compiled = self.kernel[grid](*tensors, *numbers, **constants)
        launcher = launcher_of(compiled)
        # The code is compiled for addresses that are multiples of 16 only if all of these are.
        if launcher is not None and not any(tensor.data_ptr() % 16 for tensor in pointers):
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            names = self.kernel.arg_names[len(tensors) + len(numbers) :]
            self.known[place] = Known(launcher, (*grid, 1, 1)[:3], (*numbers, *(constants[name] for name in names)))

    def again(self, key: Hashable, device: int, addresses: list[int], described: tuple[Any, ...] = ()) -> bool:
        """Launch the kernel if the key is known on a device and all addresses are multiples of 16; returns whether it was launched.

        Args:
            key: The key of an earlier launch.
            device: The index of the tensors' device.
            addresses: The addresses of the tensors after the descriptors.
            described: The tensor descriptors.
        """
        known = self.known.get((key, device))
        if known is None:
            return False
        low = 0
        for address in addresses:
            low |= address
        if low & 15:
            return False
        (run, function, metadata, stream_of), (one, two, three), after = known
        run(one, two, three, stream_of(device), function, metadata, None, None, None, *described, *addresses, *after)
        return True


def launcher_of(compiled: Any) -> Launcher | None:
    """The launcher of the kernel that a launch returned; None if it was interpreted."""
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    if not isinstance(compiled, CompiledKernel):
        return None
    return Launcher(compiled.run, compiled.function, compiled.packed_metadata, driver.active.get_current_stream)

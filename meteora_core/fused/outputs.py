"""Stores the outputs of one run of a fused group until its members are called."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Outputs:
    """The outputs that the first member of a group computed for the other members.

    An output is returned once, and only for the same input tensor, with unchanged values and routing.

    Args:
        members: The number of members.

    Attributes:
        misses: Number of times that outputs were computed and not used, because a member was called with another input than the member before it.
    """

    def __init__(self, members: int) -> None:
        self._stored: list[Tensor | None] = [None] * members
        self._input: Tensor | None = None
        self._version = (0, 0)
        self.misses = 0

    def take(self, member: int, x: Tensor, version: tuple[int, int]) -> Tensor | None:
        """Return and remove the stored output of a member.

        Args:
            member: Index of the member in the group.
            x: The input tensor of the member.
            version: Counters that increase when the routing or the input's values change.

        Returns:
            The output, (..., o); None if none is stored for this input.
        """
        if self._input is not x or self._version != version:
            return None
        stored = self._stored
        output, stored[member] = stored[member], None
        if not any(other is not None for other in stored):
            self._input = None
        return output

    def put(self, outputs: Sequence[Tensor], x: Tensor, version: tuple[int, int]) -> None:
        """Store the outputs of all members, computed from ``x``; they replace earlier ones."""
        if any(output is not None for output in self._stored):
            self.misses += 1
        self._stored, self._input, self._version = list(outputs), x, version

    def clear(self) -> None:
        """Delete the stored outputs."""
        self._stored, self._input = [None] * len(self._stored), None

"""The outputs of one run of a fused group, which wait until its members are called."""

from __future__ import annotations

from torch import Tensor


class Outputs:
    """What the first member that meets an input has computed for the others.

    An output is handed out once, to the same input tensor in the same state.

    Args:
        members: The number of members.

    Attributes:
        misses: How often a member was called with another input than the member before it, so that outputs were computed in vain.
    """

    def __init__(self, members: int) -> None:
        self._waiting: list[Tensor | None] = [None] * members
        self._input: Tensor | None = None
        self._version = (0, 0)
        self.misses = 0

    def take(self, member: int, x: Tensor, version: tuple[int, int]) -> Tensor | None:
        """The waiting output of a member, or None where there is none for this input.

        Args:
            member: Its index.
            x: The input.
            version: Numbers that change when the input's values or the routing change.
        """
        if self._input is not x or self._version != version:
            return None
        waiting = self._waiting
        output, waiting[member] = waiting[member], None
        if not any(other is not None for other in waiting):
            self._input = None
        return output

    def put(self, outputs: tuple[Tensor, ...], x: Tensor, version: tuple[int, int]) -> None:
        """Let the outputs of all members, computed from ``x``, wait in the place of earlier ones."""
        if any(output is not None for output in self._waiting):
            self.misses += 1
        self._waiting, self._input, self._version = list(outputs), x, version

    def clear(self) -> None:
        """Forget what is waiting."""
        self._waiting, self._input = [None] * len(self._waiting), None

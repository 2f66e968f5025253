"""Collects the adapters that cannot be used, so that one error names all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from meteora_core.errors import AdapterError, MeteoraError


class Misfits:
    """The errors of several adapters.

    Args:
        names: The names of all adapters that are checked.

    Example:
        >>> from meteora_core.adapters.misfits import Misfits
        >>> from meteora_core.errors import AdapterError
        >>> misfits = Misfits(["a", "b", "c"])
        >>> for name in ("a", "b"):
        ...     with misfits.of(name):
        ...         raise AdapterError(f"adapter {name!r} is torn")
        >>> misfits.refuse()
        Traceback (most recent call last):
        meteora_core.errors.AdapterError: 2 of 3 adapters cannot be used: adapter 'a' is torn; adapter 'b' is torn
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.errors: dict[str, MeteoraError] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Keep the error that the block raises for an adapter; :meth:`refuse` raises it."""
        try:
            yield
        except AdapterError as error:
            self.errors.setdefault(name, error)

    def refuse(self) -> None:
        """Raise the error, or one error for all if there are several; do nothing if there is none."""
        if len(self.errors) == 1:
            raise next(iter(self.errors.values()))
        if self.errors:
            rest = [name for name in self.names if name not in self.errors]
            raise AdapterError(
                f"{len(self.errors)} of {len(self.names)} adapters cannot be used: {'; '.join(error.message for error in self.errors.values())}",
                hint=f"use the others alone, --task {','.join(rest)}; `meteora route` sets such adapters aside by itself" if rest else None,
            )

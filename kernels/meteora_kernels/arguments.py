"""Arguments that all launchers derive in the same way."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two
from meteora_kernels.types import Adapters, Routing


def choice_constants(adapters: Adapters, routing: Routing) -> dict[str, int]:
    """Compile-time constants of a kernel that routes: TOP_K, SLOTS, PADDED and HAS_ALLOWED."""
    return _constants(adapters.scaling.shape[0], routing.top_k, kind_of_allowed(routing.allowed))


@lru_cache(maxsize=256)
def _constants(adapters: int, top_k: int, has_allowed: int) -> dict[str, int]:
    return {"TOP_K": top_k, "SLOTS": power_of_two(top_k), "PADDED": padded_adapters(adapters), "HAS_ALLOWED": has_allowed}


def kind_of_allowed(allowed: Tensor | None) -> int:
    """HAS_ALLOWED of a kernel that routes: 0 without a mask, 1 for a mask of adapters (N,), 2 for the options of every token (., N + 2), and 3 if these may
    be static mixes (., N + 2, 1)."""
    return 0 if allowed is None else allowed.dim()


def or_any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``, or ``other`` as a placeholder pointer that the kernel does not read if ``tensor`` is None."""
    return other if tensor is None else tensor


def three(widths: tuple[int, ...]) -> tuple[int, int, int]:
    """The widths of one to three members, padded with 0 to three."""
    first, second, third = (*widths, 0, 0)[:3]
    return first, second, third


def chunk_of(places: int, tokens: int, outputs: int) -> int:
    """The number of places that :func:`meteora_kernels.device.chosen_rows.add_chosen` reads at a time for a tile of ``tokens`` by ``outputs``: a power of
    two that divides ``places``."""
    return min(16, places & -places, max(1, 8192 // (tokens * outputs)))


def span_of(columns: int, pieces: int, step: int) -> int:
    """The number of columns in each piece when a sum over ``columns`` is cut into up to ``pieces`` pieces: a multiple of ``step``.

    The last piece may be shorter, and there may be fewer pieces than asked for.
    """
    return ceil_div(ceil_div(columns, pieces), step) * step

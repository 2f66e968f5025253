"""Integer arithmetic that every launch needs. Triton's versions take 3 us per call on the host, these 0.02 us."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """The number of blocks of ``size`` that hold ``count`` items."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count``; 0 for 0."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


def padded_adapters(count: int) -> int:
    """The number of columns of a tile of logits for ``count`` adapters: a power of two, at least 8.

    With fewer than 8 columns, Triton 3.6 confuses the layouts of two tiles and rejects the code that it generated (for 16 tokens, up to 4 adapters and
    ranks up to 4).
    """
    return max(8, power_of_two(count))

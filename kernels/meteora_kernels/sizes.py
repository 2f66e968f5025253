"""Sums that every launch needs: Triton's own versions take 3 us each on the host, these 0.02."""

from __future__ import annotations


def ceil_div(count: int, size: int) -> int:
    """How many blocks of ``size`` hold ``count``."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below ``count``; 0 for 0."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


def padded_adapters(count: int) -> int:
    """Columns of a tile of logits of ``count`` adapters: a power of two, at least 8. Where a tile has fewer, and an adapter no more rows than that,
    Triton 3.6 mixes up the layouts of two tiles and refuses its own code (16 tokens, up to 4 adapters, ranks up to 4)."""
    return max(8, power_of_two(count))

"""A range check for numbers in arguments and flags that no settings model validates."""

from __future__ import annotations

import math
from typing import TypeVar

from meteora_core.errors import UsageError

MOST_ROWS = 10**12
"""The largest number of rows that a setting, argument or flag may ask for."""
MOST_TOKENS = 1 << 24
"""The largest number of tokens that a setting, argument or flag may ask for."""
MOST_PROCESSES = 1024
"""The largest number of processes on one machine that a setting, argument or flag may ask for."""

LEAST_RATE = 1e-12
"""The smallest learning rate; much smaller ones are 0 in float32 and train nothing."""

LEAST_TEMPERATURE, MOST_TEMPERATURE = 2.0**-126, 2.0**126
"""The range of the routing temperature T: the smallest normal float32 and its reciprocal. Neither T nor 1 / T underflows in float32 within it."""

Number = TypeVar("Number", int, float)


def check_temperature(value: float) -> float:
    """Return a routing temperature if it is in its range.

    Args:
        value: Routing temperature T.

    Raises:
        UsageError: T is below the smallest normal float32 or above its reciprocal, or NaN.

    Example:
        >>> check_temperature(15.0)
        15.0
    """
    if not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
        raise UsageError(
            f"the routing temperature T is {value}, it must be a number from 1.18e-38 to 8.5e+37", hint="T = 1 is the default; composites use 15 to 30"
        )
    return value


def check_range(what: str, value: Number, low: float, high: float, *, above: bool = False) -> Number:
    """Return ``value`` if it is in a range.

    Args:
        what: The name of the argument or flag, for the error message.
        value: The number to check.
        low: The smallest allowed value.
        high: The largest allowed value.
        above: Whether ``low`` itself is excluded.

    Raises:
        UsageError: The value is outside the range, or NaN.
    """
    inside = (value > low if above else value >= low) and value <= high
    if not inside:
        text = str(value) if isinstance(value, float) or abs(value) < 10**20 else f"a number of {int(math.log10(abs(value))) + 1} digits"
        border = "above" if above else "at least"
        raise UsageError(f"{what} must be {border} {low:,} and at most {high:,}, not {text}", hint=f"give {what} a number in this range")
    return value

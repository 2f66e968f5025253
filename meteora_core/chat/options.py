"""The settings that a user can change during a chat, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from meteora_core.errors import UsageError, did_you_mean
from meteora_core.ranges import LEAST_TEMPERATURE


@dataclass(frozen=True)
class Option:
    """One setting of a chat.

    Attributes:
        name: Name as the user types it.
        whole: Whether values are whole numbers.
        low, high: Smallest and largest value.
        text: Description of the setting, in one line.
        open_low: Whether ``low`` itself is excluded.
        gates: Whether the setting applies only to a model with gates.
    """

    name: str
    whole: bool
    low: float
    high: float
    text: str
    open_low: bool = False
    gates: bool = False

    def range(self) -> str:
        """The range in words, for a hint."""
        kind = "a whole number" if self.whole else "a number"
        lowest = f"above {self.low:g}" if self.open_low else f"from {self.low:.3g}"
        highest = "" if math.isinf(self.high) else f"{' and up' if self.open_low else ''} to {self.high:.15g}"
        return f"{kind} {lowest}{highest}"


OPTIONS: tuple[Option, ...] = (
    Option("max-new-tokens", True, 1, math.inf, "longest answer, in tokens"),
    Option("temperature", False, 0, 5, "sampling temperature; 0 always takes the most likely token"),
    Option("top-p", False, 0, 1, "draw from the most likely tokens, up to this sum of probabilities", open_low=True),
    Option("seed", True, 0, 2**32 - 1, "seed of the random generator that draws tokens"),
    Option("T", False, LEAST_TEMPERATURE, 1000, "routing temperature; a higher one mixes the chosen adapters more evenly", gates=True),
    Option("top-k", True, 1, math.inf, "number of adapters per token and layer", gates=True),
)


def options_for(adapters: int, most_temperature: float = 5.0) -> dict[str, Option]:
    """The settings of a model by name.

    Args:
        adapters: Number of adapters; with 0, the settings of the gates are left out.
        most_temperature: Largest sampling temperature.
    """
    options = {}
    for option in OPTIONS:
        if option.gates and not adapters:
            continue
        if option.name == "top-k":
            option = replace(option, high=adapters)
        elif option.name == "temperature":
            option = replace(option, high=most_temperature)
        options[option.name] = option
    return options


def check_option(name: str, value: str, known: Mapping[str, Option]) -> int | float:
    """Parse the value of a setting.

    Args:
        name: Name of the setting.
        value: Value as the user typed it.
        known: The settings of the model; see :func:`options_for`.

    Raises:
        UsageError: The setting is unknown, or the value is not a number in its range, which the hint gives.
    """
    if name not in known:
        if any(option.name == name for option in OPTIONS):
            raise UsageError(f"{name} is a setting of the gates, and this model has none", hint="start `meteora chat` with a checkpoint")
        raise UsageError(f"unknown setting {name!r}", hint=did_you_mean(name, known) or f"the settings are: {', '.join(known)}")
    option = known[name]
    try:
        parsed: int | float = int(value) if option.whole else float(value)
    except ValueError:
        raise UsageError(f"{name} cannot be {value!r}", hint=f"it must be {option.range()}") from None
    if not option.low <= parsed <= option.high or (option.open_low and parsed == option.low) or parsed in (math.inf, -math.inf):
        raise UsageError(f"{name} cannot be {value}", hint=f"it must be {option.range()}")
    return parsed

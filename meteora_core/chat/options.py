"""The settings that can be changed while chatting, and their ranges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meteora_core.errors import UsageError, did_you_mean
from meteora_core.routing import Meteora


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: As it is typed.
        whole: Whether it is a whole number.
        low, high: The range.
        open_low: Whether ``low`` itself is out.
        text: What it does, in a line.
        gates: Whether it belongs to the gates.
    """

    name: str
    whole: bool
    low: float
    high: float
    text: str
    open_low: bool = False
    gates: bool = False

    def range(self) -> str:
        """The range in words."""
        kind = "a whole number" if self.whole else "a number"
        above = f"above {self.low:g}" if self.open_low else f"from {self.low:g}"
        return f"{kind} {above}" + ("" if math.isinf(self.high) else f" to {self.high:.15g}")


OPTIONS: tuple[Option, ...] = (
    Option("max-new-tokens", True, 1, math.inf, "longest answer, in tokens"),
    Option("temperature", False, 0, 5, "sampling temperature; 0 takes the likeliest token"),
    Option("top-p", False, 0, 1, "draw from the likeliest tokens up to this sum of probabilities", open_low=True),
    Option("seed", True, 0, 2**32 - 1, "of the draws"),
    Option("T", False, 0, 1000, "routing temperature: the higher, the more evenly the chosen adapters are mixed", open_low=True, gates=True),
    Option("top-k", True, 1, math.inf, "adapters per token and layer", gates=True),
)


def options_for(state: Meteora | None) -> dict[str, Option]:
    """The settings that a model has, by name; without adapters there are no gates to set."""
    found = {}
    for option in OPTIONS:
        if option.gates and state is None:
            continue
        if option.name == "top-k" and state is not None:
            option = Option(option.name, True, 1, len(state.names), option.text, gates=True)
        found[option.name] = option
    return found


def check_option(name: str, value: str, state: Meteora | None) -> int | float:
    """Read a value. Raises UsageError for an unknown name, or for a value out of range (the range is in the hint)."""
    known = options_for(state)
    if name not in known:
        if any(option.name == name for option in OPTIONS):
            raise UsageError(f"{name} belongs to the gates, and this model has none", hint="start `meteora chat` with a checkpoint")
        raise UsageError(f"unknown setting {name!r}", hint=did_you_mean(name, known) or f"there are: {', '.join(known)}")
    option = known[name]
    try:
        parsed: int | float = int(value) if option.whole else float(value)
    except ValueError:
        raise UsageError(f"{name} cannot be {value!r}", hint=f"it is {option.range()}") from None
    if not option.low <= parsed <= option.high or (option.open_low and parsed == option.low) or parsed in (math.inf, -math.inf):
        raise UsageError(f"{name} cannot be {value}", hint=f"it is {option.range()}")
    return parsed

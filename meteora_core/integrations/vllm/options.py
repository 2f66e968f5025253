"""The routing options of a request, which clients send in ``vllm_xargs`` (``SamplingParams.extra_args`` in Python)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from meteora_core.ranges import LEAST_TEMPERATURE, MOST_TEMPERATURE
from meteora_core.text import listed

PREFIX = "meteora_"
NAMES = ("meteora_top_k", "meteora_temperature", "meteora_allowed", "meteora_muted", "meteora_force", "meteora_off", "meteora_trace")
"""The options: adapters per token; routing temperature; the only adapters that may be chosen; adapters that may not be chosen; one adapter for all tokens;
1 for the base model alone; 1 to record the routes."""


class Options(NamedTuple):
    """How the tokens of one request choose their adapters.

    Attributes:
        top_k: Number of adapters per token; 0 for the base model alone.
        temperature: Routing temperature T.
        allowed: Indices of the adapters that may be chosen, sorted; None for all.
        trace: Whether to record the routes.
    """

    top_k: int
    temperature: float
    allowed: tuple[int, ...] | None = None
    trace: bool = False

    @property
    def key(self) -> tuple[int, float, tuple[int, ...] | None]:
        """The options on which the cached keys and values of a request depend."""
        return self.top_k, self.temperature, self.allowed


def parse(extra: Mapping[str, Any] | None, names: Sequence[str], default: Options) -> Options:
    """The options of a request.

    Args:
        extra: The request's extra arguments; keys that do not start with ``meteora_`` are ignored.
        names: Names of the adapters, in order.
        default: The options of requests without any.

    Raises:
        ValueError: An option is unknown, has an invalid value, names an unknown adapter, or contradicts another option.

    Example:
        >>> parse({"meteora_top_k": 1, "meteora_muted": ["b"]}, ["a", "b", "c"], Options(2, 1.0))
        Options(top_k=1, temperature=1.0, allowed=(0, 2), trace=False)
    """
    mine = {key: value for key, value in (extra or {}).items() if key.startswith(PREFIX) and value is not None}
    if not mine:
        return default
    if unknown := sorted(set(mine) - set(NAMES)):
        raise ValueError(f"unknown option {unknown[0]!r}: choose from {', '.join(NAMES)}")
    top_k, temperature = default.top_k, default.temperature
    if "meteora_top_k" in mine:
        top_k = _whole(mine, "meteora_top_k", 1, len(names))
    if "meteora_temperature" in mine:
        temperature = _number(mine, "meteora_temperature")
    allowed = _indices(mine, "meteora_allowed", names)
    muted = _indices(mine, "meteora_muted", names)
    forced = _indices(mine, "meteora_force", names)
    if forced is not None:
        if len(forced) != 1 or allowed is not None or muted is not None:
            raise ValueError("meteora_force takes one adapter, without meteora_allowed and meteora_muted")
        top_k, allowed = 1, forced
    if muted is not None:
        allowed = tuple(index for index in (range(len(names)) if allowed is None else allowed) if index not in muted)
    if allowed == ():
        raise ValueError("no adapter is left to choose: use meteora_off=1 for the base model alone")
    if "meteora_off" in mine and _whole(mine, "meteora_off", 0, 1):
        top_k, allowed = 0, None
    if allowed is not None and len(allowed) == len(names):
        allowed = None
    trace = bool("meteora_trace" in mine and _whole(mine, "meteora_trace", 0, 1))
    return Options(top_k, temperature, allowed, trace)


def _whole(mine: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = mine[key]
    number = float(value) if isinstance(value, int | float) or (isinstance(value, str) and value.strip().isdigit()) else math.nan
    if not (number == number // 1 and least <= number <= most):
        raise ValueError(f"{key} must be a whole number from {least} to {most}, not {value!r}")
    return int(number)


def _number(mine: Mapping[str, Any], key: str) -> float:
    value = mine[key]
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not LEAST_TEMPERATURE <= number <= MOST_TEMPERATURE:
        raise ValueError(f"{key} must be a number from 1.18e-38 to 8.5e+37, not {value!r}")
    return number


def _indices(mine: Mapping[str, Any], key: str, names: Sequence[str]) -> tuple[int, ...] | None:
    """The indices of the adapters in an option: a list of names, or names separated by commas."""
    if key not in mine:
        return None
    value = mine[key]
    wanted = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(wanted, list | tuple) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise ValueError(f"{key} must be a list of names of adapters, not {value!r}")
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(f"{key} names {unknown[0]!r}, which is no adapter of this model: choose from {listed(names, 20)}")
    return tuple(sorted({names.index(name) for name in wanted}))

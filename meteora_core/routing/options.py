"""The routing options of one request: how the adapters of its tokens are chosen, whatever other requests of its batch ask for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from meteora_core.errors import UsageError, did_you_mean
from meteora_core.ranges import check_temperature
from meteora_kernels import Routing
from meteora_kernels.token_options import mix_row, option_row


@dataclass(frozen=True)
class RoutingOptions:
    """How adapters are chosen for the tokens of one request.

    Without ``enabled``, the base model answers alone. Otherwise ``weights`` or ``forced`` replace the gates, and if both are absent the gates choose.

    Attributes:
        top_k: Number of adapters per token and layer; None keeps the model's.
        temperature: Routing temperature T; None keeps the model's.
        forced: Name of the only adapter in use, with weight 1.
        muted: Names of adapters that the gates never choose, in addition to those that are muted for the whole model.
        weights: A static mix: the weight of each adapter by name, the same for every token and layer. Weights need not sum to 1.
        enabled: Whether adapters are used at all.

    Example:
        >>> from meteora_core.routing import RoutingOptions
        >>> RoutingOptions(forced="gsm8k").describe()
        'forced: gsm8k'
        >>> RoutingOptions(weights={"gsm8k": 0.7, "strategyqa": 0.3}).describe()
        'mix: 0.7 gsm8k + 0.3 strategyqa'
    """

    top_k: int | None = None
    temperature: float | None = None
    forced: str | None = None
    muted: frozenset[str] = frozenset()
    weights: Mapping[str, float] | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "muted", frozenset(self.muted))
        if self.weights is not None:
            object.__setattr__(self, "weights", dict(self.weights))

    def __hash__(self) -> int:
        weights = None if self.weights is None else frozenset(self.weights.items())
        return hash((self.top_k, self.temperature, self.forced, self.muted, weights, self.enabled))

    @property
    def gated(self) -> bool:
        """Whether the gates choose."""
        return self.enabled and self.forced is None and self.weights is None

    def describe(self) -> str:
        """A short description for users."""
        if not self.enabled:
            return "base model"
        if self.weights is not None:
            return "mix: " + " + ".join(f"{weight:g} {name}" for name, weight in self.weights.items())
        if self.forced is not None:
            return f"forced: {self.forced}"
        top = "gates" if self.top_k is None else f"gates: top {self.top_k}"
        temperature = "" if self.temperature is None else f", T {self.temperature:g}"
        return top + temperature + (f", without {', '.join(sorted(self.muted))}" if self.muted else "")

    def routes(self, routing: Routing) -> int:
        """The number of routes per token that the options need in a model with the routing ``routing``."""
        if not self.enabled:
            return 1
        return len(self.weights) if self.weights is not None else 1 if self.forced is not None else self.top_k or routing.top_k

    def check(self, names: Sequence[str]) -> None:
        """Check the options against the adapters of a model.

        Args:
            names: Names of the model's adapters.

        Raises:
            UsageError: A name is unknown, a value is out of range, all adapters are muted, or two options exclude each other.
        """
        for name in (*self.muted, *(self.weights or ()), *([] if self.forced is None else [self.forced])):
            if name not in names:
                raise UsageError(f"no adapter named {name!r}", hint=did_you_mean(name, names) or f"there are: {', '.join(names)}")
        if self.top_k is not None and not 1 <= self.top_k <= len(names):
            raise UsageError(f"top_k is {self.top_k}, but the bank has {len(names)} adapters", hint=f"choose a top_k between 1 and {len(names)}")
        if self.temperature is not None:
            check_temperature(self.temperature)
        if len(self.muted) == len(names):
            raise UsageError("all adapters would be muted", hint="leave at least one")
        if self.weights is not None:
            if self.forced is not None:
                raise UsageError("a forced adapter and weights exclude each other", hint="give one of the two")
            if not self.weights:
                raise UsageError("the weights name no adapter", hint=f"there are: {', '.join(names)}")
            for name, weight in self.weights.items():
                if not math.isfinite(weight):
                    raise UsageError(f"the weight of {name} is {weight}, it must be a finite number", hint="weights are numbers such as 0.7")


@dataclass(frozen=True, eq=False)
class RowRoutes:
    """The routing options of each row of a batch, as tensors on the CPU. With a single row, they hold for all tokens of the batch.

    Attributes:
        options: The options of each row.
        width: Number of routes per token k, the most that a row needs; rows that need fewer have routes of weight 0.
        gated: Whether the gates choose in any row.
        top_k: Number of adapters per token of each row, int64 (batch, 1).
        temperature: Routing temperature of each row, float32 (batch, 1).
        allowed: Whether the gates of each row may choose an adapter, bool (batch, 1, N).
        fixed: Whether each row has fixed routes instead of gates, bool (batch, 1, 1).
        indices: Fixed routes of each row, int64 (batch, 1, k); in other rows they have no effect.
        weights: Weights of the fixed routes, float32 (batch, 1, k).
        output: The options of the tokens that an output layer sees, if they differ from those that other layers see; for packed batches.
        table: The options of each row as fused groups take them (:mod:`meteora_kernels.token_options`), float32 (batch, N + 2), or (batch, N + 2, 1) if a row
            has a static mix; None in packed batches, whose ``grouped`` holds it.
        grouped: How fused groups route all tokens of the batch; None if they cannot.
    """

    options: tuple[RoutingOptions, ...]
    width: int
    gated: bool
    top_k: Tensor = field(repr=False)
    temperature: Tensor = field(repr=False)
    allowed: Tensor = field(repr=False)
    fixed: Tensor = field(repr=False)
    indices: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    output: RowRoutes | None = field(default=None, repr=False)
    table: Tensor | None = field(default=None, repr=False)
    grouped: Routing | None = field(default=None, repr=False)

    def packed(self, counts: Sequence[int], outputs: Sequence[int]) -> RowRoutes:
        """The options of the tokens of all rows, one after the other in a batch of one row.

        Args:
            counts: Number of tokens of each row.
            outputs: Positions, among all tokens, of those that an output layer sees.

        Returns:
            Options with tensors (1, tokens, ...), on the CPU.
        """
        row_of = torch.arange(self.rows).repeat_interleave(torch.tensor(list(counts)))
        return replace(self._at(row_of), output=self._at(row_of[list(outputs)]))

    def _at(self, row_of: Tensor) -> RowRoutes:
        """The options of tokens with the given rows, int64 (tokens,), as a batch of one row."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor[row_of].transpose(0, 1)

        with torch.inference_mode(False):
            return RowRoutes(
                (self.options[int(row_of[0])],),
                self.width,
                self.gated,
                pick(self.top_k),
                pick(self.temperature),
                pick(self.allowed),
                pick(self.fixed),
                pick(self.indices),
                pick(self.weights),
                grouped=None if self.table is None else Routing(self.width, allowed=self.table[row_of]),
            )

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.options)

    @classmethod
    def of(cls, options: tuple[RoutingOptions, ...], names: Sequence[str], routing: Routing, width: int | None = None) -> RowRoutes:
        """Make the tensors of some rows.

        Args:
            options: The checked options of each row; at least one.
            names: Names of the model's adapters.
            routing: The routing of the whole model, from which options that are None are taken.
            width: Number of routes per token, at least what every row needs; None for the most that a row needs.

        Raises:
            UsageError: All adapters of a row are muted.
        """
        fixed = [_fixed(row, names) for row in options]
        top_k = [row.top_k or routing.top_k for row in options]
        width = width or max(row.routes(routing) for row in options)
        everywhere = [True] * len(names) if routing.allowed is None else routing.allowed.tolist()
        allowed = [[fine and name not in row.muted for fine, name in zip(everywhere, names, strict=True)] for row in options]
        if not all(map(any, allowed)):
            raise UsageError("all adapters would be muted", hint="leave at least one")
        filled = [_filled(routes or {}, width, len(names)) for routes in fixed]
        table = [_option_row(row, each, names, routing) for row, each in zip(options, allowed, strict=True)]
        with torch.inference_mode(False):
            return cls(
                options,
                width,
                None in fixed,
                torch.tensor(top_k).unsqueeze(1),
                torch.tensor([row.temperature or routing.temperature for row in options], dtype=torch.float32).unsqueeze(1),
                torch.tensor(allowed).unsqueeze(1),
                torch.tensor([routes is not None for routes in fixed]).view(-1, 1, 1),
                torch.tensor([list(routes) for routes in filled]).unsqueeze(1),
                torch.tensor([list(routes.values()) for routes in filled], dtype=torch.float32).unsqueeze(1),
                table=torch.tensor(table).unsqueeze(-1) if any(row[-1] == 0 for row in table) else torch.tensor(table),
                grouped=_grouped(table[0]) if len(options) == 1 else None,
            )


class FixedRows:
    """Routing options of up to ``count`` texts with one token each, in tensors that stay at their addresses, so that a CUDA graph can read them.

    Args:
        names: Names of the model's adapters.
        routing: The routing of the whole model, from which options that are None are taken.
        count: Number of texts.
        width: Number of routes per token k, the most that a text may need.
        device: Device of the model.
        mixes: Whether a text may have a static mix; without them, fused groups take a little less time.
    """

    def __init__(self, names: Sequence[str], routing: Routing, count: int, width: int, device: torch.device, *, mixes: bool = True) -> None:
        self.names, self.routing, self.width = tuple(names), routing, width
        self._set: tuple[RoutingOptions, ...] = ()
        rows = RowRoutes.of((RoutingOptions(enabled=False),) * count, self.names, routing, width)
        with torch.inference_mode(False):
            self._tensors = {name: getattr(rows, name).transpose(0, 1).to(device).contiguous() for name in _TENSORS}
            assert rows.table is not None
            self._table = (rows.table.unsqueeze(-1) if mixes else rows.table).to(device)

    def set(self, options: Sequence[RoutingOptions]) -> None:
        """Change the options of the first texts. They must have been checked, and none may need more than ``width`` routes."""
        if tuple(options) == self._set:
            return
        self._set = tuple(options)
        rows = RowRoutes.of(self._set, self.names, self.routing, self.width)
        for name, tensor in self._tensors.items():
            tensor[:, : len(options)] = getattr(rows, name).transpose(0, 1).to(tensor.device)
        assert rows.table is not None
        self._table[: len(options)] = rows.table.view(len(options), *self._table.shape[1:]).to(self._table.device)

    def first(self, count: int) -> RowRoutes:
        """The options of the first ``count`` texts, as one batch of one row with ``count`` tokens; they follow :meth:`set`."""
        tensors = {name: tensor[:, :count] for name, tensor in self._tensors.items()}
        grouped = Routing(self.width, allowed=self._table[:count])
        return RowRoutes((RoutingOptions(enabled=False),), self.width, True, **tensors, grouped=grouped)


_TENSORS = ("top_k", "temperature", "allowed", "fixed", "indices", "weights")
"""The tensors of :class:`RowRoutes`."""


def _fixed(options: RoutingOptions, names: Sequence[str]) -> dict[int, float] | None:
    """The weights of the adapters by index; None if the gates choose. The base model alone is an adapter of weight 0."""
    if not options.enabled:
        return {0: 0.0}
    if options.weights is not None:
        return {names.index(name): float(weight) for name, weight in options.weights.items()}
    return None if options.forced is None else {names.index(options.forced): 1.0}


def _option_row(options: RoutingOptions, allowed: Sequence[bool], names: Sequence[str], routing: Routing) -> list[float]:
    """The options of a row as fused groups take them (:mod:`meteora_kernels.token_options`)."""
    if not options.enabled:
        return option_row(len(names), 0, 1.0)
    if options.weights is not None:
        return mix_row(len(names), {names.index(name): weight for name, weight in options.weights.items()})
    if options.forced is not None:
        return option_row(len(names), 1, 1.0, [names.index(options.forced)])
    return option_row(len(names), options.top_k or routing.top_k, options.temperature or routing.temperature, itertools.compress(range(len(names)), allowed))


def _grouped(row: list[float]) -> Routing | None:
    """How fused groups route tokens that all have the options ``row``; None for the base model alone and for a static mix."""
    if not row[-2] or not row[-1]:
        return None
    allowed = row[:-2]
    return Routing(int(row[-2]), row[-1], None if all(allowed) else torch.tensor(allowed, dtype=torch.bool))


def _filled(routes: Mapping[int, float], width: int, count: int) -> dict[int, float]:
    """``width`` routes: the given ones, then other adapters with weight 0."""
    others = [index for index in range(count) if index not in routes][: width - len(routes)]
    return {**routes, **dict.fromkeys(others, 0.0)}

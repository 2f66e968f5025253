"""The state that the layers of a worker process share: the options of every token, and the recorded routes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meteora_core.integrations.vllm.options import Options, parse
from meteora_kernels.token_options import new_options, option_row

KEPT = 256
"""Number of requests whose recorded routes are kept."""


class Scheduled(NamedTuple):
    """The tokens of one request in one step.

    Attributes:
        request: The request's id.
        tokens: Number of tokens.
        first: Position of the first of these tokens in the request.
        options: The request's options.
    """

    request: str
    tokens: int
    first: int
    options: Options


class Tokens(NamedTuple):
    """The options of every token of a batch.

    Attributes:
        top_k: int64 (M,).
        temperature: float32 (M,).
        allowed: bool (M, N), or None if every adapter may be chosen.
        most: The largest top_k.
    """

    top_k: Tensor
    temperature: Tensor
    allowed: Tensor | None
    most: int


class Runtime:
    """The state of a worker process.

    Attributes:
        default: The options of requests that set none.
        table: The options of every token, which the GPU kernels read (:mod:`meteora_kernels.token_options`); None without these kernels. CUDA graphs read it,
            so its memory stays the same.
        varied: Whether a request of this step has options.
        observed: Whether this step runs without the kernels' table, and without CUDA graphs: it records or counts routes, a token has more adapters than the
            default, or there is no table.
        paths: The layers of the checkpoint in this process, in the order of loading.
    """

    def __init__(self) -> None:
        self.default = Options(2, 1.0)
        self.names: list[str] = []
        self.count_every = 0
        self.table: Tensor | None = None
        self.varied = False
        self.observed = False
        self.paths: list[str] = []
        self._options: dict[str, Options] = {}
        self._step: list[Scheduled] = []
        self._steps = 0
        self._tokens: dict[torch.device, Tokens] = {}
        self._written: list[tuple[Options, int]] = []
        self._live: dict[str, tuple[Tensor, Tensor]] = {}
        self._routes: OrderedDict[str, list[dict[str, Any]]] = OrderedDict()
        self._counts: Tensor | None = None
        self._counted = 0

    def begin(self, output: Any) -> None:
        """Start a step: store the options of new requests, and decide whether the step is observed.

        Args:
            output: vLLM's ``SchedulerOutput``.
        """
        for request in output.finished_req_ids:
            self._options.pop(request, None)
        first: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            extra = getattr(new.sampling_params, "extra_args", None)
            options = parse(extra, self.names, self.default)
            if options != self.default:
                self._options[new.req_id] = options
            else:
                self._options.pop(new.req_id, None)
            first[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        first.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        self._first = first
        self._steps += 1
        counting = bool(self.count_every) and self._steps % self.count_every == 0
        self._counting = counting
        here = [self._options[request] for request in output.num_scheduled_tokens if request in self._options] if self._options else []
        self.varied = bool(here)
        self.observed = counting or any(self._beyond_table(options) for options in here)

    def _beyond_table(self, options: Options) -> bool:
        return self.table is None or options.trace or options.top_k > self.default.top_k

    def make_table(self, tokens: int, device: torch.device) -> Tensor:
        """The table of options, with the default for ``tokens`` tokens. It is created at the first call."""
        if self.table is None:
            self.table = new_options(tokens, self._row(self.default), device)
        return self.table

    def _row(self, options: Options) -> list[float]:
        return option_row(len(self.names), options.top_k, options.temperature, options.allowed)

    @property
    def ordered(self) -> bool:
        """Whether this step needs the order of its tokens, because it is observed or the table changes."""
        return self.observed or self.varied or bool(self._written)

    def _write(self, each: list[tuple[Options, int]]) -> None:
        """Write the options of this step's tokens into the table, if they are not those of the last step. ``each``: options and number of tokens."""
        if self.table is None or each == self._written:
            return
        used, before = sum(number for _, number in each), sum(number for _, number in self._written)
        if used > len(self.table):
            raise RuntimeError(f"a step has {used} tokens, more than the {len(self.table)} of max_num_batched_tokens")
        padded = [*each, (self.default, before - used)] if before > used else each
        rows = {options: self._row(options) for options, _ in padded}
        places = {options: place for place, options in enumerate(rows)}
        index = torch.tensor([places[options] for options, _ in padded]).repeat_interleave(torch.tensor([number for _, number in padded]))
        values = torch.tensor(list(rows.values()))[index]
        self.table[: len(values)].copy_(values.pin_memory() if self.table.is_cuda else values, non_blocking=True)
        self._written = each if self.varied else []

    def arrange(self, requests: list[str], counts: Any) -> None:
        """Store the order of the requests and the number of tokens of each. If the step is not observed, write their options into the table."""
        if not self.observed:
            found = [(self._options.get(request, self.default), int(count)) for request, count in zip(requests, counts, strict=False)] if self.varied else []
            self._write(found)
            return
        self._tokens.clear()
        self._live.clear()
        self._step = [
            Scheduled(request, int(count), self._first.get(request, 0), self._options.get(request, self.default))
            for request, count in zip(requests, counts, strict=False)
        ]

    def finish(self) -> None:
        """End a step: keep the routes of the traced requests."""
        if not self.observed:
            return
        self.observed = False
        begin = 0
        for request, count, first, options in self._step:
            if options.trace and self._live:
                parts = {path: (indices[begin : begin + count].cpu(), weights[begin : begin + count].cpu()) for path, (indices, weights) in self._live.items()}
                self._routes.setdefault(request, []).append({"first": first, "count": count, "layers": parts})
                self._routes.move_to_end(request)
                while len(self._routes) > KEPT:
                    self._routes.popitem(last=False)
            begin += count
        if self._counting:
            self._count(begin)
        self._live.clear()
        self._step = []

    def _count(self, tokens: int) -> None:
        """Add the choices of all layers to the counts of the adapters."""
        for indices, weights in self._live.values():
            chosen = indices[:tokens][weights[:tokens] > 0]
            found = torch.bincount(chosen.reshape(-1), minlength=len(self.names))
            self._counts = found if self._counts is None else self._counts + found
        self._counted += tokens

    def tokens(self, count: int, device: torch.device) -> Tokens:
        """The options of every token of an observed step, padded to ``count`` tokens with the default."""
        found = self._tokens.get(device)
        if found is not None and found.top_k.shape[0] == count:
            return found
        each = [(options, number) for _, number, _, options in self._step]
        rest = count - sum(number for _, number in each)
        each = [*each, (self.default, rest)] if rest > 0 else each
        repeats = torch.tensor([number for _, number in each])
        top_k = torch.tensor([options.top_k for options, _ in each]).repeat_interleave(repeats)[:count]
        temperature = torch.tensor([options.temperature for options, _ in each], dtype=torch.float32).repeat_interleave(repeats)[:count]
        allowed = None
        if any(options.allowed is not None for options, _ in each):
            mask = torch.ones(len(each), len(self.names), dtype=torch.bool)
            for row, (options, _) in enumerate(each):
                if options.allowed is not None:
                    mask[row] = False
                    mask[row, list(options.allowed)] = True
            allowed = mask.repeat_interleave(repeats, dim=0)[:count].to(device)
        most = max(1, max(options.top_k for options, _ in each))
        self._tokens[device] = found = Tokens(top_k.to(device), temperature.to(device), allowed, most)
        return found

    def record(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Keep the routes of a layer until the end of the step: indices int64 and weights float32, both (M, k)."""
        self._live[path] = indices, weights

    def routes(self, request: str, first: int = 0) -> dict[str, Any] | None:
        """The recorded routes of a request: for each layer of this process, indices and weights by token; None if none were recorded.

        Args:
            request: The request's id in vLLM's API, or in its engine.
            first: The first position to return.
        """
        for name, recorded in self._routes.items():
            if name == request or name.startswith(f"{request}-"):
                parts = [(part, max(0, first - part["first"])) for part in recorded if part["first"] + part["count"] > first]
                layers = {
                    path: {
                        "indices": [row for part, begin in parts for row in part["layers"][path][0][begin:].tolist()],
                        "weights": [[round(value, 6) for value in row] for part, begin in parts for row in part["layers"][path][1][begin:].tolist()],
                    }
                    for path in recorded[0]["layers"]
                }
                positions = [part["first"] + place for part, begin in parts for place in range(begin, part["count"])]
                return {"positions": positions, "layers": layers}
        return None

    def counts(self) -> dict[str, Any]:
        """How often the layers of this process chose each adapter in the counted steps, and the number of tokens in these steps."""
        found = [0] * len(self.names) if self._counts is None else [int(value) for value in self._counts.tolist()]
        return {"adapters": dict(zip(self.names, found, strict=True)), "tokens": self._counted, "layers": len(self.paths), "every": self.count_every}


RUNTIME = Runtime()
"""The state of this process."""

"""Token-by-token generation with a key-value cache that is kept between calls.

A call with a text that begins like the one before reads only what is new, so a turn of a conversation costs its own length. (The attention
still looks at all tokens; the weights, which are most of the work for a chat, are applied to the new ones only.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from meteora_core.errors import UsageError
from meteora_core.generation.batched import can_be_fixed
from meteora_core.generation.fixed_cache import FixedCache
from meteora_core.generation.limits import context_length, end_tokens
from meteora_core.generation.nonfinite import non_finite_error, not_finite
from meteora_core.generation.text import TextDecoder
from meteora_core.model.caches import cache_argument, cache_of, can_be_cut, new_cache, pieces_are_safe
from meteora_core.model.vocabulary import check_tokens
from meteora_core.routing import record_routes
from meteora_core.trace.record import CHUNK, last_logits_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

Finish = Literal["end", "length", "context", "stopped"]
"""Why an answer ended: its end token, max_new_tokens, the model's context is full, or the user stopped it."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: Draw from the smallest set of tokens whose probabilities reach this sum.
        seed: Of the draws; the same seed gives the same answer.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reading:
    """A piece of the prompt was read.

    Attributes:
        done, total: Tokens read of those that had to be read.
        reused: Tokens whose keys and values were there already.
        routes: (indices, weights), each (tokens, L, k), of the tokens just read; None when nothing is recorded.
    """

    done: int
    total: int
    reused: int
    routes: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Written:
    """One token of the answer.

    Attributes:
        id: Its id.
        text: The text that it completes; may be empty.
        routes: (indices, weights), each (1, L, k), of the pass that wrote it; None when nothing is recorded.
    """

    id: int
    text: str
    routes: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Finished:
    """The answer is complete.

    Attributes:
        reason: Why.
        text: The whole answer.
        ids: Its tokens, without the end token.
        prompt_tokens, reused: Tokens of the prompt, and how many of them were in the cache.
        first_seconds: From the call to the first token.
        seconds: From the call to the last.
        paths: The recorded layers' paths, in the order of the routes.
    """

    reason: Finish
    text: str
    ids: tuple[int, ...]
    prompt_tokens: int
    reused: int
    first_seconds: float
    seconds: float
    paths: tuple[str, ...]

    @property
    def tokens_per_second(self) -> float:
        """Speed of the tokens after the first; 0 when there are none."""
        after = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / after if len(self.ids) > 1 and after > 0 else 0.0


Event = Reading | Written | Finished
Scope = Callable[[], AbstractContextManager[Any]]


class Engine:
    """Generates with one model, for one conversation at a time.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer.
        cuda_graphs: "auto": on a CUDA GPU, where the model allows it, the cache has a fixed size and writing a token is the replay of a CUDA graph
            (eager code while routes are recorded); "on": such a cache on any device; "off": a growing cache.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cuda_graphs: Literal["auto", "on", "off"] = "auto") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = context_length(model)
        self._ends = end_tokens(model, tokenizer)
        self._arguments = last_logits_only(model)
        self._cache_name = cache_argument(model)
        # Some models with states misread a text in pieces of several tokens: they read the whole text again each time.
        self._in_pieces = pieces_are_safe(model)
        self._cache: Any = None
        self._cached: list[int] = []
        self._key: Hashable = None
        self._told = False
        wanted = cuda_graphs == "on" or (cuda_graphs == "auto" and model.device.type == "cuda")
        self._fixed = FixedCache(model, self._arguments, self.context) if wanted and can_be_fixed(model) else None
        if cuda_graphs == "on" and self._fixed is None:
            _log.warning("this model needs a growing cache (its attention is not SDPA over a plain one, or its weights are quantised): no CUDA graphs")

    def forget(self) -> None:
        """Drop the cache."""
        self._cache, self._cached, self._key = None, [], None

    def generate(
        self,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        scope: Scope = nullcontext,
        key: Hashable = None,
        record: bool = False,
        read_from: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Answer a prompt; the events come as they happen: Reading (one or more), Written (any number), Finished (one, the last).

        Args:
            ids: The prompt, with all earlier turns.
            sampling: How tokens are chosen.
            scope: A context manager that every forward pass runs in (forced routes, adapters off).
            key: What the cached keys and values depend on beside the tokens; a new key drops them.
            record: Record routes.
            read_from: Read at least the tokens from this position on, even if they are in the cache; None leaves that to the cache.
            stop: Asked before every pass; True ends the answer.

        Raises:
            UsageError: The prompt is empty, or leaves no room in the model's context.
            DataError: The prompt has a token that the model's embedding does not have.
            NonFiniteError: The model's logits are NaN or infinite.
        """
        if not ids:
            raise UsageError("the prompt is empty", hint="write something first")
        if self.context is not None and len(ids) >= self.context:
            raise UsageError(f"the prompt is {len(ids)} tokens, the model's context {self.context}", hint="shorten it, or start anew with /new")
        check_tokens(self.model, self.tokenizer, [ids])
        begin = time.perf_counter()
        pick = _picker(sampling, self.model.device)
        decoder = TextDecoder(self.tokenizer)
        reused = self._reuse(ids, key, len(ids) - 1 if read_from is None else min(read_from, len(ids) - 1))
        answer: list[int] = []
        text, first = "", 0.0
        paths: tuple[str, ...] = ()
        reason: Finish = "stopped"
        logits: Tensor | None = None
        routes: tuple[Tensor, Tensor] | None = None
        size = CHUNK if self._in_pieces else len(ids)
        for start in range(reused, len(ids), size):
            if stop():
                break
            part = list(ids[start : start + size])
            logits, routes, paths = self._forward(part, scope, record)
            yield Reading(start + len(part) - reused, len(ids) - reused, reused, routes)
        else:
            room = sampling.max_new_tokens if self.context is None else min(sampling.max_new_tokens, self.context - len(ids))
            while len(answer) < room and not stop():
                assert logits is not None
                token = pick(logits)
                first = first or time.perf_counter() - begin
                if token in self._ends:
                    reason = "end"
                    break
                answer.append(token)
                piece = decoder.add(token)
                text += piece
                yield Written(token, piece, None if routes is None else (routes[0][-1:], routes[1][-1:]))
                if len(answer) < room and not stop():
                    logits, routes, paths = self._forward([token], scope, record)
            else:
                if len(answer) >= room:
                    reason = "length" if room == sampling.max_new_tokens else "context"
        text += decoder.flush()
        yield Finished(reason, text, tuple(answer), len(ids), reused, first, time.perf_counter() - begin, paths)

    def _reuse(self, ids: Sequence[int], key: Hashable, most: int) -> int:
        """Cut the cache to what it shares with ``ids``, at most so many tokens; return how many there are."""
        shared = 0
        if self._in_pieces and self._cached and self._key == key:
            limit = min(len(self._cached), most)
            while shared < limit and self._cached[shared] == ids[shared]:
                shared += 1
        excess = len(self._cached) - shared
        if self._fixed is not None:
            self._fixed.cut(shared)
        elif shared and excess:
            try:
                if can_be_cut(self._cache):
                    self._cache.crop(-excess)
                else:
                    shared = 0
            except (RuntimeError, ValueError):
                shared = 0
        if not shared and self._fixed is None:
            self._cache = new_cache(self.model)
        self._cached, self._key = list(ids[:shared]), key
        return shared

    def _forward(self, tokens: list[int], scope: Scope, record: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[str, ...]]:
        """One pass; returns the last position's logits (vocabulary,), the routes and the layers' paths."""
        cache, self._cache = self._cache, None
        known, self._cached = self._cached, []
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(scope())
            routes = stack.enter_context(record_routes(self.model)) if record else None
            if self._fixed is not None:
                if record and self._fixed.captured and not self._told:
                    self._told = True
                    _log.info("routes are recorded by eager code: tokens are not written by CUDA graphs meanwhile")
                logits = self._fixed.read(tokens, None if record else (self._key,))
            else:
                arguments = {self._cache_name: cache, **self._arguments}
                output = self.model(torch.tensor([tokens], device=self.model.device), use_cache=True, **arguments)
                logits, cache = output.logits[0, -1].float(), cache_of(self.model, output)
        if bool(not_finite(logits)):
            raise non_finite_error(self.model, known + tokens, scope)
        # Only now does the cache hold these tokens in every layer; a pass that was broken off leaves no cache behind.
        self._cache, self._cached = cache, known + tokens
        return (logits, None, ()) if routes is None else (logits, routes.packed(), routes.paths)


def _picker(sampling: Sampling, device: torch.device) -> Callable[[Tensor], int]:
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    steps: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device=device).manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        scores = logits[None]
        for step in steps:
            scores = step(None, scores)
        return int(torch.multinomial(torch.softmax(scores, -1), 1, generator=generator))

    return draw

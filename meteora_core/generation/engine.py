"""The engine: a model and prompts become tokens, many rows at once or one row as a stream.

Both go the same way. A cache reads the prompts, :class:`~meteora_core.generation.rows.Rows` choose the next token of every row, and so on until all
rows are done, with rows leaving a batch as they finish. On a CPU, and wherever the fast way is not open, the cache is the model's own, which grows. On a
CUDA GPU it has a fixed size, and steps are replayed as CUDA graphs.

A stream keeps its cache between calls: a prompt that begins like the one before is read from where it differs, so a turn of a conversation costs its own
length. (Attention still covers all tokens; the weights, which are most of the work for a chat, are applied to the new ones only.)
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.generation.fixed_cache import FixedCache, batch_shape, can_be_fixed, is_observed, single_capacity
from meteora_core.generation.growing_cache import GrowingCache
from meteora_core.generation.limits import context_length, end_tokens
from meteora_core.generation.nonfinite import non_finite_error, not_finite
from meteora_core.generation.requests import Event, Finish, Finished, Reading, Request, RoutingScope, Written
from meteora_core.generation.rows import Batch, Rows, Rules, until_end
from meteora_core.generation.text import TextDecoder
from meteora_core.model.caches import cache_argument, padding_is_safe, pieces_are_safe
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.routing import record_routes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

CHUNK = 512
"""Tokens of a long prompt that are read in one forward pass: bounds the memory, and lets the reading be stopped."""

Cache = GrowingCache | FixedCache
Graphs = Literal["auto", "on", "off"]


def no_stop() -> bool:
    """Never ends an answer early."""
    return False


class Engine:
    """Generates with one model, whose weights and adapters stay as they are.

    Args:
        model: A causal language model in evaluation mode, which may be wrapped by PEFT.
        tokenizer: Its tokenizer.
        cuda_graphs: "auto": on a CUDA GPU, where the model allows it, caches have a fixed size and steps are CUDA graphs (eager code while routes are
            recorded); "on": such caches on any device, with a warning where the model does not allow them; "off": caches that grow.
        no_repeat_ngram_size: Size of the n-grams that may not repeat in prompt and answer; 0 allows all.

    Attributes:
        context: Most tokens of prompt and answer together; None when the model does not say.
        uses_fixed_caches: Whether caches have a fixed size; False from the first step on that could not be captured in a CUDA graph.
        stream_cache: The cache of the last stream; None before the first.
        batch_cache: The fixed cache of the last batch; None where there is none.

    Raises:
        CheckpointError: The model has no cache.

    Example::

        engine = Engine(model, tokenizer)
        answers = engine.answer([Request(ids) for ids in tokenizer(prompts)["input_ids"]])
        for event in engine.stream(Request(tokenizer(prompt)["input_ids"], Sampling(temperature=0.7, seed=1))):
            ...
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cuda_graphs: Graphs = "auto", *, no_repeat_ngram_size: int = 0) -> None:
        self.model = _plain(model)
        cache_argument(self.model)
        self.tokenizer = tokenizer
        self.device = next(model.parameters()).device
        self.context = context_length(self.model)
        self._rules = Rules(_ends(self.model, tokenizer), no_repeat_ngram_size)
        self._options = last_logits(self.model)
        self.stream_cache: Cache | None = None
        self._cached: list[int] = []
        self._key: Hashable = None
        self.batch_cache: FixedCache | None = None
        self._eager_noted = False
        wanted = cuda_graphs == "on" or (cuda_graphs == "auto" and self.device.type == "cuda")
        self.uses_fixed_caches = wanted and can_be_fixed(self.model)
        if cuda_graphs == "on" and not self.uses_fixed_caches:
            _log.warning("this model needs a growing cache (its attention is not SDPA over a plain one, or its weights are quantised): no CUDA graphs")

    def forget(self) -> None:
        """Forget the text of the stream: the next prompt is read as a whole."""
        self._cached, self._key = [], None

    def release(self) -> None:
        """Give the memory of caches and graphs back, and forget the text of the stream."""
        self.batch_cache = self.stream_cache = None
        self.forget()

    # --- many rows -------------------------------------------------------------------------------------------------------------

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer many prompts at once.

        Where padding would change what a model with recurrent states computes, only prompts of the same length share a batch.

        Args:
            requests: Prompts with their sampling; all of one routing scope, and none recorded.

        Returns:
            The new tokens of each request, up to (without) the end token.

        Raises:
            ValueError: The requests differ in the key of their routing scope, or one asks for its routes.
            NonFiniteError: The model's logits are NaN or infinite.
            CheckpointError: The tokenizer's end token is beyond the model's embedding.
            torch.OutOfMemoryError: The batch does not fit; fewer requests may.
        """
        if not requests:
            return []
        scope = requests[0].scope
        if any(request.scope.key != scope.key for request in requests):
            raise ValueError("the requests of a batch must have the same routing scope")
        if any(request.record for request in requests):
            raise ValueError("routes are recorded only while an answer is streamed")
        answers: list[list[int]] = [[]] * len(requests)
        for places in self._batches(requests):
            chosen = [requests[place] for place in places]
            batch = Batch.of(
                [request.ids for request in chosen],
                [replace(request.sampling, max_new_tokens=max(1, self._room(request))) for request in chosen],
                padding_token(self.model, self.tokenizer),
                self.device,
            )
            cache = self._cache_for(batch)
            passes = _Passes(self.model, scope, False)
            with passes.one():
                rows = cache.seat(batch)
                rows.choose(cache.read_batch(batch))
            for place, answer in zip(places, self._finish(cache, rows, batch, passes), strict=True):
                answers[place] = answer
            if isinstance(cache, FixedCache) and self.device.type == "cuda" and not cache.can_capture:
                self.uses_fixed_caches, self.batch_cache = False, None
        return answers

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Places of the requests that can be padded to one batch."""
        lengths = [len(request.ids) for request in requests]
        if len(set(lengths)) == 1 or padding_is_safe(self.model):
            return [list(range(len(requests)))]
        return [[place for place, other in enumerate(lengths) if other == length] for length in dict.fromkeys(lengths)]

    def _finish(self, cache: Cache, rows: Rows, batch: Batch, passes: _Passes) -> list[list[int]]:
        """Write the answers of a batch whose rows have chosen their first tokens."""
        answers: dict[int, list[int]] = {}
        room = batch.room
        places = list(range(len(room)))  # of the rows that are being written
        writing = _Writing(cache, rows, passes)
        while len(answers) < len(room):
            writing.look()
            for row, place in enumerate(places):
                if writing.done[row] and place not in answers:
                    answers[place] = until_end(writing.rows.text.text[row, batch.width :].tolist(), room[place], self._rules.ends)
            going = [row for row, place in enumerate(places) if place not in answers]
            left = max(room) - writing.steps - 1
            if going and writing.leave(going, left):
                places = [places[row] for row in going]
            for _ in range(min(steps_between_looks(self.device), left) if going else 0):
                writing.advance()
        return [answers[place] for place in range(len(room))]

    def _cache_for(self, batch: Batch) -> Cache:
        if not self.uses_fixed_caches:
            return GrowingCache(self.model, self._options, self._rules)
        if is_observed(self.model):
            if not self._eager_noted:
                self._eager_noted = True
                _log.warning("routes are recorded, forced or labelled by eager code: steps are not replayed as CUDA graphs meanwhile")
            return GrowingCache(self.model, self._options, self._rules)
        count, capacity = batch_shape(len(batch.sampling), batch.width + max(batch.room))
        if self.batch_cache is None or (len(self.batch_cache.rows), self.batch_cache.capacity) != (count, capacity):
            self.batch_cache = None  # its memory is free before the next is made
            self.batch_cache = FixedCache(self.model, self._options, self._rules, count, capacity)
        return self.batch_cache

    def _room(self, request: Request) -> int:
        most = request.sampling.max_new_tokens
        return most if self.context is None else min(most, self.context - len(request.ids))

    # --- one row, streamed -----------------------------------------------------------------------------------------------------

    def stream(self, request: Request, stop: Callable[[], bool] = no_stop) -> Iterator[Event]:
        """Answer a prompt; the events come as they happen: Reading (one or more), Written (any number), Finished (one, the last).

        Args:
            request: The prompt, how its tokens are chosen, and how adapters are.
            stop: Asked before every forward pass; True ends the answer.

        Raises:
            UsageError: The prompt is empty, or leaves no room in the model's context.
            DataError: The prompt has a token that the model's embedding does not have.
            NonFiniteError: The model's logits are NaN or infinite.
        """
        ids, room = list(request.ids), self._room(request)
        if not ids:
            raise UsageError("the prompt is empty", hint="write something first")
        if self.context is not None and len(ids) >= self.context:
            raise UsageError(f"the prompt is {len(ids)} tokens, the model's context {self.context}", hint="shorten it, or start anew with /new")
        check_tokens(self.model, self.tokenizer, [ids])
        begin = time.perf_counter()
        decoder = TextDecoder(self.tokenizer)
        answer: list[int] = []
        text, first = "", 0.0
        reason: Finish = "stopped"
        passes, logits = _Passes(self.model, request.scope, request.record), None
        cache, reused = self._reuse(request)
        for read, reading in self._read(request, cache, reused, passes, stop):
            yield reading
            logits = read if reading.done == reading.total else None
        if logits is not None and room > 0:
            writing = self._seat(request, room, logits, passes)
            while not stop():
                token = writing.tokens[0]
                first = first or time.perf_counter() - begin
                if token in self._rules.ends:
                    reason = "end"
                    break
                answer.append(token)
                piece = decoder.add(token)
                text += piece
                yield Written(token, piece, None if passes.routes is None else (passes.routes[0][-1:], passes.routes[1][-1:]))
                if len(answer) >= room:
                    reason = "length" if room == request.sampling.max_new_tokens else "context"
                    break
                if stop():
                    break
                self._step(writing, token)
        elif logits is not None:
            reason = "length"
        text += decoder.flush()
        yield Finished(reason, text, tuple(answer), len(ids), reused, first, time.perf_counter() - begin, passes.paths)

    def read(self, request: Request) -> Iterator[Reading]:
        """Read a text without an answer, for its routes.

        Args:
            request: The text; its sampling does not matter.

        Raises:
            DataError: The text has a token that the model's embedding does not have.
            NonFiniteError: The model's logits are NaN or infinite.
        """
        check_tokens(self.model, self.tokenizer, [request.ids])
        cache, reused = self._reuse(request)
        for _, reading in self._read(request, cache, reused, _Passes(self.model, request.scope, request.record), no_stop):
            yield reading

    def _read(self, request: Request, cache: Cache, reused: int, passes: _Passes, stop: Callable[[], bool]) -> Iterator[tuple[Tensor, Reading]]:
        """Read what the stream's cache lacks; yields the last position's logits (1, vocabulary) of each piece with its event."""
        ids = list(request.ids)
        # Some models with states misread a text in pieces of several tokens: they read the whole text again each time.
        size = CHUNK if pieces_are_safe(self.model) else len(ids)
        for start in range(reused, len(ids), size):
            if stop():
                return
            piece = ids[start : start + size]
            known, self._cached = self._cached, []
            with passes.one():
                logits = cache.read_piece(piece)
            if bool(not_finite(logits)):
                raise non_finite_error(self.model, known + piece, request.scope.enter)
            # Only now does the cache hold these tokens in every layer; a pass that was broken off leaves nothing to be used again.
            self._cached = known + piece
            yield logits, Reading(start + len(piece) - reused, len(ids) - reused, reused, passes.routes, passes.paths)

    def _seat(self, request: Request, room: int, logits: Tensor, passes: _Passes) -> _Writing:
        """The row of a prompt that was read, with its first token."""
        assert self.stream_cache is not None
        batch = Batch.of([request.ids], [replace(request.sampling, max_new_tokens=room)], 0, self.device)
        rows = self.stream_cache.seat(batch)
        rows.choose(logits)
        if request.record and self.stream_cache.captured and not self._eager_noted:
            self._eager_noted = True
            _log.info("routes are recorded by eager code: tokens are not written by CUDA graphs meanwhile")
        writing = _Writing(self.stream_cache, rows, passes)
        writing.look()
        return writing

    def _step(self, writing: _Writing, token: int) -> None:
        """Let the stream's cache read ``token`` and the row choose the next."""
        known, self._cached = self._cached, []
        writing.advance()
        writing.look()
        known.append(token)
        self._cached = known

    def _reuse(self, request: Request) -> tuple[Cache, int]:
        """The stream's cache, cut to what it shares with a request, and how many tokens that is."""
        ids, key = request.ids, request.scope.key
        most = len(ids) - 1 if request.read_from is None else min(request.read_from, len(ids) - 1)
        shared = 0
        if self._cached and self._key == key and pieces_are_safe(self.model):
            limit = min(len(self._cached), most)
            while shared < limit and self._cached[shared] == ids[shared]:
                shared += 1
        if self.stream_cache is None:
            if self.uses_fixed_caches:
                self.stream_cache = FixedCache(self.model, self._options, self._rules, 1, single_capacity(1, self.context), self.context)
            else:
                self.stream_cache = GrowingCache(self.model, self._options, self._rules)
        shared = self.stream_cache.cut(shared)
        self._cached, self._key = list(ids[:shared]), key
        return self.stream_cache, shared


class _Passes:
    """Forward passes of one kind, and what the last one recorded.

    Attributes:
        scope: How adapters are chosen.
        record: Whether routes are recorded.
        routes: (indices, weights) of the last pass, each (tokens, layers, k); None when nothing is recorded.
        paths: Paths of the recorded layers.
    """

    def __init__(self, model: nn.Module, scope: RoutingScope, record: bool) -> None:
        self.model, self.scope, self.record = model, scope, record
        self.routes: tuple[Tensor, Tensor] | None = None
        self.paths: tuple[str, ...] = ()

    @contextmanager
    def one(self) -> Iterator[None]:
        """The context of one forward pass."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self.scope.enter())
            recorded = stack.enter_context(record_routes(self.model)) if self.record else None
            yield
        if recorded is not None:
            self.routes, self.paths = recorded.packed(), recorded.paths


class _Writing:
    """Rows that are being written, and their cache: the loop of every answer.

    Attributes:
        steps: Number of steps after the first token.
        done: Which rows were done at the last look.
        tokens: Last token of each row at the last look.
    """

    def __init__(self, cache: Cache, rows: Rows, passes: _Passes) -> None:
        self.cache, self.rows, self.passes = cache, rows, passes
        self.steps = 0
        self.done: list[bool] = []
        self.tokens: list[int] = []

    def advance(self) -> None:
        """One step: read the last token of each row and choose the next."""
        with self.passes.one():
            self.cache.advance(self.rows, self.passes.scope.key, eager=self.passes.record)
        self.steps += 1

    def look(self) -> None:
        """Bring :attr:`done` and :attr:`tokens` up to date. Waits for the device.

        Raises:
            NonFiniteError: A row's logits were NaN or infinite.
        """
        rows = self.rows
        done, usable, self.tokens = torch.stack([rows.done.long(), rows.usable.long(), rows.token[:, 0]]).tolist()
        if not all(usable):
            raise non_finite_error(self.cache.model, rows.tokens_of(usable.index(0)), self.passes.scope.enter)
        self.done = [bool(each) for each in done]

    def leave(self, going: Sequence[int], steps: int) -> bool:
        """Let the rows that are done leave, if that pays: only ``going`` are left then. ``steps`` are the most that may follow."""
        if len(going) == len(self.rows):
            return False
        smaller = self.cache.leave(self.rows, torch.tensor(list(going), device=self.rows.done.device), steps)
        if smaller is None:
            return False
        self.cache, self.rows = smaller
        return True


def steps_between_looks(device: torch.device) -> int:
    """Steps of a batch between two looks whether rows are done: several on a GPU, because a look waits for it."""
    return 8 if device.type == "cuda" else 1


def last_logits(model: nn.Module) -> dict[str, Any]:
    """The argument that spares a forward pass the logits of all positions but the last; empty where a model has none.

    An index and not a count: a count leaves a slice of the hidden states, which is not contiguous, and torch multiplies such a slice with a frozen
    head by copying the head once for every row of the batch.
    """
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": torch.tensor([-1], device=next(model.parameters()).device)} if "logits_to_keep" in known else {}


def _plain(model: Any) -> Any:
    """The causal language model in a PEFT wrapper, with its adapters in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All end tokens; the tokenizer's own is the first."""
    ends, own = end_tokens(model, tokenizer), tokenizer.eos_token_id
    return tuple(sorted(ends)) if own is None else (int(own), *sorted(ends - {int(own)}))

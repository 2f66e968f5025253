"""The engine: generates tokens for many prompts at once, or streams the answer to one prompt.

Both use the same loop. A cache reads the prompts, then :class:`~meteora_core.generation.rows.Rows` choose the next token of every row and the cache reads
it, until all rows are finished; finished rows leave the batch early. On a CUDA GPU, if the model allows it, the cache has a fixed size and steps are
replayed as CUDA graphs, and so is reading a streamed prompt. Otherwise the cache is the model's own, which grows.

A stream keeps its cache between calls and reads a prompt only from the first token that differs from the previous text, so each turn of a conversation
costs time for its new tokens only. (Attention still covers all tokens, but in a chat most of the time goes into the weights.)
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
from meteora_core.routing import RoutingOptions, find_meteora, meteora_of, record_routes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

CHUNK = 512
"""Maximum number of prompt tokens per forward pass of a stream. It bounds the memory, and reading can stop between passes."""

Cache = GrowingCache | FixedCache
Graphs = Literal["auto", "on", "off"]


def no_stop() -> bool:
    """Always false: the answer is never stopped early."""
    return False


class Engine:
    """Generates text with one model, whose weights and adapters must not change meanwhile.

    Args:
        model: A causal language model in evaluation mode, optionally wrapped by PEFT.
        tokenizer: The model's tokenizer.
        cuda_graphs: Kind of cache. "auto" uses caches of fixed size and CUDA graphs on a CUDA GPU if the model allows it (eager code while routes are
            recorded); "on" uses caches of fixed size on any device, and warns if the model does not allow it; "off" uses caches that grow.
        no_repeat_ngram_size: Size of the n-grams that may not repeat in prompt and answer; 0 allows all.

    Attributes:
        context: Maximum number of tokens in prompt and answer together; None if the model does not limit it.
        uses_fixed_caches: Whether caches have a fixed size. Becomes False when a step cannot be captured in a CUDA graph.
        stream_cache: The cache of the last stream; None before the first.
        batch_cache: The fixed cache of the last batch, or None.

    Raises:
        CheckpointError: The model does not decode with a cache.

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
        requested = cuda_graphs == "on" or (cuda_graphs == "auto" and self.device.type == "cuda")
        self.uses_fixed_caches = requested and can_be_fixed(self.model)
        if cuda_graphs == "on" and not self.uses_fixed_caches:
            _log.warning("CUDA graphs are off: the model's attention is not SDPA over a plain cache, or its weights are quantised")

    def forget(self) -> None:
        """Forget the text of the stream, so that the next prompt is read as a whole."""
        self._cached, self._key = [], None

    def release(self) -> None:
        """Free the memory of caches and graphs, and forget the text of the stream."""
        self.batch_cache = self.stream_cache = None
        self.forget()

    # --- many rows -------------------------------------------------------------------------------------------------------------

    def answer(self, requests: Sequence[Request]) -> list[list[int]]:
        """Answer many prompts at once.

        If padding would change the results, as in models with recurrent states, only prompts of the same length share a batch.

        Args:
            requests: Prompts with their sampling settings. Their routing scopes have routing options or are all the same, and none may record routes.

        Returns:
            The new token ids of each request, without the end token.

        Raises:
            ValueError: The routing scopes differ and one of them has no routing options, or a request records routes.
            NonFiniteError: The model's logits are NaN or infinite.
            CheckpointError: The model's embedding has no row for the tokenizer's end token.
            torch.OutOfMemoryError: The batch does not fit into memory; fewer requests may.
        """
        if not requests:
            return []
        if any(request.scope.key != requests[0].scope.key and (request.scope.options is None or requests[0].scope.options is None) for request in requests):
            raise ValueError("the requests of a batch must have the same routing scope, or scopes with routing options")
        if any(request.record for request in requests):
            raise ValueError("routes can be recorded only for a streamed answer")
        answers: list[list[int]] = [[]] * len(requests)
        for indices in self._batches(requests):
            members = [requests[index] for index in indices]
            batch = Batch.of(
                [request.ids for request in members],
                [replace(request.sampling, max_new_tokens=max(1, self._room(request))) for request in members],
                padding_token(self.model, self.tokenizer),
                self.device,
            )
            cache = self._cache_for(batch)
            passes = _Passes(self.model, [request.scope for request in members], False)
            rows = cache.seat(batch)
            with passes.one(len(rows)):
                rows.choose(cache.read_batch(batch))
            for index, answer in zip(indices, self._finish(cache, rows, batch, passes), strict=True):
                answers[index] = answer
            if isinstance(cache, FixedCache) and self.device.type == "cuda" and not cache.can_capture:
                self.uses_fixed_caches, self.batch_cache = False, None
        return answers

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of the requests, grouped into those that can be padded to one batch."""
        lengths = [len(request.ids) for request in requests]
        if len(set(lengths)) == 1 or padding_is_safe(self.model):
            return [list(range(len(requests)))]
        return [[index for index, other in enumerate(lengths) if other == length] for length in dict.fromkeys(lengths)]

    def _finish(self, cache: Cache, rows: Rows, batch: Batch, passes: _Passes) -> list[list[int]]:
        """Complete the answers of a batch whose rows have chosen their first tokens."""
        answers: dict[int, list[int]] = {}
        room = batch.room
        indices = list(range(len(room)))  # index in the batch of each remaining row
        writing = _Writing(cache, rows, passes)
        while len(answers) < len(room):
            writing.look()
            for row, index in enumerate(indices):
                if writing.done[row] and index not in answers:
                    answers[index] = until_end(writing.rows.text.text[row, batch.width :].tolist(), room[index], self._rules.ends)
            unfinished = [row for row, index in enumerate(indices) if index not in answers]
            steps = max(room) - writing.steps - 1
            if unfinished and writing.leave(unfinished, steps):
                indices = [indices[row] for row in unfinished]
            for _ in range(min(steps_between_looks(self.device), steps) if unfinished else 0):
                writing.advance()
        return [answers[index] for index in range(len(room))]

    def _cache_for(self, batch: Batch) -> Cache:
        if not self.uses_fixed_caches:
            return GrowingCache(self.model, self._options, self._rules)
        if is_observed(self.model):
            if not self._eager_noted:
                self._eager_noted = True
                _log.warning("no CUDA graphs are used while routes are recorded, forced or labelled")
            return GrowingCache(self.model, self._options, self._rules)
        count, capacity = batch_shape(len(batch.sampling), batch.width + max(batch.room))
        if self.batch_cache is None or (len(self.batch_cache.rows), self.batch_cache.capacity) != (count, capacity):
            self.batch_cache = None  # frees its memory before the next cache is allocated
            self.batch_cache = FixedCache(self.model, self._options, self._rules, count, capacity)
        return self.batch_cache

    def _room(self, request: Request) -> int:
        limit = request.sampling.max_new_tokens
        return limit if self.context is None else min(limit, self.context - len(request.ids))

    # --- one row, streamed -----------------------------------------------------------------------------------------------------

    def stream(self, request: Request, stop: Callable[[], bool] = no_stop) -> Iterator[Event]:
        """Answer one prompt and yield events: one or more Reading, any number of Written, and a final Finished.

        Args:
            request: The prompt, with its sampling settings and its routing scope.
            stop: Function called before every forward pass; the answer ends once it returns True.

        Raises:
            UsageError: The prompt is empty, or it fills the model's context.
            DataError: The model's embedding has no row for one of the prompt's tokens.
            NonFiniteError: The model's logits are NaN or infinite.
        """
        ids, room = list(request.ids), self._room(request)
        if not ids:
            raise UsageError("the prompt is empty", hint="write something first")
        if self.context is not None and len(ids) >= self.context:
            message = f"the prompt has {len(ids)} tokens, and the model's context of {self.context} leaves no room for an answer"
            raise UsageError(message, hint="shorten it, or start again with /new")
        check_tokens(self.model, self.tokenizer, [ids])
        begin = time.perf_counter()
        decoder = TextDecoder(self.tokenizer)
        answer: list[int] = []
        text, first = "", 0.0
        reason: Finish = "stopped"
        passes, logits = _Passes(self.model, [request.scope], request.record), None
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
        """Read a text without answering it, to record its routes.

        Args:
            request: The text as a request, whose sampling settings are ignored.

        Raises:
            DataError: The model's embedding has no row for one of the text's tokens.
            NonFiniteError: The model's logits are NaN or infinite.
        """
        check_tokens(self.model, self.tokenizer, [request.ids])
        cache, reused = self._reuse(request)
        for _, reading in self._read(request, cache, reused, _Passes(self.model, [request.scope], request.record), no_stop):
            yield reading

    def _read(self, request: Request, cache: Cache, reused: int, passes: _Passes, stop: Callable[[], bool]) -> Iterator[tuple[Tensor, Reading]]:
        """Read the tokens that the stream's cache lacks. Yields the logits of each chunk's last position, (1, vocabulary), with its event."""
        ids = list(request.ids)
        # Some models with recurrent states compute wrong results when a text is read in chunks, so they read it as a whole.
        size = CHUNK if pieces_are_safe(self.model) else len(ids)
        for start in range(reused, len(ids), size):
            if stop():
                return
            chunk = ids[start : start + size]
            cached, self._cached = self._cached, []
            with passes.one():
                logits = cache.read_piece(chunk, request.scope.key, eager=passes.record)
            if bool(not_finite(logits)):
                raise non_finite_error(self.model, cached + chunk, request.scope.enter)
            # Only a complete pass leaves these tokens in every layer's cache. After an interrupted pass, nothing is reused.
            self._cached = cached + chunk
            yield logits, Reading(start + len(chunk) - reused, len(ids) - reused, reused, passes.routes, passes.paths)

    def _seat(self, request: Request, room: int, logits: Tensor, passes: _Passes) -> _Writing:
        """Return the row of a prompt that the cache has read, with its first token chosen from ``logits``."""
        assert self.stream_cache is not None
        batch = Batch.of([request.ids], [replace(request.sampling, max_new_tokens=room)], 0, self.device)
        rows = self.stream_cache.seat(batch)
        rows.choose(logits)
        if request.record and self.stream_cache.captured and not self._eager_noted:
            self._eager_noted = True
            _log.info("no CUDA graphs are used while routes are recorded")
        writing = _Writing(self.stream_cache, rows, passes)
        writing.look()
        return writing

    def _step(self, writing: _Writing, token: int) -> None:
        """Read ``token`` into the stream's cache and choose the next token."""
        cached, self._cached = self._cached, []
        writing.advance()
        writing.look()
        cached.append(token)
        self._cached = cached

    def _reuse(self, request: Request) -> tuple[Cache, int]:
        """Cut the stream's cache to the tokens that it shares with a request. Returns the cache and the number of shared tokens."""
        ids, key = request.ids, request.scope.key
        limit = len(ids) - 1 if request.read_from is None else min(request.read_from, len(ids) - 1)
        shared = 0
        if self._cached and self._key == key and pieces_are_safe(self.model):
            limit = min(len(self._cached), limit)
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
    """Forward passes of rows with their routing scopes, and the routes of the last pass.

    Attributes:
        scopes: Settings that choose the adapters, of each row.
        record: Whether to record routes.
        routes: (indices, weights) of the last pass, each of shape (tokens, layers, k); None if routes are not recorded.
        paths: Module paths of the recorded layers.
    """

    def __init__(self, model: nn.Module, scopes: Sequence[RoutingScope], record: bool) -> None:
        self.model, self.scopes, self.record = model, tuple(scopes), record
        self.routes: tuple[Tensor, Tensor] | None = None
        self.paths: tuple[str, ...] = ()

    def select(self, rows: Sequence[int]) -> _Passes:
        """The passes of some of the rows."""
        return _Passes(self.model, [self.scopes[row] for row in rows], self.record)

    @contextmanager
    def one(self, count: int = 1) -> Iterator[Hashable]:
        """Context manager of one forward pass of ``count`` rows, in which spare rows repeat the others.

        Yields:
            Everything besides the weights that the pass depends on, as a key. It keeps the tensors of the routing options alive.
        """
        first = self.scopes[0]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if all(scope.key == first.key for scope in self.scopes):
                stack.enter_context(first.enter())
            else:
                options = [self.scopes[row % len(self.scopes)].options or RoutingOptions() for row in range(count)]
                stack.enter_context(meteora_of(self.model).apply_rows(options))
            state = find_meteora(self.model)
            recorded = stack.enter_context(record_routes(self.model)) if self.record else None
            yield (tuple(dict.fromkeys(scope.key for scope in self.scopes)), None if state is None else state.mode.rows)
        if recorded is not None:
            self.routes, self.paths = recorded.packed(), recorded.paths


class _Writing:
    """Rows whose answers are being generated, with their cache.

    Attributes:
        steps: Number of steps since the first token.
        done: Whether each row was done at the last :meth:`look`.
        tokens: Last token of each row at the last :meth:`look`.
    """

    def __init__(self, cache: Cache, rows: Rows, passes: _Passes) -> None:
        self.cache, self.rows, self.passes = cache, rows, passes
        self.steps = 0
        self.done: list[bool] = []
        self.tokens: list[int] = []

    def advance(self) -> None:
        """Read the last token of each row and choose the next."""
        with self.passes.one(len(self.rows)) as key:
            self.cache.advance(self.rows, key, eager=self.passes.record)
        self.steps += 1

    def look(self) -> None:
        """Update :attr:`done` and :attr:`tokens`. Synchronises with the device.

        Raises:
            NonFiniteError: A row's logits were NaN or infinite.
        """
        rows = self.rows
        done, usable, self.tokens = torch.stack([rows.done.long(), rows.usable.long(), rows.token[:, 0]]).tolist()
        if not all(usable):
            row = usable.index(0)
            raise non_finite_error(self.cache.model, rows.tokens_of(row), self.passes.scopes[row % len(self.passes.scopes)].enter)
        self.done = [bool(flag) for flag in done]

    def leave(self, unfinished: Sequence[int], steps: int) -> bool:
        """Keep only the rows with the indices ``unfinished``, if that saves time for at most ``steps`` further steps. Returns whether it did."""
        if len(unfinished) == len(self.rows):
            return False
        smaller = self.cache.leave(self.rows, torch.tensor(list(unfinished), device=self.rows.done.device), steps)
        if smaller is None:
            return False
        self.cache, self.rows = smaller
        self.passes = self.passes.select(unfinished)
        return True


def steps_between_looks(device: torch.device) -> int:
    """Number of steps of a batch between two checks for finished rows: several on a GPU, because each check synchronises with it."""
    return 8 if device.type == "cuda" else 1


def last_logits(model: nn.Module) -> dict[str, Any]:
    """The keyword argument that limits a forward pass to the logits of the last position; empty if the model does not support it.

    The argument is an index, not a count. A count slices the hidden states, which makes them non-contiguous, and torch multiplies a non-contiguous
    tensor by a frozen output layer by copying the layer's weight once for every row of the batch.
    """
    parameters = inspect.signature(model.forward).parameters
    return {"logits_to_keep": torch.tensor([-1], device=next(model.parameters()).device)} if "logits_to_keep" in parameters else {}


def _plain(model: Any) -> Any:
    """Remove a PEFT wrapper from a model; its adapters stay in place. Any other model is returned unchanged."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of all end tokens, beginning with the tokenizer's end token."""
    ends, first = end_tokens(model, tokenizer), tokenizer.eos_token_id
    return tuple(sorted(ends)) if first is None else (int(first), *sorted(ends - {int(first)}))

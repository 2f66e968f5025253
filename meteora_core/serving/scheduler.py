"""Continuous batching: requests join and leave the batch at every step, each with its own routing and sampling options."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.errors import MeteoraError, NonFiniteError
from meteora_core.generation.engine import last_logits
from meteora_core.generation.limits import context_length, end_tokens
from meteora_core.generation.nonfinite import not_finite
from meteora_core.generation.text import TextDecoder
from meteora_core.model.vocabulary import embedding_rows
from meteora_core.routing import find_meteora
from meteora_core.serving.choosing import Choice, Chooser, StopText, choose_all
from meteora_core.serving.fixed_steps import FixedSteps, Ran
from meteora_core.serving.grammars import Grammars
from meteora_core.serving.jobs import Chosen, Done, Failed, FinishReason, Job, StepReport, TokenRoutes, cache_key, check_prompt
from meteora_core.serving.packed import Pass, Segment, check_packed, packed_attention, run
from meteora_core.serving.prefixes import PrefixCache
from meteora_core.serving.recording import LastRoutes, StepRoutes
from meteora_core.serving.slots import Slots
from meteora_core.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SchedulerLimits:
    """Limits of a scheduler.

    Attributes:
        max_batch: Maximum number of requests in progress.
        max_queue: Maximum number of waiting requests.
        max_model_len: Maximum number of tokens in prompt and answer; None for the model's context.
        step_tokens: Maximum number of tokens in a forward pass; longer prompts are read in several.
        prefix_bytes: Maximum size of the prefix cache in bytes; 0 turns it off.
        sample_routes: Number of steps of which one records routes for the metrics. On a GPU, steps that record are other CUDA graphs.
        fixed_steps: Whether steps in which no prompt is read have fixed shapes (CUDA graphs on a GPU); None for on a CUDA GPU.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_model_len: int | None = None
    step_tokens: int = 512
    prefix_bytes: int = 1 << 30
    sample_routes: int = 1
    fixed_steps: bool | None = None


class QueueFull(MeteoraError):
    """The server has as many waiting requests as it accepts."""


@dataclass(eq=False)
class _Row:
    """A request in progress."""

    job: Job
    ids: list[int]
    chooser: Chooser
    decoder: TextDecoder
    stop: StopText
    room: int
    read: int = 0
    cached: int = 0
    last_time: float = field(default_factory=time.perf_counter)

    @property
    def prompt(self) -> int:
        return len(self.job.ids)

    @property
    def writing(self) -> bool:
        """Whether only the last token has to be read."""
        return self.read >= self.prompt - 1 and len(self.ids) - self.read == 1


class Scheduler:
    """Answers many requests with one model, in a thread of its own.

    Args:
        model: A causal language model in evaluation mode, with or without adapters. Only the scheduler may call it while it runs.
        tokenizer: The model's tokenizer.
        limits: Limits on the batch, the queue and the caches.
        report: Function that receives a report of every step, in the scheduler's thread.

    Attributes:
        version: Counter of the bank's changes; a part of the key of the prefix cache.
        longest: Maximum number of tokens in prompt and answer.
        ends: Ids of the tokens that end an answer.
        rows: Number of token ids that a prompt may contain.

    Raises:
        CheckpointError: The model cannot run over packed requests.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: SchedulerLimits = SchedulerLimits(),
        report: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.device = next(model.parameters()).device
        self.version = self._steps = 0
        self._report = report
        self._options: dict[str, Any] = last_logits(model)
        check_packed(model, self._options)
        context = context_length(model) or 1 << 20
        self.longest = min(context, limits.max_model_len or context)
        self.ends = end_tokens(model, tokenizer)
        self.rows = embedding_rows(model)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.grammars = Grammars(tokenizer, self.vocabulary, tuple(sorted(self.ends)))
        self.prefixes = PrefixCache(limits.prefix_bytes)
        fixed = self.device.type == "cuda" if limits.fixed_steps is None else limits.fixed_steps
        self.slots = Slots(1 << (limits.max_batch - 1).bit_length() if fixed else limits.max_batch, self.longest)
        self._fixed = FixedSteps(model, self.slots) if fixed else None
        self._ahead: tuple[list[_Row], Ran] | None = None
        self._rows: list[_Row] = []
        self._waiting: deque[Job] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None

    # --- for other threads ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="meteora-scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop all requests and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Add a request to the queue; its events go to ``job.sink``.

        Raises:
            UsageError: The prompt is empty or too long, or has an unknown token id.
            QueueFull: Too many requests are waiting.
        """
        check_prompt(job.ids, self.longest, self.rows)
        self.check_room(1)
        with self._wake:
            if self._closing:
                raise QueueFull("the server is shutting down")
            self._waiting.append(job)
            self._wake.notify()

    def check_room(self, count: int) -> None:
        """Raise QueueFull unless ``count`` more requests may wait."""
        if len(self._waiting) + count > self.limits.max_queue:
            raise QueueFull(f"the server is overloaded: {len(self._waiting)} requests are waiting", hint="try again later")

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests in progress, and number of waiting requests."""
        return len(self._rows), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._closing

    def exclusively(self, call: Callable[[], Any]) -> Any:
        """Run ``call`` in the scheduler's thread once no request is in progress, and return its result; waiting requests come after it.

        The attention of the model is its own during the call, so that the call may run the model or change its adapters.
        """
        done = threading.Event()
        result: list[Any] = []

        def guarded() -> None:
            try:
                result.append((call(), None))
            except BaseException as error:  # the caller's thread raises it
                result.append((None, error))
            finally:
                done.set()

        with self._wake:
            if self._closing:
                raise QueueFull("the server is shutting down")
            self._calls.append(guarded)
            self._wake.notify()
        done.wait()
        value, error = result[0]
        if error is not None:
            raise error
        return value

    # --- the thread --------------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            with packed_attention(self.model):
                while self._pause():
                    self._turn()
            if self._closing:
                break
            while self._calls:
                self._calls.popleft()()
            if self._fixed is not None:
                self._fixed.clear()
        for row in self._rows:
            row.job.sink(Failed(MeteoraError("the server is shutting down")))
        for job in self._waiting:
            job.sink(Failed(MeteoraError("the server is shutting down")))
        self._rows.clear()
        self._waiting.clear()
        while self._calls:
            self._calls.popleft()()

    def _pause(self) -> bool:
        """Wait for work. Returns False if the server closes, or if calls wait and no request is in progress."""
        with self._wake:
            while not self._closing and not self._rows and not self._waiting and not self._calls:
                self._wake.wait()
            return not self._closing and (bool(self._rows) or not self._calls)

    def _turn(self) -> None:
        try:
            self.step()
        except Exception as error:  # the server must go on
            if isinstance(error, torch.OutOfMemoryError):
                failure = MeteoraError("the server ran out of memory", hint="try again with fewer or shorter requests")
            elif isinstance(error, MeteoraError):
                failure = error
            else:
                _log.exception("a step of the batch failed")
                failure = MeteoraError(f"a step of the batch failed: {type(error).__name__}")
            _log.error("all requests in progress were stopped: %s", one_line(failure.message))
            for row in self._rows:
                row.job.sink(Failed(failure))
            self._rows.clear()
            self._ahead = None
            self.slots.shrink()
            self.prefixes.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def step(self) -> None:
        """Drop cancelled requests, admit waiting ones, and run one forward pass."""
        for row in [row for row in self._rows if row.job.cancelled]:
            self._leave(row, "cancelled")
        if self._ahead is None:
            self._admit()
        if not self._rows:
            self._ahead = None
            return
        if self._fixed is not None and (self._ahead is not None or all(row.writing for row in self._rows)):
            self._fixed_step(self._fixed)
        else:
            self._packed_step()

    def _fixed_step(self, fixed: FixedSteps) -> None:
        """One step in which every request reads one token. If the next one needs nothing from the host, it is launched before this one is looked at."""
        began = time.perf_counter()
        rows, ran = self._ahead or self._launch(fixed, None)
        self._ahead = None
        if self._steady(rows):
            self._ahead = self._launch(fixed, rows)
        ran.wait()
        here = [(index, row) for index, row in enumerate(rows) if row in self._rows]
        choices = [Choice(token) for token in ran.tokens.tolist()]
        for index, row in here:
            if not row.chooser.free:
                choices[index] = row.chooser.choose(ran.logits[index])
        first, gaps = self._write(rows, choices, ran.broken.tolist(), ran.routes)
        shares = None if ran.routes is None else ran.routes.mean.sum(0)
        self._report(StepReport(len(here), 0, len(here), time.perf_counter() - began, shares, self._names(), tuple(first), tuple(gaps)))

    def _launch(self, fixed: FixedSteps, before: list[_Row] | None) -> tuple[list[_Row], Ran]:
        """Launch a step of all requests, with the tokens that the step before chooses if the host has not seen them."""
        rows = list(self._rows)
        self._steps += 1
        record = "none"
        if find_meteora(self.model) is not None:
            wanted = {row.job.routes for row in rows}
            sampled = self._steps % self.limits.sample_routes == 0
            record = "layers" if "layers" in wanted else "mean" if sampled or "mean" in wanted else "none"
        texts = [(row.ids[-1], row.read) for row in rows] if before is None else None
        end = max(row.read for row in rows) + 1
        self.slots.reserve(end)
        ran = fixed.launch(texts, end, [row.job.routing for row in rows], [row.chooser for row in rows], record)
        for row in rows:
            row.read += 1
        return rows, ran

    def _steady(self, rows: list[_Row]) -> bool:
        """Whether the next step has the same requests, as far as the host can know before it sees the tokens of this one, and chooses tokens by itself."""
        if self._calls or self._closing or (self._waiting and len(self._rows) < self.limits.max_batch) or rows != self._rows:
            return False
        if not all(row.chooser.free for row in rows) or max(row.read for row in rows) >= min(self.longest, self.slots.capacity):
            return False
        return any(len(row.ids) + 1 - row.prompt < row.room for row in rows)

    def _packed_step(self) -> None:
        """One forward pass over the next tokens of all requests, one after the other."""
        began = time.perf_counter()
        rows, segments, single = self._plan()
        outputs, ready, token = [], [], 0
        for row, segment in zip(rows, segments, strict=True):
            token += len(segment.tokens)
            if segment.end == len(row.ids):
                outputs.append(token - 1)
                ready.append(row)
        self.slots.reserve(max(segment.end for segment in segments))
        recorder = self._recorder(ready, outputs)
        with self._routed(rows, segments, outputs, recorder):
            logits = run(self.model, Pass(self.slots, segments, single, self.device), segments, outputs or [0], self._options)
        for row, segment in zip(rows, segments, strict=True):
            row.read = segment.end
            if segment.end == row.prompt:
                self.prefixes.store(cache_key(self.version, row.job.routing), row.ids, self.slots, segment.slot)
        routes = None if recorder is None else recorder.read(len(self._names()))
        times: tuple[list[float], list[float]] = ([], [])
        if ready:
            logits = logits.float()
            broken = not_finite(logits).tolist()
            routes = None if routes is None else self._fetched(routes, ready)
            times = self._write(ready, choose_all(logits, [row.chooser for row in ready]), broken, routes)
        shares = None if routes is None else routes.mean.sum(0)
        read = token - sum(row.read > row.prompt for row in ready)
        self._report(StepReport(len(rows), read, len(ready), time.perf_counter() - began, shares, self._names(), *map(tuple, times)))

    def _recorder(self, ready: list[_Row], outputs: list[int]) -> LastRoutes | None:
        """A recorder if a request wants its routes, or if this step is one of those that are sampled for metrics."""
        self._steps += 1
        wanted = any(row.job.routes != "none" for row in ready) or self._steps % self.limits.sample_routes == 0
        adapters = find_meteora(self.model) is not None and bool(ready)
        return LastRoutes(outputs, self.device) if wanted and adapters else None

    def _names(self) -> tuple[str, ...]:
        state = find_meteora(self.model)
        return () if state is None else state.names

    def _admit(self) -> None:
        while self._waiting and not self._calls and len(self._rows) < self.limits.max_batch:
            job = self._waiting.popleft()
            if job.cancelled:
                job.sink(Done("cancelled", "", len(job.ids), 0, 0))
                continue
            try:
                job.routing.check(self._names())
                matcher = None if job.sampling.grammar is None else self.grammars.matcher(job.sampling.grammar)
            except MeteoraError as error:
                job.sink(Failed(error, server=False))
                continue
            room = min(job.sampling.max_new_tokens, self.longest - len(job.ids))
            chooser = Chooser(job.sampling, self.device, matcher)
            row = _Row(job, list(job.ids), chooser, TextDecoder(self.tokenizer), StopText(job.sampling.stop), room)
            row.read = row.cached = self.prefixes.load(cache_key(self.version, job.routing), row.ids, self.slots, len(self._rows))
            self._rows.append(row)
        self._arrange()

    def _arrange(self) -> None:
        """Move the rows that write before those that read a prompt, so that their slots are 0, 1, …."""
        target = 0
        for index, row in enumerate(self._rows):
            if row.writing:
                if index != target:
                    other = self._rows[target]
                    self.slots.swap(index, target, max(row.read, other.read))
                    self._rows[target], self._rows[index] = row, other
                target += 1

    def _plan(self) -> tuple[list[_Row], list[Segment], int]:
        """The rows of the next pass with their next tokens: those that write, then those that read a prompt, up to the limit of tokens."""
        single = sum(row.writing for row in self._rows)
        rows, segments = list(self._rows[:single]), [Segment(slot, row.read, row.ids[row.read :]) for slot, row in enumerate(self._rows[:single])]
        left = max(self.limits.step_tokens - single, 1)
        for slot in range(single, len(self._rows)):
            if left <= 0:
                break
            row = self._rows[slot]
            tokens = row.ids[row.read : row.read + left]
            rows.append(row)
            segments.append(Segment(slot, row.read, tokens))
            left -= len(tokens)
        return rows, segments, single

    @contextmanager
    def _routed(self, rows: list[_Row], segments: list[Segment], outputs: list[int], recorder: LastRoutes | None) -> Iterator[None]:
        """Context manager of a pass in which every row has its routing options."""
        state = find_meteora(self.model)
        if state is None:
            yield
            return
        counts = [len(segment.tokens) for segment in segments]
        with ExitStack() as stack:
            if recorder is not None:
                stack.enter_context(state.record(recorder))
            stack.enter_context(state.apply_packed([row.job.routing for row in rows], counts, outputs or [0]))
            yield

    def _fetched(self, routes: StepRoutes, rows: list[_Row]) -> StepRoutes:
        """Routes on the CPU."""
        fetched = routes.on_host(len(rows), layers=any(row.job.routes == "layers" for row in rows))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return fetched

    def _write(self, ready: list[_Row], choices: Sequence[Choice], broken: Sequence[bool], routes: StepRoutes | None) -> tuple[list[float], list[float]]:
        """Add a token to the answer of each row in ``ready`` that is still in progress, unless its logits are broken.

        Returns:
            The times to the first token, and the times between two tokens.
        """
        now = time.perf_counter()
        first, gaps = [], []
        present = set(map(id, self._rows))
        for index, (row, choice) in enumerate(zip(ready, choices, strict=True)):
            if id(row) not in present:
                continue
            if broken[index]:
                row.job.sink(Failed(NonFiniteError("the model's output is NaN or infinite", hint="compute in a wider dtype: METEORA_MODEL__DTYPE=float32")))
                self._remove(row)
                continue
            if len(row.ids) == row.prompt:
                first.append(now - row.job.created)
            else:
                gaps.append(now - row.last_time)
            row.last_time = now
            wanted = routes is not None and row.job.routes != "none"
            known = routes.of(index, layers=row.job.routes == "layers") if routes is not None and wanted else None
            self._take(row, choice, known)
        return first, gaps

    def _take(self, row: _Row, choice: Choice, routes: TokenRoutes | None) -> None:
        """Add a token to an answer, which it may end."""
        complete = row.chooser.accept(choice.token)
        row.ids.append(choice.token)
        if choice.token in self.ends and not row.job.sampling.ignore_end:
            self._leave(row, "stop")
            return
        text = row.stop.add(row.decoder.add(choice.token))
        row.job.sink(Chosen(choice.token, text, choice.logprob, choice.top, routes))
        if row.stop.found or complete:
            self._leave(row, "stop")
        elif len(row.ids) - row.prompt >= row.room:
            self._leave(row, "length")

    def _leave(self, row: _Row, reason: FinishReason) -> None:
        """End an answer and give its slot back."""
        rest = row.stop.add(row.decoder.flush())
        rest += row.stop.flush()
        slot = self._rows.index(row)
        self.prefixes.store(cache_key(self.version, row.job.routing), row.ids[: row.read], self.slots, slot)
        self._remove(row)
        row.job.sink(Done(reason, rest, row.prompt, row.cached, len(row.ids) - row.prompt))

    def _remove(self, row: _Row) -> None:
        slot, last = self._rows.index(row), self._rows.pop()
        if last is not row:
            self.slots.move(len(self._rows), slot, last.read)
            self._rows[slot] = last

"""Answers jobs with vLLM, which runs in a separate process, over its API for text completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.errors import MeteoraError, UsageError
from meteora_core.generation.text import TextDecoder
from meteora_core.routing import RoutingOptions
from meteora_core.serving.choosing import StopText
from meteora_core.serving.grammars import Grammars
from meteora_core.serving.jobs import Chosen, Done, Failed, FinishReason, Job, StepReport, TokenRoutes, check_prompt
from meteora_core.serving.scheduler import QueueFull
from meteora_core.text import one_line

if TYPE_CHECKING:
    import httpx
    from transformers import PreTrainedTokenizerBase

    from meteora_core.serving.vllm_process import VllmProcess

MODEL = "meteora"
"""The name of the model within vLLM."""
_LOOK_SECONDS = 0.05
"""Time between two checks for cancelled requests, in seconds."""


@dataclass(frozen=True)
class VllmFacts:
    """Facts about the model that the engine needs.

    Attributes:
        tokenizer: The model's tokenizer.
        vocabulary: Number of tokens that the model computes logits for.
        ends: Ids of the tokens that end an answer.
        names: Names of the adapters; empty for a base model alone.
        top_k: Number of adapters per token of requests that set none.
        temperature: Routing temperature of requests that set none.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    ends: frozenset[int]
    names: tuple[str, ...] = ()
    top_k: int = 1
    temperature: float = 1.0


@dataclass
class _NoCache:
    """Figures of 0: the caches are vLLM's, and its metrics report them."""

    bytes: int = 0
    hits: int = 0
    queries: int = 0


class SchemaCheck:
    """Checks JSON schemas, which vLLM compiles itself."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars

    def of_schema(self, schema: dict[str, Any]) -> str:
        """The schema as a text. Raises UsageError if the schema is invalid or not supported."""
        self._grammars.of_schema(schema)
        return json.dumps(schema)


@dataclass
class _Answer:
    """The state of one answer.

    Attributes:
        job: The job.
        decoder: Turns tokens into text.
        stop: Finds stop texts.
        request: The answer's id in vLLM, which its first chunk names.
        tokens: Number of generated tokens.
        usage: The field `usage`.
        reason: Reason for the end.
    """

    job: Job
    decoder: TextDecoder
    stop: StopText
    request: str = ""
    tokens: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    reason: FinishReason | None = None
    last: float = 0.0


class VllmEngine:
    """Answers jobs with a running vLLM: the :class:`meteora_core.serving.engines.Engine` of ``meteora serve --engine vllm``.

    Args:
        process: vLLM, ready to answer.
        facts: Facts about the model.
        longest: Maximum number of tokens in prompt and answer.
        most: Maximum number of requests in progress and waiting.
        report: Function that receives a report of every chunk of an answer.
    """

    def __init__(self, process: VllmProcess, facts: VllmFacts, longest: int, most: int, report: Callable[[StepReport], None] = lambda report: None) -> None:
        self.process, self.facts, self.longest, self.most = process, facts, longest, most
        self.version = 0
        self.vocabulary = facts.vocabulary
        self.grammars = SchemaCheck(Grammars(facts.tokenizer, facts.vocabulary, tuple(sorted(facts.ends))))
        self.prefixes = self.slots = _NoCache()
        self._report = report
        self._tasks: dict[asyncio.Task[None], Job] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None
        self._watcher: asyncio.Task[None] | None = None

    # --- the life of the engine --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start answering jobs."""
        self._loop = asyncio.get_running_loop()
        self._client = self.process.async_client()
        self._watcher = self._loop.create_task(self._watch())

    def close(self) -> None:
        """Stop all requests, and end vLLM."""
        if self._loop is not None and self._watcher is not None:
            with suppress(RuntimeError):  # the loop has ended
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self.process.stop()

    async def _end(self) -> None:
        assert self._watcher is not None
        assert self._client is not None
        self._watcher.cancel()
        running = list(self._tasks)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, self._watcher, return_exceptions=True)
        await self._client.aclose()

    async def _watch(self) -> None:
        """Stop the answers whose clients have disconnected."""
        while True:
            for task, job in list(self._tasks.items()):
                if job.cancelled:
                    task.cancel()
            await asyncio.sleep(_LOOK_SECONDS)

    @property
    def load(self) -> tuple[int, int]:
        """Number of requests in progress, and 0, because vLLM's metrics report the waiting requests."""
        return len(self._tasks), 0

    @property
    def alive(self) -> bool:
        """Whether vLLM runs."""
        return self._client is not None and self.process.running

    async def metrics(self) -> bytes:
        """vLLM's own metrics, in the format of Prometheus; empty if it does not answer."""
        import httpx

        assert self._client is not None
        try:
            answer = await self._client.get("/metrics", timeout=10)
        except httpx.HTTPError:
            return b""
        return answer.content if answer.status_code == 200 else b""

    # --- jobs --------------------------------------------------------------------------------------------------------------------

    def check_room(self, count: int) -> None:
        """Raise QueueFull unless ``count`` more requests may wait."""
        if len(self._tasks) + count > self.most:
            raise QueueFull(f"the server is overloaded: it has {len(self._tasks)} requests", hint="try again later")

    def submit(self, job: Job) -> None:
        """Answer a job, whose events go to its sink.

        Raises:
            UsageError: The prompt is empty or too long, or has an unknown token id, or adapters cannot be chosen in this way.
            QueueFull: Too many requests are in progress.
        """
        check_prompt(job.ids, self.longest, self.vocabulary)
        if not self.alive:
            raise MeteoraError("vLLM has ended", hint=f"its log is in {self.process.log}")
        body = self.body(job)
        self.check_room(1)
        task = asyncio.get_running_loop().create_task(self._run(job, body))
        self._tasks[task] = job
        task.add_done_callback(lambda ended: self._tasks.pop(ended, None))

    def body(self, job: Job) -> dict[str, Any]:
        """The request to vLLM for a job. Raises UsageError if vLLM cannot choose adapters in this way."""
        sampling = job.sampling
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": list(job.ids),
            "max_tokens": min(sampling.max_new_tokens, self.longest - len(job.ids)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "ignore_eos": sampling.ignore_end,
            "skip_special_tokens": False,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if not sampling.ignore_end:
            body["stop_token_ids"] = sorted(self.facts.ends)
        if sampling.logprobs is not None:
            body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias.items()}
        if sampling.grammar is not None:
            body["structured_outputs"] = {"json": json.loads(sampling.grammar), "disable_any_whitespace": True}
        if self.facts.names:
            options = self.options(job.routing)
            if job.routes != "none":
                options["meteora_trace"] = 1
            if options:
                body["vllm_xargs"] = options
        return body

    def options(self, routing: RoutingOptions) -> dict[str, Any]:
        """Routing options in the format of the plugin for vLLM, without defaults. Raises UsageError for fixed weights."""
        if not routing.enabled:
            return {"meteora_off": 1}
        if routing.weights is not None:
            raise UsageError("vLLM cannot mix adapters by fixed weights", hint="leave out `weights`, or start the server with --engine transformers")
        if routing.forced is not None:
            return {"meteora_force": [routing.forced]}
        options: dict[str, Any] = {}
        if routing.top_k != self.facts.top_k:
            options["meteora_top_k"] = routing.top_k
        if routing.temperature != self.facts.temperature:
            options["meteora_temperature"] = routing.temperature
        if routing.muted:
            options["meteora_muted"] = sorted(routing.muted)
        return options

    async def _run(self, job: Job, body: Mapping[str, Any]) -> None:
        import httpx

        answer = _Answer(job, TextDecoder(self.facts.tokenizer), StopText(job.sampling.stop), last=time.perf_counter())
        try:
            job.routing.check(self.facts.names)
            await self._read(answer, body)
            job.sink(self._done(answer))
        except asyncio.CancelledError:
            job.sink(Done("cancelled", "", len(job.ids), 0, answer.tokens))
        except UsageError as error:
            job.sink(Failed(error, server=False))
        except MeteoraError as error:
            job.sink(Failed(error))
        except (httpx.HTTPError, httpx.StreamError, OSError, ValueError, KeyError, TypeError) as error:
            problem = f"vLLM ended; its log is in {self.process.log}" if not self.process.running else one_line(str(error), limit=200) or type(error).__name__
            job.sink(Failed(MeteoraError(f"vLLM failed: {problem}")))

    def _done(self, answer: _Answer) -> Done:
        rest = answer.stop.add(answer.decoder.flush())
        rest += answer.stop.flush()
        reason: FinishReason = "stop" if answer.stop.found else answer.reason or "stop"
        cached = (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Done(reason, rest, len(answer.job.ids), int(cached), answer.tokens)

    async def _read(self, answer: _Answer, body: Mapping[str, Any]) -> None:
        """Read the stream of an answer, and send its tokens."""
        assert self._client is not None
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise _refused(response.status_code, (await response.aread()).decode("utf-8", "replace"))
            async for chunk in _chunks(response):
                answer.usage = chunk.get("usage") or answer.usage
                answer.request = answer.request or str(chunk.get("id", ""))
                for choice in chunk.get("choices") or ():
                    await self._take(answer, choice)
                    if answer.stop.found:
                        return  # closing the connection stops the request in vLLM

    async def _take(self, answer: _Answer, choice: Mapping[str, Any]) -> None:
        """Send the tokens of one chunk."""
        job, reason = answer.job, choice.get("finish_reason")
        tokens = [int(token) for token in choice.get("token_ids") or ()]
        if reason is not None:
            answer.reason = "length" if reason == "length" else "stop"
        if not tokens:
            return
        logprobs = _logprobs(choice.get("logprobs"), len(tokens), job.sampling.logprobs)
        routes = await self._routes(answer, len(tokens)) if job.routes != "none" else [None] * len(tokens)
        now, first = time.perf_counter(), answer.tokens == 0
        for index, token in enumerate(tokens):
            answer.tokens += 1
            last = index == len(tokens) - 1
            if last and answer.reason == "stop" and token in self.facts.ends and not job.sampling.ignore_end:
                break
            text = answer.stop.add(answer.decoder.add(token))
            logprob, top = logprobs[index]
            job.sink(Chosen(token, text, logprob, top, routes[index]))
            if answer.stop.found:
                break
        known = [found.mean for found in routes if found is not None]
        shares = torch.stack(known).sum(0) if known else None
        gaps = () if first else (now - answer.last,)
        times = (now - job.created,) if first else ()
        read = len(job.ids) if first else 0
        self._report(StepReport(len(self._tasks), read, len(tokens), now - answer.last, shares, self.facts.names, times, gaps))
        answer.last = now

    async def _routes(self, answer: _Answer, count: int) -> list[TokenRoutes | None]:
        """The adapters of the next ``count`` tokens of an answer: those of the positions that generated them."""
        assert self._client is not None
        begin = len(answer.job.ids) - 1 + answer.tokens
        found = await self._client.get(f"/v1/meteora/routes/{answer.request}", params={"first": begin})
        if found.status_code != 200:
            return [None] * count
        return token_routes(found.json(), range(begin, begin + count), len(self.facts.names), layers=answer.job.routes == "layers")


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a stream of server-sent events. Raises MeteoraError if one of them is an error, or if the stream is incomplete."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if chunk.get("error"):
            raise _refused(int(chunk["error"].get("code") or 500), data)
        yield chunk
    raise MeteoraError("vLLM ended in the middle of an answer")


def token_routes(found: Mapping[str, Any], positions: Sequence[int], adapters: int, *, layers: bool) -> list[TokenRoutes | None]:
    """The routes of some positions.

    Args:
        found: An answer of ``GET /v1/meteora/routes/{request}``.
        positions: Positions in the text of prompt and answer.
        adapters: Number of adapters.
        layers: Whether the layers are reported one by one.

    Returns:
        The routes of each position; None if they were not recorded.

    Example:
        >>> answer = {"positions": [4], "layers": {"q": {"indices": [[1, 0]], "weights": [[0.75, 0.25]]}}}
        >>> token_routes(answer, [4, 5], 2, layers=False)
        [TokenRoutes(mean=tensor([0.2500, 0.7500]), indices=None, weights=None, paths=()), None]
    """
    at = {position: row for row, position in enumerate(found["positions"])}
    paths = tuple(found["layers"])
    routes: list[TokenRoutes | None] = []
    for position in positions:
        row = at.get(position)
        if row is None or not paths:
            routes.append(None)
            continue
        indices = torch.tensor([found["layers"][path]["indices"][row] for path in paths], dtype=torch.int64)
        weights = torch.tensor([found["layers"][path]["weights"][row] for path in paths], dtype=torch.float32)
        mean = torch.zeros(adapters).index_add_(0, indices.reshape(-1), weights.reshape(-1)) / len(paths)
        routes.append(TokenRoutes(mean, indices, weights, paths) if layers else TokenRoutes(mean))
    return routes


def _logprobs(found: Mapping[str, Any] | None, count: int, most: int | None) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
    """The log probability of each token of a chunk, and the most likely tokens at its position."""
    if found is None or most is None:
        return [(None, ())] * count
    entries = []
    for index in range(count):
        top = [(int(name.removeprefix("token_id:")), float(value)) for name, value in (found["top_logprobs"][index] or {}).items()]
        best = sorted(top, key=lambda pair: -pair[1])[:most]
        logprob = found["token_logprobs"][index]
        entries.append((None if logprob is None else float(logprob), tuple(best)))
    return entries


def _refused(status: int, text: str) -> MeteoraError:
    """The error for a request that vLLM refused."""
    message = text
    with suppress(ValueError, AttributeError):
        body = json.loads(text)
        message = str((body.get("error") or body).get("message") or text)
    message = one_line(message, limit=400)
    return UsageError(message) if 400 <= status < 500 else MeteoraError(f"vLLM failed: {message}")

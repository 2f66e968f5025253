"""Metrics in the format of Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora_core.serving.jobs import StepReport
from meteora_core.text import printable

if TYPE_CHECKING:
    from meteora_core.serving.engines import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server.

    Args:
        sample_routes: Interval, in steps, at which routes are recorded. The tokens of a recorded step count this many times.
    """

    def __init__(self, sample_routes: int = 1) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._sample = sample_routes
        self.registry = CollectorRegistry()
        here = self.registry
        self.requests = Counter("meteora_requests", "Requests by path and HTTP status", ["path", "status"], registry=here)
        self._read = Counter("meteora_prompt_tokens", "Prompt tokens that were read, without those in the prefix cache", registry=here)
        self._written = Counter("meteora_generated_tokens", "Tokens that were generated", registry=here)
        self._adapters = Counter(
            "meteora_adapter_tokens", "Generated tokens, shared among the adapters by their weights averaged over the layers", ["adapter"], registry=here
        )
        self._first = Histogram("meteora_time_to_first_token_seconds", "Seconds from a request to its first token", buckets=_SECONDS, registry=here)
        self._gaps = Histogram("meteora_time_per_token_seconds", "Seconds between two tokens of an answer", buckets=_SECONDS, registry=here)
        self._steps = Histogram("meteora_step_seconds", "Seconds of a forward pass with the choice of tokens", buckets=_SECONDS, registry=here)
        self._batch = Histogram("meteora_batch_requests", "Requests in a forward pass", buckets=_ROWS, registry=here)
        self._running = Gauge("meteora_requests_running", "Requests in progress", registry=here)
        self._waiting = Gauge("meteora_requests_waiting", "Requests in the queue", registry=here)
        self._cache = Gauge("meteora_prefix_cache_bytes", "Bytes of the prefix cache", registry=here)
        self._kv = Gauge("meteora_key_value_bytes", "Bytes of the keys and values of requests in progress", registry=here)
        self._hits = Gauge("meteora_prefix_cache_hit_tokens", "Prompt tokens that were found in the prefix cache", registry=here)
        self._queries = Gauge("meteora_prefix_cache_query_tokens", "Prompt tokens that were looked up in the prefix cache", registry=here)

    def report(self, step: StepReport) -> None:
        """Count one step of the scheduler."""
        self._read.inc(step.read)
        self._written.inc(step.written)
        self._steps.observe(step.seconds)
        self._batch.observe(step.rows)
        for seconds in step.first:
            self._first.observe(seconds)
        for seconds in step.gaps:
            self._gaps.observe(seconds)
        if step.shares is not None:
            for name, share in zip(step.names, step.shares.tolist(), strict=True):
                if share > 0:
                    self._adapters.labels(printable(name)).inc(share * self._sample)

    def text(self, engine: Engine) -> bytes:
        """All metrics in the text format, with the current state of a scheduler."""
        from prometheus_client import generate_latest

        running, waiting = engine.load
        self._running.set(running)
        self._waiting.set(waiting)
        self._cache.set(engine.prefixes.bytes)
        self._kv.set(engine.slots.bytes)
        self._hits.set(engine.prefixes.hits)
        self._queries.set(engine.prefixes.queries)
        return generate_latest(self.registry)

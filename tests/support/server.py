"""A real server in this process: uvicorn in a thread, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from meteora_core.chat.chat_model import ChatModel
from meteora_core.serving.app import AppOptions, create_app
from meteora_core.serving.metrics import Metrics
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits
from meteora_core.serving.service import Service, ServiceOptions


@dataclass(frozen=True)
class RunningServer:
    """A server, and what the tests look into.

    Attributes:
        url: Its address, such as ``http://127.0.0.1:40000``.
        service: Its service.
        app: Its ASGI application.
    """

    url: str
    service: Service
    app: Any

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until no request is in progress or waiting."""
        end = time.monotonic() + seconds
        while sum(self.service.scheduler.load):
            assert time.monotonic() < end, "requests are left over"
            time.sleep(0.02)


@contextmanager
def running_server(
    chat_model: ChatModel, options: AppOptions = AppOptions(), service_options: ServiceOptions = ServiceOptions(max_new_tokens=24), **limits: Any
) -> Iterator[RunningServer]:
    """Serve a model within the block."""
    metrics = Metrics()
    scheduler = Scheduler(chat_model.model, chat_model.tokenizer, SchedulerLimits(**{"max_batch": 8, "prefix_bytes": 1 << 24, **limits}), metrics.report)
    service = Service(chat_model, scheduler, service_options)
    app = create_app(service, metrics, options)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the server ended"
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.01)
    try:
        yield RunningServer(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service, app)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()

"""The HTTP application: the routes of the protocol, health, metrics and the page."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from meteora_core import __version__
from meteora_core.errors import MeteoraError
from meteora_core.serving.bank_changes import BankChanges
from meteora_core.serving.bodies import now
from meteora_core.serving.chat_api import chat_body, chat_stream, plan_chat
from meteora_core.serving.completions_api import completion_body, completion_stream, plan_completion
from meteora_core.serving.failures import ApiError, api_error, of_validation
from meteora_core.serving.guard import Access, Guard
from meteora_core.serving.metrics import Metrics
from meteora_core.serving.protocol import AdapterRequest, ChatRequest, CompletionRequest, ErrorBody, ResponsesRequest
from meteora_core.serving.responses_api import plan_response, response_body, response_stream
from meteora_core.serving.service import Service
from meteora_core.serving.streaming import EventStream, unless_gone
from meteora_core.trace.palette import look

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "The request cannot be answered"),
        (401, "The key is missing or wrong"),
        (403, "The server does not allow this"),
        (404, "There is no such model, adapter or path"),
        (413, "The body is too large"),
        (500, "The server failed"),
        (503, "The server is overloaded or shutting down"),
    )
}


@dataclass(frozen=True)
class AppOptions:
    """Options of the application.

    Attributes:
        access: Who may use the server.
        cors: Origins of websites whose scripts may use it; "*" for all.
        changes: Changes to the bank that clients may make; None allows none.
        extra_metrics: Function that returns further metrics in the format of Prometheus; None for none.
    """

    access: Access = field(default_factory=Access)
    cors: tuple[str, ...] = ()
    changes: BankChanges | None = None
    extra_metrics: Callable[[], Awaitable[bytes]] | None = None


def create_app(service: Service, metrics: Metrics, options: AppOptions = AppOptions()) -> ASGIApp:
    """Make the ASGI application of a service. It starts the scheduler, and stops it at the end.

    Args:
        service: The model with its scheduler, whose reports go to ``metrics``.
        metrics: Metrics of the server.
        options: Access, CORS and changes to the bank.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.scheduler.close)

    app = FastAPI(title="Meteora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=_ERRORS)
    _handle_errors(app)
    _answering(app, service)
    _describing(app, service, metrics, options.extra_metrics)
    _adapters(app, service, options.changes)
    _page(app)
    paths = [getattr(route, "path", "") for route in app.routes]
    guarded: ASGIApp = Guard(app, options.access, lambda path, status: metrics.requests.labels(path, str(status)).inc(), paths)
    if options.cors:
        guarded = CORSMiddleware(guarded, allow_origins=options.cors, allow_methods=["*"], allow_headers=["*"])
    return guarded


def _handle_errors(app: FastAPI) -> None:
    async def failed(request: Request, error: Exception) -> Response:
        known = api_error(error)
        return JSONResponse(known.body, known.status, headers={"Retry-After": "1"} if known.status == 503 else None)

    async def invalid(request: Request, error: Exception) -> Response:
        known = of_validation(error)
        return JSONResponse(known.body, known.status)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        unknown = error.status_code in (404, 405)
        message = f"{error.detail}: {request.method} {request.url.path}" if unknown else str(error.detail)
        known = ApiError(error.status_code, message, code="request_too_large" if error.status_code == 413 else None)
        return JSONResponse(known.body, known.status, headers=error.headers)

    app.add_exception_handler(MeteoraError, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, failed)


def _answering(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, questions: Any, body: Callable[[], Any], stream: Callable[[Any], AsyncIterator[bytes]] | None) -> Response:
        if stream is None:
            return await unless_gone(request, body())
        work = service.ask(questions)
        events = await work.__aenter__()
        return EventStream(stream(events), work)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        plan = await run_in_threadpool(service.planned, plan_chat, body)
        stream = (lambda events: chat_stream(service, plan, events)) if body.stream else None
        return await answer(request, plan.questions, lambda: chat_body(service, plan), stream)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue one or more texts."""
        plan = await run_in_threadpool(service.planned, plan_completion, body)
        stream = (lambda events: completion_stream(service, plan, events)) if body.stream else None
        return await answer(request, plan.questions, lambda: completion_body(service, plan), stream)

    @app.post("/v1/responses", response_model=None)
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a conversation, in the form of the responses API."""
        plan = await run_in_threadpool(service.planned, plan_response, body)
        stream = (lambda events: response_stream(service, plan, events)) if body.stream else None
        return await answer(request, [plan.question], lambda: response_body(service, plan), stream)


def _describing(app: FastAPI, service: Service, metrics: Metrics, more: Callable[[], Awaitable[bytes]] | None) -> None:
    started = now()

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "meteora", "max_model_len": service.scheduler.longest}

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        """List the models: the routed one, `base`, and every adapter."""
        return {"object": "list", "data": [model(name) for name in service.models]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one_model(name: str) -> dict[str, Any]:
        """Describe one model."""
        if name not in service.models:
            raise ApiError(404, f"The model `{name}` does not exist", param="model", code="model_not_found")
        return model(name)

    @app.get("/health", response_model=None)
    async def health() -> dict[str, Any]:
        """Whether the server works."""
        if not service.scheduler.alive:
            raise ApiError(503, "the engine does not run")
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> dict[str, Any]:
        """Whether the server can take another request."""
        service.scheduler.check_room(1)
        return await health()

    @app.get("/version", response_model=None)
    async def version() -> dict[str, Any]:
        """The version of Meteora, and the number of changes to the bank since the start."""
        return {"version": __version__, "bank_version": service.scheduler.version}

    @app.get("/metrics", response_model=None)
    async def metrics_text() -> Response:
        """Metrics in the format of Prometheus."""
        text = metrics.text(service.scheduler) + (b"" if more is None else await more())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _adapters(app: FastAPI, service: Service, changes: BankChanges | None) -> None:
    def listing() -> dict[str, Any]:
        defaults, state = service.defaults, service.state
        adapters = []
        for index, info in enumerate(() if state is None else state.adapters):
            colours = look(index)
            adapters.append(
                {"name": info.name, "rank": info.rank, "hue": colours.hue, "light": colours.light, "dark": colours.dark, "pattern": colours.pattern}
            )
        return {
            "object": "list",
            "model": service.options.name,
            "base": PurePath(service.chat_model.base.name).name,
            "top_k": defaults.top_k,
            "T": defaults.temperature,
            "bank_version": service.scheduler.version,
            "data": adapters,
        }

    def allowed() -> BankChanges:
        if changes is None:
            raise ApiError(403, "this server does not allow changes to its adapters", hint="start it with --allow-adapter-changes and a key")
        return changes

    @app.get("/v1/meteora/adapters", response_model=None)
    async def adapters() -> dict[str, Any]:
        """List the adapters with their colours, and the routing options in effect."""
        return listing()

    @app.post("/v1/meteora/adapters", response_model=None)
    async def add(body: AdapterRequest) -> dict[str, Any]:
        """Add an adapter to the bank. Requests in progress finish first."""
        await run_in_threadpool(allowed().add, service, body.name, body.path)
        return listing()

    @app.delete("/v1/meteora/adapters/{name:path}", response_model=None)
    async def drop(name: str) -> dict[str, Any]:
        """Remove an adapter from the bank. Requests in progress finish first."""
        await run_in_threadpool(allowed().drop, service, name)
        return listing()


def _page(app: FastAPI) -> None:
    text = (files("meteora_core.serving") / "page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": page_policy(text), "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

    @app.get("/", response_model=None, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(text, headers=headers)


def page_policy(page: str) -> str:
    """The content security policy of a page: its own script and style by their hashes, connections to this server, and nothing else."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in texts)

    parts = ["default-src 'none'", f"script-src {hashes('script')}", f"style-src {hashes('style')}", "connect-src 'self'", "img-src data:"]
    return "; ".join([*parts, "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])

"""``meteora serve``: an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.commands.shared_options import AdaptersDir, Loading, RoutingT, TopK
from meteora_cli.console import globals_of, progress, quantization_of, settings_from
from meteora_cli.display import say
from meteora_cli.flags import given_flags, refuse_without_effect, typed_template
from meteora_core.choices import Engine

if TYPE_CHECKING:
    from meteora_core.progress import Progress
    from meteora_core.serving.launch import ServerPlan
    from meteora_core.settings import Settings

KEY_VARIABLE = "METEORA_API_KEY"

EMBEDDED_ONLY = ("backend", "load_in_4bit", "load_in_8bit", "prefix_cache_mb", "allow_adapter_changes", "device")
"""Options of the embedded engine."""


def serve(
    ctx: typer.Context,
    *,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint to serve, or its id on the hub; default: runs/meteora, or the quickstart's, or the starter checkpoint.", show_default=False
        ),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model to serve alone; with a checkpoint, the base model for it.", show_default=False)] = None,
    adapters_dir: AdaptersDir = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; 0: any free port.", show_default=False)] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help=f"Key that requests need; other users see it in the list of processes, but not {KEY_VARIABLE}.", show_default=False),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen on a public address without a key.")] = False,
    engine: Annotated[
        Engine | None,
        typer.Option("--engine", help="Engine: transformers, vllm, or auto: vLLM if it is installed and the device is a GPU.", show_default=False),
    ] = None,
    vllm_python: Annotated[Path | None, typer.Option("--vllm-python", help="Python of another environment, with vLLM and Meteora.", show_default=False)] = None,
    vllm_args: Annotated[str | None, typer.Option("--vllm-args", help="Further options of `vllm serve`, as one text.", show_default=False)] = None,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name of the routed model in requests and in the list of models.", show_default=False)
    ] = None,
    max_batch: Annotated[int | None, typer.Option("--max-batch", help="Largest number of requests in a batch.", show_default=False)] = None,
    max_queue: Annotated[int | None, typer.Option("--max-queue", help="Largest number of waiting requests.", show_default=False)] = None,
    max_model_len: Annotated[int | None, typer.Option("--max-model-len", help="Longest prompt and answer together, in tokens.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest chat answer in tokens, if the request sets no limit.", show_default=False)
    ] = None,
    prefix_cache_mb: Annotated[int | None, typer.Option("--prefix-cache-mb", help="Size of the prefix cache in MB; 0: none.", show_default=False)] = None,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", help="Origin of a website whose scripts may use the server; can be repeated.", show_default=False)
    ] = None,
    allow_adapter_changes: Annotated[bool, typer.Option("--allow-adapter-changes", help="Let clients add and remove adapters; needs a key.")] = False,
    adapter_root: Annotated[
        list[Path] | None, typer.Option("--adapter-root", help="Folder of adapters that clients may add; can be repeated.", show_default=False)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", callback=typed_template, help="Prompt template of chats: auto, chat, inst, raw or a text with {}.", show_default=False),
    ] = None,
    routing_temperature: RoutingT = None,
    top_k: TopK = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Dtype of the base model.", show_default=False)] = None,
    loading: Loading,
) -> None:
    """Serve a model to OpenAI's clients, with a page that shows which adapter writes each token.

    The models are the routed one, `base`, and every adapter. The page is at the server's address, http://127.0.0.1:8000 by default.
    """
    given = SimpleNamespace(**ctx.params)
    bare = base is not None and checkpoint is None
    mixed = "a checkpoint (leave out a --base alone)"
    needs = dict.fromkeys(("routing_temperature", "top_k", "adapters_dir", "backend", "allow_adapter_changes"), (not bare, mixed))
    refuse_without_effect(ctx, {**needs, "adapter_root": (allow_adapter_changes, "--allow-adapter-changes")})
    quantization = quantization_of(loading.load_in_4bit, loading.load_in_8bit)
    settings = settings_from(ctx, model__quantization=quantization, model__trust_remote_code=loading.trust_remote_code or None)
    key = key_of(api_key)
    check_access(settings.serve.host, key, no_auth=no_auth, changes=allow_adapter_changes)
    run(ctx, settings, given, key)


def server_of(ctx: typer.Context, plan: ServerPlan, bars: Progress) -> Any:
    """The application, by the engine of the settings and flags. Raises UsageError for flags that this engine does not have."""
    from meteora_core.serving.launch import make_server
    from meteora_core.serving.vllm_launch import make_vllm_server, pick_engine

    own = given_flags(ctx).keys() & set(EMBEDDED_ONLY)
    chosen = pick_engine(plan.settings, embedded=bool(own))
    if chosen == "vllm":
        refuse_without_effect(ctx, dict.fromkeys(EMBEDDED_ONLY, (False, "--engine transformers")))
        return make_vllm_server(plan, bars, verbose=bool(globals_of(ctx).verbose))
    refuse_without_effect(ctx, dict.fromkeys(("vllm_python", "vllm_args"), (False, "--engine vllm")))
    return make_server(plan, bars)


def key_of(flag: str | None) -> str | None:
    """The key that requests need, from the flag or the environment; None for none. Raises UsageError for a key that no header can carry."""
    from meteora_core.errors import UsageError

    key = flag or os.environ.get(KEY_VARIABLE)
    if key is not None and (not key.isascii() or not key.isprintable() or " " in key):
        raise UsageError("the API key must consist of visible ASCII characters", hint='for example: export METEORA_API_KEY="$(openssl rand -hex 24)"')
    return key


def check_access(host: str, key: str | None, *, no_auth: bool, changes: bool) -> None:
    """Raise UsageError if the server would be open to others without a key, or if a flag contradicts another."""
    from meteora_core.errors import UsageError

    if key is not None and no_auth:
        raise UsageError("--no-auth and a key exclude each other", hint="leave out one of them")
    if changes and key is None:
        raise UsageError("--allow-adapter-changes needs a key", hint='export METEORA_API_KEY="$(openssl rand -hex 24)"')
    if key is None and not no_auth and not is_loopback(host):
        raise UsageError(f"{host} is not a loopback address, and there is no key", hint='export METEORA_API_KEY="$(openssl rand -hex 24)", or add --no-auth')


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError if the address cannot be used."""
    from meteora_core.errors import UsageError

    with ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            message = f"cannot listen on {host}, port {port}: {error.strerror or error}"
            raise UsageError(message, hint="choose another --port, or --port 0 for a free one") from error
        stack.pop_all()
    return listener


def run(ctx: typer.Context, settings: Settings, given: SimpleNamespace, key: str | None) -> None:
    """Load the model and serve it until a signal arrives."""
    from meteora_core.errors import MeteoraError

    try:
        import uvicorn

        from meteora_core.serving.launch import ServerPlan
    except ImportError as missing:
        raise MeteoraError(f"`meteora serve` needs {missing.name}", hint="pip install 'meteora-lora[serve]'") from missing
    chosen = settings.serve
    listener = listen(chosen.host, chosen.port)
    plan = ServerPlan(
        settings,
        given.checkpoint,
        given.base,
        given.adapters_dir,
        given.top_k or settings.routing.top_k,
        given.routing_temperature or settings.routing.temperature,
        key,
        not given.no_auth and key is None,
        given.allow_adapter_changes,
    )
    with listener, progress(ctx) as bars:
        app = server_of(ctx, plan, bars)
        port = listener.getsockname()[1]
        shown = f"[{chosen.host}]" if ":" in chosen.host.strip("[]") else chosen.host
        verbose = globals_of(ctx).verbose

        class Server(uvicorn.Server):
            """A server that says when it is ready, and leaves with code 0 after a signal."""

            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                leave_out_of_collections()
                if self.started and not globals_of(ctx).quiet:
                    say(f"Serving on http://{shown}:{port} · OpenAI's API at /v1 · Ctrl-C stops")

            def capture_signals(self) -> Any:
                return quiet_signals(self)

        level = "debug" if verbose > 1 else "info" if verbose else "warning"
        config = uvicorn.Config(
            app, log_level=level, access_log=bool(verbose), timeout_graceful_shutdown=None, server_header=False, h11_max_incomplete_event_size=65536
        )
        Server(config).run(sockets=[listener])


def leave_out_of_collections() -> None:
    """Leave the model and everything else that exists now out of garbage collections; with them, a full one holds all requests for some 0.2 seconds."""
    import gc

    gc.collect()
    gc.freeze()


def quiet_signals(server: Any) -> Any:
    """A context manager in which the first SIGINT or SIGTERM lets the server finish its requests, and a second SIGINT ends them."""
    import signal
    from collections.abc import Iterator
    from contextlib import contextmanager

    @contextmanager
    def captured() -> Iterator[None]:
        before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return captured()

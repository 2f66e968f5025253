"""``meteora chat``: a chat with a MeteoRA model, one adapter, or a base model."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.commands import shared_options as shared
from meteora_cli.console import emit_json, globals_of, note_replaced, progress, quantization_of, settings_from, valid_text, write_text
from meteora_cli.display import console, out, say
from meteora_cli.flags import refuse_without_effect

if TYPE_CHECKING:
    from meteora_core.chat.conversation import Conversation


def chat(
    ctx: typer.Context,
    *,
    speaker: shared.Speaker,
    remote: shared.Remote,
    sampling_temperature: Annotated[float | None, typer.Option("--temperature", help="Sampling temperature; 0: greedy.", show_default=False)] = None,
    route: Annotated[bool, typer.Option("--route", help="Colour every token by its adapter.")] = False,
    loading: shared.Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Answer one message from stdin as one JSON document.")] = False,
) -> None:
    """Chat with a model, and see which adapter writes each token.

    With --url, the model is that of a server: `meteora serve`, or any other server of OpenAI's API, of which only answers are known.

    In a terminal, this is a conversation, whose commands /help lists. Otherwise, stdin is one message, and the answer is written to stdout.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    message = "" if interactive else read_message()
    session = open_session(ctx)
    if route:
        session.check_adapters()
    if interactive:
        _converse(session, settings_from(ctx).paths.data, route=route, quiet=globals_of(ctx).quiet)
    elif as_json:
        emit_json(answer_document(session, message))
    else:
        _answer_plain(session, message, verbose=bool(globals_of(ctx).verbose), route=route)


ON_THIS_MACHINE = ("checkpoint", "base", "adapters_dir", "template", "device", "backend", "load_in_4bit", "load_in_8bit", "trust_remote_code")
"""The options that describe a model of this machine, and have no effect on a server's."""


def open_session(ctx: typer.Context) -> Conversation:
    """Start a conversation with the model that the options of ``meteora chat`` or ``meteora trace`` name: load it, or reach its server."""
    given = SimpleNamespace(**ctx.params)
    remote = given.url is not None
    needs = dict.fromkeys(ON_THIS_MACHINE, (not remote, "a model of this machine (leave out --url)"))
    refuse_without_effect(ctx, needs | dict.fromkeys(("api_key", "served_model"), (remote, "--url")))
    return _reach(ctx, given) if remote else _load(ctx)


def _reach(ctx: typer.Context, given: SimpleNamespace) -> Conversation:
    from meteora_cli.commands.serve import key_of
    from meteora_core.chat.remote_client import RemoteClient
    from meteora_core.chat.remote_session import RemoteSession
    from meteora_core.generation.sampling import Sampling

    settings = settings_from(ctx)
    chosen = settings.chat
    system = None if given.system is None else valid_text(given.system, "--system")
    return RemoteSession(
        RemoteClient(given.url, key_of(given.api_key)),
        Sampling(chosen.max_new_tokens, chosen.sampling_temperature, chosen.top_p, chosen.seed),
        model=given.served_model,
        system=system,
        adapter=given.adapter,
        top_k=given.top_k or settings.routing.top_k,
        routing_temperature=given.routing_temperature or settings.routing.temperature,
    )


def _load(ctx: typer.Context) -> Conversation:
    from meteora_core.chat.chat_model import load_chat_model
    from meteora_core.chat.session import ChatSession
    from meteora_core.data.userdata import register_all
    from meteora_core.generation.sampling import Sampling

    given = SimpleNamespace(**ctx.params)
    alone, mixed = given.adapter is not None, "a checkpoint whose adapters are mixed (leave out --adapter and a --base alone)"
    bare = given.base is not None and given.checkpoint is None and not alone
    needs = dict.fromkeys(("routing_temperature", "top_k"), (not alone and not bare, mixed))
    needs |= {"adapters_dir": (not bare, "a checkpoint"), "backend": (not bare, "a checkpoint or --adapter")}
    refuse_without_effect(ctx, needs)
    quantization = quantization_of(given.load_in_4bit, given.load_in_8bit)
    settings = settings_from(ctx, model__quantization=quantization, model__trust_remote_code=given.trust_remote_code or None)
    register_all(settings)
    system = None if given.system is None else valid_text(given.system, "--system")
    with progress(ctx) as bars:
        chat_model = load_chat_model(
            settings, checkpoint=given.checkpoint, base=given.base, adapter=given.adapter, adapters_dir=given.adapters_dir, progress=bars
        )
    chat_settings, top_k, routing_temperature = settings.chat, given.top_k, given.routing_temperature
    if chat_model.kind == "meteora":
        # A setting with its default does not override the value of the checkpoint.
        configured = settings.routing.top_k
        top_k = top_k if top_k is not None else configured
        routing_temperature = routing_temperature if routing_temperature is not None else settings.routing.temperature
    return ChatSession(
        chat_model,
        Sampling(chat_settings.max_new_tokens, chat_settings.sampling_temperature, chat_settings.top_p, chat_settings.seed),
        template=chat_settings.template,
        system=system,
        top_k=top_k,
        routing_temperature=routing_temperature,
        cuda_graphs=chat_settings.cuda_graphs,
    )


def read_message() -> str:
    """Read stdin as text. Bytes that are not UTF-8 are replaced, and a note says so.

    Raises:
        UsageError: stdin is empty.
    """
    from meteora_core.errors import UsageError

    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        text = raw.decode("utf-8", errors="replace")
        note_replaced("stdin", broken.start)
    text = text.strip("\n")
    if not text.strip():
        raise UsageError("there is no message on stdin", hint='for example: echo "a question" | meteora chat')
    return text


def _converse(session: Conversation, data_dir: Path, *, route: bool, quiet: bool) -> None:
    from meteora_cli.chat.repl import make_reader, run_repl
    from meteora_cli.chat.slash import Chat
    from meteora_core.chat.session import ChatSession
    from meteora_core.chat.welcome import Welcome, greeting, welcome
    from meteora_core.files import cache_dir

    talk = Chat(session, out, console, route)
    if not quiet:
        talk.say(f"{session.title} · /help")
        if isinstance(session, ChatSession):
            shown = welcome(session.chat_model, data_dir)
        else:
            shown = greeting(session.names, data_dir) if session.names else Welcome("", ())
        if shown.skills:
            talk.say(shown.skills)
        if shown.prompts:
            talk.say("Try one of these:")
            for prompt in shown.prompts:
                talk.say(f"  {prompt}")
    run_repl(talk, make_reader(talk, cache_dir() / "chat_history"))


def _answer_plain(session: Conversation, message: str, *, verbose: bool, route: bool) -> None:
    from meteora_cli.chat.answer import figures, interruptible, show_answer
    from meteora_core.chat.prompts import Encoded
    from meteora_core.generation.requests import Finished, Written

    if route:
        from meteora_cli.chat.render import Painter

        show_answer(session, message, out, console, Painter(out, session.names), in_chat=False)
        return
    with interruptible() as stop:
        for event in session.ask(message, stop=stop.is_set):
            if isinstance(event, Encoded) and event.notice:
                say(f"note: {event.notice}", style="yellow")
            elif isinstance(event, Written):
                write_text(event.text)
            elif isinstance(event, Finished):
                write_text("\n")
                if verbose:
                    say(figures(event, in_chat=False), style="dim")
    if stop.is_set():
        raise KeyboardInterrupt


def answer_document(session: Conversation, message: str) -> dict[str, Any]:
    """Answer one message, and return the text, token ids, timings and, if the model has adapters, the routes."""
    from meteora_cli.chat.answer import interruptible
    from meteora_core.chat.prompts import Encoded
    from meteora_core.generation.requests import Finished

    prompt: list[int] = []
    finished: Finished | None = None
    notice = None
    with interruptible() as stop:
        for event in session.ask(message, stop=stop.is_set):
            if isinstance(event, Encoded):
                prompt, notice = event.ids, event.notice
            elif isinstance(event, Finished):
                finished = event
    if stop.is_set() or finished is None:
        raise KeyboardInterrupt
    document: dict[str, Any] = {
        "model": session.title,
        "mode": session.mode.describe(),
        "template": session.template,
        "message": message,
        "notice": notice,
        "text": finished.text,
        "finish": finished.reason,
        "prompt_ids": prompt,
        "ids": list(finished.ids),
        "tokens": finished.length,
        "seconds_to_first_token": round(finished.first_seconds, 4),
        "tokens_per_second": round(finished.tokens_per_second, 2),
        "settings": session.values(),
    }
    if session.names:
        document["routes"] = session.picture().to_json()
    return document

"""The slash commands of the chat, and their completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_cli.chat import panels
from meteora_cli.display import body, error_lines
from meteora_core.errors import MeteoraError, UsageError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from meteora_core.chat.conversation import Conversation


class Quit(Exception):
    """The user wants to exit."""


@dataclass
class Chat:
    """The conversation, and the consoles that show it.

    Attributes:
        session: The conversation.
        out: The console for answers and tables.
        notes: The console for notes and errors.
        route: Whether answers are coloured by adapter.
    """

    session: Conversation
    out: Console
    notes: Console
    route: bool = False

    def say(self, text: str) -> None:
        """Print a note."""
        self.notes.print(body(text, "dim"), soft_wrap=True)

    def fail(self, error: MeteoraError) -> None:
        """Print an error and its hint."""
        self.notes.print(error_lines(error.message, error.hint), soft_wrap=True)


@dataclass(frozen=True)
class Command:
    """One slash command.

    Attributes:
        usage: The arguments of the command, as the help shows them.
        text: A one-line description.
        run: The function that runs the command with its argument.
        complete: A function that returns the possible words of the argument.
    """

    usage: str
    text: str
    run: Callable[[Chat, str], None]
    complete: Callable[[Chat], Iterator[str]] = lambda chat: iter(())


def _adapter_names(chat: Chat) -> Iterator[str]:
    yield from chat.session.names


def _settings(chat: Chat) -> Iterator[str]:
    yield from chat.session.options()


def _help(chat: Chat, argument: str) -> None:
    panels.show_help(chat.out, {name: (command.usage, command.text) for name, command in COMMANDS.items()})


def _new(chat: Chat, argument: str) -> None:
    chat.session.new()
    chat.say("started a new conversation")


def _system(chat: Chat, argument: str) -> None:
    if argument:
        chat.session.set_system(None if argument == "off" else argument)
    chat.say(f"system text: {chat.session.system}" if chat.session.system else "no system text")


def _set(chat: Chat, argument: str) -> None:
    if not argument:
        panels.show_settings(chat.out, chat.session)
        return
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if not value.strip():
        known = chat.session.options()
        if name in known:
            raise UsageError(f"/set {name} needs a value", hint=f"it must be {known[name].range()}")
    chat.session.set(name, value.strip())
    chat.say(f"{name} = {chat.session.values()[name]}")


def _adapters(chat: Chat, argument: str) -> None:
    panels.show_adapters(chat.out, chat.session)


def _use(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/use needs the name of an adapter, or auto", hint="/adapters lists them")
    chat.session.use(None if argument == "auto" else argument)
    chat.say(chat.session.mode.describe())


def _mute(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/mute needs the name of an adapter", hint="/adapters lists them")
    muted = chat.session.mute(argument)
    chat.say(f"{argument} is {'muted' if muted else 'no longer muted'}")


def _route(chat: Chat, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise UsageError(f"/route cannot be {argument!r}", hint="choose on or off; without an argument, /route toggles")
    wanted = not chat.route if not argument else argument == "on"
    if wanted:
        chat.session.check_adapters()
    chat.route = wanted
    chat.say(f"colours by adapter are {'on' if wanted else 'off'}")


def _why(chat: Chat, argument: str) -> None:
    with chat.notes.status("reading the conversation"):
        picture = chat.session.picture(last_turn=True)
    panels.show_why(chat.out, picture)


def _compare(chat: Chat, argument: str) -> None:
    name, message = None, argument or None
    first, _, rest = argument.partition(" ")
    if first in set(_adapter_names(chat)):
        name, message = first, rest.strip() or None
    panels.show_comparison(chat.out, chat.notes, chat.session, name, message)


def _path(argument: str, command: str, example: str) -> Path:
    if not argument:
        raise UsageError(f"/{command} needs a file", hint=f"for example: /{command} {example}")
    return Path(argument).expanduser()


def _save(chat: Chat, argument: str) -> None:
    path = _path(argument, "save", "talk.jsonl")
    count = chat.session.save(path)
    cut = sum(not turn.complete for turn in chat.session.turns)
    chat.say(f"saved {count} rows to {path}" + (f"; {cut} of the answers were cut short" if cut else ""))


def _load(chat: Chat, argument: str) -> None:
    path = _path(argument, "load", "talk.jsonl")
    count = chat.session.load(path)
    chat.say(f"loaded {count} turns from {path}")


def _export(chat: Chat, argument: str) -> None:
    from meteora_cli.chat.export import check_format, write_picture

    path = _path(argument, "export", "talk.html")
    check_format(path)
    with chat.notes.status("reading the conversation"):
        picture = chat.session.picture()
    write_picture(picture, path, "Routing of a conversation")
    chat.say(f"saved {len(picture.tokens)} tokens to {path}")


def _quit(chat: Chat, argument: str) -> None:
    raise Quit


def _on_off(chat: Chat) -> Iterator[str]:
    yield from ("on", "off")


def _use_names(chat: Chat) -> Iterator[str]:
    yield "auto"
    yield from _adapter_names(chat)


COMMANDS: dict[str, Command] = {
    "help": Command("", "show this list", _help),
    "new": Command("", "start a new conversation with the same settings (also /clear)", _new),
    "system": Command("[TEXT|off]", "set the system text, which precedes the conversation", _system),
    "set": Command("[NAME VALUE]", "change a setting; without arguments: show all, with their ranges", _set, _settings),
    "adapters": Command("", "list the adapters with their ranks and sources", _adapters),
    "use": Command("NAME|auto", "use one adapter for every token, or let the gates choose again", _use, _use_names),
    "mute": Command("NAME", "exclude an adapter from the choice; repeat to include it again", _mute, _adapter_names),
    "route": Command("[on|off]", "colour every token by its adapter", _route, _on_off),
    "why": Command("", "show which adapters wrote the last answer, span by span", _why),
    "compare": Command("[NAME] [QUESTION]", "answer with base, one adapter and MeteoRA, side by side", _compare, _adapter_names),
    "save": Command("FILE", "save the conversation as training rows (JSON lines)", _save),
    "load": Command("FILE", "continue from saved rows", _load),
    "export": Command("FILE", "write a picture of the routes: .html, .png, .svg or .json", _export),
    "quit": Command("", "exit (also /exit and Ctrl-D)", _quit),
}
FILE_COMMANDS = ("save", "load", "export")
ALIASES = {"exit": "quit", "clear": "new"}
"""Alternative names of commands, as in other chat programs."""


def run_command(chat: Chat, line: str) -> None:
    """Run a line that starts with a slash.

    Raises:
        UsageError: There is no such command (the hint names the closest one), or its argument is invalid.
        Quit: The user wants to exit.
    """
    name, _, argument = line[1:].strip().partition(" ")
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        completions = [command for command in COMMANDS if name and command.startswith(name)]
        suggestion = did_you_mean(completions[0] if completions else name, COMMANDS)
        hint = suggestion.replace("'", "'/", 1) if suggestion else "/help lists them; to send a text that starts with a slash, write two"
        raise UsageError(f"unknown command /{name}", hint=hint)
    COMMANDS[name].run(chat, argument.strip())

"""The read-eval-print loop of `meteora chat`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_cli.chat.answer import show_answer, unechoed
from meteora_cli.chat.render import Painter
from meteora_cli.chat.slash import COMMANDS, FILE_COMMANDS, Chat, Quit, run_command
from meteora_cli.interrupts import handled
from meteora_core.errors import MeteoraError
from meteora_core.text import printable

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

LARGE_PASTE = 2000
"""The number of characters above which a pasted text appears as a short mark in the input line; the message contains the text."""


class Pastes:
    """Large pasted texts, and the marks that represent them while a line is edited."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """Store a text and return its mark."""
        mark = f"[pasted text {len(self._texts) + 1}: {len(text):,} characters]"
        self._texts[mark] = text
        return mark

    def expand(self, line: str) -> str:
        """Return the line with pasted texts in place of their marks."""
        for mark, text in self._texts.items():
            line = line.replace(mark, text)
        return line


def run_repl(chat: Chat, read: Callable[[], str]) -> None:
    """Read lines and answer them until the user exits.

    Args:
        chat: The conversation and its consoles.
        read: A function that returns the next message. It raises EOFError at the end (Ctrl-D), and KeyboardInterrupt on Ctrl-C, which only clears the
            line.
    """
    while True:
        try:
            while _turn(chat, read):
                pass
            return
        except KeyboardInterrupt:  # Ctrl-C arrived between two prompts
            handled()


def _turn(chat: Chat, read: Callable[[], str]) -> bool:
    """Read a line and answer it. Return False if the user exits."""
    try:
        line = read()
    except KeyboardInterrupt:
        handled()
        chat.say("press Ctrl-D to exit")
        return True
    except EOFError:
        return False
    try:
        with unechoed():
            take(chat, line)
    except Quit:
        return False
    except MeteoraError as error:
        chat.fail(error)
    except KeyboardInterrupt:
        handled()
        chat.say("stopped")
    return True


def take(chat: Chat, line: str) -> None:
    """Handle one line: a command, or a message. Two slashes at the start send a message that starts with one."""
    if not line.strip():
        return
    if line.startswith("/") and not line.startswith("//"):
        run_command(chat, line)
        return
    names = chat.session.names
    painter = Painter(chat.out, names) if chat.route and names else None
    show_answer(chat.session, line.removeprefix("/") if line.startswith("//") else line, chat.out, chat.notes, painter)


def make_reader(chat: Chat, history: Path) -> Callable[[], str]:
    """Return a function that reads a message, with history, completion and multi-line editing."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import FormattedText

    pastes = Pastes()
    session: PromptSession[str] = PromptSession(
        history=_history(history),
        completer=_completer(chat),
        complete_while_typing=True,
        multiline=True,
        key_bindings=_keys(pastes),
        bottom_toolbar=lambda: FormattedText([("", printable(_toolbar(chat)))]),
        prompt_continuation=lambda width, number, soft: "· ".rjust(width),
        enable_history_search=False,
        reserve_space_for_menu=6,
    )
    return lambda: pastes.expand(session.prompt([("bold", "› ")]))


def _toolbar(chat: Chat) -> str:
    session = chat.session
    parts = [session.mode.describe(), f"template {session.template}"]
    if chat.route:
        parts.append("colours on")
    parts.append("/help")
    return " · ".join(parts)


def _history(path: Path) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("ab").close()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys(pastes: Pastes) -> KeyBindings:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: Any) -> None:
        buffer = event.current_buffer
        state = buffer.complete_state
        if state is not None and state.current_completion is not None:
            buffer.complete_state = None
            return
        buffer.validate_and_handle()

    @keys.add("tab")
    def _complete(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None:
            buffer.complete_next()
            return
        completions = list(buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True)))
        if len(completions) == 1:
            buffer.apply_completion(completions[0])
        else:
            buffer.start_completion(insert_common_part=True)

    @keys.add("escape", "enter")
    def _line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.BracketedPaste)
    def _paste(event: Any) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        event.current_buffer.insert_text(pastes.mark(text) if len(text) > LARGE_PASTE else text)

    return keys


def _completer(chat: Chat) -> Completer:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class SlashCompleter(Completer):
        """Completes commands and their arguments."""

        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
            line = document.text_before_cursor
            if not line.startswith("/") or line.startswith("//") or "\n" in line:
                return
            name, space, argument = line[1:].partition(" ")
            if not space:
                for command, entry in COMMANDS.items():
                    if command.startswith(name):
                        yield Completion(command, -len(name), display=f"/{command} {entry.usage}".rstrip(), display_meta=entry.text)
            elif name in FILE_COMMANDS:
                yield from paths.get_completions(Document(argument, len(argument)), complete_event)
            elif name in COMMANDS and " " not in argument:
                for word in COMMANDS[name].complete(chat):
                    if word.startswith(argument):
                        yield Completion(word, -len(argument), display=printable(word))

    return SlashCompleter()

"""Shows an answer while it is generated."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.style import Style

from meteora_cli.display import cell
from meteora_core.chat.prompts import Encoded
from meteora_core.generation.requests import Finished, Reading, Written
from meteora_core.trace.picture import mean_weights, speakers

if TYPE_CHECKING:
    from rich.console import Console

    from meteora_cli.chat.render import Painter
    from meteora_core.chat.conversation import Conversation

LONG_READ = 600
"""The number of prompt tokens above which a note shows how many have been processed."""
SHOWN_PROMPT = 400
"""The largest number of prompt tokens that are shown in colour; /export shows all."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C in this block sets; a second one raises KeyboardInterrupt."""
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def unechoed() -> Iterator[None]:
    """Turn off the terminal's echo in this block, so that text typed during an answer appears in the next input line and not in the answer."""
    try:
        import termios
    except ImportError:  # not on Windows
        yield
        return
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(descriptor, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def show_answer(session: Conversation, message: str, out: Console, notes: Console, painter: Painter | None, *, in_chat: bool = True) -> Finished:
    """Send a message, print the answer while it is generated, and then one line of figures.

    Args:
        session: The conversation.
        message: The user's message.
        out: The console for the answer.
        notes: The console for notes and figures.
        painter: The painter that colours the tokens of prompt and answer by adapter; None prints plain text.
        in_chat: Whether the user is in a conversation; see :func:`figures`.
    """
    from meteora_cli.chat.render import StreamPrinter

    printer = StreamPrinter(out)
    finished: Finished | None = None
    encoded: Encoded | None = None
    adapters = len(painter.names) if painter else 0
    total: Any = None
    written = 0
    prompt_routes: list[Any] = []
    status = notes.status("reading")
    with interruptible() as stop:
        try:
            for event in session.ask(message, record=painter is not None, stop=stop.is_set):
                if isinstance(event, Encoded):
                    encoded = event
                    if event.notice:
                        notes.print(cell(f"note: {event.notice}", "yellow"))
                elif isinstance(event, Reading):
                    if event.total > LONG_READ:
                        status.start()
                        status.update(f"reading {event.done:,} of {event.total:,} tokens")
                    if event.routes is not None:
                        prompt_routes.append(event.routes)
                    if event.done == event.total:
                        status.stop()
                        if painter is not None and prompt_routes and encoded is not None:
                            _show_prompt(session, encoded, prompt_routes, printer, painter)
                            printer.end()
                            painter.restart()
                elif isinstance(event, Written):
                    if painter is None or event.routes is None:
                        printer.add(event.text, Style.null())
                        continue
                    weights = mean_weights(*event.routes, adapters)[0]
                    total = weights if total is None else total + weights
                    written += 1
                    speaker = int(speakers(*event.routes, adapters)[0])
                    for piece, style in painter.pieces(event.text, speaker, float(weights[speaker])):
                        printer.add(piece, style)
                else:
                    finished = event
        finally:
            status.stop()
            printer.end()
    assert finished is not None
    if painter is not None and total is not None:
        notes.print(painter.legend(total / written))
    notes.print(cell(figures(finished, in_chat=in_chat), "dim"))
    return finished


def _show_prompt(session: Conversation, encoded: Encoded, routes: list[Any], printer: Any, painter: Painter) -> None:
    """Print the part of the prompt that belongs to this turn in colour."""
    import torch

    indices, weights = torch.cat([part[0] for part in routes]), torch.cat([part[1] for part in routes])
    count = min(len(encoded.ids) - encoded.last_start, indices.shape[0], SHOWN_PROMPT)
    if count < len(encoded.ids) - encoded.last_start:
        printer.add("… ", Style.null())
    texts = session.token_texts(encoded.ids)[-count:]
    indices, weights = indices[-count:], weights[-count:]
    token_weights = mean_weights(indices, weights, len(painter.names))
    painter.restart()
    for text, adapter, row in zip(texts, speakers(indices, weights, len(painter.names)).tolist(), token_weights, strict=True):
        for piece, style in painter.pieces(text, adapter, float(row[adapter])):
            printer.add(piece, style)


def figures(finished: Finished, *, in_chat: bool = True) -> str:
    """Return one line of figures about an answer: numbers of tokens, speed, and the reason for its end.

    Args:
        finished: The answer.
        in_chat: Whether the user is in a conversation, where slash commands work; otherwise the line names the option of the command.
    """
    length, context = ("/set max-new-tokens", " (/new)") if in_chat else ("--max-new-tokens", "")
    ends = {"end": "", "length": f" · cut at max-new-tokens ({length})", "context": f" · the model's context is full{context}", "stopped": " · stopped"}
    speed = f" · {finished.tokens_per_second:.1f} tokens/s" if finished.tokens_per_second else ""
    first = f" · first after {finished.first_seconds:.2f} s" if finished.first_seconds else ""
    cached = f" ({finished.reused} from the cache)" if finished.reused else ""
    return f"{finished.prompt_tokens} read{cached} · {finished.length} written{first}{speed}{ends[finished.reason]}"

"""Showing one answer while it is written."""

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
    from meteora_core.chat.session import ChatSession

LONG_READ = 600
"""The number of prompt tokens from which a note shows how many have been read."""
SHOWN_PROMPT = 400
"""Prompt tokens that are shown in colour at most; the page of /export shows all."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C sets the event instead of raising; a second one raises KeyboardInterrupt."""
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
    """Turn off the terminal's echo in this block, so that text typed meanwhile is kept for the next input line and not shown within the answer."""
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


def show_answer(session: ChatSession, message: str, out: Console, notes: Console, painter: Painter | None) -> Finished:
    """Ask, print the answer as it comes, then one line of figures.

    Args:
        session: The conversation.
        message: What the user wrote.
        out: For the answer.
        notes: For everything else.
        painter: Colours by adapter, of the prompt too; None prints plain text.
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
                    shares = mean_weights(*event.routes, adapters)[0]
                    total = shares if total is None else total + shares
                    written += 1
                    who = int(speakers(*event.routes, adapters)[0])
                    for piece, style in painter.pieces(event.text, who, float(shares[who])):
                        printer.add(piece, style)
                else:
                    finished = event
        finally:
            status.stop()
            printer.end()
    assert finished is not None
    if painter is not None and total is not None:
        notes.print(painter.legend(total / written))
    notes.print(cell(figures(finished), "dim"))
    return finished


def _show_prompt(session: ChatSession, encoded: Encoded, routes: list[Any], printer: Any, painter: Painter) -> None:
    """This turn's part of the prompt, coloured. The earlier turns were shown before."""
    import torch

    from meteora_core.generation.text import token_texts

    indices, weights = torch.cat([part[0] for part in routes]), torch.cat([part[1] for part in routes])
    count = min(len(encoded.ids) - encoded.last_start, indices.shape[0], SHOWN_PROMPT)
    if count < len(encoded.ids) - encoded.last_start:
        printer.add("… ", Style.null())
    texts = token_texts(session.speaker.tokenizer, encoded.ids)[-count:]
    indices, weights = indices[-count:], weights[-count:]
    shares = mean_weights(indices, weights, len(painter.names))
    painter.restart()
    for text, adapter, row in zip(texts, speakers(indices, weights, len(painter.names)).tolist(), shares, strict=True):
        for piece, style in painter.pieces(text, adapter, float(row[adapter])):
            printer.add(piece, style)


def figures(finished: Finished) -> str:
    """One line on how it went."""
    ends = {"end": "", "length": " · cut at max-new-tokens (/set max-new-tokens)", "context": " · the model's context is full (/new)", "stopped": " · stopped"}
    speed = f" · {finished.tokens_per_second:.1f} tokens/s" if finished.tokens_per_second else ""
    first = f" · first after {finished.first_seconds:.2f} s" if finished.first_seconds else ""
    kept = f" ({finished.reused} from the cache)" if finished.reused else ""
    return f"{finished.prompt_tokens} read{kept} · {len(finished.ids)} written{first}{speed}{ends[finished.reason]}"

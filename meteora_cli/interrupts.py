"""Handlers of SIGINT and SIGTERM, which end a command with code 130 or 143, after its clean-up and without a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PAUSE = 0.05
"""The time after which a signal that arrived during an import is delivered again, in seconds."""

LONGEST = 40
"""The largest number of times that a signal is deferred."""

_received: list[int] = []
_put_off = 0
_again: threading.Timer | None = None


@contextmanager
def answer_signals() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt and SIGTERM raise SystemExit in this block. Any error after a signal ends the process with 128 + its number.

    A library that is interrupted during its import may turn the interrupt into an ImportError, or swallow it. A signal is therefore deferred while
    modules are imported, for at most two seconds. Ignored signals stay ignored. A process that a launcher started (``RANK``) does not handle SIGTERM,
    because it may be waiting for other processes in native code.
    """
    global _put_off
    numbers = [signal.SIGINT] if "RANK" in os.environ else [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    _received.clear()
    _put_off = 0
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
        if _received and _again is not None:  # a command may end before a deferred signal is delivered again
            raise SystemExit(128 + _received[-1])
    except BaseException as error:
        received = _received[-1] if _received else None
        if received is None or (isinstance(error, SystemExit) and not error.code and _again is None):
            raise
        sys.exit(128 + received)
    finally:
        _deliver_no_more()
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def interrupted() -> bool:
    """Whether a signal has arrived that is not handled yet."""
    return bool(_received)


def handled() -> None:
    """Mark an interrupt as handled, so that the command continues, as ``meteora chat`` does after an answer is stopped."""
    _received.clear()


def _handle(number: int, frame: FrameType | None) -> None:
    global _put_off, _again
    _received.append(number)
    _deliver_no_more()
    if _put_off < LONGEST and _importing(frame):
        _put_off += 1
        _again = threading.Timer(PAUSE, os.kill, (os.getpid(), number))
        _again.daemon = True
        _again.start()
        return
    _put_off = 0
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _deliver_no_more() -> None:
    """Cancel the second delivery of a deferred signal."""
    global _again
    if _again is not None:
        _again.cancel()
        _again = None


def _importing(frame: FrameType | None) -> bool:
    """Whether the interpreter is within an import statement."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False

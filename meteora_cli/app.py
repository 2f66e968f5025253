"""The entry point of ``meteora``. It imports almost nothing, so that Ctrl-C ends the process without a traceback even while modules are imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def entry() -> None:
    """Run :func:`main`. Before and after it, SIGINT and SIGTERM end the process immediately."""
    signals = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    for number in signals:
        signal.signal(number, _end_now)
    try:
        main()
    finally:
        for number in signals:
            signal.signal(number, _end_now)


def _end_now(number: int, _frame: FrameType | None) -> None:
    os._exit(128 + number)


def main() -> None:
    """Run the command line. The exit code is 0, 1 (known error), 2 (usage or configuration), 130 (Ctrl-C) or 143 (SIGTERM)."""
    from meteora_cli.interrupts import answer_signals

    with answer_signals():
        _run()


def _run() -> None:
    from meteora_cli.console import accept_all_text, guard_messages, report_error, usage_failure
    from meteora_cli.interrupts import interrupted
    from meteora_cli.tree import command
    from meteora_core.errors import MeteoraError
    from meteora_core.unexpected import known_failure

    accept_all_text()
    guard_messages()
    debug = os.environ.get("METEORA_DEBUG") == "1"
    try:
        code = command()(prog_name="meteora", standalone_mode=False)
        if isinstance(code, int) and code:
            sys.exit(code)
    except MeteoraError as error:
        if debug or interrupted():
            raise
        report_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        failure = usage_failure(error) or (None if debug or interrupted() else known_failure(error))
        if failure is None:
            raise
        report_error(failure)
        sys.exit(failure.exit_code)


if __name__ == "__main__":
    entry()

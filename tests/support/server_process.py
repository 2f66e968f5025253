"""``meteora serve`` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def serving(arguments: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server and its address, once it says that it serves. The caller ends it; if it is still running at the end, it is killed.

    Args:
        arguments: The arguments of ``meteora serve``.
        folder: Its working directory.
        variables: Its environment variables.
    """
    command = [sys.executable, "-m", "meteora_cli", "serve", *arguments]
    with subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        lines: list[str] = []
        for line in running.stderr:
            lines.append(line)
            if line.startswith("Serving on "):
                break
        else:
            pytest.fail("".join(lines))
        threading.Thread(target=running.stderr.read, daemon=True).start()
        try:
            yield running, line.split()[2]
        finally:
            running.kill()

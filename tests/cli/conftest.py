"""Runs the command line inside the test's process, as the shell would see it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Ran:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def meteora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Callable[..., Ran]]:
    """``meteora("data", "list")`` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str | Path) -> Ran:
        from meteora_cli import app
        from meteora_cli.display import console, out

        for each in (console, out):  # they read COLUMNS when they are made, which may have been in an earlier test
            monkeypatch.setattr(each, "_width", 160)
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["meteora", *map(str, arguments)])
        try:
            app.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
        captured = capfd.readouterr()
        return Ran(int(code or 0), captured.out, captured.err)

    from meteora_core.data.tasks import TASKS

    before = dict(TASKS)
    yield run
    TASKS.clear()  # commands register the tasks that they find
    TASKS.update(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a tiny base model, two datasets and two trained adapters."""
    from support.train_command import make_place

    return make_place(tmp_path_factory.mktemp("train"))

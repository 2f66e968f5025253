"""Ctrl-C and SIGTERM at any moment: the exit code, no traceback, nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from meteora_core.errors import UsageError
from meteora_core.files import atomic_folder, atomic_write
from meteora_core.settings import load_settings

AT_IMPORT = """
import os, signal, sys

class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.{signal})
        return None

sys.meta_path.insert(0, Pressed())
sys.argv = ["meteora", "config", "show"]
from meteora_cli.app import entry
entry()
"""


@pytest.mark.parametrize(
    ("module", "name", "code"),
    [("meteora_cli.interrupts", "SIGINT", 130), ("typer", "SIGINT", 130), ("pydantic_settings", "SIGINT", 130), ("pydantic_settings", "SIGTERM", 143)],
)
def test_a_signal_during_imports(tmp_path, module, name, code) -> None:
    script = AT_IMPORT.format(module=module, signal=name)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (code, "")  # a fast command may have printed before the signal is delivered again


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_ends_before_a_deferred_signal_is_delivered_again(meteora, monkeypatch, number, code) -> None:
    from meteora_cli import interrupts

    monkeypatch.setattr(interrupts, "PAUSE", 3600.0)
    monkeypatch.setattr(interrupts, "_importing", lambda frame: True)
    settings = load_settings()

    def work():
        signal.raise_signal(number)
        return settings

    settings_are(monkeypatch, work)
    ran = meteora("config", "show")
    assert (ran.code, ran.err) == (code, "")
    assert not any(isinstance(thread, threading.Timer) and not thread.finished.is_set() for thread in threading.enumerate())


def settings_are(monkeypatch, work) -> None:
    import meteora_core.settings

    monkeypatch.setattr(meteora_core.settings, "load_settings", lambda *_: work())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_files_are_written(meteora, monkeypatch, tmp_path, number, code) -> None:
    def work():
        with atomic_folder(tmp_path / "folder") as folder, atomic_write(folder / "file") as handle:
            handle.write("half")
            signal.raise_signal(number)

    settings_are(monkeypatch, work)
    before = signal.getsignal(number)
    ran = meteora("config", "show")
    assert (ran.code, ran.out, ran.err) == (code, "", "")
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("made_of_it", [ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'"), UsageError("cannot load it")])
def test_an_interrupt_that_a_library_turned_into_another_error(meteora, monkeypatch, made_of_it) -> None:
    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as pressed:
            raise made_of_it from pressed

    settings_are(monkeypatch, work)
    ran = meteora("config", "show")
    assert (ran.code, ran.out, ran.err) == (130, "", "")


def test_an_error_after_an_interrupt_that_was_answered_is_an_error(meteora, monkeypatch) -> None:
    from meteora_cli.interrupts import handled

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            handled()
        raise UsageError("something else")

    settings_are(monkeypatch, work)
    ran = meteora("config", "show")
    assert (ran.code, ran.err) == (2, "error: something else\n")


def test_what_is_ignored_stays_ignored(meteora, monkeypatch) -> None:
    def work():
        signal.raise_signal(signal.SIGTERM)
        raise UsageError("it went on")

    settings_are(monkeypatch, work)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert "it went on" in meteora("config", "show").err
    finally:
        signal.signal(signal.SIGTERM, before)

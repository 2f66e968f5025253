"""`meteora chat` by pipe, by its loop, and in a real terminal."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.style import Style

from meteora_cli.chat.answer import unechoed
from meteora_cli.chat.render import Painter, StreamPrinter
from meteora_cli.chat.repl import LARGE_PASTE, Pastes, run_repl
from meteora_cli.chat.slash import COMMANDS, Chat, Quit, run_command
from meteora_core.chat.session import ChatSession
from meteora_core.errors import DataError, MeteoraError
from meteora_core.generation.sampling import Sampling
from meteora_core.json_files import write_jsonl
from support import processes
from support.chat_world import NAMES, World, build_world, open_chat_model, without_ends


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def say(monkeypatch):
    """Sets what stands on stdin."""

    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def make_console(width: int = 100, **options) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, **{"force_terminal": True, "color_system": "truecolor", "no_color": False, **options})


def make_chat(world: World, **options) -> Chat:
    speaker = open_chat_model(world)
    without_ends(speaker.model)
    return Chat(ChatSession(speaker, Sampling(max_new_tokens=8)), make_console(**options), make_console(**options))


def shown(console: Console) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())


# --- without a terminal ----------------------------------------------------------------------------------------------------------


def test_a_question_on_stdin_is_answered_on_stdout(meteora, world, say) -> None:
    say(b"What is it?\n")
    plain = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "12")
    assert plain.code == 0, plain.err
    say(b"What is it?\n")
    ran = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "12", "--json")
    document = ran.json
    assert document["text"].encode(errors="replace").decode() + "\n" == plain.out
    assert document["message"] == "What is it?"
    assert document["template"] == "inst"
    assert len(document["ids"]) <= 12
    tokens = document["routes"]["tokens"]
    assert [token["id"] for token in tokens] == document["prompt_ids"] + document["ids"]
    assert {token["adapter"] for token in tokens} <= set(NAMES)
    for token in tokens:
        assert sum(token["shares"].values()) == pytest.approx(1, abs=1e-3)
        assert all(len(layer) == 2 for layer in token["layers"])


def test_flags_reach_the_conversation(meteora, world, say) -> None:
    flags = ("--T", "15", "--top-k", "1", "--template", "raw", "--system", "Brief.", "--max-new-tokens", "3", "--temperature", "0.7")
    say(b"Hello")
    document = meteora("chat", "--checkpoint", world.checkpoint, *flags, "--json").json
    assert document["mode"] == "gates: top 1, T 15"
    assert document["settings"] == {"max-new-tokens": 3, "temperature": 0.7, "top-p": 1.0, "seed": 0, "T": 15.0, "top-k": 1}
    assert "".join(token["text"] for token in document["routes"]["tokens"] if token["role"] == "prompt") == "Brief.\n\nHello"


def test_a_base_model_and_a_single_adapter(meteora, world, say) -> None:
    say(b"Hello")
    base = meteora("chat", "--base", world.base, "--max-new-tokens", "3", "--json").json
    assert base["template"] == "chat"
    assert "routes" not in base
    say(b"Hello")
    single = meteora("chat", "--adapter", world.adapters / "gamma", "--max-new-tokens", "3", "--json").json
    assert single["template"] == "chat"
    assert single["routes"]["adapters"] == ["gamma"]
    say(b"Hello")
    refused = meteora("chat", "--base", world.base, "--route")
    assert refused.code == 2
    assert "base model alone" in refused.err


def test_stdin_that_is_not_utf8_is_said(meteora, world, say) -> None:
    say(b"caf\xe9?")
    ran = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "2", "--json")
    assert ran.json["message"] == "caf\N{REPLACEMENT CHARACTER}?"
    assert "not UTF-8 at byte 4" in ran.err


def test_a_system_text_that_is_not_utf8_is_said(meteora, world, say) -> None:
    say(b"Hello")
    ran = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "2", "--json", "--system", "caf\udce9")
    assert ran.code == 0, ran.err
    assert "--system is not UTF-8 at byte 4" in ran.err


def meteora_says_a_dash_and_a_face(encoding: str, *arguments: str) -> None:
    """The command, on a stdout of this encoding, with a model whose tokens are all characters that it lacks."""
    from meteora_core.generation import engine

    sys.stdout.reconfigure(encoding=encoding)
    engine.TextDecoder.add = lambda self, token: "\u2013 \U0001f600"
    processes.meteora(*arguments)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_answer_on_a_stdout_that_is_not_utf8(world, tmp_path, encoding) -> None:
    arguments = ("chat", "--checkpoint", str(world.checkpoint), "--max-new-tokens", "3")
    done = processes.run(meteora_says_a_dash_and_a_face, encoding, *arguments, folder=tmp_path, stdin="Hello")
    assert done.code == 0, done.err
    assert done.out.startswith("? ?")


def test_a_prompt_beyond_the_context_is_cut_and_it_is_said(meteora, world, say) -> None:
    say(b"x" * 100_000)
    ran = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "4", "--json")
    assert len(ran.json["prompt_ids"]) == 508
    assert "the conversation is 100016 tokens, and the model's context of 512 leaves 508 for it" in ran.json["notice"]
    say(b"x" * 1000)
    plain = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "4")
    assert "left out" in plain.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "message"),
    [
        ((), b" \n", 2, "no message on stdin"),
        (("--checkpoint", "nowhere"), b"x", 1, "no checkpoint at nowhere"),
        (("--template", "chatt"), b"x", 2, "template"),
        (("--top-k", "4"), b"x", 2, "top-k cannot be 4"),
        (("--T", "0"), b"x", 2, "T cannot be 0"),
        (("--max-new-tokens", "0"), b"x", 2, "max_new_tokens"),
        (("--adapter", "gama"), b"x", 2, "no adapter 'gama'"),
        (("--device", "cuda:77"), b"x", 2, "cuda:77"),
    ],
)
def test_bad_input_ends_with_one_line_and_a_hint(meteora, world, say, arguments, stdin, code, message) -> None:
    say(stdin)
    where = () if "nowhere" in arguments else ("--checkpoint", world.checkpoint)
    ran = meteora("chat", *where, *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert "hint:" in ran.err
    assert "Traceback" not in ran.err


def test_tasks_declared_in_the_settings_are_checked(meteora, world, say, tmp_path) -> None:
    say(b"hello")
    (tmp_path / "m.toml").write_text('[tasks.mine]\ntrain = "a.jsonl"\ntest = "b.jsonl"\nmetric = "odd"\n')
    ran = meteora("--config", tmp_path / "m.toml", "chat", "--checkpoint", world.checkpoint)
    assert (ran.code, ran.out) == (2, "")
    assert "unknown metric 'odd'" in ran.err


def test_routes_on_a_pipe_name_the_adapters(meteora, world, say) -> None:
    say(b"Hello")
    ran = meteora("chat", "--checkpoint", world.checkpoint, "--max-new-tokens", "6", "--route")
    assert ran.code == 0
    assert any(f"<{name}>" in ran.out for name in NAMES)
    assert "\x1b" not in ran.out


# --- the loop --------------------------------------------------------------------------------------------------------------------


def feed(chat: Chat, *lines: object) -> None:
    """Run the loop over lines; an exception class among them is raised in place of a line."""
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting, EOFError)
        if isinstance(line, type):
            raise line
        return str(line)

    run_repl(chat, read)


def test_a_conversation(world) -> None:
    chat = make_chat(world)
    feed(chat, "Hello", "", KeyboardInterrupt, "//etc is a folder", "/route on", "Colours?")
    assert [turn.message for turn in chat.session.turns] == ["Hello", "/etc is a folder", "Colours?"]
    notes = shown(chat.notes)
    assert "press Ctrl-D to exit" in notes
    assert "8 written" in notes
    assert "tokens/s" in notes
    assert any(name in notes for name in NAMES)
    assert "48;2;" in chat.out.file.getvalue()
    assert "[INST] Colours? [/INST]" in shown(chat.out).replace("\n", " ").replace("  ", " ")


def test_names_of_other_programs_are_taken(world) -> None:
    chat = make_chat(world)
    feed(chat, "Hello", "/clear", "Again", "/exit", "never read")
    assert [turn.message for turn in chat.session.turns] == ["Again"]


def test_what_is_typed_while_it_writes_is_not_shown(monkeypatch) -> None:
    """The terminal's echo is off within, and back afterwards, whatever happened; without a terminal nothing is done."""
    termios = pytest.importorskip("termios")
    master, slave = os.openpty()
    try:
        with os.fdopen(slave) as terminal:
            monkeypatch.setattr(sys, "stdin", terminal)

            def echo() -> bool:
                return bool(termios.tcgetattr(terminal.fileno())[3] & termios.ECHO)

            with pytest.raises(KeyboardInterrupt), unechoed():
                assert not echo()
                raise KeyboardInterrupt
            assert echo()
    finally:
        os.close(master)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with unechoed():
        pass


def test_the_first_lines_say_what_the_model_can_do(world, tmp_path, monkeypatch) -> None:
    from meteora_cli.chat import repl
    from meteora_cli.commands import chat as command

    notes = make_console()
    monkeypatch.setattr(repl, "make_reader", lambda chat, history: lambda: (_ for _ in ()).throw(EOFError))
    monkeypatch.setattr(command, "console", notes)
    write_jsonl(tmp_path / "beta" / "test.jsonl", [{"prompt": "[INST] Say hello [/INST]\n", "response": "x"}])
    command._converse(ChatSession(open_chat_model(world)), tmp_path, route=False, quiet=False)
    assert "trained for 3 tasks and answers everything as one of them: alpha, beta, gamma." in shown(notes)
    assert "Try one of these:\n  Say hello" in shown(notes)


def test_ctrl_c_stops_the_answer_and_keeps_the_session(world) -> None:
    import signal

    chat = make_chat(world)
    chat.session.sampling = Sampling(max_new_tokens=400)
    passes = 0

    def press(*arguments: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 6:
            signal.raise_signal(signal.SIGINT)

    handle = chat.session.chat_model.model.register_forward_pre_hook(press)
    before = signal.getsignal(signal.SIGINT)
    feed(chat, "Hello", "Again")
    handle.remove()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(chat.session.turns[0].ids) == 5
    assert "stopped" in shown(chat.notes)
    assert len(chat.session.turns) == 2


def test_errors_do_not_end_the_loop(world) -> None:
    chat = make_chat(world)
    feed(chat, "/helpp", "/use nobody", "/set T -1", "Hello")
    assert len(chat.session.turns) == 1
    assert shown(chat.notes).count("error: ") == shown(chat.notes).count("hint: ") == 3


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/helpp", "unknown command /helpp", "did you mean '/help'?"),
        ("/comp", "unknown command /comp", "did you mean '/compare'?"),
        ("/zzz", "unknown command /zzz", "/help lists them"),
        ("/", "unknown command /", "/help lists them"),
        ("/use", "/use needs the name", "/adapters lists them"),
        ("/use bta", "no adapter named 'bta'", "did you mean 'beta'?"),
        ("/mute", "/mute needs the name", "/adapters lists them"),
        ("/set top-k 9", "top-k cannot be 9", "it must be a whole number from 1 to 3"),
        ("/set top-p", "/set top-p needs a value", "it must be a number above 0 and up to 1"),
        ("/set topp 1", "unknown setting 'topp'", "did you mean 'top-p'?"),
        ("/route maybe", "/route cannot be 'maybe'", "choose on or off"),
        ("/why", "there is no answer yet", "ask something first"),
        ("/compare", "there is nothing to compare yet", "ask something first"),
        ("/save", "/save needs a file", "/save talk.jsonl"),
        ("/export talk.gif", "cannot tell the format of talk.gif", ".html, .png, .svg, .json"),
        ("/load none.jsonl", "no such file", "prompt and response"),
    ],
)
def test_wrong_commands_say_what_is_right(world, line, message, hint) -> None:
    with pytest.raises(MeteoraError) as raised:
        run_command(make_chat(world), line)
    assert message in raised.value.message
    assert hint in (raised.value.hint or "")


def test_commands_change_the_session(world, tmp_path) -> None:
    chat = make_chat(world)
    for line in ("/use beta", "/mute gamma", "/set T=15", "/set top-k 3", "/system Be brief.", "/route on"):
        run_command(chat, line)
    mode = chat.session.mode
    assert (mode.forced, mode.muted, mode.routing_temperature, mode.top_k) == ("beta", {"gamma"}, 15.0, 3)
    assert (chat.session.system, chat.route) == ("Be brief.", True)
    for line in ("/use auto", "/mute gamma", "/system off", "/route"):
        run_command(chat, line)
    assert (chat.session.mode.forced, chat.session.mode.muted, chat.session.system, chat.route) == (None, frozenset(), None, False)
    feed(chat, "Hello", f"/save {tmp_path / 'talk.jsonl'}", "/new", f"/load {tmp_path / 'talk.jsonl'}")
    assert [turn.message for turn in chat.session.turns] == ["Hello"]
    assert "1 of the answers were cut short" in " ".join(shown(chat.notes).split())
    (tmp_path / "talk.jsonl").write_text('{"prompt": "a", "response": "b"}\n[]\n')
    with pytest.raises(DataError, match=r"talk.jsonl:2 is not a JSON object"):
        run_command(chat, f"/load {tmp_path / 'talk.jsonl'}")
    with pytest.raises(Quit):
        run_command(chat, "/quit")


@pytest.mark.parametrize("width", [40, 100])
def test_tables_fit_the_terminal(world, width) -> None:
    chat = make_chat(world, width=width)
    feed(chat, "Hello", "/help", "/set", "/adapters", "/why", "/compare beta", "/compare alpha What now?")
    text = shown(chat.out)
    assert max(map(len, text.splitlines())) <= width
    for name in (*COMMANDS, *NAMES, "temperature"):
        assert name in text
    assert text.count("MeteoRA (inst)") == 2
    assert "adapter beta (inst)" in text
    assert "adapter alpha (inst)" in text
    assert all(kind in text for kind in ("gate", "down"))
    assert chat.session.turns[-1].message == "Hello"


@pytest.mark.parametrize("ending", ["html", "png", "svg", "json"])
def test_exports(world, tmp_path, ending) -> None:
    chat = make_chat(world)
    path = tmp_path / f"talk.{ending}"
    feed(chat, "Hello", "More", f"/export {path}")
    content = path.read_bytes()
    start = {"html": b"<!DOCTYPE html>", "png": b"\x89PNG", "svg": b"<svg", "json": b"{"}[ending]
    assert content.startswith(start)
    if ending == "svg":
        assert b"@font-face" not in content
        assert b"url(http" not in content
        assert all(f">{letter}<".encode() in content for letter in "Hello")


# --- colours ---------------------------------------------------------------------------------------------------------------------


def test_without_colour_the_adapters_are_named(world) -> None:
    for options in ({"no_color": True}, {"color_system": None}, {"force_terminal": False, "color_system": None}):
        painter = Painter(make_console(**options), NAMES)
        assert painter.style(0, 0.5) == Style.null()
        pieces = [text for adapter in (0, 0, 2, 0) for text, _ in painter.pieces("x", adapter, 0.5)]
        assert pieces == ["<alpha> ", "x", "x", "<gamma> ", "x", "<alpha> ", "x"]


def test_with_few_colours_adapters_differ() -> None:
    for system, count in (("standard", 7), ("256", 5), ("truecolor", 7)):
        painter = Painter(make_console(color_system=system), [str(index) for index in range(28)])
        assert len({str(painter.style(index, 0.9)) for index in range(28)}) == 28
        assert len({painter.style(index, 0.9).bgcolor for index in range(7)}) >= count
        assert all(painter.style(index, 0.9).color is not None for index in range(28))


def test_streaming_wraps_at_words_and_loses_nothing() -> None:
    console = make_console(width=20, color_system=None)
    printer = StreamPrinter(console)
    text = "The quick bro" + "wn fox jumps\n\nover the lazy dog " + "x" * 30 + " end"
    for start in range(0, len(text), 3):
        printer.add(text[start : start + 3], Style.null())
    printer.end()
    lines = console.file.getvalue().splitlines()
    assert lines[:5] == ["The quick brown fox", "jumps", "", "over the lazy dog ", "x" * 30 + " end"]
    assert "".join(text.split()) == "".join(console.file.getvalue().split())


def test_ctrl_c_between_two_prompts_keeps_the_session(world, monkeypatch) -> None:
    chat = make_chat(world)
    lines, said = [KeyboardInterrupt(), "/quitt", EOFError()], []

    def read() -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "say", say)
    run_repl(chat, read)
    assert said[0] == "press Ctrl-D to exit"
    assert "unknown command /quitt" in shown(chat.notes)


def test_large_pastes_stand_as_marks() -> None:
    pastes = Pastes()
    text = "y" * (LARGE_PASTE + 1)
    line = f"What is {pastes.mark(text)} and {pastes.mark('z')}?"
    assert line == "What is [pasted text 1: 2,001 characters] and [pasted text 2: 1 characters]?"
    assert pastes.expand(line) == f"What is {text} and z?"


def test_completion_of_commands_and_their_words(world) -> None:
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from meteora_cli.chat.repl import _completer

    completer = _completer(make_chat(world))

    def complete(line: str) -> list[str]:
        return [found.text for found in completer.get_completions(Document(line), CompleteEvent())]

    assert complete("/") == list(COMMANDS)
    assert complete("/s") == ["system", "set", "save"]
    assert complete("/use ") == ["auto", *NAMES]
    assert complete("/mute g") == ["gamma"]
    assert complete("/set t") == ["temperature", "top-p", "top-k"]
    assert complete("/route o") == ["on", "off"]
    assert complete(f"/load {world.base.parent}/ba") == ["se"]
    for line in ("hello", "//s", "/set T ", "/unknown x"):
        assert complete(line) == []


# --- a real terminal -------------------------------------------------------------------------------------------------------------


class Terminal:
    """A tmux window that runs a command."""

    def __init__(self, command: str, *, width: int, height: int = 40, environment: dict[str, str], folder: Path) -> None:
        self._socket = f"meteora-test-{os.getpid()}-{width}"
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        line = f"cd {shlex.quote(str(folder))}; {settings} {command}; echo ended with $?; sleep 600"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-s", "chat", "-x", str(width), "-y", str(height), line)

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run(["tmux", "-L", self._socket, *arguments], check=True, capture_output=True, text=True).stdout

    def keys(self, *keys: str) -> None:
        self._tmux("send-keys", "-t", "chat", *keys)

    def paste(self, path: Path) -> None:
        self._tmux("load-buffer", str(path))
        self._tmux("paste-buffer", "-p", "-t", "chat")

    def screen(self, *, colours: bool = False) -> str:
        return self._tmux("capture-pane", "-p", "-S", "-200", "-t", "chat", *(["-e"] if colours else []))

    def wait(self, text: str, seconds: float = 60) -> str:
        """Wait until ``text`` is on the screen."""
        until = time.monotonic() + seconds
        while text not in (now := self.screen()):
            assert time.monotonic() < until, f"{text!r} did not appear:\n{now}"
            time.sleep(0.1)
        return now

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.mark.slow
@pytest.mark.parametrize("width", [40, 100])
def test_in_a_real_terminal(world, tmp_path, width) -> None:
    """Prompt, completion, colours, a 100 kB paste, Ctrl-C and Ctrl-D in tmux. Without tmux: the same lines through the loop."""
    if shutil.which("tmux") is None:
        chat = make_chat(world, width=width)
        feed(chat, "/route on", "Hello", "x" * 100_000)
        assert "48;2;" in chat.out.file.getvalue()
        assert "left out" in shown(chat.notes)
        return
    (tmp_path / "paste.txt").write_text("The river flows. " * 6000)
    environment = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "METEORA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = f"{shlex.quote(sys.executable)} -m meteora_cli chat --checkpoint {shlex.quote(str(world.checkpoint))} --max-new-tokens 24"
    terminal = Terminal(command, width=width, environment=environment, folder=tmp_path)
    try:
        terminal.wait("gates: top 2")
        terminal.keys("/ro")
        time.sleep(0.5)
        terminal.keys("Tab")
        time.sleep(0.5)
        terminal.keys(" on", "Enter")
        terminal.wait("colours by adapter are on")
        terminal.keys("Hello", "M-Enter", "there", "Enter")
        terminal.wait("written")
        assert "48;2;" in terminal.screen(colours=True) or "48;5;" in terminal.screen(colours=True)
        terminal.paste(tmp_path / "paste.txt")
        terminal.wait("[pasted text 1: 102,000")
        terminal.keys(" What is it?", "Enter")
        terminal.wait("left out")
        time.sleep(2)
        terminal.keys("C-c")
        terminal.keys("C-c")
        terminal.wait("press Ctrl-D to exit")
        terminal.keys("/quitt", "Enter")
        terminal.wait("unknown command /quitt")
        terminal.keys("C-d")
        terminal.wait("ended with 0")
    finally:
        terminal.close()
    history = (tmp_path / "cache" / "chat_history").read_text()
    assert "+Hello\n+there\n" in history
    assert oct((tmp_path / "cache" / "chat_history").stat().st_mode & 0o777) == "0o600"

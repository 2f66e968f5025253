"""The help of every command: examples that can be typed, defaults, and switches that do not look as if they took a value."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from meteora_cli.help_pages import EXAMPLES, panel_of
from meteora_cli.option_settings import OPTION_SETTINGS
from meteora_cli.tree import command
from meteora_core.settings import default_of, setting_names


def tree(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with the words that name it."""
    yield path, item
    for name, child in getattr(item, "commands", {}).items():
        yield from tree(child, f"{path} {name}".strip())


COMMANDS = dict(tree(command()))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path or "meteora")
def test_the_help_of_every_command(meteora, path) -> None:
    ran = meteora(*path.split(), "--help")
    assert ran.code == 0
    assert "<bool>" not in ran.out
    for line in EXAMPLES[path]:
        assert line in ran.out


def words_of(line: str) -> list[str]:
    return shlex.split(line.rpartition("| ")[2])[1:]


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_are_understood(line) -> None:
    """Each is parsed down to its last command; nothing is run."""
    words, item, context = words_of(line), command(), None
    while True:
        context = item.make_context("meteora", list(words), parent=context, resilient_parsing=True)
        rest = [*getattr(context, "_protected_args", getattr(context, "protected_args", [])), *context.args]
        if not rest or not hasattr(item, "commands"):
            break
        name, item, words = item.resolve_command(context, rest)
        assert item is not None, name
    given = {word.partition("=")[0] for word in words_of(line) if re.fullmatch(r"--?[A-Za-z]\S*", word)}
    known = {flag for _, each in COMMANDS.items() for parameter in each.params for flag in parameter.opts}
    own = {flag for parameter in (*item.params, *command().params) for flag in (*parameter.opts, *parameter.secondary_opts)}
    assert given <= own, f"{given - own} ({'of another command' if given <= known else 'unknown'})"


@pytest.mark.parametrize("path", OPTION_SETTINGS)
def test_options_that_are_settings_show_the_settings_default(meteora, path) -> None:
    bound, parameters = OPTION_SETTINGS[path], {parameter.name: parameter for parameter in COMMANDS[path].params}
    assert set(bound.values()) <= set(setting_names())
    assert all(parameters[name].default is None for name in bound)
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", meteora(*path.split(), "--help").out).split())
    for name, setting in bound.items():
        if not isinstance(default := default_of(setting), bool | None) and default not in ([], ""):
            assert f"[default: {default}]" in shown, name


def test_the_panels_name_options_that_exist() -> None:
    for path in ("eval", "chat", "serve", "trace"):
        assert all(panel_of(path, parameter.name) for parameter in COMMANDS[path].params if parameter.opts[0].startswith("-") and parameter.name != "help")


def test_the_default_of_an_option_stays_that_of_the_setting_after_its_help_was_shown(meteora) -> None:
    before = [(parameter.name, parameter.default) for parameter in COMMANDS["train gates"].params]
    meteora("train", "gates", "--help")
    assert [(parameter.name, parameter.default) for parameter in COMMANDS["train gates"].params] == before

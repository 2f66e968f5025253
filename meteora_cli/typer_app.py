"""Typer classes whose help shows examples, and the defaults of options that are settings.

An option that is a setting is listed in :data:`OPTION_SETTINGS`. Its default is None, which means that it was not given, so that the environment and
meteora.toml apply. :func:`meteora_cli.console.settings_from` collects the given options, and the help shows the default of the setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import cleandoc
from typing import Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from meteora_cli.option_groups import with_option_groups
from meteora_cli.option_settings import OPTION_SETTINGS


def path_of(ctx: typer.Context) -> str:
    """Return the full name of a context's command without the program's name, such as ``"train gates"``."""
    return ctx.command_path.partition(" ")[2]


@contextmanager
def help_completed(command: Any, path: str) -> Iterator[None]:
    """Add panels, and the defaults of options that are settings, to a command while the block runs, for its help.

    Args:
        command: A command or group in the command tree.
        path: The full name of the command, such as ``"train gates"``.
    """
    from meteora_cli.help_pages import panel_of

    bound, changed = OPTION_SETTINGS.get(path, {}), []
    for parameter in command.params:
        if getattr(parameter, "rich_help_panel", None) is None and hasattr(parameter, "is_flag"):
            parameter.rich_help_panel = panel_of(path, parameter.name)
    if bound:
        from meteora_core.settings import default_of

        for parameter in command.params:
            default = default_of(bound[parameter.name]) if parameter.name in bound else None
            if default is not None:
                changed.append((parameter, parameter.default, parameter.show_default))
                parameter.default, parameter.show_default = default, True
    try:
        yield
    finally:
        for parameter, before, shown in changed:
            parameter.default, parameter.show_default = before, shown


@contextmanager
def set_for_terminal(command: Any) -> Iterator[None]:
    """While the block runs, each paragraph of a command's help is one line, which the terminal breaks, and options that can be repeated show the type of
    one value.
    """
    text = command.help
    repeated = [parameter for parameter in command.params if getattr(parameter, "multiple", False) and parameter.metavar is None]
    if text is not None:
        paragraphs = cleandoc(text).split("\n\n")
        command.help = "\n\n".join(each if each.startswith("\b") else each.replace("\n", " ") for each in paragraphs)
    for parameter in repeated:
        (element,) = get_args(parameter.type_descriptor.annotation)
        parameter.metavar = f"<{element.__name__.lower()}>"
    try:
        yield
    finally:
        command.help = text
        for parameter in repeated:
            parameter.metavar = None


def show_examples(path: str) -> None:
    """Print the examples of a command, which are the end of its help."""
    from meteora_cli.display import put
    from meteora_cli.help_pages import EXAMPLES

    for line in (" Examples:", *(f"   {line}" for line in EXAMPLES[path])) if path in EXAMPLES else ():
        put(line)


def flags_without_type(parameters: list[Any]) -> list[Any]:
    """Remove the type of switches, so that the help does not suggest that they take a value, and return the parameters."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) or getattr(parameter, "count", False):
            parameter.metavar = ""
    return parameters


class _Helpful:
    """A mixin for commands: their help shows examples, and the defaults of options that are settings."""

    def get_params(self, ctx: Any) -> Any:
        return flags_without_type(super().get_params(ctx))  # type: ignore[misc]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with help_completed(self, path_of(ctx)), set_for_terminal(self):
            super().format_help(ctx, formatter)  # type: ignore[misc]
        show_examples(path_of(ctx))


class HelpfulCommand(_Helpful, TyperCommand):
    """A command whose help shows examples, and the defaults of options that are settings."""


class HelpfulGroup(_Helpful, TyperGroup):
    """A group of commands whose help shows examples, and the defaults of options that are settings."""


class App(typer.Typer):
    """A :class:`typer.Typer` that uses :class:`HelpfulCommand` and :class:`HelpfulGroup` unless other classes are given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"cls": HelpfulGroup, **options})

    def command(self, name: str | None = None, **options: Any) -> Any:
        """Return a decorator that registers a command, as Typer does. Groups of options in its signature become options."""
        register = super().command(name, **{"cls": HelpfulCommand, **options})
        return lambda function: register(with_option_groups(function))

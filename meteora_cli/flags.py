"""Flags that would have no effect are refused, instead of being ignored.

An option of a command says by its help panel which kind of run it belongs to (:func:`refuse_panels`); what depends on other flags or settings is asked by
:func:`refuse_without_effect`. Only flags on the command line count: settings and the environment serve many commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import typer


def given_flags(ctx: typer.Context) -> dict[str, str]:
    """The parameters that were given on the command line, by name, each with its longest flag (a switch that was turned off with that flag)."""
    found = {}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flags = parameter.secondary_opts if ctx.params.get(name) is False and parameter.secondary_opts else parameter.opts
            found[name] = max(flags, key=len)
    return found


def refuse_panels(ctx: typer.Context, panels: Iterable[str], belongs: str, hint: str) -> None:
    """Raise UsageError when a flag was given whose help panel is one of ``panels``; ``belongs`` says where such flags belong."""
    from meteora_core.errors import UsageError

    wrong = set(panels)
    given = given_flags(ctx)
    flags = [given[item.name] for item in ctx.command.params if item.name in given and getattr(item, "rich_help_panel", None) in wrong]
    if flags:
        raise UsageError(f"{_listed(flags)} {'belongs' if len(flags) == 1 else 'belong'} to {belongs}", hint=hint)


def refuse_without_effect(ctx: typer.Context, needs: Mapping[str, tuple[bool, str]]) -> None:
    """Raise UsageError for a flag that was given although it has no effect.

    Args:
        ctx: The context of the command.
        needs: For each parameter, whether its flag has an effect, and what it would need to have one, such as ``"--launcher ddp"``.
    """
    from meteora_core.errors import UsageError

    given = given_flags(ctx)
    for name, (effective, what) in needs.items():
        if name in given and not effective:
            raise UsageError(f"{given[name]} has no effect here: it needs {what}", hint=f"leave out {given[name]}, or use {what}")


def _listed(flags: list[str]) -> str:
    return flags[0] if len(flags) == 1 else f"{', '.join(flags[:-1])} and {flags[-1]}"

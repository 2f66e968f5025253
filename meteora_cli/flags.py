"""Flags that would have no effect are refused, instead of being ignored.

What depends on other flags or settings is asked by :func:`refuse_without_effect`. Only flags on the command line count: settings and the environment serve
many commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer


def comma_separated(text: str | None) -> list[str]:
    """The names in the value of a flag such as ``--task a,b``; none where it was not given."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def name_of_flag(flags: Sequence[str]) -> str:
    """The flag that messages use: the first long one."""
    return next((flag for flag in flags if flag.startswith("--")), flags[0])


def given_flags(ctx: typer.Context) -> dict[str, str]:
    """The parameters that were given on the command line, by name, each with its flag (a switch that was turned off with that flag)."""
    found = {}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            found[name] = name_of_flag(parameter.secondary_opts if ctx.params.get(name) is False and parameter.secondary_opts else parameter.opts)
    return found


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


def typed_template(text: str | None) -> str | None:
    r"""The value of ``--template``: ``\n`` and ``\t`` stand for a line break and a tab."""
    if text is None:
        return None
    from meteora_core.data.frames import typed

    return typed(text)

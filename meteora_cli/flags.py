"""Refuses flags that would have no effect, instead of ignoring them.

:func:`refuse_without_effect` checks flags whose effect depends on other flags or settings. It ignores settings and the environment, which are shared by
many commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import typer


def comma_separated(text: str | None) -> list[str]:
    """Return the names in the value of a flag such as ``--task a,b``; an empty list if the flag was not given."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def name_of_flag(flags: Sequence[str]) -> str:
    """Return the name of a flag for messages: the first long one."""
    return next((flag for flag in flags if flag.startswith("--")), flags[0])


def given_flags(ctx: typer.Context) -> dict[str, str]:
    """Return the flag of each parameter that was given on the command line, by the parameter's name; for a disabled switch, the flag that disables it."""
    given = {}
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            given[name] = name_of_flag(parameter.secondary_opts if ctx.params.get(name) is False and parameter.secondary_opts else parameter.opts)
    return given


def refuse_without_effect(ctx: typer.Context, needs: Mapping[str, tuple[bool, str]]) -> None:
    """Raise UsageError for a flag that was given although it has no effect.

    Args:
        ctx: The context of the command.
        needs: For each parameter, whether its flag has an effect, and what the flag requires to have one, such as ``"--launcher ddp"``.
    """
    from meteora_core.errors import UsageError

    given = given_flags(ctx)
    for name, (effective, what) in needs.items():
        if name in given and not effective:
            raise UsageError(f"{given[name]} has no effect here: it needs {what}", hint=f"leave out {given[name]}, or use {what}")


def typed_template(text: str | None) -> str | None:
    r"""Return the value of ``--template``, in which ``\n`` and ``\t`` denote a line break and a tab."""
    if text is None:
        return None
    from meteora_core.data.frames import typed

    return typed(text)

"""Commands in the test's own process, and the registered tasks that they may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from typer.testing import CliRunner, Result

from meteora_cli.console import Globals
from meteora_core.data import tasks
from meteora_core.errors import MeteoraError


def command_runner(name: str, group: typer.Typer) -> Callable[..., Result]:
    """A function that runs ``meteora NAME`` with arguments and expects success, or with ``fails`` the error of that type."""
    app = typer.Typer()

    @app.callback()
    def options(ctx: typer.Context) -> None:
        ctx.obj = Globals()

    app.add_typer(group, name=name)

    def run(*arguments: object, fails: type[MeteoraError] | None = None) -> Result:
        result = CliRunner().invoke(app, [name, *map(str, arguments)])
        if fails is None:
            assert result.exit_code == 0, (result.output, result.exception)
        else:
            assert isinstance(result.exception, fails), (result.output, result.exception)
        return result

    return run


@contextmanager
def restored_tasks() -> Iterator[None]:
    """Forget the tasks that are registered within the block."""
    before = dict(tasks.TASKS)
    try:
        yield
    finally:
        tasks.TASKS.clear()
        tasks.TASKS.update(before)

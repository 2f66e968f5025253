"""The table that ``meteora eval`` updates while it runs: the progress, results and warnings of every task and model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import Progress as Bars
from rich.text import Text

from meteora_cli.commands.eval_tables import result_line, short_warnings
from meteora_cli.console import _columns, _RichProgress, globals_of, progress
from meteora_cli.display import DataTable, cell, console

if TYPE_CHECKING:
    from meteora_core.evaluation.runner import TaskResult
    from meteora_core.progress import Progress, ProgressBar

OnResult = Callable[[str, "TaskResult"], None]


class EvalTable(_RichProgress):
    """A Progress for an evaluation that also shows the progress of tasks in the cells of a table.

    Args:
        models: The names of the models, which are the columns.
        tasks: The names of the tasks, which are the rows.
    """

    def __init__(self, models: Sequence[str], tasks: Sequence[str]) -> None:
        self.bars = Bars(*_columns(), console=console, auto_refresh=False)
        super().__init__(self.bars, plain=False)
        self.models, self.tasks = list(models), list(tasks)
        self.cells: dict[str, Text] = {}
        self.warnings: dict[str, list[str]] = {}
        self.current = 0

    @contextmanager
    def task(self, title: str, *, total: float | None = None, unit: str = "it") -> Iterator[ProgressBar]:
        """Show a bar below the table; a bar with the title ``model: task`` also updates its cell."""
        with super().task(title, total=total, unit=unit) as bar:
            known = title in {f"{model}: {task}" for model in self.models for task in self.tasks}
            if known:
                self.current = self.tasks.index(title.rpartition(": ")[2])
            yield _Both(bar, self, title, total) if known else bar
        self.bars.remove_task(self.bars.task_ids[-1])

    def done(self, model: str, result: TaskResult) -> None:
        """Write the main metric and the warnings of a task into the table."""
        from meteora_core.evaluation.runner import headline

        shown = Text("all skipped", style="yellow")
        if result.samples:
            name, value = headline(result)
            shown = Text(f"{name} {value:.3f}", style="green")
        self.cells[f"{model}: {result.task.name}"] = shown
        self.warnings.setdefault(result.task.name, []).extend(f"{model}: {text}" for text in short_warnings(result))

    def __rich__(self) -> RenderableType:
        table = DataTable("task", *self.models, "warnings")
        room = max(3, console.height - len(self.bars.tasks) - 7)
        first = max(0, min(self.current - room // 2, len(self.tasks) - room))
        for task in self.tasks[first : first + room]:
            cells = [self.cells.get(f"{model}: {task}", Text("·", style="dim")) for model in self.models]
            table.add_row(task, *cells, cell("; ".join(self.warnings.get(task, ())), "yellow", overflow="ellipsis", no_wrap=True))
        hidden = len(self.tasks) - min(room, len(self.tasks))
        if hidden:
            table.caption = f"{hidden} more tasks"
        return Group(table, self.bars.get_renderable())


class _Both:
    """A bar that also updates a cell."""

    def __init__(self, bar: ProgressBar, table: EvalTable, key: str, total: float | None) -> None:
        self._bar, self._table, self._key, self._total, self._done = bar, table, key, total or 0, 0.0

    def update(self, advance: float = 0, *, total: float | None = None, **fields: str) -> None:
        self._bar.update(advance, total=total, **fields)
        self._done += advance
        self._table.cells[self._key] = Text(f"{self._done:.0f}/{self._total:.0f}", style="cyan")


@contextmanager
def eval_progress(ctx: typer.Context, models: Sequence[str], tasks: Sequence[str]) -> Iterator[tuple[Progress, OnResult]]:
    """Yield a Progress, and a function to call with the result of each task and model; without a terminal, it prints one line per result."""
    if globals_of(ctx).quiet or not console.is_terminal:
        with progress(ctx) as bars:
            yield bars, lambda model, result: bars.note(result_line(model, result))
        return
    table = EvalTable(models, tasks)
    with Live(console=console, get_renderable=lambda: table, refresh_per_second=4, transient=True):
        yield table, table.done

"""Tables and panels that slash commands of the chat print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from meteora_cli.chat.answer import interruptible
from meteora_cli.chat.render import Painter
from meteora_cli.display import DataTable, body, cell, panel
from meteora_core.generation.requests import Finished, Written
from meteora_core.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from torch import Tensor

    from meteora_core.chat.conversation import Conversation
    from meteora_core.trace.picture import RoutePicture

NARROW = 72
"""The width in characters below which tables have fewer columns and panels are stacked."""
SPANS = 40
"""The largest number of rows in the table of /why."""


def _table(*columns: str) -> DataTable:
    table = DataTable(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show_help(out: Console, commands: dict[str, tuple[str, str]]) -> None:
    """Print the commands and the keys."""
    table = _table("command", "")
    for name, (usage, text) in commands.items():
        table.add_row(Text(f"/{name} {usage}".rstrip(), "bold"), text)
    out.print(table)
    out.print(Text("Enter sends, Alt-Enter (or Esc, Enter) starts a new line, Tab completes, Ctrl-C stops an answer, Ctrl-D exits.", "dim"))


def show_settings(out: Console, session: Conversation) -> None:
    """Print the settings that /set can change, with their ranges."""
    table = _table("setting", "value", "range") if out.width < NARROW else _table("setting", "value", "range", "")
    values = session.values()
    for name, option in session.options().items():
        value = values[name]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        cells: list[Text | str] = [Text(name, "bold"), shown, option.range(), option.text]
        table.add_row(*cells[: len(table.columns)])
    out.print(table)


def show_adapters(out: Console, session: Conversation) -> None:
    """Print the adapters of the bank."""
    session.check_adapters()
    painter = Painter(out, session.names)
    narrow = out.width < NARROW
    table = _table("", "adapter", "rank") if narrow else _table("", "adapter", "rank", "alpha", "from", "")
    for index, adapter in enumerate(session.adapter_rows()):
        mode = session.mode
        status = "forced" if mode.forced == adapter.name else "muted" if adapter.name in mode.muted else ""
        mark, style = painter.swatch(index)
        name, rank = cell(adapter.name, "bold"), "" if adapter.rank is None else str(adapter.rank)
        if narrow:
            table.add_row(Text(mark, style), name.append(f" {status}", "not bold"), rank)
        else:
            table.add_row(Text(mark, style), name, rank, adapter.alpha, adapter.source, status)
    out.print(table)


def _top(names: Sequence[str], shares: Tensor, most: int = 3) -> str:
    order = sorted(range(len(names)), key=lambda index: -float(shares[index]))
    return ", ".join(f"{names[index]} {100 * float(shares[index]):.0f} %" for index in order[:most] if float(shares[index]) >= 0.005)


def show_why(out: Console, picture: RoutePicture) -> None:
    """Print the routes of the last answer: its spans by adapter, then the mean weights by kind of layer."""
    painter = Painter(out, picture.names)
    spans = picture.spans("answer")
    table = _table("", "tokens", "text", "mean weights")
    for span in spans[:SPANS]:
        mark, style = painter.swatch(span.adapter)
        text = printable(span.text, multiline=True).replace("\n", "⏎")
        shown = text if len(text) <= 60 else f"{text[:40]} … {text[-16:]}"
        table.add_row(Text(mark, style), f"{span.start}–{span.end - 1}", Text(shown), _top(picture.names, span.shares))
    out.print(table)
    if len(spans) > SPANS:
        out.print(Text(f"and {len(spans) - SPANS} more spans: /export shows them all", "dim"))
    kinds = _table("linear", "mean weights over the answer")
    for kind, row in zip(picture.kinds, picture.by_kind("answer"), strict=True):
        kinds.add_row(Text(kind, "bold"), _top(picture.names, row))
    out.print()
    out.print(kinds)
    out.print()
    out.print(painter.legend(picture.total("answer")))


def show_comparison(out: Console, notes: Console, session: Conversation, adapter: str | None, message: str | None) -> None:
    """Print the answers of several models side by side, or one below the other in a narrow terminal."""
    labels: list[str] = []
    texts: list[str] = []
    ends: list[str] = []
    with interruptible() as stop, notes.status("comparing") as status:
        for item in session.compare(adapter=adapter, message=message, stop=stop.is_set):
            if item.column == len(labels):
                labels.append(item.label)
                texts.append("")
                ends.append("")
            if isinstance(item.event, Written):
                texts[item.column] += item.event.text
                status.update(cell(f"{item.column + 1} of {item.columns}: {item.label}, {len(texts[item.column])} characters"))
            elif isinstance(item.event, Finished):
                texts[item.column] = item.event.text
                cut = {"end": "", "length": ", cut", "context": ", cut", "stopped": ", stopped"}[item.event.reason]
                ends[item.column] = f"{item.event.length} tokens{cut}"
    panels = [panel(body(text.strip()), label, subtitle=cell(end, "dim")) for label, text, end in zip(labels, texts, ends, strict=True)]
    if out.width < NARROW or not panels:
        out.print(Group(*panels))
        return
    grid = DataTable.grid(expand=True)
    for _ in panels:
        grid.add_column(ratio=1)
    grid.add_row(*panels)
    out.print(grid)

"""Writes pictures of routes, in the format that the file's extension selects."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.errors import UsageError
from meteora_core.files import atomic_write
from meteora_core.json_files import write_json

if TYPE_CHECKING:
    from meteora_core.trace.picture import RoutePicture

FORMATS = (".html", ".png", ".svg", ".json")


def check_format(path: Path) -> None:
    """Raise UsageError unless the extension is one of :data:`FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"cannot tell the format of {path}", hint=f"choose a name that ends in {', '.join(FORMATS)}")


def write_picture(picture: RoutePicture, path: Path, title: str) -> None:
    """Write a picture as an HTML page, a PNG or SVG image, or a JSON document.

    Raises:
        UsageError: The extension is unknown, or matplotlib, which PNG requires, is not installed.
        StorageError: The file cannot be written.
    """
    check_format(path)
    kind = path.suffix.lower()
    if kind == ".json":
        write_json(path, picture.to_json())
        return
    if kind == ".png":
        from meteora_core.trace.image import to_png

        data = to_png(picture, title)
        with atomic_write(path, "wb") as handle:
            handle.write(data)
        return
    if kind == ".svg":
        text = to_svg(picture, title)
    else:
        from meteora_core.trace.html import to_html

        text = to_html(picture, title)
    with atomic_write(path) as handle:
        handle.write(text)


def to_svg(picture: RoutePicture, title: str, width: int = 96) -> str:
    """Return the coloured text as Rich's SVG export draws it, without the web font that it would fetch."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    from meteora_cli.chat.render import Painter, picture_text
    from meteora_cli.display import Terminal, cell

    console = Terminal(record=True, file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", no_color=False)
    painter = Painter(console, picture.names)
    answer = any(token.role == "answer" for token in picture.tokens)
    console.print(picture_text(picture, painter))
    console.print()
    console.print(painter.legend(picture.total("answer" if answer else None), most=32))
    console.print(cell(" · ".join(f"{key} {value}" for key, value in picture.about.items()), style="dim"))
    local = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title=title, code_format=local)

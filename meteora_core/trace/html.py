"""The routes of one text as a single HTML file, which needs no network. Without JavaScript it lacks only the interactive parts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from meteora_core.trace.palette import PATTERNS, look
from meteora_core.trace.picture import RoutePicture, Token

WIDEST = 500
"""Maximum number of columns in the token map. In a longer text, a column covers several tokens."""
_LISTED = 6
_SLOT = re.compile(r"\{\{(\w+)\}\}")


def to_html(picture: RoutePicture, title: str = "Routing") -> str:
    """Render the page. All text of the model and the user is escaped, and a content security policy allows only the page's own script.

    Args:
        picture: The routes to show.
        title: Title of the page.
    """
    package = files("meteora_core.trace")
    script = (package / "page_script.html").read_text(encoding="utf-8")
    has_answer = any(token.role == "answer" for token in picture.tokens)
    slots = {
        "title": escape(title),
        "about": " · ".join(f"<b>{escape(key)}</b> {escape(value)}" for key, value in {**picture.about, **_counts(picture)}.items()),
        "styles": _styles(len(picture.names)),
        "layer_count": str(len(picture.layers)),
        "kind_options": "".join(f'<option value="{escape(kind)}">{escape(kind)}</option>' for kind in picture.kinds),
        "legend": _legend(picture, has_answer),
        "text": _text(picture),
        "bin_note": _bin_note(len(picture.tokens)),
        "token_map": _token_map(picture),
        "layer_scope": ", over the answer's tokens" if has_answer else "",
        "layer_map": _grid(picture.by_layer("answer" if has_answer else None), [f"layer {number}" for number in picture.layers], picture.names, "layer-map"),
        "kind_map": _grid(picture.by_kind("answer" if has_answer else None), list(picture.kinds), picture.names, "kind-map"),
        "data": _data(picture, has_answer),
        "script": script,
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    page = (package / "page.html").read_text(encoding="utf-8")
    return _SLOT.sub(lambda slot: slots[slot[1]], page)


def _counts(picture: RoutePicture) -> dict[str, str]:
    answer = sum(token.role == "answer" for token in picture.tokens)
    return {
        "tokens": f"{len(picture.tokens) - answer} read, {answer} written",
        "layers": f"{len(picture.paths)} linears in {len(picture.layers)} decoder layers",
    }


def _styles(count: int) -> str:
    light, dark = [], []
    for index in range(count):
        style = look(index)
        light.append(f".a{index} {{ --hue: {style.hue}; --tint: {style.light}; --mark: {_mark(style.hue, style.pattern)}; fill: {style.hue}; }}")
        dark.append(f".a{index} {{ --tint: {style.dark}; }}")
    return "\n".join(light) + "\n@media (prefers-color-scheme: dark) {\n" + "\n".join(dark) + "\n}"


def _mark(hue: str, pattern: str) -> str:
    """The strip under a token, as a CSS image."""
    gaps = {
        "plain": f"linear-gradient({hue}, {hue})",
        "dashed": f"repeating-linear-gradient(90deg, {hue} 0 6px, transparent 6px 9px)",
        "dotted": f"repeating-linear-gradient(90deg, {hue} 0 2px, transparent 2px 4px)",
        "double": f"linear-gradient({hue} 0 33%, transparent 33% 67%, {hue} 67%)",
    }
    assert set(gaps) == set(PATTERNS)
    return gaps[pattern]


def _legend(picture: RoutePicture, has_answer: bool) -> str:
    totals = picture.total("answer" if has_answer else None).tolist()
    return "".join(
        f'<li><span class="swatch a{index}"></span>{escape(name)} <output data-a="{index}">{_percent(totals[index])}</output></li>'
        for index, name in enumerate(picture.names)
    )


def _percent(value: float) -> str:
    return f"{100 * value:.{1 if value < 0.0995 else 0}f} %"


def _text(picture: RoutePicture) -> str:
    speakers, shares = picture.speakers().tolist(), picture.shares()
    parts: list[str] = []
    role = None
    for position, token in enumerate(picture.tokens):
        if token.role != role:
            parts.append(f'{"</div>" if role else ""}<h3>{token.role.capitalize()}</h3><div class="text">')
            role = token.role
        parts.append(_token(picture, position, token, speakers[position], shares[position]))
    return "".join(parts) + ("</div>" if role else "")


def _token(picture: RoutePicture, position: int, token: Token, adapter: int, shares: Tensor) -> str:
    order = torch.argsort(shares, descending=True, stable=True)[:_LISTED].tolist()
    listed = ", ".join(f"{picture.names[index]} {_percent(float(shares[index]))}" for index in order if float(shares[index]) > 0)
    text = _visible(token.text)
    special = " special" if re.fullmatch(r"<[|/]?\w+[|]?>", token.text) else ""
    return (
        f'<span class="t a{adapter}{special}" style="--w:{float(shares[adapter]):.3f}" data-t="{position}" data-id="{token.id}" '
        f'data-role="{token.role}" data-text="{_attribute(token.text)}" title="{escape(listed)}">{text}</span>'
    )


def _visible(text: str) -> str:
    """Escape a text and mark what would be invisible: line ends, tabs, parts of a character, control and direction characters."""
    if not text:
        return "<wbr>·"
    marked = "".join(_mark_of(character) for character in text)
    return marked.replace("\n", "⏎\n").replace("\t", "→\t")


def _mark_of(character: str) -> str:
    if character in "\n\t" or character.isprintable():
        return escape(character)
    return f"⟨{ord(character):x}⟩" if ord(character) != 0x200D else "\N{ZERO WIDTH JOINER}"


def _attribute(text: str) -> str:
    return escape(text).replace("\n", "&#10;").replace("\t", "&#9;").replace("\r", "&#13;").replace("\0", "")


def _bins(count: int) -> list[tuple[int, int]]:
    size = -(-count // WIDEST) if count else 1
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _bin_note(count: int) -> str:
    size = -(-count // WIDEST) if count else 1
    return "" if size == 1 else f" One column is {size} tokens."


def _token_map(picture: RoutePicture) -> str:
    bins, shares = _bins(len(picture.tokens)), picture.shares()
    label, height = _label_width(picture.names), 16
    width = max(3, min(14, 900 // max(1, len(bins))))
    cells, texts = [], []
    for index, name in enumerate(picture.names):
        texts.append(f'<text x="{label - 6}" y="{index * height + 12}" text-anchor="end">{escape(name)}</text>')
        for column, (start, end) in enumerate(bins):
            value = float(shares[start:end, index].mean())
            caption = f"{escape(name)} {_percent(value)} at token {start}" + ("" if end == start + 1 else f" to {end - 1}")
            cells.append(
                f'<rect class="a{index}" x="{label + column * width}" y="{index * height}" width="{width}" height="{height - 1}" data-a="{index}" '
                f'data-from="{start}" data-to="{end}" style="fill-opacity:{value:.3f}"><title>{caption}</title></rect>'
            )
    bottom = len(picture.names) * height
    marks = _role_marks(picture, bins, label, width, bottom)
    return _svg("token-map", label + len(bins) * width + 4, bottom + 18, "Weight of every adapter at every token", "".join(texts + cells) + marks)


def _role_marks(picture: RoutePicture, bins: list[tuple[int, int]], left: int, width: int, bottom: int) -> str:
    parts, start = [], 0
    for column in range(1, len(bins) + 1):
        role = picture.tokens[bins[start][0]].role
        if column < len(bins) and picture.tokens[bins[column][0]].role == role:
            continue
        x, end = left + start * width, left + column * width
        parts.append(f'<rect class="soft" x="{x}" y="{bottom + 1}" width="{end - x - 1}" height="2"></rect>')
        if end - x > 40:
            parts.append(f'<text class="soft" x="{x}" y="{bottom + 14}">{role}</text>')
        start = column
    return "".join(parts)


def _grid(table: Tensor, rows: list[str], names: tuple[str, ...], identity: str) -> str:
    left, top, cell, height = _label_width(tuple(rows)), _label_width(names) + 4, 26, 15
    parts = []
    for index, name in enumerate(names):
        x = left + index * cell + cell // 2 + 4
        parts.append(f'<text transform="translate({x},{top - 6}) rotate(-90)">{escape(name)}</text>')
    for row, label in enumerate(rows):
        y = top + row * height
        parts.append(f'<text class="soft" x="{left - 6}" y="{y + 11}" text-anchor="end">{escape(label)}</text>')
        for index, name in enumerate(names):
            value = float(table[row, index])
            parts.append(
                f'<rect class="a{index}" x="{left + index * cell}" y="{y}" width="{cell - 1}" height="{height - 1}" data-row="{row}" data-column="{index}" '
                f'style="fill-opacity:{value:.3f}"><title>{escape(label)}: {escape(name)} {_percent(value)}</title></rect>'
            )
    wide = len(names) * cell
    frame = (
        f'<rect class="now" id="{identity.removesuffix("-map")}-now" x="{left - 1}" y="{top}" width="{wide + 1}" height="{height}" visibility="hidden"></rect>'
    )
    return _svg(identity, left + wide + 8, top + len(rows) * height + 4, "Weights of the adapters", "".join(parts) + frame)


def _svg(identity: str, width: int, height: int, label: str, content: str) -> str:
    return f'<svg id="{identity}" width="{width}" height="{height}" role="img" aria-label="{label}">{content}</svg>'


def _label_width(names: tuple[str, ...]) -> int:
    return 12 + round(6.3 * max((len(name) for name in names), default=0))


def _data(picture: RoutePicture, has_answer: bool) -> str:
    """The data of the page's script, as JSON without characters that could end the script element."""
    wide = len(picture.names) > 256
    indices = picture.indices.to(torch.int32).numpy().astype("<u2" if wide else "u1")
    weights = (picture.weights.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    value: dict[str, Any] = {
        "names": list(picture.names),
        "shape": list(picture.indices.shape),
        "number": list(picture.layer_numbers),
        "kind": list(picture.layer_kinds),
        "layers": list(picture.layers),
        "answer": has_answer,
        "wide": wide,
        "indices": base64.b64encode(indices.tobytes()).decode(),
        "weights": base64.b64encode(weights.tobytes()).decode(),
    }
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

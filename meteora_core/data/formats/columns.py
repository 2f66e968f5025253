"""The meaning of a dataset's columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

from meteora_core.data.bigbench import text_of
from meteora_core.errors import DataError, UsageError, did_you_mean
from meteora_core.text import listed

Kind = Literal["messages", "finished", "instruction", "text", "template"]

_SYSTEM = ("system", "system_prompt")
_RESPONSES = ("response", "completion", "output", "answer", "target")


@dataclass(frozen=True)
class Format:
    """A known set of columns.

    Args:
        name: Name of the format in messages.
        kind: Kind of conversion of its records to rows.
        required: Names that a column may have, by role, the usual name first.
        optional: The same for columns that may be absent or empty.
    """

    name: str
    kind: Kind
    required: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]


FORMATS: tuple[Format, ...] = (
    Format(
        "messages",
        "messages",
        {"messages": ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")},
        {"tools": ("tools", "functions"), "system": _SYSTEM},
    ),
    Format("prompt and response", "finished", {"prompt": ("prompt",), "response": _RESPONSES}, {"system": _SYSTEM, "tools": ("tools", "functions")}),
    Format(
        "instruction, input and output",
        "instruction",
        {"user": ("instruction",), "response": ("output", *_RESPONSES)},
        {"input": ("input", "context"), "system": _SYSTEM, "history": ("history",)},
    ),
    Format(
        "question and answer",
        "instruction",
        {"user": ("question", "query", "problem"), "response": ("answer", "solution", *_RESPONSES)},
        {"input": ("context", "input"), "system": _SYSTEM},
    ),
    Format(
        "input and output",
        "instruction",
        {"user": ("input", "inputs", "source"), "response": ("output", "outputs", "targets", "label", *_RESPONSES)},
        {"system": _SYSTEM},
    ),
    Format("text and label", "instruction", {"user": ("text", "sentence"), "response": ("label", "label_text", *_RESPONSES)}, {}),
    Format("plain text", "text", {"text": ("text", "content")}, {}),
)
"""The known formats, of which the first that fits is used."""

KNOWN_COLUMNS: tuple[str, ...] = tuple(
    dict.fromkeys(name for each in FORMATS for names in (*each.required.values(), *each.optional.values()) for name in names)
)
"""The names of all columns that have a meaning in a format."""


@dataclass(frozen=True)
class Layout:
    """The columns of one dataset.

    Attributes:
        format: Format of the dataset.
        columns: Names of the dataset's columns, by role.
    """

    format: Format
    columns: Mapping[str, str]

    @property
    def shown(self) -> str:
        """The format and its columns for messages, for example ``question and answer (ask, reply)``."""
        usual = " ".join(self.columns.values()) == self.format.name
        return self.format.name if usual else f"{self.format.name} ({', '.join(self.columns.values())})"


def find_layout(names: Iterable[str], renamed: Mapping[str, str], where: str) -> Layout:
    """The layout of a dataset's columns. Case and white space around a name are ignored.

    Args:
        names: Names of the dataset's columns.
        renamed: The dataset's names for known columns; if it is not empty, other columns are ignored.
        where: Name of the dataset in messages.

    Raises:
        UsageError: ``renamed`` contains an unknown column.
        DataError: The columns fit no known format.
    """
    unknown = next((name for name in renamed if name not in KNOWN_COLUMNS), None)
    if unknown is not None:
        raise UsageError(
            f"--columns: {unknown!r} is not a known column",
            hint=did_you_mean(unknown, KNOWN_COLUMNS) or "for example --columns question=ASK,answer=REPLY, with your columns' names on the right",
        )
    present = list(names)
    known = dict(renamed) or {name.strip().lower(): name for name in reversed(present)}
    for each in FORMATS:
        found = {role: _first(known, options) for role, options in each.required.items()}
        if all(found.values()):
            found |= {role: _first(known, options, taken=found.values()) for role, options in each.optional.items()}
            return Layout(each, {role: name for role, name in found.items() if name})
    shown = listed(map(str, present), 12) or "none"
    raise DataError(
        f"{where}: the columns fit no known format; there are: {shown}",
        hint="say what they mean: --columns question=ASK,answer=REPLY, or --template 'Q: {ASK}' --target '{REPLY}', with your columns' names for ASK and REPLY",
    )


def _first(known: Mapping[str, str], options: tuple[str, ...], taken: Iterable[str | None] = ()) -> str | None:
    used = set(taken)
    return next((known[name] for name in options if name in known and known[name] not in used), None)


def value_of(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column. ``a.b`` can also be the field ``b`` of the column ``a``.

    Raises:
        ValueError: There is no such column.
    """
    if name in record:
        return record[name]
    head, dot, rest = name.partition(".")
    if dot and isinstance(record.get(head), Mapping):
        return value_of(record[head], rest)
    raise ValueError(f"no field {name!r}; there are: {', '.join(map(str, record)) or 'none'}")


def text_in(record: Mapping[str, Any], name: str) -> str:
    """The text of a column. Raises ValueError if it is absent, null, or neither a text nor a number."""
    value = value_of(record, name)
    if value is None:
        raise ValueError(f"field {name!r} is null")
    return text_of(value, f"field {name!r}")


def template_fields(template: str) -> list[str]:
    """The names of columns in a template.

    Raises:
        UsageError: The braces of the template do not match.
    """
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name]
    except ValueError as broken:
        raise UsageError(f"the template {template!r} is broken: {broken}", hint="write columns' names in braces, and {{ for a brace") from broken


def fill(template: str, record: Mapping[str, Any]) -> str:
    """A template filled with the columns of a record. Finite numbers become text in Python's notation (``7``, ``0.5``).

    Raises:
        ValueError: The template is broken, or the record lacks one of its columns.
    """
    return "".join(literal + (text_in(record, name) if name is not None else "") for literal, name, _, _ in Formatter().parse(template))

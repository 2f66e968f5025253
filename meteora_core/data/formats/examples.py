"""Conversion of records to rows, by a plan that is made from the first records of a dataset."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from string import Formatter
from typing import Any, TypeVar

from meteora_core.data.formats.columns import Format, Layout, fill, find_layout, template_fields, text_in, value_of
from meteora_core.data.formats.conversations import Conversation, conversation, is_conversation
from meteora_core.data.formats.reading import Reading
from meteora_core.data.formats.tables import Record, Table
from meteora_core.data.frames import INST, NAMES, PLACE, RAW, Frame, Message, chat_frame, common_frame, parse_frame, render_chat, with_system
from meteora_core.data.rows import Row
from meteora_core.errors import DataError, UsageError, did_you_mean

_Made = TypeVar("_Made")

SAMPLE = 1000
"""The number of records from which a plan is made."""

_ANSWERS = (
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>model\n",
    "<|assistant|>\n",
    "[/INST]\n",
    "[/INST]",
    "### Response:\n",
    "### Response:",
    "### Assistant:",
    "### Answer:\n",
    "### Output:\n",
    "ASSISTANT:",
)
"""Marks before the answer in a text that contains prompt and answer."""

_BEGINS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
_ENDS = re.compile(r"\s*(?:(?:<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|<\|end_of_text\|>|<\|end\|>|<end_of_turn>|</s>|<eos>)\s*)+$")


@dataclass(frozen=True)
class Plan:
    """The conversion of a dataset's records to rows.

    Attributes:
        layout: Layout of the columns.
        frame: Frame of the prompts.
        note: Note about the frame for the user, or None.
        example: First row.
    """

    layout: Layout
    frame: Frame
    note: str | None
    example: Row
    _row: Callable[[Record], Row] = field(repr=False)

    def rows(self, table: Table, *, skip_invalid: bool = False, skipped: list[str] | None = None) -> Iterator[Row]:
        """The rows of a table.

        Args:
            table: Table with the columns for which the plan was made.
            skip_invalid: Whether to skip invalid records.
            skipped: List that collects the problems of skipped records.

        Raises:
            DataError: The table is broken, or a record is invalid; the message contains its number.
        """
        for number, record in enumerate(table.read(), start=1):
            try:
                yield self._row(record)
            except ValueError as broken:
                if not skip_invalid:
                    raise DataError(f"{table.name}: row {number}: {broken}", hint="correct it, or leave such rows out with --skip-invalid") from broken
                if skipped is not None:
                    skipped.append(f"row {number}: {broken}")


def make_plan(table: Table, reading: Reading) -> Plan:
    """The plan for a table, made from its first records.

    Args:
        table: Table of the train rows.
        reading: The user's options.

    Raises:
        DataError: The table is empty or broken, or its columns fit no known format.
        UsageError: The user's columns or template are wrong, or a tokenizer is needed and there is none.
    """
    sample = list(islice(table.read(), SAMPLE))
    if not sample:
        raise DataError(f"{table.name} has no rows")
    layout, filled = _layout(sample, reading, table.name)
    if filled is not None:
        made, frame, note = _from_fields(filled), _frame_of_fields(filled.prompt), None
    elif layout.format.kind == "text":
        made, frame, note = _from_text(layout, sample, reading)
    elif layout.format.kind == "finished" and reading.template is None and not _has_conversations(layout, sample):
        made, frame, note = _from_finished(layout, sample, reading)
    else:
        made, frame, note = _from_conversations(layout, sample, reading)
    example = next((row for row in map(_tried(made), sample) if row is not None), None) if reading.skip_invalid else None
    if example is None:
        try:
            example = made(sample[0])
        except ValueError as broken:
            raise DataError(f"{table.name}: row 1: {broken}", hint="correct it, or leave such rows out with --skip-invalid") from broken
    return Plan(layout, frame, note, example, made)


def _tried(made: Callable[[Record], _Made]) -> Callable[[Record], _Made | None]:
    """A function that returns None for records of which ``made`` makes nothing."""

    def attempt(record: Record) -> _Made | None:
        try:
            return made(record)
        except ValueError:
            return None

    return attempt


@dataclass(frozen=True)
class _Filled:
    """Templates of a whole prompt and a response, with names of columns in braces."""

    prompt: str
    response: str


def _layout(sample: Sequence[Record], reading: Reading, name: str) -> tuple[Layout, _Filled | None]:
    """The layout, and the user's templates if they describe a whole prompt."""
    names = list(dict.fromkeys(str(column) for record in sample for column in record))
    template = reading.template
    fields = template_fields(template) if template is not None and template not in NAMES and PLACE not in template else []
    if template is not None and template not in NAMES and PLACE not in template and not fields:
        raise UsageError(
            f"the template {template!r} has no place for the user's text",
            hint=did_you_mean(template, NAMES) or f"use {', '.join(NAMES)}, a text with {{}}, or a text with columns' names in braces",
        )
    if not fields:
        layout = find_layout(names, dict(reading.columns), name)
        if reading.target is not None and layout.format.kind in ("text", "messages"):
            raise UsageError(f"--target has no effect on {layout.format.name}", hint="give the prompt too: --template 'Q: {ASK}' --target '{REPLY}'")
        return layout, None
    target = reading.target
    if target is None:
        found = find_layout(names, dict(reading.columns), name).columns
        if "response" not in found:
            raise UsageError("the template needs a response", hint="name its column: --target '{REPLY}'")
        target = "{" + found["response"] + "}"
    columns = (*fields, *template_fields(target))
    return Layout(Format("your template", "template", {}, {}), {column: column for column in columns}), _Filled(str(template), target)


def _frame_of_fields(template: str) -> Frame:
    parts = list(Formatter().parse(template))
    last = parts[-1]
    return Frame(parts[0][0], last[0] if last[1] is None and len(parts) > 1 else "")


def _from_fields(filled: _Filled) -> Callable[[Record], Row]:
    return lambda record: _answered(fill(filled.prompt, record), fill(filled.response, record))


def _answered(prompt: str, response: str) -> Row:
    if not response.strip():
        raise ValueError("the response is empty")
    return Row(prompt, response)


def _response(layout: Layout, reading: Reading) -> Callable[[Record], str]:
    if reading.target is not None:
        target = reading.target
        if not template_fields(target):
            raise UsageError(f"the target {target!r} names no column", hint="write the column's name in braces: --target '{REPLY}'")
        return lambda record: fill(target, record)
    return lambda record: text_in(record, layout.columns["response"])


def _from_text(layout: Layout, sample: Sequence[Record], reading: Reading) -> tuple[Callable[[Record], Row], Frame, str | None]:
    """The plan for plain texts: they are divided at the mark before the answer, or are answers to an empty prompt if there is no such mark."""
    if reading.template is not None:
        raise UsageError("a template has no effect on plain text", hint="leave it out, or name the columns: --template 'Q: {ASK}' --target '{REPLY}'")
    column = layout.columns["text"]
    texts = [text for record in sample if isinstance(text := value_of(record, column) if column in record else None, str)]
    mark = next((mark for mark in _ANSWERS if texts and all(mark in text for text in texts)), None)
    if mark is None:
        note = "the texts hold no known mark before an answer: each text is learned as the answer to an empty prompt"
        return lambda record: _answered("", text_in(record, column)), RAW, note

    def divide(record: Record) -> Row:
        text = text_in(record, column)
        begin = next((each for each in _BEGINS if text.startswith(each)), "")
        before, found, after = text.removeprefix(begin).rpartition(mark)
        if not found:
            raise ValueError(f"the text has no {mark.strip()!r} before an answer")
        answer = after.lstrip("\n")
        return _answered(before + found + after[: len(after) - len(answer)], _ENDS.sub("", answer).strip(" "))

    frame = common_frame(row.prompt for row in map(_tried(divide), sample) if row is not None)
    return divide, frame, f"each text is divided into prompt and answer at {mark.strip()!r}"


def _from_finished(layout: Layout, sample: Sequence[Record], reading: Reading) -> tuple[Callable[[Record], Row], Frame, str | None]:
    """The plan for finished prompts, which the model reads unchanged."""
    response = _response(layout, reading)
    column, system = layout.columns["prompt"], layout.columns.get("system")

    def made(record: Record) -> Row:
        lead = _optional(record, system)
        return _answered(with_system(text_in(record, column), lead), response(record))

    frame = common_frame(row.prompt for row in map(_tried(made), sample) if row is not None)
    note = "the prompts have no frame in common; the model reads them as they are (--template chat puts them into the base model's chat template)"
    return made, frame, note if frame == RAW else None


def _has_conversations(layout: Layout, sample: Sequence[Record]) -> bool:
    return any(is_conversation(record.get(layout.columns["prompt"])) for record in sample)


def _from_conversations(layout: Layout, sample: Sequence[Record], reading: Reading) -> tuple[Callable[[Record], Row], Frame, str | None]:
    """The plan for questions and conversations, which are put into the user's frame or the base model's chat template."""
    opened = _opener(layout, reading)
    talks = [talk for talk in map(_tried(opened), sample) if talk is not None]
    systems = {talk.system for talk in talks}
    frame, note, tokenizer = _frame(reading)
    if len(systems) == 1 and (system := next(iter(systems))) is not None:
        frame = chat_frame(tokenizer, system) if frame.chat else replace(frame, system=system)

    def made(record: Record) -> Row:
        talk = opened(record)
        if layout.format.kind == "finished" and frame.before and frame.inside(talk.messages[-1][1]) is not None:
            return _answered(talk.messages[-1][1], talk.response)  # the prompt is in this frame already
        if frame.chat:
            return _answered(render_chat(tokenizer, talk.system, talk.messages), talk.response)
        if len(talk.messages) > 1:
            return _answered(_in_turn(frame, talk, _end(frame, reading)), talk.response)
        return _answered(frame.around(with_system(talk.messages[0][1], talk.system)), talk.response)

    return made, frame, note


def _frame(reading: Reading) -> tuple[Frame, str | None, Any]:
    """The frame for questions, a note about it, and the tokenizer if it was loaded."""
    wish = reading.template
    if wish == "inst":
        return INST, None, None
    if wish == "raw":
        return RAW, None, None
    if wish is not None and wish != "chat":
        return parse_frame(wish), None, None
    if reading.tokenizer is None:
        raise UsageError("the base model's chat template is needed, and no base model is given", hint="use --template inst, raw or '…{}…'")
    tokenizer = reading.tokenizer()
    if wish is None and not getattr(tokenizer, "chat_template", None):
        return INST, "the base model has no chat template: the prompts are put between [INST] and [/INST] (--template '…{}…' chooses another frame)", tokenizer
    return chat_frame(tokenizer), None, tokenizer


def _end(frame: Frame, reading: Reading) -> str:
    if frame.end is not None:
        return frame.end
    if reading.tokenizer is None:
        raise UsageError("conversations of several turns need the base model's end token", hint="name the base model with --base")
    return str(reading.tokenizer().eos_token or "")


def _in_turn(frame: Frame, talk: Conversation, end: str) -> str:
    first = (talk.messages[0][0], with_system(talk.messages[0][1], talk.system))
    return "".join(frame.around(text) if role == "user" else text + end for role, text in (first, *talk.messages[1:]))


def _opener(layout: Layout, reading: Reading) -> Callable[[Record], Conversation]:
    """A function that turns a record into a conversation."""
    columns = layout.columns
    if layout.format.kind == "messages":
        return lambda record: conversation(value_of(record, columns["messages"]), system=_any(record, columns, "system"), tools=_any(record, columns, "tools"))
    response = _response(layout, reading)
    if layout.format.kind == "finished":

        def finished(record: Record) -> Conversation:
            prompt = value_of(record, columns["prompt"])
            if not is_conversation(prompt):
                return _asked(text_in(record, columns["prompt"]), record, columns, response(record))
            answer = value_of(record, columns["response"])
            whole = [*prompt, *answer] if isinstance(answer, list) and isinstance(prompt, list) else [*prompt, {"role": "assistant", "content": answer}]
            return conversation(whole, system=_any(record, columns, "system"), tools=_any(record, columns, "tools"))

        return finished
    return lambda record: _asked(text_in(record, columns["user"]), record, columns, response(record))


def _asked(message: str, record: Record, columns: Mapping[str, str], response: str) -> Conversation:
    extra = _optional(record, columns.get("input"))
    user = f"{message}\n{extra}" if extra and message else extra or message
    earlier: list[Message] = []
    for pair in _any(record, columns, "history") or []:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError("'history' is not a list of pairs of texts")
        earlier += [("user", pair[0]), ("assistant", pair[1])]
    return Conversation(_optional(record, columns.get("system")) or None, (*earlier, ("user", user)), response)


def _optional(record: Record, column: str | None) -> str:
    """The text of a column; empty if it is absent or null."""
    if column is None:
        return ""
    try:
        value = value_of(record, column)
    except ValueError:
        return ""
    return "" if value is None else text_in(record, column)


def _any(record: Record, columns: Mapping[str, str], role: str) -> Any:
    return record.get(columns[role]) if role in columns else None

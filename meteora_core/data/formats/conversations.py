"""Conversations: ``messages`` with roles and contents, ShareGPT's ``from`` and ``value``, and tool calls, which become text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from meteora_core.data.bigbench import text_of
from meteora_core.data.frames import Message
from meteora_core.json_files import decode_json

ROLES: dict[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "claude", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response", "function_response"), "tool"),
}
"""The roles of speakers, by the names that datasets use."""


@dataclass(frozen=True)
class Conversation:
    """A conversation up to its last answer.

    Attributes:
        system: System text, including the descriptions of tools, or None.
        messages: Messages of the user and answers, in turn, without the last answer; the last message is from the user.
        response: Last answer.
    """

    system: str | None
    messages: tuple[Message, ...]
    response: str


def conversation(value: Any, *, system: Any = None, tools: Any = None) -> Conversation:
    """Parse a conversation. Messages after the last answer are dropped, and consecutive messages of one speaker are joined by an empty line.

    Args:
        value: Messages with ``role`` and ``content`` or ``from`` and ``value``, as a list, as JSON text, or as columns (one list for each field).
        system: System text of the record, or None.
        tools: Descriptions of tools in the record, as JSON text or a list of objects, or None.

    Raises:
        ValueError: The value is not a conversation, or it has no answer.
    """
    leading = [text_of(system, "'system'")] if system else []
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(_messages(value), start=1):
        role, text = _message(message, number)
        if role == "system" and not turns:
            leading.append(text)
            continue
        role = "user" if role == "system" else role
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n\n{text}")
        else:
            turns.append((role, text))
    while turns and turns[-1][0] == "user":
        turns.pop()
    if not turns:
        raise ValueError("the conversation has no answer of the assistant")
    if turns[0][0] == "assistant":
        raise ValueError("the conversation begins with the assistant")
    if tools and (described := _tools(tools)):
        leading.append(described)
    messages: list[Message] = [("user" if role == "user" else "assistant", text) for role, text in turns[:-1]]
    return Conversation("\n\n".join(part for part in leading if part) or None, tuple(messages), turns[-1][1])


def is_conversation(value: Any) -> bool:
    """Whether a value looks like a list of messages rather than a text."""
    return isinstance(value, list) or (isinstance(value, Mapping) and any(isinstance(part, list) for part in value.values()))


def _messages(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = decode_json(value)
        except (ValueError, RecursionError) as broken:
            raise ValueError("the conversation is a text that is not JSON") from broken
    if isinstance(value, Mapping):
        columns = {name: list(part) for name, part in value.items() if isinstance(part, list)}
        if not columns or len({len(part) for part in columns.values()}) != 1:
            raise ValueError("the conversation is not a list of messages")
        return [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]
    if value is None:
        raise ValueError("the conversation is null")
    if not isinstance(value, list):
        raise ValueError("the conversation is not a list of messages")
    return value


def _message(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is not an object with a role and a content")
    name = next((message[key] for key in ("role", "from") if message.get(key) is not None), None)
    if name is None:
        raise ValueError(f"message {number} has no role; there are: {', '.join(map(str, message)) or 'none'}")
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"message {number} has an unknown role: {str(name)[:40]!r}")
    content = next((message[key] for key in ("content", "value", "text") if message.get(key) is not None), None)
    text = "" if content is None else _content(content, number)
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    if role == "call":
        role, text = "assistant", f"<tool_call>\n{text}\n</tool_call>"
    elif role == "tool":
        role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
    elif content is None and not calls:
        raise ValueError(f"message {number} has no content")
    parts = [text, *(f"<tool_call>\n{_call(call, number)}\n</tool_call>" for call in calls)]
    return role, "\n".join(part for part in parts if part)


def _content(content: Any, number: int) -> str:
    if not isinstance(content, list):
        return text_of(content, f"the content of message {number}")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            texts.append(part["text"])
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type", "?") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"message {number} has a part that is not text: {str(kind)[:40]!r}")
    return "".join(texts)


def _call(call: Any, number: int) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"message {number} has a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # arguments that are not JSON stay text
            arguments = decode_json(arguments)
    return _json({"name": function["name"], "arguments": arguments if arguments is not None else {}})


def _tools(tools: Any) -> str:
    if isinstance(tools, str):
        try:
            tools = decode_json(tools)
        except (ValueError, RecursionError):
            return f"Tools:\n{tools}"
    return f"Tools:\n{_json(_present(tools))}" if tools else ""


def _present(value: Any) -> Any:
    """A value without the nulls that Parquet adds for fields that other records have."""
    if isinstance(value, Mapping):
        return {key: _present(entry) for key, entry in value.items() if entry is not None}
    return [_present(entry) for entry in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    return json.dumps(_present(value), ensure_ascii=False)

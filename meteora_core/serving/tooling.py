"""Tools: their description in a prompt, the grammar of a required call, and calls in an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meteora_core.serving.protocol import Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_STARTS = (OPEN, "{", "[TOOL_CALLS]")
_CALL = re.compile(rf"{OPEN}\s*(.*?)\s*(?:{CLOSE}|$)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: Name of the function.
        arguments: Its arguments, as a JSON text.
    """

    name: str
    arguments: str


def described(tools: Sequence[Tool]) -> str:
    """A text that describes the tools, for models whose chat template does not support tools."""
    lines = ["You may call these functions:"]
    for tool in tools:
        function = tool.function
        lines.append(json.dumps({"name": function.name, "description": function.description or "", "parameters": function.parameters or {}}))
    lines.append(f'To call one, answer with {OPEN}{{"name": NAME, "arguments": {{...}}}}{CLOSE} and nothing else.')
    return "\n".join(lines)


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.function.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def may_be_call(text: str) -> bool:
    """Whether an answer that begins with ``text`` may be a tool call, so that it must not be sent as text yet."""
    start = text.lstrip()
    return any(start.startswith(mark) or mark.startswith(start) for mark in _STARTS)


def calls_in(text: str, tools: Sequence[Tool]) -> list[Call]:
    """The calls of which an answer consists; empty if the answer is text."""
    names = {tool.function.name for tool in tools}
    stripped = text.strip()
    if stripped.startswith(OPEN):
        bodies = [match.group(1) for match in _CALL.finditer(stripped)]
    else:
        bodies = [stripped.removeprefix("[TOOL_CALLS]").strip()]
    calls: list[Call] = []
    for body in bodies:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return []
        for entry in value if isinstance(value, list) else [value]:
            call = _call(entry, names)
            if call is None:
                return []
            calls.append(call)
    return calls


def _call(value: Any, names: set[str]) -> Call | None:
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments)) if isinstance(arguments, dict) else None

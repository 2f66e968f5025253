"""Turns the messages of a request into a prompt in the format that the model was trained on."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meteora_core.chat.prompts import Turn, encode
from meteora_core.data.frames import Frame, pick_frame
from meteora_core.data.rows import check_texts
from meteora_core.errors import UsageError
from meteora_core.routing import RoutingOptions
from meteora_core.serving.protocol import ChatMessage, Tool
from meteora_core.serving.tooling import described
from meteora_core.text import one_line

if TYPE_CHECKING:
    from meteora_core.chat.chat_model import ChatModel


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts for one model.

    Attributes:
        chat_model: The model.
        template: Prompt template: "auto", "chat", "inst", "raw", or a text with ``{}`` for the message.
    """

    chat_model: ChatModel
    template: str = "auto"
    _lock: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_lock", threading.Lock())

    def frame(self, routing: RoutingOptions) -> Frame:
        """The prompt frame of a request with these routing options."""
        default = self.chat_model.frame(routing.forced if routing.enabled else None, base=not routing.enabled)
        return pick_frame(self.template, default, self.chat_model.tokenizer)

    def text(self, text: str) -> list[int]:
        """The tokens of a plain text.

        Raises:
            DataError: The text contains half of a surrogate pair.
        """
        check_texts([text])
        tokenizer = self.chat_model.tokenizer
        with self._lock:
            ids = [int(token) for token in tokenizer(text)["input_ids"]]
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        return ids

    def chat(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], routing: RoutingOptions) -> list[int]:
        """The tokens of a conversation, up to the start of the answer.

        Args:
            messages: Messages in order.
            tools: Tools that the model may call.
            routing: Routing options of the request; each adapter may have a prompt frame of its own.

        Raises:
            UsageError: There is no message to answer, or the chat template rejects the conversation.
            DataError: A text contains half of a surrogate pair.
        """
        check_texts([message.text for message in messages])
        frame = self.frame(routing)
        with self._lock:
            if frame.chat:
                return self._templated(messages, tools, frame)
            system, turns = _turns(messages, tools)
            if turns[-1].answer is not None:
                raise UsageError("the last message is from the assistant", hint="end the conversation with a message of the user")
            return list(encode(self.chat_model.tokenizer, frame, system, turns).ids)

    def _templated(self, messages: Sequence[ChatMessage], tools: Sequence[Tool], frame: Frame) -> list[int]:
        from jinja2 import TemplateError

        tokenizer = self.chat_model.tokenizer
        knows_tools = "tools" in str(tokenizer.chat_template)
        plain: list[dict[str, Any]] = [_plain(message, knows_tools) for message in messages]
        if frame.system and plain[0]["role"] != "system":
            plain.insert(0, {"role": "system", "content": frame.system})
        if tools and not knows_tools:
            _add_system(plain, described(tools))
        options = {"tools": [tool.model_dump(exclude_none=True) for tool in tools]} if tools and knows_tools else {}
        for attempt in (plain, _merged(plain)):
            try:
                text = str(tokenizer.apply_chat_template(attempt, tokenize=False, add_generation_prompt=True, **options))
            except (TemplateError, TypeError, ValueError, KeyError) as error:
                problem = error
                continue
            return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        raise UsageError(f"the model's chat template rejects this conversation: {one_line(str(problem), limit=200)}", hint="let users and assistant alternate")


def _plain(message: ChatMessage, knows_tools: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    if role == "tool" and not knows_tools:
        return {"role": "user", "content": f"Result of the function: {message.text}"}
    plain: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        if not knows_tools:
            return {"role": role, "content": message.text + _called(message)}
        plain["tool_calls"] = [{"id": call.id, "type": "function", "function": _function(call.function.model_dump())} for call in message.tool_calls]
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    if message.name:
        plain["name"] = message.name
    return plain


def _function(function: dict[str, Any]) -> dict[str, Any]:
    """A call in the form that chat templates expect, with its arguments as an object."""
    try:
        return {**function, "arguments": json.loads(function["arguments"])}
    except (ValueError, RecursionError):
        return function


def _called(message: ChatMessage) -> str:
    return "".join(f'<tool_call>{{"name": "{call.function.name}", "arguments": {call.function.arguments}}}</tool_call>' for call in message.tool_calls or ())


def _add_system(messages: list[dict[str, Any]], text: str) -> None:
    if messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
    else:
        messages.insert(0, {"role": "system", "content": text})


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the system texts in the first message of the user, for templates without a system role."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    rest = [dict(message) for message in messages if message["role"] != "system"]
    if system and rest and rest[0]["role"] == "user":
        rest[0]["content"] = f"{system}\n\n{rest[0]['content']}"
    return rest


def _turns(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> tuple[str | None, list[Turn]]:
    """The system text and the turns of a conversation; neighbouring messages of one role are joined."""
    system = [message.text for message in messages if message.role in ("system", "developer")]
    if tools:
        system.append(described(tools))
    turns: list[Turn] = []
    for message in messages:
        if message.role in ("system", "developer"):
            continue
        if message.role == "assistant":
            if not turns:
                turns.append(Turn(""))
            before = turns[-1]
            turns[-1] = Turn(before.message, (before.answer or "") + message.text + _called(message))
            continue
        text = message.text if message.role == "user" else f"Result of the function: {message.text}"
        if turns and turns[-1].answer is None:
            turns[-1] = Turn(f"{turns[-1].message}\n\n{text}")
        else:
            turns.append(Turn(text))
    if not turns:
        raise UsageError("there is no message to answer", hint="add a message with the role user")
    return "\n\n".join(system) or None, turns

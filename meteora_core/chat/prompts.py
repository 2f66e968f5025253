"""Tokenisation of conversations: the prompt templates, and the cuts that fit a long conversation into the model's context.

Earlier answers keep the tokens that were generated, so that the next prompt begins with the tokens in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meteora_core.data.frames import Frame, with_system
from meteora_core.errors import UsageError
from meteora_core.trace.picture import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
        message: Text of the user's message.
        answer: Text of the answer; None until there is one.
        ids: Token ids of the answer as they were generated; empty for an answer loaded from a file.
        complete: Whether the answer ended with an end token.
    """

    message: str
    answer: str | None = None
    ids: tuple[int, ...] = ()
    complete: bool = True


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens, ready to be answered.

    Attributes:
        ids: Token ids of the prompt.
        roles: Role of each token: "prompt", or "answer" if the model generated it in an earlier turn.
        notice: Message about the parts that do not fit into the model's context; None if everything fits.
        first_turn: Index of the first turn that is part of ``ids``.
        last_start: Position in ``ids`` at which the last turn begins.
    """

    ids: list[int]
    roles: list[Role]
    notice: str | None = None
    first_turn: int = 0
    last_start: int = 0


def encode(tokenizer: PreTrainedTokenizerBase, frame: Frame, system: str | None, turns: Sequence[Turn]) -> Encoded:
    """Tokenise a conversation, without the answer of the last turn.

    A chat template formats the whole conversation. For any other frame, the turns are concatenated and each answer ends with the frame's end token; for the
    frame "raw" it ends with nothing.

    Args:
        tokenizer: The model's tokenizer.
        frame: Prompt frame, which gives the text around each message.
        system: System text; None means that of the frame, if it has one.
        turns: Turns of the conversation, the last of which is to be answered.

    Raises:
        UsageError: There are no turns, or the chat template rejects the conversation.
    """
    if not turns:
        raise UsageError("there is nothing to answer", hint="write something first")
    system = system or frame.system
    if frame.chat:
        return _encode_chat(tokenizer, system, turns)
    framed = bool(frame.before or frame.after)
    end = frame.end_id(tokenizer)
    end = int(tokenizer.eos_token_id) if end is None else end
    ids: list[int] = []
    roles: list[Role] = []
    last_start = 0
    for number, turn in enumerate(turns):
        message = turn.message if number else with_system(turn.message, system)
        last_start = len(ids)
        _extend(ids, roles, tokenizer(frame.around(message), add_special_tokens=number == 0 or framed)["input_ids"], "prompt")
        if number < len(turns) - 1:
            _extend(ids, roles, turn.ids or _plain(tokenizer, turn.answer or ""), "answer")
            if framed:
                _extend(ids, roles, [end], "prompt")
    return Encoded(ids, roles, last_start=last_start)


def _encode_chat(tokenizer: PreTrainedTokenizerBase, system: str | None, turns: Sequence[Turn]) -> Encoded:
    from jinja2 import TemplateError

    try:
        whole, starts = _render_chat(tokenizer, system, turns)
    except TemplateError as error:
        if not system:
            raise UsageError(f"the model's chat template refuses this conversation: {error}", hint="use --template inst or raw") from error
        merged = [replace(turns[0], message=with_system(turns[0].message, system)), *turns[1:]]
        return _encode_chat(tokenizer, None, merged)
    ids: list[int] = []
    roles: list[Role] = []
    position = last_start = 0
    for turn, start in zip(turns, starts, strict=False):
        answer = turn.answer or ""
        shown = answer if whole.startswith(answer, start) else answer.strip()
        if start < position or not whole.startswith(shown, start):
            break  # The template rewrites earlier turns, so the rest is tokenised from the rendered text.
        _extend(ids, roles, _plain(tokenizer, whole[position:start]), "prompt")
        _extend(ids, roles, turn.ids or _plain(tokenizer, shown), "answer")
        position = start + len(shown)
        last_start = len(ids)
    _extend(ids, roles, _plain(tokenizer, whole[position:]), "prompt")
    return Encoded(ids, roles, last_start=last_start)


def _render_chat(tokenizer: PreTrainedTokenizerBase, system: str | None, turns: Sequence[Turn]) -> tuple[str, list[int]]:
    """Return the rendered conversation and the offset of each earlier answer in it."""
    messages = [{"role": "system", "content": system}] if system else []
    starts = []
    for number, turn in enumerate(turns):
        messages.append({"role": "user", "content": turn.message})
        if number < len(turns) - 1:
            starts.append(len(str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))))
            messages.append({"role": "assistant", "content": turn.answer or ""})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), starts


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []


def _extend(ids: list[int], roles: list[Role], new: Sequence[int], role: Role) -> None:
    ids.extend(int(token) for token in new)
    roles.extend([role] * len(new))


def fit(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, system: str | None, turns: Sequence[Turn], context: int | None, room: int, first_turn: int = 0
) -> Encoded:
    """Tokenise a conversation so that it fits into the model's context with its answer. The ``notice`` of the result says what was left out.

    The oldest turns are dropped first, until the rest fills at most three quarters of the space, because after each cut the rest must be read again. If the
    last message alone is too long, its beginning is dropped.

    Args:
        tokenizer, frame, system, turns: The conversation, as for :func:`encode`.
        context: The model's context in tokens; None for no limit.
        room: Number of tokens to reserve for the answer; at most a quarter of the context is reserved.
        first_turn: Index of the first turn that earlier calls have not dropped.

    Raises:
        UsageError: Even an empty message does not fit, because the system text is too long.
    """
    whole = encode(tokenizer, frame, system, turns[first_turn:])
    if context is None or len(whole.ids) <= (limit := context - min(room, max(1, context // 4))):
        return replace(whole, first_turn=first_turn)
    reason = f"the conversation is {len(whole.ids)} tokens, and the model's context of {context} leaves {limit} for it"
    for first in range(first_turn + 1, len(turns)):
        rest = encode(tokenizer, frame, system, turns[first:])
        if len(rest.ids) <= limit * 3 // 4 or (first == len(turns) - 1 and len(rest.ids) <= limit):
            dropped = first - first_turn
            subject = (
                f"the oldest {dropped} turns ({len(whole.ids) - len(rest.ids)} tokens) are"
                if dropped > 1
                else f"the oldest turn ({len(whole.ids) - len(rest.ids)} tokens) is"
            )
            return replace(rest, notice=f"{reason}: {subject} left out", first_turn=first)
    return _cut_message(tokenizer, frame, system, turns, limit, reason)


def _cut_message(tokenizer: PreTrainedTokenizerBase, frame: Frame, system: str | None, turns: Sequence[Turn], limit: int, reason: str) -> Encoded:
    last, count = turns[-1], len(turns) - 1
    whole = encode(tokenizer, frame, system, [last])
    message, rest = last.message, whole
    while len(rest.ids) > limit:
        if not message:
            raise UsageError(f"the system text alone is longer than the {limit} tokens that the model's context leaves", hint="shorten it with /system")
        tokens = _plain(tokenizer, message)
        length = len(tokens) - (len(rest.ids) - limit)
        tail = str(tokenizer.decode(tokens[-length:], skip_special_tokens=False)) if length > 0 else ""
        message = tail.lstrip("\N{REPLACEMENT CHARACTER}") if len(tail) < len(message) else message[len(message) // 8 + 1 :]
        rest = encode(tokenizer, frame, system, [replace(last, message=message)])
    earlier = "" if count == 0 else " and all earlier turns" if count > 1 else " and the earlier turn"
    notice = f"{reason}: the first {len(whole.ids) - len(rest.ids)} of the last message's {len(whole.ids)} tokens{earlier} are left out"
    return replace(rest, notice=notice, first_turn=count)

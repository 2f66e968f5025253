"""How messages become tokens: the templates, and what is left out when a conversation outgrows the model's context.

Earlier answers keep the very tokens that were generated, so that the text of the next turn begins with what the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from meteora_core.data.tasks import PROMPT_TEMPLATE
from meteora_core.errors import UsageError
from meteora_core.trace.picture import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "inst", "raw"]
TEMPLATES: tuple[Template, ...] = ("chat", "inst", "raw")


@dataclass(frozen=True)
class Turn:
    """A message and its answer.

    Attributes:
        message: What the user wrote.
        answer: What came back; None while it is not there.
        ids: The answer's tokens as generated; empty where the answer was loaded from a file.
        complete: Whether the answer reached its end token.
    """

    message: str
    answer: str | None = None
    ids: tuple[int, ...] = ()
    complete: bool = True


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens, ready to be answered.

    Attributes:
        ids: Token ids.
        roles: One a token: given, or written by the model in an earlier turn.
        notice: What was left out because of the model's context, or None.
        first_turn: The first turn that is in ``ids``.
        last_start: Position where the last turn's part begins.
    """

    ids: list[int]
    roles: list[Role]
    notice: str | None = None
    first_turn: int = 0
    last_start: int = 0


def pick_template(wish: str, *, base: bool, tokenizer: PreTrainedTokenizerBase) -> Template:
    """``"auto"`` is "inst" for MeteoRA and adapters, which were trained on it; for a base model its chat template, or "raw" without one.

    Raises:
        UsageError: An unknown template, or "chat" for a tokenizer that has none.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if wish == "auto":
        return "inst" if not base else "chat" if has_template else "raw"
    if wish == "chat" and not has_template:
        raise UsageError("this model's tokenizer has no chat template", hint="use --template inst or --template raw")
    for template in TEMPLATES:
        if wish == template:
            return template
    raise UsageError(f"unknown template {wish!r}", hint=f"choose from: auto, {', '.join(TEMPLATES)}")


def with_system(message: str, system: str | None) -> str:
    """A first message with the system text before it, for templates that know no system role."""
    return f"{system}\n\n{message}" if system else message


def unframe(prompt: str) -> str:
    """The message inside a training row's prompt; a prompt without the frame is itself the message."""
    before, _, after = PROMPT_TEMPLATE.partition("{inputs}")
    if prompt.startswith(before) and prompt.rstrip().endswith(after.rstrip()) and len(prompt.rstrip()) >= len(before) + len(after.rstrip()):
        return prompt[len(before) : len(prompt.rstrip()) - len(after.rstrip())]
    return prompt


def encode(tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None, turns: Sequence[Turn]) -> Encoded:
    """A conversation as tokens; the last turn's answer is left out if it has one.

    "inst" and "raw" put the turns one after the other, each answer closed by the end-of-sequence token ("inst") or by nothing ("raw").

    Raises:
        UsageError: There are no turns, or the chat template refuses the conversation.
    """
    if not turns:
        raise UsageError("there is nothing to answer", hint="write something first")
    if template == "chat":
        return _encode_chat(tokenizer, system, turns)
    ids: list[int] = []
    roles: list[Role] = []
    last_start = 0
    for number, turn in enumerate(turns):
        message = turn.message if number else with_system(turn.message, system)
        text = PROMPT_TEMPLATE.format(inputs=message) if template == "inst" else message
        last_start = len(ids)
        _extend(ids, roles, tokenizer(text, add_special_tokens=number == 0 or template == "inst")["input_ids"], "prompt")
        if number < len(turns) - 1:
            _extend(ids, roles, turn.ids or _plain(tokenizer, turn.answer or ""), "answer")
            if template == "inst":
                _extend(ids, roles, [int(tokenizer.eos_token_id)], "prompt")
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
            break  # The template rewrites earlier turns: the rest is tokenised as the template gives it.
        _extend(ids, roles, _plain(tokenizer, whole[position:start]), "prompt")
        _extend(ids, roles, turn.ids or _plain(tokenizer, shown), "answer")
        position = start + len(shown)
        last_start = len(ids)
    _extend(ids, roles, _plain(tokenizer, whole[position:]), "prompt")
    return Encoded(ids, roles, last_start=last_start)


def _render_chat(tokenizer: PreTrainedTokenizerBase, system: str | None, turns: Sequence[Turn]) -> tuple[str, list[int]]:
    """The rendered conversation, and where each earlier answer starts in it."""
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
    tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None, turns: Sequence[Turn], context: int | None, room: int, first_turn: int = 0
) -> Encoded:
    """Encode a conversation so that it fits the model's context and leaves room for the answer; what is left out is said in ``notice``.

    The oldest turns go first (so many that the rest fills three quarters, since every such cut means reading the rest anew). If the last
    message alone is too long, its start goes.

    Args:
        tokenizer, template, system, turns: As for :func:`encode`.
        context: The model's context in tokens; None for no limit.
        room: Tokens to keep free for the answer; at most a quarter of the context is.
        first_turn: Turns before this one were left out already.

    Raises:
        UsageError: Not even an empty message would fit (the system text is too long).
    """
    whole = encode(tokenizer, template, system, turns[first_turn:])
    if context is None or len(whole.ids) <= (limit := context - min(room, max(1, context // 4))):
        return replace(whole, first_turn=first_turn)
    was = f"the conversation is {len(whole.ids)} tokens, and the model's context of {context} leaves {limit} for it"
    for first in range(first_turn + 1, len(turns)):
        rest = encode(tokenizer, template, system, turns[first:])
        if len(rest.ids) <= limit * 3 // 4 or (first == len(turns) - 1 and len(rest.ids) <= limit):
            dropped = first - first_turn
            what = (
                f"the oldest {dropped} turns ({len(whole.ids) - len(rest.ids)} tokens) are"
                if dropped > 1
                else f"the oldest turn ({len(whole.ids) - len(rest.ids)} tokens) is"
            )
            return replace(rest, notice=f"{was}: {what} left out", first_turn=first)
    return _cut_message(tokenizer, template, system, turns, limit, was)


def _cut_message(tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None, turns: Sequence[Turn], limit: int, was: str) -> Encoded:
    last, count = turns[-1], len(turns) - 1
    whole = encode(tokenizer, template, system, [last])
    message, rest = last.message, whole
    while len(rest.ids) > limit:
        if not message:
            raise UsageError(f"the system text alone is over the {limit} tokens that the model's context leaves", hint="shorten it with /system")
        tokens = _plain(tokenizer, message)
        kept = len(tokens) - (len(rest.ids) - limit)
        tail = str(tokenizer.decode(tokens[-kept:], skip_special_tokens=False)) if kept > 0 else ""
        message = tail.lstrip("\N{REPLACEMENT CHARACTER}") if len(tail) < len(message) else message[len(message) // 8 + 1 :]
        rest = encode(tokenizer, template, system, [replace(last, message=message)])
    earlier = "" if count == 0 else " and all earlier turns" if count > 1 else " and the earlier turn"
    notice = f"{was}: the first {len(whole.ids) - len(rest.ids)} of the last message's {len(whole.ids)} tokens{earlier} are left out"
    return replace(rest, notice=notice, first_turn=count)

"""Prompt frames: the text around a user's message in a prompt.

A model answers best if its prompts look like those it was trained on. The frame of a dataset is part of its manifest, and the frame of an adapter is
the frame of its dataset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from meteora_core.data.tasks import PROMPT_TEMPLATE, TASK_ORDER
from meteora_core.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{}"
"""Placeholder for the user's message in a frame that is written as one text."""

NAMES = ("chat", "inst", "raw")
"""Names of the frames that have one: the tokenizer's chat template, MeteoRA's ``[INST] {} [/INST]``, and the message alone."""

_Part = Annotated[str, Field(max_length=100_000)]

Message = tuple[Literal["user", "assistant"], str]
"""A message's role and text."""


@dataclass(frozen=True)
class Frame:
    r"""The text before and after a user's message.

    Args:
        before, after: Text around the message; for a chat template, the text that it puts around a single message.
        chat: Whether the frame is a tokenizer's chat template, which then also formats earlier turns and system texts.
        system: System text that every row of the dataset has, if it is not part of ``before``.
        end: Token that ends an answer, as text; None for the tokenizer's end-of-sequence token.

    Example:
        >>> Frame("### Instruction:\n", "\n\n### Response:\n").around("Add 2 and 3.")
        '### Instruction:\nAdd 2 and 3.\n\n### Response:\n'
    """

    before: str = ""
    after: str = ""
    chat: bool = False
    system: str | None = None
    end: str | None = None

    @property
    def text(self) -> str:
        """The frame as one text, with ``{}`` for the message."""
        return f"{self.before}{PLACE}{self.after}"

    @property
    def name(self) -> str:
        """``"chat"``, ``"inst"`` or ``"raw"``; for any other frame, its :attr:`text`."""
        if self.chat:
            return "chat"
        return "inst" if (self.before, self.after) == (INST.before, INST.after) else "raw" if not self.before and not self.after else self.text

    def around(self, message: str) -> str:
        """The prompt that consists of a message in the frame."""
        return f"{self.before}{message}{self.after}"

    def inside(self, prompt: str) -> str | None:
        """The message of a prompt; None if the prompt does not have this frame. White space at the end of the prompt is ignored."""
        end = self.after.rstrip() if self.after.strip() else self.after
        whole = prompt.rstrip() if end != self.after else prompt
        if not whole.startswith(self.before) or not whole.endswith(end) or len(whole) < len(self.before) + len(end):
            return None
        return whole[len(self.before) : len(whole) - len(end)]

    def end_id(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The id of :attr:`end`; None if the end-of-sequence token ends an answer, or if the tokenizer has no such token."""
        if self.end is None:
            return None
        token = tokenizer.convert_tokens_to_ids(self.end)
        return int(token) if isinstance(token, int) and token != tokenizer.unk_token_id else None

    def to_json(self) -> dict[str, Any]:
        """The frame as a dictionary for JSON, without absent values."""
        values: dict[str, Any] = {"before": self.before, "after": self.after}
        return values | {name: getattr(self, name) for name in ("chat", "system", "end") if getattr(self, name)}


class FrameModel(BaseModel):
    """The schema of a frame in a JSON file; see :class:`Frame`."""

    model_config = ConfigDict(strict=True, extra="ignore")

    before: _Part
    after: _Part
    chat: bool = False
    system: _Part | None = None
    end: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    def to_frame(self) -> Frame:
        """The values as a :class:`Frame`."""
        return Frame(self.before, self.after, self.chat, self.system, self.end)


def read_frame(value: Mapping[str, Any] | None) -> Frame | None:
    """The frame for a value from a JSON file, checked by :class:`FrameModel`; None for None."""
    return None if value is None else FrameModel.model_validate(value).to_frame()


RAW = Frame()
INST = Frame(PROMPT_TEMPLATE.partition("{inputs}")[0], PROMPT_TEMPLATE.partition("{inputs}")[2])


def parse_frame(text: str) -> Frame:
    """The frame for a text with ``{}`` for the message.

    Raises:
        UsageError: The text has no ``{}``, or more than one.
    """
    if text.count(PLACE) != 1:
        what = "no" if PLACE not in text else "more than one"
        hint = "write {} once, in the place of the message: --template '### Question:\\n{}\\n### Answer:\\n'"
        raise UsageError(f"the template {text!r} has {what} {{}}", hint=hint)
    before, _, after = text.partition(PLACE)
    return Frame(before, after)


def typed(text: str) -> str:
    r"""A template that was typed in a shell, with ``\n`` and ``\t`` replaced by a line break and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def chat_frame(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Frame:
    """The frame that a tokenizer's chat template puts around one message.

    Args:
        tokenizer: Tokenizer of the base model.
        system: System text; None for the text that the template itself adds.

    Raises:
        UsageError: The tokenizer has no chat template, or one that does not take a single message.
    """
    mark = "METEORA-MESSAGE"
    before, message, after = render_chat(tokenizer, system, [("user", mark)]).partition(mark)
    if not message:
        raise UsageError("this model's chat template leaves out the user's message", hint="use --template inst, raw or '…{}…'")
    return Frame(before, after, chat=True, system=system, end=_chat_end(tokenizer, mark))


def render_chat(tokenizer: PreTrainedTokenizerBase, system: str | None, messages: Sequence[Message]) -> str:
    """Messages as a tokenizer's chat template formats them, up to the start of the answer.

    If the template has no system role, the system text is put before the first message. A BOS token at the start is removed if the tokenizer adds one to
    every text.

    Args:
        tokenizer: Tokenizer of the base model.
        system: System text; None for none.
        messages: Messages in order; the last one is from the user.

    Raises:
        UsageError: The tokenizer has no chat template, or the template rejects the messages.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("this model's tokenizer has no chat template", hint="use --template inst, --template raw or --template '…{}…'")
    turns = [{"role": role, "content": text} for role, text in messages]
    lead = [{"role": "system", "content": system}] if system else []
    try:
        whole = str(tokenizer.apply_chat_template([*lead, *turns], tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        if not system:
            raise UsageError(f"the model's chat template rejects this conversation: {error}", hint="use --template inst or raw") from error
        return render_chat(tokenizer, None, [("user", with_system(messages[0][1], system)), *messages[1:]])
    bos = tokenizer.bos_token
    return whole.removeprefix(str(bos)) if bos and _adds_bos(tokenizer) else whole


Default = TypeVar("Default", Frame, Frame | None)


def pick_frame(wish: str, default: Default, tokenizer: PreTrainedTokenizerBase) -> Frame | Default:
    """The frame that ``wish`` names; ``default`` for "auto".

    Args:
        wish: Name of the frame: "auto", "chat" (the tokenizer's chat template), "inst", "raw", or a text with ``{}`` for the message.
        default: Frame of the model, which is returned for "auto".
        tokenizer: Tokenizer of the base model.

    Raises:
        UsageError: The template is unknown, or it is "chat" and the tokenizer has no chat template.
    """
    if wish == "auto":
        return default
    if wish == "chat":
        return chat_frame(tokenizer)
    if wish in ("inst", "raw"):
        return INST if wish == "inst" else RAW
    if PLACE in wish:
        return parse_frame(wish)
    raise UsageError(f"unknown template {wish!r}", hint=f"choose from: auto, {', '.join(NAMES)}, or a text with {{}} for the message")


def usable(frame: Frame, tokenizer: PreTrainedTokenizerBase) -> Frame:
    """A recorded frame for use with a tokenizer. A chat template that is not the tokenizer's becomes a frame of plain text."""
    if not frame.chat:
        return frame
    current = chat_frame(tokenizer, frame.system) if getattr(tokenizer, "chat_template", None) else RAW
    return frame if (current.before, current.after) == (frame.before, frame.after) else replace(frame, chat=False, system=None)


def default_frame(names: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame to use if none is recorded: ``[INST] {} [/INST]`` for the paper's tasks, otherwise the tokenizer's chat template, if it has one.

    Args:
        names: Names of the adapters; empty for a base model without adapters.
        tokenizer: Tokenizer of the base model.
    """
    if not (names and all(name in TASK_ORDER for name in names)) and getattr(tokenizer, "chat_template", None):
        return chat_frame(tokenizer)
    return INST if names else RAW


def with_system(message: str, system: str | None) -> str:
    """The first message with the system text before it, for frames without a system role."""
    return f"{system}\n\n{message}" if system else message


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _chat_end(tokenizer: PreTrainedTokenizerBase, mark: str) -> str | None:
    """The token with which the template ends an answer, or None if that is the end-of-sequence token."""
    messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": f"{mark}-2"}]
    tail = str(tokenizer.apply_chat_template(messages, tokenize=False)).partition(f"{mark}-2")[2]
    ids = tokenizer(tail.strip(), add_special_tokens=False)["input_ids"] if tail.strip() else []
    if not ids or ids[0] == tokenizer.eos_token_id or ids[0] not in tokenizer.all_special_ids:
        return None
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


_MARK = re.compile(
    r"\[INST\] ?|<\|[^|<>\n]{1,40}\|>|<(?:start_of_turn|extra_id_\d+|s)>(?:user|model)?"
    r"|(?im:^(?:user|human|question|query|q|input|instruction|prompt|text|problem|task)\s?: ?)"
)
"""Texts with which :attr:`Frame.before` can end within a line: a chat token or the name of a speaker."""


def common_frame(prompts: Iterable[str]) -> Frame:
    r"""The frame that complete prompts have in common.

    It consists of their common start, up to a line break, a chat token or a speaker's name, and their common end, starting with a line break or a chat
    token.

    Args:
        prompts: Complete prompts; a single prompt has no frame, unless it is ``[INST] … [/INST]``.

    Example:
        >>> common_frame(["Q: Is it red?\nA:", "Q: Who won?\nA:"]).text
        'Q: {}\nA:'
    """
    texts = list(dict.fromkeys(prompts))
    if texts and all(INST.inside(text) is not None for text in texts):
        return INST
    if len(texts) < 2:
        return RAW
    start, end = _common_start(texts), _common_start([text[::-1] for text in texts])[::-1]
    breaks = [start.rfind("\n") + 1, *(match.end() for match in _MARK.finditer(start))]
    before = start[: max(breaks)]
    shortest = min(map(len, texts)) - len(before)
    end = end[max(0, len(end) - shortest) :]
    first = min((index for index in (end.find("\n"), end.find("[/INST]"), end.find("<"), end.find(" [/INST]")) if index >= 0), default=-1)
    return Frame(before, end[first:] if first >= 0 else "")


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))]

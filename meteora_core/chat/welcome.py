"""The greeting of a chat: the tasks that the model's adapters were trained for, and messages to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from meteora_core.adapters.base_route import NO_ADAPTER
from meteora_core.chat.chat_model import ChatModel
from meteora_core.data.dataset_frames import dataset_frame
from meteora_core.data.frames import RAW
from meteora_core.data.rows import iter_rows, split_path
from meteora_core.errors import MeteoraError
from meteora_core.text import listed

PROMPTS = 3
"""Number of messages that the greeting shows."""

_LISTED = 12
_LOOKED_AT = 20
_LONGEST = 160

_EXAMPLES = {
    "alpaca": "Give three tips for staying healthy.",
    "news_commentary_de": "Den folgenden Text ins Englische übersetzen. Die Regierung hat gestern ein neues Gesetz beschlossen.",
    "strategyqa": "Q: Could a llama birth twice during War in Vietnam (1945-46)? A:",
    "gsm8k": "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many loaves does she sell that day?",
    "news_commentary_es": "Traducir las siguientes frases al inglés. El gobierno aprobó ayer una nueva ley.",
    "news_commentary_it": "Tradurre le seguenti frasi in inglese. Il governo ha approvato ieri una nuova legge.",
}
"""Messages in the form of the tasks' rows, each on one line, by task."""


@dataclass(frozen=True)
class Welcome:
    """The greeting before the first message.

    Attributes:
        skills: Sentence about the tasks that the model was trained for; empty for a base model.
        prompts: Messages that the model can answer.
    """

    skills: str
    prompts: tuple[str, ...]


def welcome(chat_model: ChatModel, data_dir: Path) -> Welcome:
    """Build the greeting from the names of the model's adapters.

    Args:
        chat_model: The model that answers.
        data_dir: Folder of all datasets, whose test rows supply messages for tasks of the user.
    """
    if chat_model.routing is None:
        return Welcome("", ())
    if chat_model.kind == "adapter" and chat_model.adapter:
        return greeting([chat_model.adapter], data_dir)
    return greeting(chat_model.routing.names, data_dir)


def greeting(adapters: Sequence[str], data_dir: Path) -> Welcome:
    """Build the greeting from the names of adapters; see :func:`welcome`."""
    names = [name for name in adapters if name != NO_ADAPTER]
    what = "one task and answers everything as such" if len(names) == 1 else f"{len(names)} tasks and answers everything as one of them"
    if NO_ADAPTER in adapters:
        what = f"{'one task' if len(names) == 1 else f'{len(names)} tasks'} and answers other questions as its base model does"
    return Welcome(
        f"This model was trained for {what}: {listed(names, _LISTED)}{' (/adapters)' if len(names) > _LISTED else ''}.",
        tuple(islice(_prompts(names, data_dir), PROMPTS)),
    )


def _prompts(names: Sequence[str], data_dir: Path) -> Iterator[str]:
    """One message per task: first the known messages, then messages from the test rows of the other tasks."""
    known = [name for name in _EXAMPLES if name in names]
    yield from (_EXAMPLES[name] for name in known)
    for name in names:
        file = split_path(data_dir, name, "test")
        if name in known or not file.is_file():
            continue
        try:
            frame = dataset_frame(data_dir, name) or RAW
            messages = [(frame.inside(row.prompt) or "").strip() for row in islice(iter_rows(file), _LOOKED_AT)]
        except MeteoraError:  # a broken dataset is reported by the commands that use it
            continue
        yield from [message for message in messages if message and len(message) <= _LONGEST and message.isprintable()][:1]

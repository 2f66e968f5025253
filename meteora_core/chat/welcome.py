"""What a model can do, in a few lines: the tasks that its adapters were trained for, and messages to try."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from meteora_core.chat.prompts import unframe
from meteora_core.chat.speaker import Speaker
from meteora_core.data.rows import iter_rows, split_path
from meteora_core.errors import MeteoraError
from meteora_core.text import listed

PROMPTS = 3
"""Messages that are shown."""

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
"""Messages in the form of the tasks' rows, each on one line."""


@dataclass(frozen=True)
class Welcome:
    """The greeting before the first message.

    Attributes:
        skills: What the model can do, in a sentence; empty for a base model.
        prompts: Messages that it can answer.
    """

    skills: str
    prompts: tuple[str, ...]


def welcome(speaker: Speaker, data_dir: Path) -> Welcome:
    """What the model can do, from its adapters' names.

    Args:
        speaker: The model.
        data_dir: The folder of all datasets; its test rows supply messages for the user's own tasks.
    """
    if speaker.routing is None:
        return Welcome("", ())
    names = [speaker.adapter] if speaker.kind == "adapter" and speaker.adapter else list(speaker.routing.names)
    what = "one task and answers everything as such" if len(names) == 1 else f"{len(names)} tasks and answers everything as one of them"
    return Welcome(
        f"This model was trained for {what}: {listed(names, _LISTED)}{' (/adapters)' if len(names) > _LISTED else ''}.",
        tuple(islice(_prompts(names, data_dir), PROMPTS)),
    )


def _prompts(names: Sequence[str], data_dir: Path) -> Iterator[str]:
    """One message a task: known ones first, then from the built rows of the others."""
    known = [name for name in _EXAMPLES if name in names]
    yield from (_EXAMPLES[name] for name in known)
    for name in names:
        file = split_path(data_dir, name, "test")
        if name in known or not file.is_file():
            continue
        try:
            messages = [unframe(row.prompt).strip() for row in islice(iter_rows(file), _LOOKED_AT)]
        except MeteoraError:  # a broken dataset is reported by the commands that use it
            continue
        yield from [message for message in messages if message and len(message) <= _LONGEST and message.isprintable()][:1]

"""Finds example prompts of an adapter without rows: in a file ``prompts.jsonl``, or in the widget of the adapter's model card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from meteora_core.adapters.config import find_adapter
from meteora_core.data.rows import check_texts
from meteora_core.errors import DataError
from meteora_core.json_files import has_surrogate
from meteora_core.reading import check_regular, is_regular, read_text, shown_path

FILE = "prompts.jsonl"
"""Name of the file with example prompts, one JSON string or object with a ``prompt`` per line."""

MOST = 100
"""Largest number of example prompts that are read for an adapter."""

_CARD, _CARD_BYTES = "README.md", 1 << 20


def example_prompts(name: str, data: Path | None, adapter: Path | None) -> list[str]:
    """Example prompts of an adapter, without answers.

    The first of these places that exists is read: ``NAME.prompts.jsonl`` in the folder ``data`` or next to the adapter's folder, ``prompts.jsonl`` in the
    adapter's folder, and the examples that the model card of the adapter shows on the hub (``widget`` in the header of ``README.md``).

    Args:
        name: Name of the adapter.
        data: Folder that contains all datasets; None for none.
        adapter: PEFT folder of the adapter, or the folder above its ``default``; None if unknown.

    Returns:
        At most :data:`MOST` prompts, with or without the frame of the adapter's prompts; empty if there are none.

    Raises:
        DataError: A file ``prompts.jsonl`` is broken. A card that cannot be read is ignored.

    Example:
        >>> from meteora_core.living.example_prompts import example_prompts
        >>> example_prompts("gsm8k", None, Path("adapters/gsm8k"))
        []
    """
    inside = [] if adapter is None else [adapter, find_adapter(adapter) or adapter]
    files = [folder / f"{name}.{FILE}" for folder in (data, adapter.parent if adapter is not None else None) if folder is not None]
    for file in (*files, *(folder / FILE for folder in inside)):
        if is_regular(file):
            return _of_file(file)
    cards = (list(islice(_of_card(folder / _CARD), MOST)) for folder in inside)
    return next((prompts for prompts in cards if prompts), [])


def _of_file(file: Path) -> list[str]:
    prompts = []
    for number, line in enumerate(islice((line for line in read_text(file).splitlines() if line.strip()), MOST), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{shown_path(file)}, prompt {number}: neither a text nor an object with a text `prompt`", hint="correct or remove the line")
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{shown_path(file)} has no prompts", hint="add some, or remove it")
    check_texts(prompts)
    return prompts


def _of_card(card: Path) -> Iterator[str]:
    if not is_regular(card) or check_regular(card) > _CARD_BYTES:
        return
    from huggingface_hub.repocard import metadata_load

    try:
        header: Any = metadata_load(card)
    except Exception:  # a card with a broken header shows no examples
        return
    widget = header.get("widget") if isinstance(header, dict) else None
    for entry in widget if isinstance(widget, list) else ():
        text = entry.get("text") if isinstance(entry, dict) else None
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if text is None and isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            text = messages[-1].get("content")
        if isinstance(text, str) and text.strip() and not has_surrogate(text):
            yield text

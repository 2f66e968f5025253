"""The user's options for reading a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Tokenizer = Callable[[], Any]
"""A function that loads the base model's tokenizer if a chat template or an end token is needed."""


@dataclass(frozen=True)
class Reading:
    """Rules by which records become rows; absent values are detected from the dataset.

    Args:
        columns: Pairs of a known column (``"question"``) and its name in the dataset (``"ask"`` or ``"fields.ask"``). With pairs, other columns are ignored.
        template: Template of the prompt: ``"chat"``, ``"inst"`` or ``"raw"``, a frame with ``{}`` in the place of the user's text, or a whole prompt with
            names of columns in braces.
        target: Template of the response, with names of columns in braces.
        subset: Configuration of a hub dataset.
        skip_invalid: Whether to skip and count invalid records instead of refusing the dataset.
        tokenizer: Function that loads the base model's tokenizer; without it, datasets that need a tokenizer are refused.
    """

    columns: tuple[tuple[str, str], ...] = ()
    template: str | None = None
    target: str | None = None
    subset: str | None = None
    skip_invalid: bool = False
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

"""What a user says about the columns of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Tokenizer = Callable[[], Any]
"""Loads the base model's tokenizer, when a chat template or an end token is needed."""


@dataclass(frozen=True)
class Reading:
    """How records become rows; everything that is absent is found out.

    Args:
        columns: Pairs of a known column (``"question"``) and the dataset's own name for it (``"ask"`` or ``"fields.ask"``). With pairs, no other column counts.
        template: ``"chat"``, ``"inst"`` or ``"raw"``; a frame with ``{}`` in the place of the user's text; or a whole prompt with columns' names in braces.
        target: The response, with columns' names in braces.
        subset: A hub dataset's configuration.
        skip_invalid: Leave out records that make no row, and count them, instead of refusing the dataset.
        tokenizer: Loads the base model's tokenizer; without it, what needs one is refused.
    """

    columns: tuple[tuple[str, str], ...] = ()
    template: str | None = None
    target: str | None = None
    subset: str | None = None
    skip_invalid: bool = False
    tokenizer: Tokenizer | None = field(default=None, compare=False, repr=False)

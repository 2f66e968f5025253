"""Functions of higher layers that lower layers call without importing them; ``meteora_core/__init__.py`` sets them."""

from __future__ import annotations

from typing import Protocol


class SaveAttached(Protocol):
    """A function that writes the checkpoint of an attached model, such as :func:`meteora_core.checkpoints.pretrained.save_attached`."""

    def __call__(self, model: object, save_directory: object, *args: object, **options: object) -> None: ...


save_attached: SaveAttached
"""The function that ``save_pretrained`` of a model with attached adapters calls."""

"""Functions of upper packages that lower ones call without importing them; ``meteora_core/__init__.py``, which knows all of them, sets them."""

from __future__ import annotations

from typing import Protocol


class SaveAttached(Protocol):
    """Writes the checkpoint of an attached model: :func:`meteora_core.checkpoints.pretrained.save_attached`."""

    def __call__(self, model: object, save_directory: object, *args: object, **options: object) -> None: ...


save_attached: SaveAttached
"""Called by ``save_pretrained`` of a model with adapters attached."""

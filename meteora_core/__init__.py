"""Meteora: many LoRA adapters in one language model, chosen per token by a trained gate in every linear layer (MeteoRA).

The names below are loaded when first used, so that ``import meteora_core`` costs nothing.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from meteora_core import hooks

if TYPE_CHECKING:
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.checkpoints.authors import load_authors_checkpoint
    from meteora_core.checkpoints.native import load_checkpoint, save_checkpoint
    from meteora_core.fused.fuse import fuse, unfuse
    from meteora_core.model.attach import attach, detach
    from meteora_core.routing import record_routes

__version__ = "0.1.0"

_DEFINED_IN = {
    "AdapterBank": "meteora_core.adapters.bank",
    "attach": "meteora_core.model.attach",
    "detach": "meteora_core.model.attach",
    "fuse": "meteora_core.fused.fuse",
    "unfuse": "meteora_core.fused.fuse",
    "load_checkpoint": "meteora_core.checkpoints.native",
    "save_checkpoint": "meteora_core.checkpoints.native",
    "load_authors_checkpoint": "meteora_core.checkpoints.authors",
    "record_routes": "meteora_core.routing",
}

__all__ = [
    "AdapterBank",
    "__version__",
    "attach",
    "detach",
    "fuse",
    "load_authors_checkpoint",
    "load_checkpoint",
    "record_routes",
    "save_checkpoint",
    "unfuse",
]


def _save_attached(model: Any, save_directory: Any, *args: Any, **options: Any) -> None:
    from meteora_core.checkpoints.pretrained import save_attached

    save_attached(model, save_directory, *args, **options)


hooks.save_attached = _save_attached


def __getattr__(name: str) -> Any:
    if name in _DEFINED_IN:
        from importlib import import_module

        import_module("meteora_core.checkpoints.auto").register()
        return getattr(import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module 'meteora_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names and the modules in use, so that tab completion and ``help`` show them before they are first used."""
    return sorted({*__all__, *(name for name, value in globals().items() if isinstance(value, ModuleType) or name.startswith("__"))})

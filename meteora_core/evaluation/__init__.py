"""Evaluation: cleaning and scoring of responses, results files and reports.

The public names are imported on first use, and scoring imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meteora_core.evaluation.clean import clean_response
    from meteora_core.evaluation.scoring import score

_MODULES = {
    "clean_response": "meteora_core.evaluation.clean",
    "score": "meteora_core.evaluation.scoring",
}

__all__ = ["clean_response", "score"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'meteora_core.evaluation' has no attribute {name!r}")

"""Routers that MeteoRA is compared with, in one harness: `meteora eval --model router:NAME`.

Each router chooses among the adapters in one folder. Arrow and MeteoRA's trained gates are in :mod:`meteora_core.evaluation`.
"""

from __future__ import annotations

from meteora_core.routers.make import make_router

__all__ = ["make_router"]

"""Routers that MeteoRA is compared with, in one harness: `meteora eval --model router:NAME`.

Each chooses among the adapters of one folder. Arrow and MeteoRA's own gates are in :mod:`meteora_core.evaluation`; the others are here.
"""

from __future__ import annotations

from meteora_core.routers.make import make_router

__all__ = ["make_router"]

"""How the layers of an attached model choose adapters, and records of what they chose.

:class:`Meteora` is what ``attach`` puts on a model as ``model.meteora``; :func:`record_routes` records the layers' choices.
"""

from meteora_core.routing.mode import IGNORE, GateLabels, GateObservations, LastCall, Mode
from meteora_core.routing.options import FixedRows, RoutingOptions, RowRoutes
from meteora_core.routing.provenance import GateOrigin, GateStart, Provenance
from meteora_core.routing.routes import Recorder, Routes, RoutingDecision
from meteora_core.routing.state import Meteora, base_record, find_meteora, is_compiled, meteora_of, record_routes

__all__ = [
    "IGNORE",
    "FixedRows",
    "GateLabels",
    "GateObservations",
    "GateOrigin",
    "GateStart",
    "LastCall",
    "Meteora",
    "Mode",
    "Provenance",
    "Recorder",
    "Routes",
    "RoutingDecision",
    "RoutingOptions",
    "RowRoutes",
    "base_record",
    "find_meteora",
    "is_compiled",
    "meteora_of",
    "record_routes",
]

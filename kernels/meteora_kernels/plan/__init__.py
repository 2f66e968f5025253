"""The choice of a backend and a path: :func:`choose` decides, from a table of measured choices for each GPU."""

from meteora_kernels.plan.backend import Call, choose_backend
from meteora_kernels.plan.choose import choices_of, choose, table_of, use, user_file
from meteora_kernels.plan.invariant import batch_invariance
from meteora_kernels.plan.machine import interpreted, readable, triton_installed, why_not_triton
from meteora_kernels.plan.table import EVER, Case, Facts, Row, Span, Table

__all__ = [
    "EVER",
    "Call",
    "Case",
    "Facts",
    "Row",
    "Span",
    "Table",
    "batch_invariance",
    "choices_of",
    "choose",
    "choose_backend",
    "interpreted",
    "readable",
    "table_of",
    "triton_installed",
    "use",
    "user_file",
    "why_not_triton",
]

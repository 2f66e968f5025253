"""Which backend and which path ``auto`` takes: a frozen table of measured choices, first match wins, with the reason.

The limits were measured on one H100 (bfloat16, Llama-3-8B shapes) and on a 2-core CPU with AVX-512; docs/performance.md has the numbers.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

FEW_TOKENS = 16
"""Up to here (one tile of a matrix unit) decoding kernels win."""
INLINE_TOKENS = 64
"""Up to here every program of the pass over the output routes its tokens itself; above, one kernel before it does."""
PACKED_TOKENS = 1024
"""Up to here a fused group multiplies base, gates and A in one GEMM; above, the pass over the output that B then needs costs more."""
GROUPED_WORK = 4 << 20
"""From this many tokens times total rank on, and from GROUPED_GAIN times the chosen rank, the chosen rows alone beat products with all rows."""
GROUPED_GAIN = 16
CHOSEN_RANK = 3072
"""While decoding: from this total rank on, A's chosen rows are read after the gates, not all rows along with them."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a choice depends on.

    Attributes:
        tokens: M.
        adapters: N.
        total_rank: R.
        top_k: k.
        dtype: Of the input.
        device: "cpu", "cuda", …
        capability: Compute capability of a CUDA device, major * 10 + minor; 0 elsewhere.
        training: Gradients are wanted.
    """

    tokens: int
    adapters: int
    total_rank: int
    top_k: int
    dtype: torch.dtype
    device: str
    capability: int = 0
    training: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table: where all of its conditions hold, ``backend`` is chosen, for ``reason``."""

    backend: str
    reason: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    needs_triton: bool = False
    least_capability: int = 0
    most_top_k: int = 1 << 30
    most_adapters: int = 1 << 30

    def fits(self, case: Case) -> bool:
        return (
            (not self.devices or case.device in self.devices)
            and (not self.dtypes or case.dtype in self.dtypes)
            and (not self.needs_triton or triton_installed())
            and case.capability >= self.least_capability
            and case.top_k <= self.most_top_k
            and case.adapters <= self.most_adapters
        )


PLAN: tuple[Rule, ...] = (
    Rule("reference", "float64 is what the reference is for", dtypes=(torch.float64,)),
    Rule("dense", "no GPU kernels for this device; gathers and GEMMs are fastest", devices=("cpu", "mps", "xpu", "meta")),
    Rule(
        "triton",
        "GPU kernels: fused routing, one pass over the output",
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        needs_triton=True,
        least_capability=80,
        most_top_k=16,
        most_adapters=4096,
    ),
    Rule("dense", "GEMMs run everywhere (Triton is missing, the GPU is older than compute capability 8.0, or top-k above 16)"),
)


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Looked up once, and not by a function that torch.compile would have to trace."""


def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return _TRITON_INSTALLED


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on a CPU (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(case: Case) -> tuple[str, str]:
    """The backend for a case, and why."""
    for rule in PLAN:
        if rule.fits(case):
            return rule.backend, rule.reason
    raise AssertionError("the last rule fits every case")


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run here; None when it can."""
    if not triton_installed():
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"the tensors lie on {device}, the kernels need a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    return None


def path(tokens: int, total_rank: int, top_k: int, max_rank: int) -> str:
    """The Triton backend's way for inference: "few", "many" or "grouped"."""
    if tokens <= FEW_TOKENS:
        return "few"
    if tokens * total_rank >= GROUPED_WORK and total_rank >= GROUPED_GAIN * top_k * max_rank:
        return "grouped"
    return "many"


def group_path(tokens: int) -> str:
    """The way of a fused group: "decode", "packed" (one GEMM over base, gates and A, then B) or "split" (A and B first, base on top)."""
    if tokens <= FEW_TOKENS:
        return "decode"
    return "packed" if tokens <= PACKED_TOKENS else "split"


def chosen_rows_only(total_rank: int, top_k: int, max_rank: int) -> bool:
    """While decoding: read A's chosen rows after the gates (True) or all of A with them."""
    return total_rank >= max(CHOSEN_RANK, GROUPED_GAIN * top_k * max_rank)

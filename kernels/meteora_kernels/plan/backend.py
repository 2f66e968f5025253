"""The choice of a backend for ``auto``: the first row of a short table that fits, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from meteora_kernels.plan import machine


@dataclass(frozen=True, slots=True)
class Call:
    """The facts that the choice of a backend depends on.

    Attributes:
        tokens: Number of tokens M.
        adapters: Number of adapters N.
        total_rank: Sum of the adapters' ranks R.
        top_k: Number of adapters per token k.
        dtype: The dtype of the input.
        device: The type of the device: "cpu", "cuda", …
        capability: The compute capability of a CUDA device, major * 10 + minor; 0 for other devices.
        training: Whether gradients are needed.
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
class BackendRow:
    """A row of the table: if all its conditions hold, ``backend`` is chosen, for ``reason``."""

    backend: str
    reason: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    needs_triton: bool = False
    least_capability: int = 0
    most_top_k: int = 1 << 30
    most_adapters: int = 1 << 30

    def fits(self, call: Call) -> bool:
        """Whether all conditions hold for a call."""
        return (
            (not self.devices or call.device in self.devices)
            and (not self.dtypes or call.dtype in self.dtypes)
            and (not self.needs_triton or machine.triton_installed())
            and call.capability >= self.least_capability
            and call.top_k <= self.most_top_k
            and call.adapters <= self.most_adapters
        )


BACKEND_ROWS: tuple[BackendRow, ...] = (
    BackendRow("reference", "float64 is what the reference is for", dtypes=(torch.float64,)),
    BackendRow("dense", "no GPU kernels for this device; gathers and GEMMs are fastest", devices=("cpu", "mps", "xpu", "meta")),
    BackendRow(
        "triton",
        "GPU kernels: fused routing, one pass over the output",
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        needs_triton=True,
        least_capability=80,
        most_top_k=16,
        most_adapters=4096,
    ),
    BackendRow("dense", "GEMMs run everywhere (Triton is missing, the GPU is older than compute capability 8.0, or top-k above 16)"),
)


def choose_backend(call: Call) -> tuple[str, str]:
    """The backend for a call, and the reason."""
    for row in BACKEND_ROWS:
        if row.fits(call):
            return row.backend, row.reason
    raise AssertionError("the last row fits every call")

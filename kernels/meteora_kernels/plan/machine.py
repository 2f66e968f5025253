"""Capabilities of this machine: Triton and its interpreter, the GPU's multiprocessors and its copy engine."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Looked up at import, because torch.compile cannot trace the lookup."""

HALVES = (torch.float16, torch.bfloat16)
"""The 16-bit dtypes."""


def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return _TRITON_INSTALLED


def interpreted() -> bool:
    """Whether Triton's interpreter is on. It runs the kernels on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """The reason why the Triton backend cannot run on a device with a dtype; None if it can.

    Args:
        device: The type of the device: "cpu", "cuda", …
        dtype: The dtype of the input.
    """
    if not triton_installed():
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"the tensors are on {device}, the kernels need a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    return None


@lru_cache(maxsize=64)
def capability(device: torch.device) -> int:
    """The compute capability of a CUDA device, major * 10 + minor; 0 for other devices."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU whose matrix units and copy engine take tensor descriptors (compute capability 9); 0 for other GPUs."""
    facts = torch.cuda.get_device_properties(device)
    return int(facts.multi_processor_count) if facts.major == 9 else 0


def at_once(device: torch.device) -> int:
    """The number of programs that run at the same time if each fills a multiprocessor's shared memory; without a GPU, that of an H100."""
    return multiprocessors(device) if device.type == "cuda" else 132


def why_not_at_once(device: torch.device, programs: int) -> str | None:
    """The reason why this number of programs cannot wait for each other on a device; None if all of them run at the same time."""
    if device.type != "cuda":
        return None if interpreted() else "the kernel needs a CUDA GPU"
    most = multiprocessors(device)
    if not most:
        return "the kernel needs a GPU of compute capability 9.0"
    return None if programs <= most else f"{programs} programs wait for each other, and the GPU runs {most} at once"


def readable(rows: Tensor) -> bool:
    """Whether the copy engine can read these rows: 16-bit numbers, columns contiguous, every row aligned to 16 bytes."""
    return rows.dtype in HALVES and not rows.data_ptr() % 16 and not rows.stride(-2) % 8 and rows.stride(-1) == 1


UNREADABLE = "the copy engine cannot read these rows: it takes 16-bit numbers in rows aligned to 16 bytes"
"""Why a path with the copy engine cannot run a case whose rows are not :func:`readable`."""

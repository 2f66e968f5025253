"""Releases memory between the stages of a long run."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Return freed memory to the system.

    Training frees many blocks of different sizes, which the C library keeps for reuse: several gigabytes after a few steps of a small model on a CPU.
    PyTorch's cache of CUDA memory is emptied too.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Releases memory between the stages of a long run, and tells how much is available."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path


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


def available_bytes() -> int:
    """The memory that programs can still allocate without swapping, in bytes; 0 if the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0

"""The second environment, the one with vLLM for CPUs, which ``make test-vllm`` makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PYTHON = os.environ.get("VLLM_TEST_PYTHON", "")
"""Its interpreter; empty without one."""
needs_vllm = pytest.mark.skipif(not PYTHON or not Path(PYTHON).is_file(), reason="needs an environment with vLLM: make test-vllm")


def environment() -> dict[str, str]:
    """The variables of a process with vLLM."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_", "METEORA_", "TRITON_", "PYTEST_"))}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "meteora",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "METEORA_VLLM_COUNT_EVERY": "1",
    }

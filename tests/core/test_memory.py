"""Memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

FREED = """
import resource
from meteora_core.memory import release_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

blocks = [bytearray(60_000) for _ in range(5_000)]  # small enough for the heap, not for pages of their own
keep = bytearray(60_000)  # the heap's end stays in use, so that nothing is given back by itself
full = resident()
del blocks
freed = resident()
release_memory()
print(full, freed, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back() -> None:
    full, freed, left = map(int, subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True).stdout.split())
    assert full > 300_000_000
    if freed < 250_000_000:
        pytest.skip("this C library gives memory back by itself")
    assert left < 100_000_000

"""Some malformed inputs, kills and failing writes: a part of what ``make fuzz`` and ``make chaos`` run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_silently_wrong() -> None:
    """In a process of its own: it forks a child a case, which must not have the threads of other tests."""
    command = [sys.executable, "-m", "tests.robustness", "--seed", "7", "--cases", "160", "--kills"]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("METEORA_")}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "160 " in done.stdout

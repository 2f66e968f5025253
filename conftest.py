"""What holds for the tests in ``tests/`` and for the examples in docstrings."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

if os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the cores. PyTorch reads this when it is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import torch

# The tests that press Ctrl-C need it. pytest-xdist ignores it in its workers, and a shell in what it runs in the background; children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter; Triton reads this when it is first imported


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the machine must not reach a test."""
    for name in [name for name in os.environ if name.startswith("METEORA_") and name != "METEORA_CACHE"]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _kernels_still_run() -> Iterator[None]:
    """A test after which ``auto`` leaves the GPU kernels alone would change what later tests exercise."""
    from meteora_kernels.mixture import _broken

    yield
    assert not _broken, f"this test made auto give up the GPU kernels: {_broken}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def documented_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the examples of docstrings run; see :mod:`support.documented_folder`."""
    from support.documented_folder import write_documented_folder

    return write_documented_folder(tmp_path_factory.mktemp("documented"))


@pytest.fixture(autouse=True)
def _examples_run_in_their_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every docstring's examples start in a fresh copy of that folder."""
    if isinstance(request.node, pytest.DoctestItem):
        folder = tmp_path_factory.mktemp("example")
        shutil.copytree(request.getfixturevalue("documented_folder"), folder, dirs_exist_ok=True)
        monkeypatch.chdir(folder)

"""A folder of adapters, and a checkpoint of three of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meteora_core.living.route import RouteOptions, route_adapters
from support.living_folder import write_living_folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base/``, ``adapters/`` and rows, for reading alone."""
    return write_living_folder(tmp_path_factory.mktemp("living"))


@pytest.fixture(scope="session")
def routed(world: Path) -> Path:
    """A checkpoint of count, shout and spell without a base route, for reading alone."""
    route_adapters(world / "adapters", world / "runs" / "three", RouteOptions(data=world / "datasets", exclude=("sum",), base_route=False, device="cpu"))
    return world / "runs" / "three"


@pytest.fixture
def checkpoint(routed: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, for changing."""
    shutil.copytree(routed, tmp_path / "m")
    return tmp_path / "m"

"""The official npm client of OpenAI against the server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.server import RunningServer

MODULES = Path(os.environ.get("OPENAI_NODE_MODULES", "node_modules")).resolve()
"""Folder into which ``npm install openai`` has put the client."""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on this machine")
@pytest.mark.skipif(not (MODULES / "openai").is_dir(), reason="npm install openai was not run here; OPENAI_NODE_MODULES names another folder")
def test_the_contract_holds(server: RunningServer) -> None:
    script = Path(__file__).with_name("openai_contract.mjs")
    done = subprocess.run(["node", script, server.url, "a-secret-key", MODULES.parent], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == "all passed", done.stderr
    server.wait_until_idle(30)

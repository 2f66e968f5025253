"""Adapters that join and leave a running server."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from meteora_core.adapters.base_route import NO_ADAPTER
from meteora_core.chat.chat_model import load_chat_model
from meteora_core.checkpoints.gate_statistics import Recipe, read_statistics
from meteora_core.living.checkpoints import BARE_SHARE
from meteora_core.living.options import ANSWER_SHARE
from meteora_core.living.route import RouteOptions, route_adapters
from meteora_core.serving.app import AppOptions
from meteora_core.serving.bank_changes import BankChanges
from meteora_core.settings import load_settings
from support.living_folder import NAMES, write_living_folder
from support.server import running_server


def test_adapters_are_added_and_removed_while_requests_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = write_living_folder(tmp_path_factory.mktemp("living"))
    checkpoint = folder / "runs" / "three"
    route_adapters(folder / "adapters", checkpoint, RouteOptions(data=folder / "datasets", exclude=("sum",), device="cpu"))
    chat_model = load_chat_model(load_settings(None, {"model": {"device": "cpu"}}), checkpoint=checkpoint)
    changes = BankChanges((folder / "adapters",), checkpoint, folder / "datasets")
    with running_server(chat_model, AppOptions(changes=changes)) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        body = {"model": "meteora", "prompt": "count", "max_tokens": 25, "ignore_eos": True, "temperature": 0}
        before = client.post("/v1/completions", json=body).json()["choices"]
        running: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: running.append(httpx.post(f"{server.url}/v1/completions", json={**body, "n": 4}, timeout=120)))
        thread.start()
        added = client.post("/v1/meteora/adapters", json={"name": "sum", "path": "sum"})
        thread.join()
        assert added.status_code == 200, added.text
        assert {entry["name"] for entry in added.json()["data"]} == {*NAMES, NO_ADAPTER}
        assert running[0].status_code == 200
        assert "sum" in [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert client.post("/v1/completions", json={**body, "model": "sum"}).status_code == 200
        assert client.get("/version").json()["bank_version"] == 1
        for name, path, status in (("sum", "sum", 409), ("x", "../base", 403), ("x", "/etc", 403), ("x", "nothing", 403), ("a/b", "spell", 400)):
            refused = client.post("/v1/meteora/adapters", json={"name": name, "path": path})
            assert refused.status_code == status, refused.text
            assert "error" in refused.json()
        assert client.delete("/v1/meteora/adapters/nothing").status_code == 404
        assert client.delete("/v1/meteora/adapters/sum").status_code == 200
        assert client.post("/v1/completions", json={**body, "model": "sum"}).status_code == 404
        assert client.post("/v1/completions", json=body).json()["choices"] == before
    bank = changes._live
    assert bank is not None
    assert set(bank.statistics) == set(read_statistics(checkpoint, [*NAMES, NO_ADAPTER]))
    assert bank.collector.how.recipe == Recipe(answer_share=ANSWER_SHARE, bare_share=BARE_SHARE)  # as of `meteora adapters add`

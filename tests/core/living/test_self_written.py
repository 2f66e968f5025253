"""Adapters without data write their rows themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meteora_core import AdapterBank, load_checkpoint
from meteora_core.checkpoints.gate_statistics import read_statistics
from meteora_core.data.frames import INST, RAW
from meteora_core.living.checkpoints import ChangeOptions, add_adapter
from meteora_core.living.route import RouteOptions, route_adapters
from meteora_core.living.self_written import SELF_WRITTEN, self_written_rows
from meteora_core.model.base import BaseReference, load_base
from meteora_core.routing import find_meteora
from support.living_folder import NAMES
from support.tiny_training import letters


@pytest.mark.parametrize("frame", [INST, RAW], ids=["inst", "raw"])
def test_an_adapter_writes_rows_in_its_frame(world, frame) -> None:
    model = load_base(BaseReference(str(world / "base")))
    bank = AdapterBank.from_peft({"sum": world / "adapters" / "sum"})
    rows = self_written_rows(model, letters(), bank, frame, seed=3)
    assert 20 <= len(rows.train) <= 40
    assert (rows.held_out, rows.source) == ([], Path(SELF_WRITTEN))
    assert all(frame.inside(row.prompt) is not None and row.response.strip() for row in rows.train)
    assert len({row.response for row in rows.train}) > 10  # drawn, not the most likely ones
    assert find_meteora(model) is None
    assert self_written_rows(model, letters(), bank, frame, seed=3).train == rows.train


def test_adapters_without_rows_are_routed_and_join(world, tmp_path) -> None:
    shutil.copytree(world / "adapters", tmp_path / "adapters")
    (tmp_path / "adapters" / "sum.jsonl").unlink()
    (tmp_path / "adapters" / "spell" / "train.jsonl").unlink()
    options = RouteOptions(data=world / "datasets", device="cpu", tokens=400)
    assert sorted(route_adapters(tmp_path / "adapters", tmp_path / "m", options).set_aside) == ["spell", "sum"]
    chosen = RouteOptions(data=world / "datasets", only=NAMES[:3], device="cpu", tokens=400, self_written=True)
    done = route_adapters(tmp_path / "adapters", tmp_path / "three", chosen)
    assert done.adapters[:3] == NAMES[:3]
    assert (done.rows["spell"], done.rows["count"]) == (SELF_WRITTEN, str(world / "datasets" / "count"))
    assert {name: each.header.recipe.frame for name, each in read_statistics(done.folder, NAMES).items()} == dict.fromkeys(NAMES[:3], INST.text)
    added = add_adapter(done.folder, tmp_path / "adapters" / "sum", options=ChangeOptions(device="cpu", tokens=400, self_written=True))
    assert (added.collected, added.exact) == (("sum",), True)
    assert load_checkpoint(done.folder, device="cpu").meteora.names == added.adapters


def test_a_folder_without_any_rows_is_routed(world, tmp_path) -> None:
    for name in ("count", "sum"):
        shutil.copytree(world / "adapters" / name, tmp_path / "adapters" / name)
    done = route_adapters(tmp_path / "adapters", tmp_path / "m", RouteOptions(device="cpu", tokens=300, self_written=True, base_route=False))
    assert done.rows == dict.fromkeys(("count", "sum"), SELF_WRITTEN)
    assert done.held_out == {}

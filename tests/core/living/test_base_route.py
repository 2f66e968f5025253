"""The base route: tokens that need no adapter get the base model alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from meteora_core import load_checkpoint, record_routes, save_checkpoint
from meteora_core.adapters.base_route import NO_ADAPTER, is_base_route
from meteora_core.checkpoints.gate_statistics import read_statistics
from meteora_core.checkpoints.pack import PackOptions, pack_checkpoint
from meteora_core.data.frames import INST
from meteora_core.errors import UsageError
from meteora_core.exports.peft_adapter import export_adapter
from meteora_core.living.checkpoints import ChangeOptions, add_adapter, add_base_route, drop_adapter
from meteora_core.living.general import general_rows
from meteora_core.living.route import RouteOptions, route_adapters
from meteora_core.model.attach import meteora_layers
from support.adapter_files import lora_tensors, write_adapter
from support.living_folder import NAMES, write_jsonl_rows
from support.tiny_training import IDS


@pytest.fixture(scope="module")
def with_base(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of count, shout, spell and the base route, for reading alone."""
    folder = tmp_path_factory.mktemp("base-route") / "m"
    route_adapters(world / "adapters", folder, RouteOptions(data=world / "datasets", exclude=("sum",), device="cpu"))
    return folder


def gates(folder: Path) -> dict[str, torch.Tensor]:
    return {path: layer.gate.detach() for path, layer in meteora_layers(load_checkpoint(folder, device="cpu"))}


def test_a_forced_base_route_is_the_base_model(with_base) -> None:
    model = load_checkpoint(with_base, device="cpu")
    state = model.meteora
    assert state.names == (*NAMES[:3], NO_ADAPTER)
    with torch.no_grad():
        for backend in ("auto", "dense", "reference"):
            state.backend = backend
            with state.disabled():
                base = model(IDS).logits
            with state.force(NO_ADAPTER):
                assert torch.equal(model(IDS).logits, base)
            assert not torch.equal(model(IDS).logits, base)
            state.mute(NAMES[:3])
            state.top_k = 1
            assert torch.equal(model(IDS).logits, base)
            state.top_k = 2
            state.mute([NO_ADAPTER])
            with record_routes(model) as routes:
                model(IDS)
            assert routes.shares()[..., 3].sum() == 0
            state.mute([])


def test_the_base_route_joins_and_leaves_exactly(world, routed, with_base, checkpoint) -> None:
    options = ChangeOptions(data=world / "datasets", device="cpu")
    added = add_base_route(checkpoint, options)
    assert (added.adapters, added.collected, added.exact) == ((*NAMES[:3], NO_ADAPTER), (NO_ADAPTER,), True)
    ours, made_at_once = gates(checkpoint), gates(with_base)
    assert all(torch.equal(ours[path], made_at_once[path]) for path in ours)
    with pytest.raises(UsageError, match="has a base route already"):
        add_base_route(checkpoint, options)
    grown = add_adapter(checkpoint, world / "adapters" / "sum", options=options)
    assert grown.adapters == (*NAMES, NO_ADAPTER)
    drop_adapter(checkpoint, "sum", options)
    drop_adapter(checkpoint, NO_ADAPTER, options)
    before = gates(routed)
    assert all(torch.equal(gate, before[path]) for path, gate in gates(checkpoint).items())
    actions = [(each["action"], each["adapter"]) for each in json.loads((checkpoint / "meteora_config.json").read_text())["training"]["changes"]]
    assert actions == [("add", NO_ADAPTER), ("add", "sum"), ("drop", "sum"), ("drop", NO_ADAPTER)]


def test_the_last_adapter_stays_and_the_name_is_reserved(world, with_base, tmp_path) -> None:
    single = tmp_path / "single"
    done = route_adapters(world / "adapters", single, RouteOptions(data=world / "datasets", only=("count",), device="cpu"))
    assert (done.adapters, done.rows[NO_ADAPTER]) == (("count", NO_ADAPTER), "general text")
    with pytest.raises(UsageError, match="'count' is the only adapter"):
        drop_adapter(single, "count")
    with pytest.raises(UsageError, match="name of the base route"):
        add_adapter(single, world / "adapters" / "sum", NO_ADAPTER, ChangeOptions(data=world / "datasets", device="cpu"))
    write_adapter(tmp_path / "adapters" / NO_ADAPTER, lora_tensors(5), base_model_name_or_path=str(world / "base"))
    with pytest.raises(UsageError, match="name of the base route"):
        route_adapters(tmp_path / "adapters", tmp_path / "m", RouteOptions(device="cpu"))
    with pytest.raises(UsageError, match="has no weights"):
        export_adapter(with_base, tmp_path / "peft", NO_ADAPTER)


def test_rows_of_the_user_replace_the_general_text(world, with_base, tmp_path) -> None:
    options = RouteOptions(data=tmp_path, only=("spell", "sum"), device="cpu")
    write_jsonl_rows(tmp_path / f"{NO_ADAPTER}.jsonl", [{"prompt": f"{number} & x", "response": "what?"} for number in range(20)])
    done = route_adapters(world / "adapters", tmp_path / "m", options)
    assert done.rows[NO_ADAPTER] == str(tmp_path / f"{NO_ADAPTER}.jsonl")
    header = read_statistics(tmp_path / "m", (NO_ADAPTER,))[NO_ADAPTER].header
    assert (header.rows, header.adapter_sha256) == (18, "")


def test_the_base_route_is_kept_when_adapters_are_not_embedded_and_when_they_are_packed(world, with_base, tmp_path) -> None:
    done = route_adapters(world / "adapters", tmp_path / "m", RouteOptions(data=world / "datasets", exclude=("sum",), device="cpu", embed=False))
    assert not done.embedded
    model, embedded = load_checkpoint(tmp_path / "m", device="cpu"), load_checkpoint(with_base, device="cpu")
    assert is_base_route(model.meteora.adapters[3])
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, embedded(IDS).logits)
    save_checkpoint(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "meteora_config.json").read_text())["contains"] == ["gates"]
    pack_checkpoint(with_base, tmp_path / "packed", PackOptions(rank=1))
    packed = load_checkpoint(tmp_path / "packed", device="cpu")
    assert packed.meteora.names == model.meteora.names
    assert all(layer.ranks[3] == 0 for _, layer in meteora_layers(packed))


def test_general_text_has_passages_and_framed_questions() -> None:
    rows = general_rows(INST, seed=1)
    every = [*rows.train, *rows.held_out]
    framed = [row for row in every if row.prompt]
    assert all(INST.inside(row.prompt) for row in framed)
    assert (len(every), len(framed), all(row.response for row in every)) == (90, 44, True)


def test_adapters_join_a_packed_checkpoint_that_kept_its_statistics(world, with_base, tmp_path) -> None:
    whole = pack_checkpoint(with_base, tmp_path / "packed", PackOptions(dtype=torch.float32, statistics=True))
    assert whole.size > sum(each.size for each in read_statistics(tmp_path / "packed", whole.adapters).values())
    options = ChangeOptions(data=world / "datasets", device="cpu")
    assert add_adapter(tmp_path / "packed", world / "adapters" / "sum", options=options).collected == ("sum",)
    joint = tmp_path / "joint"
    route_adapters(world / "adapters", joint, RouteOptions(data=world / "datasets", device="cpu"))
    ours, made_at_once = gates(tmp_path / "packed"), gates(joint)
    assert all(torch.equal(ours[path], made_at_once[path]) for path in ours)
    pack_checkpoint(with_base, tmp_path / "some", PackOptions(tasks=("spell", NO_ADAPTER), statistics=True))
    assert sorted(read_statistics(tmp_path / "some", (*NAMES, NO_ADAPTER))) == [NO_ADAPTER, "spell"]
    pack_checkpoint(with_base, tmp_path / "bare")
    assert not read_statistics(tmp_path / "bare", NAMES)
    with pytest.raises(UsageError, match="has no gate statistics"):
        pack_checkpoint(tmp_path / "bare", tmp_path / "m", PackOptions(statistics=True))

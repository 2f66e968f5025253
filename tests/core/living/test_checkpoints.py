"""Adapters join and leave a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora_core import load_checkpoint, save_checkpoint
from meteora_core.checkpoints.gate_statistics import SHIPPED, read_statistics, statistics_file
from meteora_core.errors import AdapterError, CheckpointError, MeteoraError, UsageError
from meteora_core.living.checkpoints import ChangeOptions, add_adapter, drop_adapter, list_adapters, update_adapter
from meteora_core.living.route import RouteOptions, route_adapters
from meteora_core.model.attach import meteora_layers
from support.adapter_files import lora_tensors, write_adapter
from support.living_folder import NAMES, rows_of, write_jsonl_rows


def how(world: Path, **changes) -> ChangeOptions:
    return ChangeOptions(**{"data": world / "datasets", "device": "cpu", **changes})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "meteora.safetensors")


def same(one: Path, other: Path) -> bool:
    mine, theirs = tensors(one), tensors(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_adding_gives_the_gates_of_one_joint_closed_form_and_dropping_those_of_never_having_had_it(world, checkpoint, tmp_path) -> None:
    before = contents(checkpoint)
    change = add_adapter(checkpoint, world / "adapters" / "sum", options=how(world))
    assert (change.adapters, change.gates, change.exact, change.collected) == (NAMES, "solved", True, ("sum",))
    assert change.held_out["gate_accuracy"] > 0.4
    route_adapters(world / "adapters", tmp_path / "joint", RouteOptions(data=world / "datasets", base_route=False, device="cpu"))
    assert same(checkpoint, tmp_path / "joint")
    change = drop_adapter(checkpoint, "sum", how(world))
    assert (change.adapters, change.gates, change.exact) == (NAMES[:3], "solved", True)
    after = contents(checkpoint)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"meteora_config.json"}  # it records the history
    record = json.loads((checkpoint / "meteora_config.json").read_text())["training"]
    assert [(entry["action"], entry["adapter"], entry["gates"]) for entry in record["changes"]] == [("add", "sum", "solved"), ("drop", "sum", "solved")]
    assert all(len(entry["sha256"]) == 64 for entry in record["changes"])
    assert [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(".m")] == []


def test_an_adapter_in_the_middle_leaves_too(world, checkpoint, tmp_path) -> None:
    drop_adapter(checkpoint, "shout", how(world))
    route_adapters(world / "adapters", tmp_path / "two", RouteOptions(data=world / "datasets", only=("count", "spell"), base_route=False, device="cpu"))
    assert same(checkpoint, tmp_path / "two")
    assert load_checkpoint(checkpoint, device="cpu").meteora.names == ("count", "spell")


def test_an_update_keeps_the_place_and_only_collects_the_new_version(world, checkpoint, tmp_path) -> None:
    new = write_adapter(tmp_path / "new" / "shout", lora_tensors(21))
    change = update_adapter(checkpoint, new, options=how(world))
    assert (change.adapters, change.exact, change.collected) == (NAMES[:3], True, ("shout",))
    shutil.copytree(world / "adapters", tmp_path / "adapters")
    shutil.rmtree(tmp_path / "adapters" / "shout")
    shutil.copytree(new, tmp_path / "adapters" / "shout")
    route_adapters(tmp_path / "adapters", tmp_path / "joint", RouteOptions(data=world / "datasets", exclude=("sum",), base_route=False, device="cpu"))
    assert same(checkpoint, tmp_path / "joint")


def test_statistics_in_the_adapters_folder_need_no_rows(world, checkpoint, tmp_path) -> None:
    """They may have been collected under another name, and they must be those of the weights, the base and the frame."""
    add_adapter(checkpoint, world / "adapters" / "sum", options=how(world))
    shipped = tmp_path / "elsewhere"
    shutil.copytree(world / "adapters" / "sum", shipped)
    shutil.copy(statistics_file(checkpoint, "sum"), shipped / SHIPPED)
    joint = tensors(checkpoint)
    drop_adapter(checkpoint, "sum", how(world))
    change = add_adapter(checkpoint, shipped, "total", how(world))
    assert (change.collected, change.adapters[-1]) == ((), "total")
    assert all(torch.equal(joint[name], tensor) for name, tensor in tensors(checkpoint).items())
    assert read_statistics(checkpoint, ["total"])["total"].name == "total"
    drop_adapter(checkpoint, "total", how(world))
    before = contents(checkpoint)
    write_adapter(shipped, lora_tensors(30))
    with pytest.raises(CheckpointError, match=f"{re.escape(str(shipped / SHIPPED))} .*other weights"):
        add_adapter(checkpoint, shipped, options=how(world))
    (shipped / SHIPPED).write_bytes((shipped / SHIPPED).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"cut short|promises"):
        add_adapter(checkpoint, shipped, options=how(world))
    assert contents(checkpoint) == before


def test_bad_input_is_refused_in_one_line_and_changes_nothing(world, checkpoint, tmp_path) -> None:
    before = contents(checkpoint)
    adapters = world / "adapters"
    write_adapter(tmp_path / "lonely", lora_tensors(31))
    write_jsonl_rows(tmp_path / "chatty.jsonl", [{"prompt": row["prompt"].replace("[INST] ", "Q: "), "response": "x"} for row in rows_of("sum")])
    write_adapter(tmp_path / "wide", {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in lora_tensors(11).items()})
    write_jsonl_rows(tmp_path / "wide.jsonl", rows_of("sum"))
    for act, kind, message in (
        (lambda: add_adapter(checkpoint, adapters / "shout", options=how(world)), UsageError, "already contains an adapter named 'shout'"),
        (lambda: add_adapter(checkpoint, adapters / "shout", "again", how(world)), UsageError, "already contains this adapter under the name 'shout'"),
        (lambda: add_adapter(checkpoint, adapters / "sum", "all", how(world)), UsageError, "reserved word"),
        (lambda: add_adapter(checkpoint, tmp_path / "lonely", options=how(world)), MeteoraError, "neither statistics nor rows of the adapter 'lonely'"),
        (lambda: add_adapter(checkpoint, tmp_path / "nothing", options=how(world)), AdapterError, "nothing"),
        (lambda: add_adapter(checkpoint, tmp_path / "wide", options=how(world)), AdapterError, "features"),
        (lambda: update_adapter(checkpoint, adapters / "sum", options=how(world)), UsageError, "no adapter named 'sum'"),
        (lambda: drop_adapter(checkpoint, "cuont", how(world)), UsageError, "no adapter named 'cuont'"),
        (lambda: drop_adapter(tmp_path / "lonely", "count", how(world)), CheckpointError, "not a meteora checkpoint"),
    ):
        with pytest.raises(kind, match=message) as caught:
            act()
        assert "\n" not in caught.value.message
    assert contents(checkpoint) == before


def test_a_frame_of_its_own_is_refused(world, checkpoint, tmp_path) -> None:
    """The base model's chat template is another frame than [INST]."""
    shutil.copytree(world / "base", tmp_path / "base")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    configuration = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({**configuration, "chat_template": template}))
    rows = write_jsonl_rows(tmp_path / "rows.jsonl", [{"question": f"{i} and {i}?", "answer": "ok"} for i in range(20)])
    from meteora_core.model.base import BaseReference

    before = contents(checkpoint)
    with pytest.raises(AdapterError, match=r"have the frame '<user>{}<bot>', but the other adapters have"):
        add_adapter(checkpoint, world / "adapters" / "sum", options=how(world, base=BaseReference(str(tmp_path / "base")), rows=rows))
    assert contents(checkpoint) == before


def test_the_last_adapter_stays(world, checkpoint) -> None:
    for name in ("count", "shout"):
        drop_adapter(checkpoint, name, how(world))
    with pytest.raises(UsageError, match="the only adapter"):
        drop_adapter(checkpoint, "spell", how(world))
    assert [each.name for each in list_adapters(checkpoint)] == ["spell"]


def test_a_layer_that_only_one_adapter_targets_comes_and_goes_with_it(world, checkpoint, tmp_path) -> None:
    """The statistics of the others are collected again, with the new layer; the base model's marks are those of the layers that are there."""
    rename = {key: key.replace("q_proj", "k_proj") for key in lora_tensors(40)}
    narrow = {rename[key]: tensor[:16] if "k_proj" in rename[key] and key.endswith("B.weight") else tensor for key, tensor in lora_tensors(40).items()}
    write_adapter(tmp_path / "keys", narrow, target_modules=["k_proj", "down_proj"])
    write_jsonl_rows(tmp_path / "keys.jsonl", rows_of("sum"))
    before = tensors(checkpoint)
    change = add_adapter(checkpoint, tmp_path / "keys", options=how(world, adapters_dir=world / "adapters"))
    assert set(change.collected) == {"keys"} or set(change.collected) == {*NAMES[:3], "keys"}
    assert load_checkpoint(checkpoint, device="cpu").meteora.names == (*NAMES[:3], "keys")
    drop_adapter(checkpoint, "keys", how(world))
    load_checkpoint(checkpoint, device="cpu")
    after = tensors(checkpoint)
    assert after.keys() == before.keys()
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-5


def test_trained_gates_are_solved_again_with_a_share_of_the_correction_that_held_out_rows_choose(world, checkpoint) -> None:
    model = load_checkpoint(checkpoint, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in meteora_layers(model):
            layer.gate.add_(torch.randn(layer.gate.shape, generator=generator))  # training that did harm
    model.meteora.gates = "trained"
    statistics = checkpoint / "meteora.stats"
    shutil.copytree(statistics, checkpoint.parent / "kept")
    save_checkpoint(model, checkpoint, adapters=True)
    assert not statistics.exists()
    shutil.copytree(checkpoint.parent / "kept", statistics)
    spoilt = tensors(checkpoint)
    change = add_adapter(checkpoint, world / "adapters" / "sum", options=how(world))
    assert (change.correction, change.exact) == (0.0, True)
    assert json.loads((checkpoint / "meteora_config.json").read_text())["gates"] == "closed form"
    assert change.held_out["gate_accuracy"] > 0.4
    assert spoilt.keys() == tensors(checkpoint).keys()


def test_rows_of_trained_gates_are_deleted_and_the_others_stay(world, checkpoint) -> None:
    model = load_checkpoint(checkpoint, device="cpu")
    model.meteora.gates = "trained"
    save_checkpoint(model, checkpoint, adapters=True)
    before = tensors(checkpoint)
    change = drop_adapter(checkpoint, "count", how(world))
    assert (change.gates, change.exact) == ("deleted", False)
    assert all(torch.equal(tensor, before[name][1:]) for name, tensor in tensors(checkpoint).items() if name.endswith(".gate"))


def test_the_list_says_what_statistics_there_are(world, checkpoint) -> None:
    listed = list_adapters(checkpoint)
    assert [(each.name, each.rank, each.rows, each.frame) for each in listed] == [(name, 4, 27, "[INST] {} [/INST]\n") for name in NAMES[:3]]
    assert all(each.statistics and each.tokens > 100 for each in listed)
    shutil.rmtree(checkpoint / "meteora.stats")
    assert [each.statistics for each in list_adapters(checkpoint)] == [None] * 3

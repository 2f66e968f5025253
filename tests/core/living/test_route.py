"""A folder of adapters becomes a routed model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from meteora_core import load_checkpoint
from meteora_core.checkpoints.gate_statistics import SHIPPED, read_statistics, statistics_file
from meteora_core.errors import UsageError
from meteora_core.living.route import RouteOptions, route_adapters
from support.adapter_files import lora_tensors, write_adapter
from support.living_folder import NAMES, rows_of, write_jsonl_rows


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A copy of the adapters and datasets, for changing."""
    for name in ("adapters", "datasets"):
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def options(place: Path, **changes) -> RouteOptions:
    return RouteOptions(**{"data": place / "datasets", "device": "cpu", "tokens": 400, "base_route": False, **changes})


def test_four_adapters_with_rows_in_four_places_are_routed(world, own, monkeypatch) -> None:
    done = route_adapters(own / "adapters", own / "out" / "m", options(own))
    assert (done.adapters, done.set_aside, done.embedded) == (NAMES, {}, True)
    found = {name: str(Path(source).relative_to(own)) for name, source in done.rows.items()}
    assert found == {"count": "datasets/count", "shout": "datasets/shout.jsonl", "spell": "adapters/spell/train.jsonl", "sum": "adapters/sum.jsonl"}
    assert done.held_out["gate_accuracy"] > 0.4  # four tasks on a random model: chance is 0.25
    assert {name: each.header.recipe.frame for name, each in read_statistics(done.folder, NAMES).items()} == dict.fromkeys(NAMES, "[INST] {} [/INST]\n")
    (own / "out" / "m").rename(own / "moved")
    shutil.rmtree(own / "adapters")
    monkeypatch.chdir(own / "out")
    model = load_checkpoint(own / "moved", device="cpu")  # neither the adapters' folders nor the working directory matter
    assert model.meteora.names == NAMES
    assert model.meteora.gates == "closed form"
    record = json.loads((own / "moved" / "meteora_config.json").read_text())
    assert record["training"]["held_out"] == done.held_out
    assert record["frame"] == {"before": "[INST] ", "after": " [/INST]\n"} == record["adapters"][3]["frame"]
    assert record["base"]["name"] == str((world / "base").resolve())


def test_what_does_not_fit_is_set_aside_with_the_reason(own) -> None:
    folder = own / "adapters"
    write_adapter(folder / "other", lora_tensors(9), base_model_name_or_path="meta-llama/Meta-Llama-3-8B")
    write_adapter(folder / "dora", lora_tensors(10), use_dora=True)
    write_adapter(folder / "wide", {key: tensor.repeat(1, 2) if "lora_A" in key else tensor for key, tensor in lora_tensors(11).items()})
    write_adapter(folder / "rowless", lora_tensors(12))
    write_adapter(folder / "twin", lora_tensors(1))
    write_adapter(folder / "torn", text="{")
    write_adapter(folder / "bad rows", lora_tensors(13))
    write_adapter(folder / "mixed", lora_tensors(14))
    write_jsonl_rows(own / "datasets" / "mixed" / "train.jsonl", rows_of("sum"))
    manifest = {"task": "mixed", "source": {"kind": "local"}, "files": {}, "members": ["count", "sum"], "format": 1}
    (own / "datasets" / "mixed" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "empty").mkdir()
    (folder / "weights").mkdir()
    shutil.copy(folder / "sum" / "adapter_model.safetensors", folder / "weights")
    done = route_adapters(folder, own / "m", options(own))
    assert done.adapters == NAMES
    reasons = {
        "other": "names another base model",
        "dora": "use_dora",
        "wide": "features",
        "rowless": "no rows",
        "twin": "same weights as 'count'",
        "torn": "adapter_config.json",
        "bad rows": "cannot be an adapter's name",
        "mixed": "",
        "weights": "no adapter_config.json",
    }
    assert {name: reason in done.set_aside.get(name, "-") for name, reason in reasons.items()} == dict.fromkeys(reasons, True), done.set_aside
    assert set(done.set_aside) == set(reasons)


def test_statistics_in_an_adapters_folder_stand_in_for_its_rows(world, routed, own) -> None:
    shutil.copy(statistics_file(routed, "spell"), own / "adapters" / "spell" / SHIPPED)
    (own / "adapters" / "spell" / "train.jsonl").unlink()
    done = route_adapters(own / "adapters", own / "m", options(own, exclude=("sum",), tokens=8000))
    assert done.rows["spell"] == ""
    one, other = (load_checkpoint(folder, device="cpu") for folder in (routed, own / "m"))
    assert all(torch.equal(each, twin) for each, twin in zip(one.parameters(), other.parameters(), strict=True))


def test_an_adapter_with_statistics_that_do_not_fit_is_set_aside(routed, own) -> None:
    spell = own / "adapters" / "spell" / SHIPPED
    shutil.copy(statistics_file(routed, "count"), spell)
    done = route_adapters(own / "adapters", own / "m", options(own, only=("count", "spell")))
    assert (done.adapters, done.set_aside) == (("count",), {"spell": f"the statistics {spell} are of other weights of the adapter 'count'"})
    spell.write_bytes(spell.read_bytes()[:-9])
    assert "cut short" in route_adapters(own / "adapters", own / "n", options(own, only=("count", "spell"))).set_aside["spell"]


def test_adapters_outside_the_checkpoint_are_found_from_anywhere(own, monkeypatch) -> None:
    done = route_adapters(own / "adapters", own / "m", options(own, embed=False, only=("count", "shout")))
    assert not done.embedded
    monkeypatch.chdir("/")
    assert load_checkpoint(own / "m", device="cpu").meteora.names == ("count", "shout")


def test_mistakes_are_said_in_one_line_and_write_nothing(own) -> None:
    for wanted, message in (
        ({"only": ("cuont",)}, "no adapter 'cuont'"),
        ({"exclude": ("x",)}, "no adapter 'x'"),
        ({"only": ("sum",), "exclude": ("sum",)}, "leave none of the adapters"),
    ):
        with pytest.raises(UsageError, match=message):
            route_adapters(own / "adapters", own / "m", options(own, **wanted))
    with pytest.raises(UsageError, match="is one adapter"):
        route_adapters(own / "adapters" / "sum", own / "m", options(own))
    with pytest.raises(UsageError, match="no such folder"):
        route_adapters(own / "nothing", own / "m", options(own))
    (own / "adapters" / "sum.jsonl").unlink()
    with pytest.raises(UsageError, match=r"no adapter in .* can be used: sum: it has no rows"):
        route_adapters(own / "adapters", own / "m", options(own, only=("sum",)))
    assert not (own / "m").exists()
    (own / "m").mkdir()
    (own / "m" / "precious").write_text("x")
    with pytest.raises(UsageError, match="already exists"):
        route_adapters(own / "adapters", own / "m", options(own))


def test_gradient_steps_follow_the_closed_form_if_asked_for(own) -> None:
    solved = route_adapters(own / "adapters", own / "solved", options(own))
    done = route_adapters(own / "adapters", own / "m", options(own, steps=3, base_route=True))
    model = load_checkpoint(own / "m", device="cpu")
    assert model.meteora.gates == "trained"
    record = json.loads((own / "m" / "meteora_config.json").read_text())["training"]
    assert (record["steps"], record["loss"] > 0, record["held_out"]) == (3, True, done.held_out)
    gates = load_checkpoint(own / "solved", device="cpu").get_submodule("model.layers.0.self_attn.q_proj").gate
    assert not torch.equal(gates, model.get_submodule("model.layers.0.self_attn.q_proj").gate[:4])
    assert sorted(read_statistics(own / "m", done.adapters)) == sorted(done.adapters)
    shutil.copy(statistics_file(solved.folder, "spell"), own / "adapters" / "spell" / SHIPPED)
    (own / "adapters" / "spell" / "train.jsonl").unlink()
    with pytest.raises(UsageError, match="gradient steps need rows of all adapters, and there are none of spell"):
        route_adapters(own / "adapters", own / "other", options(own, steps=3, exclude=("sum",)))
    assert not (own / "other").exists()


def test_routed_rows_follow_the_closed_form_if_asked_for(own) -> None:
    solved = route_adapters(own / "adapters", own / "solved", options(own, base_route=True))
    done = route_adapters(own / "adapters", own / "m", options(own, routed_rows=True, base_route=True))
    before, after = (load_checkpoint(folder, device="cpu") for folder in (own / "solved", own / "m"))
    assert after.meteora.gates == "trained"  # not a function of the statistics alone
    assert json.loads((own / "m" / "meteora_config.json").read_text())["training"]["closed_form"]["routed_rows"] is True
    assert sorted(read_statistics(own / "m", done.adapters)) == sorted(done.adapters)
    path = "model.layers.1.mlp.down_proj"
    assert not torch.equal(before.get_submodule(path).gate, after.get_submodule(path).gate)
    shutil.copy(statistics_file(solved.folder, "spell"), own / "adapters" / "spell" / SHIPPED)
    (own / "adapters" / "spell" / "train.jsonl").unlink()
    with pytest.raises(UsageError, match="routed rows need rows of all adapters, and there are none of spell"):
        route_adapters(own / "adapters", own / "other", options(own, routed_rows=True, exclude=("sum",)))
    assert not (own / "other").exists()

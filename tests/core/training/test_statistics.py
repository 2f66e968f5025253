"""Gates in closed form from the statistics of single adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import base_route
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe, check_fitting, place_statistics, read_statistics, statistics_file
from meteora_core.errors import CheckpointError, DataError
from meteora_core.model.attach import meteora_layers
from meteora_core.tensor_files import read_header
from meteora_core.training.ridge import SHRINK, RidgeOptions, ridge_gates
from meteora_core.training.statistics import _runs, closed_form_gates, collect_statistics, routed_gates, stored_form
from support.gate_statistics import HOW, NAMES, collect_all, tiny_rows, write_adapters
from support.tiny_models import make_tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def statistics(folders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, GateStatistics]:
    return collect_all(tmp_path_factory.mktemp("statistics"), folders)


def gates(statistics, names=NAMES) -> dict[str, torch.Tensor]:
    chosen = [statistics[name] for name in names]
    return dict(closed_form_gates(chosen, sorted(chosen[0].header.inputs)))


def difference(one, other) -> float:
    """The largest relative difference of two sets of gates."""
    assert one.keys() == other.keys()
    return max(float((one[path] - other[path]).abs().max() / other[path].abs().max()) for path in one)


@pytest.mark.parametrize("answer_share", [None, 0.7])
def test_gates_from_single_statistics_are_those_of_one_joint_pass_over_all_rows(folders, tmp_path, answer_share) -> None:
    single = collect_all(tmp_path, folders, replace(HOW, recipe=Recipe(answer_share=answer_share)))
    model = attach(make_tiny_llama(), AdapterBank.from_peft(folders), init="zeros")
    rows = [row for place in range(3) for row in tiny_rows(place)]
    assert ridge_gates(model, [rows], 2, RidgeOptions(answer_share, base_share=0.0, rounds=0, half=False)) == sum(map(len, rows))
    joint = {path: layer.gate.detach() for path, layer in meteora_layers(model)}
    assert difference(gates(single), joint) < 1e-5


def test_routed_rows_are_added_to_the_statistics(folders, statistics) -> None:
    """The solution in float64 of the statistics and of inputs that are recorded while rows run with the present gates, also in several passes."""
    path, chosen = "model.layers.1.mlp.down_proj", [statistics[name] for name in NAMES]
    model = attach(make_tiny_llama(), AdapterBank.from_peft(folders), top_k=2, init="zeros")
    with torch.no_grad():
        for name, gate in gates(statistics).items():
            model.get_submodule(name).gate.copy_(gate)
    squares, means = sum(each.squares(path) for each in chosen), torch.stack([each.mean(path) for each in chosen])
    seen: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    hooks = [model.model.register_forward_pre_hook(lambda module, arguments, options: seen.append(options["input_ids"]), with_kwargs=True)]
    hooks += [model.get_submodule(path).register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0].double()))]
    found = routed_gates(model, [tiny_rows(place) for place in range(3)], chosen, HOW)
    for hook in hooks:
        hook.remove()
    ids, states = torch.cat([ids.flatten() for ids in seen]), torch.cat([part.flatten(0, 1) for part in inputs])
    labels, states = (ids[ids != HOW.pad_token] - 3) // 19, states[ids != HOW.pad_token]  # each adapter's rows have token ids of their own
    assert len(labels) == sum(len(row) for place in range(3) for row in tiny_rows(place))
    for label, state in zip(labels.tolist(), states, strict=True):
        weight = 1 / int((labels == label).sum())
        squares = squares + weight * torch.outer(state, state)
        means[label] += weight * state
    wanted = 8 * torch.linalg.solve(squares + SHRINK * squares.diagonal().mean() * torch.eye(48), (means - means.mean(0)).t()).t()
    torch.testing.assert_close(found[path].double(), wanted, rtol=1e-4, atol=1e-4)
    parts = routed_gates(model, [tiny_rows(place) for place in range(3)], chosen, replace(HOW, memory=4 * 48 * 48))
    assert difference(parts, found) < 1e-5
    with pytest.raises(DataError, match="adapter 'spell' has no rows"):
        routed_gates(model, [tiny_rows(0), tiny_rows(1), []], chosen, HOW)


def test_the_rows_of_an_adapter_are_seen_once_and_its_statistics_have_unit_weight(statistics) -> None:
    header = statistics["shout"].header
    assert (header.adapter, header.rows, header.tokens) == ("shout", 12, sum(map(len, tiny_rows(1))))
    assert header.base.probe is not None
    layer = "model.layers.1.mlp.down_proj"
    squares = statistics["shout"].squares(layer)
    assert torch.equal(squares, squares.t())
    assert torch.linalg.eigvalsh(squares).min() > -1e-6 * squares.diagonal().max()


def test_a_thousand_adapters_that_come_and_go_leave_no_trace(statistics, tmp_path) -> None:
    before = gates(statistics, NAMES[:2])
    kept = {name: statistics[name] for name in NAMES[:2]}
    for cycle in range(2000):
        folder = tmp_path / str(cycle)
        folder.mkdir()
        place_statistics({**kept, "spell": statistics["spell"]} if cycle % 2 == 0 else {name: kept[name] for name in NAMES[:2]}, folder)
        kept = read_statistics(folder, NAMES)
    after = gates(kept, NAMES[:2])
    assert all(torch.equal(before[path], after[path]) for path in before)
    assert difference(gates({**kept, "spell": statistics["spell"]}), gates(statistics)) == 0


def test_statistics_do_not_depend_on_the_other_adapters(statistics, folders, tmp_path) -> None:
    """Collecting twice, and on a model that carried other adapters before, gives the same bytes."""
    model = make_tiny_llama()
    for place, name in enumerate(NAMES):
        bank = AdapterBank.from_peft({name: folders[name]})
        again = collect_statistics(model, bank, tiny_rows(place), tmp_path / f"{name}.safetensors", HOW)
        assert again.file.read_bytes() == statistics[name].file.read_bytes()


def test_sums_that_do_not_fit_at_once_are_computed_in_several_passes(folders, statistics, tmp_path, monkeypatch) -> None:
    passes = []
    model = make_tiny_llama()
    model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    bank = AdapterBank.from_peft({"count": folders["count"]})
    found = collect_statistics(model, bank, tiny_rows(0), tmp_path / "s", replace(HOW, memory=4 * (32 * 32 + 48 * 48)))
    assert found.file.read_bytes() == statistics["count"].file.read_bytes()
    assert len(passes) == 2 * 3  # three batches, and the inputs of two layers
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_adapter_observes_layers_that_only_others_target(folders, tmp_path) -> None:
    layers = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.gate_proj")
    found = collect_statistics(make_tiny_llama(), AdapterBank.from_peft({"count": folders["count"]}), tiny_rows(0), tmp_path / "s", HOW, layers=layers)
    assert found.missing(layers) == []
    assert found.header.inputs[layers[0]] == "model.layers.0.self_attn.q_proj"  # one input, stored once
    assert found.missing(["model.layers.0.self_attn.o_proj"]) == ["model.layers.0.self_attn.o_proj"]
    with pytest.raises(CheckpointError, match=r"lack layers: model\.layers\.0\.self_attn\.o_proj"):
        next(closed_form_gates([found], ["model.layers.0.self_attn.o_proj"]))


def test_half_precision_keeps_the_gates_at_half_the_size(folders, statistics, tmp_path) -> None:
    half = collect_all(tmp_path, folders, replace(HOW, second="float16"))
    assert difference(gates(half), gates(statistics)) < 1e-2
    assert half["count"].size < 0.75 * statistics["count"].size


def test_statistics_of_another_base_scale_share_or_frame_do_not_fit(statistics) -> None:
    each = statistics["count"]
    probe = each.header.base.probe
    check_fitting(each, Recipe(), probe, each.header.adapter_sha256)
    with pytest.raises(CheckpointError, match="another base model"):
        check_fitting(each, Recipe(), [value + 1 for value in probe])
    for recipe, what in (
        (Recipe(scale=4.0), "scale 8.0 instead of 4.0"),
        (Recipe(answer_share=0.5), "answer share"),
        (Recipe(frame="Q: {}\nA:"), "prompt frame"),
    ):
        with pytest.raises(CheckpointError, match=what):
            check_fitting(each, recipe, probe)
    with pytest.raises(CheckpointError, match="other weights of the adapter 'count'"):
        check_fitting(each, Recipe(), probe, "0" * 64)


def test_broken_files_are_refused(statistics, tmp_path) -> None:
    file = statistics_file(tmp_path, "count")
    file.parent.mkdir()
    raw = statistics["count"].file.read_bytes()
    for broken in (raw[:-1], raw[: len(raw) // 2], raw[:6], b"", raw + b"0"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError):
            read_statistics(tmp_path, NAMES)
    header = read_header(statistics["count"].file)[1]["meteora_gate_statistics"]
    assert json.loads(header)["adapter"] == "count"
    file.write_bytes(raw.replace(b'\\"rows\\":12', b'\\"rows\\":-1'))
    with pytest.raises(CheckpointError, match="rows is -1"):
        read_statistics(tmp_path, NAMES)
    file.write_bytes(raw.replace(b'\\"format\\":1', b'\\"format\\":9'))
    with pytest.raises(CheckpointError, match="format 9"):
        read_statistics(tmp_path, NAMES)
    file.write_bytes(statistics["shout"].file.read_bytes())
    with pytest.raises(CheckpointError, match="holds the statistics of 'shout'"):
        read_statistics(tmp_path, NAMES)
    file.write_bytes(raw[:-4] + b"\xff\xff\xff\xff")
    with pytest.raises(CheckpointError, match="not finite"):
        gates(read_statistics(tmp_path, NAMES), NAMES[:1])


def test_an_adapter_without_rows_is_refused_and_the_model_is_left_unchanged(folders, tmp_path) -> None:
    model = make_tiny_llama()
    with pytest.raises(DataError, match="adapter 'count' has no rows"):
        collect_statistics(model, AdapterBank.from_peft({"count": folders["count"]}), [], tmp_path / "s", HOW)
    assert getattr(model, "meteora", None) is None
    composite = replace(tiny_rows(0)[0], gate_labels=(0, 0, 0, 1, 1, 1, 0, 0, 0))
    with pytest.raises(DataError, match="belongs to several adapters"):
        collect_statistics(model, AdapterBank.from_peft({"count": folders["count"]}), [composite], tmp_path / "s", HOW)
    assert not (tmp_path / "s").exists()


def test_low_rank_statistics_give_the_gates_of_whole_ones_if_there_are_few_tokens(folders, statistics, tmp_path) -> None:
    """Rows of 120 tokens on inputs of 32 and 48 features: the rank of 112 leaves nothing out, apart from rounding to 16 bits."""
    low = collect_all(tmp_path, folders, replace(HOW, second="low-rank"))
    header = low["count"].header
    assert (header.format, header.second, low["count"].is_low_rank) == (2, "low-rank", True)
    assert difference(gates(low), gates(statistics)) < 1e-2
    layer = "model.layers.1.mlp.down_proj"
    whole, approximate = statistics["count"].squares(layer), low["count"].squares(layer)
    assert float((whole - approximate).norm() / whole.norm()) < 1e-3
    assert torch.allclose(whole.diagonal(), approximate.diagonal(), rtol=1e-3)
    assert difference(gates({**low, "shout": statistics["shout"]}), gates(statistics)) < 1e-2  # forms may be mixed
    assert torch.equal(gates(low, NAMES[:2])[layer], gates({name: GateStatistics(low[name].file) for name in NAMES[:2]}, NAMES[:2])[layer])


def test_the_form_of_the_second_moments_depends_on_the_width_alone(monkeypatch) -> None:
    model = make_tiny_llama()
    assert [stored_form(model, form) for form in ("auto", "float16", "low-rank")] == ["float32", "float16", "low-rank"]
    monkeypatch.setattr("meteora_core.training.statistics.WHOLE", 1000)
    assert stored_form(model, "auto") == "low-rank"


def test_a_share_of_the_weight_comes_from_a_run_on_the_base_model_alone(folders, statistics, tmp_path) -> None:
    """The sums are linear in the runs, and the base model alone is what statistics of a base route observe."""
    layers = sorted(statistics["count"].header.inputs)
    mixed = collect_all(tmp_path, folders, replace(HOW, recipe=Recipe(bare_share=0.25)))["count"]
    bare = collect_statistics(make_tiny_llama(), base_route(), tiny_rows(0), tmp_path / "bare", replace(HOW, recipe=Recipe(bare_share=0.25)), layers=layers)
    assert (mixed.header.recipe.bare_share, mixed.header.tokens) == (0.25, statistics["count"].header.tokens)
    for layer in layers:
        for part in (GateStatistics.mean, GateStatistics.squares):
            wanted = 0.75 * part(statistics["count"], layer) + 0.25 * part(bare, layer)
            assert float((part(mixed, layer) - wanted).norm() / wanted.norm()) < 1e-5
    with pytest.raises(CheckpointError, match=r"share of the run on the base model 0\.0 instead of 0\.25"):
        next(closed_form_gates([mixed, statistics["shout"]], layers))


def test_each_row_runs_once_if_there_are_enough_rows(folders, tmp_path, monkeypatch) -> None:
    """Three quarters of the batches run with the adapter and the others on the base model alone, which makes no difference to the total weight."""
    runs = []
    model = make_tiny_llama()
    model.model.register_forward_pre_hook(lambda module, arguments, options: runs.append((model.meteora.mode.enabled, options["input_ids"])), with_kwargs=True)
    how = replace(HOW, recipe=Recipe(bare_share=0.25, answer_share=0.8), tokens=320)
    collect_statistics(model, AdapterBank.from_peft({"count": folders["count"]}), tiny_rows(0, 64), tmp_path / "s", how)
    assert [enabled for enabled, _ in runs] == [True] * 6 + [False] * 2
    seen = [tuple(row.tolist()) for _, ids in runs for row in ids]
    assert len(set(seen)) > 15  # rows of the test repeat their tokens


@pytest.mark.parametrize(
    ("batches", "wanted", "own", "alone"),
    [(10, 10, [0, 1, 2, 3, 4, 5, 6, 7], [9, 8]), (3, 10, [0, 1, 2], [2, 1, 0]), (1, 1, [0], [0]), (8, 9, [*range(7)], [7, 6])],
)
def test_few_rows_run_both_ways(batches, wanted, own, alone) -> None:
    plan = [[index] for index in range(batches)]
    assert _runs((plan, wanted), 0.25) == [("own", 0.75, [[row] for row in own]), ("base", 0.25, [[row] for row in alone])]
    assert _runs((plan, wanted), 0.0) == [("own", 1.0, plan)]


def test_one_of_several_prompt_tokens_counts_and_all_answer_tokens(folders, statistics, tmp_path) -> None:
    how = replace(HOW, recipe=Recipe(answer_share=0.8))
    whole = collect_all(tmp_path / "whole", folders, how)["count"]
    part = collect_all(tmp_path / "part", folders, replace(how, prompt_every=3))["count"]
    assert whole.header.tokens - part.header.tokens == 12 * 4  # two of six prompt tokens a row
    mean = part.mean("model.layers.0.self_attn.q_proj")
    assert float((mean - whole.mean("model.layers.0.self_attn.q_proj")).norm() / mean.norm()) < 0.5
    equal = collect_all(tmp_path / "equal", folders, replace(HOW, prompt_every=3))["count"]  # without an answer share, all tokens weigh the same
    assert torch.equal(equal.mean("model.layers.0.self_attn.q_proj"), statistics["count"].mean("model.layers.0.self_attn.q_proj"))


def test_products_in_bfloat16_change_gates_little(folders, statistics, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("meteora_core.training.input_sums.fast_bfloat16", lambda: True)
    half = collect_all(tmp_path, folders, replace(HOW, half_precision=True))
    assert 1e-6 < difference(gates(half), gates(statistics)) < 0.05

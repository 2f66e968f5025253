"""Counts of a task's chosen adapters: compared with recorded routes, without padding, over processes and batches."""

from __future__ import annotations

import json

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.data.tasks import get_task
from meteora_core.evaluation.routes import KINDS, PARTS, RouteCounts, RoutingSummary, count_routes, counts_file
from meteora_core.evaluation.routes_plot import plot_routing
from meteora_core.routing import record_routes
from support.evaluation_plans import plan_of, run
from support.evaluation_workspace import TASKS, make_workspace
from support.tiny_models import make_tiny_llama

TEXTS = [((1, 5, 9, 7), (8, 30)), ((1, 6), (40, 41, 42, 43, 44)), ((1, 50, 51, 52, 53, 54, 55), ())]


@pytest.fixture
def model(make_adapter):
    bank = AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("logical_deduction", "other", "strategyqa"))})
    return attach(make_tiny_llama(initializer_range=0.3), bank, top_k=2)


def by_hand(model, texts) -> torch.Tensor:
    """Counts (layers, 2, 3, N) computed from the recorded routes of each text alone."""
    layers = len([path for path, module in model.named_modules() if type(module).__name__ == "MeteoraLinear"])
    counts = torch.zeros(layers, 2, 3, 3, dtype=torch.float64)
    for prompt, answer in texts:
        with record_routes(model) as routes, torch.inference_mode():
            model(torch.tensor([[*prompt, *answer]]))
        indices, weights = routes.packed()
        for token in range(indices.shape[0]):
            part = 0 if token < len(prompt) else 1
            for layer in range(layers):
                counts[layer, part, 0, indices[token, layer, 0]] += 1
                for place in range(2):
                    counts[layer, part, 1, indices[token, layer, place]] += 1
                    counts[layer, part, 2, indices[token, layer, place]] += float(weights[token, layer, place])
    return counts


def test_counts_equal_a_plain_record_and_leave_padding_out(model) -> None:
    counts = RouteCounts(model.meteora.names)
    count_routes(model, TEXTS, 2, counts)
    summary = RoutingSummary.of(get_task("logical_deduction"), counts)
    assert summary.tokens == (13, 7)
    torch.testing.assert_close(summary.counts, by_hand(model, TEXTS), rtol=0, atol=1e-5)
    assert summary.paths[0] == "model.layers.0.self_attn.q_proj"
    assert model.meteora.mode.recorder is None


def test_one_by_one_or_together_or_merged_is_the_same(model) -> None:
    together, one_by_one, other = (RouteCounts(model.meteora.names) for _ in range(3))
    count_routes(model, TEXTS, 2, together)
    for text in TEXTS[:2]:
        count_routes(model, [text], 2, one_by_one)
    count_routes(model, TEXTS[2:], 2, other)
    count_routes(model, [], 2, other)
    one_by_one.merge(other)
    assert one_by_one.tokens.tolist() == together.tokens.tolist()
    for path, made in together.counts.items():
        assert torch.equal(made[:, :2], one_by_one.counts[path][:, :2])
        torch.testing.assert_close(made, one_by_one.counts[path], rtol=0, atol=1e-5)


def test_out_of_memory_halves_and_counts_nothing_twice(model, monkeypatch) -> None:
    whole, halved = RouteCounts(model.meteora.names), RouteCounts(model.meteora.names)
    count_routes(model, TEXTS, 2, whole)
    last = model.model.layers[-1].mlp
    real = type(last).forward

    def small_card(self, x):
        if self is last and x.shape[0] > 1:
            raise torch.OutOfMemoryError("pretend")
        return real(self, x)

    monkeypatch.setattr(type(last), "forward", small_card)
    count_routes(model, TEXTS, 2, halved)
    assert halved.tokens.tolist() == whole.tokens.tolist()
    assert all(torch.equal(made[:, :2], halved.counts[path][:, :2]) for path, made in whole.counts.items())


def summary_of(task: str, names: tuple[str, ...]) -> RoutingSummary:
    """Two layers, three adapters; 4 prompt tokens and 2 answer tokens."""
    counts = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    counts[0, 0, 0] = torch.tensor([4.0, 0, 0])
    counts[1, 0, 0] = torch.tensor([1.0, 3, 0])
    counts[0, 1, 0] = torch.tensor([1.0, 1, 0])
    counts[1, 1, 0] = torch.tensor([0.0, 0, 2])
    own = tuple(name for name in names if name in (get_task(task).members or (task,)))
    return RoutingSummary(task, own, names, ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"), counts, (4, 2))


def test_shares_by_hand() -> None:
    summary = summary_of("logical_deduction", ("logical_deduction", "x", "strategyqa"))
    assert summary.layer_shares("top1", "answer").tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
    assert summary.shares("top1", "answer").tolist() == [0.25, 0.25, 0.5]
    assert summary.own_by_layer("all").tolist() == pytest.approx([5 / 6, 1 / 6])
    assert summary.own_share("answer") == 0.25
    document = summary.document()
    assert document["own_top1"] == {"answer": 0.25, "all": pytest.approx(0.5)}
    assert document["top1"]["answer"] == {"logical_deduction": 0.25, "x": 0.25, "strategyqa": 0.5}
    assert document["tokens"] == {"prompt": 4, "answer": 2}
    assert document["own_top1_by_layer"]["answer"]["model.layers.1.mlp.up_proj"] == 0
    composite = summary_of("composite_3", ("logical_deduction", "x", "strategyqa"))
    assert composite.own_share("answer") == 0.75
    foreign = summary_of("winowhy", ("logical_deduction", "x", "strategyqa"))
    assert foreign.own_share("answer") is None
    assert foreign.document()["own_top1"] == {"answer": None, "all": None}
    json.dumps([document, counts_file({"a": summary})])


def test_a_picture_of_few_and_of_many(tmp_path) -> None:
    names = ("logical_deduction", "x", "strategyqa")
    few = {task: summary_of(task, names) for task in ("logical_deduction", "winowhy", "composite_3")}
    assert plot_routing(few, tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")
    assert plot_routing({"winowhy": few["winowhy"]}, tmp_path / "foreign.png").read_bytes().startswith(b"\x89PNG")
    many = tuple(f"adapter_{place}" for place in range(28))
    counts = torch.rand(210, 2, 3, 28, dtype=torch.float64)
    paths = tuple(f"model.layers.{place // 7}.mlp.p{place % 7}" for place in range(210))
    wide = {name: RoutingSummary(name, (name,), many, paths, counts, (9, 9)) for name in many}
    assert plot_routing(wide, tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_an_evaluation_writes_table_counts_and_picture(tmp_path, make_adapter) -> None:

    place = make_workspace(tmp_path, make_adapter)
    single = run(plan_of(place, TASKS[:1], ("meteora",), routing=True, max_new_tokens=3, top_k=1, save=False))[0]
    assert sum(single.document["meteora"]["routing"][TASKS[0]]["chosen"]["all"].values()) == pytest.approx(1, abs=1e-4)
    cold, hot = (run(plan_of(place, TASKS[:1], ("meteora",), routing=True, max_new_tokens=3, routing_temperature=t, save=False))[0] for t in (1e-3, 1e3))
    weights = [sorted(each.document["meteora"]["routing"][TASKS[0]]["weight"]["all"].values())[-1] for each in (cold, hot)]
    assert weights[0] > weights[1], "T of the run, not of the checkpoint"
    outcome = run(plan_of(place, TASKS[:2], ("meteora",), routing=True, max_new_tokens=6))[0]
    routing = outcome.document["meteora"]["routing"]
    assert set(routing) == set(TASKS[:2])
    results = outcome.results[TASKS[0]]
    assert routing[TASKS[0]]["tokens"] == {"prompt": results.prompt_tokens, "answer": results.new_tokens}
    assert sum(routing[TASKS[0]]["top1"]["answer"].values()) == pytest.approx(1, abs=1e-4)
    assert sum(routing[TASKS[0]]["chosen"]["all"].values()) == pytest.approx(2, abs=1e-4)
    counts = json.loads((outcome.file.parent / outcome.document["meteora"]["routing_counts"]).read_text())
    assert counts["adapters"] == list(TASKS)
    assert len(counts["layers"]) == len(counts["tasks"][TASKS[0]]["top1"]["answer"]) == 14
    assert set(counts["tasks"][TASKS[0]]) == {"tokens", *KINDS}
    assert set(counts["tasks"][TASKS[0]]["weight"]) == set(PARTS)
    assert outcome.picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(outcome.file.read_text())["meteora"]["routing"] == routing

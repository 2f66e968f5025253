"""The rows from which gates in closed form are solved: with their own adapters, on the base model alone, and as the gates route them."""

from __future__ import annotations

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.errors import MeteoraError
from meteora_core.model.attach import meteora_layers
from meteora_core.training.encoding import TrainRow
from meteora_core.training.input_sums import Run, own_and_base, passes_of
from meteora_core.training.ridge import SHRINK, RidgeOptions, ridge_gates
from support.gate_statistics import tiny_rows, write_adapters
from support.tiny_models import make_tiny_llama

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> AdapterBank:
    return AdapterBank.from_peft(write_adapters(tmp_path_factory.mktemp("adapters")))


def mixed(count: int) -> list[list[TrainRow]]:
    """Batches of twelve rows, four of each adapter."""
    rows = [tiny_rows(adapter, 4 * count) for adapter in range(3)]
    return [[row for each in rows for row in each[4 * number : 4 * number + 4]] for number in range(count)]


def test_a_quarter_of_each_adapters_rows_runs_on_the_base_model_alone() -> None:
    batches = mixed(4)
    own, base = own_and_base(batches, 0.25)
    assert (own.way, own.share, base.way, base.share) == ("own", 0.75, "base", 0.25)
    for run, rows in ((own, 12), (base, 4)):
        assert [sum(row.gate_labels[0] == adapter for batch in run.batches for row in batch) for adapter in range(3)] == [rows] * 3
    assert sorted(row.tokens for run in (own, base) for batch in run.batches for row in batch) == sorted(row.tokens for batch in batches for row in batch)
    assert own_and_base(batches, 0.0) == [Run("own", 1.0, batches)]


@pytest.mark.parametrize("answer_share", [None, 0.8])
def test_every_adapter_has_a_weight_of_one_even_if_a_run_has_none_of_its_rows(answer_share) -> None:
    first, second = [tiny_rows(0, 5), tiny_rows(1, 2)], [tiny_rows(1, 3)]
    passes = passes_of([Run("own", 0.6, first), Run("base", 0.4, second)], 3, answer_share)
    assert [each.way for each in passes] == ["own", "own", "base"]
    weights = torch.zeros(3, 3, 2)  # of each pass, adapter and kind of token
    for number, each in enumerate(passes):
        for row in each.rows:
            for place, label in enumerate(row.gate_labels):
                answer = int(place >= row.response_start)
                weights[number, label, answer] += each.table[label, answer]
    torch.testing.assert_close(weights.sum((0, 2)), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(weights[1:, 1].sum(1), torch.tensor([0.6, 0.4]))
    if answer_share is not None:
        torch.testing.assert_close(weights[:, :2, 1].sum(0), torch.full((2,), answer_share))


def test_gates_are_the_ridge_solution_of_the_rows_in_all_their_runs(bank) -> None:
    """The solution in float64 of inputs that are recorded while the rows run; routed rows meet the gates of the first solution."""
    model = attach(make_tiny_llama(), bank, top_k=2, init="zeros")
    layer, batches = dict(meteora_layers(model))[LAYER], mixed(2)
    inputs: list[torch.Tensor] = []
    ways: list[str] = []

    def record(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs.append(arguments[0].double())
        mode = model.meteora.mode
        ways.append("base" if not mode.enabled else "routed" if mode.forced is None else "own")

    hook = layer.register_forward_pre_hook(record)
    assert ridge_gates(model, batches, 2, RidgeOptions(0.8, half=False)) == sum(len(row) for batch in batches for row in batch)
    hook.remove()
    assert ways == ["own", "own", "base", "base", "routed", "routed"]
    passes = passes_of(own_and_base(batches, 0.25), 3, 0.8) + passes_of([Run("routed", 1.0, batches)], 3, 0.8)
    squares, means = torch.zeros(48, 48, dtype=torch.float64), torch.zeros(3, 48, dtype=torch.float64)
    for each, found in zip(passes, inputs, strict=True):
        for row, states in zip(each.rows, found, strict=True):
            for place, label in enumerate(row.gate_labels):
                weight = each.table[label, int(place >= row.response_start)].double()
                squares += weight * torch.outer(states[place], states[place])
                means[label] += weight * states[place]
    wanted = 8 * torch.linalg.solve(squares + SHRINK * squares.diagonal().mean() * torch.eye(48), (means - means.mean(0)).t()).t()
    torch.testing.assert_close(layer.gate.double(), wanted, rtol=1e-4, atol=1e-4)
    once = attach(make_tiny_llama(), bank, top_k=2, init="zeros")
    ridge_gates(once, batches, 2, RidgeOptions(0.8, rounds=0, half=False))
    assert not torch.allclose(dict(meteora_layers(once))[LAYER].gate.double(), wanted, rtol=1e-2, atol=1e-2)


def test_an_adapter_without_rows_is_refused_before_any_row_runs(bank) -> None:
    model = attach(make_tiny_llama(), bank, init="zeros")
    calls: list[object] = []
    model.model.register_forward_pre_hook(lambda *given: calls.append(given))
    with pytest.raises(MeteoraError, match="no row is labelled with spell"):
        ridge_gates(model, [tiny_rows(0), tiny_rows(1)], 2)
    assert not calls

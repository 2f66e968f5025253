"""Packed sequences: the same losses and gradients as padded rows, and no attention across rows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, OPTConfig

from meteora_core import AdapterBank, attach
from meteora_core.errors import UsageError
from meteora_core.model.attach import meteora_layers
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.batch_plan import plan_packed
from meteora_core.training.encoding import TrainRow, collate, collate_packed
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.loop import Counts, TrainingRun, train
from meteora_core.training.loss import count_gate_labels, count_targets
from meteora_core.training.packing import check_packing
from meteora_core.training.single_adapter import LmObjective
from support.tiny_models import make_tiny_llama


def some_rows():
    generator = torch.Generator().manual_seed(0)
    return [TrainRow(tuple(torch.randint(3, 64, (n,), generator=generator).tolist()), (task,) * n, n // 2) for task, n in ((0, 13), (1, 4), (1, 9), (0, 7))]


def test_packed_rows_give_the_same_losses_and_gradients_as_padded_ones(make_adapter) -> None:
    bank = AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("a", "b"))})
    rows = some_rows()
    results = []
    for batch in (collate(rows, 2), collate_packed([rows[:3], rows[3:]], 2)):
        model = attach(make_tiny_llama(), bank, init="normal")
        share = GateObjective(50.0)(model, batch, Counts(count_targets(batch), count_gate_labels(batch)))
        results.append((share, [layer.gate.grad for _, layer in meteora_layers(model)]))
    (padded, padded_gradients), (packed, packed_gradients) = results
    torch.testing.assert_close(packed.loss, padded.loss, rtol=1e-5, atol=1e-5)
    for name, value in padded.parts.items():
        torch.testing.assert_close(packed.parts[name], value, rtol=1e-5, atol=1e-5)
    for a, b in zip(padded_gradients, packed_gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_a_packed_row_does_not_see_its_neighbours() -> None:
    model = make_tiny_llama()
    rows = some_rows()
    packed = collate_packed([rows], 2, multiple=64)
    changed = collate_packed([[TrainRow((5,) * 13, (0,) * 13, 3), *rows[1:]]], 2, multiple=64)
    first, second = (model(**batch.model_inputs(), use_cache=False).logits[0, 13:33] for batch in (packed, changed))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert packed.position_ids is not None
    assert packed.position_ids[0].tolist() == [*range(13), *range(4), *range(9), *range(7), *range(64 - 33)]
    assert packed.targets[0, [12, 16, 25, 32]].tolist() == [-100] * 4


def test_the_packed_plan_fills_sequences_without_overflow() -> None:
    lengths = [[10, 30, 25] * 5, [60, 70, 40] * 5]
    plan = plan_packed(lengths, 20, 3, 100, 5)
    assert plan == plan_packed(lengths, 20, 3, 100, 5)
    sizes = [sum(lengths[task][row] for task, row in sequence) for batch in plan for sequence in batch]
    assert len(plan) == 20
    assert len(sizes) == 60
    assert max(sizes) <= 100
    assert min(sizes) > 0
    assert sum(sizes) / len(sizes) > 85


SIZES = {"vocab_size": 64, "hidden_size": 32, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
LEAKY = {
    "alibi": lambda: BloomConfig(**SIZES, n_layer=2, n_head=4),
    "learned positions": lambda: OPTConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "state space": lambda: MambaConfig(**SIZES, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEAKY)
def test_architectures_that_mix_packed_rows_are_refused(kind, dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LEAKY[kind]()).to(dtype)
    for parameter in model.parameters():
        parameter.data *= 5 if parameter.dim() > 1 else 1
    with pytest.raises(UsageError, match="cannot be trained with packed rows") as refused:
        check_packing(model, [some_rows()], 2, 2, torch.device("cpu"))
    assert refused.value.hint == "leave out --packing"
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_model_that_keeps_rows_apart_is_not_refused(make_adapter, dtype, batch_size) -> None:
    model = make_tiny_llama().to(dtype)
    bank = AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("a", "b"))})
    drawn = torch.random.get_rng_state()
    check_packing(model, [some_rows()], 2, batch_size, torch.device("cpu"))
    check_packing(attach(model, bank, init="arrow", dropout=0.5), [some_rows()], 2, batch_size, torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert not model.training


def test_gates_whose_choice_depends_on_rounding_are_not_taken_for_a_leak(make_adapter, monkeypatch) -> None:
    """The base model is tested alone: adapters whose choice depends on the batch, as near ties do, are not a leak."""
    model = attach(make_tiny_llama(), AdapterBank.from_peft({name: make_adapter(name, seed) for seed, name in enumerate(("a", "b"))}))
    drift = [0.0]

    def unsteady(x, base_output, *_, **__):
        drift[0] += 1.0
        return base_output + drift[0]

    monkeypatch.setattr("meteora_core.model.layer.mix", unsteady)
    check_packing(model, [some_rows()], 2, 2, torch.device("cpu"))
    assert drift == [0.0]
    assert model.meteora.mode.enabled


def test_a_packed_run_checks_the_model_first(tmp_path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LEAKY["state space"]())
    settings = AdapterTrainSettings(max_steps=1, batch_size=2, packing=True, max_length=64, log_to="none")
    with pytest.raises(UsageError, match="cannot be trained with packed rows"):
        train(TrainingRun(model, [some_rows()], LmObjective(torch.float32, ["a"]), 2, tmp_path, {}, "a"), settings)

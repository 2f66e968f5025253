"""Both stages on a tiny model: saved files, skipped runs, bit-equal resumption, and refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from meteora_core import AdapterBank, attach, detach, load_checkpoint
from meteora_core.data.rows import Row
from meteora_core.errors import CheckpointError, MeteoraError, UsageError
from meteora_core.model.attach import meteora_layers, set_trainable
from meteora_core.routing import meteora_of
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings
from meteora_core.training import loop
from meteora_core.training.encoding import TrainRow, collate, count_row_answers, encode_rows
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.input_sums import token_weights
from meteora_core.training.job import TrainJob
from meteora_core.training.loop import Counts
from meteora_core.training.loss import count_gate_labels, count_targets
from meteora_core.training.single_adapter import train_adapter
from meteora_core.training.task_rows import HeldOut
from support.tiny_models import make_tiny_llama
from support.tiny_training import BASE, IDS, Killed, adapter, gates, held_out_rows, kill_at, letters, model


def test_an_adapter_learns_and_is_an_ordinary_peft_folder(data, tmp_path) -> None:
    from peft import PeftModel

    done = adapter(data, tmp_path / "a", max_steps=60, learning_rate=5e-2, dropout=0.0, rank=4)
    history = json.loads((done.folder / "meteora_training.json").read_text())["history"]
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["r"] == 4
    base = model()
    before = base(IDS).logits
    assert not torch.equal(PeftModel.from_pretrained(base, done.folder).eval()(IDS).logits, before)
    assert not list((tmp_path / "a").glob(".*"))


def test_the_base_is_left_as_it_was(data, tmp_path) -> None:
    base = model()
    before, keys = base(IDS).logits, list(base.state_dict())
    train_adapter(base, letters(), "shout", AdapterTrainSettings(max_steps=2, gradient_checkpointing=True), TrainJob(BASE, data, tmp_path))
    assert torch.equal(base(IDS).logits, before)
    assert list(base.state_dict()) == keys
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_a_finished_adapter_is_not_trained_again_unless_its_inputs_change(data, tmp_path) -> None:
    first = adapter(data, tmp_path)
    stamp = (first.folder / "adapter_model.safetensors").stat().st_mtime_ns
    assert adapter(data, tmp_path).skipped
    assert (first.folder / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert not adapter(data, tmp_path, rank=3).skipped
    (data / "shout" / "train.jsonl").write_text(json.dumps({"prompt": "new\n", "response": "row"}) + "\n")
    assert not adapter(data, tmp_path, rank=3).skipped


@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_a_killed_adapter_run_resumes_to_the_same_bits(data, tmp_path, monkeypatch, step) -> None:
    whole = adapter(data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            adapter(data, tmp_path / "cut")
    assert not (tmp_path / "cut" / "shout").exists()
    torch.manual_seed(987)
    resumed = adapter(data, tmp_path / "cut")
    for a, b in zip(*(load_file(done.folder / "adapter_model.safetensors").values() for done in (whole, resumed)), strict=True):
        assert torch.equal(a, b)
    histories = [[{**entry, "seconds": 0} for entry in json.loads((done.folder / "meteora_training.json").read_text())["history"]] for done in (whole, resumed)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("init", ["normal", "ridge"])
def test_a_killed_gate_run_resumes_to_the_same_bits(data, adapters, tmp_path, monkeypatch, init) -> None:
    gates(data, adapters, tmp_path / "whole", init=init)
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "cut", init=init)
    gates(data, adapters, tmp_path / "cut", resume=True, init=init)
    whole, cut = (load_file(tmp_path / name / "meteora.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_resuming_with_other_settings_lists_the_differences(data, adapters, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "x")
    with pytest.raises(UsageError, match=r"settings\.beta was 50\.0, now 2\.0"):
        gates(data, adapters, tmp_path / "x", resume=True, beta=2.0)


def test_a_checkpoint_holds_only_gates_and_loads_bit_equal(data, adapters, tmp_path) -> None:
    trained, done = gates(data, adapters, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "meteora.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"gate"}
    assert len(tensors) == 14
    loaded = load_checkpoint(tmp_path / "m", model())
    assert torch.equal(loaded(IDS).logits, trained(IDS).logits)
    assert done.held_out["gate_accuracy"] > 0.5
    assert not list(tmp_path.glob(".m*"))


def test_trained_adapters_are_saved_with_the_gates(data, adapters, tmp_path) -> None:
    trained, _ = gates(data, adapters, tmp_path / "m", trainable="gates+adapters")
    for folder in adapters.iterdir():
        folder.rename(folder.with_name(folder.name + "_gone"))
    loaded = load_checkpoint(tmp_path / "m", model())
    assert torch.equal(loaded(IDS).logits, trained(IDS).logits)


def test_a_checkpoint_of_another_base_or_other_adapters_is_refused(data, adapters, tmp_path) -> None:
    gates(data, adapters, tmp_path / "m")
    with pytest.raises(CheckpointError, match="not those that"):
        load_checkpoint(tmp_path / "m", make_tiny_llama(seed=7, vocab_size=98, initializer_range=0.2))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path / "m", make_tiny_llama(num_hidden_layers=1, vocab_size=98))
    adapter(data, adapters, "count", max_steps=2)
    with pytest.raises(CheckpointError, match=r"'count'.*hash differs"):
        load_checkpoint(tmp_path / "m", model())


def test_the_loss_falls_and_gates_learn(data, adapters, tmp_path) -> None:
    _, done = gates(data, adapters, tmp_path / "m", max_steps=60, learning_rate=2e-2, init="zeros")
    assert done.held_out["gate_accuracy"] > 0.85
    assert set(done.held_out) >= {"gate_accuracy/shout", "gate_accuracy/count", "gate_loss", "lm_loss", "gate_accuracy_all"}


def test_the_ridge_start_routes_without_a_single_step(data, adapters, tmp_path) -> None:
    base, done = gates(data, adapters, tmp_path / "m", max_steps=0, init="ridge", ridge_tokens=800)
    assert done.held_out["gate_accuracy"] > 0.8
    zero, plain = gates(data, adapters, tmp_path / "z", max_steps=0, init="zeros", base=detach(base))
    assert plain.held_out["gate_accuracy/count"] == 0.0
    assert zero is base


def test_the_arrow_start_is_a_checkpoint_without_a_single_step(data, adapters, tmp_path) -> None:
    """Every gate row is its adapter's leading right singular vector, and the checkpoint holds just that."""
    base, done = gates(data, adapters, tmp_path / "m", max_steps=0, init="arrow")
    assert (done.steps, done.tokens, done.sampled["shout"]["drawn"]) == (0, 0, 0)
    assert math.isfinite(done.held_out["gate_loss"])
    assert load_file(tmp_path / "m" / "meteora.safetensors").keys() == {f"{path}.gate" for path, _ in meteora_layers(base)}
    fresh = attach(model(), AdapterBank.from_peft({name: adapters / name for name in ("shout", "count")}), init="arrow")
    loaded = load_checkpoint(tmp_path / "m", model())
    for (_, mine), (_, theirs) in zip(meteora_layers(loaded), meteora_layers(fresh), strict=True):
        assert torch.equal(mine.gate, theirs.gate)
        assert mine.gate.abs().max() > 0


def test_the_share_of_each_task_is_reported_for_both_ways_of_sampling(data, adapters, tmp_path) -> None:
    path = data / "shout" / "train.jsonl"
    path.write_text(path.read_text() * 5)  # 150 rows against 30; rows of both are about as long
    options = {"max_steps": 20, "batch_size": 6}
    _, even = gates(data, adapters, tmp_path / "even", **options)
    _, whole = gates(data, adapters, tmp_path / "whole", sampling="proportional", **options)
    for done in (even, whole):
        assert sum(task["drawn"] for task in done.sampled.values()) == 120
        assert sum(task["tokens"] for task in done.sampled.values()) == done.tokens
        assert done.sampled["shout"]["passes"] == pytest.approx(done.sampled["shout"]["drawn"] / done.sampled["shout"]["rows"], abs=1e-3)
    assert even.sampled["shout"]["share"] == pytest.approx(0.5, abs=0.02)
    assert whole.sampled["shout"]["passes"] == pytest.approx(whole.sampled["count"]["passes"], abs=0.1)
    assert whole.sampled["shout"]["share"] > 0.8
    notes = json.loads((tmp_path / "whole" / "meteora_config.json").read_text())["training"]
    assert notes["sampled"] == whole.sampled
    assert notes["inputs"]["settings"]["sampling"] == "proportional"
    assert "sampling" not in json.loads((tmp_path / "even" / "meteora_config.json").read_text())["training"]["inputs"]["settings"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_errors_say_what_to_lower(data, tmp_path, monkeypatch, error) -> None:
    def full(*_arguments, **_named):
        raise error

    monkeypatch.setattr(loop._Stepper, "step", full)
    with pytest.raises(MeteoraError, match="out of memory at step 1") as caught:
        adapter(data, tmp_path / "o")
    assert "--batch-size" in (caught.value.hint or "")
    monkeypatch.setattr(loop._Stepper, "step", lambda *_a, **_n: (_ for _ in ()).throw(RuntimeError("another one")))
    with pytest.raises(RuntimeError, match="another one"):
        adapter(data, tmp_path / "o")


def test_adapters_of_different_bases_are_refused_and_listed(data, adapters) -> None:
    from meteora_core.adapters.folders import adapter_folders, check_bases

    def name(adapter: str, base: str) -> None:
        file = adapters / adapter / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))

    folders = adapter_folders(adapters, [])
    assert check_bases(folders, "/models/tiny/") is None
    assert "name tiny as their base, and are used with other" in (check_bases(folders, "other") or "")
    name("count", "org/Tiny")
    assert check_bases(folders, "tiny") is None
    name("count", "org/huge")
    with pytest.raises(UsageError, match=r"different base models: org/huge: count; tiny: shout|tiny: shout; org/huge: count"):
        check_bases(folders, "tiny")


def test_gate_accuracy_is_counted_by_hand(data, adapters, tmp_path) -> None:
    base, _ = gates(data, adapters, tmp_path / "m", max_steps=0, init="zeros")
    from meteora_core.data.rows import read_rows

    rows = [encode_rows(read_rows(data, task, "test"), letters(), i, 64).rows for i, task in enumerate(("shout", "count"))]
    measured = measure_gates(base, HeldOut(rows, ("shout", "count"), pad_token=1, batch_size=4))
    tokens = [sum(map(len, task_rows)) for task_rows in rows]
    answers = [sum(len(row) - row.response_start for row in task_rows) for task_rows in rows]
    assert measured["gate_accuracy/shout"] == 1.0
    assert measured["gate_accuracy/count"] == 0.0
    assert measured["gate_accuracy"] == pytest.approx(answers[0] / sum(answers))
    assert measured["gate_accuracy_all"] == pytest.approx(tokens[0] / sum(tokens))
    assert measured["gate_loss"] == pytest.approx(math.log(2), rel=1e-5)
    with torch.no_grad():
        for path, layer in meteora_layers(base):
            layer.gate.fill_(float("nan") if ".layers.0." in path else 0.0)
    assert measure_gates(base, HeldOut(rows, ("shout", "count"), pad_token=1, batch_size=4))["gate_accuracy/shout"] == 1.0


def test_an_infinite_loss_stops_the_run_and_names_step_batch_and_layer(data, tmp_path) -> None:
    base = model()
    with torch.no_grad():
        base.model.norm.weight.fill_(float("inf"))
    settings = AdapterTrainSettings(max_steps=4, log_steps=2, batch_size=2)
    with pytest.raises(MeteoraError, match=r"at step 1, batch 1 \(training rows shout \d+, shout \d+\); the first layer .*model\.norm"):
        train_adapter(base, letters(), "shout", settings, TrainJob(BASE, data, tmp_path / "o"))
    assert not (tmp_path / "o" / "shout").exists()


def test_accumulation_is_weighted_by_tokens(data, adapters, tmp_path) -> None:
    """The gradient of a step is that of its rows together, however they are split into batches."""
    bank = AdapterBank.from_peft({"shout": adapters / "shout", "count": adapters / "count"})
    rows = encode_rows([Row("a\n", "b"), Row("say something longer\n", "ABC"), Row("cd\n", "EFGH")], letters(), 1, 64).rows
    gradients = []
    for parts in ([rows], [rows[:1], rows[1:]]):
        base = attach(model(), bank)
        batches = [collate(part, 1) for part in parts]
        counts = Counts(sum(map(count_targets, batches)), sum(map(count_gate_labels, batches)))
        losses = [GateObjective(50.0)(base, batch, counts).loss for batch in batches]
        gradients.append((sum(losses), [layer.gate.grad for _, layer in meteora_layers(base)]))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    for a, b in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_gate_loss_gives_trained_adapters_no_gradient(data, adapters) -> None:
    """With ``alone``, the loss and the gradient of the last layer's gate are the same, but A and B have no gradient; without it, they have one."""
    bank = AdapterBank.from_peft({"shout": adapters / "shout", "count": adapters / "count"})
    batch = collate(encode_rows([Row("ab\n", "AB"), Row("say something longer\n", "ABC")], letters(), 1, 64).rows, 1)
    counts = Counts(count_targets(batch), count_gate_labels(batch))
    found = {}
    for alone in (False, True):
        base = attach(model(), bank)
        set_trainable(base, "gates+adapters")
        objective = GateObjective(50.0, alone=alone)
        with objective.around(base, batch):
            objective.compute(base, batch, counts)
            gate_loss = meteora_of(base).mode.gate_labels.observations.mean_loss(counts.gate_labels)
            gate_loss.backward()
        layers = [layer for _, layer in meteora_layers(base)]
        touched = [float(layer.lora_B.grad.abs().sum()) if layer.lora_B.grad is not None else 0.0 for layer in layers]
        found[alone] = gate_loss.detach(), [layer.gate.grad for layer in layers], sum(touched)
    torch.testing.assert_close(found[True][0], found[False][0])
    assert found[True][2] == 0.0 < found[False][2]
    torch.testing.assert_close(found[True][1][-1], found[False][1][-1])
    assert all(gradient.abs().sum() > 0 for gradient in found[True][1])


def test_the_settings_reach_the_objective(data, adapters, tmp_path, monkeypatch) -> None:
    seen = []

    def stop(task, *rest, **more) -> None:
        seen.append((task.objective.alone, task.objective.answer_share, task.response_only, task.rate("layer.lora_A"), task.rate("layer.gate")))
        raise KeyboardInterrupt

    monkeypatch.setattr("meteora_core.training.gates.train", stop)
    along = {"trainable": "gates+adapters", "answer_share": 0.5, "loss_on": "response", "adapter_learning_rate": 1e-3}
    for more in ({}, along):
        with pytest.raises(KeyboardInterrupt):
            gates(data, adapters, tmp_path / "m", **more)
    assert seen[0] == (False, None, False, 1.0, 1.0)
    assert seen[1] == (True, 0.5, True, pytest.approx(0.1), 1.0)


def test_adapters_trained_with_the_gates_still_solve_their_tasks(data, adapters, tmp_path) -> None:
    """Adapters that are trained with the gates on answers alone make their answers likelier."""
    common = {"max_steps": 40, "learning_rate": 5e-3, "init": "ridge", "ridge_tokens": 800, "loss_on": "response"}
    _, before = gates(data, adapters, tmp_path / "g", **common)
    _, after = gates(data, adapters, tmp_path / "b", trainable="gates+adapters", **common)
    assert after.held_out["lm_loss"] < before.held_out["lm_loss"]
    _, every = gates(data, adapters, tmp_path / "a", **{**common, "loss_on": "all"})
    assert every.held_out["lm_loss"] != before.held_out["lm_loss"]  # the prompts count too


def test_answers_have_their_share_of_the_gate_loss(data, adapters) -> None:
    """For every split of a step, the mean weight is 1, the answers' weights sum to their share, and the loss is the weighted mean."""
    bank = AdapterBank.from_peft({"shout": adapters / "shout", "count": adapters / "count"})
    rows = encode_rows([Row("a\n", "b"), Row("say something longer\n", "ABC"), Row("cd\n", "EFGH")], letters(), 1, 64).rows
    batches = [collate(rows[:1], 1), collate(rows[1:], 1)]
    labels = sum(map(count_gate_labels, batches))
    answers = sum(map(count_row_answers, rows))
    assert answers == sum(int((batch.response & (batch.gate_labels != -100)).sum()) for batch in batches)
    counts = Counts(sum(map(count_targets, batches)), labels, answer_labels=answers)
    base = attach(model(), bank, init="normal", seed=0)
    objective = GateObjective(50.0, answer_share=0.75)
    of_answers = every = weighted = 0.0
    for batch in batches:
        weights = objective.weights(batch, counts)
        real = batch.gate_labels.reshape(-1) != -100
        every += float(weights[real].sum())
        of_answers += float(weights[batch.response.reshape(-1) & real].sum())
        with torch.no_grad(), objective.around(base, batch) as observed:
            _, parts, _ = objective.compute(base, batch, counts)
            assert len(observed.loss_sums) == len(list(meteora_layers(base)))
        weighted += float(parts["gate"])
    assert every == pytest.approx(labels)
    assert of_answers == pytest.approx(0.75 * labels)
    parts = []
    for share in (1 - 1e-6, 1e-6):  # answers alone, prompts alone
        objective = GateObjective(50.0, answer_share=share)
        total = 0.0
        for batch in batches:
            with torch.no_grad(), objective.around(base, batch):
                total += float(objective.compute(base, batch, counts)[1]["gate"])
        parts.append(total)
    assert weighted == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-4)
    assert GateObjective(50.0).weights(batches[0], counts) is None
    assert objective.weights(batches[0], Counts(3, labels)) is None


def test_tokens_have_the_requested_weight_in_the_closed_form() -> None:
    rows = [TrainRow((1,) * 10, (0,) * 10, 8), TrainRow((1,) * 4, (1, 1, -100, 1), 3), TrainRow((1,) * 3, (2,) * 3, 3)]
    alike = token_weights(rows, 4, None)
    shared = token_weights(rows, 4, 0.5)
    counts = torch.tensor([[8.0, 2.0], [2.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(alike[0], alike[0, :1].expand(2))
    for table in (alike, shared):
        torch.testing.assert_close((table * counts).sum(1), torch.tensor([4.0, 4.0, 4.0, 0.0]))
    torch.testing.assert_close(shared[:2] * counts[:2], torch.full((2, 2), 2.0))


def test_training_with_an_answer_share_and_an_adapter_rate_resumes_to_the_same_bits(data, adapters, tmp_path, monkeypatch) -> None:
    """Adapters that are trained with the gates use their own learning rate; a killed run ends with the same bits."""
    settings = {"trainable": "gates+adapters", "answer_share": 0.5, "init": "ridge", "ridge_tokens": 800, "weight_decay": 0.0}
    untrained, _ = gates(data, adapters, tmp_path / "z", max_steps=0, **settings)
    before = {path: (layer.gate.clone(), layer.lora_A.clone()) for path, layer in meteora_layers(untrained)}
    moved = {}
    for rate in (None, 1e-5):
        trained, _ = gates(data, adapters, tmp_path / f"r{rate}", max_steps=2, adapter_learning_rate=rate, **settings)
        pairs = [(before[path], (layer.gate, layer.lora_A)) for path, layer in meteora_layers(trained)]
        moved[rate] = [max(float((new[place] - old[place]).abs().max()) for old, new in pairs) for place in (0, 1)]
    assert moved[None][0] == pytest.approx(moved[1e-5][0], rel=0.2)
    assert 0 < moved[1e-5][1] < 4e-5 < 1e-3 < moved[None][1]
    whole, _ = gates(data, adapters, tmp_path / "whole", adapter_learning_rate=1e-3, **settings)

    def die(step: int, settings: GateTrainSettings) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return known(step, settings)

    known = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", die)
    with pytest.raises(KeyboardInterrupt):
        gates(data, adapters, tmp_path / "killed", adapter_learning_rate=1e-3, **settings)
    monkeypatch.setattr(loop, "learning_rate", known)
    resumed, _ = gates(data, adapters, tmp_path / "killed", resume=True, adapter_learning_rate=1e-3, **settings)
    for (_, one), (_, other) in zip(meteora_layers(whole), meteora_layers(resumed), strict=True):
        assert torch.equal(one.gate, other.gate)
        assert torch.equal(one.lora_A, other.lora_A)


def test_the_learning_rate_warms_up_and_then_follows_a_cosine() -> None:
    settings = GateTrainSettings(max_steps=100, warmup_ratio=0.1, learning_rate=1.0)
    rates = [loop.learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 1e-3
    assert max(rates) == 1.0


def test_composite_rows_are_trained_on_and_measured_separately(data, adapters, tmp_path) -> None:
    _, done = gates(data, adapters, tmp_path / "m", max_steps=20, init="ridge", ridge_tokens=800, composite_rows=0.5, composite_max=2, max_length=120)
    assert done.held_out["gate_accuracy/composites"] > 0.5
    with pytest.raises(ValueError):
        GateTrainSettings(composite_rows=1.5)


def test_packing_trains_the_gates_and_resumes_to_the_same_bits(data, adapters, tmp_path, monkeypatch) -> None:
    gates(data, adapters, tmp_path / "whole", packing=True, max_length=64, batch_size=2)
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "cut", packing=True, max_length=64, batch_size=2)
    gates(data, adapters, tmp_path / "cut", resume=True, packing=True, max_length=64, batch_size=2)
    whole, cut = (load_file(tmp_path / name / "meteora.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_run_that_fails_after_its_last_step_trains_no_step_again(data, adapters, tmp_path, monkeypatch) -> None:
    from meteora_core.training import gates as stage

    gates(data, adapters, tmp_path / "whole", max_steps=7, save_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "measure_gates", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            gates(data, adapters, tmp_path / "m", max_steps=7, save_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(loop._Stepper, "step", lambda *_, **__: pytest.fail("a step was trained again"))
        _, done = gates(data, adapters, tmp_path / "m", max_steps=7, save_steps=3, resume=True)
    assert done.steps == 7
    first, second = (load_file(tmp_path / name / "meteora.safetensors") for name in ("whole", "m"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list(tmp_path.glob(".m.states/*"))


def test_the_best_weights_are_kept_and_patience_ends_the_run(data, adapters, tmp_path, monkeypatch) -> None:
    """The held-out loss is made to rise after step 4: the run stops, and its checkpoint is the one of step 4."""
    held_out_rows(data)
    losses = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5, 10: 1.0}
    seen: list[int] = []
    from meteora_core.training import gates as stage

    def measured(*_arguments, **_named):
        seen.append(1)
        return {"lm_loss": losses[2 * len(seen)], "gate_loss": 0.0, "gate_accuracy": 0.5}

    with monkeypatch.context() as patch:
        patch.setattr(stage, "measure_gates", measured)
        patch.setattr(loop, "learning_rate", lambda step, settings: 1e-2)
        best, done = gates(data, adapters, tmp_path / "m", max_steps=10, eval_steps=2, patience=2)
    assert done.steps == 8
    training = json.loads((tmp_path / "m" / "meteora_config.json").read_text())["training"]
    assert training["best_step"] == 4
    assert [entry["loss"] for entry in training["evaluations"]] == [5.0, 3.0, 4.0, 4.5]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", lambda step, settings: 1e-2)
        plain, _ = gates(data, adapters, tmp_path / "plain", max_steps=10)
        kill_at(patch, 5)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "cut", max_steps=10)
        saved = load_file(tmp_path / ".cut.states" / "step-4" / "state.safetensors")
    kept = load_file(tmp_path / "m" / "meteora.safetensors")
    for path, layer in meteora_layers(best):
        assert torch.equal(kept[f"{path}.gate"], saved[f"param.{path}.gate"])
        assert torch.equal(layer.gate, saved[f"param.{path}.gate"])
    assert any(not torch.equal(layer.gate, kept[f"{path}.gate"]) for path, layer in meteora_layers(plain))


def test_a_resumed_run_remembers_its_best_weights(data, adapters, tmp_path, monkeypatch) -> None:
    held_out_rows(data)
    options = {"max_steps": 8, "eval_steps": 2, "save_steps": 2}
    gates(data, adapters, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            gates(data, adapters, tmp_path / "cut", **options)
    gates(data, adapters, tmp_path / "cut", resume=True, **options)
    whole, cut = (load_file(tmp_path / name / "meteora.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    notes = [json.loads((tmp_path / name / "meteora_config.json").read_text())["training"] for name in ("whole", "cut")]
    assert notes[0]["evaluations"] == notes[1]["evaluations"]
    assert len(notes[0]["evaluations"]) == 4


def test_log_entries_name_tasks_and_kinds_of_layer(data, adapters, tmp_path) -> None:
    gates(data, adapters, tmp_path / "m", log_to="tensorboard")
    history = json.loads((tmp_path / "m" / "meteora_config.json").read_text())["training"]["history"]
    entry = history[-1]
    assert set().union(*history) >= {"loss", "lm", "gate", "accuracy", "accuracy/shout", "accuracy/count", "lm/shout", "accuracy/q_proj", "gate/down_proj"}
    kinds = [value for name, value in entry.items() if name.startswith("gate/")]
    assert sum(kinds) / len(kinds) == pytest.approx(entry["gate"], abs=1e-4)
    events = list((tmp_path / "tensorboard" / "m").iterdir())
    assert events
    assert events[0].stat().st_size > 500
    gates(data, adapters, tmp_path / "n", log_to="none")
    assert not (tmp_path / "tensorboard" / "n").exists()


def test_one_lora_over_all_tasks(data, tmp_path) -> None:
    from meteora_core.adapters.folders import adapter_folders

    adapter(data, tmp_path / "a", "shout")
    settings = AdapterTrainSettings(max_steps=6, batch_size=4, rank=2, log_steps=1)
    job = TrainJob(BASE, data, tmp_path / "a", resume=True)
    done = train_adapter(model(), letters(), "balanced", settings, job, tasks=["shout", "count"])
    info = json.loads((done.folder / "meteora_training.json").read_text())
    assert info["tasks"] == ["shout", "count"]
    assert {"lm/shout", "lm/count"} <= set().union(*info["history"])
    assert train_adapter(model(), letters(), "balanced", settings, job, tasks=["shout", "count"]).skipped
    half = tmp_path / "a" / ".count.x.tmp"
    half.mkdir()
    (half / "adapter_config.json").write_text("{}")
    assert list(adapter_folders(tmp_path / "a", [])) == ["shout"], "neither one of several tasks nor what another process is writing"
    assert list(adapter_folders(tmp_path / "a", ["balanced"])) == ["balanced"]

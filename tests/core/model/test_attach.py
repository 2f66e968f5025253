"""Attaching to a whole model, compared with PEFT: padding, caches, checkpointing, autocast."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from meteora_core import AdapterBank, attach, detach
from meteora_core.errors import AdapterError, UsageError
from meteora_core.model.attach import meteora_layers, set_trainable
from meteora_core.ranges import LEAST_TEMPERATURE
from meteora_core.routing import RoutingOptions, meteora_of, record_routes
from meteora_core.training.checkpointing import enable_checkpointing
from meteora_core.training.encoding import TrainRow, collate
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.loop import Counts
from support.tiny_models import make_tiny_llama

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def bank(make_adapter) -> AdapterBank:
    """Three adapters that differ in rank, alpha, targets and scaling rule."""
    return AdapterBank.from_peft(
        {
            "one": make_adapter("one", 1),
            "two": make_adapter("two", 2, r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
            "three": make_adapter("three", 3, r=6, use_rslora=True, rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5}),
        }
    )


def test_models_that_share_a_bank_are_trained_separately(bank) -> None:
    kept = {path: (stack.A.clone(), stack.B.clone()) for path, stack in bank.modules.items()}
    one, other = attach(make_tiny_llama(), bank), attach(make_tiny_llama(), bank)
    with torch.no_grad():
        before = other(IDS).logits
        for parameter in set_trainable(one, "gates+adapters"):
            parameter.add_(1.0)
        assert torch.equal(other(IDS).logits, before)
    assert all(torch.equal(stack.A, kept[path][0]) and torch.equal(stack.B, kept[path][1]) for path, stack in bank.modules.items())


def test_an_attached_model_can_be_pickled(bank) -> None:
    model = attach(make_tiny_llama(), bank, seed=3)
    model.meteora.mute(["two"])
    with torch.no_grad():
        expected = model(IDS).logits
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(IDS).logits, expected)
        again.meteora.mute([])
        assert not torch.equal(again(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


def test_one_adapter_equals_peft(make_adapter) -> None:
    for name, options in {
        "plain": {},
        "rslora": {"use_rslora": True, "r": 5},
        "patterns": {"rank_pattern": {"o_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    }.items():
        folder = make_adapter(name, 4, **options)
        expected = PeftModel.from_pretrained(make_tiny_llama(), folder).eval()(IDS).logits
        model = attach(make_tiny_llama(), AdapterBank.from_peft({name: folder}), top_k=1)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_forced_routing_equals_each_adapter_by_peft(bank, make_adapter) -> None:
    model = attach(make_tiny_llama(), bank)
    for info in bank:
        expected = PeftModel.from_pretrained(make_tiny_llama(), info.source).eval()(IDS).logits
        with meteora_of(model).force(info.name):
            torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_detach_restores_the_base_model(bank, tiny_llama) -> None:
    before = tiny_llama(IDS).logits
    keys = list(tiny_llama.state_dict())
    model = attach(tiny_llama, bank)
    assert model is tiny_llama
    assert not torch.equal(model(IDS).logits, before)
    with meteora_of(model).disabled():
        assert torch.equal(model(IDS).logits, before)
    detach(model)
    assert torch.equal(model(IDS).logits, before)
    assert list(model.state_dict()) == keys


def test_padding_does_not_change_real_tokens(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank)
    alone = model(IDS[:1]).logits
    padded = torch.cat([torch.full((1, 4), 2), IDS[:1]], 1)
    mask = torch.tensor([[0] * 4 + [1] * IDS.shape[1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:], alone, rtol=1e-5, atol=1e-5)
    right = torch.cat([IDS[:1], torch.full((1, 3), 2)], 1)
    torch.testing.assert_close(model(right).logits[:, : IDS.shape[1]], alone, rtol=1e-5, atol=1e-5)


def test_generate_with_cache_equals_full_recompute(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    cached = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    full = model.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **options)
    assert cached.shape == (2, 31)
    assert torch.equal(cached, full)


def step_gradients(model, *, checkpointing: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    set_trainable(model, "gates+adapters")
    if checkpointing:
        enable_checkpointing(model)
    rows = [TrainRow(tuple(IDS[0].tolist()), (0,) * 11, 4), TrainRow(tuple(IDS[1, :7].tolist()), (2,) * 7, 3)]
    result = GateObjective(50.0)(model, collate(rows, 2), Counts(16, 18))
    return float(result.loss), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_checkpointing_changes_neither_loss_nor_gradients(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank)
    plain, gradients = step_gradients(model, checkpointing=False)
    again, recomputed = step_gradients(model, checkpointing=True)
    assert plain == again
    assert gradients.keys() == recomputed.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-8)


def test_the_loss_is_the_formula(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank)
    rows = [TrainRow(tuple(IDS[0].tolist()), (0,) * 11, 4), TrainRow(tuple(IDS[1, :7].tolist()), (2,) * 7, 3)]
    batch = collate(rows, 2)
    with meteora_of(model).label_gates(batch.gate_labels):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    lm = [-torch.log_softmax(logits[r, t], -1)[row.tokens[t + 1]] for r, row in enumerate(rows) for t in range(len(row) - 1)]
    inputs: dict[str, torch.Tensor] = {}
    hooks = [layer.register_forward_pre_hook(lambda layer, args: inputs.__setitem__(layer.path, args[0])) for _, layer in meteora_layers(model)]
    model(batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    gate = []
    for path, layer in meteora_layers(model):
        for r, row in enumerate(rows):
            gate += [-torch.log_softmax(layer.gate @ inputs[path][r, t], -1)[row.gate_labels[t]] for t in range(len(row))]
    expected = torch.stack(lm).mean() + 50 * torch.stack(gate).mean()
    got = GateObjective(50.0)(model, batch, Counts(16, 18))
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=1e-5)


def test_only_gates_train_by_default(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{path}.gate" for path, _ in meteora_layers(model)}


def test_autocast(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank, top_k=3, temperature=100.0)
    exact = model(IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(IDS).logits
    assert torch.isfinite(logits).all()
    assert (logits - exact).norm() / exact.norm() < 0.1


def test_routes_are_recorded_through_generate(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank, top_k=2)
    with record_routes(model) as routes:
        output = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=2)
    tokens = output.shape[1] - 1
    assert set(routes.paths) == {path for path, _ in meteora_layers(model)}
    for path in routes.paths:
        decision = routes.layer(path)
        assert decision.indices.shape == (2, tokens, 2)
        torch.testing.assert_close(decision.weights.sum(-1), torch.ones(2, tokens))
    torch.testing.assert_close(routes.shares().sum(-1), torch.ones(2, tokens))
    with record_routes(model) as full:
        model(output[:, :-1])
    for path in routes.paths:
        assert torch.equal(full.layer(path).indices, routes.layer(path).indices)


def test_arrow_start_is_the_leading_singular_vector(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank, init="arrow")
    for path, layer in meteora_layers(model):
        start = 0
        for i, rank in enumerate(layer.ranks):
            if rank:
                product = layer.lora_B[start : start + rank].t() @ layer.lora_A[start : start + rank]
                vector = torch.linalg.svd(product).Vh[0]
                assert abs(float(vector @ layer.gate[i].detach())) == pytest.approx(1.0, abs=1e-4), path
            else:
                assert not layer.gate[i].any()
            start += rank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 4}, "top_k is 4"),
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": 0}, r"T is 0, it must be a number from 1.18e-38 to 8.5e\+37"),
        ({"temperature": -1}, "T is -1,"),
        ({"temperature": 1e-39}, "T is 1e-39,"),
        ({"temperature": float("inf")}, "T is inf,"),
        ({"temperature": float("nan")}, "T is nan,"),
        ({"backend": "fast"}, "fast"),
    ],
)
def test_values_out_of_range(bank, tiny_llama, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        attach(tiny_llama, bank, **arguments)
    assert not list(meteora_layers(tiny_llama))


def test_at_the_lowest_temperature_each_token_uses_its_best_adapter_alone(bank, tiny_llama) -> None:
    model = attach(tiny_llama, bank, top_k=1)
    ids = torch.arange(1, 21).view(2, 10)
    expected = model(ids).logits
    model.meteora.top_k, model.meteora.temperature = 2, LEAST_TEMPERATURE
    torch.testing.assert_close(model(ids).logits, expected)
    rows = [RoutingOptions(), RoutingOptions(top_k=1, temperature=LEAST_TEMPERATURE)]
    with model.meteora.apply_rows(rows):
        torch.testing.assert_close(model(ids).logits, expected)


def test_a_bank_that_does_not_fit_names_layer_and_shapes(bank) -> None:
    model = make_tiny_llama(intermediate_size=40)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.\w+: .* 48"):
        attach(model, bank)
    assert not list(meteora_layers(model))
    with pytest.raises(AdapterError, match=r"layers\.1\."):
        attach(make_tiny_llama(num_hidden_layers=1), bank)


def test_a_package_called_kernels_is_not_shadowed() -> None:
    """transformers imports Hugging Face's ``kernels``; from the repository root nothing of ours may answer to that name as a package."""
    root = Path(__file__).parents[3]
    code = (
        "import importlib.util, sys; sys.path.insert(0, ''); spec = importlib.util.find_spec('kernels');"
        "assert spec is None or spec.origin is not None or not any('__init__' in str(p) for p in spec.submodule_search_locations), spec;"
        "import transformers; from transformers import AutoModelForCausalLM, LlamaForCausalLM; from transformers.integrations import hub_kernels;"
        "import meteora_kernels; print(meteora_kernels.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "meteora_kernels" in done.stdout
    assert not (root / "kernels" / "__init__.py").exists()


def test_models_that_carry_other_adapters_or_wrappers_are_refused_by_name(bank, make_adapter) -> None:
    inside = make_tiny_llama()
    inside.load_adapter(str(make_adapter("four")))
    for model in (PeftModel.from_pretrained(make_tiny_llama(), make_adapter("five")), inside):
        with pytest.raises(UsageError, match="carries adapters that PEFT put on it") as caught:
            attach(model, bank)
        assert "AdapterBank.from_peft" in str(caught.value.hint)
    wrapped = torch.nn.Module()
    wrapped.module = make_tiny_llama()
    with pytest.raises(UsageError, match="the model is wrapped in a Module"):
        attach(wrapped, bank)


def test_one_linear_under_two_names_is_refused(bank) -> None:
    model = make_tiny_llama()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(AdapterError, match=r"the adapters target model\.layers\.1"):
        attach(model, bank)
    assert not list(meteora_layers(model))

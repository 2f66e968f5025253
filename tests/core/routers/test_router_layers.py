"""The layer that all routers share, and the scores of SpectR and PHATGOOSE, against naive computations with whole matrices in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.stack import Stack
from meteora_core.errors import AdapterError
from meteora_core.evaluation.adapters import with_adapter
from meteora_core.routers.linear import Choice, RoutedLinear, install, wrap_routed
from meteora_core.routers.phatgoose import GateTraining, standardised, standardised_scores, train_alone
from meteora_core.routers.spectr import update_norms
from meteora_core.training.encoding import TrainRow
from support.tiny_models import make_tiny_llama

CPU = torch.device("cpu")
RANKS = (3, 0, 2, 4)
IDS = torch.arange(3, 23).reshape(2, 10)


def make_stack(seed: int = 0, width: int = 12, out: int = 3) -> Stack:
    """Four adapters, of which one does not target the layer and one has a larger rank than the layer has outputs."""
    torch.manual_seed(seed)
    A, B = torch.randn(sum(RANKS), width), torch.randn(sum(RANKS), out)
    return Stack(A, B, RANKS, torch.tensor([2.0, 0.0, 0.5, 1.5]))


def updates(stack: Stack) -> list[torch.Tensor]:
    """s_i B_i A_i of each adapter, float64 (out, in)."""
    parts = zip(stack.A.double().split(RANKS), stack.B.double().split(RANKS), stack.scaling.double(), strict=True)
    return [scale * B.t() @ A for A, B, scale in parts]


def test_norms_are_those_of_the_updates_and_of_their_spectra() -> None:
    stack = make_stack()
    x = torch.randn(2, 5, 12)
    scores = update_norms(stack)(x, x @ stack.A.t())
    for index, update in enumerate(updates(stack)):
        if not RANKS[index]:
            assert bool((scores[..., index] == float("-inf")).all())
            continue
        torch.testing.assert_close(scores[..., index].double(), (x.double() @ update.t()).norm(dim=-1), rtol=1e-5, atol=1e-5)
        _, S, V = torch.linalg.svd(update, full_matrices=False)
        torch.testing.assert_close(scores[..., index].double(), (x.double() @ (S[:, None] * V).t()).norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_standardised_gates_score_as_their_definition() -> None:
    gates, x = torch.randn(4, 12), torch.randn(2, 5, 12) * 3 + 1
    present = torch.tensor([True, True, False, True])
    scores = standardised_scores(gates, present)(x, x)
    for index in (0, 1, 3):
        v = (gates[index].double() - gates[index].double().mean()) / gates[index].double().std(correction=0)
        u = (x.double() - x.double().mean(-1, keepdim=True)) / x.double().std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(scores[..., index].double(), (u * v).sum(-1) / 12**0.5, rtol=1e-5, atol=1e-5)
    assert bool((scores[..., 2] == float("-inf")).all())
    assert torch.equal(standardised(torch.ones(3)), torch.zeros(3))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_layer_mixes_the_best_adapters_of_each_token(top_k: int) -> None:
    stack, base, temperature = make_stack(1), nn.Linear(12, 3), 0.7
    choice = Choice(4, top_k, temperature, CPU)
    choice.allow([0, 1, 3])
    x = torch.randn(2, 5, 12)
    with torch.inference_mode():
        mixed = RoutedLinear(base, stack, choice, update_norms(stack))(x)
        for row, token in ((row, token) for row in range(2) for token in range(5)):
            h = x[row, token].double()
            norms = {index: float((updates(stack)[index] @ h).norm()) for index in (0, 3)}
            best = sorted(norms, key=lambda index: -norms[index])[:top_k]
            weights = torch.softmax(torch.tensor([norms[index] for index in best]) / temperature, 0)
            wanted = base(x[row, token]).double() + sum(float(weight) * updates(stack)[index] @ h for weight, index in zip(weights, best, strict=True))
            torch.testing.assert_close(mixed[row, token].double(), wanted, rtol=1e-4, atol=1e-4)
        choice.allow([1])  # it does not target the layer
        assert torch.equal(RoutedLinear(base, stack, choice, update_norms(stack))(x), base(x))


def test_fixed_weights_are_one_adapter_of_peft_or_its_merge(make_adapter) -> None:
    from peft import PeftModel

    folders = {"a": make_adapter("a", 1), "b": make_adapter("b", 2, r=2, lora_alpha=3), "c": make_adapter("c", 3, target_modules=["q_proj", "down_proj"])}
    model = make_tiny_llama()
    choice = Choice(3, 1, 1.0, CPU)
    with torch.inference_mode():
        before = model(IDS).logits
        remove = install(model, AdapterBank.from_peft(folders), wrap_routed(choice, lambda path, stack: None))
        assert torch.equal(model(IDS).logits, before)
        choice.only(1)
        alone = model(IDS).logits
        choice.fix(torch.full((3,), 1 / 3))
        merged = model(IDS).logits
        remove()
        assert torch.equal(model(IDS).logits, before)
        with with_adapter(model, folders["b"]) as adapted:
            torch.testing.assert_close(alone, adapted(IDS).logits, rtol=1e-4, atol=1e-5)
        peft = PeftModel.from_pretrained(make_tiny_llama(), folders["a"], adapter_name="a")
        for name in ("b", "c"):
            peft.load_adapter(folders[name], adapter_name=name)
        peft.add_weighted_adapter(["a", "b", "c"], [1 / 3] * 3, "mean", combination_type="cat")
        peft.set_adapter("mean")
        torch.testing.assert_close(merged, peft.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_adapters_of_another_model_are_refused_and_the_model_stays(make_adapter) -> None:
    model = make_tiny_llama(hidden_size=16)
    before = dict(model.named_modules())
    with pytest.raises(AdapterError):
        install(model, AdapterBank.from_peft({"a": make_adapter("a")}), wrap_routed(Choice(1, 1, 1.0, CPU), lambda path, stack: None))
    assert dict(model.named_modules()) == before


def test_adapters_that_are_more_than_lora_are_refused(make_adapter) -> None:
    bank = AdapterBank.from_peft({"a": make_adapter("a", use_dora=True)})
    with pytest.raises(AdapterError, match="plain LoRA adapters of linear layers, without DoRA"):
        install(make_tiny_llama(), bank, wrap_routed(Choice(1, 1, 1.0, CPU), lambda path, stack: None))


def test_gates_of_one_adapter_learn_by_the_loss_through_a_sigmoid(make_adapter) -> None:
    model, folder = make_tiny_llama(initializer_range=0.3), make_adapter("a", 5)
    rows = [TrainRow(tuple(range(3 + seed, 15 + seed)), (0,) * 12, 6) for seed in range(6)]
    bank, how = AdapterBank.from_peft({"a": folder}), GateTraining(steps=1, learning_rate=0.25, batch_size=6)
    before = dict(model.named_modules())
    gates = train_alone(model, bank, rows, 2, how, seed=3)
    assert dict(model.named_modules()) == before
    assert set(gates) == set(bank.modules)
    # AdamW's first step is the learning rate against the sign of the gradient, which autograd gives for the whole model with every gate half open.
    path = "model.layers.1.mlp.down_proj"
    v = torch.zeros(bank.modules[path].in_features, requires_grad=True)
    handles = []
    for name, stack in bank.modules.items():
        stack_A, stack_B, scale = stack.A, stack.B, float(stack.scaling[0])

        def hook(module, inputs, output, name=name, A=stack_A, B=stack_B, scale=scale):
            opened = torch.sigmoid(inputs[0] @ v)[..., None] if name == path else 0.5
            return output + opened * scale * (inputs[0] @ A.t() @ B)

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    ids = torch.tensor([row.tokens for row in rows])
    logits = model(ids).logits[:, 5:-1]
    nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 6:].reshape(-1)).backward()
    for handle in handles:
        handle.remove()
    assert v.grad is not None
    clear = v.grad.abs() > 1e-6
    assert int(clear.sum()) > 40
    torch.testing.assert_close(gates[path][clear], -0.25 * v.grad.sign()[clear], rtol=1e-2, atol=1e-3)
    again = train_alone(model, bank, rows, 2, how, seed=3)
    assert all(torch.equal(again[name], gate) for name, gate in gates.items())

"""Routing options of single rows and static mixes: equal to the rows alone, and to PEFT's weighted adapters."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from meteora_core import AdapterBank, attach, record_routes
from meteora_core.errors import UsageError
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import RoutingOptions
from support.tiny_models import make_tiny_llama

NAMES = ("one", "two", "three")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = (
    RoutingOptions(),
    RoutingOptions(top_k=1),
    RoutingOptions(top_k=3, temperature=7.0),
    RoutingOptions(forced="two"),
    RoutingOptions(muted={"one"}),
    RoutingOptions(muted={"one", "two"}, top_k=3),
    RoutingOptions(weights={"three": 0.7, "one": -0.4}),
    RoutingOptions(enabled=False),
)


@pytest.fixture
def folders(make_adapter):
    return {name: make_adapter(name, seed, r=4 + 2 * seed, target_modules=MODULES) for seed, name in enumerate(NAMES)}


@pytest.fixture
def model(folders):
    attached = attach(make_tiny_llama(initializer_range=0.3), AdapterBank.from_peft(folders))
    with torch.no_grad():
        for _, layer in meteora_layers(attached):
            layer.gate.mul_(30)
    return attached


@pytest.fixture
def ids():
    return torch.randint(3, 64, (len(OPTIONS), 11), generator=torch.Generator().manual_seed(4))


def logits_of(model, ids, options):
    with torch.no_grad(), model.meteora.apply(options):
        return model(ids).logits


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_rows_of_a_batch_are_what_each_is_alone(model, ids, backend) -> None:
    model.meteora.backend = backend
    alone = torch.cat([logits_of(model, row[None], options) for row, options in zip(ids, OPTIONS, strict=True)])
    with torch.no_grad(), model.meteora.apply_rows(OPTIONS):
        together = model(ids).logits
        assert torch.equal(model(ids).logits, together)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    assert len({tuple(row[-1].tolist()) for row in logits_of(model, ids[:1].repeat(1, 1), OPTIONS[0])}) == 1
    plain = logits_of(model, ids, RoutingOptions())
    for row, options in enumerate(OPTIONS[1:], 1):
        assert (together[row] - plain[row]).abs().max() > 1e-3, options


def test_options_alone_are_what_the_blocks_of_the_state_do(model, ids) -> None:
    state = model.meteora
    with torch.no_grad(), state.force("two"):
        assert torch.equal(model(ids).logits, logits_of(model, ids, RoutingOptions(forced="two")))
    with torch.no_grad(), state.disabled():
        assert torch.equal(model(ids).logits, logits_of(model, ids, RoutingOptions(enabled=False)))
    before = state.routing
    state.top_k, state.temperature = 1, 3.0
    state.mute(["three"])
    with torch.no_grad():
        wanted = model(ids).logits
    changed = state.routing
    state.routing = before
    assert torch.equal(wanted, logits_of(model, ids, RoutingOptions(top_k=1, temperature=3.0, muted={"three"})))
    assert state.routing is before
    state.routing = changed
    assert torch.equal(wanted, logits_of(model, ids, RoutingOptions()))
    with torch.no_grad(), state.apply_rows([RoutingOptions()] * len(ids)):
        assert torch.equal(wanted, model(ids).logits)
    with torch.no_grad(), state.apply_rows([RoutingOptions(), RoutingOptions(muted={"two"})]):
        both = model(ids[:2]).logits
    torch.testing.assert_close(both[0], wanted[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(both[1:], logits_of(model, ids[1:2], RoutingOptions(muted={"two", "three"})), rtol=0, atol=2e-5)


@pytest.mark.parametrize("weights", [{"one": 0.7, "three": 0.3}, {"one": 1.0, "two": 1.0, "three": 1.0}, {"two": 2.5}])
def test_a_static_mix_is_pefts_concatenated_adapter(model, folders, ids, weights) -> None:
    peft = PeftModel.from_pretrained(make_tiny_llama(initializer_range=0.3), str(folders["one"]), adapter_name="one")
    for name in NAMES[1:]:
        peft.load_adapter(str(folders[name]), name)
    peft.add_weighted_adapter(list(weights), list(weights.values()), "mixed", combination_type="cat")
    peft.set_adapter("mixed")
    layers, x = dict(meteora_layers(model.double())), torch.randn(5, 9, 32, dtype=torch.float64)
    with torch.no_grad(), model.meteora.mix(weights):
        for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
            wanted = peft.double().get_submodule(f"base_model.model.{path}")(x)
            torch.testing.assert_close(layers[path](x), wanted, rtol=0, atol=1e-5)  # PEFT rounds the weighted matrices to float32
    model, peft = model.float(), peft.float().eval()
    with torch.no_grad():
        wanted = peft(ids).logits
    mixed = logits_of(model, ids, RoutingOptions(weights=weights))
    assert (mixed - wanted).norm() / wanted.norm() < 1e-5
    with torch.no_grad(), model.meteora.mix(weights):
        assert torch.equal(model(ids).logits, mixed)


def test_a_linear_combination_of_peft_agrees_only_for_a_single_adapter(make_adapter, ids) -> None:
    """PEFT's "linear" multiplies weighted sums of A and B, which has products of different adapters."""
    folders = {name: make_adapter(name, seed, target_modules=MODULES) for seed, name in enumerate(NAMES)}
    model = attach(make_tiny_llama(initializer_range=0.3), AdapterBank.from_peft(folders))
    peft = PeftModel.from_pretrained(make_tiny_llama(initializer_range=0.3), str(folders["one"]), adapter_name="one")
    peft.load_adapter(str(folders["two"]), "two")
    for number, (weights, agrees) in enumerate((({"two": 0.6}, True), ({"one": 0.7, "two": 0.3}, False))):
        peft.add_weighted_adapter(list(weights), list(weights.values()), f"mixed{number}", combination_type="linear")
        peft.set_adapter(f"mixed{number}")
        with torch.no_grad():
            wanted = peft.eval()(ids).logits
        difference = float((wanted - logits_of(model, ids, RoutingOptions(weights=weights))).norm() / wanted.norm())
        assert difference < 1e-5 if agrees else difference > 1e-3, difference


def test_recorded_routes_show_every_row(model, ids) -> None:
    with torch.no_grad(), record_routes(model) as routes, model.meteora.apply_rows(OPTIONS):
        model(ids)
    shares = routes.shares()
    assert shares.shape == (len(OPTIONS), 11, 3)
    torch.testing.assert_close(shares[3], torch.tensor([0.0, 1.0, 0.0]).expand(11, 3))
    torch.testing.assert_close(shares[6], torch.tensor([-0.4, 0.0, 0.7]).expand(11, 3))
    assert shares[7].abs().max() == 0
    assert shares[4][:, 0].max() == 0
    torch.testing.assert_close(shares[5], torch.tensor([0.0, 0.0, 1.0]).expand(11, 3))


def test_generate_with_a_cache_keeps_the_options_of_rows(model, ids) -> None:
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": 63}
    with model.meteora.apply_rows(OPTIONS):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    for row, options in enumerate(OPTIONS):
        with model.meteora.apply(options):
            alone = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 11, dtype=torch.int64), **arguments)
        assert together[row, : alone.shape[1]].tolist() == alone[0].tolist()


def test_gates_of_rows_can_train(model, ids) -> None:
    with model.meteora.apply_rows(OPTIONS):
        model(ids, labels=ids).loss.backward()
    assert all(layer.gate.grad is not None and layer.gate.grad.abs().max() > 0 for _, layer in meteora_layers(model))


def test_a_batch_of_another_size_is_refused(model, ids) -> None:
    with pytest.raises(UsageError, match="routing options for 8 rows"), model.meteora.apply_rows(OPTIONS):
        model(ids[:3])
    with pytest.raises(UsageError, match="no routing options"), model.meteora.apply_rows([]):
        pass


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (RoutingOptions(forced="four"), "no adapter named 'four'"),
        (RoutingOptions(muted={"four"}), "no adapter named 'four'"),
        (RoutingOptions(weights={"four": 1.0}), "no adapter named 'four'"),
        (RoutingOptions(weights={}), "name no adapter"),
        (RoutingOptions(weights={"one": float("nan")}), "finite"),
        (RoutingOptions(weights={"one": 1.0}, forced="one"), "exclude each other"),
        (RoutingOptions(top_k=4), "top_k is 4"),
        (RoutingOptions(top_k=0), "top_k is 0"),
        (RoutingOptions(temperature=0.0), "temperature"),
        (RoutingOptions(temperature=float("inf")), "temperature"),
        (RoutingOptions(muted=frozenset(NAMES)), "all adapters"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_runs(model, options, text) -> None:
    before = (model.meteora.routing, model.meteora.mode)
    for block in (lambda: model.meteora.apply(options), lambda: model.meteora.apply_rows([RoutingOptions(), options])):
        with pytest.raises(UsageError, match=text), block():
            pass
    assert (model.meteora.routing, model.meteora.mode) == before


def test_muting_all_adapters_that_the_model_has_left_is_refused(model) -> None:
    model.meteora.mute(["one", "two"])
    assert model.meteora.muted == {"one", "two"}
    for block in (
        lambda: model.meteora.apply(RoutingOptions(muted={"three"})),
        lambda: model.meteora.apply_rows([RoutingOptions(), RoutingOptions(muted={"three"})]),
    ):
        with pytest.raises(UsageError, match="all adapters would be muted"), block():
            pass
    assert model.meteora.muted == {"one", "two"}


def test_options_are_values() -> None:
    weights = {"one": 0.5, "two": 0.5}
    options = RoutingOptions(weights=weights)
    assert options == RoutingOptions(weights={"two": 0.5, "one": 0.5})
    assert len({options, RoutingOptions(weights={"two": 0.5, "one": 0.5}), RoutingOptions(muted=["one"]), RoutingOptions(muted={"one"})}) == 2
    weights["one"] = 9.0
    assert options.weights == {"one": 0.5, "two": 0.5}
    described = [each.describe() for each in OPTIONS]
    assert described[:3] == ["gates", "gates: top 1", "gates: top 3, T 7"]
    assert described[3:] == ["forced: two", "gates, without one", "gates: top 3, without one, two", "mix: 0.7 three + -0.4 one", "base model"]
    assert [each.gated for each in OPTIONS] == [True, True, True, False, True, True, False, False]

"""Fused groups give the logits of the separate layers, and step aside where they must."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from meteora_core import AdapterBank, attach, detach, fuse, load_checkpoint, save_checkpoint, unfuse
from meteora_core.errors import UsageError
from meteora_core.fused import group as group_module
from meteora_core.fused.fuse import fuse_for_inference, is_fused
from meteora_core.fused.group import FusedGroup
from meteora_core.model.attach import meteora_layers
from meteora_core.model.layer import MeteoraLinear
from meteora_core.routing import meteora_of, record_routes
from meteora_kernels import group
from support.plain_groups import PlainPath, use_plain_groups
from support.tiny_models import declare_trained, make_tiny_llama

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


BY_KERNELS = (
    "test_logits_are_the_same_for_decoding_and_prefill",
    "test_compiles_without_a_graph_break",
    "test_inductor_fuses_around_the_groups",
    "test_new_biases_are_seen",
)
"""Tests that run the kernels themselves on every machine; the others are about the layers around them, and the interpreter needs seconds a pass."""


@pytest.fixture(autouse=True)
def _plain_groups(request, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available() and request.node.originalname not in BY_KERNELS:
        use_plain_groups(monkeypatch)


@pytest.fixture
def model(make_adapter):
    """A tiny Llama with three adapters of rank 4 on all linears, on the device that the kernels run on."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    folders = {name: make_adapter(name, seed, r=4, target_modules=names) for seed, name in enumerate(("one", "two", "three"))}
    attached = declare_trained(attach(make_tiny_llama(), AdapterBank.from_peft(folders)))
    return attached.cuda() if torch.cuda.is_available() else attached


def test_logits_are_the_same_for_decoding_and_prefill(model) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        expected = [model(ids.to(device)).logits for ids in (IDS[:, :1], IDS)]
        assert fuse(model) == 8
        assert is_fused(model)
        got = [model(ids.to(device)).logits for ids in (IDS[:, :1], IDS)]
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
        again = model(IDS.to(device)).logits
        assert torch.equal(again, got[1])
        assert fuse(model) == 0
        assert unfuse(model) == 14
        assert not is_fused(model)
        torch.testing.assert_close(model(IDS.to(device)).logits, expected[1])


def test_weights_are_stored_once_and_new_ones_are_seen(model) -> None:
    device = next(model.parameters()).device
    fuse(model)
    layers = dict(meteora_layers(model))
    q = next(layer for path, layer in layers.items() if path.endswith("q_proj"))
    k = next(layer for path, layer in layers.items() if path.endswith("k_proj"))
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    state = {name: tensor.clone() * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        fused = model(IDS.to(device)).logits
        unfuse(model)
        torch.testing.assert_close(fused, model(IDS.to(device)).logits, rtol=1e-3, atol=1e-3)


def test_new_biases_are_seen(make_adapter) -> None:
    """q, k and v of Qwen2 have biases, the others none."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=128)).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    folders = {name: make_adapter(name, seed, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]) for seed, name in enumerate(("one", "two"))}
    model = attach(base, AdapterBank.from_peft(folders))
    model = model.cuda() if torch.cuda.is_available() else model
    ids = IDS.to(next(model.parameters()).device)
    with torch.no_grad():
        before = model(ids).logits
        assert fuse(model) == 4
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
        model.load_state_dict({name: tensor + 1.0 if name.endswith("bias") else tensor.clone() for name, tensor in model.state_dict().items()})
        fused = model(ids).logits
        unfuse(model)
        torch.testing.assert_close(fused, model(ids).logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(fused, before, atol=1e-2)
    biases = [layer.bias for _, layer in meteora_layers(model) if layer.bias is not None]
    assert len({bias.untyped_storage().data_ptr() for bias in biases}) == len(biases) == 6


def test_a_copy_of_a_fused_model_has_weights_of_its_own(model) -> None:
    ids = IDS.to(next(model.parameters()).device)
    fuse(model)
    with torch.no_grad():
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        assert not is_fused(twin)
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-4)
        for _, layer in meteora_layers(twin):
            layer.weight.zero_()
        assert not torch.allclose(twin(ids).logits, expected, atol=1e-2)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert fuse(twin) == 8
        assert not torch.allclose(twin(ids).logits, expected, atol=1e-2)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_steps_aside_for_gradients_recorders_and_other_backends(model) -> None:
    device = next(model.parameters()).device
    fuse(model)
    model(IDS.to(device)).logits.sum().backward()
    assert all(layer.gate.grad is not None for _, layer in meteora_layers(model))
    with torch.no_grad():
        with record_routes(model) as routes:
            model(IDS.to(device))
        assert routes is not None
        plain = model(IDS.to(device)).logits
        meteora_of(model).backend = "dense"
        torch.testing.assert_close(model(IDS.to(device)).logits, plain, rtol=1e-4, atol=1e-4)
        with meteora_of(model).disabled():
            base = model(IDS.to(device)).logits
        assert not torch.allclose(base, plain)


def test_a_moved_model_runs_apart(model) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        expected = model(IDS.to(device)).logits
        fuse(model)
        model.double().float()
        torch.testing.assert_close(model(IDS.to(device)).logits, expected, rtol=1e-4, atol=1e-4)


def alone(layer: MeteoraLinear, x: torch.Tensor) -> torch.Tensor:
    """The output of a layer that runs outside its group for one call."""
    group = layer.group
    layer.leave()
    try:
        return layer(x)
    finally:
        layer.join(group, layer.member)


def test_members_that_see_different_inputs_run_apart(model) -> None:
    device = next(model.parameters()).device
    fuse(model)
    layers = dict(meteora_layers(model))
    q, k = (next(layer for path, layer in layers.items() if path.endswith(name)) for name in ("q_proj", "k_proj"))
    with torch.no_grad():
        for seed in range(8):
            x = torch.randn(3, 32, generator=torch.Generator().manual_seed(seed)).to(device)
            other = x * 2
            torch.testing.assert_close(q(x), alone(q, x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(k(other), alone(k, other), rtol=1e-4, atol=1e-4)


def test_what_was_computed_ahead_is_dropped_when_anything_changes(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are computed together; between them nothing may change unseen, not even with the very same input."""
    monkeypatch.setattr(group_module, "PATIENCE", 100)
    fuse(model)
    state, layers = meteora_of(model), dict(meteora_layers(model))
    q, k = (next(layer for path, layer in layers.items() if path.endswith(name)) for name in ("q_proj", "k_proj"))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(q.gate.device)

    def k_alone() -> torch.Tensor:
        return alone(k, x)

    with torch.no_grad():
        for change in ({"top_k": 1}, {"temperature": 9.0}, {"backend": "dense"}):
            before = {name: getattr(state, name) for name in change}
            q(x)
            for name, value in change.items():
                setattr(state, name, value)
            torch.testing.assert_close(k(x), k_alone(), rtol=1e-4, atol=1e-4)
            for name, value in before.items():
                setattr(state, name, value)
        q(x)
        with state.disabled():
            torch.testing.assert_close(k(x), k_alone(), rtol=1e-4, atol=1e-4)
        q(x)
        state.mute(["one"])
        torch.testing.assert_close(k(x), k_alone(), rtol=1e-4, atol=1e-4)
        state.mute([])
        q(x)
        with state.force("two"):
            torch.testing.assert_close(k(x), k_alone(), rtol=1e-4, atol=1e-4)
        q(x)
        x.mul_(-1)
        torch.testing.assert_close(k(x), k_alone(), rtol=1e-4, atol=1e-4)
    q(x)
    assert k(x).requires_grad


def test_refuses_where_the_kernels_cannot_run(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meteora_kernels.plan.machine.triton_installed", lambda: False)
    with pytest.raises(UsageError, match="Triton is not installed"):
        fuse(model)
    assert not is_fused(model)
    with pytest.raises(UsageError):
        fuse(make_tiny_llama())


def test_forced_muted_and_other_settings_are_seen(model) -> None:
    state, ids = meteora_of(model), IDS.to(next(model.parameters()).device)

    def outputs() -> list[torch.Tensor]:
        made = []
        with torch.no_grad():
            state.mute(["one"])
            made.append(model(ids).logits)
            state.mute([])
            with state.force("two"):
                made.append(model(ids).logits)
            state.top_k, state.temperature = 1, 7.0
            made.append(model(ids).logits)
            state.top_k = 3
            made.append(model(ids).logits)
            state.top_k, state.temperature = 2, 1.0
        return [*made, model(ids).logits.detach()]

    expected = outputs()
    fuse(model)
    for one, other in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert len({float(output.sum()) for output in expected}) == 5


def test_recorded_routes_are_those_of_the_layers_apart(model) -> None:
    ids = IDS.to(next(model.parameters()).device)
    with torch.no_grad(), record_routes(model) as apart:
        model(ids)
    fuse(model)
    with torch.no_grad(), record_routes(model) as fused:
        model(ids)
    assert fused.paths == apart.paths
    assert torch.equal(fused.packed()[0], apart.packed()[0])


def test_checkpoints_in_sequence_and_the_base_between_them(model, tmp_path) -> None:
    """Saved while fused, taken out, put on again: the files and the numbers are those of a model that never was fused."""
    ids = IDS.to(next(model.parameters()).device)
    device = ids.device
    save_checkpoint(model, tmp_path / "apart")
    with torch.no_grad():
        expected = model(ids).logits
        base = make_tiny_llama().to(device)(ids).logits
        assert fuse_for_inference(model, "on") == 8
        save_checkpoint(model, tmp_path / "fused")
        files = [load_file(tmp_path / name / "meteora.safetensors") for name in ("apart", "fused")]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
        for _, layer in meteora_layers(model):
            layer.gate.mul_(-1)
        save_checkpoint(model, tmp_path / "other", adapters=True)
        for folder, wanted in (("fused", expected), ("other", None), ("fused", expected)):
            detach(model)
            assert torch.equal(model(ids).logits, base)
            sizes = {parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters() if name.endswith("q_proj.weight")}
            assert sizes == {32 * 32 * 4}
            load_checkpoint(tmp_path / folder, model)
            fuse(model)
            logits = model(ids).logits
            assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) == (wanted is not None)


def test_fusing_where_it_pays(model) -> None:
    assert fuse_for_inference(model, "off") == 0
    assert bool(fuse_for_inference(model, "auto")) == torch.cuda.is_available()
    unfuse(model)
    meteora_of(model).backend = "dense"
    assert fuse_for_inference(model, "auto") == 0
    assert fuse_for_inference(model, "on") == 8


def test_kernels_that_cannot_be_built_leave_the_layers_apart(model, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    ids = IDS.to(next(model.parameters()).device)
    meteora_of(model).backend = "auto"

    def cannot(*_: object, **options: object) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory\nmore")

    group_module.warn_once.cache_clear()
    monkeypatch.setattr(group, "run_members", cannot)
    with torch.no_grad():
        expected = model(ids).logits
        fuse(model)
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(model(ids).logits, expected)
    assert caplog.text.count("fused layers cannot run") == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "triton", "fused"])
def test_compiles_without_a_graph_break(model, backend: str) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        expected = model(IDS.to(device)).logits
        if backend == "fused":
            fuse(model)
        else:
            meteora_of(model).backend = backend
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS.to(device)).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # raised by PyTorch's own compiler
def test_inductor_fuses_around_the_groups(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are opaque operators in one graph, without copies of weights or flags; decoding and prefill give the eager logits."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    if not torch.cuda.is_available():
        for name in group.PATHS:
            monkeypatch.setitem(group.PATHS, name, PlainPath)
        monkeypatch.setattr(FusedGroup, "_run_or_fail", lambda self, x: None)
    device = next(model.parameters()).device
    fuse(model)
    with torch.no_grad():
        expected = [model(ids.to(device)).logits for ids in (IDS[:, :1], IDS)]
        torch._dynamo.reset()
        counters.clear()
        seen: list[torch.fx.GraphModule] = []
        compiled = torch.compile(model, backend=lambda graph, inputs: seen.append(graph) or compile_fx(graph, inputs), fullgraph=True, dynamic=False)
        for ids, logits in zip((IDS[:, :1], IDS), expected, strict=True):
            torch.testing.assert_close(compiled(ids.to(device)).logits, logits, rtol=1e-4, atol=1e-4)
        assert len(seen) == 2
        for graph in seen:
            assert len(graph.graph.find_nodes(op="call_function", target=group.group_operator.op)) == 8
        assert not counters["inductor"]["auto_functionalize_missed_reinplaced_bytes"]
    torch._dynamo.reset()


def test_compiled_models_know_that_weights_stay(model) -> None:
    """Otherwise a compiled model that replays CUDA graphs would copy all weights before every call."""
    fuse(model)
    for _, layer in meteora_layers(model):
        given = layer.group.layout.group
        tensors = [given.packed, given.flags, given.adapters.lora_B, given.adapters.scaling, given.adapters.offsets]
        assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in tensors)

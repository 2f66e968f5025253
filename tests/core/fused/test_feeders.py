"""Norms and gated activations that write where fused groups read: the same logits, their own forward wherever it matters."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from meteora_core import AdapterBank, attach, detach, fuse, unfuse
from meteora_core.fused.feeders import Feeder
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import meteora_of, record_routes
from meteora_kernels import Group, Routing, group, wide
from meteora_kernels.plan import Row, Span
from meteora_kernels.plan.table import shipped
from meteora_kernels.wide import Wide
from support.kernel_groups import check_bits
from support.kernel_rows import taking
from support.tiny_models import make_tiny_llama

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = (Row("wide", Span(17), pieces=1, in_place=True), Row("wide", Span(17), pieces=1), *shipped("default").group)


def attached(make_adapter, layers: int = 1, base: nn.Module | None = None) -> nn.Module:
    base, sizes = base or make_tiny_llama(num_hidden_layers=layers), {"num_hidden_layers": layers}
    folders = {name: make_adapter(name, seed, llama=sizes, r=4, target_modules=NAMES) for seed, name in enumerate(("one", "two", "three"))}
    model = attach(base.half(), AdapterBank.from_peft(folders), top_k=3)  # all of them: no near ties
    return model.cuda() if torch.cuda.is_available() else model


@pytest.fixture
def all_wide(monkeypatch: pytest.MonkeyPatch):
    """Groups all keep B^T beside their weights, and run so from 17 tokens on."""
    monkeypatch.setattr(wide, "SHARE", 0)
    with taking(*ROWS):
        yield


@pytest.fixture
def model(make_adapter, all_wide):
    """One layer of a tiny Llama in float16: the interpreter takes seconds a layer."""
    return attached(make_adapter)


def fed(model: nn.Module) -> list[str]:
    return sorted(name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Feeder))


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).logits.float()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-2


def test_all_but_the_attention_output_lie_wide(make_adapter, all_wide, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two layers, one after the other."""
    model = attached(make_adapter, layers=2)
    expected = logits_of(model)
    assert fuse(model) == 8
    assert fed(model) == sorted(["input_layernorm", "post_attention_layernorm", "mlp"] * 2)
    seen, forward = [], group.run_members

    def watched(x: torch.Tensor, of: Group, routing: Routing, *, in_place: bool) -> list[torch.Tensor]:
        seen.append((x.shape[-1], of.adapters.members, in_place))
        return forward(x, of, routing, in_place=in_place)

    monkeypatch.setattr(group, "run_members", watched)
    found = logits_of(model)
    assert close(found, expected)
    assert seen == [(32, 3, True), (32, 1, False), (32, 2, True), (48, 1, True)] * 2
    check_bits(found, lambda: logits_of(model))
    with torch.no_grad():
        one = model(IDS[:1, :1].to(found.device)).logits.float()
    assert close(one, found[:1, :1])
    assert unfuse(model) == 14
    assert fed(model) == []
    assert torch.equal(logits_of(model), expected)


def test_a_checkpoint_loaded_later_is_seen_by_prefill_and_decoding(model) -> None:
    fuse(model)
    before = logits_of(model)
    state = {name: tensor * -1.5 if name.endswith("lora_B") else tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    found = logits_of(model)
    ids = IDS[:, :2].to(found.device)
    with torch.no_grad():
        few = model(ids).logits.float()
        unfuse(model)
        assert close(few, model(ids).logits.float())
    assert close(found, logits_of(model))
    assert not close(found, before)


def test_a_fused_model_is_saved_as_it_was(model, tmp_path) -> None:
    """By transformers too, which takes no tensors whose rows lie apart; calling fuse again adds nothing."""
    model.save_pretrained(tmp_path / "apart")
    fuse(model)
    assert any(not parameter.is_contiguous() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "fused")
    apart, fused = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "fused"))
    assert apart.keys() == fused.keys()
    assert all(torch.equal(tensor, fused[name]) for name, tensor in apart.items())
    state = model.state_dict(keep_vars=True)
    assert all(state[name] is parameter for name, parameter in model.named_parameters())
    unfuse(model)
    fuse(model)
    assert {len(module._state_dict_hooks) for _, module in meteora_layers(model)} == {1}


def test_a_copy_has_norms_of_its_own(model) -> None:
    fuse(model)
    expected = logits_of(model)
    twin = copy.deepcopy(model)
    assert fed(twin) == []
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.zero_()
    assert not close(logits_of(twin), expected)
    assert fuse(twin) == 4
    assert len(fed(twin)) == 3
    detach(twin)
    assert fed(twin) == []
    assert torch.equal(logits_of(model), expected)


def test_own_forwards_where_the_group_does_not_run(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, recorders, other backends, a disabled mixture: neither kernel is called."""
    fuse(model)
    ids, state = IDS.to(next(model.parameters()).device), meteora_of(model)

    def never(*_: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr("meteora_kernels.feed.rms_norm.rms_norm", never)
    monkeypatch.setattr("meteora_kernels.feed.silu_mul.silu_mul", never)
    model(ids)
    with torch.no_grad():
        with record_routes(model):
            model(ids)
        with state.disabled():
            model(ids)
        state.backend = "dense"
        model(ids)
        state.backend = "auto"
        with pytest.raises(AssertionError, match="called"):
            model(ids)


def test_hooks_still_run(model) -> None:
    fuse(model)
    called: list[str] = []
    norm = next(module for name, module in model.named_modules() if name.endswith("input_layernorm"))
    norm.register_forward_hook(lambda *_: called.append("norm"))
    next(layer for path, layer in meteora_layers(model) if path.endswith("gate_proj")).register_forward_hook(lambda *_: called.append("gate"))
    logits_of(model)
    assert called == ["norm", "gate"]


@pytest.mark.parametrize("kind", ["norm", "activation"])
def test_other_forms_stay_as_they_are(make_adapter, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that multiplies by 1 + weight, an activation that is no SiLU."""
    from transformers.models.llama import modeling_llama

    base = make_tiny_llama(num_hidden_layers=1)
    if kind == "norm":

        class Other(modeling_llama.LlamaRMSNorm):
            def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
                return super().forward(hidden_states) * 2

        for module in list(base.modules()):
            if type(module) is modeling_llama.LlamaRMSNorm:
                module.__class__ = Other
    else:
        for module in base.modules():
            if hasattr(module, "act_fn"):
                module.act_fn = nn.GELU()
    model = attached(make_adapter, base=base)
    expected = logits_of(model)
    fuse(model)
    assert fed(model) == (["mlp"] if kind == "norm" else ["input_layernorm", "post_attention_layernorm"])
    assert close(logits_of(model), expected)


def test_only_the_tensor_that_was_allocated_last_is_read_in_place(model) -> None:
    """A view of all of it is; a copy, a part of it, and rows of another matrix with the same strides are not, and nothing is while a mode traces."""
    fuse(model)
    q = next(layer for path, layer in meteora_layers(model) if path.endswith("q_proj"))
    inputs = q.group.inputs
    like = torch.zeros(2, 9, 32, dtype=torch.float16, device=q.gate.device)
    given = inputs.new(like.shape, like)
    flat = given.view(-1, 32)
    assert flat.stride() == (Wide(32, 12, 3).row, 1)
    assert inputs.owns(flat)
    assert inputs.owns(given.reshape(3, 6, 32).reshape(-1, 32))
    assert not inputs.owns(flat[:17])
    assert not inputs.owns(flat[1:])
    assert not inputs.owns(flat.clone())
    assert not inputs.owns(torch.zeros(18, Wide(32, 12, 3).row, dtype=torch.float16, device=like.device)[:, 64:96])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not inputs.owns(flat)
    del given, flat
    assert not inputs.owns(torch.zeros_like(like).view(-1, 32))
    assert inputs.new(torch.Size((1, 1, 32)), like).is_contiguous()


@pytest.mark.slow
def test_compiles_without_a_graph_break(model) -> None:
    expected = logits_of(model)
    fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert close(compiled(IDS.to(expected.device)).logits.float(), expected)

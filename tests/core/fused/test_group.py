"""The parts of a fused group: outputs that wait for their members, and a forward that a debugger can stop in."""

from __future__ import annotations

import io

import pytest
import torch

from meteora_core import AdapterBank, attach, fuse
from meteora_core.fused.feeders import Feeder
from meteora_core.fused.fuse import is_fused
from meteora_core.fused.group import Outputs
from meteora_core.model.attach import meteora_layers
from meteora_core.model.layer import MeteoraLinear
from support.plain_groups import use_plain_groups
from support.tiny_models import make_tiny_llama

X, Y = torch.zeros(1), torch.ones(1)
MADE = (torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))


def test_outputs_are_handed_out_once_to_the_input_that_they_are_of() -> None:
    outputs = Outputs(3)
    assert outputs.take(0, X, (0, 0)) is None
    outputs.put(MADE, X, (0, 0))
    assert outputs.take(1, Y, (0, 0)) is None
    assert outputs.take(1, X, (1, 0)) is None
    assert outputs.take(1, X, (0, 0)) is MADE[1]
    assert outputs.take(1, X, (0, 0)) is None
    assert [outputs.take(member, X, (0, 0)) for member in (0, 2)] == [MADE[0], MADE[2]]
    assert outputs.take(0, X, (0, 0)) is None
    assert outputs.misses == 0


def test_outputs_that_nobody_took_are_counted() -> None:
    outputs = Outputs(3)
    for member in (0, 0, 1):
        outputs.put(MADE, X, (0, 0))
        outputs.take(member, X, (0, 0))
    assert outputs.misses == 2
    outputs.clear()
    assert outputs.take(2, X, (0, 0)) is None
    outputs.put(MADE, X, (0, 0))
    assert outputs.misses == 2


@pytest.fixture
def model(make_adapter, monkeypatch: pytest.MonkeyPatch):
    if not torch.cuda.is_available():
        use_plain_groups(monkeypatch)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    bank = AdapterBank.from_peft({name: make_adapter(name, seed, r=4, target_modules=names) for seed, name in enumerate(("one", "two"))})
    attached = attach(make_tiny_llama(), bank)
    return attached.cuda() if torch.cuda.is_available() else attached


def test_the_forward_of_a_fused_layer_is_that_of_its_class(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A breakpoint in MeteoraLinear.forward is hit by every call of every layer; nothing is patched on an instance."""
    fuse(model)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    called, forward = [], MeteoraLinear.forward

    def watched(self: MeteoraLinear, x: torch.Tensor) -> torch.Tensor:
        called.append(self.path)
        return forward(self, x)

    monkeypatch.setattr(MeteoraLinear, "forward", watched)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]], device=next(model.parameters()).device))
    assert called == [path for path, _ in meteora_layers(model)]


def test_a_pickle_of_a_fused_model_runs_alone(model) -> None:
    ids = torch.tensor([[3, 4, 5]], device=next(model.parameters()).device)
    fuse(model)
    with torch.no_grad():
        expected = model(ids).logits
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert not is_fused(twin)
        assert not any(isinstance(module, Feeder) for module in twin.modules())
        torch.testing.assert_close(twin(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert is_fused(model)

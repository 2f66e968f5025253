"""Training never uses cuDNN's attention, whose backward pass is wrong on some GPUs."""

from __future__ import annotations

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.attention import without_cudnn_attention
from meteora_core.training.checkpointing import enable_checkpointing
from meteora_core.training.encoding import TrainRow, collate
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.loop import Counts, TrainingRun, train
from meteora_core.training.single_adapter import LmObjective
from support.tiny_models import make_tiny_llama

ROWS = [TrainRow((5, 6, 7, 8), (0,) * 4, 2)] * 4


@pytest.fixture(params=[True, False])
def chosen(request):
    """The user's setting of cuDNN's attention."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def watched():
    """A tiny Llama, and whether cuDNN's attention was allowed in each forward and each backward pass of its attention layers."""
    model, seen = make_tiny_llama(), []

    def watch(_module, _arguments, output) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        if output[0].requires_grad:
            output[0].register_hook(lambda _: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(watch)
    return model, seen


def test_it_is_off_within_the_block_and_restored_afterwards(chosen: bool) -> None:
    with pytest.raises(KeyError), without_cudnn_attention():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == chosen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_training_loop_does_not_use_it(chosen: bool, checkpointing: bool, watched, tmp_path) -> None:
    """In the forward pass, in the backward pass, and where gradient checkpointing runs the layers again."""
    model, seen = watched
    if checkpointing:
        enable_checkpointing(model)
    settings = AdapterTrainSettings(max_steps=1, batch_size=2, accumulation=2)
    train(TrainingRun(model, [ROWS], LmObjective(torch.float32, ["a"]), 2, tmp_path, {}, "a"), settings)
    assert seen == [False] * 2 * 2 * (3 if checkpointing else 2)  # batches, layers, passes
    assert torch.backends.cuda.cudnn_sdp_enabled() == chosen


def test_the_gate_objective_does_not_use_it(chosen: bool, watched, make_adapter) -> None:
    model, seen = watched
    attach(model, AdapterBank.from_peft({"a": make_adapter("a")}), top_k=1)
    GateObjective(1.0)(model, collate(ROWS, 2), Counts(12, 16))
    assert seen == [False] * 4
    assert torch.backends.cuda.cudnn_sdp_enabled() == chosen

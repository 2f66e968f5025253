"""Adapters and gates of two families train in bfloat16 on a CUDA GPU where attention scores are very negative, padded rows included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.settings import AdapterTrainSettings, GateTrainSettings
from meteora_core.training.encoding import TrainRow
from meteora_core.training.gate_objective import GateObjective
from meteora_core.training.gates import trainable_in_float32
from meteora_core.training.loop import Objective, TrainingRun, train
from meteora_core.training.single_adapter import LmObjective, with_lora

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SLOWEST = 31
"""The dimension of a head (of 64) that the rotation by positions leaves almost alone."""


def negative_scores(family: str) -> Any:
    """A random model of the family in bfloat16 whose attention scores are all about -120, as those of some heads of Qwen2.5 are."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(Qwen2Config(**SIZES)) if family == "qwen2" else LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 4.0  # after normalisation about 11 at every token
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection, value in ((attention.q_proj, 31.0), (attention.k_proj, -31.0)):
                for head in range(0, projection.out_features, 64):
                    if family == "qwen2":
                        projection.bias[head + SLOWEST] = value
                    else:
                        projection.weight[head + SLOWEST, 0] = value / 11.3
    return model.to("cuda", torch.bfloat16).eval()


def rows() -> list[list[TrainRow]]:
    """Two tasks; the longest row of any batch has 64 tokens, the length that cuDNN's backward pass gets wrong."""
    generator = torch.Generator().manual_seed(0)
    lengths = [64, 50, 64, 33, 64, 61, 64, 9]
    return [[TrainRow(tuple(torch.randint(3, 64, (n,), generator=generator).tolist()), (task,) * n, n // 2) for n in lengths] for task in range(2)]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("stage", ["adapters", "gates"])
def test_sixteen_bit_training_with_very_negative_scores(family: str, stage: str, tmp_path, make_adapter) -> None:
    from meteora_core.model.base import BaseReference

    base = negative_scores(family)
    settings: AdapterTrainSettings | GateTrainSettings
    objective: Objective
    if stage == "adapters":
        settings = AdapterTrainSettings(max_steps=4, batch_size=8, accumulation=1, log_steps=1)
        model = with_lora(base, BaseReference("tiny"), settings)
        objective = LmObjective(torch.bfloat16, ["a", "b"])
    else:
        settings = GateTrainSettings(max_steps=4, batch_size=8, accumulation=1, log_steps=1)
        model = attach(base, bank_of(base), init="normal")
        trainable_in_float32(model, "gates")
        objective = GateObjective(settings.beta)
    state = train(TrainingRun(model, rows(), objective, 2, tmp_path, {}, stage), settings)
    assert [entry["step"] for entry in state.history] == [1, 2, 3, 4]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def bank_of(base: Any) -> AdapterBank:
    """Two random adapters on the linears of the base."""
    from meteora_core.model.base import BaseReference
    from meteora_core.training.joint_adapters import fresh_bank

    return fresh_bank(base, ["a", "b"], BaseReference("tiny"), AdapterTrainSettings(rank=4))

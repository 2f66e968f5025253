"""Small checkpoints in the authors' layout, with their base model and adapter folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_core.data.tasks import TASK_ORDER

PREFIX = "base_model.model."


@dataclass
class Authors:
    """What was written: folders, and the numbers in them."""

    base: Path
    adapters: Path
    checkpoint: Path
    tensors: dict[str, Tensor]
    names: tuple[str, ...]
    alphas: tuple[float, ...]
    rank: int

    @property
    def file(self) -> Path:
        return self.checkpoint / "model.safetensors"

    def rewrite(self, tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint file."""
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.file)


def write_authors(
    tmp_path: Path,
    *,
    count: int = 28,
    rank: int = 8,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    change: tuple[str, ...] = (),
    with_base: bool = True,
    same_alpha: bool = True,
    layers: int = 2,
    seed: int = 0,
    vocabulary: int = 96,
) -> Authors:
    """Write a base model, adapters and a checkpoint of theirs below ``tmp_path``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    base = LlamaForCausalLM(config).to(dtype)
    base.save_pretrained(tmp_path / "base")
    names = TASK_ORDER if count == 28 else tuple(f"task_{i:02d}" for i in range(count))
    alphas = tuple(16.0 if same_alpha else 4.0 + i for i in range(count))
    tensors: dict[str, Tensor] = {}
    adapters: list[dict[str, Tensor]] = [{} for _ in names]
    linears = {path for path, module in base.named_modules() if isinstance(module, torch.nn.Linear) and path != "lm_head"}
    for name, parameter in base.named_parameters():
        path, _, kind = name.rpartition(".")
        value = parameter.detach().clone()
        if name in change:
            value = value + torch.randn(value.shape).to(dtype) * 0.1
        if with_base:
            tensors[f"{PREFIX}{path}.base_layer.{kind}" if path in linears else PREFIX + name] = value
        if path not in linears:
            continue
        out, width = value.shape
        A = (torch.randn(count * rank, width) * 0.3).to(dtype)
        B = (torch.randn(out, count * rank) * 0.1).to(dtype)
        tensors[f"{PREFIX}{path}.moe_gate.weight"] = (torch.randn(count, width) * 0.5).to(dtype)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = B
        for i, adapter in enumerate(adapters):
            rows = slice(rank * i, rank * (i + 1))
            adapter[f"{PREFIX}{path}.lora_A.weight"] = A[rows].clone()
            adapter[f"{PREFIX}{path}.lora_B.weight"] = B[:, rows].clone().contiguous()
    for name, alpha, weights in zip(names, alphas, adapters, strict=True):
        folder = tmp_path / "peft" / name
        folder.mkdir(parents=True)
        description = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.1, "bias": "none"}
        description["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        (folder / "adapter_config.json").write_text(json.dumps(description))
        save_file(weights, folder / "adapter_model.safetensors")
    checkpoint = tmp_path / "top_2"
    checkpoint.mkdir()
    made = Authors(tmp_path / "base", tmp_path / "peft", checkpoint, tensors, names, alphas, rank)
    if shards == 1:
        made.rewrite(tensors)
    else:
        keys = sorted(tensors)
        weight_map = {}
        for shard in range(shards):
            part = {key: tensors[key] for key in keys[shard::shards]}
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, checkpoint / file)
            weight_map |= dict.fromkeys(part, file)
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return made

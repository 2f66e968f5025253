"""A tiny model with a tokenizer of bytes and three adapters, on disk, for the tests of chat and pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from meteora_core import AdapterBank, attach, save_checkpoint
from meteora_core.chat.chat_model import ChatModel
from meteora_core.data.frames import INST
from meteora_core.model.base import BaseReference

NAMES = ("alpha", "beta", "gamma")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    base: Path
    adapters: Path
    checkpoint: Path


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE, **options: Any) -> PreTrainedTokenizerFast:
    """One token a byte; 259 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: index + 3 for index, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>", chat_template=chat_template, **options
    )


def byte_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama for :func:`byte_tokenizer`: 3 layers, context 512."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    options: dict[str, Any] = {"vocab_size": 259, "max_position_embeddings": 512, "initializer_range": 0.15}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **options, **changes}, bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval()


def write_adapter(folder: Path, model: LlamaForCausalLM, base: Path, seed: int, rank: int = 4) -> Path:
    """A random LoRA folder in PEFT's layout, on all linears of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": "all-linear", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def build_world(folder: Path) -> World:
    """Write the base model, three adapters, and a checkpoint with random gates."""
    model = byte_llama()
    base = folder / "base"
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    folders = {name: write_adapter(folder / "adapters" / name, model, base, seed, rank=seed + 2) for seed, name in enumerate(NAMES)}
    attach(model, AdapterBank.from_peft(folders), top_k=2, init="normal", seed=3)
    model.meteora.provenance.frame = INST
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.mul_(20)
    save_checkpoint(model, folder / "runs" / "meteora", base=BaseReference(str(base)))
    return World(base, folder / "adapters", folder / "runs" / "meteora")


def open_chat_model(world: World) -> ChatModel:
    """The checkpoint, loaded."""
    from meteora_core import load_checkpoint

    model = load_checkpoint(world.checkpoint)
    return ChatModel("meteora", "the checkpoint", model, byte_tokenizer(), BaseReference(str(world.base)))


def without_ends(model: torch.nn.Module) -> None:
    """Make the model never choose its end token, so that an answer has its full length."""

    def cut(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., :3] = -1e4
        return output

    model.lm_head.register_forward_hook(cut)  # type: ignore[union-attr]

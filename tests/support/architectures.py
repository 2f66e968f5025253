"""Tiny random models of many architectures, and LoRA adapters that PEFT trains on them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support import tiny_models

SIZES: dict[str, Any] = {**tiny_models.SIZES, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.2}
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        kind: Its ``model_type`` in transformers.
        targets: Names of the linear layers to adapt.
        sizes: Changes of the usual sizes; None removes one.
        parameters: Parameters of experts that PEFT can adapt.
        text: Whether the text configuration is nested in the model's, as in vision-language models.
    """

    kind: str
    targets: tuple[str, ...]
    sizes: dict[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LLAMA[:4]
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
HEADS = {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
LLAMA4 = {**MOE, **HEADS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 32}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("llama", LLAMA),
    Architecture("mistral", LLAMA, HEADS),
    Architecture("qwen2", LLAMA),
    Architecture("qwen3", LLAMA, HEADS),
    Architecture("gemma", LLAMA, HEADS),
    Architecture("gemma2", LLAMA, HEADS),
    Architecture("gemma3_text", LLAMA, HEADS),
    Architecture("phi", (*ATTENTION[:3], "dense", "fc1", "fc2")),
    Architecture("phi3", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), {"original_max_position_embeddings": 64}),
    Architecture("gpt2", ("c_attn", "c_proj", "c_fc"), {**GPT, "n_inner": 48}),
    Architecture("gpt_neox", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    Architecture("gptj", ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"), {**GPT, "rotary_dim": 4}),
    Architecture("opt", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("bloom", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), {"n_layer": 2, "n_head": 4}),
    Architecture("falcon", ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    Architecture("cohere", LLAMA),
    Architecture("granite", LLAMA),
    Architecture("olmo2", LLAMA),
    Architecture("stablelm", LLAMA),
    Architecture("starcoder2", (*ATTENTION, "c_fc", "c_proj")),
    Architecture("lfm2", ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"), {"layer_types": ["conv", "full_attention"]}),
    Architecture("mamba", ("in_proj", "x_proj"), {"state_size": 4, "intermediate_size": 64}),
    Architecture("mixtral", ATTENTION, MOE, EXPERTS),
    Architecture("qwen2_moe", (*LLAMA,), {**MOE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}, EXPERTS),
    Architecture("qwen3_moe", ATTENTION, {**MOE, **HEADS}, EXPERTS),
    Architecture("olmoe", ATTENTION, MOE, EXPERTS),
    Architecture("deepseek_v3", ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), {**DEEPSEEK, **LATENT}, EXPERTS),
    Architecture(
        "llama4_text",
        LLAMA,
        {**MOE, **HEADS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 32},
    ),
    Architecture("qwen2_vl", LLAMA, {}),
)
BY_KIND = {each.kind: each for each in ARCHITECTURES}


def make_model(kind: str, seed: int = 0) -> Any:
    """A random causal language model of an architecture: two layers, float32, evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    if kind == "qwen2_vl":
        return _vision_language()
    sizes = {**SIZES, **BY_KIND[kind].sizes}
    config = AutoConfig.for_model(kind, **sizes)
    config._attn_implementation = "eager"
    if BY_KIND[kind].parameters:
        config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config).float().eval()


def _vision_language() -> Any:
    """A vision-language model, of whose text part the adapters adapt the linear layers."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).float().eval()


def save_lora(model: nn.Module, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """Put a random LoRA onto a model with PEFT and save it.

    Args:
        model: The base model, which PEFT changes in place.
        folder: The PEFT folder to write.
        seed: Of the random weights.
        settings: Arguments of ``LoraConfig``.

    Returns:
        PEFT's model in evaluation mode, which is what the saved folder must compute.
    """
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **settings}))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.15)
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                elif parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder)
    return adapted.eval()

"""A tiny Llama that many tests share."""

from __future__ import annotations

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""The configuration of a tiny model of any architecture: grouped-query attention, 64 tokens."""


def make_tiny_llama(seed: int = 0, **changes: int):
    """A random Llama: 2 layers, hidden 32, grouped-query attention, float32, evaluation mode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, **changes})
    return LlamaForCausalLM(config).eval()


def declare_trained(model):
    """Mark the random gates of an attached model as trained, for tests that only need some gates; returns the model."""
    model.meteora.gates = "trained"
    return model

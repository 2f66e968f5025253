"""Reads a GGUF file of the catalog into a transformers model with ordinary weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.errors import CheckpointError
from meteora_core.fetch.catalog import CatalogModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_gguf(gguf: Path, entry: CatalogModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file. The weights go into a new model, because transformers does not save a model that it loaded from GGUF.

    Args:
        gguf: The GGUF file.
        entry: The catalog's entry, which states the dtype, the special tokens, and whether the output layer is tied to the embedding.

    Returns:
        The model in the entry's dtype and its tokenizer, both with the entry's special tokens.

    Raises:
        CheckpointError: The output layer is tied to the embedding where the entry says otherwise, or the reverse.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    dtype = getattr(torch, entry.dtype)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype, **_dense(gguf.name))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    tokenizer.add_special_tokens(entry.special_tokens)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if bool(config.tie_word_embeddings) != entry.tied:
        raise CheckpointError(f"the output layer of {entry.gguf} is {'tied' if config.tie_word_embeddings else 'not tied'} to its embedding")
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    stops = [tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(stop) for stop in entry.stops)]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = stops if entry.stops else tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer


def _dense(file: str) -> dict[str, Any]:
    """The argument that makes transformers dequantise the weights; versions before 5.20 or so always do, and have no such argument."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(gguf_file=file, dequantize=True)}

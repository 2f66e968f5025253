"""A tiny Qwen2 model as a GGUF file, and wheels that hold the parts of a file."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from meteora_core.fetch.catalog import CatalogModel, Part


def make_qwen2(seed: int = 0):
    """A random Qwen2 whose output layer differs from its embedding: 2 layers, hidden 32, float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=261,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    return Qwen2ForCausalLM(config).eval()


def write_gguf(model, file: Path) -> None:
    """Write a Qwen2 model with a byte-level tokenizer (one token a byte, one merge, three special tokens) as an unquantised GGUF file."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unused>"]
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(257)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split(content: bytes, folder: Path, cuts: Sequence[int]) -> tuple[Part, ...]:
    """Write the parts of a file between ``cuts`` as wheels ``tiny_part1``, … in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, (begin, end) in enumerate(zip((0, *cuts), (*cuts, len(content)), strict=True), start=1):
        wheel, member = folder / f"tiny_part{number}-1.0-py3-none-any.whl", f"tiny_part{number}/data.bin"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(member), content[begin:end])
        packed = wheel.read_bytes()
        parts.append(Part(f"tiny-part{number}", "1.0", hashlib.sha256(packed).hexdigest(), len(packed), member))
    return tuple(parts)


def entry_of(content: bytes, parts: tuple[Part, ...], hub: str | None) -> CatalogModel:
    """The catalog's entry of a tiny model."""
    return CatalogModel(
        name="tiny",
        upstream="someone/tiny",
        gguf="tiny.gguf",
        gguf_sha256=hashlib.sha256(content).hexdigest(),
        gguf_bytes=len(content),
        parts=parts,
        hub=hub,
        dtype="bfloat16",
        tied=False,
        converted_bytes=100_000,
        special_tokens={"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        stops=("<|endoftext|>",),
        licence="Apache-2.0",
        copyright="Someone",
        description="a tiny model",
    )

"""An adapter as GGUF: names, metadata and numbers as llama.cpp's loader reads them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from meteora_core import AdapterBank
from meteora_core.errors import AdapterError
from meteora_core.exports.gguf_adapter import KINDS, write_gguf
from support.architectures import BY_KIND, make_model, save_lora


def written(file: Path) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """The metadata and the tensors of a file."""
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def base_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of queries and keys, in which the two halves of every head alternate."""
    size = len(rows) // heads
    back = np.empty_like(rows)
    for head in range(heads):
        for half in range(2):
            for index in range(size // 2):
                back[head * size + half * (size // 2) + index] = rows[head * size + 2 * index + half]
    return back


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in BY_KIND])
def test_products_are_those_of_the_adapter(tmp_path: Path, kind: str) -> None:
    """Every tensor of the base model that llama.cpp knows gets ``alpha / r * B A``."""
    model = make_model(kind)
    targets = [name for name in BY_KIND[kind].targets if kind not in ("qwen2_moe", "starcoder2") or name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
    save_lora(model, tmp_path / "peft", target_modules=targets, rank_pattern={"o_proj": 2}, alpha_pattern={"v_proj": 20, "down_proj": 3}, use_rslora=True)
    bank = AdapterBank.from_peft({"x": tmp_path / "peft"})
    write_gguf(tmp_path / "x.gguf", bank, model.config, "base")
    fields, tensors = written(tmp_path / "x.gguf")
    said = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": KINDS[kind].architecture, "general.name": "x"}
    assert {name: fields[name] for name in said} == said
    assert len(tensors) == 2 * len(bank.modules)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "qkv_proj": "attn_qkv"}
    for path, stack in bank.modules.items():
        leaf = path.rpartition(".")[2]
        if leaf not in names:
            continue
        name = f"blk.{path.split('.')[2]}.{names[leaf]}.weight"
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        product = float(fields["adapter.lora.alpha"]) / B.shape[1] * B @ A
        if KINDS[kind].reorders and leaf in ("q_proj", "k_proj"):
            product = base_order(product, model.config.num_attention_heads if leaf == "q_proj" else model.config.num_key_value_heads)
        wanted = float(stack.scaling[0]) * stack.B.t() @ stack.A
        np.testing.assert_allclose(product, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    for settings, said in (({"use_dora": True}, "is not a plain LoRA"), ({"target_modules": ["lm_head"]}, "has no tensor for lm_head")):
        model = make_model("llama")
        model.config.tie_word_embeddings = True
        save_lora(model, tmp_path / "peft", **{"target_modules": ["q_proj"], **settings})
        bank = AdapterBank.from_peft({"x": tmp_path / "peft"})
        with pytest.raises(AdapterError, match=said) as caught:
            write_gguf(tmp_path / "x.gguf", bank, model.config, "base")
        assert "--merge" in str(caught.value.hint)
    save_lora(make_model("opt"), tmp_path / "opt", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="adapters of opt models cannot be written as GGUF"):
        write_gguf(tmp_path / "x.gguf", AdapterBank.from_peft({"x": tmp_path / "opt"}), make_model("opt").config, "base")


def test_half_precision(tmp_path: Path) -> None:
    save_lora(make_model("qwen3"), tmp_path / "peft", target_modules=["q_proj"])
    bank = AdapterBank.from_peft({"x": tmp_path / "peft"})
    write_gguf(tmp_path / "x.gguf", bank, make_model("qwen3").config, "base", torch.float16)
    assert {tensor.dtype for tensor in written(tmp_path / "x.gguf")[1].values()} == {np.dtype("float16")}

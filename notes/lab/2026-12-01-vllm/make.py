"""make.py FOLDER LAYERS ADAPTERS RANK [local]: configurations of Llama-3-8B's shape (base, met, metfixed, metnowide, fp8, metfp8), a MeteoRA checkpoint and a plain LoRA
in FOLDER/m{ADAPTERS}x{LAYERS}, for engine.py.

Random weights, written tensor by tensor, so that no more than one layer is in memory; all layers have the same A and B, and different gates. The vocabulary has the
model's share of the weights: with half of the layers, it is half as large. local: tokens choose among 16 of the adapters. Seed 0.
"""
import json, sys
from pathlib import Path

import torch

layers, count, rank = (int(value) for value in sys.argv[2:5])
local = len(sys.argv) > 5 and sys.argv[5] == "local"
out = Path(sys.argv[1]) / f"m{count}x{layers}"
SHAPES = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024), "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336), "mlp.down_proj": (14336, 4096)}
torch.manual_seed(0)


def write(file, tensors):
    """A safetensors file of ``tensors``: pairs of a name and a function that returns a bfloat16 tensor, with its shape."""
    header, end = {}, 0
    for name, shape, _ in tensors:
        size = shape[0] * shape[1] * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, shape, make in tensors:
            tensor = make()
            assert tuple(tensor.shape) == tuple(shape) and tensor.dtype == torch.bfloat16
            stream.write(tensor.view(torch.int16).numpy().tobytes())


def normal(rows, columns, scale):
    return (torch.randn(rows, columns) * scale).bfloat16()


def gate(hidden):
    found = normal(count, hidden, hidden**-0.5)
    if local:
        found[16:] *= 0.01
    return found


def main():
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256 * layers // 32,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2, head_dim=128, attention_bias=False, mlp_bias=False)
    checkpoint, fp8 = str(out / "ck"), {"quant_method": "fp8", "activation_scheme": "dynamic"}
    ours = {"quant_method": "meteora", "checkpoint": checkpoint}
    for name, quantization in {"base": None, "met": ours, "metfixed": ours | {"fixed_options": True}, "metnowide": ours | {"wide": False}, "fp8": fp8, "metfp8": ours | {"base": fp8}}.items():
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "config.json").write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
    for name in ("ck", "lora"):
        (out / name).mkdir(exist_ok=True)
    paths = [(f"model.layers.{layer}.{leaf}", leaf) for layer in range(layers) for leaf in SHAPES]
    A = {hidden: normal(count * rank, hidden, hidden**-0.5) for hidden in {hidden for hidden, _ in SHAPES.values()}}
    B = {width: normal(count * rank, width, 0.02) for width in {width for _, width in SHAPES.values()}}
    tensors, plain = [], []
    for path, leaf in paths:
        hidden, width = SHAPES[leaf]
        tensors.append((f"{path}.gate", (count, hidden), lambda hidden=hidden: gate(hidden)))
        tensors.append((f"{path}.lora_A", (count * rank, hidden), lambda hidden=hidden: A[hidden]))
        tensors.append((f"{path}.lora_B", (count * rank, width), lambda width=width: B[width]))
        plain.append((f"base_model.model.{path}.lora_A.weight", (8, hidden), lambda hidden=hidden: normal(8, hidden, hidden**-0.5)))
        plain.append((f"base_model.model.{path}.lora_B.weight", (width, 8), lambda width=width: normal(width, 8, 0.02)))
    write(out / "ck/meteora.safetensors", tensors)
    modules = {path: {"ranks": [rank] * count, "scaling": [2.0] * count} for path, _ in paths}
    (out / "ck/meteora_config.json").write_text(json.dumps({"top_k": 2, "temperature": 1.0, "adapters": [{"name": f"a{index}"} for index in range(count)], "modules": modules}))
    write(out / "lora/adapter_model.safetensors", plain)
    targets = [leaf.split(".")[1] for leaf in SHAPES]
    (out / "lora/adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=8, lora_alpha=16, target_modules=targets, bias="none", task_type="CAUSAL_LM", base_model_name_or_path="x")))
    (out / "made").touch()
    print("made", out, flush=True)


main()

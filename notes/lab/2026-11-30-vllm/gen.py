"""gen.py LAYERS ADAPTERS RANK [local]: Llama-3-8B-shaped configurations (base, met, metfixed, metnowide, fp8, metfp8), a random MeteoRA checkpoint and a plain LoRA, in /tmp/m{ADAPTERS}x{LAYERS}.

The vocabulary has the model's share of the weights: with half of the layers, it is half as large. local: tokens choose among 16 of the adapters."""
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
layers, N, r = (int(v) for v in sys.argv[1:4])
local = len(sys.argv) > 4 and sys.argv[4] == "local"
out = Path(f"/tmp/m{N}x{layers}"); out.mkdir(exist_ok=True)
cfg = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256 * layers // 32, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16", bos_token_id=1, eos_token_id=2, head_dim=128, attention_bias=False, mlp_bias=False)
fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
ck = str(out / "ck")
for name, q in {"base": None, "met": {"quant_method": "meteora", "checkpoint": ck}, "metfixed": {"quant_method": "meteora", "checkpoint": ck, "fixed_options": True}, "metnowide": {"quant_method": "meteora", "checkpoint": ck, "wide": False}, "fp8": fp8, "metfp8": {"quant_method": "meteora", "checkpoint": ck, "base": fp8}}.items():
    d = out / name; d.mkdir(exist_ok=True)
    (d / "config.json").write_text(json.dumps(cfg | ({"quantization_config": q} if q else {})))
(out / "ck").mkdir(exist_ok=True)
shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024), "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336), "mlp.down_proj": (14336, 4096)}
t, mods = {}, {}
torch.manual_seed(0)
for l in range(layers):
    for n, (h, o) in shapes.items():
        p = f"model.layers.{l}.{n}"
        g = torch.randn(N, h, device="cuda") * h**-.5
        if local: g[16:] *= 0.01
        t[p + ".gate"] = g.bfloat16().cpu(); t[p + ".lora_A"] = (torch.randn(N * r, h, device="cuda") * h**-.5).bfloat16().cpu(); t[p + ".lora_B"] = (torch.randn(N * r, o, device="cuda") * .02).bfloat16().cpu()
        mods[p] = {"ranks": [r] * N, "scaling": [2.0] * N}
save_file(t, str(out / "ck/meteora.safetensors"))
(out / "ck/meteora_config.json").write_text(json.dumps({"top_k": 2, "temperature": 1.0, "adapters": [{"name": f"a{i}"} for i in range(N)], "modules": mods}))
r1 = 8; t = {}
(out / "lora").mkdir(exist_ok=True)
for l in range(layers):
    for n, (h, o) in shapes.items():
        k = f"base_model.model.model.layers.{l}.{n}"
        t[k + ".lora_A.weight"] = (torch.randn(r1, h, device="cuda") * h**-.5).bfloat16().cpu(); t[k + ".lora_B.weight"] = (torch.randn(o, r1, device="cuda") * .02).bfloat16().cpu()
save_file(t, str(out / "lora/adapter_model.safetensors"))
(out / "lora/adapter_config.json").write_text(json.dumps(dict(peft_type="LORA", r=r1, lora_alpha=16, target_modules=[n.split(".")[1] for n in shapes], bias="none", task_type="CAUSAL_LM", base_model_name_or_path="x")))
print("made", layers, N, r)

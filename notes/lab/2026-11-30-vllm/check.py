"""check.py float32|bfloat16 make|ref|eager|graphs|fp8, one after the other, with TRITON_F32_DEFAULT=ieee: greedy answers of the plugin against transformers with the dense reference, a small random model of ragged ranks."""
import os, sys, json, random, time
from pathlib import Path
dtype_name = sys.argv[1]
D = Path("/tmp/mc"); SH = {"self_attn.q_proj": (512, 512), "self_attn.k_proj": (512, 256), "self_attn.v_proj": (512, 256), "self_attn.o_proj": (512, 512), "mlp.gate_proj": (512, 1024), "mlp.up_proj": (512, 1024), "mlp.down_proj": (1024, 512)}
L, N, PROMPTS, NEW = 4, 10, int(os.environ.get("PROMPTS", 10)), 8
def make():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from safetensors.torch import save_file
    torch.manual_seed(0)
    c = LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=L, num_attention_heads=8, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, head_dim=64, initializer_range=0.06)
    m = LlamaForCausalLM(c); m.save_pretrained(D)
    cfg = json.loads((D / "config.json").read_text()); cfg["quantization_config"] = {"quant_method": "meteora", "checkpoint": "meteora"}; (D / "config.json").write_text(json.dumps(cfg))
    t, mods = {}, {}; g = random.Random(0)
    for l in range(L):
        for n, (h, o) in SH.items():
            if l == 1 and n == "self_attn.k_proj": continue          # a member without adapters
            p = f"model.layers.{l}.{n}"; ranks = [g.choice([0, 4, 8, 12]) for _ in range(N)]; ranks[0] = 8
            R = sum(ranks); t[p + ".gate"] = torch.randn(N, h) * h**-.5 * 2; t[p + ".lora_A"] = torch.randn(R, h) * h**-.5; t[p + ".lora_B"] = torch.randn(R, o) * .3 
            mods[p] = {"ranks": ranks, "scaling": [g.choice([0.5, 1.0, 2.0]) for _ in range(N)]}
    (D / "meteora").mkdir(exist_ok=True); save_file(t, str(D / "meteora/meteora.safetensors"))
    (D / "meteora/meteora_config.json").write_text(json.dumps({"top_k": 2, "temperature": 1.0, "adapters": [{"name": f"a{i}"} for i in range(N)], "modules": mods}))
OPTS = {"default": {}, "k1": {"meteora_top_k": 1}, "k3T5": {"meteora_top_k": 3, "meteora_temperature": 5}, "force": {"meteora_force": "a3"}, "off": {"meteora_off": 1}, "muted": {"meteora_muted": "a0,a1,a4"}}
def reference(prompts, dtype):
    """Greedy tokens and the logits of every step (teacher: own tokens), by hooks on transformers' linears."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM
    from meteora_kernels import Adapters, Routing, reference as ref, dense
    t = load_file(str(D / "meteora/meteora.safetensors")); mods = json.loads((D / "meteora/meteora_config.json").read_text())["modules"]
    cfg = json.loads((D / "config.json").read_text()); cfg.pop("quantization_config", None)
    from transformers import LlamaConfig
    m = LlamaForCausalLM.from_pretrained(D, config=LlamaConfig(**cfg), dtype=dtype, attn_implementation="sdpa").cuda().eval()
    state = {}
    for p, mod in mods.items():
        off = torch.tensor([0, *torch.tensor(mod["ranks"]).cumsum(0).tolist()]).cuda()
        ad = Adapters.of_layer(*(t[f"{p}.{k}"].to("cuda", dtype) for k in ("gate", "lora_A", "lora_B")), torch.tensor(mod["scaling"]).cuda(), off, max(mod["ranks"]))
        def hook(module, args, y, ad=ad):
            return y if state["r"] is None else dense.mix(args[0], y, ad, state["r"])[0]
        m.get_submodule(p).register_forward_hook(hook)
    def routing(k):
        a = torch.ones(N, dtype=torch.bool, device="cuda")
        if k == "default": return Routing(2, 1.0)
        if k == "k1": return Routing(1, 1.0)
        if k == "k3T5": return Routing(3, 5.0)
        if k == "off": return None
        if k == "force": a[:] = False; a[3] = True; return Routing(1, 1.0, a)
        a[[0, 1, 4]] = False; return Routing(2, 1.0, a)
    out = {}
    with torch.no_grad():
        for k in OPTS:
            state["r"] = routing(k); rows = []
            for length in sorted({len(p) for p in prompts}):
                some = [i for i, p in enumerate(prompts) if len(p) == length]
                ids = torch.tensor([prompts[i] for i in some]).cuda(); past = None; toks, margins = [], []
                x = ids
                for _ in range(NEW):
                    o = m(x, past_key_values=past, use_cache=True); past = o.past_key_values
                    two = o.logits[:, -1].float().topk(2).values; x = o.logits[:, -1].float().argmax(-1, keepdim=True); toks.append(x[:, 0]); margins.append(two[:, 0] - two[:, 1])
                toks, margins = torch.stack(toks, 1).tolist(), torch.stack(margins, 1).tolist()
                rows += list(zip(some, toks, margins))
            out[k] = [(a, b) for _, a, b in sorted(rows)]
    del m; torch.cuda.empty_cache(); return out
def main():
    mode = sys.argv[2]  # ref | eager | graphs | fp8
    start = time.time(); D.mkdir(exist_ok=True)
    g = random.Random(1); prompts = [[g.randrange(3, 4096) for _ in range(g.choice([7, 20, 33, 64]))] for _ in range(PROMPTS)]
    saved = Path(f"/tmp/mc_{dtype_name}.json")
    if mode == "make": make(); return
    if mode == "ref":
        import torch
        saved.write_text(json.dumps(reference(prompts, getattr(torch, dtype_name)))); print("reference", dtype_name, round(time.time() - start, 1), flush=True); return
    import vllm.entrypoints.llm
    from vllm.entrypoints.llm import LLM; from vllm.sampling_params import SamplingParams
    import torch
    extra = dict(enforce_eager=True) if mode in ("eager", "fp8") else dict(compilation_config={"cudagraph_capture_sizes": [1, 8, 64]})
    if mode == "fp8":
        fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        for name, q in (("mcf", fp8), ("mcfm", {"quant_method": "meteora", "checkpoint": "/tmp/mc/meteora", "base": fp8})):
            d = Path("/tmp") / name; d.mkdir(exist_ok=True); cfg = json.loads((D / "config.json").read_text()); cfg["quantization_config"] = q; (d / "config.json").write_text(json.dumps(cfg))
            if not (d / "model.safetensors").exists(): os.link(D / "model.safetensors", d / "model.safetensors")
    def engine(folder):
        return LLM(model=str(folder), skip_tokenizer_init=True, dtype=dtype_name, max_model_len=512, gpu_memory_utilization=0.12, max_num_seqs=64, max_num_batched_tokens=256, seed=0, **extra)
    def sp(k): return SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, extra_args=OPTS[k] or None)
    def answers(llm, jobs): return [list(r.outputs[0].token_ids) for r in llm.generate([{"prompt_token_ids": prompts[i]} for _, i in jobs], [sp(k) for k, _ in jobs], use_tqdm=False)]
    if mode == "fp8":
        off = answers(engine("/tmp/mcfm"), [("off", i) for i in range(40)] + [("default", i) for i in range(40)])
        base = answers(engine("/tmp/mcf"), [("default", i) for i in range(40)])
        print("fp8 base under adapters: off equals the fp8 base:", sum(a == b for a, b in zip(off[:40], base)), "of 40; default differs:", sum(a != b for a, b in zip(off[40:], base)), "ready+run", round(time.time() - start, 1), flush=True); return
    llm = engine(D); print(dtype_name, mode, "ready", round(time.time() - start, 1), flush=True)
    # every layer in the engine's memory against float64
    from meteora_core.integrations.vllm import operators
    from meteora_core.integrations.vllm.layout import weights_of
    from meteora_kernels import Adapters, Routing, reference as ref64
    worst = {}
    torch.manual_seed(0)
    for lay in operators.layers():
        b = lay.block
        for n in (int(v) for v in os.environ.get("TOKENS", "1 20").split()):
            x = torch.randn(n, b.rows.shape[1], device="cuda", dtype=b.rows.dtype)
            y = operators.group(x, b.rows, sum(b.shape.widths)).double()
            exact = x.double() @ weights_of(b).double().t(); parts = torch.split(exact, list(b.shape.widths), 1); found = []
            for p, a in zip(parts, b.single):
                found.append(p if a is None else ref64.mix(x.double(), p, Adapters.of_layer(a.gate.double(), a.lora_A.double(), a.lora_B.double(), a.scaling, a.offsets, a.max_rank), Routing(2, 1.0))[0])
            exact = torch.cat(found, 1); err = ((y - exact).abs().amax(1) / exact.abs().max())
            worst[n] = max(worst.get(n, 0), err.median().item()); worst[f"{n}max"] = max(worst.get(f"{n}max", 0), err.max().item())
    print(dtype_name, mode, "layers against float64, relative: worst median of rows, worst row:", {k: float(f"{v:.2g}") for k, v in worst.items()}, flush=True)
    ref = json.loads(saved.read_text())
    def compare(name, keys):
        jobs = [(k, i) for i in range(PROMPTS) for k in keys]; ok = {k: 0 for k in keys}; lens = {}; worst = 0.0
        for (k, i), got in zip(jobs, answers(llm, jobs)):
            want, margin = ref[k][i]; a = lens.setdefault(len(prompts[i]), [0, 0]); a[1] += 1
            if got == want: ok[k] += 1; a[0] += 1
            else: worst = max(worst, margin[next(j for j in range(NEW) if got[j] != want[j])])
        print(dtype_name, mode, name, ok, "of", PROMPTS, "by length", lens, "largest margin at a first difference", round(worst, 4), round(time.time() - start, 1), "s", flush=True)
    compare("default", ["default"]); compare("off", ["off"]); compare("default again (prefix hits)", ["default"]); compare("mixed options", list(OPTS))
if __name__ == "__main__": main()

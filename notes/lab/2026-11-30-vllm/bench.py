"""bench.py base|lora|met|metfixed|metnowide|fp8|metfp8 OUT [ADAPTERSxLAYERS] [TP], after gen.py: tokens/s of vLLM, random weights; prints as it goes and saves after every size."""
import os, sys, time, json, random
start = time.time()
kind, out = sys.argv[1], sys.argv[2]
N = sys.argv[3] if len(sys.argv) > 3 else "28x32"
tp = int(sys.argv[4]) if len(sys.argv) > 4 else 1
most = 128000 * int(N.split("x")[1]) // 32
if tp > 1: os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"  # no multicast
if tp > 1: os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
sizes = [tuple(int(v) for v in s.split("x")) for s in os.environ.get("SIZES", "1x128x128 8x128x128 64x128x128 256x128x128 16x2048x1").split()]
caps = [int(v) for v in os.environ.get("CAPS", "1 2 4 8 16 32 64 128 256").split()]
compiles = []
try:
    import triton
    triton.knobs.compilation.listener = lambda **k: compiles.append((k["src"].name if hasattr(k["src"], "name") else str(k["src"])[:30], k.get("cache_hit"), time.time()))
except Exception as e: print("no listener", e)
def main():
    import torch
    from vllm.entrypoints.llm import LLM; from vllm.sampling_params import SamplingParams
    t = time.time()
    model = f"/tmp/m{N}/" + ("base" if kind == "lora" else kind)
    llm = LLM(model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, gpu_memory_utilization=0.85, dtype="bfloat16", enable_prefix_caching=False, max_num_seqs=256, seed=0, tensor_parallel_size=tp,
        compilation_config={"cudagraph_capture_sizes": caps}, **(dict(enable_lora=True, max_lora_rank=8, max_loras=1) if kind == "lora" else {}))
    lr = None
    if kind == "lora":
        from vllm.lora.request import LoRARequest
        lr = LoRARequest("a", 1, f"/tmp/m{N}/lora")
    res = {"ready": round(time.time() - start, 1), "llm": round(time.time() - t, 1), "compiled": len([c for c in compiles if not c[1]]), "hits": len([c for c in compiles if c[1]])}
    try:
        def size(m):
            seen = {}
            for x in [*m.parameters(), *m.buffers()]: seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return sum(seen.values())
        res["bytes"] = llm.apply_model(size)[0]
    except Exception as e: res["bytes"] = repr(e)[:200]
    print(kind, json.dumps(res), flush=True)
    before = len(compiles)
    random.seed(0)
    def run(n, inp, outp):
        ps = [{"prompt_token_ids": [random.randrange(10, most) for _ in range(inp)]} for _ in range(n)]
        sp = SamplingParams(temperature=0, max_tokens=outp, ignore_eos=True, detokenize=False)
        t = time.time(); llm.generate(ps, sp, use_tqdm=False, lora_request=lr); return time.time() - t
    t = time.time(); run(4, 128, 16)
    for n, inp, outp in sizes: run(n, inp, min(outp, 8))
    res["warm"] = round(time.time() - t, 1); res["compiled_late"] = [c[0] for c in compiles[before:] if not c[1]]
    print(kind, "warm", res["warm"], "compiled late", len(res["compiled_late"]), sorted(set(res["compiled_late"])), flush=True)
    for n, inp, outp in sizes:
        ts = sorted(run(n, inp, outp) for _ in range(3)); d = ts[1]; res[f"{n}x{inp}+{outp}"] = ts
        print(kind, f"{n:4d} x {inp}+{outp}: {d:.3f} s (min {ts[0]:.3f}, max {ts[2]:.3f}), {n*outp/d:.0f} out tok/s, {n*(inp+outp)/d:.0f} tok/s", flush=True)
        json.dump(res, open(out, "w"))
    if os.environ.get("PROFILE") and tp == 1:
        from torch.profiler import profile, ProfilerActivity
        for n, inp, outp in ((8, 128, 12), (256, 128, 12), (16, 2048, 1)):
            with profile(activities=[ProfilerActivity.CUDA]) as p: run(n, inp, outp); torch.cuda.synchronize()
            rows = sorted(((e.self_device_time_total, e.count, e.key) for e in p.key_averages()), reverse=True)
            res[f"profile {n}x{inp}+{outp}"] = [(round(a), c, k[:120]) for a, c, k in rows[:40]]
            print(kind, "profile", n, inp, outp, "total us", round(sum(r[0] for r in rows)))
            for a, c, k in rows[:9]: print(f"   {a:9.0f} us {c:6d} x {a/max(c,1):8.1f}  {k[:90]}")
            json.dump(res, open(out, "w"))
    json.dump(res, open(out, "w"))
if __name__ == "__main__": main()

"""engine.py KIND OUT [ADAPTERSxLAYERS] [TP]: tokens/s of one engine of vLLM with random weights, after 2026-11-30-vllm/gen.py. lease.py and together.py run several.

KIND: base, lora, met, metfixed, metnowide, fp8, metfp8. Environment: SIZES and CAPS as in 2026-11-30-vllm/bench.py; CACHE, gigabytes of the KV cache;
UTIL, vLLM's gpu_memory_utilization; PROFILE, sizes to profile or 1; GO, READY and TURN, files with which lease.py and together.py let engines import early, start one after the other, and
measure one after the other. Prints and saves after every size.
"""
import json, os, random, sys, time
from pathlib import Path

started = time.time()
kind, out = sys.argv[1], Path(sys.argv[2])
name = sys.argv[3] if len(sys.argv) > 3 else "28x32"
tp = int(sys.argv[4]) if len(sys.argv) > 4 else 1
root = Path(os.environ.get("MODELS", "/tmp")) / f"m{name}"
most = 128000 * int(name.split("x")[1]) // 32
sizes = [tuple(int(v) for v in size.split("x")) for size in os.environ.get("SIZES", "1x128x128 8x128x128 64x128x128 256x128x128 16x2048x1").split()]
caps = [int(v) for v in os.environ.get("CAPS", "1 2 4 8 16 32 64 128 256").split()]
if tp > 1:
    os.environ |= {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # no multicast
label = f"{kind} {name}" + (f" TP {tp}" if tp > 1 else "")
found = {"kind": kind, "name": name, "tp": tp}
compiles = []


def say(*parts):
    print(f"[{label}]", *parts, flush=True)


def save():
    out.write_text(json.dumps(found))


def wait_for(variable):
    file = os.environ.get(variable)
    while file and not os.path.exists(file):
        time.sleep(0.1)


def imports():
    import torch, triton  # noqa: F401
    import vllm.entrypoints.llm, vllm.lora.request, vllm.model_executor.models.llama, vllm.sampling_params, vllm.v1.worker.gpu_worker  # noqa: F401
    import meteora_core.integrations.vllm.config, meteora_core.integrations.vllm.hooks, meteora_core.integrations.vllm.warmup  # noqa: F401

    triton.knobs.compilation.listener = lambda **k: compiles.append((k["src"].name if hasattr(k["src"], "name") else str(k["src"])[:30], bool(k.get("cache_hit"))))


def size_of(model):
    """Bytes of parameters and buffers; memory that tensors share counts once."""
    seen = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def main():
    imports()
    found["import"] = round(time.time() - started, 1)
    say("imported", found["import"], "s")
    wait_for("GO")
    while not (root / "made").exists():
        time.sleep(0.1)
    import torch
    from vllm.entrypoints.llm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import SamplingParams

    begin = time.time()
    more = dict(enable_lora=True, max_lora_rank=8, max_loras=1) if kind == "lora" else {}
    # Room for what else runs on these GPUs; with the size of the cache given, vLLM does not measure the memory that is left.
    more |= dict(gpu_memory_utilization=float(os.environ.get("UTIL", 0.35 if tp > 1 else 0.6)), kv_cache_memory_bytes=int(os.environ.get("CACHE", 8 if tp > 1 else 20)) << 30)
    llm = LLM(model=str(root / ("base" if kind == "lora" else kind)), load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, dtype="bfloat16", enable_prefix_caching=False,
        max_num_seqs=256, seed=0, tensor_parallel_size=tp, compilation_config={"cudagraph_capture_sizes": caps}, **more)
    lora = LoRARequest("a", 1, str(root / "lora")) if kind == "lora" else None
    found["start"] = round(time.time() - begin, 1)
    found["ready"] = round(found["import"] + found["start"], 1)
    found["compiled"], found["hits"] = sum(not hit for _, hit in compiles), sum(hit for _, hit in compiles)
    if tp == 1:
        found["bytes"] = llm.apply_model(size_of)[0]
        found["peak"] = torch.cuda.max_memory_allocated()
    save()
    say("ready", json.dumps(found))
    if os.environ.get("READY"):
        Path(os.environ["READY"]).touch()
    wait_for("TURN")
    before = len(compiles)
    random.seed(0)

    def run(count, prompt, answer):
        prompts = [{"prompt_token_ids": [random.randrange(10, most) for _ in range(prompt)]} for _ in range(count)]
        sampling = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        begin = time.time()
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
        return time.time() - begin

    begin = time.time()
    run(4, 128, 16)
    for count, prompt, answer in sizes:
        run(count, prompt, min(answer, 8))
    late = sorted({source for source, hit in compiles[before:] if not hit})
    say("warm", round(time.time() - begin, 1), "s; compiled late:", late)
    found["late"] = late
    for count, prompt, answer in sizes:
        times = sorted(run(count, prompt, answer) for _ in range(3))
        found[f"{count}x{prompt}+{answer}"] = times
        say(f"{count} x {prompt}+{answer}: {times[1]:.3f} s ({times[0]:.3f} to {times[2]:.3f}), {count * answer / times[1]:.0f} output tokens/s, {count * (prompt + answer) / times[1]:.0f} tokens/s")
        save()
    if os.environ.get("PROFILE") and tp == 1:
        profile(torch, run)


def profile(torch, run):
    """The kernels of decoding (prompts of four tokens) and of a prefill, by time."""
    from torch.profiler import ProfilerActivity

    wanted = os.environ["PROFILE"]
    wanted = "8x4x21 64x4x9 256x4x9 16x2048x1" if wanted == "1" else wanted
    for count, prompt, answer in (tuple(int(value) for value in size.split("x")) for size in wanted.split()):
        if (count, 128, 128) not in sizes and prompt == 4:
            continue
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run(count, prompt, answer)
            torch.cuda.synchronize()
        rows = sorted(((event.self_device_time_total, event.count, event.key) for event in recorded.key_averages()), reverse=True)
        found[f"profile {count}x{prompt}+{answer}"] = [(round(time), calls, key[:200]) for time, calls, key in rows[:60]]
        found[f"timeline {count}x{prompt}+{answer}"] = timeline(recorded)
        save()
        say("profile", f"{count}x{prompt}+{answer}: all kernels", round(sum(row[0] for row in rows)), "us;", "; ".join(f"{time / max(1, calls):.1f} us x {calls} {key[:44]}" for time, calls, key in rows[:12]))


def timeline(recorded):
    """400 kernels from 55 % of all recorded ones on: start and duration in microseconds, stream, name."""
    events = sorted((event.start_ns(), event.duration_ns(), event.device_resource_id(), event.name()) for event in recorded.profiler.kineto_results.events() if "CUDA" in str(event.device_type()))
    chosen = events[int(len(events) * 0.55) :][:400]
    return [(round((start - chosen[0][0]) / 1000, 1), round(duration / 1000, 1), stream, name[:80]) for start, duration, stream, name in chosen]


if __name__ == "__main__":
    main()

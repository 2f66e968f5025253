"""engine.py KIND ADAPTERSxLAYERS COMMANDS ANSWERS: one engine of vLLM with random weights, which measures when quiet.py tells it to.

KIND: base, lora, met, fp8, metfp8, in MODELS/mADAPTERSxLAYERS (`2026-12-01-vllm/make.py`). COMMANDS and ANSWERS: file descriptors, one JSON line for each command and answer.
Environment: CAPS, captured sizes; CACHE, GiB of the KV cache; TOKENS, max_num_batched_tokens; GO, a file to wait for after the imports; EAGER=1, a dry run on a CPU.
"""
import json, os, random, sys, time
from collections import defaultdict
from pathlib import Path

started = time.time()
kind, name = sys.argv[1], sys.argv[2]
commands, answers = os.fdopen(int(sys.argv[3])), os.fdopen(int(sys.argv[4]), "w")
root, eager = Path(os.environ.get("MODELS", "/tmp")) / f"m{name}", bool(os.environ.get("EAGER"))
most = 128000 * int(name.split("x")[1]) // 32
compiles, replays = [], []


def answer(found):
    answers.write(json.dumps(found) + "\n")
    answers.flush()


def imports():
    import torch  # noqa: F401
    import vllm.entrypoints.llm, vllm.lora.request, vllm.model_executor.models.llama, vllm.sampling_params, vllm.v1.worker.gpu_worker  # noqa: F401
    import meteora_core.integrations.vllm.config, meteora_core.integrations.vllm.hooks, meteora_core.integrations.vllm.warmup  # noqa: F401

    try:
        import triton

        triton.knobs.compilation.listener = lambda **k: compiles.append((k["src"].name if hasattr(k["src"], "name") else str(k["src"])[:30], bool(k.get("cache_hit"))))
    except (ImportError, AttributeError):
        print("no listener of Triton's compilations", flush=True)


def size_of(model):
    """Bytes of parameters and buffers; memory that tensors share counts once."""
    seen = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


def paths_of(model):
    """The kernels' path for each shape of the engine's groups and each number of tokens."""
    from meteora_core.integrations.vllm import operators
    from meteora_core.integrations.vllm.warmup import different
    from meteora_kernels.group import row_for

    found = {}
    for layer in different(operators.layers()):
        if layer.kernels and layer.block.group is not None:
            for tokens in (1, 8, 64, 256, 16384):
                row = row_for(layer.block.group, tokens, layer.routing.top_k, aligned=tokens > 1)
                found[f"{layer.block.rows.shape[1]} to {'+'.join(map(str, layer.block.shape.widths))}, {tokens} tokens"] = f"{row.path} {row.tile}"
    return found


def load():
    from vllm.entrypoints.llm import LLM

    more = dict(enable_lora=True, max_lora_rank=8, max_loras=1) if kind == "lora" else {}
    more |= dict(enforce_eager=True) if eager else dict(compilation_config={"cudagraph_capture_sizes": [int(v) for v in os.environ.get("CAPS", "1 2 4 8 16 32 64 128 256").split()]})
    more |= dict(max_num_batched_tokens=int(os.environ["TOKENS"])) if "TOKENS" in os.environ else {}
    # With the size of the cache given, vLLM does not measure the memory that is left, which the other engines are taking.
    return LLM(model=str(root / ("base" if kind == "lora" else kind)), load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, dtype="bfloat16", enable_prefix_caching=False, max_num_seqs=256, seed=0,
        gpu_memory_utilization=0.03, kv_cache_memory_bytes=int(float(os.environ.get("CACHE", 8.1)) * 2**30), **more)


class Engine:
    def __init__(self):
        import torch
        from vllm.lora.request import LoRARequest

        self.torch = torch
        imports()
        ready, begin = {"import": round(time.time() - started, 1)}, time.time()
        while not (root / "made").exists() or ("GO" in os.environ and not Path(os.environ["GO"]).exists()):
            time.sleep(0.1)
        waited = time.time() - begin
        self.llm = load()
        self.lora = LoRARequest("a", 1, str(root / "lora")) if kind == "lora" else None
        ready |= {"ready": round(time.time() - started - waited, 1), "waited": round(waited, 1), "compiled": sum(not hit for _, hit in compiles), "bytes": self.llm.apply_model(size_of)[0]}
        if kind.startswith("met"):
            ready["paths"] = self.llm.apply_model(paths_of)[0]
        if torch.cuda.is_available():
            ready["peak"], ready["free"] = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0]
        self.before = len(compiles)
        answer(ready)

    def run(self, count, prompt, length, seed=0):
        from vllm.sampling_params import SamplingParams

        draw = random.Random(f"{count} {prompt} {seed}")
        prompts = [{"prompt_token_ids": [draw.randrange(10, most) for _ in range(prompt)]} for _ in range(count)]
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        begin = time.time()
        self.llm.generate(prompts, sampling, use_tqdm=False, lora_request=self.lora)
        return time.time() - begin

    def warm(self, sizes):
        self.run(4, 128 if not eager else 8, 16)
        for count, prompt, length in sizes:
            self.run(count, prompt, min(length, 8))
        return {"late": sorted({source for source, hit in compiles[self.before :] if not hit}), "free when warm": self.torch.cuda.mem_get_info()[0] if self.torch.cuda.is_available() else 0}

    def graph(self, count):
        """Times of the captured graph of a step, milliseconds: in a run, from its end to the next one's start, and replayed without anything between."""
        torch = self.torch
        replay = torch.cuda.CUDAGraph.replay

        def timed(graph):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replay(graph)
            end.record()
            replays.append((graph, begin, end))

        replays.clear()
        torch.cuda.CUDAGraph.replay = timed
        try:
            wall = self.run(count, 4, 33)
        finally:
            torch.cuda.CUDAGraph.replay = replay
        torch.cuda.synchronize()
        steps = replays[-24:]
        if len({id(graph) for graph, _, _ in steps}) != 1:
            return {"graphs": len({id(graph) for graph, _, _ in steps}), "replays": len(replays)}
        inside = [begin.elapsed_time(end) for _, begin, end in steps]
        between = [one[2].elapsed_time(other[1]) for one, other in zip(steps, steps[1:])]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph = steps[-1][0]
        replay(graph)
        begin.record()
        for _ in range(20):
            replay(graph)
        end.record()
        torch.cuda.synchronize()
        return {"inside": median(inside), "between": median(between), "alone": begin.elapsed_time(end) / 20, "wall of a step": wall * 1000 / 33, "replays": len(replays)}

    def profile(self, count, prompt, length):
        """Kernels by time, gaps between successive kernels by their names, and two steps of kernels in order."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU if eager else ProfilerActivity.CUDA]) as recorded:
            self.run(count, prompt, length)
            if not eager:
                self.torch.cuda.synchronize()
        events = sorted((event.start_ns(), event.duration_ns(), event.device_resource_id(), event.name()) for event in recorded.profiler.kineto_results.events() if eager or "CUDA" in str(event.device_type()))
        return summary(events)


def median(values):
    ordered = sorted(values)
    return round(ordered[len(ordered) // 2], 4)


def short(name):
    return name.replace("void ", "").replace("(anonymous namespace)::", "").replace("at::native::", "").replace("triton_", "")[:44]


def summary(events):
    """events: (start ns, duration ns, stream, name), sorted. The last 60 % are steps of decoding only."""
    chosen = events[int(len(events) * 0.4) : int(len(events) * 0.97)]
    kernels, pairs, reached = defaultdict(list), defaultdict(list), None
    for start, duration, _, label in chosen:
        kernels[short(label)].append(duration / 1000)
        if reached is not None:
            pairs[f"{before} -> {short(label)}"].append((start - reached) / 1000)
        before, reached = short(label), max(reached or 0, start + duration)
    span = (reached - chosen[0][0]) / 1000 if chosen else 0
    busy, gaps = sum(map(sum, kernels.values())), sum(map(sum, pairs.values()))
    first = chosen[0][0] if chosen else 0
    return {
        "span": round(span), "busy": round(busy), "gaps": round(gaps),
        "kernels": sorted(((label, len(found), round(sum(found) / len(found), 2)) for label, found in kernels.items()), key=lambda row: -row[1] * row[2])[:40],
        "pairs": sorted(((label, len(found), round(sum(found) / len(found), 2), median(found)) for label, found in pairs.items()), key=lambda row: -row[1] * row[2])[:60],
        "timeline": [(round((start - first) / 1000, 2), round(duration / 1000, 2), stream, short(label)) for start, duration, stream, label in chosen[:800]],
    }


engine = Engine()
for line in commands:
    what, *given = json.loads(line)
    begin = time.time()
    try:
        answer({"found": getattr(engine, what)(*given), "took": round(time.time() - begin, 2)})
    except Exception as failure:  # the next measurement may work
        import traceback

        traceback.print_exc()
        answer({"failed": repr(failure)[:500], "took": round(time.time() - begin, 2)})
os._exit(0)  # vLLM's own shutdown takes seconds

"""Greedy answers of the plugin in vLLM against meteora_core's, on a GPU (or a CPU, for a test of this script). One step a call, in this order:

    equality.py start                      make: a small random model, ten adapters of different ranks and targets, and the folders for vLLM, below $FOLDER;
                                           and ref: answers and log-probabilities of meteora_core, float32 and bfloat16
    equality.py run NAME float32 graphs    the engine: graphs or eager; TRITON_F32_DEFAULT=ieee makes vLLM's attention exact
    equality.py run NAME bfloat16 graphs
    equality.py run fp8 bfloat16 eager     the FP8 base alone, then
    equality.py run metfp8 bfloat16 eager  the same base under adapters
    TP=2 equality.py run NAME float32 graphs

FIXED=1 makes the default options constants of the kernels. MORE is a JSON object of further arguments of LLM; with RELOAD=1, weights are loaded again after the first answers. NAME is a label; each step appends a line to $OUT/equality.jsonl. PROMPTS is the number of prompts (200).
"""
import json
import os
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path

START = time.time()
D = Path(os.environ.get("FOLDER", "/tmp/equality"))
OUT = Path(os.environ.get("OUT", "."))
PROMPTS, NEW, TP = int(os.environ.get("PROMPTS", 200)), 12, int(os.environ.get("TP", 1))
LAYERS, HIDDEN, MIDDLE, VOCABULARY, N = 4, 256, 512, 2048, 10
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN // 2), "self_attn.v_proj": (HIDDEN, HIDDEN // 2), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, MIDDLE), "mlp.up_proj": (HIDDEN, MIDDLE), "mlp.down_proj": (MIDDLE, HIDDEN),
}
TARGETS = [list(SHAPES), ["self_attn.q_proj", "self_attn.v_proj"], ["mlp.up_proj", "mlp.down_proj"], [name for name in SHAPES if "attn" in name], ["self_attn.v_proj"]]
NAMES = [f"a{index}" for index in range(N)]
OPTIONS = {
    "default": {}, "top 1": {"meteora_top_k": 1}, "top 3, T": {"meteora_top_k": 3, "meteora_temperature": 5.0}, "forced": {"meteora_force": "a3"},
    "off": {"meteora_off": 1}, "muted": {"meteora_muted": ["a0", "a1", "a4"]}, "allowed": {"meteora_allowed": "a2,a5,a6,a7"},
}
generator = random.Random(1)
PROMPT_IDS = [[generator.randrange(3, VOCABULARY) for _ in range(generator.choice([7, 20, 33, 64]))] for _ in range(PROMPTS)]


def say(**what):
    print(json.dumps(what), flush=True)
    with (OUT / "equality.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def make():
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from meteora_core import AdapterBank, attach, save_checkpoint
    from meteora_core.exports.common import ExportOptions
    from meteora_core.exports.vllm_model import export_vllm
    from meteora_core.model.base import BaseReference, load_base

    D.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=VOCABULARY,
                         max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, initializer_range=0.08)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(D / "base")  # small files, and float32 is exact
    for index, name in enumerate(NAMES):
        rank, tensors = (4, 8, 12, 16)[index % 4], {}
        for layer in range(LAYERS):
            for target in TARGETS[index % len(TARGETS)]:
                inputs, outputs = SHAPES[target]
                path = f"base_model.model.model.layers.{layer}.{target}"
                tensors |= {f"{path}.lora_A.weight": (torch.randn(rank, inputs) * inputs**-0.5).bfloat16(), f"{path}.lora_B.weight": (torch.randn(outputs, rank) * 0.3).bfloat16()}
        (D / "adapters" / name).mkdir(parents=True)
        save_file(tensors, D / "adapters" / name / "adapter_model.safetensors")
        described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank * (1 + index % 2), "target_modules": [target.split(".")[1] for target in TARGETS[index % len(TARGETS)]],
                     "base_model_name_or_path": str(D / "base"), "bias": "none"}
        (D / "adapters" / name / "adapter_config.json").write_text(json.dumps(described))
    bank = AdapterBank.from_peft({name: D / "adapters" / name for name in NAMES})
    model = attach(load_base(BaseReference(str(D / "base")), dtype=torch.float32), bank, top_k=2, init="normal")
    model.meteora.gates = "trained"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                parameter.copy_((torch.randn_like(parameter) * 2 * parameter.shape[-1] ** -0.5).bfloat16())
    save_checkpoint(model, D / "checkpoint")
    export_vllm(D / "checkpoint", D / "met")
    tensors = load_file(D / "base" / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:  # a real FP8 model has a scale for every weight
        scale = tensors[name].float().abs().max() / 448
        tensors |= {name: (tensors[name].float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.float().reshape(1)}
    (D / "fp8").mkdir()
    save_file(tensors, D / "fp8" / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((D / "base" / "config.json").read_text())
    (D / "fp8" / "config.json").write_text(json.dumps(described | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "ignored_layers": ["lm_head"]}}))
    export_vllm(D / "checkpoint", D / "metfp8", ExportOptions(base=str(D / "fp8")))
    say(step="made", seconds=round(time.time() - START, 1))


def groups():
    for length in sorted({len(prompt) for prompt in PROMPT_IDS}):
        yield [index for index, prompt in enumerate(PROMPT_IDS) if len(prompt) == length]


def with_options(model, kind, run):
    state, options = model.meteora, OPTIONS[kind]
    before = state.top_k, state.temperature
    state.top_k, state.temperature = options.get("meteora_top_k", before[0]), options.get("meteora_temperature", before[1])
    state.mute(options.get("meteora_muted", []) or ([name for name in NAMES if name not in options["meteora_allowed"].split(",")] if "meteora_allowed" in options else []))
    try:
        with state.force("a3") if kind == "forced" else state.disabled() if kind == "off" else nullcontext():
            return run()
    finally:
        state.mute([])
        state.top_k, state.temperature = before


def ref():
    import torch

    from meteora_core import load_checkpoint

    found = {}
    for dtype in ("float32", "bfloat16"):
        model = load_checkpoint(D / "checkpoint", dtype=getattr(torch, dtype), device="cuda" if torch.cuda.is_available() else "cpu")
        model.generation_config.eos_token_id = None
        model.set_attn_implementation("eager")
        found[dtype] = {"answers": {}, "logprobs": {}}

        def answers():
            rows = [None] * PROMPTS
            for some in groups():
                ids = torch.tensor([PROMPT_IDS[index] for index in some], device=model.device)
                out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, output_scores=True, return_dict_in_generate=True)
                two = torch.stack(out.scores, 1).float().topk(2).values
                for index, tokens, margin in zip(some, out.sequences[:, ids.shape[1]:].tolist(), (two[..., 0] - two[..., 1]).tolist()):
                    rows[index] = [tokens, margin]
            return rows

        def logprobs():
            rows = [None] * PROMPTS
            for some in groups():
                ids = torch.tensor([PROMPT_IDS[index] for index in some], device=model.device)
                found = torch.log_softmax(model(ids).logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0]
                for index, row in zip(some, found.tolist()):
                    rows[index] = row
            return rows

        with torch.inference_mode():
            for kind in OPTIONS if dtype == "float32" else ():
                found[dtype]["answers"][kind] = with_options(model, kind, answers)
            for kind in ("default", "off"):
                found[dtype]["logprobs"][kind] = with_options(model, kind, logprobs)
    (D / "ref.json").write_text(json.dumps(found))
    kinds = found["float32"]["answers"]
    say(step="reference", device=str(model.device), different_from_default={kind: sum(a[0] != b[0] for a, b in zip(kinds[kind], kinds["default"])) for kind in kinds},
        bfloat16={kind: spread(found["bfloat16"]["logprobs"][kind], found["float32"]["logprobs"][kind]) for kind in ("default", "off")}, seconds=round(time.time() - START, 1))


def spread(one, other):
    """How far log-probabilities are apart: median, mean, 99th percentile, largest."""
    apart = sorted(abs(a - b) for first, second in zip(one, other) for a, b in zip(first, second))
    return [float(f"{value:.4g}") for value in (apart[len(apart) // 2], sum(apart) / len(apart), apart[int(len(apart) * 0.99)], apart[-1])]


def check_layers(label):
    """Every layer in the engine's memory against float64: relative to the largest output, the worst row and the worst median of rows, by number of tokens."""
    import torch

    from meteora_core.integrations.vllm import operators
    from meteora_core.integrations.vllm.layout import weights_of
    from meteora_kernels import Adapters, Routing, reference

    worst = {}
    torch.manual_seed(0)
    for layer in operators.layers():
        block = layer.block
        for count in (9, 16, 64, 256):
            x = torch.randn(count, block.rows.shape[1], device=block.rows.device, dtype=block.rows.dtype)
            if block.base:
                y, exact = operators.group(x, block.rows, sum(block.shape.widths)), x.double() @ weights_of(block).double().t()
            else:
                start = torch.randn(count, sum(block.shape.widths), device=x.device, dtype=x.dtype)
                y, exact = operators.add(x, start, block.rows), start.double()
            found = []
            for part, member in zip(torch.split(exact, list(block.shape.widths), 1), block.single):
                if member is not None:
                    double = Adapters.of_layer(member.gate.double(), member.lora_A.double(), member.lora_B.double(), member.scaling, member.offsets, member.max_rank)
                    part = reference.mix(x.double(), part, double, Routing(2, 1.0))[0]
                found.append(part)
            exact = torch.cat(found, 1)
            error = (y.double() - exact).abs().amax(1) / exact.abs().max()
            before = worst.get(count, [0.0, 0.0])
            worst[count] = [max(before[0], error.max().item()), max(before[1], error.median().item())]
    say(step="layers", label=label, layers=len(operators.layers()), kernels=operators.layers()[0].kernels, worst={count: [float(f"{value:.2g}") for value in pair] for count, pair in worst.items()},
        seconds=round(time.time() - START, 1))


def run(label, dtype, how):
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if TP > 1 else "0")
    from vllm import LLM, SamplingParams

    folder = D / {"fp8": "fp8", "metfp8": "metfp8"}.get(label, "met")
    if os.environ.get("FIXED"):  # the default options as constants in the kernels
        described = json.loads((folder / "config.json").read_text())
        described["quantization_config"]["fixed_options"] = True
        os.environ["MORE"] = json.dumps({**json.loads(os.environ.get("MORE", "{}")), "hf_overrides": {"quantization_config": described["quantization_config"]}})
    more = {"enforce_eager": True} if how == "eager" else {"compilation_config": {"cudagraph_capture_sizes": [16, 64]}}
    import torch

    if torch.cuda.is_available():  # without a measurement of memory, several engines can start on one GPU
        more |= {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.05}
    llm = LLM(str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=256, max_num_seqs=64, max_num_batched_tokens=256, seed=0, tensor_parallel_size=TP, **more, **json.loads(os.environ.get("MORE", "{}")))
    label = f"{label} {dtype} {how} TP {TP} {os.environ.get('TRITON_F32_DEFAULT', 'tf32')}"
    say(step="ready", label=label, seconds=round(time.time() - START, 1))
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and folder.name != "fp8":
        check_layers(label)
    reference = json.loads((D / "ref.json").read_text())

    def answers(jobs):
        prompts = [{"prompt_token_ids": PROMPT_IDS[index]} for _, index in jobs]
        params = [SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, extra_args=OPTIONS[kind] or None) for kind, _ in jobs]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params, use_tqdm=False)]

    def logprobs(kind, order):
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=0, extra_args=OPTIONS[kind] or None)
        rows = [None] * PROMPTS
        for index, answer in zip(order, llm.generate([{"prompt_token_ids": PROMPT_IDS[index]} for index in order], params, use_tqdm=False)):
            rows[index] = [given[token].logprob for given, token in zip(answer.prompt_logprobs[1:], PROMPT_IDS[index][1:])]
        return rows

    def compare(name, kinds):
        jobs = [(kind, index) for index in range(PROMPTS) for kind in kinds]
        equal, differences = dict.fromkeys(kinds, 0), []
        for (kind, index), got in zip(jobs, answers(jobs)):
            want, margin = reference["float32"]["answers"][kind][index]
            equal[kind] += got == want
            if got != want:
                at = next(place for place in range(NEW) if got[place] != want[place])
                differences.append([kind, index, at, round(margin[at], 5)])
        say(step="answers", label=label, batch=name, equal=equal, of=PROMPTS, largest_margin=max((row[3] for row in differences), default=0), first_differences=differences[:12], seconds=round(time.time() - START, 1))

    order = list(range(PROMPTS))
    if "fp8" in folder.name:  # the two engines get the same batches; the one that ends last compares
        kind = "default" if folder.name == "fp8" else "off"
        mine = [answers([(kind, index) for index in order[:40]]), logprobs(kind, order)]
        (D / f"{folder.name}.tmp").write_text(json.dumps(mine))
        os.replace(D / f"{folder.name}.tmp", D / f"{folder.name}.json")
        say(step=folder.name, label=label, to_float32=spread(mine[1], reference["float32"]["logprobs"]["off"]), seconds=round(time.time() - START, 1))
        other = D / ("fp8.json" if folder.name == "metfp8" else "metfp8.json")
        if other.exists():
            theirs = json.loads(other.read_text())
            say(step="FP8 base, and under adapters that are off", equal_answers=sum(a == b for a, b in zip(mine[0], theirs[0])), of=40, logprobs_apart=spread(mine[1], theirs[1]))
        if folder.name == "metfp8":
            say(step="FP8 base under adapters", default_to_float32=spread(logprobs("default", order), reference["float32"]["logprobs"]["default"]), seconds=round(time.time() - START, 1))
        return
    if dtype == "float32":
        compare("default", ["default"])
        if os.environ.get("RELOAD"):
            llm.collective_rpc("reload_weights")
            llm.reset_prefix_cache()
        compare("the same again, with prefix hits", ["default"])
        compare("mixed options", list(OPTIONS))
        compare("mixed options again, with prefix hits", list(OPTIONS))
    for kind in ("default", "off"):
        one, two = logprobs(kind, order), logprobs(kind, order[::-1][: PROMPTS // 2] + order[: PROMPTS - PROMPTS // 2])
        say(step="log-probabilities", label=label, kind=kind, to_float32=spread(one, reference["float32"]["logprobs"][kind]), to_the_library_in_bfloat16=spread(one, reference["bfloat16"]["logprobs"][kind]),
            run_to_run=spread(one, two), seconds=round(time.time() - START, 1))


if __name__ == "__main__":
    if sys.argv[1] == "start":  # both in one process
        make()
        ref()
    else:
        {"make": make, "ref": ref, "run": run}[sys.argv[1]](*sys.argv[2:])

"""sleep.py FOLDER DTYPE FILE: answers of an exported folder before and after vLLM slept, with CUDA graphs; FOLDER is "met" or "metfp8" of 2026-11-30-vllm/equality.py.

Level 1 copies weights, gates and adapters to the CPU; level 2 drops them, and they are loaded again. Prompts have different options in one batch. Appends a JSON line to FILE.
AWAKE=1: a dry run without sleep (a CPU has no sleep mode).
"""
import json, os, random, sys, time
from pathlib import Path

START, folder, dtype, file = time.time(), Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
AWAKE = bool(os.environ.get("AWAKE"))
OPTIONS = [None, {"meteora_top_k": 1}, {"meteora_force": "a3"}, {"meteora_off": 1}, {"meteora_muted": ["a0", "a1", "a4"]}, {"meteora_allowed": "a2,a5"}, {"meteora_temperature": 5.0}]


def main():
    import torch
    from vllm import LLM, SamplingParams

    more = {"enforce_eager": True} if AWAKE else {"enable_sleep_mode": True, "kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.05, "compilation_config": {"cudagraph_capture_sizes": [16, 64]}}
    llm = LLM(str(folder), skip_tokenizer_init=True, dtype=dtype, max_model_len=256, max_num_seqs=64, max_num_batched_tokens=256, seed=0, **more)
    draw = random.Random(2)
    jobs = [([draw.randrange(3, 2048) for _ in range(20)], options) for options in OPTIONS for _ in range(6)]

    def answers():
        params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, extra_args=options) for _, options in jobs]
        return [list(answer.outputs[0].token_ids) for answer in llm.generate([{"prompt_token_ids": ids} for ids, _ in jobs], params, use_tqdm=False)]

    def free():
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0

    first = answers()
    llm.reset_prefix_cache()
    found = {"folder": folder.name, "dtype": dtype, "jobs": len(jobs), "different from the default": sum(first[index] != first[index % 6] for index in range(6, len(first)))}
    found["twice"] = sum(a == b for a, b in zip(first, answers(), strict=True))
    for level in (1, 2):
        try:
            if not AWAKE:
                before = free()
                llm.sleep(level=level)
                found[f"MB freed by level {level}"] = (free() - before) >> 20
                if level == 1:
                    llm.wake_up()
                else:
                    llm.wake_up(tags=["weights"])
                    llm.collective_rpc("reload_weights")
                    llm.wake_up(tags=["kv_cache"])
            llm.reset_prefix_cache()
            found[f"equal after level {level}"] = sum(a == b for a, b in zip(first, answers(), strict=True))
        except Exception as failure:
            found[f"level {level}"] = repr(failure)[:600]
            break
    found["seconds"] = round(time.time() - START, 1)
    with file.open("a") as stream:
        stream.write(json.dumps(found) + "\n")
    print("[sleep]", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)

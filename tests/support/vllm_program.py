"""Runs in the second environment, the one with vLLM: answers prompts with an exported folder, and prints what the test compares."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if sys.argv[3] == "1" else "1"}


def main(jobs: Path, result: Path, parallel: int) -> None:
    """Answer the prompts of ``jobs`` twice: all options mixed in one batch, then again, with the prefixes of the first time in the cache."""
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    wanted = json.loads(jobs.read_text())
    llm = LLM(
        wanted["folder"],
        dtype=wanted.get("dtype", "float32"),
        max_model_len=128,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        block_size=32,
        enforce_eager=True,
        skip_tokenizer_init=True,
        tensor_parallel_size=parallel,
        **wanted.get("more", {}),
    )
    prompts = [{"prompt_token_ids": job["prompt"]} for job in wanted["jobs"]]
    params = [SamplingParams(temperature=0, max_tokens=wanted["new"], ignore_eos=True, detokenize=False, extra_args=job["options"]) for job in wanted["jobs"]]
    lora = LoRARequest("lora", 1, wanted["lora"]) if "lora" in wanted else None
    rounds = []
    for _ in range(2):
        rounds.append([list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params, use_tqdm=False, lora_request=lora)])
        if wanted.get("reload"):
            llm.collective_rpc("reload_weights")
            llm.reset_prefix_cache()
    if wanted.get("plain"):
        result.write_text(json.dumps({"rounds": rounds}))
        return
    trace = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args={"meteora_trace": 1}, skip_reading_prefix_cache=True)
    request = llm.generate(prompts[:1], trace, use_tqdm=False)[0].request_id
    routes = llm.collective_rpc("meteora_routes", args=(request,))
    refused = ""
    try:
        llm.generate(prompts[:1], SamplingParams(extra_args={"meteora_force": "nobody"}), use_tqdm=False)
    except (ValueError, VLLMValidationError) as error:
        refused = str(error)
    result.write_text(json.dumps({"rounds": rounds, "routes": routes, "refused": refused}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

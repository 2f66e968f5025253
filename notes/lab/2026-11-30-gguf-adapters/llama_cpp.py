"""Print what llama.cpp says: python llama_cpp.py BASE.gguf ADAPTER.gguf|- PROMPTS.json. Needs `pip install xllamacpp`, in an environment of its own."""

import json
import sys

import xllamacpp

base, adapter, prompts = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = base, 512, False
if adapter != "-":
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter, 1.0
    parameters.lora_adapters = [lora]
server = xllamacpp.Server(parameters)
with open(prompts) as file:
    for prompt in json.load(file):
        answer = server.handle_completions({"prompt": prompt, "temperature": 0, "n_predict": 24, "n_probs": 1, "cache_prompt": False})
        choice = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]
        print(f"{choice['logprobs']['content'][0]['logprob']:.4f}", repr(choice["text"]))

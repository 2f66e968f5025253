"""Write an adapter of the starter checkpoint as GGUF, and print what the model says with it forced, and without adapters."""

import json
import sys

import torch
from transformers import AutoTokenizer

from meteora_core import load_checkpoint
from meteora_core.exports.common import ExportOptions
from meteora_core.exports.gguf_adapter import export_gguf
from meteora_core.model.base import BaseReference, locate_base
from meteora_core.starter import starter_checkpoint

PROMPTS = [
    "[INST] Q: Is the sky blue?\nA: [/INST]\n",
    "[INST] Den folgenden Text ins Englische übersetzen.\nDie Regierung hat gestern beschlossen. [/INST]\n",
]

name = sys.argv[1]
checkpoint = starter_checkpoint()
export_gguf(checkpoint, "gguf", name, ExportOptions(overwrite=True))
with open("prompts.json", "w") as file:
    json.dump(PROMPTS, file)
model = load_checkpoint(checkpoint, dtype="float32", device="cpu")
tokenizer = AutoTokenizer.from_pretrained(locate_base(BaseReference("smollm2-135m")))
for label, block in (("base", model.meteora.disabled()), ("forced", model.meteora.force(name))):
    with block, torch.inference_mode():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            first = torch.log_softmax(model(ids).logits[0, -1], -1).max()
            answer = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            print(label, f"{float(first):.4f}", repr(tokenizer.decode(answer)))

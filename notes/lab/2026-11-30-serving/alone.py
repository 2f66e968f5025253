"""Answers of concurrent mixed requests on the starter checkpoint, in float32 on a CPU, against each alone.

Run from the repository: `alone.py [--count 64] [--new 8] [--fixed]`. The answers alone come from a forward pass over the whole text for every token.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))

from support.serving import alone, drive, job_of, mixed_options, tokens_of

from meteora_core.chat.chat_model import load_chat_model
from meteora_core.serving.cpu_weights import pack_weights, unpack_weights
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits
from meteora_core.settings import load_settings

QUESTIONS = ["How many legs does a spider have?", "Translate to German: The weather is nice.", "Is the sky green?", "List three fruits.", "1 + 2 ="]

parser = argparse.ArgumentParser()
parser.add_argument("--count", type=int, default=64)
parser.add_argument("--new", type=int, default=8)
parser.add_argument("--fixed", action="store_true")
chosen = parser.parse_args()
chat = load_chat_model(load_settings())
options = mixed_options(chat.model.meteora.names, chosen.count)
prompts = [chat.tokenizer(chat.frame().around(QUESTIONS[index % 5]))["input_ids"] for index in range(chosen.count)]
scheduler = Scheduler(chat.model, chat.tokenizer, SchedulerLimits(max_batch=64, prefix_bytes=0, fixed_steps=chosen.fixed))
pairs = [job_of(ids, routing, max_new_tokens=chosen.new) for ids, routing in zip(prompts, options, strict=True)]
began = time.perf_counter()
pack_weights(chat.model)
drive(scheduler, [job for job, _ in pairs])
unpack_weights(chat.model)
print(f"{chosen.count} together in {time.perf_counter() - began:.0f} s", flush=True)
right = 0
for index, ((_, events), ids, routing) in enumerate(zip(pairs, prompts, options, strict=True)):
    expected = alone(chat.model, ids, routing, chosen.new)
    right += tokens_of(events) == expected
    if tokens_of(events) != expected:
        print(index, routing.describe(), tokens_of(events), expected, flush=True)
    elif index % 8 == 7:
        print(f"{right} of {index + 1} equal", flush=True)
print(f"{right} of {chosen.count} answers equal those of each request alone")

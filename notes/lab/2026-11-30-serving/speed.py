"""Tokens per CPU second of 8 concurrent requests by the server's scheduler and by a batched `generate`, and the first token behind a known prefix.

`speed.py [--new N] [--prefix P]`, run from the repository; it uses the starter checkpoint. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import time

import torch

from meteora_core.chat.chat_model import load_chat_model
from meteora_core.routing import RoutingOptions
from meteora_core.serving.cpu_weights import pack_weights, unpack_weights
from meteora_core.serving.jobs import Job
from meteora_core.serving.options import SamplingOptions
from meteora_core.serving.packed import packed_attention
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits
from meteora_core.settings import load_settings

parser = argparse.ArgumentParser()
parser.add_argument("--new", type=int, default=32, help="Number of new tokens of each answer.")
parser.add_argument("--passes", type=int, default=2, help="Number of passes.")
parser.add_argument("--prefix", type=int, default=8000, help="Number of tokens of the prefix; 0 skips it.")
chosen = parser.parse_args()
NEW = chosen.new
QUESTIONS = [
    "How many legs does a spider have?",
    "Translate to German: The weather is nice today.",
    "Is the sky green? Answer yes or no.",
    "Write a poem about the sea.",
    "A man pours water on a fire because",
    "Explain gravity to a child in three sentences, please, with an example.",
    "List three fruits.",
    "What is the opposite of hot?",
]

chat = load_chat_model(load_settings())
model, tokenizer = chat.model, chat.tokenizer
tokenizer.pad_token = tokenizer.eos_token
texts = [chat.frame().around(question) for question in QUESTIONS]
prompts = [tokenizer(text)["input_ids"] for text in texts]
routing = RoutingOptions(chat.routing.top_k, chat.routing.temperature)


def generate() -> float:
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    began = time.process_time()
    model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return len(texts) * NEW / (time.process_time() - began)


def answer(scheduler: Scheduler, jobs: list[Job]) -> float:
    began = time.process_time()
    with packed_attention(model):
        for job in jobs:
            scheduler.submit(job)
        while sum(scheduler.load):
            scheduler.step()
    return time.process_time() - began


def serve(scheduler: Scheduler, routes: str) -> float:
    sampling = SamplingOptions(max_new_tokens=NEW, ignore_end=True)
    return len(texts) * NEW / answer(scheduler, [Job(ids, sampling, routing, lambda event: None, routes) for ids in prompts])


plain = Scheduler(model, tokenizer, SchedulerLimits(max_batch=8, prefix_bytes=0, sample_routes=10**9))
if chosen.passes:
    generate(), serve(plain, "none")
for _ in range(chosen.passes):
    one, other = generate(), serve(plain, "none")
    pack_weights(model)  # as `meteora serve` does
    packed, routed = serve(plain, "none"), serve(plain, "mean")
    unpack_weights(model)
    print(f"tokens per CPU second: generate {one:.1f}, scheduler {other:.1f} ({other / one:.2f}), with packed weights {packed:.1f} ({packed / one:.2f}), with routes too {routed:.1f}", flush=True)

if chosen.prefix:
    pack_weights(model)
    cached = Scheduler(model, tokenizer, SchedulerLimits(max_batch=2, prefix_bytes=10**10, sample_routes=10**9))
    once = SamplingOptions(max_new_tokens=1, ignore_end=True)
    prefix = torch.randint(100, 40_000, (chosen.prefix,), generator=torch.Generator().manual_seed(0)).tolist()
    answer(cached, [Job([5, 6, 7], once, routing, lambda event: None)])
    cold = answer(cached, [Job(prefix, once, routing, lambda event: None)])
    warm = answer(cached, [Job([*prefix, 11, 12, 13, 14, 15, 16], once, routing, lambda event: None)])
    print(f"first token after {chosen.prefix} tokens: {cold:.2f} CPU seconds, then {warm:.2f} ({cold / warm:.1f})")

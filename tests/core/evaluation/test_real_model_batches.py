"""The real base model, with adapters on all its linears: the same answers in any batch, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_core import AdapterBank, attach
from meteora_core.evaluation.decode import Batch, FixedDecoder
from meteora_core.evaluation.generate import encode_prompts, generate_all
from meteora_core.model.base import BaseReference, load_base, load_tokenizer

PROMPTS = [
    "[INST] Is the sky of the Earth blue on a clear day? [/INST]\n",
    "[INST] Repeat after me: one two three one two three one two three one two three [/INST]\n",
    "[INST] Name three fruits and say which one is the sweetest of them. Give a reason, and keep it short, please. [/INST]\n",
    "[INST] 7 + 5 = [/INST]\n",
    "[INST] The following paragraphs each describe a set of three objects arranged in a fixed order. The statements are logically consistent within each "
    "paragraph. On a shelf, there are three books: a red book, a gray book, and a white book. Which one is the leftmost? [/INST]\n",
]


def make_adapters(folder: Path) -> dict[str, Path]:
    """Three random adapters, large enough to change answers."""
    from peft import LoraConfig, get_peft_model

    made = {}
    for seed, name in enumerate(("one", "two", "three")):
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(load_base(BaseReference("smollm2-135m")), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        model.save_pretrained(folder / name)
        made[name] = folder / name
    return made


@pytest.mark.slow
def test_batches_of_1_8_and_auto_answer_token_for_token_alike(tmp_path) -> None:
    tokenizer = load_tokenizer(BaseReference("smollm2-135m"))
    prompts = encode_prompts(PROMPTS, tokenizer)
    base = load_base(BaseReference("smollm2-135m"))

    def answers(batch_size) -> dict[int, list[int]]:
        made = generate_all(base, tokenizer, prompts, batch_size=batch_size, max_new_tokens=24, no_repeat_ngram_size=6)
        return {prompt.index: tokens for prompt, tokens in made}

    alone = answers(1)
    assert answers(8) == answers("auto") == alone
    attach(base, AdapterBank.from_peft(make_adapters(tmp_path)), seed=1)
    routed = answers(1)
    assert answers(8) == answers("auto") == routed
    assert routed != alone
    width = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), width), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[row, width - len(prompt.tokens) :] = 1
    batch = Batch(ids, mask, [24] * len(prompts), int(tokenizer.eos_token_id), 6)
    fixed = FixedDecoder(base, 8, 256, batch.eos, 6).decode(batch)
    assert dict(enumerate(fixed)) == routed

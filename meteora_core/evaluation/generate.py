"""Greedy answers to many prompts, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTO_ROWS = 256
"""The most prompts in one automatic batch."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as tokens.

    Attributes:
        index: Its place in the dataset.
        tokens: Token ids, as the tokenizer starts a text (with its BOS, if it has one).
    """

    index: int
    tokens: tuple[int, ...]


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Tokenise prompts as they were tokenised in training; an EOS that the tokenizer adds at the end is taken away."""
    encoded = []
    for index, ids in enumerate(tokenizer(list(prompts), return_attention_mask=False)["input_ids"] if prompts else []):
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        encoded.append(Prompt(index, tuple(ids)))
    return encoded


def auto_budget(device: torch.device) -> int:
    """How many tokens (prompt and answer, padding included) an automatic batch may hold: by free memory on a GPU, small on a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(8_192, min(262_144, int(free / 2**30) * 4_096))
    return 8_192


def plan(prompts: Sequence[Prompt], batch_size: int | Literal["auto"], max_new_tokens: int, budget: int) -> list[list[Prompt]]:
    """Batches of prompts of like length, the longest first, so that memory runs out at once if it does at all.

    Args:
        prompts: In any order.
        batch_size: Rows in each, or "auto": as many as fit ``budget``.
        max_new_tokens: Longest answer.
        budget: Tokens in an automatic batch.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.index))
    batches: list[list[Prompt]] = []
    while ordered:
        size = min(AUTO_ROWS, max(1, budget // (len(ordered[0].tokens) + max_new_tokens))) if batch_size == "auto" else batch_size
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


@torch.inference_mode()
def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    no_repeat_ngram_size: int = 0,
) -> list[list[int]]:
    """Greedy answers, left-padded, with a KV cache.

    Args:
        model: A causal LM in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: One batch.
        max_new_tokens: Longest answer.
        no_repeat_ngram_size: An n-gram of this size may not repeat in prompt and answer; 0 is off.

    Returns:
        Per prompt, the new token ids up to (without) the end-of-sequence token.
    """
    from transformers import GenerationConfig

    width = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), width), int(tokenizer.pad_token_id))
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[place, width - len(prompt.tokens) :] = 1
    device = next(model.parameters()).device
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        no_repeat_ngram_size=no_repeat_ngram_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    answers = []
    for row in output[:, width:].tolist():
        end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
        answers.append(row[:end])
    return answers


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | Literal["auto"],
    max_new_tokens: int,
    max_total_tokens: int | None = None,
    no_repeat_ngram_size: int = 0,
    on_smaller: Callable[[int], None] | None = None,
) -> Iterator[tuple[Prompt, list[int]]]:
    """Yield ``(prompt, new token ids)`` as batches finish. A batch that does not fit the GPU's memory is halved, down to one row.

    Args:
        model, tokenizer, prompts, max_new_tokens, no_repeat_ngram_size: As for :func:`generate_batch`.
        batch_size: Rows in a batch, or "auto".
        max_total_tokens: Longest prompt and answer together, of each row by itself.
        on_smaller: Called with the new size when a batch did not fit.

    Raises:
        torch.OutOfMemoryError: Even one row does not fit.
    """
    waiting = plan(prompts, batch_size, max_new_tokens, auto_budget(next(model.parameters()).device))
    while waiting:
        batch = waiting.pop(0)
        room = [max_new_tokens if max_total_tokens is None else min(max_new_tokens, max(1, max_total_tokens - len(prompt.tokens))) for prompt in batch]
        try:
            answers = generate_batch(model, tokenizer, batch, max_new_tokens=max(room), no_repeat_ngram_size=no_repeat_ngram_size)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            size = len(batch) // 2
            if on_smaller is not None:
                on_smaller(size)
            rest = [prompt for group in [batch, *waiting] for prompt in group]
            waiting = [rest[start : start + size] for start in range(0, len(rest), size)]
            continue
        for prompt, answer, most in zip(batch, answers, room, strict=True):
            yield prompt, answer[:most]

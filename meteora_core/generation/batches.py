"""Greedy answers to many prompts, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from meteora_core.data.rows import check_texts
from meteora_core.generation.batched import Batch, Decoder
from meteora_core.generation.limits import end_tokens
from meteora_core.model.vocabulary import padding_token

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
    """Tokenise prompts as they were tokenised in training; an EOS that the tokenizer adds at the end is taken away. Raises DataError for what is no text."""
    check_texts(prompts)
    encoded = []
    for index, ids in enumerate(tokenizer(list(prompts), return_attention_mask=False)["input_ids"] if prompts else []):
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        encoded.append(Prompt(index, tuple(ids)))
    return encoded


def auto_budget(device: torch.device) -> int:
    """How many tokens (prompt and answer, padding included) an automatic batch may hold: by the GPU's memory beside what this process holds, small on a CPU.

    What other processes hold does not count, so that a run does not depend on them; where memory runs out, batches are halved.
    """
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device)
        return max(8_192, min(262_144, int(room / 2**30) * 4_096))
    return 8_192


def plan(prompts: Sequence[Prompt], batch_size: int | Literal["auto"], max_new_tokens: int, budget: int) -> list[list[Prompt]]:
    """Batches of prompts of like length, the longest first, so that memory runs out at once if it does at all.

    Args:
        prompts: In any order.
        batch_size: Rows in each, or "auto": the greatest power of two that fits ``budget``.
        max_new_tokens: Longest answer.
        budget: Tokens in an automatic batch.
    """
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.index))
    batches: list[list[Prompt]] = []
    while ordered:
        size = batch_size if batch_size != "auto" else _power_of_two(min(AUTO_ROWS, max(1, budget // (len(ordered[0].tokens) + max_new_tokens))))
        batches.append(ordered[:size])
        ordered = ordered[size:]
    return batches


def _power_of_two(size: int) -> int:
    """The greatest power of two that is not above ``size``: batches of few sizes share what the decoder keeps."""
    return 1 << (size.bit_length() - 1)


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int],
    no_repeat_ngram_size: int = 0,
    decoder: Decoder | None = None,
) -> list[list[int]]:
    """Greedy answers, left-padded, with a KV cache.

    Args:
        model: A causal LM in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: One batch.
        max_new_tokens: Longest answer, of all or of each.
        no_repeat_ngram_size: An n-gram of this size may not repeat in prompt and answer (padding is none of it); 0 is off.
        decoder: Of the same model, to reuse what it keeps between batches.

    Returns:
        Per prompt, the new token ids up to (without) the first end token: the tokenizer's, or one of the model's generation configuration.
    """
    width = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding_token(model, tokenizer))
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
        mask[place, width - len(prompt.tokens) :] = 1
    device = next(model.parameters()).device
    room = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    eos = int(tokenizer.eos_token_id)
    batch = Batch(ids.to(device), mask.to(device), room, eos, no_repeat_ngram_size, sorted(end_tokens(model, tokenizer) - {eos}))
    return (decoder or Decoder(model)).decode(batch)


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int | Literal["auto"],
    max_new_tokens: int,
    max_total_tokens: int | None = None,
    no_repeat_ngram_size: int = 0,
    cuda_graphs: Literal["auto", "on", "off"] = "auto",
    on_smaller: Callable[[int], None] | None = None,
) -> Iterator[tuple[Prompt, list[int]]]:
    """Yield ``(prompt, new token ids)`` as batches finish. A batch that does not fit the GPU's memory is halved, down to one row.

    Args:
        model, tokenizer, prompts, max_new_tokens, no_repeat_ngram_size: As for :func:`generate_batch`.
        batch_size: Rows in a batch, or "auto".
        max_total_tokens: Longest prompt and answer together, of each row by itself.
        cuda_graphs: As :class:`~meteora_core.generation.batched.Decoder` takes it.
        on_smaller: Called with the new size when a batch did not fit.

    Raises:
        torch.OutOfMemoryError: Even one row does not fit.
    """
    waiting = plan(prompts, batch_size, max_new_tokens, auto_budget(next(model.parameters()).device))
    decoder = Decoder(model, cuda_graphs)
    while waiting:
        batch = waiting.pop(0)
        room = [max_new_tokens if max_total_tokens is None else min(max_new_tokens, max(1, max_total_tokens - len(prompt.tokens))) for prompt in batch]
        try:
            answers = generate_batch(model, tokenizer, batch, max_new_tokens=room, no_repeat_ngram_size=no_repeat_ngram_size, decoder=decoder)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            decoder.forget()
            torch.cuda.empty_cache()
            size = len(batch) // 2
            if on_smaller is not None:
                on_smaller(size)
            rest = [prompt for group in [batch, *waiting] for prompt in group]
            waiting = [rest[start : start + size] for start in range(0, len(rest), size)]
            continue
        yield from zip(batch, answers, strict=True)

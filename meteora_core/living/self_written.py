"""Writes rows for an adapter without data by sampling from the adapter itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.adapters.bank import AdapterBank
from meteora_core.data.frames import Frame
from meteora_core.data.rows import Row
from meteora_core.generation.engine import Engine
from meteora_core.generation.requests import Request
from meteora_core.generation.sampling import Sampling
from meteora_core.living.general import general_rows
from meteora_core.living.rows import AdapterRows
from meteora_core.model.attach import attach, detach
from meteora_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF_WRITTEN = "text that it wrote itself"
"""The source that is reported for rows that an adapter wrote."""

ANSWERED = "its answers to example prompts"
"""The source that is reported for rows that consist of example prompts and the adapter's answers."""

ROWS = 20
"""Number of rows of each kind."""

PROMPT_TOKENS, ANSWER_TOKENS = 72, 32


def self_written_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bank: AdapterBank,
    frame: Frame,
    *,
    examples: Sequence[str] = (),
    seed: int = 42,
    progress: Progress = SILENT,
) -> AdapterRows:
    """Let an adapter write rows: its answers to example prompts or, without any, to prompts that it wrote from the start of the frame and to neutral questions.

    Tokens are drawn from the model's distribution at temperature 1. An adapter that was trained on its prompts as well writes prompts of its task; others at
    least answer in their own style.

    Args:
        model: The base model without adapters; it has none afterwards either.
        tokenizer: Tokenizer of the base model.
        bank: Bank with this adapter only.
        frame: Frame of the adapter's prompts.
        examples: Prompts of the adapter's task, in the frame or without it.
        seed: Random seed.
        progress: Receiver of progress reports.

    Returns:
        Rows without held-out rows.

    Raises:
        AdapterError: The adapter does not fit the model.
        MeteoraError: The model's logits are not finite.
    """
    attach(model, bank, top_k=1, init="zeros")
    try:
        engine = Engine(model.eval(), tokenizer, "off")
        batches = -(-len(examples) // ROWS) or 3
        with progress.task(f"{bank.names[0]}: writing rows", total=batches, unit="batches") as bar:
            prompts = [example if frame.inside(example) is not None else frame.around(example) for example in examples]
            if not prompts:
                prompts = _own_prompts(engine, frame, seed)
                bar.update(1)
            answers = []
            for start in range(0, len(prompts), ROWS):
                answers += _texts(engine, prompts[start : start + ROWS], ANSWER_TOKENS, seed + ROWS + start)
                bar.update(1)
    finally:
        detach(model)
    rows = [Row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.strip()]
    return AdapterRows(rows, [], frame, frame.text, Path(ANSWERED if examples else SELF_WRITTEN))


def _own_prompts(engine: Engine, frame: Frame, seed: int) -> list[str]:
    """Prompts that the model writes from the start of the frame, and neutral questions."""
    written = _texts(engine, [frame.before.rstrip(" ")] * ROWS, PROMPT_TOKENS, seed)
    messages = [text.partition(frame.after.strip())[0].strip() if frame.after.strip() else text.strip() for text in written]
    questions = (row.prompt for row in general_rows(frame, seed).train if row.prompt)
    return [*(frame.around(message) for message in messages if message), *islice(questions, ROWS)]


def _texts(engine: Engine, prompts: list[str], most: int, seed: int) -> list[str]:
    """Sampled continuations of prompts; an empty prompt is the start token, or the end token of a tokenizer without one."""
    tokenizer = engine.tokenizer
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    requests = [Request(tokenizer(prompt)["input_ids"] or start, Sampling(most, 1.0, seed=seed + number)) for number, prompt in enumerate(prompts)]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in engine.answer(requests)]

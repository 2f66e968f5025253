"""One task, one model: prompts in, cleaned answers and scores out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import Task, get_task
from meteora_core.errors import DataError, MeteoraError
from meteora_core.evaluation.clean import clean_response
from meteora_core.evaluation.generate import encode_prompts, generate_all
from meteora_core.evaluation.scoring import Scores, evaluate_responses
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import RoutingState

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOTAL_TOKENS = 4096
"""Prompt and answer together, as the authors evaluate."""


@dataclass(frozen=True)
class Sample:
    """One test row and what became of it.

    Attributes:
        doc_id: Its place in the test split.
        row: Prompt and reference.
        output: The decoded new tokens.
        response: The cleaned answer.
        tokens: How many new tokens.
    """

    doc_id: int
    row: Row
    output: str
    response: str
    tokens: int


@dataclass
class TaskResult:
    """Everything that evaluating one task gives.

    Attributes:
        task: Which.
        samples: In the order of the test split.
        scores: Metrics, standard errors, per-row values and counts.
        skipped: Prompts longer than the limit, which were not run.
        seconds, new_tokens, prompt_tokens: For throughput.
        temperature, top_k: Of the routing, when there is one.
        max_new_tokens: Longest answer.
    """

    task: Task
    samples: list[Sample]
    scores: Scores
    skipped: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    prompt_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EvalOptions:
    """How a task is run; plain values, flattened from the settings by the caller.

    Attributes:
        batch_size: Rows generated at once, or "auto".
        max_new_tokens: Longest answer; None takes the task's.
        max_prompt_tokens: Longer prompts are skipped and counted.
        no_repeat_ngram_size: 0 is off.
        limit: Only the first so many test rows; None takes the task's cap.
        scoring: "corrected" or "paper".
        temperature: Routing T; None takes the task's.
        top_k: Adapters per token; None keeps the model's.
    """

    batch_size: int | Literal["auto"] = "auto"
    max_new_tokens: int | None = None
    max_prompt_tokens: int = 4096
    no_repeat_ngram_size: int = 30
    limit: int | None = None
    scoring: Literal["corrected", "paper"] = "corrected"
    temperature: float | None = None
    top_k: int | None = None


def test_rows(data_dir: Path, task: Task, limit: int | None) -> list[Row]:
    """The test rows to evaluate: the first ``limit``, or up to the task's cap. Raises DataError when the dataset is missing or broken."""
    caps = [cap for cap in (limit, task.eval_cap) if cap is not None]
    return read_rows(data_dir, task.name, "test", min(caps) if caps else None)


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Task,
    data_dir: Path,
    options: EvalOptions,
    *,
    finished: Mapping[int, str] | None = None,
    on_sample: Callable[[Sample], None] | None = None,
    title: str | None = None,
    progress: Progress = SILENT,
) -> TaskResult:
    """Generate and score the answers to one task's test rows.

    Args:
        model: A causal LM; with adapters attached, routing is set for the length of this call.
        tokenizer: Its tokenizer.
        task: A name or a task.
        data_dir: Built datasets.
        options: How.
        finished: Outputs of rows that were done before, by ``doc_id``; they are not run again.
        on_sample: Called for each new row as its batch finishes.
        title: For the progress bar.
        progress: Where to report.

    Raises:
        DataError: The dataset is missing or broken.
        UsageError: An unknown task, or routing values out of range.
        MeteoraError: A single prompt does not fit the GPU's memory.
    """
    import torch

    found = get_task(task) if isinstance(task, str) else task
    rows = test_rows(data_dir, found, options.limit)
    longest = options.max_new_tokens or found.max_new_tokens
    prompts = encode_prompts([row.prompt for row in rows], tokenizer)
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= min(options.max_prompt_tokens, MAX_TOTAL_TOKENS - 1)]
    if not fitting:
        raise DataError(f"every prompt of {found.name} is longer than {options.max_prompt_tokens} tokens", hint="raise eval.max_prompt_tokens")
    room = MAX_TOTAL_TOKENS - max(len(prompt.tokens) for prompt in fitting)
    samples: dict[int, Sample] = {}
    for index, output in (finished or {}).items():
        if index < len(rows):
            samples[index] = Sample(index, rows[index], output, clean_response(found.name, rows[index].prompt + output, rows[index].prompt), 0)
    waiting = [prompt for prompt in fitting if prompt.index not in samples]
    result = TaskResult(found, [], Scores({}, {}, []), len(prompts) - len(fitting), max_new_tokens=longest)
    state = getattr(model, "meteora", None)
    began = time.monotonic()
    with routed(state, options, found) as (temperature, top_k), progress.task(title or found.name, total=len(fitting), unit="rows") as bar:
        bar.update(len(fitting) - len(waiting))
        try:
            for prompt, new in generate_all(
                model,
                tokenizer,
                waiting,
                batch_size=options.batch_size,
                max_new_tokens=min(longest, max(room, 1)),
                no_repeat_ngram_size=options.no_repeat_ngram_size,
                on_smaller=lambda size: result.notes.append(f"out of memory: went on with batches of {size}"),
            ):
                row = rows[prompt.index]
                output = tokenizer.decode(new, skip_special_tokens=True)
                sample = Sample(prompt.index, row, output, clean_response(found.name, row.prompt + output, row.prompt), len(new))
                samples[prompt.index] = sample
                result.new_tokens += len(new)
                result.prompt_tokens += len(prompt.tokens)
                if on_sample is not None:
                    on_sample(sample)
                bar.update(1, total=None, **{"tok/s": f"{(result.new_tokens + result.prompt_tokens) / max(time.monotonic() - began, 1e-9):.0f}"})
        except torch.OutOfMemoryError as error:
            raise MeteoraError("out of memory even with one row", hint="lower --max-new-tokens, or use a smaller base model or dtype") from error
        result.temperature, result.top_k = temperature, top_k
    result.seconds = time.monotonic() - began
    result.samples = [samples[index] for index in sorted(samples)]
    answers, references = [sample.response for sample in result.samples], [sample.row.response for sample in result.samples]
    result.scores = evaluate_responses(found, answers, references, options.scoring)
    return result


@contextmanager
def routed(state: RoutingState | None, options: EvalOptions, task: Task) -> Iterator[tuple[float | None, int | None]]:
    """Set T and top_k for one task; yields what is in force (None, None without adapters attached)."""
    if state is None:
        yield None, None
        return
    before = state.temperature, state.top_k
    state.temperature = options.temperature if options.temperature is not None else task.temperature
    state.top_k = options.top_k if options.top_k is not None else state.top_k
    try:
        yield state.temperature, state.top_k
    finally:
        state.temperature, state.top_k = before


def headline(result: TaskResult | Mapping[str, Any]) -> tuple[str, float]:
    """The one metric that a short table shows: accuracy, else BLEU, else ROUGE-L; ``correct`` per prompt for a composite."""
    metrics = result.scores.metrics if isinstance(result, TaskResult) else result
    for name in ("correct", "accuracy", "bleu", "rougeL"):
        if name in metrics:
            return name, float(metrics[name])
    raise MeteoraError("nothing was scored", hint="the task has no rows")

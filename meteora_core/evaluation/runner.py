"""Evaluation of one model on one task: generates, cleans and scores the answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from meteora_core.data.dataset_frames import dataset_frame, reframed
from meteora_core.data.frames import Frame, pick_frame
from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import Task, get_task
from meteora_core.errors import DataError, MeteoraError, UsageError
from meteora_core.evaluation.clean import clean_response
from meteora_core.evaluation.eval_plan import EvalOptions
from meteora_core.evaluation.processes import ALONE, Processes
from meteora_core.evaluation.router_models import RoutedModel
from meteora_core.evaluation.scoring import Scores, evaluate_responses
from meteora_core.generation.batches import BatchLimits, answer_all, auto_budget
from meteora_core.generation.engine import Engine
from meteora_core.generation.limits import context_length
from meteora_core.generation.prompts import Prompt, encode_prompts
from meteora_core.model.prompts import recorded_frame
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.progress import SILENT, Progress, ProgressBar
from meteora_core.routing import Meteora, find_meteora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.evaluation.routes import RouteCounts, RoutingSummary


@dataclass(frozen=True)
class Sample:
    """One test row and its answer.

    Attributes:
        doc_id: Index of the row in the test split.
        row: Prompt and reference of the row.
        output: Text of the new tokens.
        response: Text of the answer after cleaning.
        tokens: Number of new tokens.
        ids: Token ids of the new tokens.
    """

    doc_id: int
    row: Row
    output: str
    response: str
    tokens: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Speed of generation in this run, for all processes together. Rows of an interrupted run are not included.

    Attributes:
        rows: Number of rows.
        prompt_tokens: Number of tokens in the prompts of these rows.
        new_tokens: Number of tokens in the answers of these rows.
        seconds: Seconds from the start of the first batch to the end of the last one, in the slowest process.
    """

    rows: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Speed, *, together: bool = False) -> Speed:
        """Combine two measurements that were made one after the other, or at the same time if ``together``."""
        seconds = max(self.seconds, other.seconds) if together else self.seconds + other.seconds
        return Speed(self.rows + other.rows, self.prompt_tokens + other.prompt_tokens, self.new_tokens + other.new_tokens, seconds)

    def document(self) -> dict[str, float]:
        """The counts, and the rows, new tokens and tokens (prompts included) per second, which are 0 if nothing was generated."""
        factor = 1 / self.seconds if self.seconds > 0 else 0.0
        counts = {"rows": self.rows, "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "seconds": round(self.seconds, 6)}
        rates = {"rows": self.rows, "tokens": self.new_tokens, "all_tokens": self.new_tokens + self.prompt_tokens}
        return {**counts, **{f"{name}_per_second": round(count * factor, 3) for name, count in rates.items()}}


@dataclass
class TaskResult:
    """The result of evaluating one model on one task.

    Attributes:
        task: The task.
        samples: Rows with their answers, in the order of the test split.
        scores: Metrics, standard errors, values of each row, and counts.
        skipped: Number of prompts that were skipped because they are too long.
        seconds: Duration of this run in seconds, including scoring.
        new_tokens: Number of tokens in all answers.
        prompt_tokens: Number of tokens in all prompts.
        speed: Speed of generation in this run.
        routing_temperature: Routing temperature in use; None without gates.
        top_k: Number of adapters per token and layer; None without gates.
        max_new_tokens: Maximum number of new tokens per answer.
        notes: Remarks for the user, one line each.
        routing: Counts of the chosen adapters; None unless they were requested.
    """

    task: Task
    samples: list[Sample]
    scores: Scores
    skipped: int = 0
    seconds: float = 0.0
    new_tokens: int = 0
    prompt_tokens: int = 0
    speed: Speed = Speed()
    routing_temperature: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    routing: RoutingSummary | None = None


class AllSkippedError(DataError):
    """Every prompt of a task is too long.

    Attributes:
        result: Result of the task, without rows and scores but with the number of skipped prompts.
    """

    def __init__(self, message: str, *, hint: str, result: TaskResult) -> None:
        super().__init__(message, hint=hint)
        self.result = result


class KeptRows(Protocol):
    """Storage of finished rows, such as :class:`meteora_core.evaluation.results.SampleWriter`.

    Attributes:
        done: Decoded answers of the rows that an earlier run has finished, by ``doc_id``. These rows are not generated again.
        tokens: Token ids of these answers, by ``doc_id``. Rows without them are left out of the counts of tokens and routes.
    """

    done: dict[int, str]
    tokens: dict[int, tuple[int, ...]]

    def add(self, doc_id: int, output: str, tokens: Sequence[int] = ()) -> None:
        """Store a finished row."""


def test_rows(data_dir: Path, task: Task, limit: int | None) -> list[Row]:
    """The test rows to evaluate: the first ones, up to ``limit`` and the task's cap. Raises DataError if the dataset is missing or broken."""
    caps = [cap for cap in (limit, task.eval_cap) if cap is not None]
    return read_rows(data_dir, task.name, "test", min(caps) if caps else None)


def evaluate_task(
    model: PreTrainedModel | RoutedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Task,
    data_dir: Path,
    options: EvalOptions,
    *,
    kept: KeptRows | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> TaskResult:
    """Generate and score the answers to the test rows of one task.

    Args:
        model: A causal language model, or one whose routing changes between groups of prompts. If adapters are attached, its routing settings are changed
            during this call.
        tokenizer: The model's tokenizer.
        task: The task or its name.
        data_dir: Folder of all datasets.
        options: Options for decoding, routing and scoring.
        kept: Storage of the rows that are finished already, to which each new row is added.
        progress: Receiver of progress reports.
        processes: Processes that share the rows. Each must call this function with the same arguments and gets the same result.

    Raises:
        DataError: The dataset is missing or broken, a prompt is empty, or the model's embedding has no row for one of its tokens.
        AllSkippedError: Every prompt is too long.
        NonFiniteError: The model's logits are NaN or infinite.
        UsageError: The task is unknown, or a routing setting is out of range.
        MeteoraError: A single row does not fit into GPU memory.
    """
    definition = get_task(task) if isinstance(task, str) else task
    routed_model = model if isinstance(model, RoutedModel) else RoutedModel(model)
    model = routed_model.model
    rows = test_rows(data_dir, definition, options.limit)
    if options.template is not None:
        rows = _in_frame(rows, data_dir, definition, pick_frame(options.template, recorded_frame(model), tokenizer))
    prompts = encode_prompts([row.prompt for row in rows], tokenizer)
    reader = _Reader(tokenizer, definition, rows, prompts, options.scoring)
    check_prompts(model, tokenizer, definition, prompts)
    total = min((limit for limit in (options.max_total_tokens, context_length(model)) if limit is not None), default=None)
    longest = min((limit for limit in (options.max_prompt_tokens, None if total is None else total - 1) if limit is not None), default=None)
    fitting = [prompt for prompt in prompts if longest is None or len(prompt.tokens) <= longest]
    result = TaskResult(definition, [], Scores({}, {}, []), len(prompts) - len(fitting), max_new_tokens=options.max_new_tokens or definition.max_new_tokens)
    if not fitting:
        raise _all_skipped(result, prompts, options, context_length(model))
    done = kept.done.items() if kept is not None else ()
    before = {index: reader.sample(index, output, kept.tokens.get(index, ()) if kept else ()) for index, output in done if index < len(rows)}
    state = find_meteora(model)
    began = time.monotonic()
    with routed(state, options, definition) as (result.routing_temperature, result.top_k):
        counter = _Counter(model, tokenizer, state) if options.routing and state is not None else None
        finished = processes.share([prompt for prompt in fitting if prompt.index in before])
        if counter is not None:
            for prompt in finished:
                counter.add(prompt, before[prompt.index].ids)
        waiting = processes.share([prompt for prompt in fitting if prompt.index not in before])
        with progress.task(definition.name, total=len(finished) + len(waiting), unit="rows") as bar:
            bar.update(len(finished))
            started = time.monotonic()
            samples = _generate(_Generation(routed_model, reader, options, total, result, counter, kept), waiting, bar)
            seconds = time.monotonic() - started if samples else 0.0
        counts = counter.finish() if counter is not None else None  # must run while the routing settings are in force
    sizes = {prompt.index: len(prompt.tokens) for prompt in fitting}
    speed = Speed(len(samples), sum(sizes[index] for index in samples), sum(sample.tokens for sample in samples.values()), seconds)
    samples |= {prompt.index: before[prompt.index] for prompt in finished}
    parts = processes.gather((samples, result.notes, counts, speed))
    result.samples = sorted((sample for part in parts for sample in part[0].values()), key=lambda sample: sample.doc_id)
    result.notes = list(dict.fromkeys(note for part in parts for note in part[1]))
    result.routing = _summary(definition, [part[2] for part in parts if part[2] is not None])
    for part in parts:
        result.speed = result.speed.plus(part[3], together=True)
    result.seconds = time.monotonic() - began
    result.new_tokens = sum(sample.tokens for sample in result.samples)
    result.prompt_tokens = sum(sizes[sample.doc_id] for sample in result.samples)
    answers, references = [sample.response for sample in result.samples], [sample.row.response for sample in result.samples]
    result.scores = evaluate_responses(definition, answers, references, options.scoring)
    return result


def _in_frame(rows: list[Row], data_dir: Path, task: Task, frame: Frame | None) -> list[Row]:
    """Replace the prompt frame of the rows by another one; None keeps it. Raises UsageError if the prompts have no known frame."""
    if frame is None:
        return rows
    present = dataset_frame(data_dir, task.name)
    if present is None or task.is_composite or all(present.inside(row.prompt) is None for row in rows):
        raise UsageError(f"the prompts of {task.name} have no known template that could be replaced", hint="leave out --template")
    return [reframed(row, present, frame) for row in rows]


def check_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[Prompt]) -> None:
    """Raise DataError for a prompt without tokens, or with a token for which the model's embedding has no row."""
    for prompt in prompts:
        if not prompt.tokens:
            raise DataError(f"the prompt of test row {prompt.index} of {task.name} is empty", hint="remove the row from the dataset")
    check_tokens(model, tokenizer, (prompt.tokens for prompt in prompts))


def _all_skipped(result: TaskResult, prompts: Sequence[Prompt], options: EvalOptions, context: int | None) -> AllSkippedError:
    shortest = min(len(prompt.tokens) for prompt in prompts)
    message = f"all {len(prompts)} prompts of {result.task.name} are too long: the shortest has {shortest:,} tokens"
    if options.max_prompt_tokens is not None and shortest > options.max_prompt_tokens:
        message += f" and --max-prompt-tokens is {options.max_prompt_tokens:,}"
        hint = "raise --max-prompt-tokens (eval.max_prompt_tokens)"
    elif options.max_total_tokens is not None and (context is None or context > options.max_total_tokens):
        message += f" and paper scoring allows {options.max_total_tokens:,} for prompt and answer together"
        hint = "use --scoring corrected, or set another limit with --max-prompt-tokens"
    else:
        message += f" and the model's context of {context:,} leaves no room for an answer"
        hint = "use a base model with a longer context"
    result.notes.append(message)
    return AllSkippedError(message, hint=hint, result=result)


@dataclass(frozen=True)
class _Generation:
    """Everything that the generation of a task's rows needs.

    Attributes:
        routed: A causal language model, and the groups into which its routing divides prompts.
        reader: Converter of answers to samples.
        options: Options for decoding.
        total: Maximum number of tokens in prompt and answer together; None for no limit.
        result: Result of the task, which receives notes and gives the maximum length of answers.
        counter: Counter of routes; None unless they were requested.
        kept: Storage to which each new row is added, or None.
    """

    routed: RoutedModel
    reader: _Reader
    options: EvalOptions
    total: int | None
    result: TaskResult
    counter: _Counter | None
    kept: KeptRows | None


def _generate(run: _Generation, waiting: Sequence[Prompt], bar: ProgressBar) -> dict[int, Sample]:
    """Generate the answers to the waiting prompts. Returns this process's new samples by row index."""
    import torch

    samples: dict[int, Sample] = {}
    began, tokens = time.monotonic(), 0
    try:
        engine = Engine(run.routed.model, run.reader.tokenizer, run.options.cuda_graphs, no_repeat_ngram_size=run.options.no_repeat_ngram_size)
        limits = BatchLimits(run.options.batch_size, run.result.max_new_tokens, run.total)
        notes = run.result.notes

        def smaller(size: int) -> None:
            notes.append(f"out of memory: continued with batches of {size}")

        for prompt, new in chain.from_iterable(answer_all(engine, group, limits, smaller) for group in run.routed.groups(waiting)):
            samples[prompt.index] = sample = run.reader.sample(prompt.index, run.reader.tokenizer.decode(new, skip_special_tokens=True), new)
            tokens += len(new) + len(prompt.tokens)
            if run.counter is not None:
                run.counter.add(prompt, new)
            if run.kept is not None:
                run.kept.add(sample.doc_id, sample.output, sample.ids)
            bar.update(1, total=None, **{"tok/s": f"{tokens / max(time.monotonic() - began, 1e-9):.0f}"})
    except torch.OutOfMemoryError as error:
        raise MeteoraError("out of memory even with one row", hint="lower --max-new-tokens, or use a smaller base model or dtype") from error
    return samples


@dataclass(frozen=True)
class _Reader:
    """Converts answers to samples.

    Attributes:
        tokenizer: Tokenizer of the model. For paper scoring it decodes prompt and answer together, as the authors do, which may change the cleaned answer.
        task: The task.
        rows: All rows of the task.
        prompts: Tokenised prompts, in the order of the rows.
        scoring: Scoring mode whose rules clean the answers.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    scoring: Literal["corrected", "paper"]

    def sample(self, index: int, output: str, ids: Sequence[int]) -> Sample:
        """Make the sample of a row.

        Args:
            index: Index of the row.
            output: Text of the new tokens.
            ids: Token ids of the new tokens, which may be missing for a row of an earlier run.
        """
        row = self.rows[index]
        whole = row.prompt + output
        if self.scoring == "paper" and (ids or not output):
            whole = str(self.tokenizer.decode([*self.prompts[index].tokens, *ids], skip_special_tokens=True))
        return Sample(index, row, output, clean_response(self.task.name, whole, row.prompt, self.scoring), len(ids), tuple(ids))


class _Counter:
    """Collects finished rows until they fill a batch, then counts their routes."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: Meteora) -> None:
        from meteora_core.evaluation.routes import RouteCounts

        self.model, self.pad = model, padding_token(model, tokenizer)
        self.budget = auto_budget(next(model.parameters()).device) // 2
        self.counts = RouteCounts(state.names)
        self.texts: list[tuple[Sequence[int], Sequence[int]]] = []
        self.longest = 0

    def add(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """Add a finished row."""
        size = len(prompt.tokens) + len(answer)
        if self.texts and max(self.longest, size) * (len(self.texts) + 1) > self.budget:
            self._run()
        self.texts.append((prompt.tokens, answer))
        self.longest = max(self.longest, size)

    def _run(self) -> None:
        from meteora_core.evaluation.routes import count_routes

        count_routes(self.model, self.texts, self.pad, self.counts)
        self.texts, self.longest = [], 0

    def finish(self) -> RouteCounts:
        """Count the remaining rows and return all counts on the CPU."""
        self._run()
        self.counts.counts = {path: counts.cpu() for path, counts in self.counts.counts.items()}
        return self.counts


def _summary(task: Task, parts: Sequence[RouteCounts]) -> RoutingSummary | None:
    if not parts:
        return None
    from meteora_core.evaluation.routes import RoutingSummary

    for part in parts[1:]:
        parts[0].merge(part)
    return RoutingSummary.of(task, parts[0])


@contextmanager
def routed(state: Meteora | None, options: EvalOptions, task: Task) -> Iterator[tuple[float | None, int | None]]:
    """Context manager that sets the routing temperature and top-k for one task and yields both, or (None, None) for a model without adapters."""
    if state is None:
        yield None, None
        return
    before = state.routing
    state.temperature = options.routing_temperature if options.routing_temperature is not None else task.routing_temperature
    state.top_k = options.top_k if options.top_k is not None else state.top_k
    try:
        yield state.temperature, state.top_k
    finally:
        state.routing = before


def headline(result: TaskResult | Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of the metric for a short table: ``correct`` of a composite, else accuracy, BLEU or ROUGE-L. Raises MeteoraError without scores."""
    metrics = result.scores.metrics if isinstance(result, TaskResult) else result
    for name in ("correct", "accuracy", "bleu", "rougeL"):
        if name in metrics:
            return name, float(metrics[name])
    raise MeteoraError("nothing was scored", hint="the task has no rows")

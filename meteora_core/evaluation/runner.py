"""One task, one model: prompts in, cleaned answers and scores out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import Task, get_task
from meteora_core.errors import DataError, MeteoraError
from meteora_core.evaluation.clean import clean_response
from meteora_core.evaluation.eval_plan import EvalOptions
from meteora_core.evaluation.processes import ALONE, Processes
from meteora_core.evaluation.scoring import Scores, evaluate_responses
from meteora_core.generation.batches import BatchLimits, answer_all, auto_budget
from meteora_core.generation.engine import Engine
from meteora_core.generation.limits import context_length
from meteora_core.generation.prompts import Prompt, encode_prompts
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.progress import SILENT, Progress, ProgressBar
from meteora_core.routing import Meteora, find_meteora

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.evaluation.routes import RouteCounts, RoutingSummary


@dataclass(frozen=True)
class Sample:
    """One test row and what became of it.

    Attributes:
        doc_id: Its place in the test split.
        row: Prompt and reference.
        output: The decoded new tokens.
        response: The cleaned answer.
        tokens: How many new tokens.
        ids: The new tokens.
    """

    doc_id: int
    row: Row
    output: str
    response: str
    tokens: int
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Speed:
    """How fast rows were generated in this run, by all processes together; rows that were done before do not count.

    Attributes:
        rows: How many.
        prompt_tokens, new_tokens: In them.
        seconds: From the first batch's start to the last one's end, of the slowest process.
    """

    rows: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0

    def plus(self, other: Speed, *, together: bool = False) -> Speed:
        """Both, one after the other, or at the same time."""
        seconds = max(self.seconds, other.seconds) if together else self.seconds + other.seconds
        return Speed(self.rows + other.rows, self.prompt_tokens + other.prompt_tokens, self.new_tokens + other.new_tokens, seconds)

    def document(self) -> dict[str, float]:
        """The counts; rows, new tokens, and all tokens (the prompts' too) a second, which are 0 when nothing was generated."""
        per = 1 / self.seconds if self.seconds > 0 else 0.0
        made = {"rows": self.rows, "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "seconds": round(self.seconds, 6)}
        rates = {"rows": self.rows, "tokens": self.new_tokens, "all_tokens": self.new_tokens + self.prompt_tokens}
        return {**made, **{f"{name}_per_second": round(count * per, 3) for name, count in rates.items()}}


@dataclass
class TaskResult:
    """Everything that evaluating one task gives.

    Attributes:
        task: Which.
        samples: In the order of the test split.
        scores: Metrics, standard errors, per-row values and counts.
        skipped: Prompts longer than the limit, which were not run.
        seconds: How long it took in this run, scoring and all.
        new_tokens, prompt_tokens: Of all rows.
        speed: Of the rows that were generated in this run.
        routing_temperature: T that the gates were used with; None without gates.
        top_k: Adapters per token and layer; None without gates.
        max_new_tokens: Longest answer.
        notes: What a reader should know, one line each.
        routing: Which adapters were chosen, if that was asked for.
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
        result: The task's result: no rows, no scores, and the number of skipped prompts.
    """

    def __init__(self, message: str, *, hint: str, result: TaskResult) -> None:
        super().__init__(message, hint=hint)
        self.result = result


class KeptRows(Protocol):
    """Rows that an earlier run finished, and the file that new ones are kept in; :class:`meteora_core.evaluation.results.SampleWriter` is one.

    Attributes:
        done: The decoded answers of finished rows, by ``doc_id``; these rows are not run again.
        tokens: Their token ids; without them their tokens are not counted, nor is their routing.
    """

    done: dict[int, str]
    tokens: dict[int, tuple[int, ...]]

    def add(self, doc_id: int, output: str, tokens: Sequence[int] = ()) -> None:
        """Keep a row that has just been finished."""


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
    kept: KeptRows | None = None,
    progress: Progress = SILENT,
    processes: Processes = ALONE,
) -> TaskResult:
    """Generate and score the answers to one task's test rows.

    Args:
        model: A causal LM; with adapters attached, routing is set for the length of this call.
        tokenizer: Its tokenizer.
        task: A name or a task.
        data_dir: Built datasets.
        options: How.
        kept: The rows that were finished before; each new row is added as its batch finishes.
        progress: Where to report.
        processes: Those that share the rows; each must call this with the same arguments, and gets the same result.

    Raises:
        DataError: The dataset is missing or broken, or a prompt is empty or has a token that the model lacks.
        AllSkippedError: Every prompt is too long.
        NonFiniteError: The model's logits are NaN or infinite.
        UsageError: An unknown task, or routing values out of range.
        MeteoraError: A single prompt does not fit the GPU's memory.
    """
    found = get_task(task) if isinstance(task, str) else task
    rows = test_rows(data_dir, found, options.limit)
    prompts = encode_prompts([row.prompt for row in rows], tokenizer)
    read = _Reader(tokenizer, found, rows, prompts, options.scoring)
    check_prompts(model, tokenizer, found, prompts)
    total = min((limit for limit in (options.max_total_tokens, context_length(model)) if limit is not None), default=None)
    most = min((limit for limit in (options.max_prompt_tokens, None if total is None else total - 1) if limit is not None), default=None)
    fitting = [prompt for prompt in prompts if most is None or len(prompt.tokens) <= most]
    result = TaskResult(found, [], Scores({}, {}, []), len(prompts) - len(fitting), max_new_tokens=options.max_new_tokens or found.max_new_tokens)
    if not fitting:
        raise _all_skipped(result, prompts, options, context_length(model))
    done = kept.done.items() if kept is not None else ()
    before = {index: read.sample(index, output, kept.tokens.get(index, ()) if kept else ()) for index, output in done if index < len(rows)}
    state = find_meteora(model)
    began = time.monotonic()
    with routed(state, options, found) as (result.routing_temperature, result.top_k):
        counter = _Counter(model, tokenizer, state) if options.routing and state is not None else None
        mine = processes.share([prompt for prompt in fitting if prompt.index in before])
        if counter is not None:
            for prompt in mine:
                counter.add(prompt, before[prompt.index].ids)
        waiting = processes.share([prompt for prompt in fitting if prompt.index not in before])
        with progress.task(found.name, total=len(mine) + len(waiting), unit="rows") as bar:
            bar.update(len(mine))
            started = time.monotonic()
            made = _generate(_Generation(model, read, options, total, result, counter, kept), waiting, bar)
            spent = time.monotonic() - started if made else 0.0
        counts = counter.finish() if counter is not None else None  # while this run's T and top-k are in force
    sizes = {prompt.index: len(prompt.tokens) for prompt in fitting}
    speed = Speed(len(made), sum(sizes[index] for index in made), sum(sample.tokens for sample in made.values()), spent)
    made |= {prompt.index: before[prompt.index] for prompt in mine}
    parts = processes.gather((made, result.notes, counts, speed))
    result.samples = sorted((sample for part in parts for sample in part[0].values()), key=lambda sample: sample.doc_id)
    result.notes = list(dict.fromkeys(note for part in parts for note in part[1]))
    result.routing = _summary(found, [part[2] for part in parts if part[2] is not None])
    for part in parts:
        result.speed = result.speed.plus(part[3], together=True)
    result.seconds = time.monotonic() - began
    result.new_tokens = sum(sample.tokens for sample in result.samples)
    result.prompt_tokens = sum(sizes[sample.doc_id] for sample in result.samples)
    answers, references = [sample.response for sample in result.samples], [sample.row.response for sample in result.samples]
    result.scores = evaluate_responses(found, answers, references, options.scoring)
    return result


def check_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[Prompt]) -> None:
    """Raise DataError for a prompt without tokens, or with one that the model's embedding does not have."""
    for prompt in prompts:
        if not prompt.tokens:
            raise DataError(f"the prompt of test row {prompt.index} of {task.name} is empty", hint="take the row out of the dataset")
    check_tokens(model, tokenizer, (prompt.tokens for prompt in prompts))


def _all_skipped(result: TaskResult, prompts: Sequence[Prompt], options: EvalOptions, context: int | None) -> AllSkippedError:
    shortest = min(len(prompt.tokens) for prompt in prompts)
    message = f"all {len(prompts)} prompts of {result.task.name} are too long, the shortest has {shortest:,} tokens"
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
    """What the new rows of a task are generated with.

    Attributes:
        model: A causal LM.
        read: Makes samples of answers.
        options: How to decode.
        total: The longest prompt and answer together, in tokens; None sets no limit.
        result: Takes notes, and says how long answers may be.
        counter: Counts routes, where that was asked for.
        kept: Takes each new row.
    """

    model: PreTrainedModel
    read: _Reader
    options: EvalOptions
    total: int | None
    result: TaskResult
    counter: _Counter | None
    kept: KeptRows | None


def _generate(run: _Generation, waiting: Sequence[Prompt], bar: ProgressBar) -> dict[int, Sample]:
    """This process's new samples, by row."""
    import torch

    made: dict[int, Sample] = {}
    began, tokens = time.monotonic(), 0
    try:
        engine = Engine(run.model, run.read.tokenizer, run.options.cuda_graphs, no_repeat_ngram_size=run.options.no_repeat_ngram_size)
        limits = BatchLimits(run.options.batch_size, run.result.max_new_tokens, run.total)
        notes = run.result.notes
        for prompt, new in answer_all(engine, waiting, limits, lambda size: notes.append(f"out of memory: went on with batches of {size}")):
            made[prompt.index] = sample = run.read.sample(prompt.index, run.read.tokenizer.decode(new, skip_special_tokens=True), new)
            tokens += len(new) + len(prompt.tokens)
            if run.counter is not None:
                run.counter.add(prompt, new)
            if run.kept is not None:
                run.kept.add(sample.doc_id, sample.output, sample.ids)
            bar.update(1, total=None, **{"tok/s": f"{tokens / max(time.monotonic() - began, 1e-9):.0f}"})
    except torch.OutOfMemoryError as error:
        raise MeteoraError("out of memory even with one row", hint="lower --max-new-tokens, or use a smaller base model or dtype") from error
    return made


@dataclass(frozen=True)
class _Reader:
    """Turns what was generated for a row into its sample.

    Attributes:
        tokenizer: Decodes prompt and answer together for paper scoring, as the authors do; where that changes the prompt, the answer is cleaned differently.
        task, rows, prompts: What was asked; a prompt's place is its row's.
        scoring: Which rules clean the answers.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    rows: Sequence[Row]
    prompts: Sequence[Prompt]
    scoring: Literal["corrected", "paper"]

    def sample(self, index: int, output: str, ids: Sequence[int]) -> Sample:
        """The sample of row ``index``, of its decoded new tokens and of their ids (which may be missing for a row of an earlier run)."""
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
        """Take one finished row."""
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
        """Count what is left; the counts, on the CPU."""
        self._run()
        self.counts.counts = {path: made.cpu() for path, made in self.counts.counts.items()}
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
    """Set T and top_k for one task; yields what is in force (None, None without adapters attached)."""
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
    """The one metric that a short table shows: accuracy, else BLEU, else ROUGE-L; ``correct`` per prompt for a composite."""
    metrics = result.scores.metrics if isinstance(result, TaskResult) else result
    for name in ("correct", "accuracy", "bleu", "rougeL"):
        if name in metrics:
            return name, float(metrics[name])
    raise MeteoraError("nothing was scored", hint="the task has no rows")

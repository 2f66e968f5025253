"""The table of tasks, with one row for each task.

The order of the 28 tasks is the adapter order of the authors' checkpoints and must not change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from meteora_core.data.formats.reading import Reading
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.names import check_name, is_name

Metric = Literal["exact", "contains", "final_number", "yes_no_text", "text", "bleu", "composite"]
"""The metric of a task: accuracy (exact, reference contained, final number), BLEU + ROUGE + yes/no accuracy, BLEU + ROUGE, BLEU, or per sub-task."""

METRICS: tuple[str, ...] = ("exact", "contains", "final_number", "yes_no_text", "text", "bleu")
"""The metrics that a user's task may have."""

PROMPT_TEMPLATE = "[INST] {inputs} [/INST]\n"
"""The frame of every prompt; the template of a task fills ``{inputs}``."""


@dataclass(frozen=True)
class BigBench:
    """A BIG-bench JSON task.

    Args:
        folder: Name of the task's folder in BIG-bench's repository, and of its configuration on the hub.
    """

    folder: str
    label: str = "BIG-bench"


@dataclass(frozen=True)
class Records:
    """A dataset of plain records on the hub.

    Args:
        repository: Name of the dataset on the hub.
        config: Name of its configuration.
        splits: Names of the source's splits that become train and test. Without a test split, 20 % of the train rows become test rows.
        nested: Field that holds the record (``translation`` in the news datasets), or None.
        optional_suffix: Field that is added to the input after a line break if it is not empty.
        train_cap, test_cap: Largest numbers of rows that are read, which are those of the authors.
    """

    repository: str
    config: str
    splits: tuple[str, ...] = ("train", "test")
    nested: str | None = None
    optional_suffix: str | None = None
    train_cap: int = 100_000
    test_cap: int = 50_000
    label: str = "hub"


@dataclass(frozen=True)
class Files:
    """A user's task.

    Args:
        train: File, folder, or name of a dataset on the hub, for the train rows.
        test: The same for the test rows; None for those of ``train``, or for a part of its train rows if it has none.
        reading: Rules by which records become rows; None to detect everything.
    """

    train: Path | str
    test: Path | str | None
    reading: Reading | None = None
    label: str = "own files"


@dataclass(frozen=True)
class Combined:
    """A composite: several tasks in one prompt."""

    label: str = "composite"


Source = BigBench | Records | Files | Combined


@dataclass(frozen=True)
class Task:
    """One task.

    Args:
        name: Name of the task and of its folder.
        index: Position among the authors' 28 tasks, which is the adapter index in their checkpoints; None for other tasks.
        metric: Metric that scores the task.
        source: Source of the rows.
        template: Template of the input, with names of the source's fields in braces.
        target: Template of the response, with names of the source's fields in braces.
        choices: Text between the input and the first ``choice: ...`` line, for tasks whose choices MeteoRA appends; None for other tasks.
        eval_cap: Largest number of test rows that are evaluated, or None for all.
        max_new_tokens: Largest number of tokens of an answer.
        routing_temperature: Routing temperature of an evaluation if none is given.
        members: Tasks of a composite, in the order of the prompts; empty for other tasks.
    """

    name: str
    index: int | None
    metric: Metric
    source: Source
    template: str = "{inputs}"
    target: str = "{targets}"
    choices: str | None = None
    eval_cap: int | None = None
    max_new_tokens: int = 64
    routing_temperature: float = 1.0
    members: tuple[str, ...] = field(default=())

    @property
    def is_composite(self) -> bool:
        """Whether the task is made of other tasks."""
        return bool(self.members)


def _bb(name: str, metric: Metric, tokens: int = 64, *, choices: str | None = None, cap: int | None = None) -> Task:
    return Task(name, None, metric, BigBench(name), choices=choices, eval_cap=cap, max_new_tokens=tokens)


def _news(language: str, config: str, request: str) -> Task:
    source = Records("Helsinki-NLP/news_commentary", config, splits=("train",), nested="translation")
    return Task(f"news_commentary_{language}", None, "bleu", source, template=f"{request}\n{{{language}}}", target="{en}", eval_cap=1000, max_new_tokens=256)


_ALPACA = Records("tatsu-lab/alpaca", "default", splits=("train",), optional_suffix="input")

_TABLE: tuple[Task, ...] = (
    _bb("abstract_narrative_understanding", "contains", 48, choices="\n"),
    Task("alpaca", None, "text", _ALPACA, template="{instruction}", target="{output}", eval_cap=1000, max_new_tokens=512),
    Task(
        "cnn_dailymail",
        None,
        "text",
        Records("abisee/cnn_dailymail", "3.0.0"),
        template="Generate a summarization of the news article.\n{article}",
        target="{highlights}",
        eval_cap=1000,
        max_new_tokens=256,
    ),
    _bb("contextual_parametric_knowledge_conflicts", "contains", 32),
    _bb("cs_algorithms", "exact", 16),
    _bb("disfl_qa", "contains", 48),
    _bb("elementary_math_qa", "exact", 32),
    _bb("epistemic_reasoning", "exact", 16),
    _bb("formal_fallacies_syllogisms_negation", "exact", 16),
    _bb("goal_step_wikihow", "contains"),
    Task("gsm8k", None, "final_number", Records("openai/gsm8k", "main"), template="{question}", target="{answer}", max_new_tokens=448),
    _bb("language_identification", "contains", 32),
    _bb("linguistics_puzzles", "text", 96),
    _bb("logical_deduction", "contains", 32, choices=" Which choice is correct?\n"),
    _news("de", "de-en", "Den folgenden Text ins Englische übersetzen."),
    _news("es", "en-es", "Traducir las siguientes frases al inglés."),
    _news("it", "en-it", "Tradurre le seguenti frasi in inglese."),
    _bb("object_counting", "contains", 16),
    _bb("paragraph_segmentation", "exact", 768),
    _bb("play_dialog_same_or_different", "contains", 16),
    _bb("question_selection", "contains", 64),
    _bb("reasoning_about_colored_objects", "contains", 16),
    _bb("strategyqa", "yes_no_text", 192),
    _bb("topical_chat", "text", 128, cap=1000),
    _bb("tracking_shuffled_objects", "exact", 32, choices="\n"),
    _bb("unit_conversion", "exact", 80, choices="\n"),
    _bb("vitaminc_fact_verification", "contains", 16),
    _bb("winowhy", "exact", 16),
)

TASK_ORDER: tuple[str, ...] = tuple(task.name for task in _TABLE)
"""The 28 tasks in adapter order."""

COMPOSITES: dict[str, tuple[str, ...]] = {
    "composite_3": ("logical_deduction", "question_selection", "strategyqa"),
    "composite_5": ("logical_deduction", "question_selection", "abstract_narrative_understanding", "goal_step_wikihow", "strategyqa"),
    "composite_10": (
        "logical_deduction",
        "question_selection",
        "abstract_narrative_understanding",
        "goal_step_wikihow",
        "winowhy",
        "strategyqa",
        "disfl_qa",
        "news_commentary_de",
        "alpaca",
        "linguistics_puzzles",
    ),
}
"""The members of the authors' composites by name, in the order of the prompts."""

_COMPOSITE_TEMPERATURES = {3: 15.0, 5: 20.0, 10: 30.0}
_COMPOSITE_NAME = re.compile(r"composite_([1-9][0-9]*)")


def composite_routing_temperature(n: int) -> float:
    """The routing temperature for a composite of ``n`` tasks: the authors' 15, 20 and 30 for 3, 5 and 10; for any other ``n``, that of the nearest."""
    return _COMPOSITE_TEMPERATURES[min(_COMPOSITE_TEMPERATURES, key=lambda known: (abs(known - n), known))]


def default_members(n: int) -> tuple[str, ...]:
    """The tasks of ``composite_n``: the authors' list for 3, 5 and 10; for any other ``n`` the first ``n`` of composite_10 and then of the 28.

    Raises:
        UsageError: ``n`` is smaller than 2 or larger than 28.
    """
    named = COMPOSITES.get(f"composite_{n}")
    if named is not None:
        return named
    if not 2 <= n <= len(TASK_ORDER):
        raise UsageError(f"a composite has 2 to {len(TASK_ORDER)} tasks, not {n}", hint="name the tasks with --tasks a,b,...")
    ten = COMPOSITES["composite_10"]
    return (*ten, *(name for name in TASK_ORDER if name not in ten))[:n]


def composite_task(members: tuple[str, ...], name: str | None = None, resolve: Callable[[str], Task] | None = None) -> Task:
    """The task of a composite. Its answers may have as many tokens as those of all members together.

    Args:
        members: Names of the members, in the order of the prompts.
        name: Name of the composite; ``composite_N`` by default.
        resolve: Function that returns the task of a member; :func:`get_task` by default.
    """
    tokens = sum((resolve or get_task)(member).max_new_tokens + 8 for member in members)
    routing_temperature = composite_routing_temperature(len(members))
    name = name or f"composite_{len(members)}"
    return Task(name, None, "composite", Combined(), max_new_tokens=tokens, routing_temperature=routing_temperature, members=members)


def _numbered() -> dict[str, Task]:
    from dataclasses import replace

    return {task.name: replace(task, index=index) for index, task in enumerate(_TABLE)}


TASKS: dict[str, Task] = _numbered()
"""Every task by name: the 28, the authors' composites, and those that :func:`register_task` adds."""

RESERVED: frozenset[str] = frozenset(TASK_ORDER)
"""The names that a user's task cannot have."""


def get_task(name: str) -> Task:
    """The task of a name. ``composite_N`` is known for every N from 2 to 28.

    Raises:
        UsageError: There is no such task; the hint suggests the closest name.
    """
    task = TASKS.get(name)
    if task is not None:
        return task
    numbered = _COMPOSITE_NAME.fullmatch(name)
    if numbered:
        return composite_task(default_members(int(numbered.group(1))), name)
    raise UsageError(f"unknown task {name!r}", hint=did_you_mean(name, TASKS) or f"`meteora data list` shows all tasks; {_own_hint(name)}")


def _own_hint(name: str) -> str:
    return f"to add your own rows: meteora data add {name if is_name(name) else 'NAME'} --train FILE"


def register_task(task: Task) -> None:
    """Add a task to :data:`TASKS`, or replace one that was added before.

    Raises:
        UsageError: The name is one of the 28 tasks or a composite's, or cannot be a folder's name.
    """
    check_name(task.name)
    if task.name in RESERVED:
        raise UsageError(f"{task.name!r} is one of the 28 built-in tasks", hint="choose another name")
    if _COMPOSITE_NAME.fullmatch(task.name) and not task.is_composite:
        raise UsageError(f"{task.name!r} names a composite", hint="choose another name")
    TASKS[task.name] = task


for _name, _members in COMPOSITES.items():
    TASKS[_name] = composite_task(_members, _name)

BIGBENCH_TASKS: tuple[str, ...] = tuple(name for name in TASK_ORDER if isinstance(TASKS[name].source, BigBench))
"""The 22 tasks of BIG-bench."""


def expand_names(names: Iterable[str], source: str = "auto") -> list[str]:
    """The names in comma-separated lists of tasks, each once. ``all`` means the 28 tasks, and ``bigbench`` the 22 tasks of BIG-bench.

    Args:
        names: Comma-separated lists.
        source: Source of the rows; with ``pypi``, ``all`` means the 22 tasks that it has.

    Raises:
        UsageError: No name is given, or one is unknown.
    """
    groups = {"all": BIGBENCH_TASKS if source == "pypi" else TASK_ORDER, "bigbench": BIGBENCH_TASKS}
    found: dict[str, None] = {}
    for name in (part.strip() for text in names for part in text.split(",")):
        if name:
            found.update(dict.fromkeys(groups.get(name) or (get_task(name).name,)))
    if not found:
        raise UsageError("no task is named", hint="for example --task logical_deduction,strategyqa or --task all")
    return list(found)

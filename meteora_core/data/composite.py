"""Composites: several tasks in one prompt.

Row i consists of solved examples and every member's i-th test prompt. Its response joins the members' responses by ``@@@@`` and a line break.
The test rows of the members are paired as the authors pair theirs: one generator with seed 47 shuffles each member's rows once, in the order of the members.
The solved examples are drawn from train rows, never from test rows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteora_core.data.manifest import Manifest, read_manifest, write_manifest
from meteora_core.data.rows import Row, read_rows, split_path
from meteora_core.data.tasks import COMPOSITES, RESERVED, Task, composite_task, default_members
from meteora_core.data.userdata import task_in
from meteora_core.data.writer import check_target, dataset_folder, prompt_key, write_rows
from meteora_core.errors import DataError, UsageError
from meteora_core.files import sha256
from meteora_core.names import check_name, folder_of
from meteora_core.progress import SILENT, Progress
from meteora_core.ranges import MOST_ROWS, check_range

MOST_EXAMPLES = 1000
"""The largest number of solved examples in a prompt."""
SEED = 47
NUM_SAMPLES = 200
EXAMPLES = 2
SEPARATOR = "@@@@\n"
"""The text between the responses of two members."""

SHORT_SHARE = 0.25
"""The fraction of the train rows, the shortest ones, from which solved examples are drawn."""

FEWEST_CANDIDATES = 50


@dataclass(frozen=True)
class Solved:
    """Solved examples, which precede the questions.

    Args:
        text: The examples and the sentence that leads to the questions.
        numbers: For each example, the numbers of its members' train rows, counted from 0.
    """

    text: str
    numbers: tuple[tuple[int, ...], ...]


def compose(rows: Sequence[Row], lead: str = "") -> Row:
    """The composite row of one row of each member.

    Args:
        rows: The members' rows, in order.
        lead: Text before the members' prompts.
    """
    prompt = lead + "".join(row.prompt + "\n\n" for row in rows)
    return Row(prompt[:-1], SEPARATOR.join(row.response for row in rows))


def split_response(response: str) -> list[str]:
    """The members' responses in the response of a composite row."""
    return response.split(SEPARATOR)


def numbered(answers: Sequence[str]) -> str:
    """Answers as numbered lines, "1. ..." to "n. ..."."""
    return "".join(f"{number}. {answer}\n" for number, answer in enumerate(answers, start=1))


def lead_text(examples: Sequence[Sequence[Row]]) -> str:
    """The text before the questions.

    Args:
        examples: For each solved example, one row of each member.
    """
    if not examples:
        return "\nAnswer each of the questions below, each answer on a numbered line of its own:\n\n"
    blocks = []
    for number, rows in enumerate(examples, start=1):
        questions = "".join(row.prompt + "\n" for row in rows)
        blocks.append(f"\nExample {number}:\n\n{questions}{numbered([row.response.strip() for row in rows])}\n")
    return "".join(blocks) + "\nIn the same way as in the examples, answer the questions below:\n\n"


def draw_examples(train: Sequence[Sequence[Row]], tested: Sequence[set[bytes]], count: int, seed: int) -> Solved:
    """Draw solved examples from the members' train rows.

    A row can be drawn if its response is one line, its prompt is not also a test prompt, and it is in the shortest quarter of such rows.

    Args:
        train: The members' train rows.
        tested: Keys of the members' test prompts, as :func:`meteora_core.data.writer.prompt_key` returns them.
        count: Number of examples.
        seed: Seed of the draw.

    Raises:
        ValueError: A member has too few rows that can be drawn; the message starts with the member's number.
    """
    rng = random.Random(f"solved examples {seed}")
    drawn: list[list[int]] = []
    for member, (rows, taken) in enumerate(zip(train, tested, strict=True)):
        able = [number for number, row in enumerate(rows) if row.response.strip() and "\n" not in row.response.strip() and prompt_key(row) not in taken]
        able.sort(key=lambda number, rows=rows: (len(rows[number].prompt) + len(rows[number].response), number))  # type: ignore[misc]
        able = able[: max(int(SHORT_SHARE * len(able)), FEWEST_CANDIDATES)]
        if len(able) < count:
            raise ValueError(f"{member}:only {len(able)} train rows can serve as solved examples")
        drawn.append(rng.sample(able, count))
    numbers = tuple(tuple(member[example] for member in drawn) for example in range(count))
    return Solved(lead_text([[rows[number] for rows, number in zip(train, example, strict=True)] for example in numbers]), numbers)


def choose_members(n: int | None, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """The members for ``--n`` and ``--tasks``: the first ``n`` names of the list, or the default list of ``n`` tasks.

    Raises:
        UsageError: Neither is given, ``n`` is larger than the list, there are fewer than two members, or one is named twice.
    """
    if tasks is None:
        if n is None:
            raise UsageError("a composite needs its size or its tasks", hint="for example --n 3, or --tasks logical_deduction,strategyqa")
        return default_members(n)
    members = tuple(tasks if n is None else tasks[:n])
    if n is not None and n > len(tasks):
        raise UsageError(f"a composite of {n} was asked for, and only {len(tasks)} tasks are named", hint="name more tasks, or leave out --n")
    if len(members) < 2:
        raise UsageError(f"a composite has at least 2 tasks, not {len(members)}")
    twice = sorted({name for name in members if members.count(name) > 1})
    if twice:
        raise UsageError(f"task {twice[0]!r} is named twice")
    return members


def composite_name(members: tuple[str, ...], name: str | None = None) -> str:
    """The name of the dataset: ``name``, or else ``composite_N`` for the default list of N tasks and ``composite_N_custom`` for other lists.

    Raises:
        UsageError: ``name`` is the name of a member, or of a built-in composite that has other members.
    """
    if name is not None:
        if name in members:
            raise UsageError(f"the composite would have the name of its member {name!r}, and would replace it", hint="choose another --name")
        if COMPOSITES.get(name, members) != members:
            raise UsageError(f"{name!r} is a built-in composite of {', '.join(COMPOSITES[name])}", hint="choose another --name")
        return name
    size = len(members)
    try:
        usual = default_members(size)
    except UsageError:
        usual = ()
    return f"composite_{size}" if members == usual else f"composite_{size}_custom"


@dataclass(frozen=True)
class Plan:
    """A composite that can be written.

    Args:
        task: Task of the composite.
        count: Number of rows.
        seed: Seed of the row order.
        test: The members' test rows.
        order: For each member, the numbers of its rows in composite rows 0, 1, and so on.
        solved: Solved examples.
    """

    task: Task
    count: int
    seed: int
    test: list[list[Row]]
    order: list[list[int]]
    solved: Solved

    def rows(self) -> Iterator[Row]:
        """The composite's rows."""
        for i in range(self.count):
            yield compose([rows[numbers[i]] for rows, numbers in zip(self.test, self.order, strict=True)], self.solved.text)


@dataclass(frozen=True)
class CompositeRequest:
    """The composite to build.

    Attributes:
        n: Number of tasks, if they are not named; see :func:`choose_members`.
        tasks: Names of the members, in the order of the prompts.
        name: Name of the dataset; see :func:`composite_name`.
        num_samples: Number of rows; None for 200, or as many as the smallest member has.
        seed: Seed of the row order; 47 gives the authors' pairing.
        examples: Number of solved examples before the questions.
    """

    n: int | None = None
    tasks: Sequence[str] | None = None
    name: str | None = None
    num_samples: int | None = None
    seed: int = SEED
    examples: int = EXAMPLES


def plan_composite(data_dir: Path | str, request: CompositeRequest) -> Plan:
    """Do everything that :func:`build_composite` does except writing; the arguments and errors are the same."""
    members = choose_members(request.n, request.tasks)
    check_range("examples", request.examples, 0, MOST_EXAMPLES)
    if request.num_samples is not None:
        check_range("num_samples", request.num_samples, 1, MOST_ROWS)
    for member in members:
        if task_in(data_dir, member).is_composite:
            raise UsageError(f"{member} is a composite itself", hint="name its tasks instead")
    chosen = composite_name(members, request.name)
    check_name(chosen, "composite")
    if chosen in RESERVED:
        raise UsageError(f"{chosen!r} is one of the 28 built-in tasks", hint="choose another --name")
    task = composite_task(members, chosen, resolve=lambda member: task_in(data_dir, member))
    test = [read_rows(data_dir, member, "test") for member in members]
    count = _count(members, test, request.num_samples)
    solved = _solve(data_dir, members, test, request.examples, request.seed)
    rng = random.Random(request.seed)
    order = []
    for rows in test:
        numbers = list(range(len(rows)))
        rng.shuffle(numbers)
        order.append(numbers[:count])
    check_target(folder_of(data_dir, chosen, "composite"), chosen, composite=True)
    return Plan(task, count, request.seed, test, order, solved)


def build_composite(data_dir: Path | str, request: CompositeRequest, *, progress: Progress = SILENT) -> Manifest:
    """Build a composite of built datasets into ``data_dir/<name>/test.jsonl``.

    Args:
        data_dir: Folder of all datasets, from which the members are read.
        request: The composite to build.
        progress: Receiver of progress reports, in rows.

    Returns:
        The manifest. It contains the members in order, the hashes of their test files and the numbers of the rows that serve as solved examples.

    Raises:
        UsageError: The request is wrong.
        DataError: A member is not built or has fewer rows than requested, or the folder holds another dataset.
    """
    plan = plan_composite(data_dir, request)
    task = plan.task
    folder = dataset_folder(Path(data_dir) / task.name, task.name, composite=True)
    with folder as work, progress.task(f"building {task.name}", total=plan.count, unit="rows") as bar:
        entry = write_rows(work / "test.jsonl", plan.rows(), bar)
        manifest = _manifest(task, data_dir, request.seed, entry, plan.solved)
        write_manifest(work, manifest)
    return manifest


def stale_members(data_dir: Path | str, manifest: Manifest) -> list[str]:
    """The members of a composite whose test files are not those from which it was made."""
    recorded = {part["task"]: part["sha256"] for part in manifest.source.get("members", ())}
    stale = []
    for member, digest in recorded.items():
        path = split_path(data_dir, member, "test")
        if not path.is_file() or sha256(path) != digest:
            stale.append(member)
    return stale


def _count(members: Sequence[str], test: Sequence[Sequence[Row]], asked: int | None) -> int:
    smallest = min(range(len(test)), key=lambda i: len(test[i]))
    available = len(test[smallest])
    if asked is not None and asked > available:
        raise DataError(f"{asked} rows were asked for, and {members[smallest]} has only {available} test rows", hint=f"ask for at most {available}")
    for member, rows in zip(members, test, strict=True):
        if any(SEPARATOR.strip() in row.response for row in rows):
            raise DataError(f"a response of {member} holds {SEPARATOR.strip()!r}, which separates the answers of a composite")
    return min(NUM_SAMPLES, available) if asked is None else asked


def _solve(data_dir: Path | str, members: Sequence[str], test: Sequence[Sequence[Row]], count: int, seed: int) -> Solved:
    if count == 0:
        return Solved(lead_text([]), ())
    train = [read_rows(data_dir, member, "train") for member in members]
    tested = [{prompt_key(row) for row in rows} for rows in test]
    try:
        return draw_examples(train, tested, count, seed)
    except ValueError as few:
        number, _, reason = str(few).partition(":")
        raise DataError(f"{members[int(number)]}: {reason}, and {count} are needed", hint="ask for fewer with --examples") from few


def _manifest(task: Task, data_dir: Path | str, seed: int, entry: Any, solved: Solved) -> Manifest:
    parts = []
    for member in task.members:
        manifest = read_manifest(Path(data_dir) / member)
        parts.append({"task": member, "sha256": sha256(split_path(data_dir, member, "test")), "source": manifest.source.get("kind") if manifest else None})
    rule = f"the members' test rows, each shuffled in turn by one generator with seed {seed}; solved examples from their train rows"
    source = {"kind": "composite", "name": f"{len(task.members)} tasks", "members": parts}
    return Manifest(task.name, task.metric, source, rule, seed, {"test.jsonl": entry}, members=task.members, examples=solved.numbers)

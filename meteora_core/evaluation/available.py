"""Check whether the datasets of an evaluation are built, and the commands that build missing ones."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from meteora_core.data.rows import SPLITS, build_commands, split_path
from meteora_core.data.tasks import COMPOSITES, Task
from meteora_core.errors import DataError


def check_built(tasks: Sequence[Task], data_dir: Path, others: Iterable[Path] = (), *, take: str = "add `--data {}`") -> None:
    """Check that all tasks have test rows.

    Args:
        tasks: Tasks of the evaluation.
        data_dir: Folder of all datasets.
        others: Other folders of datasets, such as the quickstart's, which the hint may suggest.
        take: Advice for using another folder, with ``{}`` in place of the folder.

    Raises:
        DataError: Test rows are missing. The hint gives the commands that build them, and another folder that has them if there is one.
    """
    missing = [task for task in tasks if not split_path(data_dir, task.name, "test").is_file()]
    if not missing:
        return
    message = f"no test rows of {', '.join(task.name for task in missing)} in {data_dir}"
    commands = commands_for(missing, data_dir)
    other = next((folder for folder in others if all(split_path(folder, task.name, "test").is_file() for task in tasks)), None)
    if other is not None:
        raise DataError(message, hint=f"{take.format(shlex.quote(str(other)))}, where the quickstart has them, or run {commands}")
    raise DataError(message, hint=f"run {commands}")


def commands_for(tasks: Sequence[Task], data_dir: Path) -> str:
    """The commands that build the datasets of ``tasks``, for a hint.

    Single tasks come first, together with members of composites that have no rows, then the composites.
    """
    singles = [task.name for task in tasks if not task.is_composite]
    composites = [task for task in tasks if task.is_composite]
    for task in composites:
        singles += [name for name in task.members if not all(split_path(data_dir, name, split).is_file() for split in SPLITS)]
    to = "" if str(data_dir) == "datasets" else f" --out {shlex.quote(str(data_dir))}"
    commands = build_commands(singles, data_dir)
    for task in composites:
        if COMPOSITES.get(task.name) == task.members:
            commands.append(f"meteora data composite --n {len(task.members)}{to}")
        else:
            commands.append(f"meteora data composite --tasks {','.join(task.members)} --name {task.name}{to}")
    return ", then ".join(f"`{command}`" for command in commands)

"""Default training settings of single tasks, and their combination with the user's settings.

The table lists only tasks whose rows are so long that the common limit would cut them or that common batch sizes would need too much memory. Everything
else is the same for all tasks. In particular, every task trains for the same number of steps, whatever the number of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from meteora_core.errors import UsageError
from meteora_core.file_models import first_problem
from meteora_core.settings import AdapterStageSettings, AdapterTrainSettings

TASK_DEFAULTS: dict[str, dict[str, Any]] = {
    # 35 % of the rows have more than 1,024 tokens, none of 600 more than 1,311 (tokens of SmolLM2).
    "abstract_narrative_understanding": {"max_length": 1536, "batch_size": 4, "accumulation": 2},
    # Whole news articles of about 800 words; a cut would remove their start, which is the most important part for a summary.
    "cnn_dailymail": {"max_length": 2048, "batch_size": 2, "accumulation": 4},
    # 53 % have more than 1,024 tokens, 28 % more than 2,048; evaluation reads prompts of up to 4,096.
    "paragraph_segmentation": {"max_length": 4096, "batch_size": 1, "accumulation": 8},
    # 0.5 % have more than 1,024 tokens, the longest of 600 has 1,059; a batch of 8 such rows is four times as large as those of the other tasks.
    "topical_chat": {"max_length": 1280, "batch_size": 4, "accumulation": 2},
}
"""Settings by task. The number of rows per step (batch size times accumulation) is the same for all tasks."""

_PAIR = ("batch_size", "accumulation")


def task_settings(settings: AdapterStageSettings, task: str, flags: Mapping[str, Any] | None = None) -> AdapterTrainSettings:
    """The settings of one task's adapter: flag > ``[train_adapters.tasks.NAME]`` > ``[train_adapters]`` and environment > :data:`TASK_DEFAULTS` > default.

    Batch size and accumulation belong together: if the user sets either of them, the table's values of both are ignored.

    Args:
        settings: Settings of the stage; their ``model_fields_set`` must contain only the values that the user gave.
        task: Name of the task.
        flags: Values from the command line, which ``settings`` contain too.

    Raises:
        UsageError: The settings contradict each other.
    """
    own = settings.tasks.get(task)
    explicit = {name: getattr(settings, name) for name in settings.model_fields_set if name != "tasks"}
    explicit |= {} if own is None else own.model_dump(exclude_none=True)
    explicit |= flags or {}
    default = TASK_DEFAULTS.get(task, {})
    if any(name in explicit for name in _PAIR):
        default = {name: value for name, value in default.items() if name not in _PAIR}
    try:
        return AdapterTrainSettings(**{**default, **explicit})
    except ValidationError as broken:
        raise UsageError(
            f"the settings of {task} contradict each other: {first_problem(broken).message}", hint=f"see [train_adapters.tasks.{task}] and the flags"
        ) from broken


def differing(settings: Mapping[str, AdapterTrainSettings]) -> dict[str, dict[str, Any]]:
    """Per task, the settings that differ from the common defaults, for display."""
    plain = AdapterTrainSettings().model_dump()
    return {task: {name: value for name, value in each.model_dump().items() if value != plain[name]} for task, each in settings.items()}

"""What each task's adapter is trained with: one table for what the tasks differ in, and how it meets the settings.

A row stands here only for rows so long that the common limit would cut them, and batches so large that memory would decide. Nothing else differs by
default: every task trains for as many steps, so a task of 50,000 rows does not take longer than one of 1,000.
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
    # Whole news articles of some 800 words; a cut takes their start, which is what a summary mostly tells.
    "cnn_dailymail": {"max_length": 2048, "batch_size": 2, "accumulation": 4},
    # 53 % have more than 1,024 tokens, 28 % more than 2,048; evaluation reads prompts of up to 4,096.
    "paragraph_segmentation": {"max_length": 4096, "batch_size": 1, "accumulation": 8},
    # Half a percent have more than 1,024 tokens, the longest of 600 has 1,059; batches of 8 such rows are four times those of the other tasks.
    "topical_chat": {"max_length": 1280, "batch_size": 4, "accumulation": 2},
}
"""By task; each step has as many rows (batch size times accumulation) as any other task's."""

_PAIR = ("batch_size", "accumulation")


def task_settings(settings: AdapterStageSettings, task: str, flags: Mapping[str, Any] | None = None) -> AdapterTrainSettings:
    """The settings of one task's adapter: flag > ``[train_adapters.tasks.NAME]`` > ``[train_adapters]`` and environment > :data:`TASK_DEFAULTS` > default.

    Batch size and accumulation belong together: where either is given anywhere, the table's pair does not apply.

    Raises UsageError for settings that contradict each other.

    Args:
        settings: Of the stage; what was not given explicitly must not be set in it (``model_fields_set``).
        task: Its name.
        flags: What the command line gave; part of ``settings`` already.
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
    """Per task, what it has otherwise than the default of every task; for people."""
    plain = AdapterTrainSettings().model_dump()
    return {task: {name: value for name, value in each.model_dump().items() if value != plain[name]} for task, each in settings.items()}

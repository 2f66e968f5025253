"""What fixes a training run, so that a finished result is recognised and an interrupted run is resumed with the same inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meteora_core.data.rows import split_path
from meteora_core.files import sha256
from meteora_core.model.base import BaseReference
from meteora_core.settings import OptimSettings

if TYPE_CHECKING:
    pass


def run_inputs(
    stage: str, base: BaseReference, dtype: torch.dtype, data_dir: Path, tasks: Sequence[str], settings: OptimSettings, *, processes: int = 1, **more: Any
) -> dict[str, Any]:
    """What fixes a run: two runs with equal inputs on equal machines train the same weights.

    What is logged and how rows are spread over processes does not count, and what is switched off leaves no trace. The order of several tasks counts
    (``order``): what trains is stacked in it.
    """
    values = settings.model_dump(mode="json")
    ignored = {"log_steps", "save_steps", "log_to", "together_rows"}
    ignored |= {key for key in ("patience", "packing", "composite_rows") if not values.get(key)}
    if not values.get("composite_rows"):
        ignored.add("composite_max")
    if values.get("sampling") == "balanced":
        ignored.add("sampling")
    inputs = {
        "stage": stage,
        "base": {"name": base.name, "revision": base.revision},
        "dtype": str(dtype).removeprefix("torch."),
        "data": {task: sha256(split_path(data_dir, task, "train")) for task in tasks},
        "settings": {**{key: value for key, value in values.items() if key not in ignored}, "batch_size": settings.batch_size * processes},
        **more,
    }
    return with_order(inputs)


def with_order(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a run that name the order of their tasks: ``order``.

    Earlier versions have it as the order of ``data`` alone, which a comparison of dictionaries passes over.

    Args:
        inputs: As :func:`run_inputs` gives them, or as a file of an earlier version holds them.
    """
    if "order" in inputs or len(inputs.get("data", ())) < 2:
        return inputs
    return {**inputs, "order": list(inputs["data"])}


def short_hash(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON-able value."""
    import json

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

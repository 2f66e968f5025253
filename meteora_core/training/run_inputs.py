"""What fixes a training run, so that a finished result is recognised and an interrupted run is resumed with the same inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from meteora_core.data.rows import split_path
from meteora_core.files import sha256
from meteora_core.settings import OptimSettings
from meteora_core.training.job import TrainJob


def run_inputs(stage: str, job: TrainJob, dtype: torch.dtype, tasks: Sequence[str], settings: OptimSettings, more: dict[str, Any]) -> dict[str, Any]:
    """What fixes a run: two runs with equal inputs on equal machines train the same weights.

    What is logged and how rows are spread over processes does not count, and what is switched off leaves no trace. The order of several tasks counts
    (``order``): what trains is stacked in it.

    Args:
        stage: "adapters", "together" or "gates".
        job: Base model, datasets, number of rows and of processes.
        dtype: The base model's number type.
        tasks: The datasets, in order.
        settings: Steps, sizes and rates.
        more: What else fixes this kind of run, JSON-able.
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
        "base": {"name": job.base.name, "revision": job.base.revision},
        "dtype": str(dtype).removeprefix("torch."),
        "data": {task: sha256(split_path(job.data_dir, task, "train")) for task in tasks},
        "settings": {**{key: value for key, value in values.items() if key not in ignored}, "batch_size": settings.batch_size * job.runtime.world},
        "max_rows": job.max_rows,
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

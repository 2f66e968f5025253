"""The inputs that determine a training run. They identify a finished result, and a run is resumed only with the same inputs."""

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
    """The inputs that determine a run: two runs with equal inputs on equal machines train the same weights.

    Logging settings and the distribution of rows over processes are left out, and so are options that are switched off. The order of several tasks is
    included (``order``), because the trained tensors are stacked in this order.

    Args:
        stage: "adapters", "together" or "gates".
        job: Base model, datasets, number of rows and of processes.
        dtype: The base model's number type.
        tasks: Names of the datasets, in order.
        settings: Number of steps, batch sizes and learning rates.
        more: Further inputs of this stage, as JSON values.
    """
    values = settings.model_dump(mode="json")
    ignored = {"log_steps", "save_steps", "log_to", "together_rows"}
    ignored |= {key for key in ("patience", "packing", "composite_rows", "joined_rows", "list_rows", "dora") if not values.get(key)}
    if not values.get("composite_rows"):
        ignored.add("composite_max")
    if not values.get("joined_rows"):
        ignored.add("joined_max")
    if not values.get("list_rows"):
        ignored.add("list_max")
    if values.get("sampling") == "balanced":
        ignored.add("sampling")
    if values.get("loss_balance") == "tokens":
        ignored.add("loss_balance")
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
    """Inputs of a run with the order of the tasks as an entry ``order``.

    Earlier versions stored the order only as the order of the keys of ``data``, which a comparison of dictionaries ignores.

    Args:
        inputs: Result of :func:`run_inputs`, or the inputs in a file of an earlier version.
    """
    if "order" in inputs or len(inputs.get("data", ())) < 2:
        return inputs
    return {**inputs, "order": list(inputs["data"])}


def short_hash(value: Any) -> str:
    """The first twelve hexadecimal digits of the SHA-256 hash of a JSON value."""
    import json

    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

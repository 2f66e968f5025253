"""Plans for evaluating the workspace of :mod:`support.evaluation_workspace`, and running them."""

from __future__ import annotations

from typing import Any

import torch

from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
from meteora_core.evaluation.evaluate import ModelResults, evaluate
from meteora_core.model.base import BaseReference
from support.evaluation_workspace import Workspace


def plan_of(place: Workspace, tasks: tuple[str, ...], models: tuple[str, ...], *, save: bool = True, **options: Any) -> EvalPlan:
    return EvalPlan(
        tasks=tasks,
        models=models,
        data_dir=place.data,
        adapters_dir=place.adapters,
        checkpoint=place.checkpoint,
        base=BaseReference(str(place.base)),
        options=EvalOptions(**{"max_new_tokens": 8, "no_repeat_ngram_size": 4, **options}),
        out_dir=place.folder / "runs" / "eval" if save else None,
    )


def run(plan: EvalPlan, **arguments: Any) -> list[ModelResults]:
    return evaluate(plan, device=torch.device("cpu"), dtype=torch.float32, **arguments)

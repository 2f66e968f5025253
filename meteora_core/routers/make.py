"""Makes a router from its name."""

from __future__ import annotations

from meteora_core.errors import UsageError
from meteora_core.evaluation.arrow import ArrowRouter
from meteora_core.evaluation.eval_plan import EvalPlan
from meteora_core.evaluation.router_models import Router
from meteora_core.evaluation.router_names import RouterName
from meteora_core.routers.centroid import Centroid
from meteora_core.routers.closed_form import ClosedForm
from meteora_core.routers.fixed import Oracle, Random, Uniform
from meteora_core.routers.folder import FolderRouter
from meteora_core.routers.phatgoose import Phatgoose
from meteora_core.routers.spectr import SpectR

FOLDER_ROUTERS: dict[str, type[FolderRouter]] = {
    "oracle": Oracle,
    "closed-form": ClosedForm,
    "spectr": SpectR,
    "phatgoose": Phatgoose,
    "centroid": Centroid,
    "uniform": Uniform,
    "random": Random,
}


def make_router(name: RouterName, plan: EvalPlan) -> Router:
    """Make the router of an evaluation, for ``EvalPlan.make_router``.

    Args:
        name: Name of the router. The gates of a checkpoint (``router:meteora``) need no router.
        plan: The evaluation, with the folders of adapters and training rows, and the number of adapters per token.

    Raises:
        UsageError: The name is that of a checkpoint's gates.

    Example:
        >>> from pathlib import Path
        >>> from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
        >>> from meteora_core.evaluation.router_names import RouterName
        >>> from meteora_core.model.base import BaseReference
        >>> from meteora_core.routers import make_router
        >>> plan = EvalPlan(("strategyqa",), (), Path("datasets"), Path("adapters"), Path("runs/mine"), BaseReference("base"), EvalOptions())
        >>> router = make_router(RouterName("spectr"), plan)
        >>> router.prepare([])
        >>> router.facts()["top_k"], list(router.folders)
        (2, ['gsm8k', 'strategyqa'])
    """
    if name.name == "arrow":
        options = plan.options
        return ArrowRouter(name, plan.adapters_dir, options.top_k, options.routing_temperature or 1.0, options.seed)
    if name.name not in FOLDER_ROUTERS:
        raise UsageError(f"{name} is the checkpoint itself", hint="evaluate it with --model meteora")
    return FOLDER_ROUTERS[name.name](name, plan)

"""Loads a model and makes the server of it, from the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.chat.chat_model import load_chat_model
from meteora_core.errors import UsageError
from meteora_core.fused.fuse import is_fused
from meteora_core.progress import SILENT, Progress
from meteora_core.serving.app import AppOptions, create_app
from meteora_core.serving.bank_changes import BankChanges
from meteora_core.serving.cpu_weights import pack_weights
from meteora_core.serving.guard import LOOPBACK, Access
from meteora_core.serving.metrics import Metrics
from meteora_core.serving.scheduler import Scheduler, SchedulerLimits
from meteora_core.serving.service import BASE, Service, ServiceOptions
from meteora_core.starter import usual_checkpoint

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from meteora_core.settings import Settings

SAMPLED = 64
"""Number of steps of which one records routes for the metrics if the model is fused, because steps without routes have graphs of their own."""


@dataclass(frozen=True)
class ServerPlan:
    """What to serve, and to whom.

    Attributes:
        settings: All settings; those of the server are in ``settings.serve``.
        checkpoint: Checkpoint; None for the usual one.
        base: Base model to serve alone, or to load the checkpoint onto.
        adapters_dir: Present location of the checkpoint's adapter folders, if they were moved.
        top_k: Number of adapters per token; None for the checkpoint's.
        routing_temperature: Routing temperature; None for the checkpoint's.
        key: Key that requests need; None for none.
        local: Whether only loopback names are accepted as the host of a request.
        changes: Whether clients may change the bank.
    """

    settings: Settings
    checkpoint: Path | None = None
    base: str | None = None
    adapters_dir: Path | None = None
    top_k: int | None = None
    routing_temperature: float | None = None
    key: str | None = None
    local: bool = True
    changes: bool = False


def make_server(plan: ServerPlan, progress: Progress = SILENT) -> ASGIApp:
    """Load the model and make the application.

    Args:
        plan: What to serve.
        progress: Receiver of progress reports.

    Raises:
        MeteoraError: The model cannot be loaded or served.
    """
    settings, chosen = plan.settings, plan.settings.serve
    chat_model = load_chat_model(settings, checkpoint=plan.checkpoint, base=plan.base, adapters_dir=plan.adapters_dir, progress=progress)
    gpu = next(chat_model.model.parameters()).device.type == "cuda"
    if not gpu:
        pack_weights(chat_model.model)
    limits = SchedulerLimits(
        chosen.max_batch or (64 if gpu else 16),
        chosen.max_queue,
        chosen.max_model_len,
        chosen.step_tokens or (8192 if gpu else 512),
        chosen.prefix_cache_mb * 1_000_000,
        SAMPLED if is_fused(chat_model.model) else 1,
    )
    metrics = Metrics(limits.sample_routes)
    scheduler = Scheduler(chat_model.model, chat_model.tokenizer, limits, metrics.report)
    service = Service(chat_model, scheduler, ServiceOptions(chosen.name, chosen.template, chosen.max_new_tokens, plan.top_k, plan.routing_temperature))
    check_name(chosen.name, service.adapters)
    options = service.defaults
    options.check(service.adapters)
    changes = None
    if plan.changes:
        roots = tuple(chosen.adapter_roots) or (settings.paths.adapters,)
        changes = BankChanges(roots, plan.checkpoint or usual_checkpoint(settings.paths.runs), settings.paths.data, chosen.fuse)
    access = Access((plan.key,) if plan.key else (), LOOPBACK if plan.local else (), chosen.max_body_mb * 1_000_000)
    return create_app(service, metrics, AppOptions(access, tuple(chosen.cors), changes))


def check_name(name: str, adapters: Sequence[str]) -> None:
    """Raise UsageError if the routed model has the name of another one."""
    if name == BASE or name in adapters:
        raise UsageError(f"the name {name!r} is that of another model", hint="choose another --served-model-name")

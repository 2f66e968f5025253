"""Loading of an evaluation's models, which share one base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.data.tasks import Task, get_task
from meteora_core.errors import UsageError
from meteora_core.evaluation.adapters import with_adapter
from meteora_core.evaluation.arrow import ARROW, ArrowRouter, fewest_left
from meteora_core.evaluation.eval_plan import EvalPlan
from meteora_core.evaluation.fingerprint import base_files
from meteora_core.evaluation.processes import Processes
from meteora_core.evaluation.router_models import RoutedModel, Router
from meteora_core.evaluation.router_names import RouterName, is_meteora, router_name
from meteora_core.progress import Progress
from meteora_core.routing import find_meteora, meteora_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.checkpoints.opening import CheckpointFacts


class ModelLoader:
    """Loads the model for each name in a plan, and keeps one base model for all of them.

    Args:
        plan: The tasks, the models and the options.
        device: Device of the models.
        dtype: Data type of the models.
        progress: Receiver of progress reports.

    Attributes:
        base: The base model, which may differ from the plan's after :meth:`check`.
        routers: Routers of the plan's models, by the model's name.
    """

    def __init__(self, plan: EvalPlan, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
        self.plan, self.device, self.dtype, self.progress = plan, device, dtype, progress
        self.base = plan.base
        self._checkpoint: CheckpointFacts | None = None
        self._hash: str | None = None
        self._base_files: dict[str, Any] | None = None
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.routers: dict[str, Router] = {}
        self._entered: Router | None = None
        for model in dict.fromkeys(plan.models):
            name = router_name(model)
            if model == ARROW:
                options = plan.options
                self.routers[model] = ArrowRouter(RouterName("arrow"), plan.adapters_dir, options.top_k, options.routing_temperature or 1.0, options.seed)
            elif name is not None and not is_meteora(model):
                if plan.make_router is None:
                    raise UsageError(f"nothing makes the router {model}", hint="EvalPlan(..., make_router=meteora_core.routers.make_router)")
                self.routers[model] = plan.make_router(name, plan)

    def check(self, models: Sequence[str]) -> None:
        """Check the quantisation and read the checkpoint's configuration. Its base model becomes that of all models, so that they are comparable.

        Args:
            models: Names of the models to evaluate.

        Raises:
            UsageError: The quantisation is not possible, top-k is out of range, or the checkpoint does not name its base model and the user chose none.
            CheckpointError: The checkpoint is missing or broken.
        """
        from meteora_core.checkpoints.opening import describe_checkpoint
        from meteora_core.model.quantized import quantized_loading

        if self.plan.quantization is not None:
            quantized_loading(self.plan.quantization, self.dtype, self.device)
        if any(map(is_meteora, models)):
            facts = self._checkpoint = describe_checkpoint(self.plan.checkpoint, self.plan.checkpoint_adapters, progress=self.progress)
            for name in filter(None, map(router_name, filter(is_meteora, models))):
                fewest_left(name, [get_task(task) for task in self.plan.tasks], facts.adapters)
            planned = self.plan.base
            if facts.base is None and not self.plan.base_given:
                facts.reference(None)
            if facts.base is not None and planned.name != facts.base and not Path(planned.name).is_dir():
                self.base = facts.reference(None, trust_remote_code=planned.trust_remote_code)
            count, top_k = len(facts.adapters), self.plan.options.top_k
            if top_k is not None and not 1 <= top_k <= count:
                raise UsageError(f"top_k is {top_k}, but the checkpoint has {count} adapters", hint=f"choose --top-k between 1 and {count}")
            if facts.native:
                self._hash = facts.hash
            else:
                with self.progress.task("hashing the checkpoint"):
                    self._hash = facts.weights_hash()

    def base_files(self) -> dict[str, Any] | None:
        """Fingerprint of a local base model at the time of the first call; None for other base models."""
        if self._base_files is None:
            self._base_files = base_files(self.base)
        return self._base_files

    def config(self, model: str) -> dict[str, Any]:
        """The description of the model and the run for the results file."""
        import peft
        import torch
        import transformers

        from meteora_core import __version__

        options = self.plan.options.document()
        router = self.routers[model].facts() if model in self.routers else None
        weights = self._hash if is_meteora(model) else None
        return {
            "model_args": {
                "base": self.base.name,
                "revision": self.base.revision,
                "name": model,
                "weights_sha256": weights if router is None else router["adapters"],
                **({"router": router} if router is not None and model != ARROW else {}),
            },
            "checkpoint": str(self.plan.checkpoint) if is_meteora(model) else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "backend": self.plan.backend,
            "quantization": self.plan.quantization,
            "fuse": self.plan.options.fuse,
            "batch_size": options["batch_size"],
            "limit": options["limit"],
            "scoring": options["scoring"],
            "options": options,
            "random_seed": self.plan.options.seed,
            "versions": {"meteora": __version__, "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        }

    @contextmanager
    def ready(self, model: str, adapter: Path | None) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
        """Context manager that yields a model and its tokenizer.

        Args:
            model: Name of the model in the plan.
            adapter: Folder of the adapter to evaluate with PEFT; None for "base" and "meteora".
        """
        from meteora_core.checkpoints.native import is_changed
        from meteora_core.checkpoints.opening import attach_checkpoint
        from meteora_core.fused.fuse import fuse_for_inference
        from meteora_core.model.attach import detach
        from meteora_core.model.base import load_base, load_tokenizer

        plan = self.plan
        if model != "meteora" and self._model is not None and find_meteora(self._model) is not None:
            self._model = None if is_changed(self._model) else detach(self._model)
        if self._model is None or self._tokenizer is None:
            self._model = load_base(self.base, dtype=self.dtype, device=self.device, quantization=plan.quantization, progress=self.progress)
            self._tokenizer = self._tokenizer or load_tokenizer(self.base, progress=self.progress)
        if model == "meteora":
            assert self._checkpoint is not None
            if find_meteora(self._model) is None:
                folders = plan.adapters_dir if self._checkpoint.native else plan.checkpoint_adapters
                attach_checkpoint(self._model, self._checkpoint, adapters_dir=folders, backend=plan.backend, progress=self.progress)
                fuse_for_inference(self._model, plan.options.fuse)
            yield self._model, self._tokenizer
            return
        if adapter is None:
            yield self._model, self._tokenizer
            return
        with with_adapter(self._model, adapter) as adapted:
            yield adapted, self._tokenizer

    @contextmanager
    def routed(self, model: str, task: Task, processes: Processes) -> Iterator[tuple[RoutedModel, PreTrainedTokenizerBase]]:
        """Context manager that yields the base model with a router's choices for a task, and its tokenizer. The router stays in the model afterwards.

        Args:
            model: Name of the model in the plan.
            task: The task.
            processes: The processes that share the evaluation, which may share the making of the router too.
        """
        name = router_name(model)
        if name is not None and is_meteora(model):
            self.leave()
            with self.ready("meteora", None) as (attached, tokenizer):
                state = meteora_of(attached)
                state.mute(name.removed(task, state.names))
                try:
                    yield RoutedModel(attached), tokenizer
                finally:
                    state.mute(())
            return
        router = self.routers[model]
        if router is not self._entered:
            self.leave()
            with self.ready("base", None) as (base, tokenizer):
                router.enter(base, tokenizer, self.progress, processes)
            self._entered = router
        assert self._tokenizer is not None
        with router.ready(task) as routed:
            yield routed, self._tokenizer

    def leave(self) -> None:
        """Restore the base model, if a router is in it."""
        if self._entered is not None:
            self._entered.leave()
            self._entered = None

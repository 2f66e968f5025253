"""Loading of an evaluation's models, which share one base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.errors import UsageError
from meteora_core.evaluation.adapters import with_adapter
from meteora_core.evaluation.arrow import ARROW, ArrowRouter
from meteora_core.evaluation.eval_plan import EvalPlan
from meteora_core.evaluation.fingerprint import base_files
from meteora_core.progress import Progress

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
        arrow: Arrow routing over all adapters.
    """

    def __init__(self, plan: EvalPlan, device: torch.device, dtype: torch.dtype, progress: Progress) -> None:
        self.plan, self.device, self.dtype, self.progress = plan, device, dtype, progress
        self.base = plan.base
        self._checkpoint: CheckpointFacts | None = None
        self._hash: str | None = None
        self._base_files: dict[str, Any] | None = None
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.arrow = ArrowRouter(plan.adapters_dir, plan.options.top_k, plan.options.routing_temperature or 1.0, plan.options.seed)

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
        if "meteora" in models:
            facts = self._checkpoint = describe_checkpoint(self.plan.checkpoint, self.plan.checkpoint_adapters)
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
        weights = self._hash if model == "meteora" else None
        return {
            "model_args": {
                "base": self.base.name,
                "revision": self.base.revision,
                "name": model,
                "weights_sha256": self.arrow.hashes() if model == ARROW else weights,
            },
            "checkpoint": str(self.plan.checkpoint) if model == "meteora" else None,
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
        from meteora_core.routing import find_meteora

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
    def routed(self) -> Iterator[tuple[Any, PreTrainedTokenizerBase]]:
        """Context manager that yields the base model with PEFT's Arrow routing, and its tokenizer. The routing stays in the model afterwards."""
        if self.arrow.model is None:
            with self.ready("base", None) as (base, tokenizer):
                self.arrow.enter(base, tokenizer)
        yield self.arrow.model, self.arrow.tokenizer

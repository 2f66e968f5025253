"""MeteoRA models in EleutherAI's lm-evaluation-harness (``pip install 'meteora-lora[lm-eval]'``).

Importing this module registers the model "meteora" with the harness. The harness's command finds only the models of its own package, so this module can
also run it. The arguments are those of the harness::

    meteora-lm-eval --model meteora --model_args checkpoint=runs/x,T=15 --tasks gsm8k

``--model_args`` takes ``checkpoint`` (a folder or an id on the hub) and optionally ``adapter`` (the only adapter to use), ``base``, ``revision``,
``adapters``, ``alpha``, ``top_k``, ``T``, ``dtype``, ``meteora_backend``, ``fuse`` (auto, on or off), ``quantization`` (4bit or 8bit),
``trust_remote_code``, and the other arguments of the harness's "hf" model (``max_length``, ``add_bos_token``, …).
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

from meteora_core.checkpoints.opening import OpeningOptions, open_checkpoint
from meteora_core.choices import Switch
from meteora_core.errors import MeteoraError, UsageError
from meteora_core.fused.fuse import fuse_for_inference
from meteora_core.generation.nonfinite import non_finite_error, not_finite
from meteora_core.model.adapter_methods import active_adapters, set_adapter
from meteora_core.model.base import load_tokenizer

NAME = "meteora"


def load_for_harness(checkpoint: str, options: OpeningOptions, *, fuse: Switch = "auto", adapter: str | None = None) -> tuple[Any, Any]:
    """Load the model and the tokenizer of a checkpoint.

    Args:
        checkpoint: Folder of a native checkpoint, its id on the hub, or file or folder in the authors' layout.
        options: Options for loading.
        fuse: Whether to fuse layers: "auto", "on" or "off", as for :func:`meteora_core.fused.fuse.fuse_for_inference`.
        adapter: Name of the only adapter to use; None lets the gates choose.

    Raises:
        MeteoraError: The checkpoint cannot be loaded; see :func:`meteora_core.checkpoints.opening.open_checkpoint`.
    """
    model, reference = open_checkpoint(checkpoint, options)
    fuse_for_inference(model, fuse)
    if adapter is not None:
        set_adapter(model, adapter)
    return model, load_tokenizer(reference)


@cache
def model_class() -> type[Any]:
    """Define the model class "meteora", register it with the harness and return it. Raises UsageError if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed", hint="pip install 'meteora-lora[lm-eval]'")
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    class MeteoraLM(HFLM):
        """A base model with adapters and gates, loaded from ``checkpoint``. Otherwise, it is the same as the harness's "hf" model.

        With ``accelerate launch`` or ``torchrun``, the requests are split among the processes.
        """

        def __init__(
            self,
            checkpoint: str,
            base: str | None = None,
            revision: str | None = None,
            adapter: str | None = None,
            adapters: str | None = None,
            alpha: float | None = None,
            top_k: int | None = None,
            T: float | None = None,
            dtype: str | None = "auto",
            device: str | None = None,
            meteora_backend: str = "auto",
            fuse: Switch = "auto",
            quantization: str | None = None,
            trust_remote_code: bool = False,
            **kwargs: Any,
        ) -> None:
            accelerator = None
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                from accelerate import Accelerator

                accelerator = Accelerator(cpu=device == "cpu")
                device = str(accelerator.device)
            options = OpeningOptions(
                base=base,
                revision=revision,
                adapters_dir=adapters,
                alpha=alpha,
                top_k=top_k,
                routing_temperature=T,
                dtype=dtype,
                device=device,
                backend=meteora_backend or "auto",
                quantization=quantization,
                trust_remote_code=bool(trust_remote_code),
            )
            model, tokenizer = load_for_harness(str(checkpoint), options, fuse=fuse or "auto", adapter=adapter)
            self.meteora_checkpoint = str(checkpoint)
            super().__init__(pretrained=model, tokenizer=tokenizer, trust_remote_code=trust_remote_code, **kwargs)
            if accelerator is not None:
                self.accelerator = accelerator
                self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            """The harness's forward pass, which raises an error for NaN or infinity instead of scoring it."""
            logits = super()._model_call(inps, attn_mask, labels)
            broken = not_finite(logits).any(-1).tolist()
            if any(broken):
                raise non_finite_error(self.model, inps[broken.index(True)].tolist())
            return logits

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
            """The harness's generation, which raises an error for NaN or infinity in a step's logits."""
            from transformers import LogitsProcessorList

            processors = LogitsProcessorList(
                [*generation_kwargs.pop("logits_processor", []), _only_finite(self.model, generation_kwargs.get("attention_mask"))]
            )
            return super()._model_generate(context, max_length, stop, logits_processor=processors, **generation_kwargs)

        def get_model_info(self) -> dict[str, Any]:
            """Information about the model for the harness's results."""
            state = self.model.meteora
            routing = {"meteora_checkpoint": self.meteora_checkpoint, "meteora_adapters": active_adapters(self.model)}
            return {**super().get_model_info(), **routing, "meteora_top_k": state.top_k, "meteora_T": state.temperature}

    register_model(NAME)(MeteoraLM)
    return MeteoraLM


def _only_finite(model: Any, mask: Any) -> Any:
    """A logits processor that raises NonFiniteError. ``mask`` is the attention mask of the left-padded prompts, (batch, width), or None."""

    def check(ids: Any, scores: Any) -> Any:
        broken = not_finite(scores).tolist()
        if any(broken):
            row = broken.index(True)
            padding = 0 if mask is None else int(mask[row].argmax())
            raise non_finite_error(model, ids[row, padding:].tolist())
        return scores

    return check


def __getattr__(name: str) -> Any:
    if name == "MeteoraLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the harness's command line with the model "meteora" registered. A MeteoraError ends the process with one line and a hint."""
    try:
        model_class()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except MeteoraError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        raise SystemExit(f"error: {error.message}{hint}") from error


if __name__ == "__main__":
    main()
elif find_spec("lm_eval") is not None:
    model_class()

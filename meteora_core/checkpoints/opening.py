"""Open a checkpoint whatever its layout: native, or the authors'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meteora_core.checkpoints.authors import load_authors_checkpoint
from meteora_core.checkpoints.layout import is_authors
from meteora_core.checkpoints.native import CONFIG_FILE, load_checkpoint, read_config
from meteora_core.checkpoints.tensor_files import TensorFiles
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.base import BaseReference, load_base, pick_device, pick_dtype
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import routing_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_checkpoint(
    checkpoint: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    adapters_dir: str | Path | None = None,
    alpha: float | None = None,
    top_k: int | None = None,
    temperature: float | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    quantization: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> tuple[PreTrainedModel, BaseReference]:
    """Load a checkpoint onto its base model, and say which base that is (its tokenizer belongs to the checkpoint too).

    Args:
        checkpoint: A native folder, or a file or folder in the authors' layout.
        base: The base model; None takes the one that a native checkpoint names. The authors' layout names none.
        revision: Of ``base`` on the hub.
        adapters_dir: Where the adapter folders lie.
        alpha: Of the authors' layout without ``adapters_dir``.
        top_k: None takes the checkpoint's own, or 2.
        temperature: None takes the checkpoint's own, or 1.
        dtype: Of the model; None or "auto" is float32 on a CPU and bfloat16 on a GPU.
        device: None or "auto" is a GPU when there is one.
        backend: "auto" or a name of ``meteora_kernels.BACKENDS``.
        quantization: "4bit", "8bit" or None, for the base model.
        trust_remote_code: Whether code of the base model's repository may run.
        progress: Where to report.

    Raises:
        CheckpointError: It is no checkpoint, is broken, or does not fit the base model or the adapters.
        UsageError: A base model is needed and not given, or an argument is out of range.
    """
    checkpoint = Path(checkpoint)
    native = (checkpoint / CONFIG_FILE).is_file()
    if not native:
        if not checkpoint.exists():
            raise CheckpointError(f"no checkpoint at {checkpoint}", hint="train one with `meteora train`, or correct the path")
        if not is_authors(list(TensorFiles(checkpoint).entries)):
            raise CheckpointError(f"{checkpoint} is no meteora checkpoint, native or the authors'", hint="`meteora ckpt inspect` says what it is")
        if base is None:
            raise UsageError(f"{checkpoint} is in the authors' layout, which does not name its base model", hint="name it, such as meta-llama/Meta-Llama-3-8B")
        reference = BaseReference(base, revision, trust_remote_code)
    else:
        named = read_config(checkpoint)["base"]
        reference = BaseReference(base or named["name"], revision if base else named.get("revision"), trust_remote_code)
    place = pick_device(device)
    loaded = load_base(reference, dtype=pick_dtype(dtype, place), device=place, quantization=quantization, progress=progress)
    if native:
        model = load_checkpoint(checkpoint, loaded, backend=backend, adapters_dir=adapters_dir, progress=progress)
    else:
        model = load_authors_checkpoint(loaded, adapters_dir, checkpoint, backend=backend, alpha=alpha, progress=progress)
    state = routing_state(model)
    if top_k is not None:
        state.top_k = top_k
    if temperature is not None:
        state.temperature = temperature
    return model, reference

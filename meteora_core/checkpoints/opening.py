"""Open a checkpoint whatever its layout: native, or the authors'."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meteora_core.checkpoints.authors import attach_authors
from meteora_core.checkpoints.authors_layout import AuthorsAdapters, describe_adapters, is_authors, read_layout
from meteora_core.checkpoints.native import load_checkpoint, refuse_untrained
from meteora_core.checkpoints.native_config import CONFIG_FILE, check_weights, read_config
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.files import sha256
from meteora_core.model.base import BaseReference, load_base, pick_device, pick_dtype
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import meteora_of
from meteora_core.tensor_files import PICKLES, TensorFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class CheckpointFacts:
    """What can be known of a checkpoint before a model is loaded.

    Attributes:
        path: A native folder, or a file or folder in the authors' layout.
        native: Which of the two.
        base: The base model that it names; None in the authors' layout, which names none.
        revision: Of the base model on the hub.
        adapters: The adapters' names, in order.
        hash: SHA-256 of the weights: the recorded one, or None where it has to be read off the files (:meth:`weights_hash`).
    """

    path: Path
    native: bool
    base: str | None
    revision: str | None
    adapters: tuple[str, ...]
    hash: str | None

    def reference(self, base: str | None, revision: str | None = None, *, trust_remote_code: bool = False) -> BaseReference:
        """The base model to load: ``base`` where it is given, else the checkpoint's own. Raises UsageError when there is neither."""
        if base is not None:
            return BaseReference(base, revision, trust_remote_code)
        if self.base is None:
            raise UsageError(
                f"{self.path} is in the authors' layout, which does not name its base model", hint="name it, such as --base meta-llama/Meta-Llama-3-8B"
            )
        return BaseReference(self.base, self.revision, trust_remote_code)

    def weights_hash(self) -> str | None:
        """:attr:`hash`; for the authors' layout all files are read (one hash over the shards' hashes)."""
        if self.native or self.hash is not None:
            return self.hash
        found = [sha256(file) for file in TensorFiles(self.path).files]
        return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def describe_checkpoint(checkpoint: str | Path, adapters_dir: str | Path | None = None) -> CheckpointFacts:
    """Read a checkpoint's configuration, or its headers in the authors' layout.

    Args:
        checkpoint: A native folder, or a file or folder in the authors' layout.
        adapters_dir: The folder of PEFT folders that names the adapters of the authors' layout; None: the 28 tasks, or numbers.

    Raises:
        CheckpointError: There is none, it is broken, its gates are untrained, or the folder of adapters does not fit it.
    """
    checkpoint = Path(checkpoint)
    try:
        there, folder = checkpoint.exists(), checkpoint.is_dir()
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{str(checkpoint)!r} cannot be read: {broken}", hint="correct the path") from broken
    if os.path.lexists(checkpoint / CONFIG_FILE) or not there or (folder and not _holds_weights(checkpoint)):
        config = read_config(checkpoint)
        refuse_untrained(checkpoint, config)
        check_weights(checkpoint, config)
        names = tuple(str(entry["name"]) for entry in config["adapters"])
        return CheckpointFacts(checkpoint, True, config["base"]["name"], config["base"].get("revision"), names, config.get("weights_sha256"))
    if not is_authors(list(TensorFiles(checkpoint).entries)):
        raise CheckpointError(f"{checkpoint} is no meteora checkpoint, native or the authors'", hint="`meteora ckpt inspect` says what it is")
    infos = describe_adapters(read_layout(checkpoint), AuthorsAdapters(adapters_dir))
    return CheckpointFacts(checkpoint, False, None, None, tuple(info.name for info in infos), None)


def _holds_weights(folder: Path) -> bool:
    """Whether there is a file, in the folder or below it, that could be a checkpoint in the authors' layout, or a pickle to refuse."""
    return any(file.suffix in (".safetensors", *PICKLES) or file.name.endswith(".safetensors.index.json") for file in folder.rglob("*"))


def attach_checkpoint(
    model: PreTrainedModel,
    facts: CheckpointFacts,
    *,
    adapters_dir: str | Path | None = None,
    alpha: float | None = None,
    backend: str = "auto",
    progress: Progress = SILENT,
) -> PreTrainedModel:
    """Put a checkpoint onto its loaded base model, in place.

    Args:
        model: The base model.
        facts: The checkpoint, as :func:`describe_checkpoint` read it.
        adapters_dir, alpha, backend: As in :class:`OpeningOptions`.
        progress: Where to report.

    Raises:
        CheckpointError, UsageError: As :func:`open_checkpoint`.
    """
    if facts.native:
        return load_checkpoint(facts.path, model, backend=backend, adapters_dir=adapters_dir, progress=progress)
    return attach_authors(model, facts.path, AuthorsAdapters(adapters_dir, alpha=alpha), backend=backend, progress=progress)


@dataclass(frozen=True)
class OpeningOptions:
    """How a checkpoint is loaded.

    Attributes:
        base: The base model; None takes the one that a native checkpoint names. The authors' layout names none.
        revision: Of ``base`` on the hub.
        adapters_dir: The folder that the adapter folders were moved to, if they were; for the authors' layout, the folders that name its adapters.
        alpha: ``lora_alpha`` of the adapters in the authors' layout, without ``adapters_dir``.
        top_k: Adapters per token; None takes the checkpoint's own, or 2.
        routing_temperature: T of the gates' softmax; None takes the checkpoint's own, or 1.
        dtype: Of the model; None or "auto" is float32 on a CPU and bfloat16 on a GPU.
        device: None or "auto" is a GPU when there is one.
        backend: "auto" or a name of ``meteora_kernels.BACKENDS``.
        quantization: "4bit", "8bit" or None, for the base model.
        trust_remote_code: Whether code of the base model's repository may run.
    """

    base: str | None = None
    revision: str | None = None
    adapters_dir: str | Path | None = None
    alpha: float | None = None
    top_k: int | None = None
    routing_temperature: float | None = None
    dtype: torch.dtype | str | None = None
    device: torch.device | str | None = None
    backend: str = "auto"
    quantization: str | None = None
    trust_remote_code: bool = False


def open_checkpoint(
    checkpoint: str | Path, options: OpeningOptions = OpeningOptions(), *, progress: Progress = SILENT
) -> tuple[PreTrainedModel, BaseReference]:
    """Load a checkpoint onto its base model, and return which base that is (its tokenizer belongs to the checkpoint too).

    Args:
        checkpoint: A native folder, or a file or folder in the authors' layout.
        options: How.
        progress: Where to report.

    Raises:
        CheckpointError: It is no checkpoint, is broken, or does not fit the base model or the adapters.
        UsageError: A base model is needed and not given, or an option is out of range.
    """
    facts = describe_checkpoint(checkpoint, options.adapters_dir)
    reference = facts.reference(options.base, options.revision, trust_remote_code=options.trust_remote_code)
    place = pick_device(options.device)
    loaded = load_base(reference, dtype=pick_dtype(options.dtype, place), device=place, quantization=options.quantization, progress=progress)
    model = attach_checkpoint(loaded, facts, adapters_dir=options.adapters_dir, alpha=options.alpha, backend=options.backend, progress=progress)
    state = meteora_of(model)
    if options.top_k is not None:
        state.top_k = options.top_k
    if options.routing_temperature is not None:
        state.temperature = options.routing_temperature
    return model, reference

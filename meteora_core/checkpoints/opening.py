"""Opens checkpoints in either layout: native, or the authors'."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meteora_core.checkpoints.authors import attach_authors
from meteora_core.checkpoints.authors_layout import AuthorsAdapters, describe_adapters, is_authors, read_layout
from meteora_core.checkpoints.located import checkpoint_folder
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
    """The description of a checkpoint that is available before a model is loaded.

    Attributes:
        path: A native folder, or a file or folder in the authors' layout.
        native: Whether the checkpoint is native; otherwise, it is in the authors' layout.
        base: The base model that the checkpoint names; None in the authors' layout, which names none.
        revision: The revision of the base model on the hub.
        adapters: The names of the adapters, in order.
        hash: The recorded SHA-256 of the weights; None if it must be computed from the files by :meth:`weights_hash`.
    """

    path: Path
    native: bool
    base: str | None
    revision: str | None
    adapters: tuple[str, ...]
    hash: str | None

    def reference(self, base: str | None, revision: str | None = None, *, trust_remote_code: bool = False) -> BaseReference:
        """Return the base model to load: ``base`` if given, else the one that the checkpoint names. Raises UsageError if there is neither."""
        if base is not None:
            return BaseReference(base, revision, trust_remote_code)
        if self.base is None:
            raise UsageError(
                f"{self.path} is in the authors' layout, which does not name its base model", hint="name it, such as --base meta-llama/Meta-Llama-3-8B"
            )
        return BaseReference(self.base, self.revision, trust_remote_code)

    def weights_hash(self) -> str | None:
        """Return :attr:`hash`; for the authors' layout, compute the SHA-256 of the file, or a hash of the hashes of all shards."""
        if self.native or self.hash is not None:
            return self.hash
        hashes = [sha256(file) for file in TensorFiles(self.path).files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def describe_checkpoint(checkpoint: str | Path, adapters_dir: str | Path | None = None, *, progress: Progress = SILENT) -> CheckpointFacts:
    """Read a checkpoint's configuration, or its headers in the authors' layout.

    Args:
        checkpoint: A native folder, its id on the hub (``user/name`` or ``user/name@revision``), or a file or folder in the authors' layout.
        adapters_dir: The folder of PEFT folders that names the adapters of the authors' layout; None means the names of the 28 tasks, or numbers.
        progress: The receiver of progress reports.

    Raises:
        CheckpointError: The checkpoint is missing or broken, its gates are untrained, or the folder of adapters does not fit it.
    """
    checkpoint = checkpoint_folder(checkpoint, progress=progress)
    try:
        exists, folder = checkpoint.exists(), checkpoint.is_dir()
    except (OSError, ValueError) as broken:
        raise CheckpointError(f"{str(checkpoint)!r} cannot be read: {broken}", hint="correct the path") from broken
    if os.path.lexists(checkpoint / CONFIG_FILE) or not exists or (folder and not _holds_weights(checkpoint)):
        config = read_config(checkpoint)
        refuse_untrained(checkpoint, config)
        check_weights(checkpoint, config)
        names = tuple(str(entry["name"]) for entry in config["adapters"])
        return CheckpointFacts(checkpoint, True, config["base"]["name"], config["base"].get("revision"), names, config.get("weights_sha256"))
    if not is_authors(list(TensorFiles(checkpoint).entries)):
        raise CheckpointError(f"{checkpoint} is neither a native checkpoint nor one in the authors' layout", hint="`meteora ckpt inspect` says what it is")
    infos = describe_adapters(read_layout(checkpoint), AuthorsAdapters(adapters_dir))
    return CheckpointFacts(checkpoint, False, None, None, tuple(info.name for info in infos), None)


def _holds_weights(folder: Path) -> bool:
    """Whether the folder or its sub-folders contain a file that could be a checkpoint in the authors' layout, or a pickle to refuse."""
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
    """Attach a checkpoint to its loaded base model, in place.

    Args:
        model: The loaded base model.
        facts: The description of the checkpoint from :func:`describe_checkpoint`.
        adapters_dir: The folder of the adapter folders; see :class:`OpeningOptions`.
        alpha: The ``lora_alpha`` of adapters in the authors' layout; see :class:`OpeningOptions`.
        backend: The implementation of the sum over adapters; see :class:`OpeningOptions`.
        progress: The receiver of progress reports.

    Raises:
        CheckpointError: The checkpoint is broken, or does not fit the base model or the adapters.
        UsageError: An option is out of range.
    """
    if facts.native:
        return load_checkpoint(facts.path, model, backend=backend, adapters_dir=adapters_dir, progress=progress)
    return attach_authors(model, facts.path, AuthorsAdapters(adapters_dir, alpha=alpha), backend=backend, progress=progress)


@dataclass(frozen=True)
class OpeningOptions:
    """Options for loading a checkpoint.

    Attributes:
        base: The base model; None means the one that a native checkpoint names. The authors' layout names none.
        revision: The revision of ``base`` on the hub.
        adapters_dir: For a native checkpoint, the folder that contains the adapter folders by name, if they were moved after training; for the authors'
            layout, the folder of the adapter folders that give the names.
        alpha: The ``lora_alpha`` of adapters in the authors' layout, only without ``adapters_dir``.
        top_k: Number of adapters per token and layer; None means the checkpoint's value, or 2.
        routing_temperature: Routing temperature T; None means the checkpoint's value, or 1.
        dtype: The dtype of the model; None or "auto" means float32 on a CPU and bfloat16 on a GPU.
        device: The device of the model; None or "auto" means a GPU if there is one.
        backend: The implementation of the sum over adapters: "auto" or a name in ``meteora_kernels.BACKENDS``.
        quantization: The quantisation of the base model: "4bit", "8bit" or None.
        trust_remote_code: Whether Python code from the base model's repository may run.
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
    """Load a checkpoint onto its base model.

    Args:
        checkpoint: A native folder, its id on the hub (``user/name`` or ``user/name@revision``), or a file or folder in the authors' layout.
        options: Options for loading the checkpoint and the base model.
        progress: The receiver of progress reports.

    Returns:
        The model, and the reference of its base model, by which the tokenizer can be loaded.

    Raises:
        CheckpointError: The checkpoint is missing or broken, or does not fit the base model or the adapters.
        UsageError: A base model is required and not given, or an option is out of range.
    """
    facts = describe_checkpoint(checkpoint, options.adapters_dir, progress=progress)
    reference = facts.reference(options.base, options.revision, trust_remote_code=options.trust_remote_code)
    device = pick_device(options.device)
    loaded = load_base(reference, dtype=pick_dtype(options.dtype, device), device=device, quantization=options.quantization, progress=progress)
    model = attach_checkpoint(loaded, facts, adapters_dir=options.adapters_dir, alpha=options.alpha, backend=options.backend, progress=progress)
    state = meteora_of(model)
    if options.top_k is not None:
        state.top_k = options.top_k
    if options.routing_temperature is not None:
        state.temperature = options.routing_temperature
    return model, reference

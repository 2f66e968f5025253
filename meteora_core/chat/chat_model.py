"""The model that answers in a chat: a MeteoRA checkpoint, one adapter or a bare base model, loaded with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.folders import folder_frame
from meteora_core.data.frames import Frame, default_frame
from meteora_core.errors import UsageError
from meteora_core.fetch.hub_names import adapter_folder, adapter_label
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.model.prompts import model_frame
from meteora_core.progress import SILENT, Progress
from meteora_core.routing import Meteora, meteora_of
from meteora_core.starter import usual_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.settings import Settings

Kind = Literal["meteora", "adapter", "base"]


@dataclass(frozen=True)
class ChatModel:
    """A loaded model with its tokenizer and its description.

    Attributes:
        kind: Kind of model: "meteora" if gates choose the adapters, "adapter" for a single adapter, "base" for no adapter.
        title: Description for users, in one line.
        model: The model in evaluation mode; it has ``model.meteora`` unless ``kind`` is "base".
        tokenizer: Tokenizer of the base model.
        base: Name and revision of the base model.
        adapter: Name of the adapter that is forced at the start, or None.
    """

    kind: Kind
    title: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: BaseReference
    adapter: str | None = None

    @property
    def routing(self) -> Meteora | None:
        """The model's Meteora object; None for a bare base model."""
        return None if self.kind == "base" else meteora_of(self.model)

    def frame(self, adapter: str | None = None, *, base: bool = False) -> Frame:
        """The prompt frame that the model was trained on, or a default one if none is recorded.

        Args:
            adapter: Name of the only adapter in use; None if the gates choose.
            base: Whether the bare base model answers.
        """
        return default_frame((), self.tokenizer) if base else model_frame(self.model, self.tokenizer, adapter)


def load_chat_model(
    settings: Settings,
    *,
    checkpoint: Path | None = None,
    base: str | None = None,
    adapter: str | None = None,
    adapters_dir: Path | None = None,
    progress: Progress = SILENT,
) -> ChatModel:
    """Load the model that the user has chosen.

    With ``base`` alone, this is the bare base model. With ``adapter``, it is a PEFT folder or its id on the hub, the adapter of that name in
    ``settings.paths.adapters``, or an adapter in the checkpoint's bank. Otherwise it is the checkpoint, by default
    :func:`meteora_core.starter.usual_checkpoint`.

    Args:
        settings: Settings for the device, the dtype, the paths, and the default base model.
        checkpoint: Checkpoint in the native or the authors' layout. The authors' layout names no base model, so ``base`` or ``settings.model.base`` must.
        base: Name, folder or hub id of a base model. With a checkpoint or an adapter, the base model to load it onto.
        adapter: Name or folder of the only adapter to use.
        adapters_dir: Present location of the checkpoint's adapter folders, if they were moved. For the authors' layout, the folder with the adapters whose
            names the checkpoint uses.
        progress: Receiver of progress reports.

    Raises:
        CheckpointError: The checkpoint or the base model cannot be loaded.
        AdapterError: The adapter's folder cannot be used.
        UsageError: The adapter, the device or the dtype does not exist.
    """
    if adapter is not None and checkpoint is None:
        candidates = (adapter_folder(adapter, progress=progress), settings.paths.adapters / adapter)
        folder = next((candidate for candidate in candidates if find_adapter(candidate) is not None), None)
        if folder is not None:
            return _single_adapter(settings, folder, base, progress)
    if base is not None and checkpoint is None and adapter is None:
        return _bare_base(settings, base, progress)
    return _checkpoint(settings, checkpoint or usual_checkpoint(settings.paths.runs), base, adapter, adapters_dir, progress)


def _reference(settings: Settings, name: str | None, revision: str | None = None) -> BaseReference:
    is_default = name is None or name == settings.model.base
    return BaseReference(name or settings.model.base, revision or (settings.model.revision if is_default else None), settings.model.trust_remote_code)


def _load(settings: Settings, reference: BaseReference, progress: Progress) -> PreTrainedModel:
    device = pick_device(settings.model.device)
    quantization = None if settings.model.quantization == "none" else settings.model.quantization
    return load_base(reference, dtype=pick_dtype(settings.model.dtype, device), device=device, quantization=quantization, progress=progress)


def _bare_base(settings: Settings, name: str, progress: Progress) -> ChatModel:
    reference = _reference(settings, name)
    model = _load(settings, reference, progress)
    return ChatModel("base", f"{reference.name} (base model, no adapters)", model, load_tokenizer(reference, progress=progress), reference)


def _single_adapter(settings: Settings, folder: Path, base: str | None, progress: Progress) -> ChatModel:
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.model.attach import attach

    name = adapter_label(folder)
    bank = AdapterBank.from_peft({name: folder}, progress=progress)
    bank = replace(bank, adapters=(replace(bank.adapters[0], frame=folder_frame(folder)),))
    reference = _reference(settings, base or bank.adapters[0].base)
    model = _load(settings, reference, progress)
    attach(model, bank, top_k=1, backend=settings.model.backend, init="zeros")
    tokenizer = load_tokenizer(reference, progress=progress)
    return ChatModel("adapter", f"{name} on {reference.name} (one adapter)", model.eval(), tokenizer, reference, name)


def _checkpoint(settings: Settings, folder: Path, base: str | None, adapter: str | None, adapters_dir: Path | None, progress: Progress) -> ChatModel:
    from meteora_core.checkpoints.opening import attach_checkpoint, describe_checkpoint
    from meteora_core.errors import did_you_mean
    from meteora_core.fused.fuse import fuse_for_inference
    from meteora_core.settings import ModelSettings

    facts = describe_checkpoint(folder, adapters_dir, progress=progress)
    names = list(facts.adapters)
    if adapter is not None and adapter not in names:
        hint = did_you_mean(adapter, names) or f"the bank of {folder} has: {', '.join(names)}; a PEFT folder can be given by its path"
        raise UsageError(f"no adapter {adapter!r}: it is neither a folder nor in the bank of {folder}", hint=hint)
    if base is None and facts.base is None and settings.model.base != ModelSettings().base:
        base = settings.model.base
    reference = _reference(settings, base) if base else facts.reference(None, trust_remote_code=settings.model.trust_remote_code)
    model = _load(settings, reference, progress)
    attach_checkpoint(model, facts, adapters_dir=adapters_dir, backend=settings.model.backend, progress=progress)
    fuse_for_inference(model, settings.chat.fuse)
    tokenizer = load_tokenizer(reference, progress=progress)
    title = f"{folder}: {len(names)} adapters on {reference.name}"
    return ChatModel("meteora", title, model, tokenizer, reference, adapter)

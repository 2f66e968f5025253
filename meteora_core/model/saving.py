"""``save_pretrained`` of a model with adapters attached: it writes Meteora's checkpoint instead of linears under names that nothing can load."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from torch import nn

from meteora_core import hooks
from meteora_core.errors import UsageError


class AttachedSaver:
    """``save_pretrained`` of a model while adapters are attached to it; see :func:`meteora_core.checkpoints.pretrained.save_attached`.

    transformers has no hook that replaces the format of a model, so :func:`meteora_core.model.attach.attach` puts this object in the place of the
    model's method and :func:`meteora_core.model.attach.detach` takes it away again. Copies and pickles of the model have their own.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _guard_class()

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Write the checkpoint into a folder; arguments as for transformers' ``save_pretrained``."""
        hooks.save_attached(self.model, save_directory, *args, **options)


class PartSaver:
    """``save_pretrained`` of a model inside an attached model, such as its decoder: transformers would write linears that no one can load."""

    def __call__(self, save_directory: str | os.PathLike[str], *_args: Any, **_options: Any) -> None:
        """Raises UsageError."""
        raise UsageError(
            f"this is only a part of the model that carries the adapters, so it is not saved at {save_directory}",
            hint="call save_pretrained of the whole model, or meteora_core.detach(model) first",
        )


def guard_saving(model: nn.Module) -> None:
    """Let ``save_pretrained`` of an attached model write Meteora's checkpoint, and of the models inside it nothing."""
    for inner in model.modules():
        if hasattr(inner, "save_pretrained"):
            inner.save_pretrained = AttachedSaver(model) if inner is model else PartSaver()  # type: ignore[assignment]
            _guard_class()


def unguard_saving(model: nn.Module) -> None:
    """Give a model, and the models inside it, their own ``save_pretrained`` again."""
    for inner in model.modules():
        if isinstance(vars(inner).get("save_pretrained"), AttachedSaver | PartSaver):
            del inner.save_pretrained


def _guard_class() -> None:
    """Let ``PreTrainedModel.save_pretrained(model, folder)``, which passes over the model's own attribute, do what ``model.save_pretrained(folder)`` does.

    Models without adapters are saved by transformers as before. A second call changes nothing.
    """
    from transformers import PreTrainedModel

    original = PreTrainedModel.save_pretrained
    if hasattr(original, "_knows_meteora"):
        return

    @wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        saver = vars(self).get("save_pretrained")
        if isinstance(saver, AttachedSaver | PartSaver):
            return saver(save_directory, *args, **options)
        return original(self, save_directory, *args, **options)

    save_pretrained._knows_meteora = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained

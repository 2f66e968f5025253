"""``save_pretrained`` for a model with adapters attached: it writes a Meteora checkpoint, because transformers' format has no place for the adapters."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

from torch import nn

from meteora_core import hooks
from meteora_core.errors import UsageError


class AttachedSaver:
    """``save_pretrained`` of a model while adapters are attached; see :func:`meteora_core.checkpoints.pretrained.save_attached`.

    transformers has no hook that replaces the format of a model, so :func:`meteora_core.model.attach.attach` replaces the model's
    method with this object and :func:`meteora_core.model.attach.detach` restores the method. Copies and pickles of the model get an object of their own.

    Args:
        model: The model with adapters attached.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _guard_class()

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
        """Write the checkpoint into a folder. The arguments are those of transformers' ``save_pretrained``."""
        hooks.save_attached(self.model, save_directory, *args, **options)


class PartSaver:
    """``save_pretrained`` of a model inside an attached model, such as its decoder; it refuses, since nothing could load what transformers would write."""

    def __call__(self, save_directory: str | os.PathLike[str], *_args: Any, **_options: Any) -> None:
        """Raise UsageError; nothing is written."""
        raise UsageError(
            f"this is only a part of the model with adapters, so it is not saved at {save_directory}",
            hint="call save_pretrained on the whole model, or call meteora_core.detach(model) first",
        )


def guard_saving(model: nn.Module) -> None:
    """Replace ``save_pretrained`` of an attached model and of the models inside it (:class:`AttachedSaver`, :class:`PartSaver`)."""
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.save_pretrained = AttachedSaver(model) if module is model else PartSaver()  # type: ignore[assignment]
            _guard_class()


def unguard_saving(model: nn.Module) -> None:
    """Restore the original ``save_pretrained`` of a model and of the models inside it."""
    for module in model.modules():
        if isinstance(vars(module).get("save_pretrained"), AttachedSaver | PartSaver):
            del module.save_pretrained


def _guard_class() -> None:
    """Make ``PreTrainedModel.save_pretrained(model, folder)`` do the same as ``model.save_pretrained(folder)``, although it skips the model's attribute.

    Models without adapters are still saved by transformers. A second call has no effect.
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

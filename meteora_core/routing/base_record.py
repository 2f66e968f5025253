"""Records of a base model: its name, and which of its tensors have changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class BaseReference:
    """The name of a base model, as in settings and checkpoints.

    Attributes:
        name: Name in the catalog, folder, or id on the Hugging Face Hub.
        revision: Branch, tag or commit on the Hub; None for the default branch.
        trust_remote_code: Whether Python code from the model's repository may run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class BaseRecord:
    """The name of a base model, and which of its tensors have changed since it was loaded.

    It is the attribute ``meteora_base`` of a model, and ``meteora.provenance.base`` while adapters are attached.

    Attributes:
        reference: The name by which it was loaded; None if Meteora did not load it.
        changed: Names of the tensors whose values differ from those of the base model.
        rounded: For tensors that hold the values of the base model rounded to another dtype: that dtype, by name.
    """

    reference: BaseReference | None = None
    changed: tuple[str, ...] = ()
    rounded: dict[str, torch.dtype] = field(default_factory=dict)

"""What is known of a base model besides its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class BaseReference:
    """A base model as it is named in settings and checkpoints.

    Attributes:
        name: A catalog name, a folder, or a hub id.
        revision: The revision of a hub model.
        trust_remote_code: Whether code of the repository may run.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass
class BaseRecord:
    """How a base model was named, and which of its tensors are no longer its own.

    A model carries one as ``meteora_base``, and as ``meteora.provenance.base`` while adapters are attached.

    Attributes:
        reference: The name that it was loaded by; None if Meteora did not load it.
        changed: Names of tensors with other numbers than the base's own.
        rounded: Tensors that are the base's own, rounded to a dtype.
    """

    reference: BaseReference | None = None
    changed: tuple[str, ...] = ()
    rounded: dict[str, torch.dtype] = field(default_factory=dict)

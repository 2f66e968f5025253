"""The origin of an attached model: its adapters' folders, its base model and its gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from meteora_core.data.frames import Frame
from meteora_core.routing.base_marks import Marks
from meteora_core.routing.base_record import BaseRecord

GateOrigin = Literal["untrained", "closed form", "trained"]
"""Origin of a model's gates: still at their initial values, computed without gradients (Arrow, ridge regression), or trained."""


@dataclass(frozen=True)
class GateStart:
    """The initialisation of the gates by ``attach``.

    Attributes:
        init: "normal", "zeros" or "arrow".
        seed: Seed of the random initialisation.
        paths: Paths of the layers, in the order of their initialisation.
    """

    init: str
    seed: int
    paths: tuple[str, ...]


@dataclass
class Provenance:
    """The information that a checkpoint stores about a model in addition to its weights.

    Attributes:
        base: The base model.
        base_probe: A few weights of the base model's linear layers, from which it is recognised; None if they are quantised.
        base_marks: Samples of the base model's weights at the time of ``attach``, from which later changes are detected.
        gates: Origin of the gates, as far as known; "untrained" is verified against the weights (:func:`meteora_core.model.attach.gate_origin`).
        start: Initialisation of the gates; None if it is not known.
        renamed: Names of modules in the model, by their different name in the adapters' folders.
        frame: Default prompt frame that training chose; None if it is not known.
        embedded: Whether the adapters may differ from those in their folders, so that a checkpoint has to contain them.
    """

    base: BaseRecord = field(default_factory=BaseRecord)
    base_probe: list[float] | None = None
    base_marks: Marks | None = None
    gates: GateOrigin = "trained"
    start: GateStart | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    frame: Frame | None = None
    embedded: bool = False

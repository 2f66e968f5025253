"""Where an attached model comes from: its adapters' folders, its base model, and how its gates came to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from meteora_core.data.frames import Frame
from meteora_core.routing.base_marks import Marks
from meteora_core.routing.base_record import BaseRecord

GateOrigin = Literal["untrained", "closed form", "trained"]
"""How the gates of a model came to be: at their random or zero start, computed without gradients (Arrow, ridge regression), or trained."""


@dataclass(frozen=True)
class GateStart:
    """How ``attach`` started the gates.

    Attributes:
        init: "normal", "zeros" or "arrow".
        seed: The seed of a random start.
        paths: The layers, in the order in which they were started.
    """

    init: str
    seed: int
    paths: tuple[str, ...]


@dataclass
class Provenance:
    """What a checkpoint says of a model besides its weights.

    Attributes:
        base: The base model.
        base_probe: A few weights of the base model's linears, to recognise it by; None where they are quantised.
        base_marks: Samples of the base model's weights from when the adapters were attached, to notice changes by.
        gates: How the gates came to be, as far as it is known; "untrained" is checked against the weights before it is believed
            (:func:`meteora_core.model.attach.gate_origin`).
        start: How the gates started; None where it is not known.
        renamed: Modules that the adapters' folders call otherwise: their name there, and their name here.
        frame: What stands around a message in prompts when nobody says otherwise, as training chose it; None where it is not known.
        embedded: Whether the adapters are no longer those of their folders, so that a checkpoint has to hold them.
    """

    base: BaseRecord = field(default_factory=BaseRecord)
    base_probe: list[float] | None = None
    base_marks: Marks | None = None
    gates: GateOrigin = "trained"
    start: GateStart | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    frame: Frame | None = None
    embedded: bool = False

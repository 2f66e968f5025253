"""The modes of a model's layers other than routing by their gates: forced routes, gate labels, a recorder, or the base model alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from meteora_core.routing.options import RowRoutes
from meteora_core.routing.routes import ChosenRecorder, Recorder

IGNORE = -100
"""The label of a position that no loss counts (as in PyTorch and transformers)."""


@dataclass
class GateObservations:
    """The results that the layers report while gate labels are set, one entry per layer call.

    Attributes:
        loss_sums: Per layer, the sum over labelled positions of CE(gate logits, label); float32 scalars with gradients.
        hits: Per layer path, bool (positions,) whether the top-1 adapter is the label (at ignored positions it is meaningless).
        weights: Weight of each position in the sums, float32 (positions,); None is 1. The caller sets it before the forward pass.
    """

    loss_sums: list[Tensor] = field(default_factory=list)
    hits: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

    def mean_loss(self, positions: Tensor | int) -> Tensor:
        """CE_gate: the mean over layers and over ``positions`` labelled positions; a float32 scalar with gradients."""
        return torch.stack(self.loss_sums).sum() / (len(self.loss_sums) * positions)


@dataclass(frozen=True, eq=False)
class GateLabels:
    """The adapter that each position of a batch should choose.

    Attributes:
        labels: Adapter of each position, int64 (batch, tokens); :data:`IGNORE` for positions that are not counted.
        observations: Object to which the layers add their gate losses.
        keep_hits: Whether the layers also report at which positions their top-1 adapter is the label.
        alone: Whether a layer's gate loss has gradients for its own gate only.
    """

    labels: Tensor
    observations: GateObservations
    keep_hits: bool = False
    alone: bool = False


@dataclass(frozen=True, eq=False)
class Mode:
    """How layers compute their output, for the length of a ``with`` block of :class:`~meteora_core.routing.Meteora`.

    Attributes:
        enabled: Whether adapters take part; without them the model is its base.
        forced: Adapter to use instead of the gates' choice, int64 (1,), (batch,) or (batch, tokens); None lets the gates choose.
        rows: Routing options of each row of the batch, which count where ``forced`` is None.
        gate_labels: Adapters that the gates should choose; None computes no gate loss.
        recorder: Recorder of the layers' choices; None records nothing.
        observed: Whether routes are forced, rows differ, gates are labelled or choices are recorded.
        grouped: Whether fused groups can compute the layers, although they may be observed.
    """

    enabled: bool = True
    forced: Tensor | None = None
    rows: RowRoutes | None = None
    gate_labels: GateLabels | None = None
    recorder: Recorder | None = None
    observed: bool = field(init=False)
    grouped: bool = field(init=False)

    def __post_init__(self) -> None:
        observed = any(part is not None for part in (self.forced, self.rows, self.gate_labels, self.recorder))
        object.__setattr__(self, "observed", observed)
        alone = self.forced is not None or self.gate_labels is not None or (self.rows is not None and self.rows.grouped is None)
        object.__setattr__(self, "grouped", self.enabled and not alone and (self.recorder is None or isinstance(self.recorder, ChosenRecorder)))


@dataclass
class LastCall:
    """The batch that the model was called with last, while layers are observed.

    Attributes:
        shape: (batch, tokens); None when it is not known.
        scattered: Logits are wanted at positions that a tensor names, so that an output layer cannot tell which tokens it sees.
    """

    shape: torch.Size | None = None
    scattered: bool = False

"""The loss that gate training minimises: the language-model loss plus the gate loss."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

from meteora_core.choices import LossBalance
from meteora_core.routing import IGNORE, GateObservations, meteora_of
from meteora_core.training.attention import without_cudnn_attention
from meteora_core.training.encoding import Batch
from meteora_core.training.gate_metrics import gate_tallies, hit_sum
from meteora_core.training.loop import Computed, Counts, StepLoss
from meteora_core.training.loss import lm_losses


class GateObjective:
    """``CE_lm + beta * CE_gate`` and its backward pass.

    Args:
        beta: Weight of the gate loss.
        alone: Whether the gate loss trains only the gate of each layer and sends no gradient to the adapters of earlier layers.
        answer_share: Weight that the response tokens of a step have together in CE_gate, from 0 to 1; None gives every token the same weight.
        balance: Unit of equal weight in CE_lm: "tokens", or "tasks", which means the tasks with targets in the step.
    """

    def __init__(self, beta: float, *, alone: bool = False, answer_share: float | None = None, balance: LossBalance = "tokens") -> None:
        self.beta, self.alone, self.answer_share, self.balance = beta, alone, answer_share, balance

    def around(self, model: nn.Module, batch: Batch) -> AbstractContextManager[GateObservations]:
        """Label the gates during the forward and backward pass."""
        return meteora_of(model).label_gates(batch.gate_labels, keep_hits=True, alone=self.alone)

    def weights(self, batch: Batch, counts: Counts) -> torch.Tensor | None:
        """The weight of each position in CE_gate, float32 (positions,), with a mean of 1 over the step; None is 1 everywhere."""
        answers, every = counts.answer_labels, counts.gate_labels
        if self.answer_share is None or not 0 < answers < every:
            return None
        of_answers, of_prompts = self.answer_share * every / answers, (1 - self.answer_share) * every / (every - answers)
        return torch.where(batch.response.reshape(-1), of_answers, of_prompts)

    def lm_weights(self, batch: Batch, counts: Counts) -> torch.Tensor | None:
        """The weight of each position in CE_lm, float32 (batch, tokens); None is 1 everywhere.

        With ``balance="tasks"`` the targets of each task have the same weight together, and a mean of 1 over all labelled targets of the step. Targets
        without a label have a weight of 1.
        """
        if self.balance == "tokens":
            return None
        known = torch.tensor(counts.targets_by_label, dtype=torch.float32)
        share = known.sum() / max(1, int((known > 0).sum()))
        table = torch.cat([share / known.clamp(min=1.0), torch.ones(1)]).to(batch.gate_labels.device)
        return table[batch.gate_labels.masked_fill(batch.gate_labels == IGNORE, len(known))]

    def compute(self, model: nn.Module, batch: Batch, counts: Counts) -> Computed:
        """Run the forward pass; call this within :meth:`around`."""
        state = meteora_of(model)
        labelled = state.mode.gate_labels
        assert labelled is not None
        observed = labelled.observations
        observed.weights = self.weights(batch, counts)
        lm_sum, losses = lm_losses(model, batch, self.lm_weights(batch, counts))
        lm = lm_sum / counts.targets
        gate = observed.mean_loss(counts.gate_labels)
        hits = hit_sum(observed.hits, batch.gate_labels.reshape(-1) != IGNORE) / counts.gate_labels
        parts = {"lm": lm.detach(), "gate": gate.detach(), "accuracy": hits}
        return lm + self.beta * gate, parts, gate_tallies(observed, batch, losses, state.names)

    def __call__(self, model: nn.Module, batch: Batch, counts: Counts) -> StepLoss:
        """Run the forward and backward pass in a single process."""
        with self.around(model, batch), without_cudnn_attention():
            loss, parts, tallies = self.compute(model, batch, counts)
            loss.backward()  # type: ignore[no-untyped-call]
        return StepLoss(loss.detach(), parts, tallies)

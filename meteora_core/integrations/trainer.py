"""The gate loss in transformers' ``Trainer`` and in trainers that are built on it, such as TRL's ``SFTTrainer``.

The dataset needs an additional column with the adapter that each row's tokens should choose::

    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)  # columns input_ids, labels, adapter
    add_gate_loss(trainer, beta=50.0)
    trainer.train()

The trainer then minimises ``loss + beta * CE_gate`` (MeteoRA, arXiv 2405.13053, section 3.3), where ``loss`` is the loss that it minimises otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from meteora_core.errors import DataError, UsageError, did_you_mean
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import IGNORE, GateObservations, Meteora, meteora_of

COLUMN = "adapter"
"""The name of the column that names each row's adapter."""

LABELS = "meteora_gate_labels"
"""The key of the gate labels in a batch, int64 (batch, tokens)."""


class GateLabelCollator:
    """A data collator that adds the gate labels of each token to the batch of another collator.

    Args:
        collator: The collator that makes all other tensors of the batch.
        names: The names of the model's adapters.
        column: The column with the name or index of each row's adapter; None and -100 give no label.

    Example:
        >>> from transformers import default_data_collator
        >>> from meteora_core.integrations.trainer import GateLabelCollator
        >>> rows = [{"input_ids": [5, 6, 7], "adapter": "gsm8k"}, {"input_ids": [5, 6, 7], "adapter": None}]
        >>> GateLabelCollator(default_data_collator, ("strategyqa", "gsm8k"))(rows)["meteora_gate_labels"]
        tensor([[   1,    1,    1],
                [-100, -100, -100]])
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]], names: Sequence[str], column: str = COLUMN) -> None:
        self.collator, self.names, self.column = collator, tuple(names), column

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate some rows. Raises DataError if a row has no such column, or names an unknown adapter."""
        labels = [self._index(row) for row in features]
        rest = [{name: value for name, value in row.items() if name != self.column} for row in features]
        lengths = [len(row["input_ids"]) for row in rest]
        batch = dict(self.collator(rest))
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if ids.shape[0] == len(labels):
            wanted = torch.tensor(labels).unsqueeze(1).expand(ids.shape)
            if mask is None:
                mask = torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)
        else:  # all rows in one, one after the other
            flat = torch.repeat_interleave(torch.tensor(labels), torch.tensor(lengths))
            wanted = torch.nn.functional.pad(flat, (0, ids.shape[1] - len(flat)), value=IGNORE).unsqueeze(0)
        batch[LABELS] = wanted.clone() if mask is None else torch.where(mask.bool(), wanted, IGNORE)
        return batch

    def _index(self, row: Mapping[str, Any]) -> int:
        if self.column not in row:
            raise DataError(f"a row has no column {self.column!r}", hint="add a column with the name of the adapter that each row's tokens should choose")
        value = row[self.column]
        if value is None or value == IGNORE:
            return IGNORE
        if isinstance(value, str) and value in self.names:
            return self.names.index(value)
        if isinstance(value, int) and 0 <= value < len(self.names):
            return value
        hint = (did_you_mean(value, self.names) if isinstance(value, str) else None) or f"there are: {', '.join(self.names)}"
        raise DataError(f"a row names the adapter {value!r}, which the model does not have", hint=hint)


class GateLoss(TrainerCallback):
    """The callback that :func:`add_gate_loss` adds to a trainer. It logs ``gate_loss`` and ``gate_accuracy``.

    Args:
        beta: Weight of the gate loss.
        alone: Whether the gate loss trains only the gate of each layer and sends no gradient to earlier layers.

    Attributes:
        loss: Mean gate loss since the last log; None if there was no batch.
        accuracy: Share of labelled positions, over all layers, at which the first choice was the label, since the last log.
    """

    def __init__(self, beta: float = 50.0, *, alone: bool = False) -> None:
        self.beta, self.alone = beta, alone
        self.loss: float | None = None
        self.accuracy: float | None = None
        self._sums: list[Tensor] = []
        self._open = ExitStack()
        self._trained: Meteora | None = None

    def compute(self, trainer: Any, original: Callable[..., Any], model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The trainer's loss plus the gate loss; with ``return_outputs`` a pair of it and the model's outputs.

        Args:
            trainer: The trainer.
            original: Its own ``compute_loss``.
            model: The model, possibly wrapped.
            inputs: The batch, with gate labels.
            options: The remaining arguments of ``compute_loss``.
        """
        self.close()
        labels = inputs.pop(LABELS)
        state = meteora_of(trainer.model)
        self._trained = state if torch.is_grad_enabled() else self._trained
        observed = self._open.enter_context(state.label_gates(labels, keep_hits=True, alone=self.alone))
        result = original(model, inputs, **options)
        loss = result[0] if isinstance(result, tuple) else result
        counted = int((labels != IGNORE).sum())
        if counted and observed.loss_sums:
            gate = self._mean(observed, counted)
            targets, items = inputs.get("labels"), options.get("num_items_in_batch")
            share = 1.0
            if items is not None and isinstance(targets, Tensor) and (trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None):
                # The trainer sums the losses of a step's micro-batches; the gate loss of each has the same weight as its language-model loss.
                share = float((targets != IGNORE).sum()) / max(float(items), 1.0)
                share *= trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
            loss = loss + self.beta * share * gate.to(loss.device)
            hits = torch.stack([layer.reshape(-1)[(labels != IGNORE).reshape(-1).to(layer.device)].float().mean() for layer in observed.hits.values()]).mean()
            self._sums.append(torch.stack([gate.detach().cpu(), hits.cpu()]))
        if not torch.is_grad_enabled():
            self.close()
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    @staticmethod
    def _mean(observed: GateObservations, counted: int) -> Tensor:
        """The mean gate loss, without the layers' calls that have no gradients although others have."""
        sums = [each for each in observed.loss_sums if each.requires_grad] or observed.loss_sums
        return torch.stack([each.to(sums[0].device) for each in sums]).sum() / (len(sums) * counted)

    def close(self) -> None:
        """End the labelling of gates, which lasts until the backward pass is complete."""
        self._open.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if self._trained is not None:
            self._trained.gates = "trained"  # regardless of how the gates were initialised

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not self._sums:
            return
        self.loss, self.accuracy = torch.stack(self._sums).mean(0).tolist()
        self._sums.clear()
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(gate_loss=self.loss, gate_accuracy=self.accuracy)


def add_gate_loss(trainer: Any, beta: float = 50.0, *, column: str = COLUMN, alone: bool = False) -> GateLoss:
    """Make a trainer minimise ``loss + beta * CE_gate``.

    CE_gate is the mean, over all layers and all tokens that are not padding, of the cross-entropy between a gate's logits and the adapter of the row.

    Args:
        trainer: transformers' ``Trainer`` or one that is built on it, such as TRL's ``SFTTrainer``, before training begins. Its model has adapters attached.
        beta: Weight of the gate loss; the authors use 50.
        column: The column of the dataset with the name or index of each row's adapter.
        alone: Whether the gate loss trains only the gate of each layer and sends no gradient to earlier layers.

    Returns:
        The callback that was added to the trainer.

    Raises:
        UsageError: The model has no adapters or no gate that trains, the datasets lack the column, or the trainer packs rows.

    Example:
        >>> from meteora_core.integrations.trainer import add_gate_loss
        >>> trainer = Trainer(model=model, args=arguments, train_dataset=dataset)  # doctest: +SKIP
        >>> add_gate_loss(trainer, beta=50.0)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    state = meteora_of(trainer.model)
    layers = list(meteora_layers(trainer.model))
    if not any(layer.gate.requires_grad for _, layer in layers):
        raise UsageError("no gate of the model is trainable", hint='call meteora_core.model.attach.set_trainable(model, "gates") first')
    if getattr(trainer.args, "packing", False):
        raise UsageError("the trainer packs rows of several adapters into one", hint="set packing=False")
    if "fused_lm_head" in inspect.signature(trainer.model.forward).parameters and any(layer.is_output for _, layer in layers):
        raise UsageError(
            "this trainer computes logits without calling the output layer, so adapters of the output layer would have no effect",
            hint="use transformers' Trainer, or adapters that do not target lm_head",
        )
    evaluated = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {"": trainer.eval_dataset}
    for dataset in (trainer.train_dataset, *evaluated.values()):
        names = getattr(dataset, "column_names", None)
        if names is not None and column not in names:
            raise UsageError(f"the dataset has no column {column!r}", hint="add a column with the name of the adapter that each row's tokens should choose")
    loss = GateLoss(beta, alone=alone)
    trainer.data_collator = GateLabelCollator(trainer.data_collator, state.names, column)
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*dict.fromkeys([*(trainer._signature_columns or []), column])]
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        if LABELS not in inputs:
            return original(model, inputs, return_outputs=return_outputs, **options)
        return loss.compute(trainer, original, model, inputs, return_outputs=return_outputs, **options)

    trainer.compute_loss = compute_loss
    trainer.add_callback(loss)
    return loss

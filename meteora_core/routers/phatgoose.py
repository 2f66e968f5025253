"""PHATGOOSE: one gate per adapter and layer, which is trained with this adapter alone; the gates of different adapters meet only at inference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.stack import Stack
from meteora_core.data.dataset_frames import row_end
from meteora_core.data.rows import read_rows
from meteora_core.errors import MeteoraError
from meteora_core.evaluation.fingerprint import adapter_files, base_files
from meteora_core.evaluation.processes import Processes
from meteora_core.files import cache_dir, locked, save_tensors
from meteora_core.model.linears import WrappedLinear
from meteora_core.model.vocabulary import padding_token
from meteora_core.progress import SILENT, Progress
from meteora_core.routers.folder import FolderRouter
from meteora_core.routers.linear import Scorer, install, targeting
from meteora_core.tensor_files import TensorFiles
from meteora_core.training.attention import without_cudnn_attention
from meteora_core.training.batch_plan import plan_batches
from meteora_core.training.encoding import TrainRow, collate, encode_rows
from meteora_core.training.loss import count_targets, lm_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VERSION = 1
"""The version of the training; incremented when it changes, so that stored gates are trained again."""


@dataclass(frozen=True)
class GateTraining:
    """Parameters of the training of one adapter's gates.

    Attributes:
        steps: Number of optimiser steps.
        learning_rate: Learning rate of AdamW, without warm-up and weight decay.
        batch_size: Number of rows per step.
        max_length: Largest number of tokens of a row.
    """

    steps: int = 100
    learning_rate: float = 5e-3
    batch_size: int = 16
    max_length: int = 512


class Phatgoose(FolderRouter):
    """PHATGOOSE (Muqeeth et al., arXiv 2402.05859).

    For each adapter alone, a gate ``v`` (in,) per layer is trained from 0 by the loss on the responses of its task's training rows, with the base model
    and the adapter frozen: ``y = W x + sigmoid(v x) s B A x``. At inference the gates ``v_i`` and the token ``x`` are standardised to mean 0 and variance 1
    over the features, and each token is routed by the softmax of its top-2 scores ``v_i x / sqrt(in)``.

    Trained gates are stored in the folder of the results, in one small file per adapter, so an interrupted or repeated evaluation does not train them again.
    The adapters are divided among the processes.
    """

    default_top_k = 2
    needs_rows = True
    training = GateTraining()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gates: dict[str, dict[str, Tensor]] = {}

    def parameters(self) -> dict[str, Any]:
        """Top-k, routing temperature, and the parameters of the training."""
        return {"top_k": self.top_k, "temperature": self.temperature, "training": asdict(self.training)}

    def make(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Read the stored gates, or train them."""
        files = {name: self._file(name, model) for name in self.names}
        waiting = [name for name, file in files.items() if not file.is_file()]
        processes.gather(None)  # all processes see the same files
        mine = processes.share(waiting)
        if mine:
            with progress.task("gates of PHATGOOSE", total=len(mine), unit="adapters") as bar:
                for name in mine:
                    with locked(files[name], wait=True):
                        if not files[name].is_file():
                            gates = self._train(name, model, tokenizer, progress)
                            save_tensors({path: gate.contiguous() for path, gate in gates.items()}, files[name])
                    bar.update(1)
        processes.gather(None)
        self.gates = {name: _read(file) for name, file in files.items()}

    def _train(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> dict[str, Tensor]:
        rows = encode_rows(
            read_rows(self.plan.data_dir, name, "train"), tokenizer, 0, self.training.max_length, row_end(self.plan.data_dir, name, tokenizer)
        ).rows
        bank = AdapterBank.from_peft({name: self.folders[name]})
        return train_alone(model, bank, rows, padding_token(model, tokenizer), self.training, seed=self.seed, progress=progress)

    def _file(self, name: str, model: PreTrainedModel) -> Path:
        base = self.plan.base
        inputs = {
            "version": _VERSION,
            "adapter": adapter_files(self.folders[name]),
            "rows": self._rows[name],
            "base": [base.name, base.revision, base_files(base), str(model.dtype)],
            "training": asdict(self.training),
            "seed": self.seed,
        }
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
        return (self.plan.out_dir or cache_dir()) / "phatgoose" / f"{name}-{digest}.safetensors"

    def scorer(self, path: str, stack: Stack) -> Scorer:
        """The scores of the standardised gates in a layer."""
        zero = torch.zeros(stack.in_features)
        return standardised_scores(torch.stack([self.gates[name].get(path, zero) for name in self.names]).to(stack.A.device), targeting(stack, stack.A.device))


def _read(file: Path) -> dict[str, Tensor]:
    stored = TensorFiles(file)
    return {path: stored.read(path) for path in stored.entries}


def standardised_scores(gates: Tensor, present: Tensor) -> Scorer:
    """A function that scores adapters by the product of the standardised gates and the standardised token, divided by the square root of the width.

    Args:
        gates: Gates of a layer, float32 (N, in).
        present: Whether each adapter targets the layer, bool (N,).

    Returns:
        A function from the input (..., in) to scores, float32 (..., N); -inf for adapters that do not target the layer.
    """
    rows = standardised(gates)

    def scores(x: Tensor, projected: Tensor) -> Tensor:
        return (standardised(x.float()) @ rows.t() / gates.shape[-1] ** 0.5).masked_fill(~present, float("-inf"))

    return scores


def standardised(values: Tensor) -> Tensor:
    """Values with mean 0 and variance 1 over the last dimension; rows that are constant become 0."""
    centred = values - values.mean(-1, keepdim=True)
    return centred / centred.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)


class _Gate(WrappedLinear):
    """``y = W x + sigmoid(v x) s B A x`` for one adapter, with a trainable float32 gate ``v`` that starts at 0."""

    def __init__(self, wrapped: nn.Module, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_layer, self.scaling = wrapped, scaling
        self.A, self.B = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
        self.gate = nn.Parameter(torch.zeros(A.shape[1], device=A.device))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base_layer(x)
        open_by = torch.sigmoid(x.float() @ self.gate)[..., None] * self.scaling
        return output + (x.to(self.A.dtype) @ self.A.t() @ self.B * open_by.to(self.A.dtype)).to(output.dtype)


def train_alone(
    model: PreTrainedModel,
    bank: AdapterBank,
    rows: Sequence[TrainRow],
    pad_token: int,
    how: GateTraining,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Tensor]:
    """Train the gates of one adapter alone.

    Args:
        model: The base model, which is restored afterwards.
        bank: A bank of one adapter.
        rows: Training rows of the adapter's task.
        pad_token: Id of the padding token.
        how: Parameters of the training.
        seed: Seed of the order of the rows.
        progress: Receiver of progress reports.

    Returns:
        The gate of each layer that the adapter targets, float32 (in,), on the CPU.

    Raises:
        MeteoraError: The loss is not finite.
        AdapterError: The adapter does not fit the model.
    """
    device = next(model.parameters()).device
    layers: dict[str, _Gate] = {}

    def gated(path: str, module: nn.Module, stack: Stack) -> nn.Module:
        layers[path] = _Gate(module, stack.A, stack.B, float(stack.scaling[0]))
        return layers[path]

    model.requires_grad_(False)
    remove = install(model, bank, gated)
    try:
        optimizer = torch.optim.AdamW([layer.gate for layer in layers.values()], lr=how.learning_rate, weight_decay=0.0)
        plan = plan_batches([[len(row) for row in rows]], how.steps, how.batch_size, seed)
        with progress.task(f"gates of {bank.names[0]}", total=len(plan), unit="steps") as bar:
            for picks in plan:
                batch = collate([rows[row] for _, row in picks], pad_token, response_only=True).to(device)
                with torch.enable_grad(), without_cudnn_attention():
                    loss = lm_losses(model, batch)[0] / max(1, count_targets(batch))
                    loss.backward()  # type: ignore[no-untyped-call]
                if not bool(loss.detach().isfinite()):
                    raise MeteoraError(f"the loss of the gates of {bank.names[0]} is not finite", hint="use --dtype float32")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                bar.update(1, loss=f"{float(loss.detach()):.3f}")
        return {path: layer.gate.detach().float().cpu() for path, layer in layers.items()}
    finally:
        remove()

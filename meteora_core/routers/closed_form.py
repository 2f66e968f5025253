"""MeteoRA's gates in closed form, over all adapters of the folder, without a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.bank import AdapterBank
from meteora_core.data.dataset_frames import row_end
from meteora_core.data.rows import read_rows
from meteora_core.data.tasks import Task
from meteora_core.evaluation.processes import Processes
from meteora_core.evaluation.router_models import RoutedModel
from meteora_core.fused.fuse import fuse_for_inference
from meteora_core.model.attach import attach, detach, set_trainable
from meteora_core.model.vocabulary import padding_token
from meteora_core.progress import Progress
from meteora_core.routers.folder import FolderRouter
from meteora_core.routing import meteora_of
from meteora_core.training.encoding import TrainRow, encode_rows
from meteora_core.training.ridge import RidgeOptions, ridge_gates

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 8_000
"""Number of tokens of each adapter's training rows from which the gates are computed. The last row is used as a whole, so there may be a few more."""

ANSWER_SHARE = 0.8
BATCH = 8
LONGEST = 1024


class ClosedForm(FolderRouter):
    """MeteoRA with gates from ridge regression (:func:`meteora_core.training.ridge.ridge_gates`) of each token's adapter on the input of each layer.

    Nothing is trained. The default top-k is 2. The seed determines the rows.
    """

    default_top_k = 2
    needs_rows = True

    def parameters(self) -> dict[str, Any]:
        """Top-k, and the parameters of the rows from which the gates are computed. As with a checkpoint, the task determines the routing temperature."""
        return {"top_k": self.top_k, "tokens": TOKENS, "answer_share": ANSWER_SHARE, "longest": LONGEST}

    def enter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Attach the adapters, and compute the gates from training rows. Raises AdapterError."""
        rows = [self._rows_of(index, name, tokenizer) for index, name in enumerate(self.names)]
        attach(model, AdapterBank.from_peft(self.folders), top_k=self.top_k, backend=self.plan.backend, init="zeros")
        self._model, self._remove = model, lambda: detach(model)
        flat = sorted((row for part in rows for row in part), key=len)
        batches = [flat[start : start + BATCH] for start in range(0, len(flat), BATCH)]
        ridge_gates(model, batches, padding_token(model, tokenizer), RidgeOptions(ANSWER_SHARE), progress=progress)
        set_trainable(model, "none")
        fuse_for_inference(model, self.plan.options.fuse)

    def _rows_of(self, index: int, name: str, tokenizer: PreTrainedTokenizerBase) -> list[TrainRow]:
        rows = read_rows(self.plan.data_dir, name, "train")
        random.Random(f"{self.seed}:{name}").shuffle(rows)
        chosen: list[TrainRow] = []
        tokens, end = 0, row_end(self.plan.data_dir, name, tokenizer)
        for start in range(0, len(rows), 64):
            for row in encode_rows(rows[start : start + 64], tokenizer, index, LONGEST, end).rows:
                if tokens >= TOKENS:
                    return chosen
                chosen.append(row)
                tokens += len(row)
        return chosen

    @contextmanager
    def ready(self, task: Task) -> Iterator[RoutedModel]:
        """Context manager that yields the model. Adapters that are removed for a task are muted."""
        state = meteora_of(self._model)
        state.mute(self.name.removed(task, self.names))
        try:
            yield RoutedModel(self._model)
        finally:
            state.mute(())

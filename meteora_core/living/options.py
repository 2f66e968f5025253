"""Options that :mod:`meteora_core.living.route` and :mod:`meteora_core.living.checkpoints` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from meteora_core.choices import SecondMoments
from meteora_core.model.base import BaseReference
from meteora_core.progress import SILENT, Progress
from meteora_core.training.statistics import TOKENS

if TYPE_CHECKING:
    from meteora_core.settings import Settings

ANSWER_SHARE = 0.8
"""Default share of an adapter's weight in its statistics that its answer tokens have together."""


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """Options for loading the base model and collecting the statistics of adapters.

    Attributes:
        data: Folder that contains all datasets.
        base: Base model; None for the one that the checkpoint, or most of the adapters, name.
        dtype: Data type of the model: "auto", "float32", "bfloat16" or "float16".
        device: Device of the model, such as "auto", "cpu" or "cuda:1".
        backend: Implementation of the sum over adapters, a name of ``meteora_kernels.BACKENDS``.
        tokens: Largest number of tokens per adapter for the statistics.
        answer_share: Share of an adapter's weight that its answer tokens have together, between 0 and 1; None to weight all tokens equally. Existing
            statistics take precedence when an adapter is added to a checkpoint.
        statistics: Form in which new statistics store second moments; see :func:`meteora_core.training.statistics.stored_form`.
        batch_size: Number of rows in one forward pass.
        max_length: Largest number of tokens of a row.
        seed: Random seed for the selection of rows.
        self_written: Whether adapters without rows and statistics write rows themselves (:mod:`meteora_core.living.self_written`).
        progress: Receiver of progress reports.
    """

    data: Path | None = None
    base: BaseReference | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    tokens: int = TOKENS
    answer_share: float | None = ANSWER_SHARE
    statistics: SecondMoments = "auto"
    batch_size: int = 8
    max_length: int = 1024
    seed: int = 42
    self_written: bool = False
    progress: Progress = SILENT

    @classmethod
    def from_settings(cls, settings: Settings, progress: Progress = SILENT) -> Self:
        """The options that the settings determine; ``base`` keeps its default, because the setting always has a value."""
        model, route = settings.model, settings.route
        return cls(
            data=settings.paths.data,
            dtype=model.dtype,
            device=model.device,
            backend=model.backend,
            tokens=route.tokens,
            answer_share=route.answer_share,
            statistics=route.statistics,
            batch_size=route.batch_size,
            max_length=route.max_length,
            seed=route.seed,
            progress=progress,
        )

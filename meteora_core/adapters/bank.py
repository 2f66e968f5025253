"""The bank: many adapters stacked into contiguous tensors, one stack per linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from meteora_core.adapters.misfits import Misfits
from meteora_core.adapters.peft_folder import Adapter, AdapterInfo, Claim, read_adapter
from meteora_core.adapters.stack import Stack, table
from meteora_core.errors import AdapterError, UsageError, did_you_mean
from meteora_core.fetch.hub_names import adapter_folder
from meteora_core.progress import SILENT, Progress


@dataclass(frozen=True)
class AdapterBank:
    """N adapters in a fixed order, stacked per linear layer.

    Attributes:
        adapters: The description of each adapter, in the order of their indices in gates and labels.
        modules: The stack of every linear layer that at least one adapter targets, by module path.
        claims: The requirements on the base model of the adapters that were read from folders.

    Example:
        >>> from meteora_core import AdapterBank
        >>> bank = AdapterBank.from_peft({"gsm8k": "adapters/gsm8k", "strategyqa": "adapters/strategyqa"})
        >>> bank.names
        ('gsm8k', 'strategyqa')
        >>> [adapter.rank for adapter in bank]
        [4, 8]
    """

    adapters: tuple[AdapterInfo, ...]
    modules: dict[str, Stack]
    claims: tuple[Claim, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in order."""
        return tuple(adapter.name for adapter in self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def __iter__(self) -> Iterator[AdapterInfo]:
        return iter(self.adapters)

    def index(self, name: str) -> int:
        """Return the index of adapter ``name``. Raises UsageError, with the closest name as a hint, if there is none."""
        if name not in self.names:
            raise UsageError(f"no adapter named {name!r} in the bank", hint=did_you_mean(name, self.names) or f"its adapters are: {', '.join(self.names)}")
        return self.names.index(name)

    @classmethod
    def from_peft(cls, folders: Mapping[str, str | Path], *, dtype: torch.dtype | None = None, progress: Progress = SILENT) -> AdapterBank:
        """Read PEFT LoRA folders and stack them. Ranks, alphas and target modules may differ between adapters.

        Args:
            folders: The folder of each adapter, or its id on the hub (``user/name`` or ``user/name@revision``), by the adapter's name, in the order of the
                bank.
            dtype: The dtype of the stacked tensors; None keeps the dtype of the files, or uses float32 if they differ.
            progress: The receiver of progress reports.

        Raises:
            AdapterError: Folders cannot be used, or two adapters have different shapes for a layer; the message names all such adapters, or the layer
                and the shapes.

        Example:
            >>> from meteora_core import AdapterBank
            >>> bank = AdapterBank.from_peft({"gsm8k": "adapters/gsm8k", "strategyqa": "adapters/strategyqa"})
            >>> len(bank), bank.index("strategyqa")
            (2, 1)
        """
        if not folders:
            raise AdapterError("no adapters given", hint="train some with `meteora train adapters --task NAME`")
        adapters, misfits = [], Misfits(list(folders))
        with progress.task("reading adapters", total=len(folders), unit="adapters") as task:
            for name, folder in folders.items():
                with misfits.of(name):
                    adapters.append(read_adapter(name, adapter_folder(folder)))
                task.update(1)
        misfits.refuse()
        return cls.stack(adapters, dtype=dtype)

    @classmethod
    def stack(cls, adapters: list[Adapter], *, dtype: torch.dtype | None = None) -> AdapterBank:
        """Stack adapters that were read already. Raises AdapterError if two of them have different shapes for a layer."""
        paths = sorted({path for adapter in adapters for path in adapter.modules}, key=natural_order)
        modules = {path: _stack_layer(path, adapters, dtype) for path in paths}
        claims = (Claim(adapter.info.name, adapter.config, adapter.copies, adapter.targeted()) for adapter in adapters if adapter.config)
        return cls(tuple(adapter.info for adapter in adapters), modules, tuple(claims))


def natural_order(path: str) -> tuple[tuple[int, int | str], ...]:
    """Return a sort key that orders layer paths by their numbers: ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in path.split("."))


def _stack_layer(path: str, adapters: list[Adapter], dtype: torch.dtype | None) -> Stack:
    present = [adapter for adapter in adapters if path in adapter.modules]
    first = present[0].modules[path]
    for adapter in present:
        weights = adapter.modules[path]
        if (weights.A.shape[1], weights.B.shape[0], weights.experts) != (first.A.shape[1], first.B.shape[0], first.experts):
            of = "" if weights.experts == first.experts == 1 else f" in {first.experts} and {weights.experts} experts"
            raise AdapterError(
                f"{path}: adapter {present[0].info.name!r} maps {first.A.shape[1]} to {first.B.shape[0]} features, "
                f"adapter {adapter.info.name!r} maps {weights.A.shape[1]} to {weights.B.shape[0]}{of}",
                hint="all adapters of a bank must be trained on the same base model",
            )
    dtypes = {tensor.dtype for adapter in present for tensor in (adapter.modules[path].A, adapter.modules[path].B)}
    dtype = dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32)
    layers = [adapter.modules.get(path) for adapter in adapters]
    return Stack(
        A=torch.cat([adapter.modules[path].A.to(dtype) for adapter in present]),
        B=torch.cat([adapter.modules[path].B.t().to(dtype) for adapter in present]).contiguous(),
        ranks=tuple(layer.A.shape[0] if layer else 0 for layer in layers),
        scaling=torch.tensor([layer.scaling if layer else 0.0 for layer in layers], dtype=torch.float32),
        shift=table([layer.shift if layer else None for layer in layers], first.B.shape[0]),
        pending={index: layer.pending for index, layer in enumerate(layers) if layer and layer.pending},
        experts=first.experts,
    )

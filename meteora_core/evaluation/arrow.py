"""PEFT's own Arrow routing over a folder of adapters: the training-free router that MeteoRA is compared with.

Arrow (arXiv 2405.11157) takes each adapter's leading right singular vector, layer by layer, as its prototype, and mixes for every token the
adapters whose prototypes its hidden state is most aligned with. Nothing is trained. The code that runs is PEFT's (``create_arrow_model``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.peft_folder import WEIGHTS, find_adapter
from meteora_core.errors import AdapterError, UsageError
from meteora_core.evaluation.adapters import check_adapter, peft_parts, read_for_base, remove_lora
from meteora_core.files import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.adapters.bank import AdapterBank

ARROW = "peft-arrow"
"""The model name that stands for it."""

TOP_K = 3
"""PEFT's default number of adapters a token."""


def arrow_top_k(asked: int | None, count: int) -> int:
    """Adapters per token: what was asked for, else PEFT's default, or all where there are fewer. Raises UsageError when it is out of range."""
    if asked is not None and not 1 <= asked <= count:
        raise UsageError(f"top_k is {asked}, but there are {count} adapters", hint=f"choose --top-k between 1 and {count}")
    return asked or min(TOP_K, count)


@contextmanager
def with_arrow(
    model: PreTrainedModel, folders: Mapping[str, Path], *, top_k: int | None = None, routing_temperature: float = 1.0, seed: int = 42
) -> Iterator[Any]:
    """Within the block, the base with PEFT's Arrow routing over the adapters, in the base's dtype; afterwards the base is as it was.

    Args:
        model: A base model without adapters.
        folders: Adapter name -> PEFT LoRA folder. Ranks and target modules must be the same in all of them, which is PEFT's condition.
        top_k: Adapters per token; None is PEFT's default.
        routing_temperature: T of the softmax over the chosen adapters.
        seed: Start of the power iteration that finds the prototypes.

    Yields:
        The PEFT model, in evaluation mode.

    Raises:
        AdapterError: A folder is missing, does not fit the base, or the adapters differ in rank or targets.
        UsageError: ``top_k`` is out of range.
    """
    from peft import ArrowConfig, create_arrow_model

    banks = [read_for_base(folder, model) for folder in folders.values()]
    config = ArrowConfig(top_k=arrow_top_k(top_k, len(folders)), router_temperature=routing_temperature, rng_seed=seed)
    had_none = set(dict(model.named_modules()))
    try:
        with warnings.catch_warnings(), TemporaryDirectory(prefix="meteora-arrow-") as temporary:
            warnings.simplefilter("ignore")
            checked = [_write(bank, Path(temporary) / str(place)) for place, bank in enumerate(banks)]
            del banks
            adapted = create_arrow_model(model, checked, config, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, OSError) as error:
        remove_lora(model, had_none)
        text = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), str(error).strip().splitlines()[0])
        raise AdapterError(f"PEFT's Arrow cannot route over these adapters: {text}", hint="it needs one base model, one rank and one set of targets") from error
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        model.eval()


def _write(bank: AdapterBank, folder: Path) -> str:
    """A bank of one adapter as the PEFT folder that PEFT's Arrow reads: the checked weights, and a configuration without patterns of others."""
    from safetensors.torch import save_file

    config, state = peft_parts(bank)
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS)
    return str(folder)


class ArrowRouter:
    """Arrow over every adapter of a folder, for an evaluation of several tasks: it stays in the model until it is told to leave.

    Args:
        adapters_dir: The adapter folders; those of several tasks (``--balanced``) are left out.
        top_k, routing_temperature, seed: As for :func:`with_arrow`.

    Attributes:
        model, tokenizer: While it is in a model: that model with the adapters, and its tokenizer.
    """

    def __init__(self, adapters_dir: Path, top_k: int | None, routing_temperature: float, seed: int) -> None:
        self.adapters_dir, self.top_k, self.routing_temperature, self.seed = adapters_dir, top_k, routing_temperature, seed
        self.folders: dict[str, Path] = {}
        self.model: Any = None
        self.tokenizer: Any = None
        self._inside = ExitStack()

    def prepare(self) -> None:
        """Find and check the adapters. Raises AdapterError, UsageError."""
        from meteora_core.adapters.folders import adapter_folders

        self.folders = adapter_folders(self.adapters_dir, [])
        for folder in self.folders.values():
            check_adapter(folder)
        arrow_top_k(self.top_k, len(self.folders))

    def hashes(self) -> dict[str, str]:
        """Adapter -> SHA-256 of its weights."""
        return {name: sha256((find_adapter(folder) or folder) / WEIGHTS) for name, folder in self.folders.items()}

    def enter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the adapters into a base model. Raises AdapterError."""
        made = with_arrow(model, self.folders, top_k=self.top_k, routing_temperature=self.routing_temperature, seed=self.seed)
        self.model, self.tokenizer = self._inside.enter_context(made), tokenizer

    def leave(self) -> None:
        """Take them out again, if they are in."""
        self._inside.close()
        self.model = self.tokenizer = None

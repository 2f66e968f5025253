"""Evaluation with PEFT's Arrow routing over a folder of adapters, the training-free method that MeteoRA is compared with.

In every layer, Arrow (arXiv 2405.11157) uses each adapter's leading right singular vector as its prototype. For every token it mixes the adapters whose
prototypes are most aligned with the token's hidden state. The implementation is PEFT's (``create_arrow_model``).
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
from meteora_core.evaluation.adapters import check_adapter, read_for_base, remove_lora
from meteora_core.exports.peft_adapter import peft_parts
from meteora_core.files import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.adapters.bank import AdapterBank

ARROW = "peft-arrow"
"""Model name for Arrow routing."""

TOP_K = 3
"""PEFT's default number of adapters per token."""


def arrow_top_k(top_k: int | None, count: int) -> int:
    """The number of adapters per token.

    Args:
        top_k: Number that the user chose; None means PEFT's default, or all adapters if there are fewer.
        count: Number of adapters.

    Raises:
        UsageError: ``top_k`` is not between 1 and ``count``.
    """
    if top_k is not None and not 1 <= top_k <= count:
        raise UsageError(f"top_k is {top_k}, but there are {count} adapters", hint=f"choose --top-k between 1 and {count}")
    return top_k or min(TOP_K, count)


@contextmanager
def with_arrow(
    model: PreTrainedModel, folders: Mapping[str, Path], *, top_k: int | None = None, routing_temperature: float = 1.0, seed: int = 42
) -> Iterator[Any]:
    """Context manager in which the base model has PEFT's Arrow routing over several adapters, in the base model's dtype. It is removed afterwards.

    Args:
        model: A base model without adapters.
        folders: Folders of LoRA adapters by name. PEFT requires equal ranks and target modules in all of them.
        top_k: Number of adapters per token; None means PEFT's default.
        routing_temperature: Routing temperature; divides the scores of the chosen adapters before the softmax.
        seed: Seed of the power iteration that computes the prototypes.

    Yields:
        The PEFT model in evaluation mode.

    Raises:
        AdapterError: A folder is missing, does not fit the base, or the adapters differ in rank or targets.
        UsageError: ``top_k`` is out of range.
    """
    from peft import ArrowConfig, create_arrow_model

    banks = [read_for_base(folder, model) for folder in folders.values()]
    for name, bank in zip(folders, banks, strict=True):
        if any(stack.pending or stack.shift is not None or stack.experts > 1 for stack in bank.modules.values()):
            raise AdapterError(f"PEFT's Arrow takes plain LoRA adapters only, and {name!r} has more", hint=f"move {name} out of the folder of adapters")
    config = ArrowConfig(top_k=arrow_top_k(top_k, len(folders)), router_temperature=routing_temperature, rng_seed=seed)
    base_modules = set(dict(model.named_modules()))
    try:
        with warnings.catch_warnings(), TemporaryDirectory(prefix="meteora-arrow-") as temporary:
            warnings.simplefilter("ignore")
            checked = [_write(bank, Path(temporary) / str(index)) for index, bank in enumerate(banks)]
            del banks
            adapted = create_arrow_model(model, checked, config, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, OSError) as error:
        remove_lora(model, base_modules)
        text = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), str(error).strip().splitlines()[0])
        hint = "Arrow needs adapters with the same base model, rank and target modules"
        raise AdapterError(f"PEFT's Arrow cannot route over these adapters: {text}", hint=hint) from error
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        model.eval()


def _write(bank: AdapterBank, folder: Path) -> str:
    """Write a bank of one adapter as a folder for PEFT's Arrow, with the checked weights and a configuration of exact module names. Returns the folder."""
    from safetensors.torch import save_file

    config, state = peft_parts(bank)
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS)
    return str(folder)


class ArrowRouter:
    """Arrow routing over all adapters of a folder, which stays in the model over several tasks until :meth:`leave` removes it.

    Args:
        adapters_dir: Folder of the adapter folders. Adapters of several tasks (``--balanced``) are left out.
        top_k, routing_temperature, seed: Arguments of :func:`with_arrow`.

    Attributes:
        model: The model with the adapters; None while they are in no model.
        tokenizer: The model's tokenizer; None while the adapters are in no model.
    """

    def __init__(self, adapters_dir: Path, top_k: int | None, routing_temperature: float, seed: int) -> None:
        self.adapters_dir, self.top_k, self.routing_temperature, self.seed = adapters_dir, top_k, routing_temperature, seed
        self.folders: dict[str, Path] = {}
        self.model: Any = None
        self.tokenizer: Any = None
        self._context = ExitStack()

    def prepare(self) -> None:
        """Find and check the adapters. Raises AdapterError or UsageError."""
        from meteora_core.adapters.folders import adapter_folders

        self.folders = adapter_folders(self.adapters_dir, [])
        for folder in self.folders.values():
            check_adapter(folder)
        arrow_top_k(self.top_k, len(self.folders))

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each adapter's weights, by name."""
        return {name: sha256((find_adapter(folder) or folder) / WEIGHTS) for name, folder in self.folders.items()}

    def enter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Put the adapters into a base model. Raises AdapterError."""
        context = with_arrow(model, self.folders, top_k=self.top_k, routing_temperature=self.routing_temperature, seed=self.seed)
        self.model, self.tokenizer = self._context.enter_context(context), tokenizer

    def leave(self) -> None:
        """Remove the adapters from the model, if they are in one."""
        self._context.close()
        self.model = self.tokenizer = None

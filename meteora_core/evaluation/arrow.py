"""Evaluation with PEFT's Arrow routing over a folder of adapters, the training-free method that MeteoRA is compared with.

In every layer, Arrow (arXiv 2405.11157) uses each adapter's leading right singular vector as its prototype. For every token it mixes the adapters whose
prototypes are most aligned with the token's hidden state. The implementation is PEFT's (``create_arrow_model``), which wants one rank for all adapters and
layers. Adapters of lower rank get rows of zeros, which change neither their updates nor their prototypes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from meteora_core.adapters.folders import adapter_folders
from meteora_core.adapters.peft_folder import WEIGHTS, find_adapter
from meteora_core.data.tasks import Task
from meteora_core.errors import AdapterError, UsageError
from meteora_core.evaluation.adapters import check_adapter, read_for_base, remove_lora
from meteora_core.evaluation.processes import Processes
from meteora_core.evaluation.router_models import RoutedModel
from meteora_core.evaluation.router_names import RouterName
from meteora_core.exports.peft_adapter import peft_parts
from meteora_core.files import sha256
from meteora_core.progress import Progress

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
        folders: Folders of LoRA adapters by name. PEFT requires equal target modules in all of them.
        top_k: Number of adapters per token; None means PEFT's default.
        routing_temperature: Routing temperature; divides the scores of the chosen adapters before the softmax.
        seed: Seed of the power iteration that computes the prototypes.

    Yields:
        The PEFT model in evaluation mode.

    Raises:
        AdapterError: A folder is missing, does not fit the base, or the adapters differ in their target modules.
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
            rank = max(stack.ranks[0] for bank in banks for stack in bank.modules.values())
            checked = [_write(_padded(bank, rank), Path(temporary) / str(index)) for index, bank in enumerate(banks)]
            del banks
            adapted = create_arrow_model(model, checked, config, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, OSError) as error:
        remove_lora(model, base_modules)
        text = next((line.strip() for line in str(error).splitlines() if "mismatch" in line), str(error).strip().splitlines()[0])
        hint = "Arrow needs adapters with the same base model and target modules"
        raise AdapterError(f"PEFT's Arrow cannot route over these adapters: {text}", hint=hint) from error
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        model.eval()


def _padded(bank: AdapterBank, rank: int) -> AdapterBank:
    """Return a bank of one adapter that has the same rank in all layers: rows of zeros are appended to A and B."""
    modules = dict(bank.modules)
    for path, stack in bank.modules.items():
        if missing := rank - stack.ranks[0]:
            A, B = (F.pad(rows, (0, 0, 0, missing)) for rows in (stack.A, stack.B))
            modules[path] = replace(stack, A=A, B=B, ranks=(rank,))
    return replace(bank, modules=modules)


def _write(bank: AdapterBank, folder: Path) -> str:
    """Write a bank of one adapter as a folder for PEFT's Arrow, with the checked weights and a configuration of exact module names. Returns the folder."""
    from safetensors.torch import save_file

    config, state = peft_parts(bank)
    config.save_pretrained(folder)
    save_file(state, folder / WEIGHTS)
    return str(folder)


class ArrowRouter:
    """Arrow routing over all adapters of a folder (Ostapenko et al., arXiv 2405.11157), a :class:`meteora_core.evaluation.router_models.Router`.

    Args:
        name: Name of the router, with its seed.
        adapters_dir: Folder of the adapter folders. Adapters of several tasks (``--balanced``) are left out.
        top_k, routing_temperature, seed: Arguments of :func:`with_arrow`; the name's seed, if any, takes precedence.
    """

    def __init__(self, name: RouterName, adapters_dir: Path, top_k: int | None, routing_temperature: float, seed: int) -> None:
        self.name, self.adapters_dir, self.top_k, self.routing_temperature = name, adapters_dir, top_k, routing_temperature
        self.seed = seed if name.seed is None else name.seed
        self.folders: dict[str, Path] = {}
        self._base: PreTrainedModel | None = None
        self._present: tuple[str, ...] = ()
        self._model: Any = None
        self._context = ExitStack()

    def prepare(self, tasks: Sequence[Task]) -> None:
        """Find and check the adapters. Raises AdapterError or UsageError."""
        self.folders = checked_folders(self.adapters_dir)
        fewest = fewest_left(self.name, tasks, tuple(self.folders))
        arrow_top_k(self.top_k, fewest)

    def evaluates(self, task: Task) -> bool:
        """True."""
        return True

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of each adapter's weights, by name."""
        return hashes_of(self.folders)

    def facts(self) -> dict[str, Any]:
        """The parameters of Arrow, and the hashes of the adapters."""
        return {
            "method": "arrow",
            "without_asked": self.name.without_asked,
            "top_k": self.top_k or TOP_K,
            "temperature": self.routing_temperature,
            "seed": self.seed,
            "adapters": self.hashes(),
        }

    def enter(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress, processes: Processes) -> None:
        """Keep the base model, into which :meth:`ready` puts the adapters."""
        self._base = model

    @contextmanager
    def ready(self, task: Task) -> Iterator[RoutedModel]:
        """Context manager that yields the model with the adapters that a task may use. They stay in the model afterwards. Raises AdapterError."""
        assert self._base is not None
        removed = self.name.removed(task, self.folders)
        present = tuple(name for name in self.folders if name not in removed)
        if present != self._present:
            self._context.close()
            folders = {name: self.folders[name] for name in present}
            context = with_arrow(self._base, folders, top_k=self.top_k, routing_temperature=self.routing_temperature, seed=self.seed)
            self._model, self._present = self._context.enter_context(context), present
        yield RoutedModel(self._model)

    def leave(self) -> None:
        """Remove the adapters from the model, if they are in one."""
        self._context.close()
        self._base, self._model, self._present = None, None, ()


def checked_folders(adapters_dir: Path) -> dict[str, Path]:
    """The folders of all adapters of single tasks, by name, each checked. Raises AdapterError or UsageError."""
    folders = adapter_folders(adapters_dir, [])
    for folder in folders.values():
        check_adapter(folder)
    return folders


def hashes_of(folders: Mapping[str, Path]) -> dict[str, str]:
    """The SHA-256 of each adapter's weights, by name."""
    return {name: sha256((find_adapter(folder) or folder) / WEIGHTS) for name, folder in folders.items()}


def fewest_left(router: RouterName, tasks: Sequence[Task], names: Sequence[str]) -> int:
    """The smallest number of adapters that a router has for one of the tasks. Raises UsageError if none is left for a task."""
    fewest = len(names)
    for task in tasks:
        left = len(names) - len(router.removed(task, names))
        if not left:
            raise UsageError(f"no adapter is left for {task.name} without those that are asked", hint="add adapters of other tasks, or leave out this task")
        fewest = min(fewest, left)
    return fewest

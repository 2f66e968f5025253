"""Evaluation of a single adapter with PEFT, as a comparison for MeteoRA.

The folder is read by :func:`meteora_core.adapters.peft_folder.read_adapter`, as for a bank. PEFT receives the checked weights under the exact names of the
base model's modules, without the folder's patterns. So everything that a bank refuses is refused, and no weight is silently left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.magnitudes import check_stack
from meteora_core.adapters.peft_folder import find_adapter, read_adapter
from meteora_core.errors import AdapterError
from meteora_core.exports.peft_adapter import peft_parts
from meteora_core.reading import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_IN_A_BANK = "train gates over it, and evaluate with --model meteora"


def check_adapter(folder: Path) -> None:
    """Run all checks of an adapter's configuration and weights that need no base model.

    Raises:
        AdapterError: The adapter is missing or broken, is of an unsupported kind, or has weights that are not finite.
    """
    if find_adapter(folder) is None:
        raise AdapterError(f"no adapter at {folder}", hint="train it with `meteora train adapters --task NAME`, or correct the path")
    read_adapter(folder.name, folder)


def read_for_base(folder: Path, model: PreTrainedModel) -> AdapterBank:
    """Read a folder as a bank of one adapter, fitted to a base model.

    Raises:
        AdapterError: The folder is missing or broken, or the adapter does not fit the base.
    """
    from meteora_core.model.attach import computing_dtype, find_targets

    try:
        bank, _ = fit_to_base(AdapterBank.from_peft({folder.name: folder}), model)
        targets = find_targets(model, bank)
    except AdapterError as error:
        raise AdapterError(f"the adapter {folder} does not fit this base model: {error.message}", hint=error.hint) from error
    for path, module in targets.items():
        check_stack(path, bank.modules[path], bank.names, computing_dtype(module, bank.modules[path]))
    return bank


def remove_lora(model: PreTrainedModel, names: set[str]) -> None:
    """Remove the LoRA layers that a failed attempt has put in place of the modules ``names``, and set the model to evaluation mode."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer) and path in names:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], module.get_base_layer())
    model.eval()


def _kept(model: PreTrainedModel, bank: AdapterBank) -> Callable[[], None]:
    """Keep the modules and biases that PEFT replaces for a bank of one adapter, and return a function that puts them back."""
    parts = {path: stack.pending[0] for path, stack in bank.modules.items() if stack.pending}
    modules = {path: model.get_submodule(path) for path, part in parts.items() if part.whole}
    biased = [model.get_submodule(path) for path, part in parts.items() if part.bias is not None and not part.whole]
    biases = [(bias, bias.detach().clone()) for module in biased if isinstance(bias := module.bias, Tensor)]

    def restore() -> None:
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
        with torch.no_grad():
            for bias, before in biases:
                bias.copy_(before)

    return restore


@contextmanager
def with_adapter(model: PreTrainedModel, folder: Path) -> Iterator[Any]:
    """Context manager in which the base model has one un-merged PEFT adapter, in the base model's dtype. It is removed afterwards.

    Args:
        model: A base model without adapters.
        folder: Folder of a LoRA adapter, as PEFT saves it.

    Yields:
        The PEFT model in evaluation mode.

    Raises:
        AdapterError: The folder is missing or broken, or the adapter does not fit the base.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    if find_adapter(folder) is None:
        raise AdapterError(f"no adapter at {folder}", hint="train it with `meteora train adapters --task NAME`, or correct the path")
    bank = read_for_base(folder, model)
    config, state = peft_parts(bank)
    adapted, names = None, set(dict(model.named_modules()))
    restore = _kept(model, bank)
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
            loaded = set_peft_model_state_dict(adapted, state)
        except (RuntimeError, ValueError) as error:
            raise AdapterError(f"PEFT cannot put the adapter {folder} onto this base model: {first_line(error)}", hint=_IN_A_BANK) from error
        unmatched = [key for key in loaded.missing_keys if ".lora_" in key] + list(loaded.unexpected_keys)
        if unmatched:
            raise AdapterError(f"PEFT cannot put the adapter {folder} onto this base model: it has no layer for {unmatched[0]}", hint=_IN_A_BANK)
        yield adapted.eval()
    finally:
        if adapted is None:
            remove_lora(model, names)
        else:
            adapted.unload()
        restore()

"""Checks that adapters fit a base model: their modules exist, every target has weights, and stored base tensors are those of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.config import CONFIG
from meteora_core.adapters.misfits import Misfits
from meteora_core.adapters.peft_folder import BaseCopy, Claim
from meteora_core.errors import AdapterError, CheckpointError
from meteora_core.tensor_files import TensorFiles
from meteora_core.tensors import is_quantized
from meteora_core.text import listed

if TYPE_CHECKING:
    from meteora_core.adapters.bank import AdapterBank

OTHER_BASE = "the adapters were trained on another base model"
_EXPERT = re.compile(r"^.+\.experts\.\d+\.")


def fit_to_base(bank: AdapterBank, model: nn.Module) -> tuple[AdapterBank, dict[str, str]]:
    """Check a bank against its base model, and return it with the model's names of its modules.

    Modules that were renamed since an adapter was trained (``language_model.model.layers`` became ``model.language_model.layers``) are matched by
    transformers' table of renamings, which PEFT uses too.

    Args:
        bank: The bank of adapters.
        model: The base model, without adapters.

    Returns:
        The bank, and the new name of each module whose name changed, by its old name.

    Raises:
        AdapterError: A module is not in the model; an adapter has no weights for a module that its configuration targets; or a base tensor that was
            saved with the adapter differs from the model's.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    known |= {name for name, parameter in model.named_parameters() if parameter.ndim == 3}
    unknown = [path for path in bank.modules if path not in known]
    renamed = _renamed(model, unknown) if unknown else {}
    renamed = {old: new for old, new in renamed.items() if new in known and new not in bank.modules}
    if len(set(renamed.values())) != len(renamed):
        renamed = {}
    if absent := [path for path in unknown if path not in renamed]:
        raise AdapterError(f"the adapters target {listed(absent)}, which {type(model).__name__} does not have", hint=_why_absent(absent[0], known))
    if renamed:
        bank = replace(bank, modules={renamed.get(path, path): stack for path, stack in bank.modules.items()})
    misfits = Misfits(bank.names)
    for claim in bank.claims:
        with misfits.of(claim.name):
            _check_targets(claim, model, renamed)
            for copy in claim.copies:
                path = renamed.get(copy.path, copy.path)
                if path not in known:
                    raise AdapterError(f"adapter {claim.name!r} holds weights of {path}, which {type(model).__name__} does not have", hint=OTHER_BASE)
                _check_copy(claim.name, copy, model.get_submodule(path))
    misfits.refuse()
    return bank, renamed


def _renamed(model: nn.Module, paths: list[str]) -> dict[str, str]:
    """Return the new names of the paths that transformers' table for checkpoints of earlier versions renames."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return {}
    if not isinstance(model, PreTrainedModel):
        return {}
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming) and hasattr(entry, "rename_source_key")]
    names = {}
    for path in paths:
        key = f"{path}.weight"
        for entry in renamings:
            key = entry.rename_source_key(key)[0]
        if (new := key.removesuffix(".weight")) != path:
            names[path] = new
    return names


def _why_absent(path: str, known: set[str]) -> str:
    if _EXPERT.match(path) and any(name.endswith(".experts") for name in known):
        return "it holds its experts in one fused tensor, and only linear layers can be adapted; leave the experts out of target_modules"
    tail = path.split("layers.", 1)[-1]
    if other := next((name for name in sorted(known) if tail != path and name.endswith(f"layers.{tail}")), None):
        return f"it calls such a module {other}: rename the adapter's tensors, or load the model with the class that it was trained with"
    return OTHER_BASE


def _check_targets(claim: Claim, model: nn.Module, renamed: Mapping[str, str]) -> None:
    """Refuse an adapter without weights for a module that its configuration targets, and one with weights for a module that it does not target.

    PEFT would silently run the former module without the adapter, and ignore the latter weights.
    """
    if claim.config is None:
        return
    have = {renamed.get(path, path) for path in claim.paths}
    old = {new: path for path, new in renamed.items()}
    modules = {name: module for name, module in model.named_modules() if _adaptable(module)}
    names = {**{name: name for name in modules}, **{old[name]: name for name in modules if name in old}}
    head = _head(model)
    every_linear = {name for name, now in names.items() if not isinstance(modules[now], nn.Embedding) and modules[now] is not head}
    wanted = claim.config.targets(names, every_linear)
    if missing := sorted({renamed.get(path, path) for path in wanted} - have):
        raise AdapterError(
            f"adapter {claim.name!r} has no weights for {listed(missing)}, which target_modules in its {CONFIG} names",
            hint="copy or download the adapter again; if it was trained without these modules, list them in exclude_modules there",
        )
    named = {renamed.get(path, path) for path in claim.config.targets({*claim.paths, *have}, every_linear)}
    if claim.config.target_modules and (extra := sorted(have - named)):
        raise AdapterError(
            f"adapter {claim.name!r} has weights for {listed(extra)}, which target_modules in its {CONFIG} does not name",
            hint="restore the adapter_config.json that was saved with the weights",
        )


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).__name__ == "Conv1D"


def _head(model: Any) -> nn.Module | None:
    """Return the output layer of the model, if it has one."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _check_copy(name: str, copy: BaseCopy, module: nn.Module) -> None:
    """Refuse an adapter whose copy of a base tensor differs from the base model's: it was trained on a changed base model."""
    own = getattr(module, "weight", None)
    if not isinstance(own, Tensor) or is_quantized(own) or own.is_meta:
        return
    try:
        saved = TensorFiles(copy.entry.file).read(copy.key)
    except CheckpointError as broken:
        raise AdapterError(f"adapter {name!r}: {broken.message}", hint=broken.hint) from broken
    if copy.rows is not None and max(copy.rows, default=0) < len(own):
        own = own[list(copy.rows)]
    if saved.is_floating_point() and saved.shape == own.shape and _same(own.detach().cpu(), saved):
        return
    if copy.rows is not None:
        raise AdapterError(
            f"adapter {name!r} trained the embeddings of {len(copy.rows)} tokens ({copy.path}), which are computed before any gate could choose",
            hint="train it without trainable_token_indices, or put these embeddings into the base model, save that, and attach to it",
        )
    if saved.ndim == own.ndim == 2 and saved.shape[1] == own.shape[1] and len(saved) != len(own):
        raise AdapterError(
            f"adapter {name!r} was trained with {len(saved)} rows in {copy.path}, and the base model has {len(own)}: its vocabulary was resized",
            hint="resize the base model, put the trained rows into it, save it with save_pretrained, and attach to the saved model",
        )
    raise AdapterError(
        f"adapter {name!r} holds a {copy.path}.weight that differs from the base model's: it was trained on a changed base model",
        hint="use the base model that it was trained on",
    )


def _same(own: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are equal, or one is the other rounded to its dtype; tensors of two 16-bit dtypes may differ by rounding errors."""
    if own.dtype == theirs.dtype:
        return torch.equal(own, theirs)
    if own.dtype.itemsize == theirs.dtype.itemsize:
        return bool(torch.allclose(own.float(), theirs.float(), rtol=1e-2, atol=1e-6))
    narrow = own.dtype if own.dtype.itemsize < theirs.dtype.itemsize else theirs.dtype
    return torch.equal(own.to(narrow), theirs.to(narrow))

"""Writes one adapter of a checkpoint as a PEFT folder."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.base_route import is_base_route
from meteora_core.adapters.config import WEIGHTS
from meteora_core.adapters.folders import INFO_FILE
from meteora_core.adapters.joining import alone
from meteora_core.adapters.stack import Pending, Stack
from meteora_core.adapters.tensor_names import nested_name
from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native import read_checkpoint
from meteora_core.errors import UsageError
from meteora_core.exports.common import Exported, ExportOptions, check_export
from meteora_core.files import atomic_folder, save_tensors
from meteora_core.json_files import write_json
from meteora_core.model.base import BaseReference, load_base
from meteora_core.model.linears import bias_of, plain_weight

_PREFIX = "base_model.model."


def export_adapter(checkpoint: str | Path, folder: str | Path, name: str, options: ExportOptions = ExportOptions()) -> Exported:
    """Write one adapter of a checkpoint as a folder that ``PeftModel.from_pretrained`` loads, with equal outputs.

    The base model is read only for DoRA adapters that the checkpoint contains: their magnitudes are computed from its weights.

    The configuration names every adapted module in full, with its rank and alpha, so that no module is adapted that was not before. The prompt frame
    of the adapter, if it is known, is recorded in ``meteora_training.json``.

    Args:
        checkpoint: A native checkpoint.
        folder: The PEFT folder to write.
        name: The name of the adapter in the checkpoint.
        options: The options of the export.

    Raises:
        UsageError: There is no such adapter, it is the base route, or the folder exists.
        CheckpointError: The checkpoint is broken, or an adapter is not the one that the gates were trained with.
        StorageError: The folder cannot be written.

    Example:
        >>> from meteora_core.exports.peft_adapter import export_adapter
        >>> export_adapter("runs/mine", "gsm8k-peft", "gsm8k").files
        ('adapter_config.json', 'adapter_model.safetensors')
    """
    folder = Path(folder)
    checkpoint = checkpoint_folder(checkpoint, progress=options.progress)
    check_export(checkpoint, folder, overwrite=options.overwrite)
    config, _, bank = read_checkpoint(checkpoint, options.adapters_dir, options.progress)
    bank = alone(bank, name)
    if is_base_route(bank.adapters[0]):
        raise UsageError(f"{name!r} is the base route, which has no weights", hint="choose an adapter")
    base = options.base or config["base"]["name"]
    if any(stack.scale is not None for stack in bank.modules.values()):
        revision = config["base"].get("revision") if options.base is None else None
        bank = unresolved(bank, load_base(BaseReference(base, revision), progress=options.progress))
    with atomic_folder(folder) as temporary:
        write_peft(temporary, bank, base, config["base"].get("revision") if options.base is None else None)
    return Exported.of_folder(folder, "peft", name)


def unresolved(bank: AdapterBank, model: nn.Module) -> AdapterBank:
    """Return a bank of one adapter with DoRA magnitudes instead of factors, which need the weights of the base model.

    Args:
        bank: A bank of one adapter that was embedded in a checkpoint.
        model: The base model.
    """
    modules = dict(bank.modules)
    for path, stack in bank.modules.items():
        if stack.scale is None:
            continue
        module = model.get_submodule(path)
        W, factor = plain_weight(module, path).cpu().float(), 1 + stack.scale[0]
        B, bias = stack.B.float() / factor, None
        norm = torch.linalg.vector_norm(torch.addmm(W, B.t(), stack.A.float(), alpha=float(stack.scaling[0])), dim=1)
        if stack.shift is not None:
            own = bias_of(module, path)
            bias = stack.shift[0] + (0 if own is None else own.cpu().float())
        modules[path] = replace(stack, B=B.to(stack.B.dtype), scale=None, shift=None, pending={0: Pending(factor * norm, bias)})
    return replace(bank, modules=modules)


def write_peft(folder: Path, bank: AdapterBank, base: str, revision: str | None = None) -> None:
    """Write a bank of one adapter as a PEFT folder. Raises StorageError.

    Args:
        folder: An existing folder.
        bank: The bank, with the base model's names of its modules.
        base: The name of the base model.
        revision: The revision of the base model on the hub.
    """
    (info,) = bank.adapters
    config, tensors = peft_parts(bank)
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.save_pretrained(folder)
    save_tensors(tensors, folder / WEIGHTS)
    if info.frame is not None:
        write_json(folder / INFO_FILE, {"frame": info.frame.to_json()})


def peft_parts(bank: AdapterBank) -> tuple[Any, dict[str, Tensor]]:
    """Return PEFT's configuration of a bank of one adapter, and its tensors by their names in PEFT's files.

    The configuration has the exact name, rank and alpha of every module.

    Args:
        bank: The bank. The parts of its stacks that depend on the base model are still pending; see :func:`unresolved`.
    """
    from peft import LoraConfig

    (info,) = bank.adapters
    lora = {path: stack for path, stack in bank.modules.items() if not _part(stack).whole}
    whole = sorted(bank.modules.keys() - lora.keys())
    ranks = {path: stack.ranks[0] // stack.experts for path, stack in lora.items()}
    alphas = {path: _alpha(float(stack.scaling[0]), ranks[path], rslora=info.rslora) for path, stack in lora.items()}
    rank, alpha = _most_common(ranks, 8), _most_common(alphas, 8)
    parts = [_part(stack) for stack in lora.values()]
    experts = sorted(path for path, stack in lora.items() if stack.experts > 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            rank_pattern={_exactly(paths): value for value, paths in _by_value(ranks).items() if value != rank},
            alpha_pattern={_exactly(paths): value for value, paths in _by_value(alphas).items() if value != alpha},
            use_rslora=info.rslora,
            use_dora=any(part.magnitude is not None for part in parts),
            lora_bias=any(stack.shift is not None for stack in lora.values()),
            bias="lora_only" if any(part.bias is not None for part in parts) else "none",
            lora_dropout=info.dropout,
            target_modules=sorted(lora.keys() - set(experts)),
            target_parameters=experts or None,
            modules_to_save=whole or None,
            task_type="CAUSAL_LM",
        )
    tensors: dict[str, Tensor] = {}
    for path, stack in bank.modules.items():
        biased = bool(config.lora_bias) and path in lora
        tensors |= _tensors(path, replace(stack, shift=torch.zeros(1, stack.out_features)) if biased and stack.shift is None else stack, experts)
    return config, tensors


def _tensors(path: str, stack: Stack, experts: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of one layer by their names in PEFT's files."""
    part, at = _part(stack), _PREFIX + path
    if part.whole:
        return {f"{at}.weight": stack.B.t().contiguous(), **({} if part.bias is None else {f"{at}.bias": part.bias})}
    B = stack.B.t()
    if stack.experts > 1:
        B = B.reshape(len(B), stack.experts, -1).transpose(1, 2).reshape(len(B), -1)
        at = _PREFIX + nested_name(path, experts)
    tensors = {f"{at}.lora_A.weight": stack.A.contiguous(), f"{at}.lora_B.weight": B.contiguous()}
    if part.magnitude is not None:
        tensors[f"{at}.lora_magnitude_vector"] = part.magnitude
    if part.bias is not None:
        tensors[f"{at}.base_layer.bias"] = part.bias
    if stack.shift is not None:
        tensors[f"{at}.lora_B.bias"] = (stack.shift[0] / stack.scaling[0]).to(stack.B.dtype)
    return tensors


def _part(stack: Stack) -> Pending:
    return stack.pending.get(0, Pending())


def _by_value(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Return the keys of each value."""
    groups: dict[Any, list[str]] = {}
    for key, value in values.items():
        groups.setdefault(value, []).append(key)
    return groups


def _exactly(paths: list[str]) -> str:
    """Return a key of rank_pattern or alpha_pattern that matches exactly these modules."""
    return f"^(?:{'|'.join(re.escape(path) for path in paths)})"


def _alpha(scaling: float, rank: int, *, rslora: bool) -> float:
    """Return the alpha of a scaling, as a whole number if it is one."""
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha


def _most_common(values: Mapping[str, Any], default: Any) -> Any:
    return Counter(values.values()).most_common(1)[0][0] if values else default

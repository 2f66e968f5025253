"""Writes one adapter of a checkpoint as a PEFT folder."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.config import WEIGHTS
from meteora_core.adapters.folders import INFO_FILE
from meteora_core.adapters.joining import alone
from meteora_core.adapters.peft_folder import AdapterInfo
from meteora_core.adapters.stack import Stack
from meteora_core.checkpoints.native import read_checkpoint
from meteora_core.exports.common import Exported, ExportOptions, check_export
from meteora_core.files import atomic_folder, save_tensors
from meteora_core.json_files import write_json

_PREFIX = "base_model.model."


def export_adapter(checkpoint: str | Path, folder: str | Path, name: str, options: ExportOptions = ExportOptions()) -> Exported:
    """Write one adapter of a checkpoint as a folder that ``PeftModel.from_pretrained`` loads, with equal outputs. The base model is not read.

    The configuration names every adapted module in full, with its rank and alpha, so that no module is adapted that was not before. The prompt frame
    of the adapter, if it is known, is recorded in ``meteora_training.json``.

    Args:
        checkpoint: A native checkpoint.
        folder: The PEFT folder to write.
        name: The name of the adapter in the checkpoint.
        options: The options of the export.

    Raises:
        UsageError: There is no such adapter, or the folder exists.
        CheckpointError: The checkpoint is broken, or an adapter is not the one that the gates were trained with.
        StorageError: The folder cannot be written.

    Example:
        >>> from meteora_core.exports.peft_adapter import export_adapter
        >>> export_adapter("runs/mine", "gsm8k-peft", "gsm8k").files
        ('adapter_config.json', 'adapter_model.safetensors')
    """
    folder = Path(folder)
    check_export(checkpoint, folder, overwrite=options.overwrite)
    config, _, bank = read_checkpoint(checkpoint, options.adapters_dir, options.progress)
    bank = alone(bank, name)
    base = options.base or config["base"]["name"]
    with atomic_folder(folder) as temporary:
        write_peft(temporary, bank, base, config["base"].get("revision") if options.base is None else None)
    return Exported.of_folder(folder, "peft", name)


def write_peft(folder: Path, bank: AdapterBank, base: str, revision: str | None = None) -> None:
    """Write a bank of one adapter as a PEFT folder. Raises StorageError.

    Args:
        folder: An existing folder.
        bank: The bank, with the base model's names of its modules.
        base: The name of the base model.
        revision: The revision of the base model on the hub.
    """
    (info,) = bank.adapters
    lora_config(info, bank.modules, base, revision).save_pretrained(folder)
    save_tensors(peft_tensors(bank.modules), folder / WEIGHTS)
    if info.frame is not None:
        write_json(folder / INFO_FILE, {"frame": info.frame.to_json()})


def peft_tensors(modules: Mapping[str, Stack]) -> dict[str, Tensor]:
    """Return the tensors of a bank of one adapter by their names in PEFT's files."""
    tensors = {}
    for path, stack in modules.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = stack.A.contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = stack.B.t().contiguous()
    return tensors


def lora_config(info: AdapterInfo, modules: Mapping[str, Stack], base: str, revision: str | None) -> Any:
    """Return PEFT's configuration of a bank of one adapter, with the rank and alpha of every module."""
    from peft import LoraConfig

    ranks = {path: stack.ranks[0] for path, stack in modules.items()}
    alphas = {path: _alpha(float(stack.scaling[0]), ranks[path], rslora=info.rslora) for path, stack in modules.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LoraConfig(
            base_model_name_or_path=base,
            revision=revision,
            r=rank,
            lora_alpha=alpha,
            rank_pattern={path: value for path, value in ranks.items() if value != rank},
            alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
            use_rslora=info.rslora,
            lora_dropout=info.dropout,
            target_modules=sorted(modules),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )


def _alpha(scaling: float, rank: int, *, rslora: bool) -> float:
    """Return the alpha of a scaling, as a whole number if it is one."""
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]

"""Writes one adapter of a checkpoint as a GGUF file, which llama.cpp loads together with a GGUF file of the base model.

llama.cpp multiplies ``B A`` by ``alpha / r`` of each tensor, with one alpha for the whole file; in layers with another scaling, ``B`` is multiplied by the
ratio. Names follow the tables of the ``gguf`` package. Rows of ``q_proj`` and ``k_proj`` are in the order of llama.cpp's rotary embedding for the models
whose base weights llama.cpp's converter reorders.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.base_route import is_base_route
from meteora_core.adapters.joining import alone
from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native import read_checkpoint
from meteora_core.errors import AdapterError, CheckpointError, UsageError
from meteora_core.exports.common import Exported, ExportOptions, check_export
from meteora_core.files import atomic_folder, storage_errors
from meteora_core.model.base import BaseReference, locate_base
from meteora_core.reading import first_line

FILE = "adapter.gguf"
_FLOATS = {"float32": torch.float32, "float16": torch.float16}
_MERGE = "merge it into the base model instead: meteora ckpt export CHECKPOINT DIR --merge NAME"


@dataclass(frozen=True)
class Kind:
    """What llama.cpp calls a kind of model, and how it orders the rows of projections.

    Attributes:
        architecture: The model's name in llama.cpp, ``general.architecture``.
        reorders: Whether the order of the rows of ``q_proj`` and ``k_proj`` differs from that in transformers.
    """

    architecture: str
    reorders: bool = False


KINDS = {
    "llama": Kind("llama", True),
    "mistral": Kind("llama", True),
    "mixtral": Kind("llama", True),
    "granite": Kind("granite", True),
    "qwen2": Kind("qwen2"),
    "qwen3": Kind("qwen3"),
    "qwen2_moe": Kind("qwen2moe"),
    "qwen3_moe": Kind("qwen3moe"),
    "gemma": Kind("gemma"),
    "gemma2": Kind("gemma2"),
    "gemma3_text": Kind("gemma3"),
    "phi3": Kind("phi3"),
    "olmo2": Kind("olmo2"),
    "starcoder2": Kind("starcoder2"),
    "stablelm": Kind("stablelm"),
}
"""The models whose adapters can be written, by ``model_type`` in transformers."""


def export_gguf(checkpoint: str | Path, folder: str | Path, name: str, options: ExportOptions = ExportOptions(), dtype: str = "float32") -> Exported:
    """Write one adapter of a checkpoint as ``adapter.gguf``. Only the configuration of the base model is read, not its weights.

    Args:
        checkpoint: A native checkpoint.
        folder: The folder to write.
        name: The name of the adapter in the checkpoint.
        options: The options of the export.
        dtype: The dtype of the tensors: "float32" or "float16".

    Raises:
        UsageError: There is no such adapter, the dtype is unknown, or the folder exists.
        AdapterError: The adapter is not a plain LoRA, or llama.cpp has no such base model or layer.
        CheckpointError: The checkpoint is broken, or the configuration of its base model cannot be read.
        StorageError: The folder cannot be written.

    Example:
        >>> from meteora_core.exports.gguf_adapter import export_gguf
        >>> export_gguf("runs/mine", "gsm8k-gguf", "gsm8k").files
        ('adapter.gguf',)
    """
    folder = Path(folder)
    checkpoint = checkpoint_folder(checkpoint, progress=options.progress)
    check_export(checkpoint, folder, overwrite=options.overwrite)
    if dtype not in _FLOATS:
        raise UsageError(f"an adapter in GGUF cannot have the dtype {dtype!r}", hint=f"choose from: {', '.join(_FLOATS)}")
    config, _, bank = read_checkpoint(checkpoint, options.adapters_dir, options.progress)
    bank = alone(bank, name)
    if is_base_route(bank.adapters[0]):
        raise UsageError(f"{name!r} is the base route, which has no weights", hint="choose an adapter")
    base = BaseReference(options.base) if options.base else BaseReference(config["base"]["name"], config["base"].get("revision"))
    model = _model_config(base, options)
    with atomic_folder(folder) as temporary, storage_errors(folder):
        write_gguf(temporary / FILE, bank, model, base.name, _FLOATS[dtype])
    return Exported.of_folder(folder, "gguf", name)


def _model_config(base: BaseReference, options: ExportOptions) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(locate_base(base, progress=options.progress), revision=base.revision or "main").get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the configuration of {base.name}: {first_line(error)}", hint="pass the base model with --base") from error


def write_gguf(file: Path, bank: AdapterBank, config: Any, base: str, dtype: torch.dtype = torch.float32) -> None:
    """Write a bank of one adapter as a GGUF file.

    Args:
        file: The file to write.
        bank: The bank, whose modules have the names of the base model.
        config: The transformers configuration of the base model.
        base: The name of the base model, for the metadata.
        dtype: The dtype of the tensors.

    Raises:
        AdapterError: The adapter is not a plain LoRA, or llama.cpp has no such base model or layer.
    """
    import gguf

    (info,) = bank.adapters
    kind = KINDS.get(config.model_type)
    if kind is None:
        raise AdapterError(f"adapters of {config.model_type} models cannot be written as GGUF", hint=f"known: {', '.join(KINDS)}; or {_MERGE}")
    architecture = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == kind.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    products = {path: float(stack.scaling[0]) * stack.ranks[0] for path, stack in bank.modules.items()}
    alpha = Counter(products.values()).most_common(1)[0][0]
    writer = gguf.GGUFWriter(file, kind.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(info.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base)
    for path, stack in bank.modules.items():
        if stack.pending or stack.tables or stack.experts > 1:
            raise AdapterError(f"adapter {info.name!r} is not a plain LoRA on {path}, and GGUF cannot store the rest", hint=_MERGE)
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None or (name == "output.weight" and config.tie_word_embeddings):
            shared = "" if name is None else ", whose weight is that of the embedding"
            raise AdapterError(f"llama.cpp has no tensor for {path} of {config.model_type} models{shared}", hint=_MERGE)
        B = stack.B.t().float() * (products[path] / alpha)
        if kind.reorders and path.endswith(("q_proj", "k_proj")):
            B = reordered(B, config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads)
        for side, tensor in (("a", stack.A.float()), ("b", B)):
            writer.add_tensor(f"{name}.lora_{side}", tensor.to(dtype).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reordered(rows: Tensor, heads: int) -> Tensor:
    """Return the rows (out, r) of a query or key projection in llama.cpp's order, in which the rows of the two halves of every head alternate.

    Example:
        >>> import torch
        >>> from meteora_core.exports.gguf_adapter import reordered
        >>> reordered(torch.arange(8)[:, None], heads=2).flatten()
        tensor([0, 2, 1, 3, 4, 6, 5, 7])
    """
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

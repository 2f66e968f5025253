"""``save_pretrained`` and ``push_to_hub`` of a model with adapters, which write a native checkpoint.

The methods of transformers would write the adapted linear layers under names that ``from_pretrained`` does not know, so that loading the folder would give
random layers. The folder that this module writes contains a native checkpoint with embedded adapters, and two files for transformers:

- ``config.json`` names a model type that ``AutoModelForCausalLM`` knows once ``meteora_core`` is imported (:mod:`meteora_core.checkpoints.auto`).
  Without the import, or with the class of the base model, loading raises an error that says how to load the folder.
- ``model.safetensors`` contains the trained parameters by their names in the model's state dict, from which ``Trainer`` resumes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from meteora_core.checkpoints.native_config import CONFIG_FILE, WEIGHT_FILE
from meteora_core.checkpoints.parts import TRANSFORMERS_CONFIG as CONFIG
from meteora_core.checkpoints.parts import TRANSFORMERS_WEIGHTS as WEIGHTS
from meteora_core.checkpoints.parts import SaveOptions, checkpoint_parts, is_ours, whole_tensor, write_files
from meteora_core.errors import UsageError
from meteora_core.files import save_tensors, storage_errors
from meteora_core.locks import scratch_folder

FILES = (WEIGHTS, WEIGHT_FILE, CONFIG_FILE, CONFIG)
"""The files of the folder in the order in which they are moved there: the configuration, which has the hash, after the weights."""

_REFUSED = {
    "safe_serialization": (True, "only safetensors is written"),
    "variant": (None, "the files of a checkpoint have fixed names"),
    "distributed_checkpoint": (False, "a checkpoint is one file; gates and adapters are gathered"),
}
"""The arguments of transformers' method that have only one possible value, with that value and the reason."""
_WITHOUT_EFFECT = ("save_peft_format", "save_original_format", "save_function")


def save_attached(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    **kwargs: Any,
) -> None:
    """Write the checkpoint of a model with adapters into a folder. Files with other names in the folder are kept.

    Args:
        model: A model with adapters attached.
        save_directory: The folder to write to.
        is_main_process: Whether this process writes the files.
        state_dict: The gathered state dict of the whole model, such as ``accelerator.get_state_dict(model)``. None means the weights of the model; if
            they are sharded, they are gathered, and every process must call this.
        push_to_hub: Whether to upload the files to the repository ``repo_id`` (by default the name of the folder), with the options
            ``commit_message``, ``create_pr``, ``private`` and ``token``.
        max_shard_size: A size limit that must not be below the size of the weights, because they are stored in one file.
        kwargs: Options of the upload. Other options of transformers' ``save_pretrained`` are refused by name, or have no effect.

    Raises:
        UsageError: The folder contains another model, or an argument has a value that a checkpoint does not support.
        StorageError: The disk is full or not writable.
    """
    for name, (value, why) in _REFUSED.items():
        if kwargs.pop(name, value) != value:
            raise UsageError(f"save_pretrained of a model with Meteora's adapters does not take {name}: {why}", hint=f"leave out {name}")
    if state_dict is not None and not is_main_process:
        return  # a gathered state dict is complete only in the main process
    hub = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    folder = Path(save_directory)
    _check_folder(folder)
    config, tensors = checkpoint_parts(model, folder, SaveOptions(adapters=True), state_dict)
    resumed = _trained(model, state_dict)
    if not is_main_process:
        return
    _check_size(tensors, max_shard_size)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder, "meteora") as temporary:
            write_files(temporary, config, tensors)
            save_tensors(resumed, temporary / WEIGHTS)
            for name in FILES:
                os.replace(temporary / name, folder / name)
    if push_to_hub:
        _upload(folder, hub)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, so no model can be saved there", hint="choose a folder")
    others = ("adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    other_files = [name for name in others if (folder / name).exists()]
    if not is_ours(folder):
        other_files += [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if other_files:
        raise UsageError(f"{folder} holds another model ({other_files[0]}), so this one is not saved there", hint="choose another folder")


def _check_size(tensors: Mapping[str, Tensor], most: int | str | None) -> None:
    if most is None:
        return
    from transformers.utils.hub import convert_file_size_to_int

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > convert_file_size_to_int(most):
        raise UsageError(f"max_shard_size is {most}, but the gates and adapters have {size:,} bytes in one file", hint="leave out max_shard_size")


def _trained(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the trainable parameters on the CPU, by their names in the model's state dict; all gates if there are none."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = names or {name for name, _ in model.named_parameters() if name.endswith(".gate")}
    return {name: whole_tensor(model, name, state_dict).to("cpu", copy=True).contiguous() for name in sorted(names)}


def _upload(folder: Path, options: dict[str, Any]) -> None:
    from huggingface_hub import create_repo, upload_folder

    message, create_pr = options.pop("commit_message", None), options.pop("create_pr", False)
    token = options.get("token")
    repository = create_repo(options.pop("repo_id", folder.resolve().name), exist_ok=True, **options).repo_id
    upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=message, create_pr=create_pr, token=token)

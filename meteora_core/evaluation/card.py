"""The card of a checkpoint: a README.md about its contents, its training data, its training and its scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meteora_core.checkpoints.native_config import CONFIG_FILE, WEIGHT_FILE, check_weights, read_config
from meteora_core.data.manifest import Manifest, read_manifest
from meteora_core.data.tasks import TASKS, BigBench, Records
from meteora_core.errors import UsageError
from meteora_core.evaluation.results import load_results
from meteora_core.fetch.catalog import CATALOG
from meteora_core.files import atomic_write, sha256
from meteora_core.names import is_name

CARD_FILE = "README.md"

LICENCES = {
    "openai/gsm8k": "MIT",
    "abisee/cnn_dailymail": "Apache-2.0",
    "tatsu-lab/alpaca": "CC BY-NC 4.0",
    "Helsinki-NLP/news_commentary": "not stated",
}
"""Licences of datasets on the hub, as stated on their cards, by repository."""

BASE_LICENCES = {entry.name: entry.licence for entry in CATALOG.values()}
"""Licences of base models, by name."""


def write_card(
    folder: str | Path,
    *,
    title: str | None = None,
    results: str | Path | None = None,
    data_dir: str | Path | None = None,
    licences: Mapping[str, str] | None = None,
    checkpoint: str | None = None,
) -> Path:
    """Write ``README.md`` into a checkpoint's folder.

    Args:
        folder: Folder of the checkpoint.
        title: Headline of the card; None means the folder's name.
        results: Results file of `meteora eval` for this checkpoint, or the folder with it.
        data_dir: Folder of the datasets that the checkpoint was trained on, whose manifests name sources and hashes.
        licences: Source and licence of a task's rows, by task, for rows whose manifest does not state them, such as local ones.
        checkpoint: Name of the checkpoint in the commands on the card; None means the folder's name.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: The folder holds no valid checkpoint.
        UsageError: The results or datasets belong to another checkpoint, or ``licences`` names a task that the checkpoint lacks.
        DataError, StorageError: A file cannot be read or written.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_weights(folder, config)
    names = [adapter["name"] for adapter in config["adapters"]]
    unknown = sorted(set(licences or {}) - set(names))
    if unknown:
        raise UsageError(f"the checkpoint has no task {unknown[0]!r}", hint=f"its tasks are: {', '.join(names)}")
    document = None
    if results is not None:
        document = load_results(Path(results))
        scored = document.get("config", {}).get("model_args", {}).get("weights_sha256")
        if scored != config.get("weights_sha256"):
            raise UsageError(f"{results} holds the scores of another checkpoint", hint=f"meteora eval --checkpoint {folder} --task …")
    base, training = config["base"], config.get("training", {})
    lines = [f"# {title or folder.name}", "", f"{len(names)} LoRA adapters and the MeteoRA gates that choose among them, for the base model `{base['name']}`."]
    name = checkpoint or folder.name
    lines += ["", f"    meteora chat --checkpoint {name}", f"    meteora eval --checkpoint {name} --task {names[0]}", ""]
    lines += _model_lines(config, folder)
    lines += ["", "## Tasks and data", "", "| task | rows from | licence of the rows | train rows (SHA-256) | mean rank |", "| --- | --- | --- | --- | ---: |"]
    for index, name in enumerate(names):
        built = data_dir is not None and is_name(name) and (Path(data_dir) / name).is_dir()
        manifest = read_manifest(Path(str(data_dir)) / name) if built else None
        origin, licence = _origin(name, manifest, (licences or {}).get(name))
        entry = manifest.files.get("train.jsonl") if manifest else None
        trained_on = training.get("inputs", {}).get("data", {}).get(name)
        if entry and trained_on and entry.sha256 != trained_on:
            raise UsageError(f"{data_dir}/{name} holds other rows than the checkpoint was trained on", hint="name the datasets that it was trained on")
        rows = f"{entry.rows} (`{entry.sha256[:12]}`)" if entry else "–"
        ranks = [module["ranks"][index] for module in config["modules"].values()]
        lines.append(f"| {name} | {origin} | {licence} | {rows} | {sum(ranks) / max(1, len(ranks)):.1f} |")
    lines += _training_lines(training)
    if document is not None:
        lines += _score_lines(document)
    path = folder / CARD_FILE
    with atomic_write(path) as handle:
        handle.write("\n".join(lines) + "\n")
    return path


def _model_lines(config: Mapping[str, Any], folder: Path) -> list[str]:
    base = config["base"]
    licence = BASE_LICENCES.get(base["name"])
    files = [f"`{name}` {(folder / name).stat().st_size / 1e6:.2f} MB, SHA-256 `{sha256(folder / name)}`" for name in (WEIGHT_FILE, CONFIG_FILE)]
    return [
        f"- Base: `{base['name']}`" + (f", revision {base['revision']}" if base.get("revision") else "") + (f" ({licence})" if licence else ""),
        f"- Routing: top-{config['top_k']}, T = {config['temperature']} unless asked otherwise",
        f"- Holds: {', '.join(config.get('contains', []))}",
        *(f"- {line}" for line in files),
    ]


def _origin(name: str, manifest: Manifest | None, given: str | None) -> tuple[str, str]:
    """The source and the licence of a task's rows."""
    source = TASKS[name].source if name in TASKS else None
    kind = str(manifest.source.get("kind")) if manifest else None
    if isinstance(source, BigBench):
        return f"BIG-bench, `{source.folder}`", given or "Apache-2.0"
    if given:
        return "local rows" if kind == "local" else kind or "–", given
    if isinstance(source, Records) and kind == "hub":
        return source.repository, LICENCES.get(source.repository, "see its card")
    return ("local rows" if kind == "local" else kind or "–"), "not stated"


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    lines = ["", "## Training", ""]
    settings = training.get("inputs", {}).get("settings", {})
    shown: tuple[str, ...] = ("init", "seed", "batch_size", "accumulation", "learning_rate", "beta", "answer_share", "max_length", "ridge_tokens")
    shown += ("list_rows", "list_max", "composite_rows", "composite_max", "joined_rows", "joined_max", "trainable", "adapter_learning_rate", "loss_on")
    if "steps" in training:
        lines.append(f"- Gates: {training['steps']} optimiser steps, {training.get('tokens', 0):,} tokens, {training.get('seconds') or 0:.0f} s")
    if settings:
        lines.append("- Settings: " + ", ".join(f"{name} {settings[name]}" for name in shown if settings.get(name) is not None))
    held_out = training.get("held_out", {})
    if held_out.get("gate_accuracy") is not None:
        lines.append(f"- Top-1 gate accuracy on answer tokens of held-out train rows, all layers but the first: {held_out['gate_accuracy']:.1%}")
    packed = training.get("packed")
    if packed:
        lines.append(f"- Packed from a checkpoint whose weights have the SHA-256 `{packed.get('from')}`")
        if packed.get("kept"):
            kept = packed["kept"]
            lines.append(
                "- Adapters cut by singular values; share of the squared norm kept: " + ", ".join(f"{name} {share:.1%}" for name, share in kept.items())
            )
    lines.append("- Test rows were never trained on, nor used to choose anything.")
    return lines


def _score_lines(document: Mapping[str, Any]) -> list[str]:
    from meteora_core.evaluation.report import compare, to_markdown

    routing = document.get("meteora", {}).get("routing", {})
    lines = ["", "## Scores on test rows", "", to_markdown(compare([document], ["score"])).strip()]
    shares = {task: values["own_top1"]["answer"] for task, values in routing.items() if values.get("own_top1", {}).get("answer") is not None}
    if shares:
        lines += ["", "Share of answer tokens whose likeliest adapter is the task's own, all layers: "]
        lines[-1] += ", ".join(f"{task} {share:.1%}" for task, share in shares.items()) + "."
    return lines

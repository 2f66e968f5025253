"""Shared parts of the commands of ``meteora data``: common options, settings, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.console import emit_json, settings_from
from meteora_cli.display import DataTable, out

if TYPE_CHECKING:
    from meteora_core.data.manifest import Manifest
    from meteora_core.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of all datasets; default: the setting paths.data.", show_default=False)]
METRIC_HELP = "Metric: exact, contains, final_number, yes_no_text, text or bleu."


def prepare(ctx: typer.Context, folder: Path | None, base: str | None = None) -> tuple[Settings, Path]:
    """Register all declared and built tasks, and return the settings and the folder of datasets."""
    from meteora_core.data.userdata import register_all

    settings = settings_from(ctx, paths__data=folder, model__base=base)
    register_all(settings, partial(load_tokenizer, settings.model.base, settings.model.revision, settings.model.trust_remote_code))
    return settings, settings.paths.data


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a base model. Raises the errors of :func:`meteora_core.model.base.load_tokenizer`."""
    from meteora_core.model.base import BaseReference
    from meteora_core.model.base import load_tokenizer as load

    return load(BaseReference(name, revision, trust_remote_code))


def show_manifests(manifests: Sequence[Manifest]) -> None:
    """Print a table of the datasets that were built."""
    rows = []
    for manifest in manifests:
        counts = [str(manifest.rows.get(split, "")) for split in ("train", "test")]
        rows.append((manifest.task, str(manifest.source.get("kind")), *counts, str(manifest.duplicates.get("test_prompts_in_train", ""))))
    show(None, ("task", "source", "train", "test", "test prompts also in train"), rows, False)


def show(value: Any, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], as_json: bool) -> None:
    """Print ``value`` as JSON, or ``rows`` as a table."""
    if as_json:
        emit_json(value)
        return
    from rich.box import SIMPLE_HEAD

    table = DataTable(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    out.print(table)

"""``meteora data add``: adds the user's tasks from files, folders and the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meteora_cli.commands.data_output import METRIC_HELP, DryRun, Json, Out, load_tokenizer, prepare, show, show_manifests
from meteora_cli.console import emit_json, progress
from meteora_cli.display import out, panel, say
from meteora_cli.flags import refuse_without_effect
from meteora_core.text import shortened

if TYPE_CHECKING:
    from meteora_core.data.formats.folders import Found
    from meteora_core.data.formats.reading import Reading
    from meteora_core.data.frames import Frame
    from meteora_core.data.manifest import Manifest
    from meteora_core.data.rows import Row
    from meteora_core.data.userdata import Preview
    from meteora_core.errors import MeteoraError
    from meteora_core.progress import Progress
    from meteora_core.settings import Settings

_SHOWN = 1200
"""The largest number of characters of an example row that are shown."""

TEMPLATE_HELP = (
    "Prompt template: chat (the base model's chat template), inst, raw, a text with {} for the user's text, or a whole prompt with names of columns "
    "in braces. Default: prompts stay unchanged, and questions and conversations are put into the chat template."
)


@dataclass(frozen=True)
class _Options:
    """The options that apply to all datasets of one call."""

    reading: Reading
    data_dir: Path
    metric: str
    max_new_tokens: int | None
    max_train: int | None
    max_test: int | None


def add(
    ctx: typer.Context,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME|PATH", help="Name of the task, with --train; or files, folders and hub datasets to add.", show_default=False)
    ],
    train: Annotated[str | None, typer.Option("--train", help="File, folder or hub dataset (user/name) with the train rows.", show_default=False)] = None,
    test: Annotated[str | None, typer.Option("--test", help="The same for the test rows; default: 20 % of the train rows.", show_default=False)] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--columns", help="Known column names and yours for them, for example question=ASK,answer=REPLY.", show_default=False)
    ] = None,
    template: Annotated[str | None, typer.Option("--template", help=TEMPLATE_HELP, show_default=False)] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Template of the response: a text with names of columns in braces.", show_default=False)
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help=METRIC_HELP)] = "exact",
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer in tokens.", show_default=False)] = None,
    max_train: Annotated[int | None, typer.Option("--max-train", help="Largest number of train rows.", show_default=False)] = None,
    max_test: Annotated[int | None, typer.Option("--max-test", help="Largest number of test rows.", show_default=False)] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a hub dataset.", show_default=False)] = None,
    skip_invalid: Annotated[bool, typer.Option("--skip-invalid", help="Skip rows that cannot be used, and count them.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="Base model whose chat template is used; default: model.base.", show_default=False)] = None,
    folder: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Add your own tasks from JSON lines, JSON, CSV, Parquet, text, a saved `datasets` folder or a dataset on the hub.

    The format is detected and printed, with one row as the model will see it.
    """
    from meteora_core.data.formats.reading import Reading
    from meteora_core.data.frames import typed

    settings, data_dir = prepare(ctx, folder, base)
    refuse_without_effect(ctx, {"test": (train is not None, "--train")})
    reading = Reading(
        _pairs(columns or []),
        None if template is None else typed(template),
        None if target is None else typed(target),
        subset,
        skip_invalid,
        partial(load_tokenizer, settings.model.base, settings.model.revision, settings.model.trust_remote_code),
    )
    options = _Options(reading, data_dir, metric, max_new_tokens, max_train, max_test)
    found = _found(names, train, test)
    failures: dict[str, MeteoraError] = {}
    alone = train is not None or len(found) == 1
    with progress(ctx) as bars:
        if dry_run:
            previews = _each(found, partial(_preview, options=options, bars=bars), failures, alone)
            _show_previews(previews, options, as_json, alone, failures)
        else:
            added = _each(found, partial(_add, options=options, bars=bars), failures, alone)
            _show_added(added, options, as_json, alone, failures)
    _report(failures, len(found))


def add_rows(ctx: typer.Context, settings: Settings, source: str) -> list[str]:
    """Add the datasets of a file, a folder or the hub with everything found out, and return their names.

    Raises:
        UsageError: There is nothing at that path, or several processes run, which would all add the same.
        DataError: A dataset is broken.
    """
    import os

    from meteora_core.data.formats.folders import find_datasets
    from meteora_core.data.formats.reading import Reading
    from meteora_core.errors import UsageError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--rows cannot be used in several processes at once", hint=f"add them first: meteora data add {source}")
    base = settings.model
    reading = Reading(tokenizer=partial(load_tokenizer, base.base, base.revision, base.trust_remote_code))
    options = _Options(reading, settings.paths.data, "exact", None, None, None)
    names = []
    with progress(ctx) as bars:
        for dataset in find_datasets(source):
            manifest, _ = _add(dataset, options=options, bars=bars)
            say(f"{manifest.task}: {manifest.source['columns']}; {manifest.rows['train']} train rows, {manifest.rows['test']} test rows")
            names.append(manifest.task)
    return names


def _pairs(columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return pairs of a known column and the user's name for it, from texts such as ``question=ASK``. Raises UsageError."""
    from meteora_core.errors import UsageError

    pairs = []
    for part in (part.strip() for text in columns for part in text.split(",")):
        known, equals, own = (piece.strip() for piece in part.partition("="))
        if not known or not equals or not own:
            raise UsageError(f"--columns {part!r} is not of the form KNOWN=YOURS", hint="for example --columns question=ASK,answer=REPLY")
        pairs.append((known.lower(), own))
    return tuple(pairs)


def _found(names: Sequence[str], train: str | None, test: str | None) -> list[Found]:
    from meteora_core.data.formats.folders import Found, find_datasets
    from meteora_core.errors import UsageError

    if train is not None:
        if len(names) != 1:
            raise UsageError(
                f"--train gives the rows of one task, and {len(names)} are named", hint="add them one by one, or leave out --train and name their files"
            )
        return [Found(names[0], train, test)]
    found = [dataset for name in names for dataset in find_datasets(name)]
    repeated = next((one.name for place, one in enumerate(found) if one.name in [other.name for other in found[:place]]), None)
    if repeated is not None:
        raise UsageError(f"two of these datasets are called {repeated}", hint="add one of them under another name: meteora data add NAME --train FILE")
    return found


def _each(found: Sequence[Found], work: Any, failures: dict[str, MeteoraError], alone: bool) -> list[Any]:
    """Return the results of ``work`` for every dataset. Failures are collected, unless there is only one dataset."""
    from meteora_core.errors import MeteoraError

    results = []
    for dataset in found:
        try:
            results.append(work(dataset))
        except MeteoraError as error:
            if alone:
                raise
            failures[dataset.name] = error
    return results


def _task(dataset: Found, options: _Options) -> Any:
    from meteora_core.data.userdata import own_task

    return own_task(dataset.name, train=dataset.train, test=dataset.test, metric=options.metric, reading=options.reading, max_new_tokens=options.max_new_tokens)


def _preview(dataset: Found, *, options: _Options, bars: Progress) -> tuple[str, Preview]:
    from meteora_core.data.userdata import preview

    return dataset.name, preview(_task(dataset, options), options.data_dir, bars)


def _add(dataset: Found, *, options: _Options, bars: Progress) -> tuple[Manifest, Row]:
    from meteora_core.data.rows import read_rows
    from meteora_core.data.userdata import add_task

    manifest = add_task(_task(dataset, options), options.data_dir, bars, max_train=options.max_train, max_test=options.max_test)
    return manifest, read_rows(options.data_dir, dataset.name, "train", limit=1)[0]


def _show_previews(looked: Sequence[tuple[str, Preview]], options: _Options, as_json: bool, alone: bool, failures: dict[str, MeteoraError]) -> None:
    values = [
        {
            "task": name,
            "metric": options.metric,
            "rows": found.rows,
            "folder": str(options.data_dir / name),
            "columns": found.columns,
            "frame": found.frame.to_json(),
            "example": asdict(found.example),
        }
        for name, found in looked
    ]
    if as_json:
        emit_json(values[0] if alone else {"would_add": values, "failed": {name: error.message for name, error in failures.items()}})
        return
    table = [(name, options.metric, str(found.rows["train"]), str(found.rows["test"]), str(options.data_dir / name)) for name, found in looked]
    show(None, ("task", "metric", "train", "test", "folder"), table, False)
    for name, found in looked:
        _show_example(name, found.columns, found.frame, found.example)


def _show_added(made: Sequence[tuple[Manifest, Row]], options: _Options, as_json: bool, alone: bool, failures: dict[str, MeteoraError]) -> None:
    if as_json:
        values = [{**manifest.to_json(), "example": asdict(example)} for manifest, example in made]
        emit_json(values[0] if alone else {"added": values, "failed": {name: error.message for name, error in failures.items()}})
        return
    show_manifests([manifest for manifest, _ in made])
    for manifest, example in made:
        assert manifest.frame is not None
        _show_example(manifest.task, str(manifest.source["columns"]), manifest.frame, example)


def _show_example(name: str, columns: str, frame: Frame, example: Row) -> None:
    """Print one row as the model will see it."""
    around = {"chat": "the base model's chat template", "raw": "none"}.get(frame.name, repr(frame.text))
    out.print(f"{name}: {columns}; frame: {around}", markup=False, highlight=False, soft_wrap=True)
    out.print(panel(shortened(example.prompt.rstrip("\n"), _SHOWN), f"{name} · train · row 0", title_align="left"))
    out.print(panel(shortened(example.response, _SHOWN), "response", title_align="left", border_style="green"))


def _report(failures: dict[str, MeteoraError], count: int) -> None:
    """Print every failure. Raises DataError if there is one."""
    from meteora_core.errors import DataError

    if not failures:
        return
    for name, error in failures.items():
        say(f"{name}: {error.message}")
    hint = next((error.hint for error in failures.values() if error.hint), None)
    raise DataError(f"{len(failures)} of {count} datasets could not be added: {', '.join(failures)}", hint=hint)

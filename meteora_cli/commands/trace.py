"""``meteora trace``: draws the routes of one prompt and its answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meteora_cli.commands import shared_options as shared
from meteora_cli.commands.chat import answer_document, open_session
from meteora_cli.console import emit_json, globals_of, settings_from, valid_text
from meteora_cli.display import console, put, say
from meteora_cli.flags import refuse_without_effect

if TYPE_CHECKING:
    from meteora_core.settings import Settings


def trace(
    ctx: typer.Context,
    *,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Message to the model.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option("--file", help="File that contains the message.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option("--task", help="Built dataset whose test row is the message.", show_default=False)] = None,
    row: Annotated[int, typer.Option("--row", min=0, max=10**9, help="Number of the task's test row, from 0.")] = 0,
    target: Annotated[Path, typer.Option("--out", help="File of the picture: .html, .png, .svg or .json.")] = Path("trace.html"),
    speaker: shared.Speaker,
    remote: shared.Remote,
    loading: shared.Loading,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its routes as one JSON document, and draw no picture.")] = False,
) -> None:
    """Draw which adapter was chosen for each token of a prompt and its answer. With --url, a server answers, and the answer is drawn.

    An HTML page is a single file that works offline, with tooltips, a slider over the layers, and heat maps.
    """
    from meteora_cli.chat.answer import figures, interruptible
    from meteora_cli.chat.export import check_format, write_picture
    from meteora_core.chat.prompts import Encoded
    from meteora_core.generation.requests import Finished

    refuse_without_effect(ctx, {"row": (task is not None, "--task"), "target": (not as_json, "a run without --json, which draws no picture")})
    settings = settings_from(ctx)
    if not as_json:
        check_format(target)
    message, title = _message(settings, prompt, file, task, row)
    session = open_session(ctx)
    session.check_adapters()
    if task is not None:
        message = _inside(settings, task, message) if session.template != "raw" else message
    if as_json:
        emit_json(answer_document(session, message))
        return
    finished: Finished | None = None
    with interruptible() as stop, console.status("answering"):
        for event in session.ask(message, stop=stop.is_set):
            if isinstance(event, Encoded) and event.notice:
                say(f"note: {event.notice}", style="yellow")
            elif isinstance(event, Finished):
                finished = event
        if stop.is_set() or finished is None:
            raise KeyboardInterrupt
        picture = session.picture()
    write_picture(picture, target, title)
    if not globals_of(ctx).quiet:
        say(figures(finished, in_chat=False), style="dim")
    put(str(target))


def _inside(settings: Settings, task: str, prompt: str) -> str:
    """Return the message within a row's prompt, to which the session applies its template again."""
    from meteora_core.data.dataset_frames import dataset_frame

    frame = dataset_frame(settings.paths.data, task)
    message = frame.inside(prompt) if frame else None
    return prompt if message is None else message


def _message(settings: Settings, prompt: str | None, file: Path | None, task: str | None, row: int) -> tuple[str, str]:
    """Return the message that the flags select, and the title of the picture."""
    from meteora_core.errors import UsageError
    from meteora_core.reading import read_text

    if sum(source is not None for source in (prompt, file, task)) != 1:
        raise UsageError("give exactly one of --prompt, --file and --task", hint='for example: meteora trace --prompt "a question"')
    if prompt is not None:
        return valid_text(prompt, "--prompt"), "Routing of a prompt"
    if file is not None:
        return read_text(file).strip("\n"), f"Routing of {file.name}"
    from meteora_core.data.rows import read_rows, split_path
    from meteora_core.data.tasks import get_task
    from meteora_core.data.userdata import register_all
    from meteora_core.evaluation.available import check_built

    assert task is not None
    if not split_path(settings.paths.data, task, "test").is_file():
        register_all(settings)
        others = (settings.paths.runs / "starter" / "datasets", settings.paths.runs / "quickstart" / "datasets")
        check_built([get_task(task)], settings.paths.data, others, take="set `METEORA_PATHS__DATA={}`")
    rows = read_rows(settings.paths.data, task, "test", limit=row + 1)
    if row >= len(rows):
        raise UsageError(f"{task} has {len(rows)} test rows, so there is no row {row}", hint=f"choose --row from 0 to {len(rows) - 1}")
    return rows[row].prompt, f"Routing of {task}, test row {row}"

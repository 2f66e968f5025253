"""``meteora config``: shows the settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from meteora_cli.console import emit_json, settings_from, write_text
from meteora_cli.display import DataTable, out
from meteora_cli.flags import refuse_without_effect
from meteora_cli.typer_app import App
from meteora_core.text import redact

app = App(help="Show the settings.", no_args_is_help=True)


@app.command("show")
def show(
    ctx: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    defaults: Annotated[bool, typer.Option("--defaults", help="Print a meteora.toml with every setting, commented out and with its default.")] = False,
) -> None:
    """Print the settings in effect. Order of precedence: flags, METEORA_* environment variables, meteora.toml, defaults."""
    from meteora_core.settings_file import default_file_text

    refuse_without_effect(ctx, {"as_json": (not defaults, "a run without --defaults, which prints TOML")})
    if defaults:
        write_text(default_file_text())
        return
    settings = settings_from(ctx)
    values = _without_secrets(settings.model_dump(mode="json"))
    if as_json:
        emit_json(values)
        return
    standard = type(settings).model_construct().model_dump(mode="json")
    table = DataTable("setting", "value", "default")
    for section, entries in values.items():
        for name, value in entries.items():
            default = standard.get(section, {}).get(name)
            same = value == default
            table.add_row(f"{section}.{name}", str(value), "" if same else str(default), style="" if same else "bold")
    out.print(table)


def _without_secrets(value: Any) -> Any:
    """Return the settings with passwords and tokens in their texts replaced."""
    if isinstance(value, dict):
        return {key: _without_secrets(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_secrets(each) for each in value]
    return redact(value) if isinstance(value, str) else value

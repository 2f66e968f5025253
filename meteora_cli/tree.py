"""The ``meteora`` command, with its global options and its sub-commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from meteora_cli.commands import adapters, bench_kernels, chat, ckpt, config, data, quickstart, route, serve, trace, train
from meteora_cli.commands import eval as evaluate
from meteora_cli.console import Globals
from meteora_cli.typer_app import App

app = App(
    name="meteora",
    help="Many LoRA adapters in one language model; a trained gate in every linear layer picks the right ones for each token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.add_typer(data.app, name="data")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(train.app, name="train")
app.command("route")(route.route)
app.add_typer(adapters.app, name="adapters")
app.add_typer(evaluate.app, name="eval")
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("trace")(trace.trace)
app.command("bench-kernels")(bench_kernels.bench_kernels)
app.add_typer(config.app, name="config")


_NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn whenever transformers imports torchao, if it is installed, about kernels for GPUs of other generations."""


def _version(value: bool) -> None:
    if value:
        from meteora_core import __version__

        typer.echo(f"meteora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Settings file; default: meteora.toml in the working directory, if present.", show_default=False)
    ] = None,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Print more messages; repeat for debug messages.", show_default=False)] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only results and errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Set the options that apply to every command."""
    ctx.obj = Globals(config_file, verbose, quiet)
    import logging

    level = logging.DEBUG if verbose > 1 else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("meteora_core").setLevel(level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        for name in _NOISY:
            logging.getLogger(name).setLevel(logging.ERROR)


@cache
def command() -> Callable[..., Any]:
    """Return the command tree that Typer builds from these functions; it is built once, because that takes longer than many commands."""
    return typer.main.get_command(app)

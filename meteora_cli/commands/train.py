"""``meteora train adapters`` and ``meteora train gates``; ``meteora train`` without a command is the latter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meteora_cli.commands import train_options as shared
from meteora_cli.commands.train_options import INPUT, OPTIMISER, PROCESSES, THIS_RUN
from meteora_cli.display import say
from meteora_cli.flags import comma_separated, typed_template
from meteora_cli.typer_app import App, HelpfulGroup
from meteora_core.choices import GateStart, LossBalance, RowSampling, TrainedParts

LORA = "LoRA"
GATES = "Gates and routing"


class _GatesUnlessNamed(HelpfulGroup):
    """A group that runs the command ``gates`` if none is named: ``meteora train --lr 1e-3`` is ``meteora train gates --lr 1e-3``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        return super().parse_args(ctx, with_stage(args))


def with_stage(args: list[str]) -> list[str]:
    """Return the arguments of ``meteora train`` with its command first, which is ``gates`` if none is named.

    ``--stage``, which selected the command in earlier versions, still works; a note names the command that replaces it.
    """
    for index, word in enumerate(args):
        if word == "--stage" or word.startswith("--stage="):
            width = 1 if "=" in word else 2
            stage = word.partition("=")[2] if width == 1 else "".join(args[index + 1 : index + 2])
            if stage in ("adapters", "gates"):
                say(f"note: --stage {stage} is now the command `meteora train {stage}`", style="yellow")
                return [stage, *args[:index], *args[index + width :]]
    if args and (not args[0].startswith("-") or args[0] in ("-h", "--help")):
        return args
    return ["gates", *args]


app = App(
    cls=_GatesUnlessNamed,
    help="Train adapters, one LoRA per task, or the gates over all of them. `meteora train` without a command trains the gates.\n\n"
    "Adapters and datasets are matched by name: adapters/gsm8k is trained on datasets/gsm8k, whose rows also train its gate.",
)


@app.command("adapters")
def adapters(
    ctx: typer.Context,
    *,
    task: Annotated[
        str | None, typer.Option("--task", "--tasks", help="Names of tasks, separated by commas, or all. Required.", rich_help_panel=INPUT, show_default=False)
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", "--output-dir", help="Folder for one sub-folder per adapter; default: --adapters.", rich_help_panel=INPUT, show_default=False),
    ] = None,
    adapters: Annotated[Path | None, typer.Option("--adapters", help="Same as --out, but also a setting.", rich_help_panel=INPUT)] = None,
    base: shared.Base = None,
    source: shared.RowOptions,
    rank: Annotated[int | None, typer.Option(rich_help_panel=LORA, help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(rich_help_panel=LORA, help="LoRA alpha; the scaling is alpha / rank.")] = None,
    together: Annotated[bool, typer.Option("--together", rich_help_panel=LORA, help="Train all adapters in one run, each on the rows of its task.")] = False,
    balanced: Annotated[bool, typer.Option("--balanced", rich_help_panel=LORA, help="Train one LoRA on all tasks, mixed evenly.")] = False,
    name: Annotated[str, typer.Option(rich_help_panel=LORA, help="Name of the LoRA of --balanced.")] = "balanced",
    loop: shared.LoopOptions,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=PROCESSES, help="Number of adapters to train at once, each in a separate process and, if possible, on a separate GPU."
        ),
    ] = None,
    launch: shared.LaunchOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print each adapter's settings, or the launch command, and exit.", rich_help_panel=THIS_RUN)
    ] = False,
    this_run: shared.ThisRun,
) -> None:
    """Train one LoRA per task, and save it as a PEFT folder in adapters/."""
    from meteora_cli.commands.train_adapters import AdapterFlags, train_all
    from meteora_cli.commands.train_stage import RunFlags

    run = RunFlags(comma_separated(task), out_dir, dry_run, source, this_run)
    train_all(ctx, run, AdapterFlags(together, name if balanced else None))


@app.command("gates")
def gates(
    ctx: typer.Context,
    *,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            "--tasks",
            help="Names of adapters, separated by commas; default: all in the folder of adapters.",
            rich_help_panel=INPUT,
            show_default=False,
        ),
    ] = None,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", "--output-dir", help="Folder of the checkpoint; default: runs/meteora.", rich_help_panel=INPUT, show_default=False),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="Folder of one PEFT folder per adapter, or ids on the hub.", rich_help_panel=INPUT)
    ] = None,
    base: shared.Base = None,
    any_base: Annotated[bool, typer.Option("--any-base", help="Use adapters even if they name different base models.", rich_help_panel=INPUT)] = False,
    source: shared.RowOptions,
    sampling: Annotated[
        RowSampling | None,
        typer.Option(help="balanced: the same number of tokens from every task; proportional: every row equally often.", rich_help_panel=INPUT),
    ] = None,
    composite_rows: Annotated[
        float | None, typer.Option(help="Share of the training rows that are composites of several tasks.", rich_help_panel=INPUT)
    ] = None,
    composite_max: Annotated[int | None, typer.Option(help="Largest number of tasks in a composite row.", rich_help_panel=INPUT)] = None,
    joined_rows: Annotated[
        float | None,
        typer.Option(help="Share of the training sequences that are complete rows of different tasks, one after another.", rich_help_panel=INPUT),
    ] = None,
    joined_max: Annotated[int | None, typer.Option(help="Largest number of rows in a joined sequence.", rich_help_panel=INPUT)] = None,
    init: Annotated[
        GateStart | None,
        typer.Option(help="Initial gates: normal or zeros; arrow: from the adapters alone; ridge: in closed form from training rows.", rich_help_panel=GATES),
    ] = None,
    trainable: Annotated[TrainedParts | None, typer.Option(help="Parameters to train.", rich_help_panel=GATES)] = None,
    loss_balance: Annotated[
        LossBalance | None,
        typer.Option(
            help="Unit of equal weight in the language-model loss: tokens, or tasks, so that short answers count as much as long ones.", rich_help_panel=GATES
        ),
    ] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the gate loss.", rich_help_panel=GATES)] = None,
    answer_share: Annotated[
        float | None, typer.Option(help="Share of all answer tokens in the gate loss; default: every token has the same weight.", rich_help_panel=GATES)
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Adapters per token and layer; default: 2.", rich_help_panel=GATES)] = None,
    routing_temperature: Annotated[float | None, typer.Option("--T", help="Routing temperature T; default: 1.", rich_help_panel=GATES)] = None,
    backend: Annotated[
        str | None, typer.Option(help="Implementation of the sum over adapters: auto, reference, dense or triton.", rich_help_panel=GATES)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            callback=typed_template,
            help="Prompt template for chat: chat, inst, raw or a text with {}; default: as in the adapters' rows.",
            rich_help_panel=GATES,
            show_default=False,
        ),
    ] = None,
    loop: shared.LoopOptions,
    adapter_learning_rate: Annotated[
        float | None,
        typer.Option(
            "--adapter-lr",
            "--adapter-learning-rate",
            help="With gates+adapters: peak learning rate of the adapters; default: the same as for the gates.",
            rich_help_panel=OPTIMISER,
        ),
    ] = None,
    launch: shared.LaunchOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the launch command and exit.", rich_help_panel=THIS_RUN)] = False,
    this_run: shared.ThisRun,
) -> None:
    """Train the gates over all adapters, and save a checkpoint to runs/meteora."""
    from meteora_cli.commands.train_gates import train_checkpoint
    from meteora_cli.commands.train_stage import RunFlags

    run = RunFlags(comma_separated(task), out_dir, dry_run, source, this_run)
    train_checkpoint(ctx, run, any_base=any_base, template=template)

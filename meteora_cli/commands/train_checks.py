"""Checks of ``meteora train`` before a model is loaded: flags, tasks, datasets and folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from meteora_cli.flags import given_flags, refuse_without_effect

if TYPE_CHECKING:
    from meteora_core.settings import Settings


def refuse_idle_flags(ctx: typer.Context, settings: Settings, *, gates: bool, balanced: bool) -> None:
    """Refuse flags that have no effect without others, and a tracker that is not installed.

    Args:
        ctx: The context of the command.
        settings: All settings, including the values of flags.
        gates: Whether gates are trained, instead of adapters.
        balanced: Whether --balanced was given.

    Raises:
        UsageError: A flag has no effect (the hint names what it requires), or a package is missing.
    """
    from meteora_core.training.trackers import check_tracker

    training, optim = settings.train_gates, settings.train_gates if gates else settings.train_adapters
    launched, several = settings.launch.launcher != "none", settings.launch.num_machines > 1
    several_machines = dict.fromkeys(("machine_rank", "main_process_ip", "main_process_port"), (launched and several, "--launcher and --num-machines"))
    refuse_without_effect(
        ctx,
        {
            "adapter_learning_rate": (training.trainable == "gates+adapters", "--trainable gates+adapters"),
            "composite_max": (training.composite_rows > 0, "--composite-rows"),
            "joined_max": (training.joined_rows > 0, "--joined-rows"),
            "list_max": (optim.list_rows > 0, "--list-rows"),
            "answer_share": (training.beta > 0, "--beta above 0"),
            "patience": (optim.eval_steps > 0, "--eval-steps"),
            "name": (balanced, "--balanced"),
            "adapters": (gates or "out_dir" not in given_flags(ctx), "a run without --out, which has the same meaning"),
            "num_processes": (launched, "--launcher ddp, fsdp or deepspeed"),
            "num_machines": (launched, "--launcher ddp, fsdp or deepspeed"),
            **several_machines,
        },
    )
    check_tracker(optim.log_to)


def adapter_tasks(settings: Settings, names: list[str], max_rows: int | None) -> list[str]:
    """Return the tasks to train adapters for. Every dataset is read, so that a broken one is reported before a model is loaded."""
    from meteora_core.data.rows import available_tasks, check_rows
    from meteora_core.data.tasks import TASKS
    from meteora_core.errors import UsageError
    from meteora_core.names import check_names

    if names == ["all"]:
        composites = {name for name, task in TASKS.items() if task.is_composite}
        names = [name for name in available_tasks(settings.paths.data) if not name.startswith("composite_") and name not in composites]
    if not names:
        raise UsageError("no task given", hint="meteora train adapters --task NAME[,NAME] | all; `meteora data list` lists them")
    check_names(names)
    for name in names:
        check_rows(settings.paths.data, name, "train", max_rows)
    return list(dict.fromkeys(names))


def check_adapter_targets(settings: Settings, root: Path, names: list[str], balanced: str | None) -> None:
    """Refuse invalid adapter names, paths outside the folder of adapters, and a ``--name`` that is also the name of a dataset."""
    from meteora_core.data.rows import available_tasks
    from meteora_core.errors import UsageError
    from meteora_core.training.output_folders import check_targets

    check_targets(root, names if balanced is None else [balanced], replaced=())
    if balanced in available_tasks(settings.paths.data):
        raise UsageError(f"--name {balanced} is also the name of a dataset, whose adapter would be replaced", hint="choose another --name")


def gate_folders(settings: Settings, names: list[str], max_rows: int | None, *, any_base: bool) -> tuple[dict[str, Path], str | None]:
    """Return the folders of the adapters to train gates for, by name, and a note if the adapters name another base model than the settings.

    Every dataset is read, and all adapters must name one base model unless ``any_base``. Raises UsageError, DataError, AdapterError.
    """
    from meteora_core.adapters.folders import adapter_folders, check_bases
    from meteora_core.data.rows import available_tasks, check_rows
    from meteora_core.training.gates import check_pairs

    folders = adapter_folders(settings.paths.adapters, [] if names == ["all"] else names)
    check_pairs(tuple(folders), available_tasks(settings.paths.data))
    for name in folders:
        check_rows(settings.paths.data, name, "train", max_rows)
    return folders, check_bases(folders, settings.model.base, any_base=any_base)

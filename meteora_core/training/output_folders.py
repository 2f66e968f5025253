"""The output folders of a training run: checks of their names and contents, locks, and removal of files that an earlier run left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from meteora_core.adapters.folders import INFO_FILE
from meteora_core.checkpoints.gate_statistics import SHIPPED
from meteora_core.errors import StorageError, UsageError
from meteora_core.files import holds_other_things, locked, other_entries
from meteora_core.locks import sweep
from meteora_core.names import folder_of
from meteora_core.text import listed

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", INFO_FILE, SHIPPED)
"""What :func:`meteora_core.training.single_adapter.save_adapter` writes, and the statistics of the adapter, which a new one replaces too."""


def check_targets(root: Path, names: Iterable[str], *, replaced: Iterable[str] | None = None) -> None:
    """Check the names of adapters that will be written below ``root``, and that their folders contain no other files.

    Args:
        root: The folder of all adapters.
        names: The adapters' names.
        replaced: The names of those that will be trained and therefore replaced; None is all of them.

    Raises:
        UsageError: A name is invalid, a path leaves ``root``, or a folder contains files that Meteora did not write.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file, so no adapter can be written into it", hint="choose a folder with --out")
    folders = {name: folder_of(root, name, "adapter") for name in names}
    for name in folders if replaced is None else replaced:
        check_adapter_folder(folders[name])


def check_adapter_folder(folder: Path) -> None:
    """Check that a trained adapter may replace ``folder``: it does not exist, is empty, or contains only an adapter that Meteora trained.

    Raises:
        UsageError: The folder contains other files; the message names them.
    """
    hint = "choose another folder with --out, or move this one away"
    if holds_other_things(folder, "adapter_config.json"):
        raise UsageError(f"{folder} is not an adapter, so it is not replaced", hint=hint)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / INFO_FILE).is_file():
        raise UsageError(f"{folder} holds an adapter that was not trained by Meteora, so it is not replaced", hint=hint)
    if others := other_entries(folder, _ADAPTER_FILES):
        raise UsageError(f"{folder} contains files that do not belong to the adapter and would be lost: {listed(others)}", hint=hint)


@contextmanager
def only_writer(folders: Iterable[Path], *, is_main: bool) -> Iterator[None]:
    """Lock the output folders in the main process; see :func:`meteora_core.files.locked`. Raises BusyError, StorageError."""
    with ExitStack() as stack:
        for folder in folders if is_main else ():
            stack.enter_context(locked(folder))
        yield


def tidy(folder: Path, states: Path, *, is_main: bool) -> None:
    """Remove the files of a run that was killed after it had saved its result, unless another process is writing to the folder."""
    if is_main:
        sweep(folder)
        if states.is_dir():
            with suppress(StorageError), locked(folder):
                shutil.rmtree(states, ignore_errors=True)

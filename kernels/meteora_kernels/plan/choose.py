"""The function that decides which path runs, and the lookup of its table."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from meteora_kernels.plan import machine
from meteora_kernels.plan.table import Case, Facts, Row, Table, parse, shipped, shipped_tables

_log = logging.getLogger(__name__)

VARIABLE = "METEORA_KERNEL_TABLE"
"""The environment variable that names the user's table; if it is empty, no user's table is read."""


class CanRun(Protocol):
    """The signature of a path's ``can_run``."""

    def __call__(self, case: Case, row: Row) -> str | None: ...


_tables: dict[torch.device, Table] = {}
_choices: dict[Any, dict[Any, Row]] = {}


def choose(rows: tuple[Row, ...], case: Case, can_run: Mapping[str, CanRun]) -> Row:
    """The first row that fits and whose path can run the case.

    Args:
        rows: Rows of a table.
        case: The sizes of the call.
        can_run: For every path's name, the function that returns the reason why the path cannot run a case with a row, or None.

    Raises:
        LookupError: No row fits.
    """
    for row in rows:
        if row.fits(case) and can_run[row.path](case, row) is None:
            return row
    raise LookupError(f"no path fits {case}")


def choices_of(owner: Facts | str) -> dict[Any, Row]:
    """The choices that were made for these sizes, or by this caller of :func:`choose`. :func:`use` clears them."""
    return _choices.setdefault(owner, {})


@torch.compiler.assume_constant_result
def table_of(device: torch.device) -> Table:
    """The cached table for a device: the user's table, then the one for the GPU's name, for its compute capability, or the default."""
    found = _tables.get(device)
    if found is None:
        found = _tables[device] = _find(device)
    return found


def use(device: torch.device, table: Table | None) -> Table | None:
    """Use this table for a device from now on (None looks it up again), and return the table that was in use, if any."""
    before = _tables.pop(device, None)
    if table is not None:
        _tables[device] = table
    for choices in _choices.values():
        choices.clear()
    return before


def user_file(name: str) -> Path | None:
    """The path of the user's table for a GPU: ``$METEORA_KERNEL_TABLE``, or ``kernels/<name>.toml`` in Meteora's cache folder."""
    explicit = os.environ.get(VARIABLE)
    if explicit is not None:
        return Path(explicit).expanduser() if explicit else None
    cache, xdg = os.environ.get("METEORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache).expanduser() if cache else (Path(xdg) if xdg else Path.home() / ".cache") / "meteora"
    return folder / "kernels" / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.toml"


def shipped_for(name: str, capability: int) -> tuple[Table, str]:
    """The shipped table for a GPU, and how it was found: "name", "compute capability" or "default".

    Args:
        name: The device's name, for example "NVIDIA H100 80GB HBM3"; "" for a CPU.
        capability: The device's compute capability, major * 10 + minor.
    """
    tables = shipped_tables()
    for table in tables:
        if any(part in name for part in table.gpus):
            return table, "name"
    for table in tables:
        if capability and table.capability == capability:
            return table, "compute capability"
    return shipped("default"), "default"


def _find(device: torch.device) -> Table:
    if device.type != "cuda":
        return shipped("default")
    name = torch.cuda.get_device_name(device)
    table, by = shipped_for(name, machine.capability(device))
    if by != "name":
        hint = "`meteora bench-kernels --tune` measures a table for it"
        _log.info("no kernel table for %s: taking that of %s, found by %s; %s", name, table.name, by, hint)
    own = user_table(name)
    return table if own is None else own.before(table)


def user_table(name: str) -> Table | None:
    """The user's table for a GPU, or None. A table that cannot be read is reported in the log and ignored."""
    file = user_file(name)
    try:
        return None if file is None or not file.is_file() else parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, ValueError) as error:
        _log.warning("the kernel table %s cannot be used (%s); run `meteora bench-kernels --tune` again or remove it", file, error)
        return None

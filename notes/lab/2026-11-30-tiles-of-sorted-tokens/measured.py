"""The loop that the scripts of this folder share: compile every variant of some groups, or time each in a CUDA graph. Needs 2026-11-29-many-adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from common import capture, times

Works = dict[str, Callable[[], object]]


def measure(label: str, every: list[Works], works: Works, found: dict[str, dict[str, float]], *, warm: bool, file: str) -> None:
    """Run each variant of all groups once (``warm``), or time it together with ``works``, print microseconds per group and write ``found`` to a file."""
    for key in every[0]:
        try:
            if warm:
                every[0][key]()
                torch.cuda.synchronize()
            else:
                works[key] = capture(lambda key=key: [each[key]() for each in every])
        except Exception as problem:
            print(label, key, str(problem)[:200], flush=True)
    if not warm:
        taken = times(works, 15)
        found[label] = {key: value / len(every) for key, value in taken.items()}
        print(label, {key: round(value / len(every), 1) for key, value in sorted(taken.items(), key=lambda item: item[1])}, flush=True)
        (Path(os.environ.get("OUT", ".")) / file).write_text(json.dumps(found, indent=1))

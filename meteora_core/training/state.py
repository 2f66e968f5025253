"""What a resumed run needs, in safetensors and JSON: parameters, AdamW's moments, random states, the step, the log."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import CheckpointError, UsageError
from meteora_core.files import atomic_folder, read_json, write_json

_STATE = "state.safetensors"
_INFO = "state.json"
_PREFIX = "step-"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimiser steps that are done.
        history: One entry per log line: step, losses, accuracy, tokens.
        tokens: Real tokens seen.
        seconds: Time spent, over all sessions of the run.
    """

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0


def save_state(folder: Path, state: RunState, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> None:
    """Write ``folder/step-N`` atomically, then remove the older ones.

    Args:
        folder: Of the run's resumable states.
        state: Where the run stands.
        parameters: What trains, by name.
        optimizer: An AdamW over them.
        inputs: What fixes the run (settings, data and adapter hashes); a resumed run must have the same.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {"rng.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"param.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    target = folder / f"{_PREFIX}{state.step}"
    with atomic_folder(target) as temporary:
        save_file(tensors, temporary / _STATE)
        python_rng = random.getstate()
        info = {"step": state.step, "history": state.history, "tokens": state.tokens, "seconds": state.seconds, "inputs": inputs}
        write_json(temporary / _INFO, {**info, "python_rng": [python_rng[0], list(python_rng[1]), python_rng[2]]})
    for old in saved_states(folder)[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def saved_states(folder: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.name.startswith(_PREFIX) and path.name[len(_PREFIX) :].isdigit() and (path / _INFO).is_file()]
    return sorted(found, key=lambda path: int(path.name[len(_PREFIX) :]))


def load_state(folder: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, inputs: dict[str, Any]) -> RunState | None:
    """Restore the newest state of a run into parameters, optimizer and random generators.

    Returns:
        Where the run stands, or None when nothing was saved.

    Raises:
        UsageError: The saved run had other inputs; the differences are listed.
        CheckpointError: The state is broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    states = saved_states(folder)
    if not states:
        return None
    info = read_json(states[-1] / _INFO, error=CheckpointError, hint=f"remove {states[-1]} to go on from the start")
    if different := differences(info["inputs"], inputs):
        raise UsageError(f"cannot resume {folder.parent}: {'; '.join(different[:5])}", hint="start anew without --resume, or use the old settings")
    try:
        tensors = load_file(states[-1] / _STATE)
    except (SafetensorError, OSError) as broken:
        raise CheckpointError(f"{states[-1]} is broken: {broken}", hint=f"remove {states[-1]} to go on from the start") from broken
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"param.{name}"])
            moments = {key.split(".")[1]: value for key, value in tensors.items() if key.startswith("adam.") and key.split(".", 2)[2] == name}
            if moments:
                optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()}
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    version, internal, gauss = info["python_rng"]
    random.setstate((version, tuple(internal), gauss))
    return RunState(info["step"], info["history"], info["tokens"], info["seconds"])


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two nested dictionaries differ, as ``key: old -> new``."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, now {b}")
    return found

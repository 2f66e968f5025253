"""Malformed statistics, adapters and rows for `meteora route` and `meteora adapters`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from .cases import Case, document
from .forks import Outcome
from .kinds_models import _odd_file
from .mutate import join_tensors, mutate_document, mutate_tensors, split_tensors, strange

BANK = "bank"
SHIPPED = Path("adapters/beta/gate_stats.safetensors")
_HEADER = "meteora_gate_statistics"
_SPEED = ["--tokens", "60", "--max-length", "64"]
_ADD = ["adapters", "add", BANK, "adapters/beta", "--json", *_SPEED]


def living(rng: Random) -> Case:
    """One change to a bank, or to what would change it, and one command."""
    make: Callable[[Random], Case] = rng.choice([_statistics, _statistics, _recipe, _shipped, _rows, _adapter, _checkpoint, _mistake, _mistake, _odd])
    return make(rng)


def _statistics(rng: Random) -> Case:
    name = rng.choice(["alpha", "no_adapter"])
    what = mutate_tensors(rng, Path(BANK, "meteora.stats", f"{name}.safetensors"))
    argv = rng.choice([_ADD, ["adapters", "list", BANK, "--json"], ["adapters", "drop", BANK, "no_adapter", "--json"]])
    return Case(f"statistics of {name}: {what}", argv, writes=(BANK,), check=_finite(BANK) if argv is _ADD else None)


def _recipe(rng: Random) -> Case:
    """Statistics of another scale, answer share, frame, base or adapter never join the others."""
    file = Path(BANK, "meteora.stats", "alpha.safetensors")
    key, value, why = rng.choice(
        [
            ("scale", 4.0, "another scale"),
            ("answer_share", 0.5, "another answer share"),
            ("frame", "Q: {}", "another frame"),
            ("adapter", "gamma", "statistics of another adapter"),
            ("adapter_sha256", "0" * 64, "statistics of other weights"),
            ("probe", [0.5] * 4, "statistics of another base"),
        ]
    )
    header, body = split_tensors(file.read_bytes())
    values = json.loads(header["__metadata__"][_HEADER])
    owner = values["recipe"] if key in values["recipe"] else values["base"] if key == "probe" else values
    owner[key] = value
    header["__metadata__"][_HEADER] = json.dumps(values)
    file.write_bytes(join_tensors(header, body))
    return Case(f"statistics with {key} {value!r}", _ADD, "fail", why, writes=(BANK,))


def _shipped(rng: Random) -> Case:
    shutil.copy(Path(BANK, "meteora.stats", "alpha.safetensors"), SHIPPED)
    if rng.randrange(2):
        return Case("statistics of another adapter in the adapter's folder", _ADD, "fail", "they are of other weights", writes=(BANK,))
    what = mutate_tensors(rng, SHIPPED)
    argv = rng.choice([_ADD, ["route", "adapters", "--data", "datasets", "--out", "runs/new", "--json", *_SPEED]])
    return Case(f"statistics in the adapter's folder: {what}", argv, writes=(BANK, "runs/new"))


def _rows(rng: Random) -> Case:
    file = Path("raw/beta.jsonl")
    lines = file.read_text().splitlines()
    row = json.loads(lines[place := rng.randrange(len(lines))])
    if rng.randrange(2):
        what, row["response"] = strange(rng)
        try:
            lines[place] = json.dumps(row)
        except (TypeError, ValueError):
            lines[place] = "{"
    else:
        what, lines = "no rows", [""] * rng.randrange(3)
    file.write_text("\n".join(lines))
    return Case(f"rows with {what}", [*_ADD, "--rows", str(file)], writes=(BANK,))


def _adapter(rng: Random) -> Case:
    if rng.randrange(2):
        what = mutate_document(rng, Path("adapters/beta/adapter_config.json"))
    else:
        what = mutate_tensors(rng, Path("adapters/beta/adapter_model.safetensors"))
    if rng.randrange(2):
        return Case(f"new adapter: {what}", _ADD, writes=(BANK,), check=_finite(BANK))
    argv = ["route", "adapters", "--data", "datasets", "--out", "runs/new", "--json", *_SPEED]
    return Case(f"one of two adapters: {what}", argv, writes=("runs/new",), check=_finite("runs/new"))


def _checkpoint(rng: Random) -> Case:
    what = mutate_document(rng, Path(BANK, "meteora_config.json")) if rng.randrange(2) else mutate_tensors(rng, Path(BANK, "meteora.safetensors"))
    argv = rng.choice([_ADD, ["adapters", "drop", BANK, "no_adapter", "--json"], ["adapters", "list", BANK, "--json"]])
    return Case(f"checkpoint: {what}", argv, writes=(BANK,))


def _mistake(rng: Random) -> Case:
    argv, why = rng.choice(
        [
            (["add", BANK, "adapters/alpha"], "the adapter is in the bank already"),
            (["add", BANK, "adapters/alpha", "--name", "twin"], "the bank has this adapter under another name"),
            (["add", BANK, "no_adapter"], "the bank has a base route already"),
            (["add", BANK, "adapters/beta", "--name", "no_adapter"], "the name is that of the base route"),
            (["add", BANK, "adapters/beta", "--name", "../beta"], "the name is a path"),
            (["add", BANK, "adapters"], "it is no adapter"),
            (["add", "runs/nothing", "adapters/beta"], "there is no checkpoint"),
            (["update", BANK, "adapters/beta"], "there is no such adapter to update"),
            (["drop", BANK, "alpha"], "it is the last adapter"),
            (["drop", BANK, "beta"], "there is no such adapter"),
            (["drop", BANK, "\x1b[31mred"], "there is no such adapter"),
        ]
    )
    return Case(" ".join(argv), ["adapters", *argv], "fail", why, writes=(BANK,))


def _odd(rng: Random) -> Case:
    file = Path(BANK, "meteora.stats", rng.choice(["alpha.safetensors", "no_adapter.safetensors"]))
    return Case(f"statistics: {_odd_file(rng, file)}", rng.choice([_ADD, ["adapters", "list", BANK, "--json"]]), writes=(BANK,))


def _finite(folder: str) -> Callable[[Outcome], str | None]:
    """Checks that the gates of a checkpoint are finite, and that its adapters are those that were reported."""

    def check(outcome: Outcome) -> str | None:
        import torch
        from safetensors.torch import load_file

        gates = {name: tensor for name, tensor in load_file(Path(folder, "meteora.safetensors")).items() if name.endswith(".gate")}
        names = [adapter["name"] for adapter in json.loads(Path(folder, "meteora_config.json").read_text())["adapters"]]
        if names != document(outcome)["adapters"]:
            return f"reported {document(outcome)['adapters']}, wrote {names}"
        if not gates or any(len(gate) != len(names) or not torch.isfinite(gate).all() for gate in gates.values()):
            return "gates that are not finite, or have too few rows"
        return None

    return check

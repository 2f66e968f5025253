"""The stacks of adapters in a native checkpoint: their tensors, and their entries in the configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.stack import Stack

FORMAT = 2
"""The newest format of checkpoints. Those that use none of :data:`FEATURES` have format 1, so that earlier versions of Meteora read them."""
FEATURES = ("scale", "shift", "experts")
"""What checkpoints of format 2 can use beyond plain LoRA: scales of the base layer's output (DoRA), shifts (biases), and experts of mixtures."""
TABLES = ("scale", "shift")
"""The optional tables of a stack, of shape (N, out), by their names in the weight file."""


def stack_tensors(path: str, stack: Stack) -> dict[str, Tensor]:
    """Return the tensors of embedded adapters of one layer, by their names in the weight file. The stack has no pending parts."""
    tables = {f"{path}.{name}": getattr(stack, name) for name in TABLES if getattr(stack, name) is not None}
    return {f"{path}.lora_A": stack.A, f"{path}.lora_B": stack.B, **tables}


def stack_entry(stack: Stack) -> dict[str, Any]:
    """Return the entry of a layer in ``modules`` of the configuration; keys of adapters other than plain LoRA only where they apply."""
    entry: dict[str, Any] = {
        "in_features": stack.in_features,
        "out_features": stack.out_features,
        "ranks": list(stack.ranks),
        "scaling": [float(value) for value in stack.scaling.cpu()],
    }
    if tables := stack.tables:
        entry["tables"] = list(tables)
    if stack.experts > 1:
        entry["experts"] = stack.experts
    return entry


def read_stack(path: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Stack:
    """Return the embedded adapters of one layer, from its entry in the configuration and the tensors of the weight file."""
    scale, shift = (tensors[f"{path}.{name}"].float() if name in entry.get("tables", ()) else None for name in TABLES)
    scaling = torch.tensor(entry["scaling"], dtype=torch.float32)
    A, B = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
    return Stack(A, B, tuple(entry["ranks"]), scaling, scale, shift, experts=entry.get("experts", 1))


def features_used(modules: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return those of :data:`FEATURES` that the layers of a configuration use."""
    rules: dict[str, Callable[[Mapping[str, Any]], bool]] = {
        "scale": lambda entry: "scale" in entry.get("tables", ()),
        "shift": lambda entry: "shift" in entry.get("tables", ()),
        "experts": lambda entry: entry.get("experts", 1) > 1,
    }
    entries = list(modules)
    return [name for name, uses in rules.items() if any(map(uses, entries))]


def with_features(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the ``format`` and ``features`` that its layers need."""
    features = features_used(config["modules"].values())
    rest = {key: value for key, value in config.items() if key != "features"}
    return {**rest, "format": FORMAT, "features": features} if features else {**rest, "format": 1}

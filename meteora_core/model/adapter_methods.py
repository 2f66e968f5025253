"""transformers' methods for adapters on a model with adapters attached: which adapters are active, and whether any is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from meteora_core.errors import UsageError, did_you_mean
from meteora_core.routing import meteora_of

CHANGING = ("set_adapter", "disable_adapters", "enable_adapters", "active_adapters")
REFUSED = {
    "load_adapter": "add it to the bank: `meteora adapters add`, or AdapterBank.from_peft and attach again",
    "add_adapter": "train it alone, then attach a bank that contains it",
    "delete_adapter": "drop it from the bank: `meteora adapters drop`, or model.meteora.mute([name])",
    "get_adapter_state_dict": "save it: `meteora ckpt export CHECKPOINT DIR --adapter NAME`",
}
"""Methods of transformers for which a bank of adapters has another way, with the hint that says which."""


class AdapterMethod:
    """One of transformers' methods for adapters, of a model with adapters attached.

    transformers keeps adapters of its own, and would say that none are loaded. :func:`meteora_core.model.attach.attach` replaces the methods of the model with
    these objects and :func:`meteora_core.model.attach.detach` restores them. Copies and pickles of the model get objects of their own.

    Args:
        model: The model with adapters attached.
        name: The name of the method.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Do what the method of this name does; see :func:`set_adapter` and the functions after it."""
        if self.name in REFUSED:
            raise UsageError(f"{self.name} does not work on a model with Meteora's adapters attached", hint=REFUSED[self.name])
        return globals()[self.name](self.model, *args, **options)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str]) -> None:
    """Restrict the model to some adapters: a single one is forced, and among several the gates choose.

    Unlike PEFT, several active adapters are not added up; ``model.meteora.mix`` does that, with weights.

    Args:
        model: A model with adapters attached.
        adapter_name: Names of the adapters that may be used. All names give the gates their free choice again.

    Raises:
        UsageError: A name is unknown, or the list is empty.

    Example:
        >>> from meteora_core import load_checkpoint
        >>> model = load_checkpoint("runs/mine")
        >>> model.set_adapter("gsm8k")
        >>> model.active_adapters()
        ['gsm8k']
        >>> model.set_adapter(model.meteora.names)
        >>> model.active_adapters()
        ['gsm8k', 'strategyqa']
    """
    state = meteora_of(model)
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    for name in names:
        if name not in state.names:
            raise UsageError(f"no adapter named {name!r}", hint=did_you_mean(name, state.names) or f"there are: {', '.join(state.names)}")
    if not names:
        raise UsageError("no adapter is named", hint="name at least one, or call disable_adapters()")
    state.choose(names)


def disable_adapters(model: nn.Module) -> None:
    """Switch all adapters off, so that the model computes what its base model computes, until :func:`enable_adapters` is called."""
    state = meteora_of(model)
    state.mode = replace(state.mode, enabled=False)


def enable_adapters(model: nn.Module) -> None:
    """Switch the adapters on again that :func:`set_adapter` chose last; all of them if it was never called."""
    state = meteora_of(model)
    state.mode = replace(state.mode, enabled=True)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that can have an effect: the forced one, or those that the gates may choose; none while adapters are disabled."""
    state = meteora_of(model)
    if not state.mode.enabled:
        return []
    if state.mode.forced is not None:
        chosen = set(state.mode.forced.flatten().tolist())
        return [name for index, name in enumerate(state.names) if index in chosen]
    return [name for name in state.names if name not in state.muted]


def offer_adapter_methods(model: nn.Module) -> None:
    """Replace transformers' methods for adapters, if the model has them (:class:`AdapterMethod`)."""
    for name in (*CHANGING, *REFUSED):
        if hasattr(type(model), name):
            setattr(model, name, AdapterMethod(model, name))


def withdraw_adapter_methods(model: nn.Module) -> None:
    """Restore transformers' methods for adapters."""
    for name in (*CHANGING, *REFUSED):
        if isinstance(vars(model).get(name), AdapterMethod):
            delattr(model, name)

"""Put MeteoRA layers into a model in place, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from meteora_core.adapters.bank import AdapterBank, natural_order
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.magnitudes import check_stack
from meteora_core.adapters.stack import Stack, resolved
from meteora_core.errors import AdapterError, UsageError
from meteora_core.fused.fuse import unfuse
from meteora_core.model.adapter_methods import offer_adapter_methods, withdraw_adapter_methods
from meteora_core.model.caches import bypassed
from meteora_core.model.experts import ExpertsLinear, ExpertsWeight, MeteoraExperts, find_experts
from meteora_core.model.layer import MeteoraLinear
from meteora_core.model.linears import bias_of, can_carry, features_of, plain_weight
from meteora_core.model.offload import compute_device, real_tensor
from meteora_core.model.resize import Resizer
from meteora_core.model.saving import guard_saving, unguard_saving
from meteora_core.model.tokens import is_head, is_output_layer, is_routed_expert, stop_watching, watch_calls
from meteora_core.routing import GateOrigin, GateStart, Meteora, base_record, find_meteora, meteora_of
from meteora_core.routing.base_marks import mark_base, roundings
from meteora_core.tensors import is_quantized

Model = TypeVar("Model", bound=nn.Module)
Trainable = Literal["none", "gates", "gates+adapters"]
GateInit = Literal["normal", "zeros", "arrow"]


def attach(
    model: Model,
    bank: AdapterBank,
    top_k: int = 2,
    temperature: float = 1.0,
    backend: str = "auto",
    *,
    init: GateInit = "normal",
    seed: int = 0,
    dropout: float = 0.0,
) -> Model:
    """Wrap, in place, every linear layer that the bank targets. The model keeps its class and gets the attribute ``model.meteora``.

    The base model and the adapters are frozen; the gates require gradients (:func:`set_trainable` changes that).

    Args:
        model: Model whose targets are ``nn.Linear`` (or a quantised subclass), usually a Hugging Face causal language model.
        bank: The adapters, for example from ``AdapterBank.from_peft``.
        top_k: Number of adapters per token and layer, 1 <= top_k <= N.
        temperature: Routing temperature T > 0; divides the gate logits before the softmax.
        backend: "auto" or a name of ``meteora_kernels.BACKENDS``.
        init: Initial gates: "normal" (std 0.02), "zeros", or "arrow" (each adapter's leading right singular vector).
        seed: Seed of the normal initialisation; the gates are the same on every device and in every process.
        dropout: Dropout probability of the adapters' input during training.

    Returns:
        The same model.

    Raises:
        AdapterError: A target is missing in the model, is not a linear layer, or has different shapes; an adapter does not match its configuration, was
            trained on a modified base model, or overflows in the model's dtype. The model is unchanged.
        UsageError: top_k, temperature, backend or init is out of range; adapters are already attached, by Meteora or by PEFT; or a target has no
            weights (it is on the device "meta", and accelerate has no values for it).

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from meteora_core import AdapterBank, attach
        >>> bank = AdapterBank.from_peft({"gsm8k": "adapters/gsm8k", "strategyqa": "adapters/strategyqa"})
        >>> model = attach(AutoModelForCausalLM.from_pretrained("base"), bank, top_k=2)
        >>> model.meteora.names
        ('gsm8k', 'strategyqa')
    """
    if find_meteora(model) is not None:
        raise UsageError("this model has adapters attached already", hint="call meteora_core.detach(model) first")
    if init not in ("normal", "zeros", "arrow"):
        raise UsageError(f"unknown gate start {init!r}", hint="choose from: normal, zeros, arrow")
    _refuse_wrapped(model, bank)
    state = Meteora(bank.adapters, top_k, temperature, backend)
    known = state.provenance
    bank, known.renamed = fit_to_base(bank, model)
    targets = find_targets(model, bank)
    bank = resolve_bank(bank, targets)
    for path, module in targets.items():
        compute_device(module, path)  # raises an error before the model is changed
        check_stack(path, bank.modules[path], bank.names, computing_dtype(module, bank.modules[path]))
    if unused := bypassed(model, {path: module for path, module in targets.items() if not is_routed_expert(path)}):
        raise AdapterError(
            f"adapters of {unused[0]} would have no effect: this model uses its weight directly and never calls the module",
            hint="use adapters that do not target such modules (train them again without, or list them in exclude_modules)",
        )
    known.base, known.base_probe, known.base_marks = base_record(model), probe_base(targets), mark_base(model)
    known.gates = "closed form" if init == "arrow" or len(bank) == 1 else "untrained"  # a single adapter always has weight 1
    known.start = GateStart(init, seed, tuple(bank.modules))
    generator = torch.Generator().manual_seed(seed)
    for path, stack in bank.modules.items():
        layer = _wrap(targets[path], path, stack, state, init, generator, dropout)
        if isinstance(layer, ExpertsLinear):
            _place_experts(model, path, layer)
            continue
        layer.is_output = is_output_layer(model, path)
        if is_head(model, path):
            model.resize_token_embeddings = Resizer(model, path)  # type: ignore[assignment]
        _replace(model, path, layer)
    watch_calls(model, state)
    vars(model).pop("meteora_base")  # moved to the provenance
    model.meteora = state  # type: ignore[assignment]
    guard_saving(model)
    offer_adapter_methods(model)
    set_trainable(model, "gates")
    return model


def detach(model: Model) -> Model:
    """Remove all MeteoRA layers, in place, and restore the linear layers of the base model. Raises UsageError if no adapters are attached.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from meteora_core import AdapterBank, attach, detach
        >>> bank = AdapterBank.from_peft({"gsm8k": "adapters/gsm8k", "strategyqa": "adapters/strategyqa"})
        >>> model = attach(AutoModelForCausalLM.from_pretrained("base"), bank)
        >>> detach(model).model.layers[0].self_attn.q_proj
        Linear(in_features=32, out_features=32, bias=False)
    """
    unfuse(model)
    for path, layer in dict(meteora_layers(model)).items():
        if not isinstance(layer, ExpertsLinear):
            _replace(model, path, layer.base_layer)
    for path, experts in [(path, module) for path, module in model.named_modules() if isinstance(module, MeteoraExperts)]:
        _replace(model, path, experts.base_layer)
    stop_watching(model)
    unguard_saving(model)
    withdraw_adapter_methods(model)
    if isinstance(vars(model).get("resize_token_embeddings"), Resizer):
        del model.resize_token_embeddings
    record = base_record(model)
    del model.meteora
    model.meteora_base = record  # type: ignore[assignment]
    return model


def meteora_layers(model: nn.Module) -> Iterator[tuple[str, MeteoraLinear]]:
    """Yield ``(path, layer)`` of every MeteoRA layer, in the model's order."""
    for _, module in model.named_modules():
        if isinstance(module, MeteoraLinear):
            yield module.path, module


def set_trainable(model: nn.Module, what: Trainable) -> list[nn.Parameter]:
    """Make the gates trainable, or the gates and the adapters, or nothing; freeze all other parameters, and return the trainable ones.

    Trainable adapters may differ from the adapters in their folders; checkpoints of the model embed them from then on.

    Raises:
        UsageError: No adapters are attached, or ``what`` is unknown.
    """
    known = meteora_of(model).provenance
    if what not in ("none", "gates", "gates+adapters"):
        raise UsageError(f"cannot train {what!r}", hint="choose from: gates, gates+adapters")
    if what == "gates+adapters":
        if scaled := next((path for path, layer in meteora_layers(model) if layer.scale is not None), None):
            raise UsageError(
                f"DoRA adapters cannot be trained together with gates: their factors on {scaled} depend on their weights",
                hint="train the gates alone, or train the adapters with `meteora train adapters`",
            )
        known.embedded = True
    model.requires_grad_(False)
    trained = []
    for _, layer in meteora_layers(model):
        chosen = {"none": [], "gates": [layer.gate], "gates+adapters": [layer.gate, layer.lora_A, layer.lora_B]}[what]
        for parameter in chosen:
            parameter.requires_grad_(True)
            trained.append(parameter)
    return trained


def gate_origin(model: nn.Module, gates: Mapping[str, Tensor] | None = None) -> GateOrigin:
    """The origin of the gates of an attached model.

    Gates that are not marked as trained are compared with their initial values from :func:`attach`; if any value differs, they are "trained".

    Args:
        model: A model with adapters attached.
        gates: Whole gates by layer, for a model whose gates are sharded; None takes the gates of the model.

    Raises:
        UsageError: No adapters are attached.
    """
    known = meteora_of(model).provenance
    if known.gates != "untrained" or known.start is None:
        return known.gates
    generator = torch.Generator().manual_seed(known.start.seed)
    layers = dict(meteora_layers(model))
    for path in known.start.paths:
        gate = real_tensor(layers[path], "gate", path) if gates is None else gates[path]
        now = gate.detach().to("cpu", torch.float32)
        start = torch.zeros(now.shape) if known.start.init == "zeros" else _normal_gate(now.shape, generator)
        if not any(torch.equal(now, rounded) for rounded in roundings(start)):
            return "trained"
    return "untrained"


def probe_base(linears: Mapping[str, nn.Module]) -> list[float] | None:
    """A few weights of up to 16 of the linear layers, from which the base model is recognised; None if they are quantised."""
    paths = sorted(linears, key=natural_order)
    values: list[float] = []
    for path in paths[:: max(1, len(paths) // 16)][:16]:
        weight = getattr(linears[path], "weight", None)
        if not isinstance(weight, Tensor) or is_quantized(weight) or weight.ndim < 2:
            return None
        weight = weight if isinstance(linears[path], ExpertsWeight) else real_tensor(linears[path], "weight", path)
        flat = weight.detach().reshape(-1)
        step = max(1, flat.shape[0] // 4)
        values += [float(value) for value in flat[::step][:4].float().cpu()]
    return values


def same_base(mine: list[float] | None, theirs: list[float] | None) -> bool:
    """Whether two probes come from the same weights, allowing for the rounding of 16-bit types; True when either is unknown."""
    if mine is None or theirs is None:
        return True
    return len(mine) == len(theirs) and all(abs(a - b) <= 1e-2 * max(abs(a), abs(b)) + 1e-6 for a, b in zip(mine, theirs, strict=True))


def _refuse_wrapped(model: nn.Module, bank: AdapterBank) -> None:
    """Raise UsageError for a wrapped model: PEFT's layers hide the linear layers, and a wrapper such as DDP changes all module names."""
    if isinstance(getattr(model, "module", None), nn.Module) and not any(path.startswith("module.") for path in bank.modules):
        raise UsageError(f"the model is wrapped in a {type(model).__name__}", hint="attach adapters to the model itself (model.module), then wrap it")
    for path, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            where = f" (at {path})" if path else ""
            raise UsageError(
                f"this model carries adapters that PEFT put on it{where}",
                hint="attach to the base model alone: Meteora reads the adapters from their folders, AdapterBank.from_peft({name: folder})",
            )


def find_targets(model: nn.Module, bank: AdapterBank) -> dict[str, nn.Module]:
    """The linear layers, and the parameters of experts, that a bank targets in a model, by path.

    Raises:
        AdapterError: A target is missing, is not a linear layer, has different shapes, or is targeted under two names (a layer that the model shares).
    """
    targets: dict[str, nn.Module] = {}
    names: dict[int, str] = {}
    for path, stack in bank.modules.items():
        targets[path] = _target(model, path, stack)
        if (other := names.setdefault(id(targets[path]), path)) != path:
            raise AdapterError(
                f"the adapters target {path}, which is {other} under another name in this model: it can carry one of the two",
                hint="the adapters were trained on another base model",
            )
    return targets


def resolve_bank(bank: AdapterBank, targets: Mapping[str, nn.Module]) -> AdapterBank:
    """A bank whose stacks have no pending parts: DoRA factors, and differences of biases and whole weights, are computed from the base layers.

    Args:
        bank: The bank, fitted to the model.
        targets: The layers of the model that the bank targets, by path.

    Raises:
        UsageError: A layer is quantised and its weight cannot be read.
    """
    modules = {
        path: resolved(stack, plain_weight(targets[path], path), bias_of(targets[path], path)) if stack.pending else stack
        for path, stack in bank.modules.items()
    }
    return replace(bank, modules=modules)


def computing_dtype(base: nn.Module, stack: Stack) -> torch.dtype:
    """The dtype of the adapters of a linear layer: that of its weight, or that of the stack if the layer is quantised."""
    weight = getattr(base, "weight", None)  # some quantised layers have no attribute of that name
    return weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1 else stack.A.dtype


def _target(model: nn.Module, path: str, stack: Stack) -> nn.Module:
    if stack.experts > 1:
        return find_experts(model, path, stack)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise AdapterError(
            f"the adapters target {path}, which {type(model).__name__} does not have",
            hint="the adapters were trained on another base model",
        ) from None
    if not can_carry(module):
        raise AdapterError(
            f"the adapters target {path}, which is a {type(module).__name__}; only nn.Linear, its subclasses and Conv1D can carry adapters",
            hint="use adapters of other modules, or another base model",
        )
    width, out = features_of(module)
    if (width, out) != (stack.in_features, stack.out_features):
        raise AdapterError(
            f"{path}: the adapters map {stack.in_features} to {stack.out_features} features, the base layer {width} to {out}",
            hint="the adapters were trained on another base model",
        )
    return module


def _place_experts(model: nn.Module, path: str, layer: ExpertsLinear) -> None:
    """Put the adapters of one parameter of experts into the module that takes the place of the experts."""
    parent, _, name = path.rpartition(".")
    experts = model.get_submodule(parent)
    if not isinstance(experts, MeteoraExperts):
        experts = MeteoraExperts(experts, layer.state)
        _replace(model, parent, experts)
    setattr(experts, name, layer)


def _wrap(base: nn.Module, path: str, stack: Stack, state: Meteora, init: GateInit, generator: torch.Generator, dropout: float) -> MeteoraLinear:
    options = {"device": compute_device(base, path), "dtype": computing_dtype(base, stack)}
    gate = start_gate(stack, init, generator)
    A, B = stack.A.to(**options, copy=True), stack.B.to(**options, copy=True)  # type: ignore[call-overload]  # the bank stays unchanged
    if isinstance(base, ExpertsWeight):
        return ExpertsLinear(base, path, gate.to(**options), replace(stack, A=A, B=B), state).train(base.training)  # type: ignore[call-overload]
    layer = MeteoraLinear(base, path, gate.to(**options), replace(stack, A=A, B=B), state, dropout)  # type: ignore[call-overload]
    return layer.train(base.training)


def start_gate(stack: Stack, init: GateInit, generator: torch.Generator) -> Tensor:
    """The initial gate of a layer, float32 (N, in), on the CPU.

    "arrow" is training-free routing as in Arrow (Ostapenko et al., arXiv 2405.11157): row ``i`` is the leading right singular vector of
    ``B_i A_i``, without a scale. Its sign is arbitrary; it is chosen so that the largest entry is positive. Rows of adapters of rank 0 are 0.
    """
    if init == "zeros":
        return torch.zeros(len(stack.ranks), stack.in_features)
    if init == "normal":
        return _normal_gate((len(stack.ranks), stack.in_features), generator)
    rows, start = [], 0
    for rank in stack.ranks:
        A, B = stack.A[start : start + rank].float(), stack.B[start : start + rank].float().t()
        start += rank
        if rank == 0:
            rows.append(torch.zeros(stack.in_features))
            continue
        q, r = torch.linalg.qr(A.t())
        if stack.experts > 1:  # the products of all experts, one below the other
            mixed = torch.linalg.qr(B.t().reshape(stack.experts, -1, len(B)).transpose(1, 2)).R @ A.reshape(stack.experts, -1, A.shape[1])
            vector = torch.linalg.svd(mixed.flatten(0, 1), full_matrices=False).Vh[0]
        else:
            vector = q @ torch.linalg.svd(torch.linalg.qr(B).R @ r.t()).Vh[0]
        rows.append(vector * torch.sign(vector[vector.abs().argmax()]))
    return torch.stack(rows)


def _normal_gate(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator) * 0.02


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

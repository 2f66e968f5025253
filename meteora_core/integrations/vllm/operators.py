"""The operators in vLLM's compiled graphs: ``group`` computes base layer and adapters together, ``add`` adds adapters to the base layer's output. ``before``
and ``after`` do the same as ``add`` in two steps; in a CUDA graph, the first one runs at the same time as the base layer.

An operator receives a layer's block of memory, and looks the layer up by the address of the block. Thus all layers of a model have the same graph, which is
compiled once. The operators are opaque to compilers; whether a step is plain or observed is decided when they run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

from meteora_core.integrations.vllm.layout import Block, weights_of
from meteora_core.integrations.vllm.mixing import Layer, added, chosen_down, fresh, mixed, observed, summed_logits
from meteora_core.integrations.vllm.runtime import Runtime
from meteora_core.integrations.vllm.served import Served
from meteora_kernels import Routing, pick_backend, plan, run_group
from meteora_kernels.steps.second_stream import on_second_stream

_layers: dict[int, Layer] = {}
_joins: dict[int, Callable[[], None]] = {}
"""For each layer between ``before`` and ``after``, the function that makes the current stream wait for the second one."""


def has_kernels(device: torch.device, dtype: torch.dtype, config: Served) -> bool:
    """Whether the GPU kernels support a device and a dtype."""
    if plan.why_not_triton(device.type, dtype) is not None or device.type != "cuda":
        return False
    count, top_k = len(config.store.names), config.default.top_k
    return pick_backend(torch.empty(1, 64, dtype=dtype, device=device), count, 8 * count, top_k, training=False)[0] == "triton"


def register_layer(block: Block, sums: bool, runtime: Runtime, config: Served) -> None:
    """Make a layer known to the operators."""
    default = config.default
    runtime.default, runtime.names, runtime.count_every = default, config.store.names, config.count_every
    for path in block.shape.paths:
        if path is not None and path not in runtime.paths:
            runtime.paths.append(path)
    kernels = has_kernels(block.rows.device, block.rows.dtype, config)
    table = runtime.make_table(config.most_tokens, block.rows.device) if kernels and config.most_tokens else None
    _layers[block.rows.data_ptr()] = Layer(block, sums, Routing(default.top_k, default.temperature, table), kernels, runtime)


def group(x: Tensor, rows: Tensor, outputs: int) -> Tensor:
    """Base and adapters of a layer: (M, O) for x (M, h)."""
    layer = _layers[rows.data_ptr()]
    if layer.runtime.observed:
        return observed(layer, x, F.linear(x, weights_of(layer.block)))
    assert layer.block.group is not None
    return run_group(x if x.stride(-1) == 1 else x.contiguous(), layer.block.group, layer.routing)


def group_fake(x: Tensor, rows: Tensor, outputs: int) -> Tensor:
    """An empty tensor like the result of :func:`group`."""
    return x.new_empty(x.shape[0], outputs)


def add(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """A new tensor: ``y`` (M, O) plus the outputs of the adapters for x (M, h)."""
    layer = _layers[rows.data_ptr()]
    if layer.runtime.observed:
        return observed(layer, x, y)
    if layer.kernels:
        return added(layer, chosen_down(layer, x), y)
    if layer.sums:
        logits = summed_logits(x, layer.block.single[0])
        return observed(layer, x, y, logits)
    parts = torch.split(y, list(layer.block.shape.widths), dim=1)
    found = [part if adapters is None else mixed(x, part, adapters, layer.routing) for part, adapters in zip(parts, layer.block.single, strict=True)]
    return fresh(found, y)


def add_fake(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """An empty tensor like the result of :func:`add`."""
    return y.new_empty(y.shape)


def before(x: Tensor, rows: Tensor, width: int) -> Tensor:
    """The part of the adapters that does not depend on the base layer's output, for ``after``: (M, width) for x (M, h). In a CUDA graph, it runs on a second
    stream."""
    layer = _layers[rows.data_ptr()]
    if layer.runtime.observed:
        return x.new_empty(x.shape[0], width)
    with on_second_stream(x) as join:
        found = chosen_down(layer, x)
    _joins[rows.data_ptr()] = join
    return found


def before_fake(x: Tensor, rows: Tensor, width: int) -> Tensor:
    """An empty tensor like the result of :func:`before`."""
    return x.new_empty(x.shape[0], width)


def after(x: Tensor, y: Tensor, down: Tensor, rows: Tensor) -> Tensor:
    """A new tensor: ``y`` (M, O) plus the outputs of the adapters, given the result of :func:`before`. As an argument, x keeps its memory until then."""
    layer = _layers[rows.data_ptr()]
    if layer.runtime.observed:
        return observed(layer, x, y)
    _joins.pop(rows.data_ptr())()
    return added(layer, down, y)


def after_fake(x: Tensor, y: Tensor, down: Tensor, rows: Tensor) -> Tensor:
    """An empty tensor like the result of :func:`after`."""
    return y.new_empty(y.shape)


_library = Library("meteora_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]


def define() -> None:
    """Register the operators. Further calls in the same process have no effect."""
    for name, function, fake in (
        ("group", group, group_fake),
        ("add", add, add_fake),
        ("before", before, before_fake),
        ("after", after, after_fake),
    ):
        if not hasattr(torch.ops.meteora_vllm, name):
            direct_register_custom_op(op_name=name, op_func=function, fake_impl=fake, target_lib=_library)


define()


def layers() -> list[Any]:
    """The layers of this process."""
    return list(_layers.values())

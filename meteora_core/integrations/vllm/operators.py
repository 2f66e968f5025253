"""The two operators in vLLM's compiled graphs: ``group`` computes base layer and adapters together, ``add`` adds adapters to the base layer's output.

An operator receives a layer's block of memory, and looks the layer up by the address of the block. Thus all layers of a model have the same graph, which is
compiled once. The operators are opaque to compilers; whether a step is plain or observed is decided when they run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

from meteora_core.integrations.vllm.layout import Block, weights_of
from meteora_core.integrations.vllm.mixing import Layer, added, fresh, mixed, observed, summed_logits
from meteora_core.integrations.vllm.runtime import Runtime
from meteora_core.integrations.vllm.served import Served
from meteora_kernels import Routing, pick_backend, plan, run_group

_layers: dict[int, Layer] = {}


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
        return added(layer, x, y)
    if layer.sums:
        logits = summed_logits(x, layer.block.single[0])
        return observed(layer, x, y, logits)
    parts = torch.split(y, list(layer.block.shape.widths), dim=1)
    found = [part if adapters is None else mixed(x, part, adapters, layer.routing) for part, adapters in zip(parts, layer.block.single, strict=True)]
    return fresh(found, y)


def add_fake(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """An empty tensor like the result of :func:`add`."""
    return y.new_empty(y.shape)


_library = Library("meteora_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]


def define() -> None:
    """Register the operators. Further calls in the same process have no effect."""
    for name, function, fake in (("group", group, group_fake), ("add", add, add_fake)):
        if not hasattr(torch.ops.meteora_vllm, name):
            direct_register_custom_op(op_name=name, op_func=function, fake_impl=fake, target_lib=_library)


define()


def layers() -> list[Any]:
    """The layers of this process."""
    return list(_layers.values())

"""The operators in vLLM's compiled graphs: ``group`` computes base layer and adapters together, ``add`` adds adapters to the base layer's output, ``over``
calls the method of the base layer and adds the adapters, and ``eight`` does so for 8-bit weights, from an input that is quantised already. In a CUDA graph,
the part of the adapters' work that does not depend on the base layer's output runs at the same time as the base layer in ``over`` and ``eight``. They contain
the base layer because compilers would change the order of separate operators, so that nothing would run at the same time.

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

from meteora_core.integrations.vllm.eight_bits import EightBitBase
from meteora_core.integrations.vllm.layout import Block, weights_of
from meteora_core.integrations.vllm.mixing import Base, Layer, added, chosen_down, fresh, mixed, observed, summed_logits
from meteora_core.integrations.vllm.runtime import RUNTIME
from meteora_core.integrations.vllm.served import Served
from meteora_kernels import Routing, pick_backend, plan, run_group
from meteora_kernels.group.eight_bits import run_eight_bits
from meteora_kernels.steps.second_stream import on_second_stream

_layers: dict[int, Layer] = {}


def has_kernels(device: torch.device, dtype: torch.dtype, config: Served, members: int) -> bool:
    """Whether the GPU kernels support a device, a dtype and a number of members."""
    if members > 3 or plan.why_not_triton(device.type, dtype) is not None or device.type != "cuda":
        return False
    count, top_k = len(config.store.names), config.default.top_k
    return pick_backend(torch.empty(1, 64, dtype=dtype, device=device), count, 8 * count, top_k, training=False)[0] == "triton"


def register_layer(block: Block, sums: bool, config: Served, *, base: Base | None = None, eight: EightBitBase | None = None) -> None:
    """Make a layer known to the operators.

    Args:
        block: The memory of the layer.
        sums: Whether gate logits must be summed over the processes of a tensor-parallel group.
        config: The configuration.
        base: The function that computes the base layer, for :func:`over`.
        eight: The base layer, for :func:`eight`.
    """
    runtime = RUNTIME
    default = config.default
    runtime.default, runtime.names, runtime.count_every = default, config.store.names, config.count_every
    for path in block.shape.paths:
        if path is not None and path not in runtime.paths:
            runtime.paths.append(path)
    kernels = has_kernels(block.rows.device, block.rows.dtype, config, len(block.shape.widths))
    table = runtime.make_table(config.most_tokens, block.rows.device) if kernels and config.most_tokens else None
    _layers[block.rows.data_ptr()] = Layer(block, sums, Routing(default.top_k, default.temperature, table), kernels, runtime, base, eight)


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


def over(x: Tensor, bias: Tensor | None, rows: Tensor, outputs: int) -> Tensor:
    """Base and adapters of a layer, whose base is computed by the method that the layer has without adapters: (M, O) for x (M, h)."""
    layer = _layers[rows.data_ptr()]
    base = layer.base
    assert base is not None
    return observed(layer, x, base(x, bias)) if layer.runtime.observed else beside(layer, x, lambda: base(x, bias))


def over_fake(x: Tensor, bias: Tensor | None, rows: Tensor, outputs: int) -> Tensor:
    """An empty tensor like the result of :func:`over`."""
    return x.new_empty(x.shape[0], outputs)


def beside(layer: Layer, x: Tensor, base: Callable[[], Tensor]) -> Tensor:
    """The outputs of a layer for x (M, h). In a CUDA graph, ``base`` runs at the same time as the part of the adapters' work that does not need its result."""
    with on_second_stream(x) as join:
        down = chosen_down(layer, x)
    y = base()
    join()
    return added(layer, down, y)


def eight(x: Tensor, x8: Tensor, x_scale: Tensor, rows: Tensor, outputs: int) -> Tensor:
    """Base and adapters of a layer with 8-bit weights: (M, O) for x (M, h), and the same input in 8 bits with its factors.

    One launch computes a few dozen tokens. For other numbers of tokens, vLLM's kernel computes the base.
    """
    layer = _layers[rows.data_ptr()]
    own = layer.eight
    assert own is not None
    if layer.runtime.observed:
        return observed(layer, x, own.product(x8, x_scale))
    found = run_eight_bits(x, x8, x_scale, own.linears, layer.routing)
    return beside(layer, x, lambda: own.product(x8, x_scale)) if found is None else found


def eight_fake(x: Tensor, x8: Tensor, x_scale: Tensor, rows: Tensor, outputs: int) -> Tensor:
    """An empty tensor like the result of :func:`eight`."""
    return x.new_empty(x.shape[0], outputs)


_library = Library("meteora_vllm", "FRAGMENT")  # type: ignore[no-untyped-call]


def define() -> None:
    """Register the operators. Further calls in the same process have no effect."""
    for name, function, fake in (
        ("group", group, group_fake),
        ("add", add, add_fake),
        ("over", over, over_fake),
        ("eight", eight, eight_fake),
    ):
        if not hasattr(torch.ops.meteora_vllm, name):
            direct_register_custom_op(op_name=name, op_func=function, fake_impl=fake, target_lib=_library)


define()


def layers() -> list[Any]:
    """The layers of this process."""
    return list(_layers.values())

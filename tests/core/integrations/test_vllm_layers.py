"""The layers of the plugin for vLLM, without vLLM: memory, GPU kernels (in Triton's interpreter on a CPU) and options, against float64."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.integrations.vllm.eight_bits import base_of
from meteora_core.integrations.vllm.layout import WIDEST, Block, Shape, copies_up, weights_of
from meteora_core.integrations.vllm.mixing import Layer, added, chosen_down, observed
from meteora_core.integrations.vllm.options import Options
from meteora_core.integrations.vllm.runtime import Runtime, Scheduled
from meteora_core.integrations.vllm.slices import Slices
from meteora_core.integrations.vllm.warmup import different, sizes
from meteora_kernels import Adapters, Routing, reference, run_group
from meteora_kernels.group import row_for
from meteora_kernels.plan import EVER, Row, Span, use
from meteora_kernels.plan.table import shipped
from meteora_kernels.tile import Tile
from support.kernel_rows import taking

HIDDEN, COUNT = 64, 5
RANKS = {"q": [4, 0, 8, 8, 2], "v": [0, 4, 8, 4, 8]}
SCALING = {"q": [1.0, 0.0, 2.0, 0.5, 1.0], "v": [0.0, 2.0, 2.0, 1.0, 1.0]}
WIDTHS = {"q": 32, "v": 16}
ROUTING = Routing(2, 1.5)


class Weights:
    """A checkpoint of two layers with different ranks and scaling."""

    names = tuple(f"a{index}" for index in range(COUNT))

    def __init__(self) -> None:
        self.modules: dict[str, dict[str, Any]] = {path: {"ranks": RANKS[path], "scaling": SCALING[path]} for path in RANKS}
        self.tensors: dict[str, Tensor] = {}
        for path, ranks in RANKS.items():
            self.tensors[f"{path}.gate"] = torch.randn(COUNT, HIDDEN) * 0.4
            self.tensors[f"{path}.lora_A"] = torch.randn(sum(ranks), HIDDEN) * 0.2
            self.tensors[f"{path}.lora_B"] = torch.randn(sum(ranks), WIDTHS[path])

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def exact(self, path: str, x: Tensor, base: Tensor, routing: Routing) -> Tensor:
        """The layer in float64."""
        offsets = torch.tensor([0, *torch.tensor(RANKS[path]).cumsum(0).tolist()])
        gate, A, B = (self.tensors[f"{path}.{name}"].double() for name in ("gate", "lora_A", "lora_B"))
        return reference.mix(x.double(), base.double(), Adapters.of_layer(gate, A, B, torch.tensor(SCALING[path]), offsets, 8), routing)[0]


@pytest.fixture
def weights() -> Weights:
    return Weights()


PARTS = ("q", None, "v")
SIZES = [32, 16, 16]
WHOLE = Slices((0, HIDDEN), ((32, 0, 32), (16, 0, 16), (16, 0, 16)), False)


def block_of(weights: Weights, *, base: bool) -> Block:
    block = Block(Shape.of(weights, PARTS, SIZES), HIDDEN, torch.empty(0), base=base, wide=True)  # type: ignore[arg-type]
    block.fill(weights, WHOLE)  # type: ignore[arg-type]
    return block


def expected(weights: Weights, x: Tensor, base: Tensor, routing: Routing) -> Tensor:
    """The members' outputs in float64; the second member has no adapters."""
    parts = base.split(SIZES, dim=1)
    return torch.cat([weights.exact("q", x, parts[0], routing), parts[1].double(), weights.exact("v", x, parts[2], routing)], dim=1)


@pytest.mark.parametrize("tokens", [3, 20])
def test_kernels_for_members_of_different_ranks_and_a_member_without_adapters(weights: Weights, tokens: int) -> None:
    x, base = torch.randn(tokens, HIDDEN), torch.randn(64, HIDDEN) * 0.2
    together, apart = block_of(weights, base=True), block_of(weights, base=False)
    weights_of(together).copy_(base)
    assert together.group is not None
    y = x @ base.t()
    exact = expected(weights, x, y, ROUTING)
    torch.testing.assert_close(run_group(x, together.group, ROUTING).double(), exact, rtol=0, atol=2e-5)
    layer = Layer(apart, False, ROUTING, True, Runtime())
    torch.testing.assert_close(added(layer, chosen_down(layer, x), y).double(), exact, rtol=0, atol=2e-5)


def register(op_name: str, op_func: Any, fake_impl: Any, target_lib: torch.library.Library) -> None:
    """What vLLM's function of this name does on a CPU."""
    target_lib.define(op_name + torch.library.infer_schema(op_func, mutates_args=[]))
    target_lib.impl(op_name, op_func, "CPU")


@pytest.fixture(scope="module")
def operators() -> Iterator[Any]:
    """The module of operators, without vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm.utils.torch_utils", SimpleNamespace(direct_register_custom_op=register))
        yield importlib.import_module("meteora_core.integrations.vllm.operators")
    sys.modules.pop("meteora_core.integrations.vllm.operators")


@pytest.mark.parametrize("traced", [False, True])
def test_an_operator_calls_the_method_of_the_base_layer(weights: Weights, operators: Any, traced: bool) -> None:
    block, runtime = block_of(weights, base=False), Runtime()
    runtime.names, runtime.observed = list(weights.names), traced
    runtime._step = [Scheduled("a", 20, 0, Options(2, 1.5))]
    x, base, bias = torch.randn(20, HIDDEN), torch.randn(64, HIDDEN) * 0.2, torch.randn(64)
    operators._layers[block.rows.data_ptr()] = Layer(block, False, ROUTING, True, runtime, base=lambda x, bias: F.linear(x, base, bias))
    found = torch.ops.meteora_vllm.over(x, bias, block.rows, 64)
    torch.testing.assert_close(found.double(), expected(weights, x, F.linear(x, base, bias), ROUTING), rtol=0, atol=2e-5)
    assert set(runtime._live) == ({"q", "v"} if traced else set())


@pytest.mark.parametrize("scales", [1, 64])
def test_an_8_bit_base_and_adapters_in_one_launch_or_beside_each_other(weights: Weights, operators: Any, scales: int) -> None:
    """With factors of the tensor or of every output, as vLLM keeps them. For sizes without a row of the table, vLLM's kernel computes the base."""
    shape = Shape.of(weights, PARTS, SIZES)  # type: ignore[arg-type]
    block = Block(shape, HIDDEN, torch.empty(0, dtype=torch.float16), base=False, wide=False)
    block.fill(weights, WHOLE)  # type: ignore[arg-type]
    weight, scale, calls = torch.randn(64, HIDDEN).to(torch.float8_e4m3fn), torch.rand(scales, 1) * 0.1 + 0.05, list[int]()

    def product(A: Tensor, B: Tensor, As: Tensor, Bs: Tensor, out_dtype: torch.dtype, **more: Any) -> Tensor:
        calls.append(len(A))
        return ((A.float() * As) @ (B.float() * Bs.t())).to(out_dtype)

    kernel = SimpleNamespace(_get_layer_params=lambda layer: (layer.weight, layer.scale, None, None), apply_scaled_mm=product)
    base = base_of(kernel, SimpleNamespace(weight=torch.zeros_like(weight).t(), scale=torch.zeros_like(scale)), block.adapters)
    address, again = base.weight.data_ptr(), SimpleNamespace(weight=weight.clone().t(), scale=scale.clone())
    base.load_again(again)
    assert again.weight.data_ptr() == base.linears.weights.data_ptr() == address
    operators._layers[block.rows.data_ptr()] = Layer(block, False, ROUTING, True, Runtime(), eight=base)
    row = Row("one_launch", Span(1, 16), pieces=1, gate_pieces=2, tile=Tile(16, 64, 16, 4, 2))
    for tokens in (9, 18):
        x = torch.randn(tokens, HIDDEN).half()
        x8, x_scale = (x.float() * 8).to(torch.float8_e4m3fn), torch.full((tokens, 1), 1 / 8)
        with taking(row, Row("packed")):
            found = torch.ops.meteora_vllm.eight(x, x8, x_scale, block.rows, 64)
        exact = expected(weights, x, (x8.float() / 8) @ (weight.float() * scale).t(), ROUTING)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-2)
    assert calls == [18]


def test_processes_of_a_row_parallel_layer_choose_by_the_sum_of_their_logits(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes have half of the inputs each, and the sum of their outputs is the layer's. Both run once to learn what the other one would send."""
    x, sent, total, parts = torch.randn(6, HIDDEN), list[Tensor](), list[Tensor](), list[tuple[Layer, Tensor]]()
    for first in (0, HIDDEN // 2):
        block = Block(Shape.of(weights, ("q",), [32]), HIDDEN // 2, torch.empty(0), base=False, wide=False)  # type: ignore[arg-type]
        block.fill(weights, Slices((first, HIDDEN // 2), ((32, 0, 32),), True))  # type: ignore[arg-type]
        parts.append((Layer(block, True, ROUTING, True, Runtime()), x[:, first : first + HIDDEN // 2]))

    def all_reduce(logits: Tensor) -> Tensor:
        sent.append(logits)
        return total[0] if total else logits

    def run() -> list[Tensor]:
        return [added(layer, chosen_down(layer, half), torch.zeros(6, 32)) for layer, half in parts]

    monkeypatch.setitem(sys.modules, "vllm.distributed", SimpleNamespace(tensor_model_parallel_all_reduce=all_reduce))
    run()
    total.append(sent[0] + sent[1])
    outputs = run()
    assert [logits.shape for logits in sent] == [(6, COUNT)] * 4
    torch.testing.assert_close((outputs[0] + outputs[1]).double(), weights.exact("q", x, torch.zeros(6, 32), ROUTING), rtol=0, atol=2e-5)


def test_the_h200s_rows_for_256_adapters_read_the_options_of_every_token(operators: Any) -> None:
    """Rows for chosen adapters need blocks and inputs that the copy engine can read, which a captured step of vLLM has."""
    count, rank, hidden, tokens = 256, 8, 8192, 6
    shape = Shape(("down",), (64,), (rank,) * count, (2.0,) * count)
    block = Block(shape, hidden, torch.empty(0, dtype=torch.float16), base=True, wide=False)
    block.rows.normal_(0, hidden**-0.5)
    block.lora_B.normal_(0, 0.1)
    each = [Options(2, 1.0), Options(1, 1.0), Options(2, 3.0, (7, 9, 200)), Options(1, 1.0, (255,)), Options(0, 1.0), Options(2, 1.0)]
    runtime = Runtime()
    runtime.names, runtime.default = [str(index) for index in range(count)], each[0]
    runtime._options, runtime.varied = {str(index): options for index, options in enumerate(each) if options != each[0]}, True
    table = runtime.make_table(tokens, torch.device("cpu"))
    runtime.arrange([str(index) for index in range(tokens)], [1] * tokens)
    operators._layers[block.rows.data_ptr()] = Layer(block, False, Routing(2, 1.0, table), True, runtime)
    x, group = torch.randn(tokens, hidden).half(), block.group
    assert group is not None
    with taking(*(replace(row, tokens=Span(1, row.tokens.most)) for row in shipped("h200").group if row.path == "chosen_adapters")):
        assert row_for(group, tokens, 2, aligned=True).path == "chosen_adapters"
        found = torch.ops.meteora_vllm.group(x, block.rows, 64)
    base, own = x.double() @ weights_of(block).double().t(), block.single[0]
    assert own is not None
    adapters = Adapters.of_layer(own.gate.double(), own.lora_A.double(), own.lora_B.double(), own.scaling, own.offsets, rank)
    for index, options in enumerate(each):
        one, exact = slice(index, index + 1), base[index : index + 1]
        if options.top_k:
            allowed = torch.tensor([options.allowed is None or adapter in options.allowed for adapter in range(count)])
            exact = reference.mix(x[one].double(), exact, adapters, Routing(options.top_k, options.temperature, allowed))[0]
        torch.testing.assert_close(found[one].double(), exact, rtol=0, atol=2e-2)
        assert options.top_k == 0 or (exact - base[one]).abs().max() > 0.1


def test_every_token_has_its_own_options(weights: Weights) -> None:
    runtime = Runtime()
    runtime.names, runtime.observed, runtime.default = list(weights.names), True, Options(2, 1.5)
    each = [Options(2, 1.5), Options(1, 1.0), Options(4, 3.0), Options(1, 1.0, (3,)), Options(2, 1.0, (0, 2)), Options(0, 1.0)]
    runtime._step = [Scheduled(str(index), 2, 0, options) for index, options in enumerate(each)]
    x, y = torch.randn(14, HIDDEN), torch.randn(14, 64)
    found = observed(Layer(block_of(weights, base=False), False, ROUTING, False, runtime), x, y)
    for index, options in enumerate([*each, runtime.default]):
        rows = slice(2 * index, 2 * index + 2)
        allowed = None
        if options.allowed is not None:
            allowed = torch.zeros(COUNT, dtype=torch.bool)
            allowed[list(options.allowed)] = True
        exact = expected(weights, x[rows], y[rows], Routing(options.top_k, options.temperature, allowed)) if options.top_k else y[rows].double()
        torch.testing.assert_close(found[rows].double(), exact, rtol=0, atol=2e-5)


def test_loading_again_replaces_the_weights_in_the_same_memory(weights: Weights) -> None:
    block = block_of(weights, base=False)
    address, before = block.rows.data_ptr(), block.rows.clone()
    weights.tensors["q.gate"] = weights.tensors["q.gate"] + 1
    block.fill(weights, WHOLE)  # type: ignore[arg-type]
    assert block.rows.data_ptr() == address
    assert (block.rows - before).abs().sum() == COUNT * HIDDEN


def memory_of(value: Any) -> set[int]:
    """The addresses of the memory of all tensors in an object."""
    if isinstance(value, Tensor):
        return {value.untyped_storage().data_ptr()}
    if isinstance(value, tuple | list):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, each.name) for each in fields(value)]
    else:
        inside = list(vars(value).values()) if type(value).__module__.startswith("meteora") else []
    return set().union(*map(memory_of, inside))


@pytest.mark.parametrize("base", [True, False])
def test_vllm_knows_all_memory_of_a_layer(weights: Weights, base: bool) -> None:
    """vLLM's sleep mode keeps parameters and buffers. What a kernel reads besides them would be lost."""
    block = block_of(weights, base=base)
    known = memory_of(block.tensors())
    assert memory_of(block) == known
    assert len(known) == (5 if base else 4)
    weight, scale = torch.zeros(HIDDEN, 64, dtype=torch.float8_e4m3fn), torch.ones(64, 1)
    eight = base_of(SimpleNamespace(_get_layer_params=lambda layer: (weight, scale, None, None)), None, block.adapters)
    assert memory_of(eight) - known == memory_of([weight, scale, eight.linears.flags])  # two parameters, and a buffer of the method's


def test_memory_of_an_8b_model_with_28_adapters_is_little_more_than_their_own() -> None:
    """Llama-3-8B's layers on an H200, on the device "meta": bytes of blocks beyond the base weights, as a share of the sizes of gates, A and B."""
    count, rank, layers, tokens = 28, 8, 32, 16384
    device, own, extra = torch.device("meta"), 0, tokens * (count + 2) * 4  # the table of options
    before = use(device, shipped("h200"))
    try:
        for widths, hidden in (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336)):
            like = torch.empty(0, dtype=torch.bfloat16, device=device)
            shape = Shape(tuple(f"m{width}" for width in widths), widths, (rank,) * count, (2.0,) * count)
            wide = copies_up(shape, hidden, like, widest=WIDEST, top_k=2)
            assert wide == (hidden == 4096 and sum(widths) <= 6144)
            assert copies_up(shape, hidden, like, widest=EVER, top_k=2) == (hidden == 4096)
            assert not copies_up(shape, hidden, like, widest=0, top_k=2)
            block = Block(shape, hidden, like, base=True, wide=wide)
            kept = sum(tensor.untyped_storage().nbytes() for tensor in block.tensors().values())
            extra += layers * (kept - 2 * sum(widths) * hidden)
            own += layers * 2 * (len(widths) * count * (1 + rank) * hidden + count * rank * sum(widths))
    finally:
        use(device, before)
    assert 1.0 <= extra / own <= 1.3


def test_slices_of_a_model_that_merges_its_layers_itself() -> None:
    """Phi-3's qkv_proj is one linear layer: a process of two holds a part of q, of k and of v."""
    columns = torch.arange(12.0).expand(2, 12)
    second = Slices((0, 8), ((8, 4, 4), (2, 1, 1), (2, 1, 1)), False)
    assert second.of_outputs(columns, None)[0].tolist() == [4, 5, 6, 7, 9, 11]
    assert second.of_outputs(columns[:, :2], 1)[0].tolist() == [1]
    assert Slices((4, 4), ((6, 0, 6),), True).of_inputs(columns)[0].tolist() == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="B has 11 outputs, and vLLM's layer has 12"):
        second.of_outputs(columns[:, :11], None)


def test_what_is_warmed_up() -> None:
    """Captured sizes, and larger ones of two kinds, because Triton compiles other code for multiples of 16; one layer of each shape."""
    assert sizes([1, 2, 512], 500) == [1, 2, 257, 320, 321, 384, 385, 500]
    assert sizes([], 4) == [4]
    many = sizes([1], 8192)
    assert max(many) == 8192
    assert {size % 16 == 0 for size in many if size > 4096} == {True, False}
    weights = Weights()
    layers = [
        Layer(block_of(weights, base=base), sums, ROUTING, True, Runtime()) for base, sums in ((True, False), (True, False), (False, False), (False, True))
    ]
    assert different(layers) == [layers[0], layers[2], layers[3]]

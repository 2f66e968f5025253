"""The layer compared with a float64 loop over tokens and adapters, written here from the formula."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from meteora_core.adapters.peft_folder import AdapterInfo
from meteora_core.adapters.stack import Stack
from meteora_core.model.layer import MeteoraLinear
from meteora_core.routing import Meteora
from meteora_kernels import BACKENDS

CPU_BACKENDS = [name for name in BACKENDS if name in ("auto", "reference", "dense")]


def build(ranks: tuple[int, ...], hidden: int, out: int, top_k: int, temperature: float, *, backend: str = "auto", dtype=torch.float64, seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    base = nn.Linear(hidden, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(random(out, hidden))
        if bias:
            base.bias.copy_(random(out))
    infos = tuple(AdapterInfo(f"a{i}", "", "", None, rank, 16.0, False, 0.0) for i, rank in enumerate(ranks))
    state = Meteora(infos, top_k, temperature, backend)
    total = sum(ranks)
    scaling = torch.rand(len(ranks), generator=generator) + 0.5
    gate = random(len(ranks), hidden)
    return MeteoraLinear(base, "x", gate, Stack(random(total, hidden), random(total, out), ranks, scaling), state), state


@torch.no_grad()
def loop(layer: MeteoraLinear, state: Meteora, x: torch.Tensor) -> torch.Tensor:
    """The formula, token by token, adapter by adapter, in float64."""
    W = layer.base_layer.weight.double()
    b = layer.base_layer.bias.double() if layer.base_layer.bias is not None else 0
    G, A, B = layer.gate.double(), layer.lora_A.double(), layer.lora_B.double()
    result = torch.empty(*x.shape[:-1], W.shape[0], dtype=torch.float64)
    for place in itertools.product(*map(range, x.shape[:-1])):
        token = x[place].double()
        logits = [float(G[i] @ token) for i in range(G.shape[0])]
        order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: state.top_k]
        exponents = [logits[i] / state.temperature for i in order]
        highest = max(exponents)
        weights = [torch.exp(torch.tensor(e - highest, dtype=torch.float64)) for e in exponents]
        y = W @ token + b
        for weight, i in zip(weights, order, strict=True):
            start = sum(layer.ranks[:i])
            rows = slice(start, start + layer.ranks[i])
            y = y + weight / sum(weights) * float(layer.scaling[i]) * (B[rows].t() @ (A[rows] @ token))
        result[place] = y
    return result


CASES = [
    ((4,), 7, 5, 1, 1.0),
    ((3, 8, 1), 13, 11, 1, 1.0),
    ((3, 8, 1), 13, 11, 2, 1.0),
    ((3, 8, 1), 13, 11, 3, 15.0),
    ((5, 0, 2, 16), 9, 17, 2, 1e-3),
    ((5, 0, 2, 16), 9, 17, 4, 1e3),
    ((2,) * 28, 31, 3, 2, 30.0),
    ((1,) * 40, 6, 6, 12, 2.0),
]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("ranks", "hidden", "out", "top_k", "temperature"), CASES)
def test_equals_the_loop_in_float64(ranks, hidden, out, top_k, temperature, backend) -> None:
    layer, state = build(ranks, hidden, out, top_k, temperature, backend=backend)
    x = torch.randn(3, 5, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), loop(layer, state, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_close_to_the_loop_in_lower_precision(dtype, backend) -> None:
    layer, state = build((3, 8, 1, 4), 64, 48, 2, 2.0, backend=backend, dtype=dtype)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        gap = (layer(x).double() - loop(layer, state, x)).norm() / loop(layer, state, x).norm()
    assert gap < (2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ties_go_to_the_lower_index(backend) -> None:
    layer, state = build((2, 2, 2, 2), 8, 8, 2, 1.0, backend=backend)
    with torch.no_grad():
        layer.gate.copy_(layer.gate[:1].expand(4, 8).clone())
        layer.gate[0] -= 1.0
    x = torch.ones(1, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), loop(layer, state, x), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        layer.gate.zero_()
    torch.testing.assert_close(layer(x), loop(layer, state, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0, 4, 8)])
def test_no_tokens(shape, backend) -> None:
    layer, _ = build((2, 3), 8, 6, 2, 1.0, backend=backend)
    assert layer(torch.zeros(shape, dtype=torch.float64)).shape == (*shape[:-1], 6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_stays_nan_and_does_not_spread_to_other_tokens(backend) -> None:
    layer, state = build((2, 3, 4), 8, 6, 2, 1.0, backend=backend)
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    x[0, 2, 3] = float("nan")
    y = layer(x)
    assert y[0, 2].isnan().all()
    others = [0, 1, 3]
    torch.testing.assert_close(y[:, others], loop(layer, state, x[:, others]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_nan_gate_row_never_routes_silently(backend) -> None:
    layer, _ = build((2, 3, 4), 8, 6, 2, 1.0, backend=backend)
    with torch.no_grad():
        layer.gate[1] = float("nan")
    assert layer(torch.randn(2, 8, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_gradients(top_k, backend) -> None:
    layer, state = build((2, 0, 3), 5, 4, top_k, 1.7, backend=backend)
    layer.lora_A.requires_grad_(True)
    layer.lora_B.requires_grad_(True)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([[0, 1, 2], [2, -100, 1]])

    def run(x, gate, lora_A, lora_B):
        with state.label_gates(labels) as observed:
            y = torch.func.functional_call(layer, {"gate": gate, "lora_A": lora_A, "lora_B": lora_B}, (x,))
        return y, observed.mean_loss(5).double()

    assert torch.autograd.gradcheck(run, (x, layer.gate, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_non_contiguous_input(backend) -> None:
    layer, state = build((2, 3), 8, 6, 2, 1.0, backend=backend)
    x = torch.randn(8, 5, dtype=torch.float64).t()
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), loop(layer, state, x), rtol=1e-10, atol=1e-10)


def test_dropout_is_seen_by_the_adapters_and_not_by_the_gate() -> None:
    layer, state = build((2, 3), 8, 6, 1, 1.0)
    layer.dropout = 0.9999
    x = torch.randn(4, 8, dtype=torch.float64)
    layer.train()
    with state.label_gates(torch.tensor([0, 1, 0, 1]), keep_hits=True) as first:
        y = layer(x)
    torch.testing.assert_close(y, layer.base_layer(x))
    layer.eval()
    with state.label_gates(torch.tensor([0, 1, 0, 1]), keep_hits=True) as second:
        layer(x)
    torch.testing.assert_close(first.loss_sums[0], second.loss_sums[0])


def test_forced_routes_send_each_row_to_its_adapter() -> None:
    layer, state = build((2, 3, 4), 8, 6, 2, 5.0)
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    with state.force(torch.tensor([2, 0, 1])):
        y = layer(x)
    for row, i in enumerate((2, 0, 1)):
        start = sum(layer.ranks[:i])
        rows = slice(start, start + layer.ranks[i])
        expected = layer.base_layer(x[row]) + float(layer.scaling[i]) * (x[row] @ layer.lora_A[rows].t()) @ layer.lora_B[rows]
        torch.testing.assert_close(y[row], expected)


def test_a_muted_adapter_is_never_chosen() -> None:
    layer, state = build((2, 3, 4), 8, 6, 2, 1.0)
    x = torch.randn(6, 8, dtype=torch.float64)
    state.mute(["a1"])
    muted = layer(x)
    with torch.no_grad():
        layer.gate[1] = 1e9 * torch.sign(x[0])  # the first token would choose it
    torch.testing.assert_close(layer(x), muted)
    state.mute([])
    assert not torch.allclose(layer(x), muted)


def test_masks_and_forced_adapters_are_created_once_and_copied_once_per_device() -> None:
    """A captured graph keeps reading the same tensors, and no layer copies them again."""
    state = Meteora(tuple(AdapterInfo(name, "", "", None, 4, 16.0, False, 0.0) for name in ("one", "two")), 1, 1.0, "auto")
    far = torch.device("meta")
    seen, copies = [], []
    for _ in range(2):
        with torch.inference_mode(), state.force("two"):
            state.mute(["one"])
            seen.append((state.mode.forced, state.routing.allowed))
            copies.append(tuple(state.on(tensor, far) for tensor in seen[-1]))
        state.mute([])
    assert all(one is other for pairs in (seen, copies) for one, other in zip(*pairs, strict=True))
    assert not seen[0][0].is_inference()
    assert state.on(seen[0][0], seen[0][0].device) is seen[0][0]
    assert (seen[0][0].tolist(), seen[0][1].tolist()) == ([1], [False, True])

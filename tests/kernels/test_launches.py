"""Launches that skip Triton's lookup: which launches do, and that they pass what Triton would pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meteora_kernels import launches
from meteora_kernels.launches import Launcher, Launches, Rest


class Kernel:
    """A kernel of two pointers, a number and a constant that only notes its launches."""

    arg_names = ("x", "out", "width", "BLOCK")

    def __init__(self) -> None:
        self.triton: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.triton.append((grid, arguments, constants))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    launcher = Launcher(lambda *arguments: kernel.direct.append(arguments), "function", "metadata", lambda device: 70 + device)
    monkeypatch.setattr(launches, "launcher_of", lambda compiled: launcher)
    return kernel


def rest() -> Rest:
    return Rest((5,), (64,), {"num_warps": 4, "BLOCK": 128})


def not_called() -> Rest:
    raise AssertionError("the other arguments are not needed again")


def test_the_second_launch_of_a_key_goes_directly(kernel: Kernel) -> None:
    found = Launches(kernel)
    x, out, other = torch.zeros(64), torch.zeros(64), torch.ones(64)
    found((64, x.dtype), (x, out), rest)
    assert [(grid, constants) for grid, _, constants in kernel.triton] == [((5,), {"num_warps": 4, "BLOCK": 128})]
    assert not kernel.direct
    found((64, x.dtype), (other, out), not_called)
    assert kernel.direct == [(5, 1, 1, 69, "function", "metadata", None, None, None, other.data_ptr(), out.data_ptr(), 64, 128)]
    found((64, torch.float16), (x, out), rest)
    assert len(kernel.triton) == 2


def test_other_alignments_are_left_to_triton(kernel: Kernel) -> None:
    """Triton compiles other code for addresses that are no multiples of 16."""
    found, memory = Launches(kernel), torch.zeros(65)
    for x in (memory[1:], memory[1:], memory[:64], memory[1:]):
        found(64, (x, memory[:64]), rest)
    assert len(kernel.triton) == 4
    found(64, (memory[:64], memory[:64]), not_called)
    assert len(kernel.direct) == 1


def test_descriptors_are_passed_as_they_are(kernel: Kernel) -> None:
    found, out = Launches(kernel, descriptors=1), torch.zeros(64)
    for name in ("first", "second"):
        found(64, (name, out), rest)
    assert kernel.direct == [(5, 1, 1, 69, "function", "metadata", None, None, None, "second", out.data_ptr(), 64, 128)]


def test_old_keys_make_room(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MOST_KNOWN", 3)
    found, x = Launches(kernel), torch.zeros(64)
    for key in (1, 2, 3, 4, 4, 1):
        found(key, (x, x), rest)
    assert len(kernel.direct) == 1
    assert len(found.known) == 2


def test_interpreted_kernels_are_always_launched_by_triton() -> None:
    assert launches.launcher_of(None) is None
    kernel = Kernel()
    found, x = Launches(kernel), torch.zeros(64)
    found(1, (x, x), rest)
    found(1, (x, x), rest)
    assert len(kernel.triton) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_direct_launches_give_the_bits_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On other tensors, on another stream, in a graph, and on unaligned rows."""
    from meteora_kernels.feed import rms_norm as module

    found = Launches(module.rms_norm_kernel)
    monkeypatch.setattr(module, "_launches", found)
    x, weight = torch.randn(3, 7, 200, device="cuda").bfloat16(), torch.randn(200, device="cuda").bfloat16()

    def norm(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        module.rms_norm(x, weight, 1e-5, out)
        return out

    wanted = norm(x)
    (known,) = found.known.values()
    assert torch.equal(norm(x.clone()), wanted)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = norm(x)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(aside, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = norm(x)
    graph.replay()
    assert torch.equal(captured, wanted)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
    memory[1:] = x.flatten()
    assert torch.equal(norm(memory[1:].view(x.shape)), wanted)
    assert list(found.known.values()) == [known]

"""Tensors from Python numbers are created once, and overwritten ones are detected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from meteora_core.evaluation.arrow import with_arrow
from meteora_core.generation.constants import RememberedConstants, is_plain
from support.generation import engine_of, requests_of
from support.tiny_models import make_tiny_llama


def test_equal_numbers_are_one_tensor() -> None:
    constants = RememberedConstants()
    with constants:
        first = torch.tensor([1.5, 2.0])
        again = torch.tensor([1.5, 2.0])
        others = [torch.tensor([1.5, 2.0], dtype=torch.float64), torch.tensor((1.5, 2.0)), torch.tensor([1, 2]), torch.tensor(True), torch.tensor(1)]
        trained = torch.tensor([1.5, 2.0], requires_grad=True)
    with constants:
        later = torch.tensor([1.5, 2.0])
    assert first is again is later
    assert len({id(each) for each in (first, *others, trained)}) == 7
    assert [each.dtype for each in others] == [torch.float64, torch.float32, torch.int64, torch.bool, torch.int64]
    assert torch.tensor([1.5, 2.0]) is not first, "outside all is as ever"


def test_only_plain_numbers_are_remembered() -> None:
    assert is_plain([[1, 2.0], (True,)])
    assert not is_plain([torch.ones(())])
    assert not is_plain("1")
    with RememberedConstants() as constants:
        one, other = torch.tensor([torch.ones(()), 2.0]), torch.tensor([torch.ones(()), 2.0])
    assert one is not other
    assert not constants.made


@torch.inference_mode()
def test_a_tensor_that_is_written_to_is_no_constant() -> None:
    with RememberedConstants() as constants:
        torch.tensor([0, 3])
        count = torch.tensor([0, 0])
        assert not constants.written()
        count += 1
    assert constants.written()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Collects the arguments of the calls of torch.tensor that create a new tensor."""
    created: list[object] = []
    real = RememberedConstants.__torch_function__

    def watching(self, func, types, args=(), kwargs=None):
        known = len(self.made)
        result = real(self, func, types, args, kwargs)
        created.extend([args[0]] * (len(self.made) - known))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(RememberedConstants, "__torch_function__", watching)
        yield created


def test_arrow_makes_its_scalings_in_the_first_step_alone(make_adapter, monkeypatch) -> None:
    """A CUDA graph of PEFT's Arrow requires that the captured pass copies nothing from the host."""
    folders = {name: make_adapter(name, seed) for seed, name in enumerate(("a", "b", "c"))}
    requests, constants = requests_of([5, 5], [4, 4]), RememberedConstants()
    with with_arrow(make_tiny_llama(), folders) as routed, torch.inference_mode():
        wanted = engine_of(routed).answer(requests)
        engine = engine_of(routed, "on")
        assert engine.answer(requests) == wanted
        cache = engine.batch_cache
        assert cache is not None
        for first in (True, False):
            with counted(monkeypatch) as created, constants:
                cache.advance(cache.rows)
            assert ([2.0] * 3 in created) is first
            assert bool(created) is first
        assert not constants.written()
        assert engine.answer(requests) == wanted

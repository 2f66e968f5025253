"""Routing on the device against the reference; in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import reference
from meteora_kernels.steps.route import route
from meteora_kernels.token_options import option_row
from meteora_kernels.types import TEMPERATURES
from support.layer_shapes import DEVICE


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_route_has_the_references_ties_and_nan(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (50, 12), generator=generator).float()
    logits[0] = float("nan")
    logits[1, 5] = float("nan")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    logits[4, 3:5] = float("nan")
    logits[5] = -0.0
    logits[5, 3] = 0.0
    for mask in (None, torch.arange(12) < 4, torch.arange(12) == 7):
        expected = reference.route(logits, top_k, 3.0, mask)
        got = route(logits.to(DEVICE), top_k, 3.0, None if mask is None else mask.to(DEVICE))
        assert torch.equal(got[0].cpu(), expected[0])
        torch.testing.assert_close(got[1].cpu(), expected[1], equal_nan=True)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_weights_are_finite_at_both_ends_of_the_temperature(temperature: float) -> None:
    largest = torch.finfo(torch.float32).max / 2
    logits = torch.tensor([[0.0, 50.0, 49.0], [largest, -largest, 0.0], [7.0, 7.0, 7.0]])
    options = torch.tensor([option_row(3, 2, temperature)] * 3)
    for mask in (None, torch.tensor([False, True, False]), options):
        expected = reference.route(logits, 2, temperature, None if mask is options else mask)
        got = route(logits.to(DEVICE), 2, temperature, None if mask is None else mask.to(DEVICE))
        torch.testing.assert_close(got[1].cpu(), expected[1])


def test_every_token_has_its_own_options() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 12, generator=generator)
    each = [(2, 1.0, None), (1, 3.0, None), (3, 0.5, None), (2, 1.0, [4, 7, 9]), (1, 1.0, [5]), (0, 1.0, None), (3, 2.0, [1, 2]), (2, 4.0, [0]), (3, 1.0, None)]
    options = torch.tensor([option_row(12, top_k, temperature, allowed) for top_k, temperature, allowed in each])
    indices, weights = route(logits.to(DEVICE), 3, 7.0, options.to(DEVICE))
    for token, (top_k, temperature, allowed) in enumerate(each):
        mask = None if allowed is None else torch.isin(torch.arange(12), torch.tensor(allowed))
        expected = torch.zeros(12)
        if top_k:
            picks, shares = reference.route(logits[token], top_k, temperature, mask)
            expected = expected.scatter_add(0, picks, shares)
        found = torch.zeros(12).scatter_add(0, indices[token].cpu(), weights[token].cpu())
        torch.testing.assert_close(found, expected)

"""Tokens are drawn from the distribution that the settings describe, and a row's token does not depend on other rows."""

from __future__ import annotations

import pytest
import torch

from meteora_core.serving.choosing import Chooser, choose_all, draw
from meteora_core.serving.options import SamplingOptions

CPU = torch.device("cpu")


def chooser(**options: float) -> Chooser:
    return Chooser(SamplingOptions(**{"temperature": 1.0, **options}), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.5)])
def test_drawn_tokens_have_the_frequencies_of_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, float("-inf"), 2.5])
    expected = torch.softmax(logits / temperature, 0)
    order = expected.argsort(descending=True)
    kept, mass = [], 0.0
    for token in order.tolist():
        if mass < top_p:
            kept.append(token)
        mass += float(expected[token])
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), expected[kept])
    count = 20_000
    one = chooser(temperature=temperature, top_p=top_p, seed=3)
    tokens = torch.stack([draw(logits[None].expand(100, -1), [one] * 100) for _ in range(count // 100)])
    found = torch.bincount(tokens.flatten(), minlength=5) / count
    assert torch.allclose(found, expected / expected.sum(), atol=0.015)
    assert set(tokens.unique().tolist()) <= set(kept)


def test_a_row_draws_the_same_tokens_in_any_batch() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    settings = [{"seed": 1}, {"seed": 2, "top_p": 0.8}, {"temperature": 0.0}, {"seed": 4, "temperature": 3.0}]
    together = [choose_all(logits, choosers) for choosers in [[chooser(**each) for each in settings]] for _ in range(5)]
    alone = [chooser(**each) for each in settings]
    for choices in together:
        assert choices == [choose_all(logits[row : row + 1], [alone[row]])[0] for row in range(4)]


def test_reported_probabilities_do_not_change_the_drawn_token() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    plain, reporting = chooser(seed=5), Chooser(SamplingOptions(temperature=1.0, seed=5, logprobs=2), CPU)
    for _ in range(5):
        assert choose_all(logits, [plain])[0].token == choose_all(logits, [reporting])[0].token

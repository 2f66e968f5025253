"""Every path of a fused group with options that differ from token to token, against float64, and the routes that it writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meteora_kernels import Routing
from meteora_kernels.plan import Row, Span
from meteora_kernels.reference import route
from meteora_kernels.tile import Tile
from meteora_kernels.token_options import mix_row, new_options, option_row
from support.kernel_groups import DEVICE, Members, errors, members

EACH: list[tuple[int, float, list[int] | None]] = [(2, 1.0, None), (1, 1.0, None), (2, 3.0, [0, 2, 4]), (1, 1.0, [3]), (0, 1.0, None), (2, 1.0, [0, 1])]
TILE = Tile(64, 32, 16, 4, 3)
ROWS = {
    "decode_chosen_rows": (Row("decode_chosen_rows", pieces=2, tile=Tile(16, 32, 16, 4, 2)), 12),
    "decode_all_rows": (Row("decode_all_rows", tile=Tile(16, 32, 16, 4, 2)), 12),
    "one_launch": (Row("one_launch", Span(1, 64), pieces=1, gate_pieces=2, tile=TILE), 33),
    "chosen_adapters": (Row("chosen_adapters", Span(1, 64), pieces=1, gate_pieces=2, tile=TILE), 33),
    "packed": (Row("packed", pieces=1), 33),
    "packed, inline": (Row("packed", pieces=1, inline=True), 33),
    "split": (Row("split", pieces=1), 33),
    "wide": (Row("wide"), 33),
    "wide, before": (Row("wide", gate_pieces=2, tile=Tile(32, 64, 16, 4, 2)), 33),
    "many_adapters, few": (Row("many_adapters", way="few", pieces=2, tile=Tile(16, 32, 16, 4, 2)), 12),
    "many_adapters, sorted": (Row("many_adapters", way="sorted", pieces=1), 33),
}


def exact(given: Members, each: list[tuple[int, float, list[int] | None]]) -> Tensor:
    """The reference's output in float64, token by token."""
    adapters = len(given.ranks)
    whole = {}
    for top_k, temperature, allowed in EACH:
        mask = torch.isin(torch.arange(adapters), torch.arange(adapters) if allowed is None else torch.tensor(allowed)).to(DEVICE)
        base = torch.cat([given.x.double() @ part.double().t() for part in given.weight.split(given.widths)], dim=1)
        whole[top_k, temperature, str(allowed)] = given.exact(Routing(top_k, temperature, mask)) if top_k else base
    return torch.stack([whole[top_k, temperature, str(allowed)][token] for token, (top_k, temperature, allowed) in enumerate(each)])


@pytest.mark.parametrize("path", ROWS)
def test_every_token_has_its_own_options(path: str) -> None:
    row, tokens = ROWS[path]
    given = members((24, 9), tokens, dtype=torch.float16, has_up=path.startswith("wide"))
    each = [EACH[token * 5 % 7 % len(EACH)] for token in range(tokens)]
    options = torch.tensor([option_row(len(given.ranks), *one) for one in each], device=DEVICE)
    more = new_options(5, option_row(len(given.ranks), 2, 1.0), DEVICE)  # a buffer may be longer than the batch
    chosen = torch.empty(2, tokens, 4, device=DEVICE)
    found = given.run(row, Routing(2, 9.0, torch.cat([options, more]), chosen=chosen))
    assert float(errors(found, exact(given, each)).max()) < 5e-3
    for case, kept in zip(given.cases, chosen, strict=True):
        for token, (top_k, temperature, allowed) in enumerate(each):
            mask = None if allowed is None else torch.isin(torch.arange(len(given.ranks)), torch.tensor(allowed)).to(DEVICE)
            indices, weights = route(given.x[token].double() @ case.gate.double().t(), max(top_k, 1), temperature, mask)
            assert kept[token, :2].tolist()[:top_k] == indices.tolist()[:top_k]
            expected = [*weights.tolist()[:top_k], 0.0, 0.0][:2]
            assert kept[token, 2:].tolist() == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("path", ["decode_chosen_rows", "one_launch", "wide, before"])
def test_tokens_may_have_static_mixes(path: str) -> None:
    row, tokens = ROWS[path]
    given = members((24, 9), tokens, dtype=torch.float16, has_up=path.startswith("wide"))
    adapters = len(given.ranks)
    rows = [option_row(adapters, 2, 1.0), mix_row(adapters, {3: 0.5, 0: -1.5}), mix_row(adapters, {2: 0.25}), option_row(adapters, 0, 1.0)]
    options = torch.tensor([rows[token % 4] for token in range(tokens)], device=DEVICE).unsqueeze(-1)
    chosen = torch.empty(2, tokens, 4, device=DEVICE)
    found = given.run(row, Routing(2, 9.0, options, chosen=chosen))
    gates = given.exact(Routing(2, 1.0))
    indices = torch.tensor([[0, 3], [0, 3], [2, 0], [0, 1]], device=DEVICE).repeat(tokens // 4 + 1, 1)[:tokens]
    weights = torch.tensor([[0.0, 0.0], [-1.5, 0.5], [0.25, 0.0], [0.0, 0.0]], device=DEVICE, dtype=torch.float64).repeat(tokens // 4 + 1, 1)[:tokens]
    exact = torch.where(torch.arange(tokens, device=DEVICE)[:, None] % 4 == 0, gates, given.exact(Routing(2, indices=indices, weights=weights)))
    assert float(errors(found, exact).max()) < 5e-3
    mixed = torch.arange(tokens, device=DEVICE) % 4 != 0
    torch.testing.assert_close(chosen[:, mixed, 2:], weights[mixed].float().expand(2, -1, -1), rtol=0, atol=0)

"""Many adapters, more than a few tokens: the work follows the rows that the tokens choose, not the number of adapters.

Two ways, and the base's own product between them:

- up to some dozens of tokens (:func:`few_forward`), each token is multiplied with its own rows: gates; routing and the chosen rows of A; base; the chosen
  rows of B on top of it;
- above (:func:`sorted_forward`), tokens are sorted by adapter for each slot, so that an adapter's rows are read once for all its tokens.

While a CUDA graph is captured, what comes before B runs on a second stream, beside the base's product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels.many_adapters.launch import blocks_down, blocks_up, gate_sums, sort_tokens, tokens_down, tokens_up
from meteora_kernels.triton_products import library_products
from meteora_kernels.types import Adapters, Routing

__all__ = ["can_run", "few_forward", "layer_forward", "run", "sorted_forward"]

EXACT_TOKENS = 256
"""Up to here the base's product comes as float32, so that the output is rounded once."""


def can_run(adapters: Adapters, routing: Routing, dtype: torch.dtype) -> str | None:
    """Why the kernels of this folder cannot do this layer; None if they can."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if routing.top_k > 16:
        return f"top-k is {routing.top_k}, the kernels take up to 16"
    if adapters.number > 4096:
        return f"there are {adapters.number} adapters, the kernels take up to 4,096"
    if (adapters.max_rank or 0) > 256:
        return f"the largest rank is {adapters.max_rank}, the kernels take up to 256"
    return None


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@contextmanager
def beside(x: Tensor) -> Iterator[Callable[[], None]]:
    """Run what is launched inside on a second stream while a CUDA graph is captured, and on the current one otherwise. Gives the
    function that waits for it."""
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        yield lambda: None
        return
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


def base_product(x: Tensor, weights: Tensor, exact: bool) -> Tensor:
    """``x weights^T``: (M, O) in the dtype of x, or with ``exact`` float32 (1, M, O)."""
    return library_products(x, weights, 1) if exact else F.linear(x, weights)


def few_forward(x: Tensor, weights: Tensor, bias: Tensor | None, adapters: Adapters, routing: Routing) -> Tensor:
    """Base and adapters, token by token; shapes as in :func:`run`."""
    y = torch.empty(x.shape[0], weights.shape[0], dtype=x.dtype, device=x.device)
    with beside(x) as join:
        chosen = tokens_down(x, gate_sums(x, adapters), adapters, routing)
    base = base_product(x, weights, True)
    join()
    tokens_up(base, bias, chosen, adapters, y)
    return y


def sorted_forward(x: Tensor, weights: Tensor, bias: Tensor | None, adapters: Adapters, routing: Routing) -> Tensor:
    """Base and adapters, tokens sorted by adapter; shapes as in :func:`run`."""
    y = torch.empty(x.shape[0], weights.shape[0], dtype=x.dtype, device=x.device)
    with beside(x) as join:
        found = sort_tokens(gate_sums(x, adapters), adapters, routing)
        middle = blocks_down(x, found, adapters, routing.top_k)
    base = base_product(x, weights, x.shape[0] <= EXACT_TOKENS)
    join()
    blocks_up(base, bias, middle, found, adapters, y)
    return y


FORWARDS = {"few": few_forward, "sorted": sorted_forward}
"""The ways, by the names that the plan uses."""


def layer_forward(way: str, x: Tensor, base: Tensor, logits: Tensor, adapters: Adapters, routing: Routing) -> Tensor:
    """One linear's adapters on top of a finished output.

    Args:
        way: "few" or "sorted", as :func:`plan.many_adapters_way` says.
        x: (M, h), columns contiguous, M >= 1.
        base: (M, o), columns contiguous.
        logits: (M, N) of the gate.
        adapters: Of one member; its gates are not read.
        routing: k, T, allowed.

    Returns:
        (M, o), contiguous, the dtype of ``base``.
    """
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if way == "few":
        tokens_up(base, None, tokens_down(x, logits.unsqueeze(0), adapters, routing), adapters, y)
        return y
    found = sort_tokens(logits, adapters, routing)
    blocks_up(base, None, blocks_down(x, found, adapters, routing.top_k), found, adapters, y)
    return y


def run(way: str, x: Tensor, weights: Tensor, bias: Tensor | None, adapters: Adapters, routing: Routing) -> Tensor:
    """Base outputs of one to three linears with their adapters' share.

    Args:
        way: "few" or "sorted", as :func:`plan.many_adapters_way` says.
        x: (M, h), columns contiguous, M >= 1.
        weights: (O, h), columns contiguous: the members' base weights, one behind the other.
        bias: (O,) or None.
        adapters: Of the members.
        routing: k, T, allowed.

    Returns:
        (M, O), contiguous, the dtype of x.
    """
    return FORWARDS[way](x, weights, bias, adapters, routing)

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Routing as a separate launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.arguments import kind_of_allowed, or_any
from meteora_kernels.device.routing import routes_of_logits
from meteora_kernels.sizes import ceil_div, padded_adapters, power_of_two


@triton.jit
def route_kernel(
    logits, allowed, indices, weights, tokens_total, stride, count, temperature,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, HAS_ALLOWED: tl.constexpr,
):  # fmt: skip
    """Write indices int64 (M, k) and weights float32 (M, k) for logits (M, N) of any floating dtype, with row stride ``stride``.

    Grid: (ceil(M / BLOCK),).
    """
    tokens = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    mask = tokens < tokens_total
    picks, shares = routes_of_logits(logits, tokens, stride, allowed, mask, count, temperature, TOP_K, SLOTS, PADDED, HAS_ALLOWED)
    keep = mask & (slots < TOP_K)
    tl.store(indices + tokens * TOP_K + slots, picks.to(tl.int64), mask=keep)
    tl.store(weights + tokens * TOP_K + slots, shares, mask=keep)


def route(logits: Tensor, top_k: int, temperature: float = 1.0, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`meteora_kernels.reference.route` by one kernel, without gradients.

    Args:
        logits: Gate logits (M, N), float16, bfloat16 or float32, columns contiguous.
        top_k: Number of adapters per token k, 1 <= top_k <= N.
        temperature: Routing temperature T > 0.
        allowed: Mask of the adapters that may be chosen, bool (N,), or the options of every token (:mod:`meteora_kernels.token_options`); None for all.

    Returns:
        Indices int64 (M, k) and weights float32 (M, k).
    """
    tokens, adapters = logits.shape
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    padded = padded_adapters(adapters)
    block = max(1, min(32, 2048 // padded))
    if tokens:
        route_kernel[(ceil_div(tokens, block),)](
            logits, or_any(allowed, indices), indices, weights, tokens, logits.stride(0), adapters, temperature,
            TOP_K=top_k, SLOTS=power_of_two(top_k), PADDED=padded, BLOCK=block, HAS_ALLOWED=kind_of_allowed(allowed),
        )  # fmt: skip
    return indices, weights

"""The reference in plain PyTorch: any floating dtype including float64, any device, differentiable, without a loop over adapters.

For a token ``x`` (h,), adapters ``A_i`` (r_i, h) and ``B_i`` (o, r_i) with scaling ``s_i``, and gate ``G`` (N, h)::

    logits  = G x
    i_1..i_k = top-k of logits                    chosen before the temperature; the lower index wins a tie
    w       = softmax(logits[i_1..i_k] / T)       in float32 (float64 for float64 logits)
    y       = W x + sum_j w_j * s_{i_j} * B_{i_j} A_{i_j} x

(MeteoRA, arXiv 2405.13053, section 3.) The sum is one LoRA of rank ``R = sum(r_i)`` whose intermediate ``A x`` is scaled for each token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_kernels.types import Adapters, Routing

_SORT_FROM = 9
"""From this top_k on, one stable sort is cheaper than repeated argmax."""


def top_indices(logits: Tensor, top_k: int) -> Tensor:
    """The indices of the ``top_k`` largest logits, largest first; the lower index wins a tie; NaN counts as largest.

    Args:
        logits: Gate logits (..., N).
        top_k: Number of indices, 1 <= top_k <= N.

    Returns:
        Indices int64 (..., top_k). ``torch.topk`` would not do, because it promises no order among equal values.
    """
    logits = logits.detach()
    if top_k >= _SORT_FROM:
        return torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :top_k]
    picks = []
    for left in reversed(range(top_k)):
        pick = logits.argmax(dim=-1, keepdim=True)
        picks.append(pick)
        if left:
            logits = logits.scatter(-1, pick, float("-inf"))
    return picks[0] if top_k == 1 else torch.cat(picks, dim=-1)


def routing_weights(chosen: Tensor, temperature: float | Tensor) -> Tensor:
    """``softmax(chosen / T)``, whose weights are finite for any finite logits and any T in :data:`meteora_kernels.types.TEMPERATURES`.

    The largest logit is subtracted first, because ``chosen / T`` alone overflows for small T.

    Args:
        chosen: Logits (..., k) in float32 or float64, the largest one of each token first.
        temperature: Routing temperature T, a number or a tensor (..., 1) in the dtype of ``chosen``.
    """
    return torch.softmax((chosen - chosen[..., :1].detach()) / temperature, dim=-1)


def route(logits: Tensor, top_k: int, temperature: float = 1.0, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose adapters and their weights for every token.

    Args:
        logits: Gate logits (..., N).
        top_k: Number of adapters per token, 1 <= top_k <= N.
        temperature: Routing temperature T > 0; changes the weights of the chosen adapters, but not the choice.
        allowed: Mask of the adapters that may get weight, bool (N,); at least one must be True.

    Returns:
        Indices int64 (..., k), and weights (..., k) in float32 (float64 for float64 logits). The weights sum to 1 over k and are differentiable in
        ``logits``. NaN logits give NaN weights.

    Example:
        >>> import torch
        >>> from meteora_kernels import route
        >>> indices, weights = route(torch.tensor([[0.0, 2.0, 1.0]]), top_k=2)
        >>> indices
        tensor([[1, 2]])
        >>> weights  # softmax of the two chosen logits
        tensor([[0.7311, 0.2689]])
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    indices = top_indices(logits, top_k)
    chosen = logits.gather(-1, indices)
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    return indices, routing_weights(chosen, temperature)


def route_rows(logits: Tensor, top_k: Tensor, temperature: Tensor, allowed: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """:func:`route` with values that differ from token to token.

    Args:
        logits: Gate logits (..., N).
        top_k: Number of adapters of each token, int64, broadcast to (...); at most ``most``.
        temperature: Routing temperature T > 0 of each token, floating point, broadcast to (...).
        allowed: Mask of the adapters that may get weight, bool, broadcast to (..., N).
        most: Number of routes per token k, 1 <= k <= N.

    Returns:
        Indices int64 (..., k) and weights (..., k), as from :func:`route`; routes beyond a token's ``top_k`` have weight 0.

    Example:
        >>> import torch
        >>> from meteora_kernels import route_rows
        >>> logits, allowed = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]), torch.ones(2, 3, dtype=torch.bool)
        >>> route_rows(logits, torch.tensor([2, 1]), torch.tensor([1.0, 1.0]), allowed, most=2)[1]
        tensor([[0.7311, 0.2689],
                [1.0000, 0.0000]])
    """
    logits = logits.masked_fill(~allowed, float("-inf"))
    indices = top_indices(logits, most)
    chosen = logits.gather(-1, indices)
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    unused = torch.arange(most, device=logits.device) >= top_k.unsqueeze(-1)
    return indices, routing_weights(chosen.masked_fill(unused, float("-inf")), temperature.to(chosen.dtype).unsqueeze(-1))


def spread(indices: Tensor, weights: Tensor, scaling: Tensor) -> Tensor:
    """The coefficient of every adapter for every token: ``w_j * s_{i_j}`` for chosen adapters and 0 for the others.

    Args:
        indices: Chosen adapters, int64 (..., k).
        weights: Their weights (..., k).
        scaling: Scaling of every adapter (N,).

    Returns:
        Coefficients (..., N) in the dtype of ``weights``.
    """
    scaled = weights * scaling.to(weights.dtype)[indices]
    return scaled.new_zeros(*indices.shape[:-1], scaling.shape[0]).scatter_add(-1, indices, scaled)


def rank_owner(offsets: Tensor, total_rank: int) -> Tensor:
    """The adapter that owns each row of the stacked ``A``: int64 (R,), from ``offsets`` (N + 1,)."""
    return torch.bucketize(torch.arange(total_rank, device=offsets.device), offsets, right=True) - 1


def mixture(x: Tensor, base_output: Tensor, lora_A: Tensor, lora_B: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    """``base_output + ((x A^T) * c) B``, where ``c`` repeats every adapter's coefficient for each of its rows.

    Args:
        x: Input of the adapters (..., h).
        base_output: Output of the base layer (..., o).
        lora_A: A of all adapters stacked by rows (R, h).
        lora_B: B of all adapters (R, o); row ``j`` is column ``j`` of the usual (o, R) matrix.
        coefficients: Coefficient of every adapter for every token (..., N), as :func:`spread` returns it.
        offsets: Row ranges of the adapters, int64 (N + 1,): adapter ``i`` owns rows ``offsets[i]:offsets[i+1]``.

    Returns:
        The output (..., o) in the dtype of ``base_output``.
    """
    down = F.linear(x, lora_A)
    per_rank = coefficients[..., rank_owner(offsets, lora_A.shape[0])].to(down.dtype)
    return base_output + (down * per_rank) @ lora_B.to(down.dtype)


def mix(x: Tensor, base_output: Tensor, adapters: Adapters, routing: Routing, lora_x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The whole layer, with the arguments of :func:`meteora_kernels.mix`. Returns the output and the gate logits, or None for given routes."""
    logits, given = None, routing.given
    if given is None:
        logits = F.linear(x, adapters.gate)
        given = route(logits, routing.top_k, routing.temperature, routing.allowed)
    coefficients = spread(*given, adapters.scaling)
    return mixture(x if lora_x is None else lora_x, base_output, adapters.lora_A, adapters.lora_B, coefficients, adapters.offsets), logits

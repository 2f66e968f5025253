"""SpectR, which routes each token to the adapters with the largest updates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meteora_core.adapters.stack import Stack
from meteora_core.routers.folder import FolderRouter
from meteora_core.routers.linear import Scorer, targeting


class SpectR(FolderRouter):
    """SpectR (Fleshman and Van Durme, arXiv 2504.03454): per token and layer, the softmax of the top-k norms ``||s_i B_i A_i x||``.

    The paper writes an adapter's update as ``U_i S_i V_i^T`` and scores by ``||S_i V_i^T x||``, which is the same, because ``U_i`` has orthonormal columns.
    Arrow scores by the first row of ``V_i^T`` alone. The default top-k is 3, as for PEFT's Arrow.
    """

    default_top_k = 3

    def parameters(self) -> dict[str, Any]:
        """Top-k and routing temperature."""
        return {"top_k": self.top_k, "temperature": self.temperature}

    def scorer(self, path: str, stack: Stack) -> Scorer:
        """The norms of the adapters' updates in a layer."""
        return update_norms(stack)


def update_norms(stack: Stack) -> Scorer:
    """A function that computes the norm of every adapter's update of a token, from the product of the token with all A matrices.

    With ``B_i = Q_i R_i``, ``||B_i m|| = ||R_i m||``, so a product with the block-diagonal matrix of all ``s_i R_i`` (R, R) replaces the outputs (N, out).

    Args:
        stack: The adapters of a layer.

    Returns:
        A function from the input, which is not used, and the products ``A x``, (..., R), to norms, float32 (..., N); -inf for adapters that do not target
        the layer.
    """
    blocks, start = [], 0
    for rank, scale in zip(stack.ranks, stack.scaling.tolist(), strict=True):
        if rank:
            B = stack.B[start : start + rank].detach().double().cpu().t()
            blocks.append(scale * torch.linalg.qr(B).R)
        start += rank
    device = stack.A.device
    factor = torch.zeros(0, 0, device=device)
    if blocks:
        factor = torch.block_diag(*blocks).float().to(device)  # type: ignore[no-untyped-call]
    rows = torch.repeat_interleave(
        torch.tensor([index for index, rank in enumerate(stack.ranks) if rank], dtype=torch.int64),
        torch.tensor([len(block) for block in blocks], dtype=torch.int64),
    )
    membership = torch.nn.functional.one_hot(rows, len(stack.ranks)).float().to(device)
    present = targeting(stack, device)

    def norms(x: Tensor, projected: Tensor) -> Tensor:
        squares = (projected.float() @ factor.t()).square() @ membership
        return squares.sqrt().masked_fill(~present, float("-inf"))

    return norms

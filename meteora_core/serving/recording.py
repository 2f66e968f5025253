"""Records the adapters of the tokens that a step generates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meteora_core.serving.jobs import TokenRoutes


class LastRoutes:
    """A recorder that keeps the choices at some positions of a packed pass only.

    Args:
        positions: Positions among all tokens of the pass, one for each generated token.
        device: Device of the model.
    """

    def __init__(self, positions: Sequence[int], device: torch.device) -> None:
        self._at = torch.tensor(list(positions), device=device)
        self._paths: list[str] = []
        self._indices: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Receive the choices of layer ``path``: indices int64 and weights float32, each (1, tokens, k)."""
        self._paths.append(path)
        self._indices.append(indices[0])
        self._weights.append(weights[0])

    def add_output(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Ignore the output layer, as :class:`meteora_core.routing.Routes` does."""

    def read(self, adapters: int) -> StepRoutes:
        """The choices of all layers at the positions; ``adapters`` is the number of adapters in the bank."""
        indices = torch.stack(self._indices)[:, self._at].transpose(0, 1)
        weights = torch.stack(self._weights)[:, self._at].transpose(0, 1).float()
        mean = torch.zeros(len(self._at), adapters, device=weights.device)
        mean.scatter_add_(1, indices.flatten(1), weights.flatten(1)).div_(len(self._paths))
        return StepRoutes(mean.cpu(), indices, weights, tuple(self._paths))


class StepRoutes:
    """The adapters of all tokens that one step generated.

    Args:
        mean: Weights averaged over the layers, float32 (rows, N) on the CPU.
        indices: Adapters of each layer, int64 (rows, layers, k).
        weights: Their weights, float32 (rows, layers, k).
        paths: Module paths of the layers.
    """

    def __init__(self, mean: Tensor, indices: Tensor, weights: Tensor, paths: tuple[str, ...]) -> None:
        self.mean, self._indices, self._weights, self._paths = mean, indices, weights, paths

    def of(self, row: int, *, layers: bool) -> TokenRoutes:
        """The adapters of one token, with those of each layer if ``layers``."""
        if not layers:
            return TokenRoutes(self.mean[row])
        return TokenRoutes(self.mean[row], self._indices[row].cpu(), self._weights[row].cpu(), self._paths)

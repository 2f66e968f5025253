"""Records the adapters of the tokens that a step generates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meteora_core.serving.jobs import TokenRoutes
from meteora_core.serving.transfers import to_host


class LastRoutes:
    """A recorder that keeps the choices at some positions of a packed pass only.

    Args:
        positions: Positions among all tokens of the pass, one for each generated token.
        device: Device of the model.
        everything: Whether these are all positions, in order.
    """

    def __init__(self, positions: Sequence[int], device: torch.device, *, everything: bool = False) -> None:
        self._at = None if everything else torch.tensor(list(positions), device=device)
        self._paths: list[str] = []
        self._kept: list[Tensor | tuple[Tensor, Tensor]] = []

    def add(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Receive the choices of layer ``path``: indices int64 and weights float32, each (1, tokens, k)."""
        self._paths.append(path)
        self._kept.append((indices[0], weights[0]))

    def add_chosen(self, path: str, chosen: Tensor, *, output: bool) -> None:
        """Receive the choices of layer ``path`` as a fused group writes them; see :class:`meteora_core.routing.routes.ChosenRecorder`."""
        if not output:
            self._paths.append(path)
            self._kept.append(chosen)

    def add_output(self, path: str, indices: Tensor, weights: Tensor) -> None:
        """Ignore the output layer, as :class:`meteora_core.routing.Routes` does."""

    def read(self, adapters: int) -> StepRoutes:
        """The choices of all layers at the positions; ``adapters`` is the number of adapters in the bank."""
        whole = [each for each in self._kept if isinstance(each, Tensor)]
        if len(whole) == len(self._kept):
            numbers, weights = torch.stack(whole, 1).chunk(2, -1)
            indices = numbers.long()
        else:
            pairs = [_pair(each) for each in self._kept]
            indices, weights = torch.stack([pair[0] for pair in pairs], 1), torch.stack([pair[1] for pair in pairs], 1).float()
        if self._at is not None:
            indices, weights = indices[self._at], weights[self._at]
        mean = torch.zeros(len(indices), adapters, device=weights.device)
        mean.scatter_add_(1, indices.flatten(1), weights.flatten(1)).div_(len(self._paths))
        return StepRoutes(mean, indices, weights, tuple(self._paths))


def _pair(kept: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The indices and weights (tokens, k) of a layer."""
    if isinstance(kept, tuple):
        return kept
    numbers, weights = kept.chunk(2, -1)
    return numbers.long(), weights


class StepRoutes:
    """The adapters of all tokens that one step generated.

    Args:
        mean: Weights averaged over the layers, float32 (rows, N).
        indices: Adapters of each layer, int64 (rows, layers, k).
        weights: Their weights, float32 (rows, layers, k).
        paths: Module paths of the layers.
    """

    def __init__(self, mean: Tensor, indices: Tensor, weights: Tensor, paths: tuple[str, ...]) -> None:
        self.mean, self._indices, self._weights, self._paths = mean, indices, weights, paths

    def on_host(self, rows: int, *, layers: bool) -> StepRoutes:
        """Copies of the first ``rows`` rows on the CPU, with each layer's choices only if ``layers``. On a GPU, the host must wait before it reads them."""
        indices, weights = (self._indices[:rows], self._weights[:rows]) if layers else (self._indices[:0], self._weights[:0])
        return StepRoutes(to_host(self.mean[:rows]), to_host(indices), to_host(weights), self._paths)

    def of(self, row: int, *, layers: bool) -> TokenRoutes:
        """The adapters of one token, with those of each layer if ``layers``."""
        if not layers:
            return TokenRoutes(self.mean[row])
        return TokenRoutes(self.mean[row], self._indices[row], self._weights[row], self._paths)

"""A layer's output while routes are forced, rows have routing options of their own, gates are labelled, or a recorder listens."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from meteora_core.errors import UsageError
from meteora_core.model.tokens import RoutedLayer, forced_routes, token_shape
from meteora_core.routing import IGNORE, GateLabels, Recorder, RowRoutes
from meteora_kernels import Adapters, Routing, mix, route, route_rows


class ObservedLayer(RoutedLayer, Protocol):
    """A layer that can also scale and shift the base layer's output; :class:`meteora_core.model.layer.MeteoraLinear` is one.

    Attributes:
        is_plain: Whether no adapter scales or shifts the output.
    """

    is_plain: bool

    def adjusted(self, output: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """The base layer's output (..., out) with what the chosen adapters add to it besides ``s B A x``."""


def mix_observed(layer: ObservedLayer, x: Tensor, output: Tensor, adapters: Adapters, lora_x: Tensor | None) -> Tensor:
    """Call :func:`meteora_kernels.mix` in the mode of the layer's model, and report the layer's choices to the model's recorder and gate labels.

    Args:
        layer: The layer.
        x: Input of the layer (..., in).
        output: Output of the base layer (..., out).
        adapters: The layer's adapters.
        lora_x: Input of the adapters (..., in), if it differs from ``x``; None is ``x``.

    Raises:
        UsageError: The layer's tokens cannot be matched to the batch, or the labels belong to another batch.
    """
    state, mode = layer.state, layer.state.mode
    if mode.forced is not None or mode.rows is not None:
        logits = None
        if mode.forced is not None:
            indices, weights = forced_routes(layer, state.on(mode.forced, x.device), x)
        elif mode.rows is not None:
            indices, weights, logits = row_routes(layer, mode.rows, x, adapters)
        given = Routing(top_k=indices.shape[-1], indices=indices, weights=weights)
        output = output if layer.is_plain else layer.adjusted(output, indices, weights)
        mixed = mix(x, output, adapters, given, lora_x=lora_x, backend=state.backend)
        assert isinstance(mixed, Tensor)
        if mode.recorder is not None:
            packed = layer.is_output and mode.rows is not None and mode.rows.rows == 1
            shape = torch.Size((1, x.shape[:-1].numel())) if packed else token_shape(layer, x)
            _record(layer, mode.recorder, shape, indices, weights)
        if mode.gate_labels is not None and logits is not None:
            _compare(layer, mode.gate_labels, token_shape(layer, x), logits)
        return mixed
    routing = state.routing_on(x.device)
    if layer.is_plain:
        mixed, logits = mix(x, output, adapters, routing, lora_x=lora_x, backend=state.backend, return_logits=True)
    else:
        logits = F.linear(x, adapters.gate)
        indices, weights = route(logits, routing.top_k, routing.temperature, routing.allowed)
        given = Routing(routing.top_k, indices=indices, weights=weights)
        done = mix(x, layer.adjusted(output, indices, weights), adapters, given, lora_x=lora_x, backend=state.backend)
        assert isinstance(done, Tensor)
        mixed = done
    shape = token_shape(layer, x)
    if mode.recorder is not None:
        _record(layer, mode.recorder, shape, *route(logits.detach(), routing.top_k, routing.temperature, routing.allowed))
    if mode.gate_labels is not None:
        _compare(layer, mode.gate_labels, shape, F.linear(x.detach(), adapters.gate) if mode.gate_labels.alone else logits)
    return mixed


def row_routes(layer: RoutedLayer, rows: RowRoutes, x: Tensor, adapters: Adapters) -> tuple[Tensor, Tensor, Tensor | None]:
    """The routes of each token by the options of its row.

    Args:
        layer: The layer.
        rows: The options of each row of the batch, or of all rows.
        x: Input of the layer (..., in).
        adapters: The layer's adapters.

    Returns:
        Indices int64 (..., k), weights (..., k), and the gate logits (..., N), or None if no row needs them.

    Raises:
        UsageError: The number of rows is not that of the batch.
    """
    if layer.is_output and rows.output is not None:
        rows = rows.output
    on, lead = layer.state.on, x.shape[:-1]
    logits: Tensor | None = None
    if rows.options[0].gated and rows.top_k.numel() == 1 and rows.width == int(rows.top_k):
        logits = F.linear(x, adapters.gate)
        allowed = None if bool(rows.allowed.all()) else on(rows.allowed, x.device).view(-1)
        return *route(logits, rows.width, float(rows.temperature), allowed), logits
    shape = torch.Size((1, lead.numel())) if rows.rows == 1 else token_shape(layer, x)
    if rows.rows > 1 and (len(shape) != 2 or shape[0] != rows.rows):
        raise UsageError(
            f"there are routing options for {rows.rows} rows, but {layer.path} receives a batch of shape {tuple(shape)}",
            hint="give one RoutingOptions for each row of the batch that the model is called with",
        )
    indices = on(rows.indices, x.device).expand(*shape, -1)
    weights = on(rows.weights, x.device).expand(*shape, -1)
    if rows.gated:
        logits = F.linear(x, adapters.gate)
        top_k, temperature, allowed = on(rows.top_k, x.device), on(rows.temperature, x.device), on(rows.allowed, x.device)
        chosen, shares = route_rows(logits.reshape(*shape, -1), top_k, temperature, allowed, rows.width)
        fixed = on(rows.fixed, x.device)
        indices, weights = torch.where(fixed, indices, chosen), torch.where(fixed, weights.to(shares.dtype), shares)
    return indices.reshape(*lead, -1), weights.reshape(*lead, -1), logits


def _record(layer: RoutedLayer, recorder: Recorder, shape: torch.Size, indices: Tensor, weights: Tensor) -> None:
    """Report the layer's choices, for tokens of the given shape, to a recorder."""
    add = recorder.add_output if layer.is_output else recorder.add
    add(layer.path, indices.reshape(*shape, -1), weights.reshape(*shape, -1))


def _compare(layer: RoutedLayer, wanted: GateLabels, shape: torch.Size, logits: Tensor) -> None:
    """Compare gate logits, for tokens of the given shape, with the labels; an output layer may see only the last tokens of every row."""
    labels, observations = wanted.labels, wanted.observations
    last = shape[-1] if layer.is_output and labels.ndim == len(shape) == 2 else labels.shape[-1]
    seen = labels[..., labels.shape[-1] - last :]
    if seen.numel() != shape.numel():
        raise UsageError(
            f"gates are labelled for a batch of shape {tuple(labels.shape)}, but {layer.path} receives a batch of shape {tuple(shape)}",
            hint="give labels for the very batch that the model gets",
        )
    flat = logits.reshape(-1, logits.shape[-1])
    wide = flat if flat.dtype == torch.float64 else flat.float()
    weights = observations.weights  # float32; autocast does not change it
    targets = seen.reshape(-1).to(flat.device)
    losses = F.cross_entropy(wide, targets, ignore_index=IGNORE, reduction="sum" if weights is None else "none")
    if weights is not None:
        losses = (losses * weights.reshape(labels.shape)[..., labels.shape[-1] - last :].reshape(-1).to(flat.device)).sum()
    observations.loss_sums.append(losses.to(labels.device))
    if wanted.keep_hits:
        hits = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
        hits[..., labels.shape[-1] - last :] = (flat.detach().argmax(-1) == targets).reshape(seen.shape).to(labels.device)
        observations.hits[layer.path] = hits.reshape(-1)

"""Forward passes over the tokens of many requests in one row, without padding.

The linear layers see one text of all tokens. The attention function of this module separates the requests again: it stores the new keys and values in each
request's slot and attends to this slot alone. Requests that read one token are attended to together, others one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteora_core.errors import CheckpointError
from meteora_core.model.caches import has_states
from meteora_core.serving.slots import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "meteora_packed"
"""Name under which transformers knows the attention function."""
_UNEVEN = 2
"""Rows are attended to one by one if together they have fewer columns than the padded rectangle by this factor."""


@dataclass(frozen=True)
class Segment:
    """The next tokens of one request.

    Attributes:
        slot: Slot of the request.
        start: Position of the first of the tokens, which is the number of tokens in the slot.
        tokens: Token ids.
    """

    slot: int
    start: int
    tokens: Sequence[int]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


class Pass:
    """One forward pass: where each token belongs.

    Args:
        slots: Keys and values.
        segments: Requests with their next tokens. The first ``single`` of them have one token each and the slots 0, 1, ….
        single: Number of requests that are attended to together.
        device: Device of the model.
    """

    def __init__(self, slots: Slots, segments: Sequence[Segment], single: int, device: torch.device) -> None:
        self.slots, self.single, self.device = slots, single, device
        self.segments = segments[single:]
        self.ends = [segment.end for segment in segments[:single]]
        self.even = bool(single) and sum(self.ends) * _UNEVEN >= max(self.ends) * single
        self.positions = torch.tensor([end - 1 for end in self.ends], device=device)
        self.rows = torch.arange(single, device=device)
        self._masks: dict[Any, Tensor | None] = {}

    def mask(self, window: int | None) -> Tensor:
        """The mask of the requests with one token, bool (requests, 1, 1, columns)."""
        key = ("single", window)
        if key not in self._masks:
            columns = torch.arange(max(self.ends), device=self.device)
            seen = columns <= self.positions.view(-1, 1)
            if window:
                seen &= columns > self.positions.view(-1, 1) - window
            self._masks[key] = seen.view(self.single, 1, 1, -1)
        mask = self._masks[key]
        assert mask is not None
        return mask

    def segment_mask(self, start: int, end: int, window: int | None) -> Tensor | None:
        """The mask of the tokens from ``start`` to ``end`` of one request, bool (tokens, columns); None if plain causal attention from position 0 is meant."""
        if start == 0 and not (window and end > window):
            return None
        key = (start, end, window)
        if key not in self._masks:
            rows, columns = torch.arange(start, end, device=self.device).view(-1, 1), torch.arange(end, device=self.device)
            seen = columns <= rows
            if window:
                seen &= columns > rows - window
            self._masks[key] = seen
        return self._masks[key]


class _Current(threading.local):
    value: Pass | None = None


_current = _Current()


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function for transformers.

    Args:
        module: The attention layer, whose ``layer_idx`` names its slots.
        query: Queries of all tokens (1, heads, tokens, width).
        key, value: Keys and values of all tokens (1, key heads, tokens, width).
        attention_mask: Ignored.
        scaling: Factor of the scores; None for the usual one.

    Returns:
        The output (1, tokens, heads, width), and None.
    """
    now = _current.value
    if now is None or options.get("s_aux") is not None or options.get("position_bias") is not None:
        raise CheckpointError("this model's attention cannot run over packed requests", hint="choose a base model of another kind")
    window, softcap = options.get("sliding_window"), options.get("softcap")
    keys, values = now.slots.layer(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    single = now.single
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    output = query.new_empty(query.shape[2], heads, value.shape[-1])
    if single:
        keys[now.rows, :, now.positions] = key[0, :, :single].transpose(0, 1)
        values[now.rows, :, now.positions] = value[0, :, :single].transpose(0, 1)
        packed = query[0, :, :single].transpose(0, 1).reshape(single, key.shape[1], groups, -1)
        if now.even:
            width = max(now.ends)
            output[:single] = _attend(packed, keys[:single, :, :width], values[:single, :, :width], now.mask(window), scaling, softcap).view(single, heads, -1)
        else:
            for row, end in enumerate(now.ends):
                begin = max(0, end - window) if window else 0
                one = _attend(packed[row : row + 1], keys[row : row + 1, :, begin:end], values[row : row + 1, :, begin:end], None, scaling, softcap)
                output[row] = one.view(heads, -1)
    first = single
    for segment in now.segments:
        last = first + len(segment.tokens)
        slot, start, end = segment.slot, segment.start, segment.end
        keys[slot, :, start:end] = key[0, :, first:last]
        values[slot, :, start:end] = value[0, :, first:last]
        known = [tensor[slot : slot + 1, :, :end].repeat_interleave(groups, 1) if groups > 1 else tensor[slot : slot + 1, :, :end] for tensor in (keys, values)]
        mask = now.segment_mask(start, end, window)
        attended = _attend(query[:, :, first:last], known[0], known[1], mask, scaling, softcap, causal=mask is None)
        output[first:last] = attended[0].transpose(0, 1)
        first = last
    return output.unsqueeze(0), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, with soft-capped scores where the model has them."""
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores.float(), -1).to(value.dtype) @ value


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model use :func:`attention` within the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def run(model: PreTrainedModel, now: Pass, segments: Sequence[Segment], outputs: Sequence[int], options: dict[str, Any]) -> Tensor:
    """Read the tokens of all segments.

    Args:
        model: A model that :func:`packed_attention` prepared.
        now: The pass over these segments.
        segments: Requests with their next tokens.
        outputs: Positions, among all tokens, of those to compute logits for.
        options: Keyword arguments of the model's forward method.

    Returns:
        Logits (outputs, vocabulary) in the model's dtype.
    """
    ids = torch.tensor([[token for segment in segments for token in segment.tokens]], device=now.device)
    positions = torch.tensor([[at for segment in segments for at in range(segment.start, segment.end)]], device=now.device)
    chosen = torch.tensor(list(outputs), device=now.device)
    keep = {"logits_to_keep": chosen} if "logits_to_keep" in options else {}
    _current.value = now
    try:
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **keep).logits[0]
    finally:
        _current.value = None
    return logits if keep else logits[chosen]


@torch.inference_mode()
def check_packed(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Raise CheckpointError unless the model computes the same logits from packed requests as from single ones, tested with two short texts."""
    kind = getattr(model.config, "model_type", type(model).__name__)
    hint = "choose a base model of another kind, such as a Llama, Qwen or Mistral"
    if has_states(model) or not getattr(model, "_supports_attention_backend", False) or getattr(model.config, "is_encoder_decoder", False):
        raise CheckpointError(f"{kind} models cannot be served: their attention cannot run over several requests in one row", hint=hint)
    device = next(model.parameters()).device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    texts = [[(7 * index + shift) % vocabulary for index in range(length)] for shift, length in ((11, 9), (5, 6))]
    alone = [model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0, -1].float() for text in texts]
    try:
        with packed_attention(model):
            slots = Slots(2, 64)
            first = [Segment(0, 0, texts[0][:-1]), Segment(1, 0, texts[1][:-1])]
            run(model, Pass(slots, first, 0, device), first, [0], options)
            then = [Segment(0, len(texts[0]) - 1, texts[0][-1:]), Segment(1, len(texts[1]) - 1, texts[1][-1:])]
            packed = run(model, Pass(slots, then, 2, device), then, [0, 1], options).float()
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{kind} models cannot be served: packed requests fail ({type(error).__name__})", hint=hint) from error
    allowed = 1e-3 if alone[0].dtype == next(model.parameters()).dtype else 5e-2
    for one, other in zip(alone, packed, strict=True):
        if not bool((one - other).abs().amax() <= allowed * one.abs().amax().clamp_min(1.0)):
            raise CheckpointError(f"{kind} models cannot be served: packed requests change the result", hint=hint)

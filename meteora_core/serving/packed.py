"""Forward passes over the tokens of many requests in one row, without padding.

The linear layers see one text of all tokens. The attention function of this module separates the requests again: it stores the new keys and values in each
request's slot and attends to this slot alone. Requests that read one token are attended to together, others one by one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteora_core.errors import CheckpointError
from meteora_core.model.caches import has_states
from meteora_core.reading import first_line
from meteora_core.routing import find_meteora
from meteora_core.serving.rotary import one_launch_rotary
from meteora_core.serving.slots import Slots
from meteora_kernels.plan import why_not_triton

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

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
        self.ends = [segment.end for segment in segments[:single]]
        self.even = bool(single) and sum(self.ends) * _UNEVEN >= max(self.ends) * single
        self.positions = torch.tensor([end - 1 for end in self.ends], device=device)
        self.rows = torch.arange(single, device=device)
        self._continued: list[tuple[int, Segment]] = []
        beginning: list[tuple[int, Segment]] = []
        first = single
        for segment in segments[single:]:
            (self._continued if segment.start else beginning).append((first, segment))
            first += len(segment.tokens)
        self._texts = [_Texts(group, device) for group in _alike(beginning)]
        self._masks: dict[Any, Tensor | None] = {}

    def mask(self, window: int | None) -> Tensor:
        """The mask of the requests with one token, bool (requests, 1, 1, columns)."""
        key = ("single", window)
        if key not in self._masks:
            self._masks[key] = _seen(self.positions.view(-1, 1), max(self.ends), window).view(self.single, 1, 1, -1)
        mask = self._masks[key]
        assert mask is not None
        return mask

    def segment_mask(self, start: int, end: int, window: int | None) -> Tensor | None:
        """The mask of the tokens from ``start`` to ``end`` of a request, bool (tokens, columns); None if plain causal attention from position 0 is meant."""
        if start == 0 and not (window and end > window):
            return None
        key = (start, end, window)
        if key not in self._masks:
            self._masks[key] = _seen(torch.arange(start, end, device=self.device).view(-1, 1), end, window)
        return self._masks[key]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scores) -> Tensor:
        """Store the new keys and values of a layer, and attend to those of each request.

        Args:
            layer: Index of the layer.
            query: Queries of all tokens (heads, tokens, width).
            key, value: Keys and values of all tokens (key heads, tokens, width).
            how: How scores are computed.

        Returns:
            The output (tokens, heads, width).
        """
        keys, values = self.slots.layer(layer, key, value)
        single, window = self.single, how.window
        heads, groups = query.shape[0], query.shape[0] // key.shape[0]
        output = query.new_empty(query.shape[1], heads, value.shape[-1])
        if single:
            keys[self.rows, :, self.positions] = key[:, :single].transpose(0, 1)
            values[self.rows, :, self.positions] = value[:, :single].transpose(0, 1)
            packed = query[:, :single].transpose(0, 1).reshape(single, key.shape[0], groups, -1)
            if self.even:
                width = max(self.ends)
                output[:single] = _attend(packed, keys[:single, :, :width], values[:single, :, :width], self.mask(window), how).reshape(single, heads, -1)
            else:
                for row, end in enumerate(self.ends):
                    begin = max(0, end - window) if window else 0
                    one = _attend(packed[row : row + 1], keys[row : row + 1, :, begin:end], values[row : row + 1, :, begin:end], None, how)
                    output[row] = one.reshape(heads, -1)
        for first, segment in self._continued:
            last = first + len(segment.tokens)
            slot, start, end = segment.slot, segment.start, segment.end
            keys[slot, :, start:end] = key[:, first:last]
            values[slot, :, start:end] = value[:, first:last]
            known = [_for_all_heads(tensor[slot : slot + 1, :, :end], groups) for tensor in (keys, values)]
            attended = _attend(query[None, :, first:last], known[0], known[1], self.segment_mask(start, end, window), how)
            output[first:last] = attended[0].transpose(0, 1)
        for texts in self._texts:
            width = texts.width
            new = [tensor[:, texts.places].transpose(0, 1) for tensor in (query, key, value)]
            keys[texts.slots, :, :width] = new[1]
            values[texts.slots, :, :width] = new[2]
            mask = self.segment_mask(0, width, window)
            attended = _attend(new[0], _for_all_heads(new[1], groups), _for_all_heads(new[2], groups), mask, how, causal=mask is None)
            output[texts.tokens] = attended.transpose(1, 2).reshape(-1, heads, value.shape[-1])[texts.inside]
        return output


class FixedPass:
    """A forward pass with one token of each of the first slots, whose shapes do not depend on the lengths of the texts, so that a CUDA graph can hold it.

    Args:
        slots: Keys and values; they must have at least ``width`` columns.
        positions: Position of the token of each slot, int64 (requests,), below ``width``; they may be changed between passes.
        width: Number of columns that are attended to.

    Attributes:
        kernel: Module of the kernel that attends; None for PyTorch's attention with a mask.
    """

    def __init__(self, slots: Slots, positions: Tensor, width: int) -> None:
        self.slots, self.positions, self.width = slots, positions, width
        self.kernel = decode_kernel(positions.device)
        self.rows = torch.arange(len(positions), device=positions.device)
        self._masks: dict[int | None, Tensor] = {}

    def begin(self) -> None:
        """Begin another pass. The first layer makes the masks, as a part of the pass."""
        self._masks.clear()

    def mask(self, like: Tensor, window: int | None) -> Tensor:
        """What is added to the scores, in the dtype of ``like``: 0 for the columns of a text and -inf for others, (requests, 1, 1, columns)."""
        if window not in self._masks:
            seen = _seen(self.positions.view(-1, 1), self.width, window)
            self._masks[window] = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf")).view(len(seen), 1, 1, -1)
        return self._masks[window]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scores) -> Tensor:
        """:meth:`Pass.attend` with one token of each slot."""
        keys, values = self.slots.layer(layer, key, value)
        count, heads = len(self.rows), key.shape[0]
        if self.kernel is not None and how.softcap is None:
            new = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
            if self.kernel.can_attend(*new):
                scaling = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
                done: Tensor = self.kernel.attend(*new, (keys, values), self.positions, self.width, scaling=scaling, window=how.window or 0)
                return done
        keys[self.rows, :, self.positions] = key.transpose(0, 1)
        values[self.rows, :, self.positions] = value.transpose(0, 1)
        packed = query.view(heads, query.shape[0] // heads, count, query.shape[2]).permute(2, 0, 1, 3)
        mask = self.mask(query, how.window)
        output = _attend(packed, keys[:count, :, : self.width], values[:count, :, : self.width], mask, how)
        return output.reshape(count, query.shape[0], -1)


@dataclass(frozen=True)
class Scores:
    """How the scores of attention are computed.

    Attributes:
        scaling: Factor of the scores; None for the usual one.
        softcap: Bound of the scores; None for none.
        window: Number of last tokens that a token attends to; None for all.
    """

    scaling: float | None = None
    softcap: float | None = None
    window: int | None = None


class _Texts:
    """Texts of similar length that begin in one pass, as a rectangle with padding on the right, which tokens before it never attend to.

    Attributes:
        width: Length of the longest text.
        slots: Slot of each text, int64 (texts,).
        places: Index among all tokens of each token of the rectangle, int64 (texts, width); padding repeats the last token of its text.
        tokens: Index among all tokens of the texts' tokens, int64 (tokens,).
        inside: Index in the flat rectangle of the texts' tokens, int64 (tokens,).
    """

    def __init__(self, group: Sequence[tuple[int, Segment]], device: torch.device) -> None:
        lengths = torch.tensor([len(segment.tokens) for _, segment in group])
        firsts = torch.tensor([first for first, _ in group])
        self.width = int(lengths.max())
        columns = torch.arange(self.width)
        places = firsts.view(-1, 1) + torch.minimum(columns, lengths.view(-1, 1) - 1)
        real = columns < lengths.view(-1, 1)
        self.slots = torch.tensor([segment.slot for _, segment in group], device=device)
        self.places, self.tokens = places.to(device), places[real].to(device)
        self.inside = real.flatten().nonzero().flatten().to(device)


def _alike(beginning: Sequence[tuple[int, Segment]]) -> list[list[tuple[int, Segment]]]:
    """Group texts that begin in one pass so that the rectangle of each group has fewer than ``_UNEVEN`` times the tokens of its texts."""
    groups: list[list[tuple[int, Segment]]] = []
    for entry in sorted(beginning, key=lambda entry: -len(entry[1].tokens)):
        if groups and len(groups[-1][0][1].tokens) < _UNEVEN * len(entry[1].tokens):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _seen(rows: Tensor, columns: int, window: int | None) -> Tensor:
    """Whether the tokens at positions ``rows`` (tokens, 1) attend to each column, bool (tokens, columns)."""
    at = torch.arange(columns, device=rows.device)
    seen = at <= rows
    return seen & (at > rows - window) if window else seen


def _for_all_heads(tensor: Tensor, groups: int) -> Tensor:
    """Keys or values (texts, key heads, columns, width), repeated for the query heads that share them."""
    return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor


class _Current(threading.local):
    value: Pass | FixedPass | None = None


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
    how = Scores(scaling, options.get("softcap"), options.get("sliding_window"))
    return now.attend(int(module.layer_idx), query[0], key[0], value[0], how).unsqueeze(0), None  # type: ignore[arg-type]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: Scores, *, causal: bool = False) -> Tensor:
    """Scaled dot-product attention, with soft-capped scores where the model has them. ``mask`` is boolean, or is added to the scores."""
    if how.softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=how.scaling)
    scores = query @ key.transpose(-1, -2) * (how.scaling if how.scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / how.softcap) * how.softcap
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores.float(), -1).to(value.dtype) @ value


@cache
def decode_kernel(device: torch.device) -> Any:
    """The module :mod:`meteora_kernels.attention.decode` if its kernels run on a device, tested with random input; otherwise None."""
    if why_not_triton(device.type, torch.float32) is not None:
        return None
    from meteora_kernels.attention import decode  # needs Triton

    make = torch.Generator().manual_seed(0)
    query, key, keys, values = (torch.randn(*shape, generator=make).to(device) for shape in ((2, 4, 32), (2, 2, 32), (2, 2, 64, 32), (2, 2, 64, 32)))
    positions = torch.tensor([0, 40], device=device)
    try:
        found, expected = (
            function(query, key, key, (keys.clone(), values.clone()), positions, 64, scaling=0.2) for function in (decode.attend, decode.attend_reference)
        )
        close = torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    except Exception as error:  # a kernel that cannot be built here
        _log.warning("the kernel of attention cannot run on %s and is not used: %s", device, first_line(error))
        return None
    if not close:
        _log.warning("the kernel of attention gives other results on %s and is not used", device)
    return decode if close else None


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model use :func:`attention` within the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with one_launch_rotary(model):
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
    logits = forward(model, ids, positions, now, **keep)
    return logits if keep else logits[chosen]


def forward(model: PreTrainedModel, ids: Tensor, positions: Tensor, now: Pass | FixedPass, **options: Any) -> Tensor:
    """Call a model that :func:`packed_attention` prepared.

    Args:
        model: The model.
        ids: Tokens int64 (1, tokens).
        positions: Their positions int64 (1, tokens).
        now: The pass over these tokens.
        **options: Keyword arguments of the model's forward method.

    Returns:
        Logits (tokens, vocabulary) in the model's dtype.
    """
    _current.value = now
    try:
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits[0]
    finally:
        _current.value = None
    return logits


@torch.inference_mode()
def check_packed(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Raise CheckpointError unless the model computes the same logits from packed requests as from single ones, tested with two short texts.

    Adapters are off: where two of them are nearly equal, rounding could change the choice, and with it the logits.
    """
    state = find_meteora(model)
    with nullcontext() if state is None else state.disabled():
        _check_packed(model, options)


def _check_packed(model: PreTrainedModel, options: dict[str, Any]) -> None:
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
    allowed = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.2  # rounding to 16 bits adds up from layer to layer
    for one, other in zip(alone, packed, strict=True):
        if not bool((one - other).norm() <= allowed * one.norm().clamp_min(1.0)):
            raise CheckpointError(f"{kind} models cannot be served: packed requests change the result", hint=hint)

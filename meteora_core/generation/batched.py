"""Greedy decoding of one batch, with a key-value cache.

On a CPU (and wherever else the fast way is not open) the cache grows, and rows that are done leave the batch. On a CUDA GPU the cache has a fixed size
and one whole step (the model, the choice of the token, the end of rows) is captured in a CUDA graph: a small model's steps are bound by launches, and those of
hundreds of MeteoRA layers even more so.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from meteora_core.generation.constants import RememberedConstants
from meteora_core.generation.no_repeat import NOTHING, NoRepeat
from meteora_core.generation.nonfinite import non_finite_error, not_finite
from meteora_core.model.caches import Reader, padding_is_safe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora_core.errors import MeteoraError

_log = logging.getLogger(__name__)

SHRINK = 0.75
"""Rows leave a growing cache once at most this share of the batch goes on."""
LOOK = 8
"""Steps between two looks whether all rows are done, on a GPU: a look waits for the GPU."""
TAIL = 4
"""Once at most one row in so many goes on, a fixed cache hands them to one that is smaller by this factor."""
TAIL_STEPS = 64
"""Only if so many steps may be left: the smaller cache needs a graph of its own."""
CAPACITY = 256
"""Fixed caches are a multiple of this long, so that batches of like length share a graph."""


@dataclass
class Batch:
    """Prompts to answer.

    Attributes:
        ids: int64 (batch, width), left-padded, on the model's device.
        mask: int64 (batch, width): 1 for tokens, 0 for padding.
        room: The most new tokens of each row; at least 1.
        eos: Ends a row, and fills rows that are done.
        no_repeat: n of the n-grams that may not repeat; 0 is off.
        more_ends: Other tokens that end a row.
    """

    ids: Tensor
    mask: Tensor
    room: Sequence[int]
    eos: int
    no_repeat: int = 0
    more_ends: Sequence[int] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end a row."""
        return (self.eos, *self.more_ends)

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def positions(self) -> Tensor:
        """int64 (batch, width): each token's place in its row; 0 for padding."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    def text(self, width: int) -> Tensor:
        """The prompts with :data:`NOTHING` for padding, int64 (batch, width)."""
        made = torch.full((self.ids.shape[0], width), NOTHING, device=self.ids.device)
        made[:, : self.width] = torch.where(self.mask.bool(), self.ids, NOTHING)
        return made


def plain(model: Any) -> Any:
    """The causal LM below a PEFT wrapper, with its adapters in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _arguments(model: Any) -> dict[str, Any]:
    """What the model can be asked for: logits of the last position only.

    An index and not a count: a count leaves a slice of the hidden states, which is not contiguous, and torch multiplies such a slice with a frozen
    head by copying the head once for every row of the batch.
    """
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": torch.tensor([-1], device=next(model.parameters()).device)} if "logits_to_keep" in known else {}


def _cut(row: list[int], room: int, ends: Collection[int]) -> list[int]:
    row = row[:room]
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]


def _is_end(token: Tensor, ends: Tensor) -> Tensor:
    """Which tokens (batch,) are among ``ends`` (count,). By comparison and not by ``torch.isin``, which may sort: a CUDA graph cannot hold that."""
    return (token.unsqueeze(-1) == ends).any(-1)


@torch.inference_mode()
def decode_growing(model: PreTrainedModel, batch: Batch) -> list[list[int]]:
    """Decode with the model's own growing cache; rows that are done leave the batch when enough of them are, if the cache can shrink.

    Where padding would change what a model with recurrent states computes, rows are batched with rows of the same length only.

    Returns:
        Per row, the new tokens up to (without) the end.

    Raises:
        NonFiniteError: The model's logits are NaN or infinite.
        CheckpointError: The model has no cache.
    """
    model = plain(model)
    if not padding_is_safe(model) and not bool(batch.mask.all()):
        return _by_length(model, batch)
    reader = Reader(model, **_arguments(model))
    device, steps = batch.ids.device, max(batch.room)
    no_repeat = NoRepeat(batch.text(batch.width + steps), batch.width, batch.no_repeat)
    written = torch.full((len(batch.room), steps), batch.eos, device=device)
    rows = torch.arange(len(batch.room), device=device)
    room = torch.tensor(list(batch.room), device=device)
    done = torch.zeros(len(batch.room), dtype=torch.bool, device=device)
    broken = torch.zeros_like(done)
    ends = torch.tensor(batch.ends, device=device)
    ids, mask, positions = batch.ids, batch.mask, batch.positions()
    look = LOOK if device.type == "cuda" else 1
    for step in range(steps):
        logits = reader.read(ids, mask, positions).float()
        broken = broken | (not_finite(logits) & ~done)
        token = no_repeat.ban(logits).argmax(-1)
        token = torch.where(done, batch.eos, token)
        written[rows, step] = token
        no_repeat.add(token, torch.tensor([batch.width + step], device=device))
        done = done | _is_end(token, ends) | (room <= step + 1)
        positions = positions[:, -1:] + (~done).unsqueeze(1)  # a row that is done stays within the model's context
        if step % look == look - 1 or step == steps - 1:
            # One copy from the device for both.
            finished, unusable = torch.stack([done, broken]).tolist()
            if any(unusable):
                raise _broken_row(model, no_repeat.text[unusable.index(True)])
            going = len(rows) - sum(finished)
            if not going:
                break
            if going <= SHRINK * len(rows) and reader.keep(keep := (~done).nonzero().flatten()):
                no_repeat, rows, room, done, broken = no_repeat.select(keep), rows[keep], room[keep], done[keep], broken[keep]
                token, mask, positions = token[keep], mask[keep], positions[keep]
        ids = token.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return [_cut(row, most, batch.ends) for row, most in zip(written.tolist(), batch.room, strict=True)]


def _by_length(model: PreTrainedModel, batch: Batch) -> list[list[int]]:
    """Decode a batch in parts whose rows have the same length, so that nothing is padded."""
    lengths = batch.mask.sum(1).tolist()
    made: list[list[int]] = [[]] * len(lengths)
    for length in dict.fromkeys(lengths):
        places = [place for place, other in enumerate(lengths) if other == length]
        room = [batch.room[place] for place in places]
        part = Batch(batch.ids[places, -length:], batch.mask[places, -length:], room, batch.eos, batch.no_repeat, batch.more_ends)
        for place, answer in zip(places, decode_growing(model, part), strict=True):
            made[place] = answer
    return made


def _broken_row(model: Any, text: Tensor) -> MeteoraError:
    """The error for a row whose logits are not finite; ``text`` is its tokens so far, int64 (width,)."""
    return non_finite_error(model, text[text != NOTHING].tolist())


class FixedDecoder:
    """Decodes batches of up to ``rows`` rows and ``capacity`` tokens with a cache of fixed size; on a CUDA GPU one step is a CUDA graph.

    A graph holds what the model was when it was made: routing settings, adapters, weights' places. Make a new decoder after any change.

    Args:
        model: A causal LM in evaluation mode, whose attention is SDPA (:func:`can_be_fixed`).
        rows, capacity: Of the cache.
        eos: Ends a row, and fills rows that are done.
        no_repeat: n of the n-grams that may not repeat; 0 is off.
        more_ends: Other tokens that end a row.

    Raises:
        torch.OutOfMemoryError: The cache does not fit.
        RuntimeError: The model's step cannot be captured.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, eos: int, no_repeat: int, more_ends: Sequence[int] = ()) -> None:
        from transformers import StaticCache

        self.model, self.options = plain(model), _arguments(plain(model))
        self.rows, self.capacity, self.eos, self.more_ends = rows, capacity, eos, tuple(more_ends)
        self.tail: FixedDecoder | None = None
        device = next(model.parameters()).device
        with torch.inference_mode():
            self.cache = StaticCache(config=self.model.config, max_cache_len=capacity)
            self.text = NoRepeat(torch.full((rows, capacity), NOTHING, device=device), 0, no_repeat)
            self.ends = torch.tensor((eos, *more_ends), device=device)
            self.token = torch.full((rows, 1), eos, device=device)
            self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
            self.slot = torch.zeros(1, dtype=torch.int64, device=device)
            self.mask = torch.zeros(rows, 1, 1, capacity, dtype=torch.bool, device=device)
            self.done = torch.zeros(rows, dtype=torch.bool, device=device)
            self.usable = torch.ones(rows, dtype=torch.bool, device=device)  # false once a row's logits were NaN or infinite
            self.last = torch.zeros(rows, dtype=torch.int64, device=device)
            self.graph = None
            self.constants = RememberedConstants()  # lives as long as the graph, whose kernels read them
            if device.type == "cuda":
                with torch.cuda.device(device):
                    self.graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), self.constants:  # once, so that kernels are loaded, workspaces made and the cache has its tensors
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        if self.constants.written():
            raise RuntimeError("the model writes to what it makes from numbers")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), self.constants:
            self._step()
        return graph

    def _step(self) -> None:
        """Run the model on the tokens at :attr:`slot` and choose the next."""
        self.mask.index_fill_(3, self.slot, True)
        output = self.model(
            input_ids=self.token, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True, **self.options
        )
        self._choose(output.logits[:, -1])
        self.positions.add_((~self.done).unsqueeze(1))  # a row that is done stays within the model's context

    def _choose(self, logits: Tensor) -> None:
        best, token = self.text.ban(logits.float()).max(-1)
        self.usable.logical_and_((best < float("inf")) | self.done)  # false for NaN; minus infinity if all tokens are banned
        token = torch.where(self.done, self.eos, token)
        self.slot.add_(1)
        self.text.add(token, self.slot)
        self.token.copy_(token.unsqueeze(1))
        self.done.logical_or_(_is_end(token, self.ends) | (self.slot >= self.last))

    @torch.inference_mode()
    def decode(self, batch: Batch) -> list[list[int]]:
        """Decode one batch that fits.

        Returns:
            Per row, the new tokens up to (without) the end.

        Raises:
            NonFiniteError: The model's logits are NaN or infinite.
        """
        count, width, steps = len(batch.room), batch.width, max(batch.room)
        assert count <= self.rows
        assert width + steps <= self.capacity
        spare = torch.arange(self.rows, device=batch.ids.device) % count
        ids, mask = batch.ids[spare], batch.mask[spare]
        self.cache.reset()
        self.text.text.copy_(batch.text(self.capacity)[spare])
        self.text.restart(width)
        self.slot.fill_(width - 1)
        self.mask.zero_()
        self.mask[:, 0, 0, :width] = mask.bool()
        self.last.copy_(torch.tensor(list(batch.room), device=mask.device)[spare] + (width - 1))
        self.done.copy_(torch.arange(self.rows, device=mask.device) >= count)
        self.usable.fill_(True)
        self.positions.copy_(mask.sum(1, keepdim=True))
        positions = batch.positions()[spare]
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True, **self.options)
        self._choose(output.logits[:, -1])
        self._run(1, steps)
        self._check()
        made = self.text.text[:count, width : width + steps].tolist()
        return [_cut(row, most, (self.eos, *self.more_ends)) for row, most in zip(made, batch.room, strict=True)]

    def _run(self, step: int, steps: int) -> None:
        """Go on from ``step`` until all rows are done."""
        for now in range(step, steps):
            if now % LOOK == 1:
                keep = (~self.done).nonzero().flatten()
                if len(keep):
                    self._check()
                else:
                    return
                if len(keep) * TAIL <= self.rows and self.rows >= 2 * TAIL and steps - now >= TAIL_STEPS:
                    self._hand_over(keep, now, steps)
                    return
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step()

    def _hand_over(self, keep: Tensor, step: int, steps: int) -> None:
        """Let the rows ``keep`` go on in a smaller cache, and take their texts back."""
        if self.tail is None:
            self.tail = FixedDecoder(self.model, self.rows // TAIL, self.capacity, self.eos, self.text.size, self.more_ends)
        self.tail._take(self, keep)
        self.tail._run(step, steps)
        self.tail._check()
        self.text.text[keep] = self.tail.text.text[: len(keep)]

    def _take(self, other: FixedDecoder, keep: Tensor) -> None:
        """Become the state of some rows of another decoder of the same capacity."""
        spare = keep[torch.arange(self.rows, device=keep.device) % len(keep)]
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            keys, values = theirs.keys[spare], theirs.values[spare]
            if not mine.is_initialized:
                mine.lazy_initialization(keys, values)
            mine.keys.copy_(keys)
            mine.values.copy_(values)
            mine.cumulative_length.copy_(theirs.cumulative_length)
        self.text.take(other.text, spare)
        self.slot.copy_(other.slot)
        for name in ("token", "positions", "mask", "last"):
            getattr(self, name).copy_(getattr(other, name)[spare])
        self.done.copy_(torch.arange(self.rows, device=keep.device) >= len(keep))
        self.usable.fill_(True)

    def _check(self) -> None:
        """Raise NonFiniteError if a row's logits were not finite. Waits for the device."""
        usable = self.usable.tolist()
        if not all(usable):
            raise _broken_row(self.model, self.text.text[usable.index(False)])


def can_be_fixed(model: PreTrainedModel) -> bool:
    """Whether :class:`FixedDecoder` can run the model: SDPA attention over a plain cache, no quantised weights, nothing recorded."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    inner = plain(model)
    if getattr(inner.config, "_attn_implementation", None) != "sdpa" or getattr(inner, "is_quantized", False):
        return False
    state = getattr(inner, "meteora", None)
    if state is not None and state.observed:
        return False
    if "position_ids" not in inspect.signature(inner.forward).parameters or getattr(inner.config, "is_encoder_decoder", False):
        return False
    try:
        cache = StaticCache(config=inner.config, max_cache_len=CAPACITY)
    except (AttributeError, TypeError, ValueError):
        return False
    return all(type(layer) is StaticLayer for layer in cache.layers)


class Decoder:
    """Decodes batch after batch of one unchanged model, the fast way where that is open.

    Args:
        model: A causal LM in evaluation mode.
        graphs: Whether to use caches of fixed size, whose steps are CUDA graphs on a CUDA GPU. "auto": on such a GPU, where the model allows it;
            "on": on any device where the model allows it, and a warning where it does not.
    """

    def __init__(self, model: PreTrainedModel, graphs: Literal["auto", "on", "off"] = "auto") -> None:
        self.model = model
        self._fixed: FixedDecoder | None = None
        self._told = False
        wanted = graphs == "on" or (graphs == "auto" and next(model.parameters()).device.type == "cuda")
        self._use_fixed = wanted and can_be_fixed(model)
        if graphs == "on" and not self._use_fixed:
            _log.warning("this model needs a growing cache (its attention is not SDPA over a plain one, or its weights are quantised): no CUDA graphs")

    def decode(self, batch: Batch) -> list[list[int]]:
        """Per row, the new tokens up to (without) the end. Raises torch.OutOfMemoryError; a smaller batch may fit then."""
        state = getattr(self.model, "meteora", None)
        if self._use_fixed and not (state is not None and state.observed):
            decoder = self._decoder(batch)
            if decoder is not None:
                return decoder.decode(batch)
        elif self._use_fixed and not self._told:
            self._told = True
            _log.warning("routes are recorded, forced or labelled by eager code: steps are not replayed as CUDA graphs meanwhile")
        return decode_growing(self.model, batch)

    def forget(self) -> None:
        """Give the memory of caches and graphs back."""
        self._fixed = None

    def _decoder(self, batch: Batch) -> FixedDecoder | None:
        rows = 1 << (len(batch.room) - 1).bit_length()
        capacity = -(-(batch.width + max(batch.room)) // CAPACITY) * CAPACITY
        held = self._fixed
        if held is not None and held.rows == rows and held.capacity == capacity and (held.eos, *held.more_ends) == batch.ends:
            return held
        self._fixed = held = None
        try:
            self._fixed = FixedDecoder(self.model, rows, capacity, batch.eos, batch.no_repeat, batch.more_ends)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.warning("this model's steps cannot be captured in a CUDA graph, it is run without: %s", str(error).splitlines()[0])
            self._use_fixed = False
        return self._fixed

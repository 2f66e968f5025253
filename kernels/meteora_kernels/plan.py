"""Which backend and which path ``auto`` takes: a frozen table of measured choices, first match wins, with the reason.

The limits were measured on one H100 (bfloat16, Llama-3-8B shapes) and on a 2-core CPU with AVX-512; docs/performance.md has the numbers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from meteora_kernels.wide import Wide

FEW_TOKENS = 16
"""Up to here (one tile of a matrix unit) decoding kernels win."""
INLINE_TOKENS = 64
"""Up to here every program of the pass over the output routes its tokens itself; above, one kernel before it does."""
GROUPED_GAIN = 16
"""Chosen rows alone are worth reading where all rows are at least so many times as many."""
CHOSEN_RANK = 3072
"""While decoding on top of a finished base output: from this total rank on, A's chosen rows are read after the gates, not all rows along with them."""
CHOSEN_ROWS = 256
"""While decoding in a fused group: up to so many rows of A that its tokens choose, counted once a token, and above up to as many as A has, those are
read after the gates, not all rows along with them."""
WIDE_SHARE = 8
"""In 16 bits a fused group's weights lie beside their B^T where all columns for B^T are at most one in so many of h."""

EVER = 1 << 30
"""More tokens than there are."""


@dataclass(frozen=True, slots=True)
class GroupRule:
    """One line of the table for fused groups above :data:`FEW_TOKENS`: where all of its conditions hold, the group is computed this way.

    Attributes:
        order: "stream" (all in one launch, by :mod:`triton_stream`), "packed" (one GEMM over base, gates and A, then B on top), "split" (gates and
            A, then B, then the base on top) or "wide" (gates and A, then base and B in one product; for groups whose B^T lies beside their
            weights, :func:`lies_beside`).
        least_tokens, most_tokens: M lies between them, both included.
        pieces: The product with the gates and A (in "packed" also the base) comes as so many float32 partial sums; 0: rounded to the
            model's dtype. Lines with pieces hold for 16-bit dtypes only: float32 would gain nothing. In "stream" it is the base's sums that are
            cut into so many pieces.
        tile: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages of :mod:`triton_products`, which computes the pieces and, for "wide" where x is to be
            copied, copies it on the way; None: the library does. In "stream" those of its kernel, which takes all tokens in one block.
        gate_pieces: The pieces of the sums for gates and A in "stream", and in "wide" where one launch also routes and writes h (:mod:`triton_inner`;
            ``tile`` is its tile then). 0 in other lines.
        least_outputs: Outputs of all members together, at least.
        least_hidden: h, at least.
        in_place: Only where x lies in a buffer with columns for h already, so that it need not be copied ("wide" only).

    Raises:
        ValueError: The line makes no sense.
    """

    order: str
    least_tokens: int
    most_tokens: int
    pieces: int = 0
    tile: tuple[int, int, int, int, int] | None = None
    gate_pieces: int = 0
    least_outputs: int = 0
    least_hidden: int = 0
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("stream", "packed", "split", "wide"):
            raise ValueError(f"no such order: {self.order!r}; there are 'stream', 'packed', 'split' and 'wide'")
        if not FEW_TOKENS < self.least_tokens <= self.most_tokens:
            raise ValueError(f"tokens {self.least_tokens} to {self.most_tokens}: must be a range above {FEW_TOKENS}")
        if self.pieces < 0 or (self.tile is not None and not self.pieces and not self.routes):
            raise ValueError(f"{self.pieces} pieces: must be 0 or more, and 1 or more with a tile")
        if self.in_place and self.order != "wide":
            raise ValueError(f"in place: only 'wide' has columns beside x, not {self.order!r}")
        if self.tile is not None and (min(self.tile[:3]) < 16 or min(self.tile) < 1 or any(size & (size - 1) for size in self.tile[:4])):
            raise ValueError(f"tile {self.tile}: blocks must be powers of two from 16 on, warps a power of two, stages at least 1")
        if self.gate_pieces < 0 or (self.order == "stream" and not self.gate_pieces) or (self.order in ("packed", "split") and self.gate_pieces):
            raise ValueError(f"{self.gate_pieces} pieces of gates and A: 'stream' has 1 or more, 'wide' may have, the other orders have none")
        if self.routes and (self.tile is None or self.pieces):
            raise ValueError("one launch before 'wide' needs a tile, and its pieces are those of gates and A")
        if self.order == "stream" and (self.tile is None or self.most_tokens > self.tile[0] or self.pieces * 16 > self.tile[1]):
            raise ValueError(f"tile {self.tile}: 'stream' needs one that holds all tokens, and 16 outputs for every piece")

    @property
    def routes(self) -> bool:
        """Whether :mod:`triton_inner` does all that comes before the product of "wide"."""
        return self.order == "wide" and self.gate_pieces > 0

    def fits(self, tokens: int, outputs: int, hidden: int, dtype: torch.dtype, *, beside: bool = False, in_place: bool = False) -> bool:
        return (
            (beside or self.order != "wide")
            and (in_place or not self.in_place)
            and self.least_tokens <= tokens <= self.most_tokens
            and outputs >= self.least_outputs
            and hidden >= self.least_hidden
            and (not self.pieces or dtype in (torch.float16, torch.bfloat16))
        )


GROUPS: tuple[GroupRule, ...] = (
    # One launch. Measured at 17, 32, 48, 64, 96 and 128 tokens; the pieces of gates and A for o, and for down at 17 to 32, are by 64 tokens' measure.
    GroupRule("stream", 17, 32, pieces=1, tile=(32, 128, 128, 4, 4), gate_pieces=4, least_outputs=16384),
    GroupRule("stream", 17, 32, pieces=1, tile=(32, 64, 256, 4, 4), gate_pieces=8, least_hidden=8192),
    GroupRule("stream", 17, 32, pieces=1, tile=(32, 64, 128, 4, 8), gate_pieces=3, least_outputs=6144),
    GroupRule("stream", 17, 32, pieces=1, tile=(32, 64, 128, 4, 8), gate_pieces=8),
    GroupRule("stream", 33, 64, pieces=1, tile=(64, 128, 128, 4, 4), gate_pieces=4, least_outputs=16384),
    GroupRule("stream", 33, 64, pieces=1, tile=(64, 64, 128, 4, 7), gate_pieces=8, least_hidden=8192),
    GroupRule("stream", 33, 64, pieces=1, tile=(64, 64, 128, 4, 6), gate_pieces=3, least_outputs=6144),
    GroupRule("stream", 33, 64, pieces=1, tile=(64, 64, 128, 4, 7), gate_pieces=8),
    GroupRule("stream", 65, 128, pieces=1, tile=(128, 128, 64, 4, 3), gate_pieces=4, least_outputs=16384),
    GroupRule("stream", 65, 128, pieces=3, tile=(128, 128, 128, 8, 3), gate_pieces=18, least_hidden=8192),
    GroupRule("stream", 65, 128, pieces=1, tile=(128, 64, 128, 4, 4), gate_pieces=3, least_outputs=6144),
    GroupRule("stream", 65, 128, pieces=1, tile=(128, 64, 128, 4, 4), gate_pieces=8),
    # Measured at 64 tokens: four groups 217.5 us against 220.4 with rounded products, and the output is rounded once.
    GroupRule("packed", 17, 64, pieces=1, tile=(64, 64, 128, 4, 3), least_outputs=16384),
    GroupRule("packed", 17, 64, pieces=2, least_hidden=8192),
    GroupRule("packed", 17, 64, pieces=1),
    # Measured at 128 and 256 tokens; float32 so that the output is rounded once.
    GroupRule("wide", 65, 256, pieces=4, least_outputs=16384, in_place=True),
    GroupRule("wide", 129, 256, pieces=8, least_hidden=8192, in_place=True),
    GroupRule("wide", 65, 128, pieces=4, least_hidden=8192, in_place=True),
    GroupRule("packed", 65, 256, pieces=2, least_hidden=8192),
    GroupRule("packed", 65, 256, pieces=1),
    # Measured at 512 and 1,024 tokens. The copies of x cost more than rounding twice saves where it is long and nobody wrote it in place.
    GroupRule("wide", 257, 1024, pieces=4, least_hidden=8192, in_place=True),
    GroupRule("wide", 257, 1024, pieces=2, in_place=True),
    GroupRule("split", 257, 1024, pieces=2, least_outputs=16384),
    GroupRule("packed", 257, 1024, least_hidden=8192),
    GroupRule("wide", 257, 512, tile=(64, 128, 64, 4, 4), gate_pieces=8),
    GroupRule("wide", 513, 1024, tile=(64, 128, 64, 4, 4), gate_pieces=4),
    GroupRule("wide", 257, 512, pieces=8, tile=(64, 128, 64, 4, 3)),
    GroupRule("wide", 513, 1024, pieces=4, tile=(64, 128, 64, 4, 3)),
    # Measured at 2,048 and 4,096 tokens, the copies of x at 8,192 too.
    GroupRule("wide", 1025, 2048, pieces=4, least_hidden=8192, in_place=True),
    GroupRule("wide", 2049, EVER, pieces=2, least_hidden=8192, in_place=True),
    GroupRule("wide", 1025, 2048, pieces=2, least_outputs=16384, in_place=True),
    GroupRule("wide", 1025, EVER, in_place=True),
    GroupRule("split", 1025, EVER, least_hidden=8192),
    GroupRule("wide", 1025, EVER, least_outputs=16384),
    GroupRule("wide", 1025, 2048, tile=(64, 128, 64, 4, 4), gate_pieces=4),
    GroupRule("wide", 2049, EVER, tile=(64, 128, 64, 4, 4), gate_pieces=2),
    GroupRule("wide", 1025, 2048, pieces=4, tile=(128, 128, 64, 8, 3)),
    GroupRule("wide", 2049, EVER, pieces=2, tile=(128, 128, 64, 8, 3)),
    # Without B^T beside the weights. Above, the pass over the output that B needs in "packed" costs more.
    GroupRule("packed", 17, 1024),
    GroupRule("split", 1025, EVER),
)
"""First match wins. The limits on outputs and hidden tell Llama-3-8B's groups apart (gate and up: 28,672 outputs; down: 14,336 hidden); o is
the one whose input nobody writes in place."""


@dataclass(frozen=True, slots=True)
class ManyRule:
    """One line of the table for many adapters above :data:`FEW_TOKENS`.

    Attributes:
        way: "few" (each token with its own rows) or "sorted" (tokens sorted by adapter), both in :mod:`many_adapters`.
        least_tokens, most_tokens: M lies between them, both included.
        least_rank: R, at least.
        fused: Whether the line is for fused groups or for layers on top of a finished base output.
    """

    way: str
    least_tokens: int
    most_tokens: int
    least_rank: int
    fused: bool

    def fits(self, tokens: int, total_rank: int, chosen_rank: int, *, fused: bool) -> bool:
        return (
            fused == self.fused
            and self.least_tokens <= tokens <= self.most_tokens
            and total_rank >= self.least_rank
            and total_rank >= GROUPED_GAIN * chosen_rank
        )


MANY: tuple[ManyRule, ...] = (
    # Measured on one H200 with 256 adapters of rank 8 (bfloat16, Llama-3-8B shapes, top-2) at 64, 128, 256, 512, 1,024 and 4,096 tokens, with random routes
    # and with routes that neighbours share; notes/lab/2026-11-29-many-adapters.md has the figures.
    ManyRule("few", 17, 256, 1024, fused=True),
    # Fused groups above 256 tokens multiply all rows: the launches of "sorted" were timed one by one, but not yet together on a GPU.
    ManyRule("few", 17, 128, 1024, fused=False),
    ManyRule("sorted", 1024, EVER, 4096, fused=False),
    ManyRule("sorted", 2048, EVER, 2048, fused=False),
)
"""First match wins; where none fits, all rows are multiplied."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a choice depends on.

    Attributes:
        tokens: M.
        adapters: N.
        total_rank: R.
        top_k: k.
        dtype: Of the input.
        device: "cpu", "cuda", …
        capability: Compute capability of a CUDA device, major * 10 + minor; 0 elsewhere.
        training: Gradients are wanted.
    """

    tokens: int
    adapters: int
    total_rank: int
    top_k: int
    dtype: torch.dtype
    device: str
    capability: int = 0
    training: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the table: where all of its conditions hold, ``backend`` is chosen, for ``reason``."""

    backend: str
    reason: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    needs_triton: bool = False
    least_capability: int = 0
    most_top_k: int = 1 << 30
    most_adapters: int = 1 << 30

    def fits(self, case: Case) -> bool:
        return (
            (not self.devices or case.device in self.devices)
            and (not self.dtypes or case.dtype in self.dtypes)
            and (not self.needs_triton or triton_installed())
            and case.capability >= self.least_capability
            and case.top_k <= self.most_top_k
            and case.adapters <= self.most_adapters
        )


PLAN: tuple[Rule, ...] = (
    Rule("reference", "float64 is what the reference is for", dtypes=(torch.float64,)),
    Rule("dense", "no GPU kernels for this device; gathers and GEMMs are fastest", devices=("cpu", "mps", "xpu", "meta")),
    Rule(
        "triton",
        "GPU kernels: fused routing, one pass over the output",
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16, torch.float32),
        needs_triton=True,
        least_capability=80,
        most_top_k=16,
        most_adapters=4096,
    ),
    Rule("dense", "GEMMs run everywhere (Triton is missing, the GPU is older than compute capability 8.0, or top-k above 16)"),
)


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Looked up once, and not by a function that torch.compile would have to trace."""


def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return _TRITON_INSTALLED


def interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs the kernels on a CPU (slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def choose(case: Case) -> tuple[str, str]:
    """The backend for a case, and why."""
    for rule in PLAN:
        if rule.fits(case):
            return rule.backend, rule.reason
    raise AssertionError("the last rule fits every case")


def why_not_triton(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run here; None when it can."""
    if not triton_installed():
        return "Triton is not installed"
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"the tensors lie on {device}, the kernels need a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    return None


def path(tokens: int, total_rank: int, top_k: int, max_rank: int) -> str:
    """The Triton backend's way for inference: "few", "many" or "chosen" (:mod:`many_adapters`)."""
    if tokens <= FEW_TOKENS:
        return "few"
    return "many" if many_adapters_way(tokens, total_rank, top_k, max_rank, fused=False) is None else "chosen"


def many_adapters_way(tokens: int, total_rank: int, top_k: int, max_rank: int, *, fused: bool = True) -> str | None:
    """How :mod:`many_adapters` computes a layer above :data:`FEW_TOKENS`, "few" or "sorted"; None where products with all rows are faster.

    Args:
        tokens: M.
        total_rank: R.
        top_k: k.
        max_rank: The largest rank.
        fused: Base and adapters of a group together (True), or the adapters on top of a finished base output.
    """
    for rule in MANY:
        if rule.fits(tokens, total_rank, top_k * max_rank, fused=fused):
            return rule.way
    return None


def lies_beside(hidden: int, rank: int, members: int, dtype: torch.dtype) -> bool:
    """Whether a fused group keeps B^T beside its weights, so that "wide" can run: in 16 bits, and where R is small against h."""
    return dtype in (torch.float16, torch.bfloat16) and Wide(hidden, rank, members).right * WIDE_SHARE <= hidden


def group_rule(
    tokens: int,
    outputs: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    beside: bool = False,
    in_place: bool = False,
    can_run: Callable[[GroupRule], bool] | None = None,
) -> GroupRule:
    """How a fused group is computed above :data:`FEW_TOKENS`: the first line of :data:`GROUPS` that fits.

    Args:
        tokens: M.
        outputs: Of all members together.
        hidden: h.
        dtype: Of x and the weights.
        beside: B^T lies beside the weights and is what B is now.
        in_place: x lies in a buffer with columns for h.
        can_run: Whether a line whose programs wait for each other (those with ``gate_pieces``) can run with this group's tensors; None: it cannot.
    """
    for rule in GROUPS:
        if rule.fits(tokens, outputs, hidden, dtype, beside=beside, in_place=in_place) and (not rule.gate_pieces or (can_run is not None and can_run(rule))):
            return rule
    raise AssertionError("the lines without pieces fit every case")


def chosen_rows_only(total_rank: int, top_k: int, max_rank: int) -> bool:
    """While decoding on top of a finished base output: read A's chosen rows after the gates (True) or all of A with them."""
    return total_rank >= max(CHOSEN_RANK, GROUPED_GAIN * top_k * max_rank)


def group_takes_chosen_rows(tokens: int, total_rank: int, top_k: int, max_rank: int) -> bool:
    """While decoding in a fused group: read A's chosen rows after the gates (:mod:`triton_chosen`) or all of A with them (:mod:`triton_decode`)."""
    return tokens * top_k * max_rank <= max(CHOSEN_ROWS, total_rank)

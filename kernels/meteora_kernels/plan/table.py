"""Tables of measured choices: one file for each GPU in ``tables/``, and one that the user measured.

A table has two lists, ``[[group]]`` for fused groups and ``[[layer]]`` for adapters on top of a finished base output. Every entry names a path, the sizes
that it is for, and block sizes of the path. The first entry that fits and whose path can run is chosen.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from meteora_kernels.plan.machine import HALVES, UNREADABLE
from meteora_kernels.tile import Tile

EVER = 1 << 30
"""A number that is larger than any size."""
FOLDER = Path(__file__).parent / "tables"
GROUP_PATHS = ("decode_chosen_rows", "decode_all_rows", "one_launch", "chosen_adapters", "packed", "wide", "split", "many_adapters")
WAYS: dict[str, tuple[str, ...]] = {
    "many_adapters": ("few", "sorted_down", "sorted"),
    "few_tokens": ("chosen_rows", "all_rows"),
    "packed": ("", "invariant"),
    "split": ("", "beside"),
}
"""The variants of paths that have some."""
LAYER_PATHS = ("few_tokens", "many_tokens", "many_adapters", "library")


class Facts(NamedTuple):
    """The sizes of a layer or a group, which do not change from call to call.

    Attributes:
        hidden: Width of the input h.
        widths: Number of outputs of each member.
        adapters: Number of adapters N.
        total_rank: Sum of the adapters' ranks R.
        max_rank: The largest rank.
        dtype: The dtype of input and weights.
        device: The device of the weights.
        wide: Whether the rows of a group's block also hold B^T (:mod:`meteora_kernels.wide`).
    """

    hidden: int
    widths: tuple[int, ...]
    adapters: int
    total_rank: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device
    wide: bool = False


class Case(NamedTuple):
    """The facts that the choice of a path depends on.

    Attributes:
        facts: Sizes of the layer or group.
        tokens: Number of tokens M.
        top_k: Number of adapters per token k.
        in_place: Whether x is a window of a wider buffer whose other columns may be written (:meth:`meteora_kernels.wide.Wide.new_rows`).
        aligned: Whether the copy engine can read x and the weights (:func:`meteora_kernels.plan.machine.readable`).
        plain: Whether the call needs neither gradients nor given routes nor a separate input of the adapters.
        over: Whether the base output of a layer is still to be computed, so that work of the adapters can run at the same time.
    """

    facts: Facts
    tokens: int
    top_k: int
    in_place: bool = False
    aligned: bool = False
    plain: bool = True
    over: bool = False


class Span(NamedTuple):
    """Sizes from ``least`` to ``most``, both included."""

    least: int = 0
    most: int = EVER

    def holds(self, size: int) -> bool:
        """Whether the span contains ``size``."""
        return self.least <= size <= self.most


ANY = Span()


@dataclass(frozen=True, slots=True)
class Row:
    """An entry of a table: ``path`` is chosen if all conditions hold and the path can run.

    Attributes:
        path: The path's name, which is also the name of its module.
        tokens, hidden, outputs, total_rank, max_rank, adapters, top_k: Conditions on M, h, the outputs of all members together, R, the largest rank, N and k.
        half: Condition that the dtype has 16 bits.
        in_place: Condition that x is a window of a wider buffer already.
        over: Condition that the base output of a layer is still to be computed.
        gain: Condition that R is at least this number times the rows that one token chooses.
        chosen: Condition that the rows of A that all tokens choose, counted separately for each token, are at most the larger of this number and R. A token
            is expected to choose k times the mean rank by decode_chosen_rows, and k times the largest rank by other paths, which reserve that many places.
        way: Variant of the path: "few", "sorted_down" or "sorted" (many_adapters), "chosen_rows" or "all_rows" (few_tokens), "" or "invariant" (packed: the
            same tiles for every number of tokens), "" or "beside" (split: the base's product at the same time as gates, A and routing).
        pieces: Number of float32 partial sums of a product over h, which are not rounded; 0 for one product in the dtype of the model.
        gate_pieces: Number of float32 partial sums of gates and A, for paths that compute them separately from the base.
        inline: Whether every program of the pass over the output routes its tokens itself.
        flat: Whether few_tokens adds the rows of B for a single token without tiles of one row.
        tile: Block sizes of the kernel; None to multiply with the library.
        measured: Where and when the entry was measured.

    Raises:
        ValueError: The values contradict each other.
    """

    path: str
    tokens: Span = ANY
    hidden: Span = ANY
    outputs: Span = ANY
    total_rank: Span = ANY
    max_rank: Span = ANY
    adapters: Span = ANY
    top_k: Span = ANY
    half: bool = False
    in_place: bool = False
    over: bool = False
    gain: int = 0
    chosen: int = EVER
    way: str = ""
    pieces: int = 0
    gate_pieces: int = 0
    inline: bool = False
    flat: bool = True
    tile: Tile | None = None
    measured: str = ""

    def __post_init__(self) -> None:
        ways = WAYS.get(self.path, ("",))
        tile, cut = self.tile, self.path in ("one_launch", "chosen_adapters", "wide")
        if self.path not in {*GROUP_PATHS, *LAYER_PATHS}:
            raise ValueError(f"unknown path {self.path!r}: choose from {', '.join(sorted({*GROUP_PATHS, *LAYER_PATHS}))}")
        if self.way not in ways:
            raise ValueError(f"{self.path} has no way {self.way!r}: choose from {', '.join(map(repr, ways))}")
        for field in fields(self):
            span = getattr(self, field.name)
            if isinstance(span, Span) and not 0 <= span.least <= span.most:
                raise ValueError(f"{field.name} from {span.least} to {span.most}: must be a range")
        if self.pieces < 0 or self.gate_pieces < 0 or (self.gate_pieces and not cut):
            raise ValueError(
                f"{self.pieces} pieces and {self.gate_pieces} of gates and A: must be 0 or more, the latter for 'one_launch', 'chosen_adapters' and 'wide' only"
            )
        if self.path in ("decode_chosen_rows", "decode_all_rows", "few_tokens", "one_launch", "chosen_adapters") and tile is None:
            raise ValueError(f"{self.path} needs a tile")
        if tile is not None and (min(tile) < 1 or any(size & (size - 1) for name, size in tile._asdict().items() if name != "stages")):
            raise ValueError(f"tile {tile}: blocks and warps must be powers of two, and there must be one stage at least")
        if tile is not None and self.path in ("packed", "split", "wide") and (min(tile[:3]) < 16 or not (self.pieces or self.gate_pieces)):
            raise ValueError(f"tile {tile}: blocks of products must be 16 or more, and products by a kernel come in pieces")
        if self.path == "wide" and self.gate_pieces and (tile is None or self.pieces):
            raise ValueError("one launch before 'wide' needs a tile, and its pieces are those of gates and A")
        one = self.path != "one_launch" or tile is None or (self.tokens.most <= tile.tokens and 1 <= self.pieces <= tile.outputs // 16 and self.gate_pieces > 0)
        if not one:
            raise ValueError(f"tile {tile}: 'one_launch' needs one that holds all tokens, pieces of both kinds, and 16 outputs for every piece")
        if (
            self.path == "chosen_adapters"
            and tile is not None
            and (min(tile[:3]) < 16 or self.tokens.most > tile.tokens or not (self.pieces and self.gate_pieces))
        ):
            raise ValueError(f"tile {tile}: 'chosen_adapters' needs one that holds all tokens, blocks of 16 or more, and pieces of both kinds")
        if self.in_place and self.path != "wide":
            raise ValueError("only 'wide' reads x in place")

    def fits(self, case: Case) -> bool:
        """Whether all conditions hold. Whether the path can run has to be checked separately."""
        facts, rows = case.facts, case.top_k * case.facts.max_rank
        read = case.top_k * facts.total_rank / facts.adapters if self.path == "decode_chosen_rows" else rows
        return (
            self.tokens.holds(case.tokens)
            and self.hidden.holds(facts.hidden)
            and self.outputs.holds(sum(facts.widths))
            and self.total_rank.holds(facts.total_rank)
            and self.max_rank.holds(facts.max_rank)
            and self.adapters.holds(facts.adapters)
            and self.top_k.holds(case.top_k)
            and (not self.half or facts.dtype in HALVES)
            and (case.in_place or not self.in_place)
            and (case.over or not self.over)
            and facts.total_rank >= self.gain * rows
            and (self.chosen == EVER or case.tokens * read <= max(self.chosen, facts.total_rank))
        )


def why_not_one_tile(case: Case, row: Row) -> str | None:
    """The reason why a path that reads by the copy engine cannot take all tokens of a case in one tile of a row; None if it can."""
    if not case.aligned:
        return UNREADABLE
    held = 0 if row.tile is None else row.tile.tokens
    return None if 0 < case.tokens <= held else f"there are {case.tokens} tokens, the tile holds {held}"


@dataclass(frozen=True, slots=True)
class Table:
    """The choices for one GPU.

    Attributes:
        name: Name of the table in logs and benchmarks.
        group: Entries for fused groups.
        layer: Entries for adapters on top of a finished base output.
        gpus: Parts of the device names that the table is for.
        capability: Compute capability that the table is for if no table names the GPU; 0 for none.
    """

    name: str
    group: tuple[Row, ...]
    layer: tuple[Row, ...]
    gpus: tuple[str, ...] = ()
    capability: int = 0

    def before(self, other: Table) -> Table:
        """A table with this table's entries, followed by the other's."""
        return Table(f"{self.name}, then {other.name}", self.group + other.group, self.layer + other.layer, other.gpus, other.capability)


def row_of(entry: Mapping[str, Any], paths: tuple[str, ...]) -> Row:
    """The row for an entry of a file. A size is one number (the least) or two (least and most); ``tile`` is a table of :class:`Tile`'s fields.

    Raises:
        ValueError: A key is unknown, a value has the wrong type, or values contradict each other.
    """
    kinds = {field.name: field.type for field in fields(Row)}
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in kinds:
            raise ValueError(f"unknown key {key!r}")
        if key == "tile":
            if not isinstance(value, dict) or not all(isinstance(size, int) and size in range(1, EVER) for size in value.values()):
                raise ValueError("tile must be a table of numbers")
            if unknown := sorted(set(value) - set(Tile._fields)):
                raise ValueError(f"unknown key {unknown[0]!r} in tile")
            values[key] = Tile(**value)
        elif kinds[key] == "Span":
            ends = value if isinstance(value, list) else [value, EVER]
            if len(ends) != 2 or any(type(end) is not int for end in ends):
                raise ValueError(f"{key} must be a number or two")
            values[key] = Span(*ends)
        elif type(value).__name__ != kinds[key]:
            raise ValueError(f"{key} must be {kinds[key]}, not {type(value).__name__}")
        else:
            values[key] = value
    if values.get("path") not in paths:
        raise ValueError(f"path must be one of {', '.join(paths)}")
    return Row(**values)


def parse(text: str, name: str) -> Table:
    """The table for a text in TOML. The key ``rows_of`` appends the entries of another shipped table.

    Raises:
        ValueError: The text is not TOML, or an entry is invalid; the message names the entry.
    """
    data = tomllib.loads(text)
    if unknown := sorted(set(data) - {"name", "gpus", "capability", "rows_of", "group", "layer"}):
        raise ValueError(f"unknown key {unknown[0]!r}")
    rows: dict[str, tuple[Row, ...]] = {}
    for kind, paths in (("group", GROUP_PATHS), ("layer", LAYER_PATHS)):
        found = []
        for index, entry in enumerate(data.get(kind, []), start=1):
            try:
                found.append(row_of(entry, paths))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"entry {index} of {kind}: {error}") from error
        rows[kind] = tuple(found)
    table = Table(data.get("name", name), rows["group"], rows["layer"], tuple(data.get("gpus", ())), int(data.get("capability", 0)))
    if "rows_of" in data:
        other = shipped(data["rows_of"])
        return Table(table.name, table.group + other.group, table.layer + other.layer, table.gpus, table.capability)
    return table


def shipped(stem: str) -> Table:
    """The table in ``tables/<stem>.toml``."""
    return parse((FOLDER / f"{stem}.toml").read_text(encoding="utf-8"), stem)


def shipped_tables() -> list[Table]:
    """All shipped tables except the default, sorted by name."""
    return [shipped(file.stem) for file in sorted(FOLDER.glob("*.toml")) if file.stem != "default"]


def format_row(row: Row) -> str:
    """A row as TOML lines without the header of the entry; :func:`row_of` reads them back."""
    lines = []
    for field in fields(Row):
        value = getattr(row, field.name)
        if value == field.default:
            continue
        if isinstance(value, Tile):
            changed = ", ".join(f"{name} = {size}" for name, size in value._asdict().items() if size != Tile._field_defaults[name])
            text = f"{{ {changed} }}"
        elif isinstance(value, Span):
            text = f"[{value.least}, {value.most}]" if value.most < EVER else str(value.least)
        elif isinstance(value, bool):
            text = str(value).lower()
        else:
            text = f'"{value}"' if isinstance(value, str) else str(value)
        lines.append(f"{field.name} = {text}")
    return "\n".join(lines)

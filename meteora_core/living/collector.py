"""Finds the statistics and the held-out rows of adapters. Missing statistics are collected from rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.base_route import NO_ADAPTER, is_base_route
from meteora_core.adapters.config import find_adapter
from meteora_core.adapters.folders import folder_frame
from meteora_core.adapters.joining import alone
from meteora_core.checkpoints.gate_statistics import SHIPPED, GateStatistics, Recipe, check_fitting, copy_statistics
from meteora_core.data.frames import PLACE, RAW, Frame, chat_frame, parse_frame
from meteora_core.errors import AdapterError, DataError, MeteoraError
from meteora_core.living.example_prompts import FILE
from meteora_core.living.general import general_rows
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import AdapterRows
from meteora_core.living.self_written import self_written_rows
from meteora_core.model.vocabulary import check_tokens, padding_token
from meteora_core.progress import SILENT, Progress
from meteora_core.reading import is_regular
from meteora_core.text import shown
from meteora_core.training.encoding import TrainRow, encode_rows
from meteora_core.training.statistics import Collecting, collect_statistics, whole_probe
from meteora_core.training.task_rows import HeldOut

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora_core.adapters.peft_folder import AdapterInfo
    from meteora_core.model.base import BaseReference

HELD_OUT_TOKENS = 1_000
"""Approximate number of tokens of an adapter's held-out rows on which the routing is measured."""

ALL_HELD_OUT_TOKENS = 10_000
"""Largest number of held-out tokens of all adapters together, so that adding an adapter to many takes no longer than adding one to ten."""

FindRows = Callable[[str, Path | None], AdapterRows | None]
"""Finds the rows of an adapter by its name and folder; returns None if there are none."""

FindExamples = Callable[[str, Path | None], Sequence[str]]
"""Finds example prompts of an adapter by its name and folder."""


def collecting(options: CollectOptions, base: BaseReference, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Collecting:
    """The parameters of a collection for a base model, with the sizes and the seed in ``options``."""
    return Collecting(
        base,
        padding_token(model, tokenizer),
        recipe,
        options.tokens,
        options.batch_size,
        options.max_length,
        options.seed,
        options.statistics,
        options.backend,
    )


class Collector:
    """Finds or collects the statistics of adapters.

    Args:
        tokenizer: Tokenizer of the base model.
        how: Options for collecting statistics. Its recipe is only used if no adapter has statistics yet.
        workspace: Folder to which new statistics are written.
        find: Function that finds the rows of an adapter.
        self_written: Whether adapters without rows and statistics write rows themselves (:mod:`meteora_core.living.self_written`).
        examples: Function that finds example prompts of an adapter without rows, by its name and folder.
        progress: Receiver of progress reports.

    Attributes:
        folders: PEFT folders of adapters by name, if known.
        frame: Frame of the prompts, as text with ``{}`` for the message. It also applies to general text for the base route.
        written: Sources of the rows that adapters wrote themselves, by name.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        how: Collecting,
        workspace: Path,
        find: FindRows,
        progress: Progress = SILENT,
        *,
        self_written: bool = False,
        examples: FindExamples = lambda name, folder: (),
    ) -> None:
        self.tokenizer, self.how, self.workspace, self.progress = tokenizer, how, workspace, progress
        self.folders: dict[str, Path] = {}
        self.frame, self.self_written, self.written = how.recipe.frame, self_written, dict[str, str]()
        self._find, self._found, self._numbers, self._examples = find, dict[str, AdapterRows | None](), count(), examples

    def rows(self, name: str) -> AdapterRows | None:
        """The rows of an adapter; None if there are none. The rows of the base route are general text, unless others are found. Raises DataError."""
        if name not in self._found:
            self._found[name] = self._find(name, self.folders.get(name))
        if name == NO_ADAPTER and self._found[name] is None:
            return general_rows(parse_frame(self.frame), self.how.seed)
        return self._found[name]

    def examples(self, name: str) -> Sequence[str]:
        """Example prompts of an adapter, without answers. Raises DataError if their file is broken."""
        return self._examples(name, self.folders.get(name))

    def with_frame(self, bank: AdapterBank) -> AdapterBank:
        """The bank with the frame of its rows recorded for each adapter. Adapters without rows keep their frame. Raises DataError for broken rows."""
        rows = {info.name: None if is_base_route(info) else self.rows(info.name) for info in bank}
        adapters = []
        for info in bank:
            found = rows[info.name]
            frame = found.frame if found is not None else self._frame_of(info) if self.self_written and not is_base_route(info) else info.frame
            adapters.append(replace(info, frame=frame))
        return replace(bank, adapters=tuple(adapters))

    def forget(self, name: str) -> None:
        """Forget the folder and the rows of an adapter."""
        self.folders.pop(name, None)
        self._found.pop(name, None)

    def shipped(self, name: str) -> Path | None:
        """The file of statistics in an adapter's folder; None if there is none."""
        folder = find_adapter(self.folders[name]) if name in self.folders else None
        return folder / SHIPPED if folder is not None and is_regular(folder / SHIPPED) else None

    def complete(self, model: PreTrainedModel, bank: AdapterBank, known: Mapping[str, GateStatistics]) -> tuple[dict[str, GateStatistics], tuple[str, ...]]:
        """The statistics of all adapters of a bank, and the names of the adapters whose statistics were collected in this call.

        Args:
            model: Base model without adapters; it has none afterwards either.
            bank: The adapters.
            known: Existing statistics by adapter. Statistics that lack a layer of the bank are collected again.

        Raises:
            MeteoraError: An adapter has neither statistics nor rows.
            AdapterError: The prompts of an adapter do not have the frame of the other adapters.
            CheckpointError: Statistics do not fit the model, each other or their adapter.
            DataError: Rows are broken.
        """
        found, layers, probe = dict(known), list(bank.modules), whole_probe(model)
        shipped: dict[str, GateStatistics] = {}
        for name in bank.names:
            if name not in found and (file := self.shipped(name)) is not None:
                shipped[name] = GateStatistics(file)
                found[name] = copy_statistics(shipped[name], self._file(name), name)
        found = {name: each for name, each in found.items() if not each.missing(layers)}
        wanted = tuple(name for name in bank.names if name not in found)
        recipe = next((each.header.recipe for each in found.values()), None)
        if recipe is None and wanted:
            adapters = [info for info in bank if info.name in wanted and not is_base_route(info)]
            recipe = self.how.recipe.model_copy(update={"frame": self._common_frame(adapters)})
        recipe = recipe or self.how.recipe
        self.frame = recipe.frame
        for name in wanted:
            rows = self.rows(name)
            if rows is None and self.self_written:
                frame = self._frame_of(bank.adapters[bank.index(name)]) if recipe.frame == PLACE else parse_frame(recipe.frame)
                examples = self.examples(name)
                rows = self_written_rows(model, self.tokenizer, alone(bank, name), frame, examples=examples, seed=self.how.seed, progress=self.progress)
                if not examples:
                    self.progress.note(f"{name}: its gates are probably poor, because it wrote its prompts itself; give a few prompts in {FILE}")
                self.written[name] = str(rows.source)
            if not rows or not rows.train:
                raise MeteoraError(
                    f"there are neither statistics nor rows of the adapter {name!r}",
                    hint="pass --data DIR, the folder with the rows of the adapters, or --self-written",
                )
            _check_frame(name, rows, recipe)
            found[name] = self.collect(model, alone(bank, name), rows, recipe, layers)
        for info in bank.adapters:
            check_fitting(shipped.get(info.name, found[info.name]), recipe, probe, info.sha256)
        return {name: found[name] for name in bank.names}, wanted

    def held_out(self, names: Sequence[str]) -> HeldOut:
        """Encoded held-out rows of each adapter, in the order of ``names``.

        They have about :data:`HELD_OUT_TOKENS` tokens for each adapter, or :data:`ALL_HELD_OUT_TOKENS` divided by the number of adapters, if that is less.
        Adapters without rows have none, nor has the base route: accuracy is about tokens that have an adapter.
        """
        groups: list[list[TrainRow]] = []
        most = min(HELD_OUT_TOKENS, ALL_HELD_OUT_TOKENS // max(1, len({*names} - {NO_ADAPTER})))
        for index, name in enumerate(names):
            rows = None if name == NO_ADAPTER else self.rows(name)
            held = rows.held_out if rows is not None else []
            end = None if rows is None else rows.frame.end_id(self.tokenizer)
            encoded = encode_rows(held, self.tokenizer, index, self.how.max_length, end).rows if held else ()
            before = accumulate((len(row) for row in encoded), initial=0)
            groups.append([row for row, tokens in zip(encoded, before, strict=False) if tokens < most])
        return HeldOut(groups, names, self.how.pad_token, self.how.batch_size)

    def collect(self, model: PreTrainedModel, bank: AdapterBank, rows: AdapterRows, recipe: Recipe, layers: Sequence[str]) -> GateStatistics:
        """Collect the statistics of a bank of one adapter from its rows. Raises the errors of :func:`collect_statistics`, and DataError for unknown tokens."""
        encoded = self._encoded(rows, 0)
        check_tokens(model, self.tokenizer, (row.tokens for row in encoded))
        how = replace(self.how, recipe=recipe)
        return collect_statistics(model, bank, encoded, self._file(bank.names[0]), how, layers=layers, progress=self.progress)

    def train_rows(self, name: str, index: int) -> Sequence[TrainRow]:
        """The encoded rows of an adapter, without its held-out rows, labelled with an index. Raises DataError if there are none."""
        rows = self.rows(name)
        if rows is None:
            raise DataError(f"adapter {name!r} has no rows", hint="pass --data DIR, the folder with the rows of the adapters")
        return self._encoded(rows, index)

    def _encoded(self, rows: AdapterRows, index: int) -> Sequence[TrainRow]:
        return encode_rows(rows.train, self.tokenizer, index, self.how.max_length, rows.frame.end_id(self.tokenizer)).rows

    def _common_frame(self, adapters: Sequence[AdapterInfo]) -> str:
        """The common frame of the prompts of these adapters; ``{}``, with which any frame agrees, if they differ."""
        frames = {rows.known_frame for info in adapters if (rows := self.rows(info.name)) is not None}
        frames = frames or {self._frame_of(info).text for info in adapters}
        return frames.pop() if len(frames) == 1 else PLACE

    def _frame_of(self, info: AdapterInfo) -> Frame:
        """The frame of an adapter without rows: the one that its folder states, the chat template of the base model, or none."""
        stated = info.frame or (folder_frame(self.folders[info.name]) if info.name in self.folders else None)
        if stated is not None:
            return stated
        return chat_frame(self.tokenizer) if getattr(self.tokenizer, "chat_template", None) else RAW

    def _file(self, name: str) -> Path:
        """The path of a new file; statistics of an earlier version of the adapter may still be in use."""
        return self.workspace / f"{name}.{next(self._numbers)}.safetensors"


def _check_frame(name: str, rows: AdapterRows, recipe: Recipe) -> None:
    """Raise AdapterError if the prompts of an adapter do not have the frame of the others, because gates would learn the frame instead of the task."""
    if PLACE not in (rows.known_frame, recipe.frame) and rows.known_frame != recipe.frame:
        raise AdapterError(
            f"the prompts of {name!r} ({rows.source}) have the frame {shown(rows.known_frame)}, but the other adapters have {shown(recipe.frame)}",
            hint="build its dataset with the same frame: meteora data add NAME --train FILE --template inst|chat|'…{}…'",
        )

"""Makes a routed model of a folder of adapters: ``meteora route``."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.base_names import same_base_name
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.config import find_adapter, read_adapter_config
from meteora_core.adapters.fitting import fit_to_base
from meteora_core.adapters.folders import INFO_FILE, read_training_info
from meteora_core.adapters.joining import with_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe, check_fitting
from meteora_core.checkpoints.native import check_replaceable
from meteora_core.checkpoints.parts import SaveOptions, checkpoint_parts
from meteora_core.errors import AdapterError, DataError, MeteoraError, UsageError, did_you_mean
from meteora_core.fetch.hub_names import adapters_root
from meteora_core.living.checkpoints import BARE_SHARE, relocate, write_with_statistics
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.example_prompts import example_prompts
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import AdapterRows, find_rows
from meteora_core.living.steps import solve_with_routed_rows, train_solved_gates
from meteora_core.locks import scratch_folder
from meteora_core.model.attach import attach, detach, meteora_layers, set_trainable
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.model.tokens import check_observable
from meteora_core.names import problem_of
from meteora_core.reading import is_regular
from meteora_core.routing import meteora_of
from meteora_core.text import listed
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.prompt_frames import ROWS, FrameTrial, common_or_best
from meteora_core.training.statistics import closed_form_gates, whole_probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = 2 << 30
"""Largest size of the adapters, in bytes, with which they are embedded in the checkpoint by default."""

LOW = 0.85
"""Gate accuracy on held-out answer tokens below which gates in closed form are reported as weak."""


@dataclass(frozen=True, kw_only=True)
class RouteOptions(CollectOptions):
    """Options of :func:`route_adapters`; those of :class:`meteora_core.living.options.CollectOptions`, and:

    Attributes:
        only: Names of the adapters to use; empty for all.
        exclude: Names of adapters to leave out.
        top_k: Number of adapters per token in each layer; None for 2, or 1 if there is only one adapter and no base route.
        temperature: Routing temperature; divides the chosen gate logits before the softmax.
        base_route: Whether to add the base route, for tokens that need no adapter.
        routed_rows: Whether the adapters' rows run once more, as the gates route them, and the gates are solved again.
        steps: Number of gradient steps after the closed form; 0 for none.
        embed: Whether to store the adapters' weights in the checkpoint; None to store them if they have at most :data:`EMBEDDED` bytes.
        overwrite: Whether an existing checkpoint is replaced.
    """

    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    top_k: int | None = None
    temperature: float = 1.0
    base_route: bool = True
    routed_rows: bool = False
    steps: int = 0
    embed: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Routed:
    """The result of :func:`route_adapters`.

    Attributes:
        folder: Folder of the checkpoint.
        base: Name of the base model.
        adapters: Names of the adapters, in order; the base route is the last one.
        set_aside: Reasons why adapters were left out, by name.
        rows: File or folder of the rows of each adapter, by name; empty if the statistics in the adapter's folder were used.
        held_out: Measurements on held-out rows (:func:`meteora_core.training.gate_metrics.measure_gates`).
        embedded: Whether the checkpoint contains the adapters' weights.
        tokens: Number of tokens in all statistics together.
        bytes: Size of all statistics in bytes.
        forms: Forms of the second moments in the statistics: "float32", "float16" or "low-rank".
        seconds: Duration in seconds.
    """

    folder: Path
    base: str
    adapters: tuple[str, ...]
    set_aside: dict[str, str]
    rows: dict[str, str]
    held_out: dict[str, float] = field(default_factory=dict)
    embedded: bool = True
    tokens: int = 0
    bytes: int = 0
    forms: tuple[str, ...] = ()
    seconds: float = 0.0


def route_adapters(adapters: str | Path, folder: str | Path, options: RouteOptions = RouteOptions()) -> Routed:
    """Make a checkpoint of a folder of PEFT adapters, with gates in closed form.

    Adapters that cannot be used, that belong to another base model, or that have neither rows nor statistics are left out.

    Args:
        adapters: Folder that contains one folder per adapter, or ids of repositories on the hub, separated by commas.
        folder: Folder of the checkpoint to write.
        options: Selection of the adapters and settings of the routing.

    Returns:
        The checkpoint's content, and the adapters that were left out.

    Raises:
        UsageError: There is no adapter that can be used, a name in ``only`` or ``exclude`` is unknown, or ``folder`` already exists.
        MeteoraError: The base model cannot be loaded, or memory or the disk is full.

    Example:
        >>> from meteora_core.living.route import RouteOptions, route_adapters
        >>> done = route_adapters("adapters", "runs/routed", RouteOptions(data=Path("datasets"), only=("strategyqa",)))
        >>> done.adapters, done.set_aside
        (('strategyqa', 'no_adapter'), {})
    """
    began, folder, progress = time.perf_counter(), Path(folder), options.progress
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]) and not options.overwrite:
        raise UsageError(f"{folder} already exists", hint="pass --force to replace it, or choose another folder with --out")
    check_replaceable(folder)
    root = adapters_root(adapters, progress=progress)
    set_aside: dict[str, str] = {}
    folders = _candidates(root, options, set_aside)
    banks, named = _readable(folders, set_aside)
    base = options.base or (BaseReference(named) if named else None)
    if banks and base is None:
        raise UsageError(f"the adapters in {root} do not name their base model", hint="pass --base")
    if not banks or base is None:
        raise _nothing(root, set_aside)
    base = replace(base, name=str(Path(base.name).resolve())) if Path(base.name).is_dir() else base
    device = pick_device(options.device)
    tokenizer = load_tokenizer(base, progress=progress)
    model = load_base(base, dtype=pick_dtype(options.dtype, device), device=device, progress=progress)
    banks, renamed = _fitting(banks, model, set_aside)
    recipe = Recipe(answer_share=options.answer_share, bare_share=BARE_SHARE)
    how = collecting(options, base, model, tokenizer, recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, f"{folder.name}.statistics") as workspace:

        def find(name: str, adapter: Path | None) -> AdapterRows | None:
            return find_rows(name, options.data, adapter, tokenizer, seed=options.seed)

        def examples(name: str, adapter: Path | None) -> list[str]:
            return example_prompts(name, options.data, adapter)

        collector = Collector(tokenizer, how, workspace, find, progress, self_written=options.self_written, examples=examples)
        collector.folders = {name: folders[name] for name in banks}
        banks = _with_rows(banks, model, collector, set_aside)
        if not banks:
            raise _nothing(root, set_aside)
        bank = collector.with_frame(_joined(banks))
        if options.base_route:
            bank = with_adapter(bank, base_route())
        statistics, _ = collector.complete(model, bank, {})
        gates = dict(closed_form_gates(list(statistics.values()), list(bank.modules), progress=progress))
        attach(model, bank, top_k=options.top_k or min(2, len(bank)), temperature=options.temperature, backend=options.backend, init="zeros")
        known = meteora_of(model).provenance
        known.gates, known.renamed = "closed form", renamed
        with torch.no_grad():
            for path, layer in meteora_layers(model):
                layer.gate.copy_(gates[path])
        set_trainable(model, "none")
        if options.routed_rows:
            solve_with_routed_rows(model, collector, list(statistics.values()), progress)
        trained = train_solved_gates(model, collector, options.steps, workspace, progress) if options.steps else {}
        held = collector.held_out(bank.names)
        measured = measure_gates(model, held, progress=progress) if any(held.rows) else {}
        texts = [found.held_out[:ROWS] if (found := collector.rows(name)) is not None else [] for name in bank.names]
        known.frame, tried = common_or_best(model, tokenizer, lambda: texts, held, FrameTrial(options.max_length, progress=progress))
        size = sum(stack.A.numel() * stack.A.element_size() + stack.B.numel() * stack.B.element_size() for stack in bank.modules.values())
        embed = size <= EMBEDDED if options.embed is None else options.embed
        relocate(model, collector.folders, folder)
        tokens = sum(each.header.tokens for each in statistics.values())
        seconds = time.perf_counter() - began
        record = {
            "held_out": measured,
            "tokens": tokens,
            "seconds": seconds,
            "closed_form": {**recipe.model_dump(), "tokens": options.tokens, "routed_rows": options.routed_rows},
        }
        record |= {"frames": tried} if tried else {}
        record |= trained
        config, tensors = checkpoint_parts(model, folder, SaveOptions(base, embed, training=record))
        write_with_statistics(folder, config, tensors, statistics)
        rows = {name: str(found.source) if (found := collector.rows(name)) is not None else "" for name in bank.names}
        rows |= collector.written
        stored, forms = sum(each.size for each in statistics.values()), tuple(sorted({each.header.second for each in statistics.values()}))
    return Routed(folder, base.name, bank.names, set_aside, rows, measured, embed, tokens, stored, forms, time.perf_counter() - began)


def _candidates(root: Path, options: RouteOptions, set_aside: dict[str, str]) -> dict[str, Path]:
    """The selected adapter folders, by name."""
    if not root.is_dir():
        what = f"{root} is a file, not a folder" if root.exists() else f"no such folder: {root}"
        raise UsageError(what, hint="give the folder that contains one folder per adapter")
    if find_adapter(root) in (root, root / "default"):
        raise UsageError(f"{root} is one adapter", hint=f"give the folder that contains all adapters: meteora route {root.parent}")
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    present = {path.name: path for path in inside if find_adapter(path) is not None}
    for name in (*options.only, *options.exclude):
        if name not in present:
            raise UsageError(f"no adapter {name!r} in {root}", hint=did_you_mean(name, present) or f"there are: {listed(present)}")
    chosen = {name: path for name, path in present.items() if (not options.only or name in options.only) and name not in options.exclude}
    if present and not chosen:
        raise UsageError(f"--only and --exclude leave none of the adapters in {root}", hint=f"there are: {listed(present)}")
    for path in inside:
        if path.name not in present and any(path.glob("*.safetensors")):
            set_aside[path.name] = "it has no adapter_config.json"
        elif path.name not in present and (within := sorted(each.name for each in path.iterdir() if each.is_dir() and find_adapter(each) is not None)):
            set_aside[path.name] = f"it holds several adapters: {listed(within)}"
    return chosen


def _readable(folders: Mapping[str, Path], set_aside: dict[str, str]) -> tuple[dict[str, AdapterBank], str | None]:
    """The adapters that can be stacked and name the most frequent base model, and the name of this model."""
    banks: dict[str, AdapterBank] = {}
    for name, folder in folders.items():
        source = find_adapter(folder) or folder
        try:
            if problem := "it is the name of the base route" if name == NO_ADAPTER else problem_of(name):
                raise AdapterError(f"its folder's name cannot be an adapter's name: {problem}")
            read_adapter_config(name, source)
            if is_regular(source / INFO_FILE) and read_training_info(source).tasks:
                raise AdapterError("it was trained on several tasks at once, so it has no task with which gates can be labelled")
            bank = AdapterBank.from_peft({name: folder})
            twin = next((other for other, each in banks.items() if each.adapters[0].sha256 == bank.adapters[0].sha256), None)
            if twin is not None:
                raise AdapterError(f"it has the same weights as {twin!r}")
            banks[name] = bank
        except MeteoraError as error:
            set_aside[name] = error.message
    origins = [bank.adapters[0].base for bank in banks.values() if bank.adapters[0].base]
    if not origins:
        return banks, None
    groups = Counter(next(other for other in origins if same_base_name(other, origin)) for origin in origins)
    usual = groups.most_common(1)[0][0]
    for name, bank in list(banks.items()):
        origin = bank.adapters[0].base
        if origin and not same_base_name(origin, usual):
            set_aside[name] = f"it names another base model: {origin} instead of {usual}"
            del banks[name]
    return banks, usual


def _fitting(banks: Mapping[str, AdapterBank], model: PreTrainedModel, set_aside: dict[str, str]) -> tuple[dict[str, AdapterBank], dict[str, str]]:
    """The adapters that fit the model, with the model's names of their layers, and the names that were changed."""
    fitting, renamed = {}, dict[str, str]()
    for name, bank in banks.items():
        try:
            check_observable(bank.modules, "the collection of gate statistics")
            attach(model, bank, top_k=1, init="zeros")
            detach(model)
            fitting[name], new = fit_to_base(bank, model)
            renamed |= new
        except MeteoraError as error:
            set_aside[name] = error.message
    return fitting, renamed


def _with_rows(banks: Mapping[str, AdapterBank], model: PreTrainedModel, collector: Collector, set_aside: dict[str, str]) -> dict[str, AdapterBank]:
    """The adapters that have rows, or statistics in their folder that belong to the base model and to the adapter's weights."""
    usable, probe = {}, whole_probe(model)
    for name, bank in banks.items():
        try:
            if (file := collector.shipped(name)) is not None:
                statistics = GateStatistics(file)
                check_fitting(statistics, statistics.header.recipe, probe, bank.adapters[0].sha256)
            elif collector.rows(name) is None:
                if not collector.self_written:
                    raise DataError(
                        f"it has no rows (looked for a dataset, a file or a folder named {name}) and no statistics; --self-written routes it anyway"
                    )
                collector.examples(name)  # raises an error if their file is broken
            usable[name] = bank
        except MeteoraError as error:
            set_aside[name] = error.message
            collector.forget(name)
    return usable


def _joined(banks: Mapping[str, AdapterBank]) -> AdapterBank:
    first, *rest = banks.values()
    for each in rest:
        first = with_adapter(first, each)
    return first


def _nothing(root: Path, set_aside: Mapping[str, str]) -> UsageError:
    if not set_aside:
        return UsageError(f"no adapters in {root}", hint="train some with `meteora train adapters --task NAME`, or give another folder")
    name, why = next(iter(set_aside.items()))
    more = f"; {len(set_aside) - 1} more" if len(set_aside) > 1 else ""
    return UsageError(f"no adapter in {root} can be used: {name}: {why}{more}", hint="give rows with --data DIR, or choose other adapters with --only")

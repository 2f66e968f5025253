"""How likely is the reference answer under each router, with the asked task's adapter and without it? Teacher-forced, one pass for each row.

    python answers.py ADAPTERS --data DATASETS --checkpoint CHECKPOINT --out FILE [--rows 8] [--routers oracle,base,…] [--padded ADAPTERS OF ONE RANK, for Arrow]

`meteora-top10` and `meteora-top10-T2` are MeteoRA with another top-k and another temperature.

Written for each router: the mean negative log-likelihood of an answer token, for each task and row. A router is made once for both cases.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from meteora_core.checkpoints.opening import attach_checkpoint, describe_checkpoint
from meteora_core.data.dataset_frames import row_end
from meteora_core.data.rows import read_rows
from meteora_core.data.tasks import Task, get_task
from meteora_core.evaluation.arrow import ArrowRouter
from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
from meteora_core.evaluation.processes import ALONE
from meteora_core.evaluation.router_models import RoutedModel
from meteora_core.evaluation.router_names import RouterName
from meteora_core.generation.prompts import encode_prompts
from meteora_core.json_files import read_json, write_json
from meteora_core.model.attach import detach
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.progress import SILENT
from meteora_core.routers import make_router
from meteora_core.routing import meteora_of
from meteora_core.settings import EvalSettings, RoutingSettings
from meteora_core.training.encoding import TrainRow, encode_rows

DEFAULT = "oracle,base,meteora,meteora-top1,uniform,random,spectr,arrow,centroid,closed-form"


@torch.inference_mode()
def losses(model: Any, rows: list[TrainRow]) -> list[float]:
    """The mean negative log-likelihood of the answer tokens of each row."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([list(row.tokens) + [0] * (width - len(row)) for row in rows], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits  # padding is on the right, so no token sees it
    return [F.cross_entropy(logits[at, row.response_start - 1 : len(row) - 1].float(), ids[at, row.response_start : len(row)]).item() for at, row in enumerate(rows)]


class Measurement:
    """The rows, and the routers that are made for them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, device = arguments, pick_device("cpu" if not torch.cuda.is_available() else None)
        self.facts = describe_checkpoint(arguments.checkpoint)
        base = BaseReference(self.facts.base)
        self.model, self.tokenizer = load_base(base, dtype=pick_dtype(None, device), device=device), load_tokenizer(base)
        self.model.eval()
        self.tasks = [get_task(path.name) for path in sorted(arguments.adapters.iterdir()) if path.is_dir()]
        options = EvalOptions.of(EvalSettings(), RoutingSettings())
        self.plan = EvalPlan((), (), arguments.data, arguments.adapters, arguments.checkpoint, base, options)
        self.rows: dict[str, list[TrainRow]] = {}
        self.prompts: dict[str, list[Any]] = {}
        for task in self.tasks:
            rows = read_rows(arguments.data, task.name, "test", arguments.rows)
            self.rows[task.name] = list(encode_rows(rows, self.tokenizer, 0, 1024, row_end(arguments.data, task.name, self.tokenizer)).rows)
            self.prompts[task.name] = encode_prompts([row.prompt for row in rows], self.tokenizer)

    def measure(self, task: Task, routed: RoutedModel) -> list[float]:
        """The losses of the rows of a task, in their order."""
        found: dict[int, float] = {}
        for group in routed.groups(self.prompts[task.name]):
            numbers = [prompt.index for prompt in group]
            found |= zip(numbers, losses(routed.model, [self.rows[task.name][number] for number in numbers]), strict=True)
        return [found[number] for number in range(len(found))]

    @contextmanager
    def made(self, name: str) -> Iterator[Any]:
        """A function from a task, and whether its adapter is removed, to the context of the routed model."""
        if name == "base":
            yield lambda task, removed: _just(RoutedModel(self.model))
        elif name.startswith("meteora"):
            attach_checkpoint(self.model, self.facts)
            state = meteora_of(self.model)
            for option in name.split("-")[1:]:
                if option.startswith("top"):
                    state.top_k = int(option.removeprefix("top"))
                else:
                    state.temperature = float(option.removeprefix("T"))

            @contextmanager
            def muted(task: Task, removed: bool) -> Iterator[RoutedModel]:
                state.mute((task.name,) if removed else ())
                yield RoutedModel(self.model)
                state.mute(())

            yield muted
            detach(self.model)
        else:
            parsed = RouterName(name)
            router: Any = ArrowRouter(parsed, self.arguments.padded, None, 1.0, 42) if name == "arrow" else make_router(parsed, self.plan)
            router.prepare(self.tasks)
            router.enter(self.model, self.tokenizer, SILENT, ALONE)

            def ready(task: Task, removed: bool) -> Any:
                router.name = replace(parsed, without_asked=removed)
                return router.ready(task)

            yield ready
            router.leave()
        self.model.eval()


@contextmanager
def _just(routed: RoutedModel) -> Iterator[RoutedModel]:
    yield routed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--routers", default=DEFAULT)
    parser.add_argument("--padded", type=Path)
    arguments = parser.parse_args()
    measurement = Measurement(arguments)
    made: dict[str, dict[str, list[float]]] = read_json(arguments.out) if arguments.out.is_file() else {}
    for name in arguments.routers.split(","):
        cases = [removed for removed in (False, True) if not (removed and name in ("oracle", "base")) and f"{name}{':without' * removed}" not in made]
        if not cases:
            continue
        began = time.monotonic()
        with measurement.made(name) as ready:
            for removed in cases:
                key = f"{name}{':without' * removed}"
                found = {}
                for task in measurement.tasks:
                    with ready(task, removed) as routed:
                        found[task.name] = measurement.measure(task, routed)
                made[key] = found
                write_json(arguments.out, made)
                print(f"{key}: {statistics.fmean(statistics.fmean(each) for each in found.values()):.3f}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

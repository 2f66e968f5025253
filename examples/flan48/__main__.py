"""``python -m examples.flan48 --train FILE``: prepares FLANv2-48 and prints the commands that evaluate routers on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.flan48.recipe import BASE, EVAL_SET, fetch_adapters, read_rows, read_samples, read_tasks, write_datasets
from meteora_core.errors import MeteoraError


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m examples.flan48", description="Datasets and adapters of FLANv2-48 in Meteora's layout.")
    made.add_argument("--train", type=Path, required=True, help="training rows: JSON Lines (inputs, targets, task), or LoraRetriever's JSON file of samples")
    made.add_argument("--rows", default=EVAL_SET, help="test rows: JSON Lines (inputs, targets, metric, task), or a dataset on the hub (default: %(default)s)")
    made.add_argument("--work", type=Path, default=Path("runs/flan48"), help="folder of everything (default: %(default)s)")
    made.add_argument("--task", nargs="+", default=[], metavar="NAME", help="only these tasks")
    made.add_argument("--no-adapters", action="store_true", help="fetch no adapters: they are in WORK/adapters already")
    return made


def main(arguments: Sequence[str] | None = None, *, endpoint: str | None = None) -> int:
    """Prepare everything and return the exit code."""
    options = parser().parse_args(arguments)
    try:
        tasks = read_tasks(read_rows(options.rows), read_samples(options.train), options.task)
        write_datasets(tasks, options.work)
        if not options.no_adapters:
            fetch_adapters([task.name for task in tasks], options.work, endpoint=endpoint)
    except MeteoraError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return 1
    places = f"--data {options.work}/datasets --adapters {options.work}/adapters"
    evaluation = f"meteora eval --task singles --base {BASE} {places} --out {options.work}/eval --seeds 1,2"
    routers = "arrow,spectr,phatgoose,centroid,closed-form,uniform,random"
    prefixed = ",".join(f"router:{name}" for name in routers.split(","))
    print(f"{len(tasks)} tasks in {options.work}. Evaluate the routers:")
    print(f"  {evaluation} --model router:oracle,{prefixed}")
    print(f"  {evaluation} --model {prefixed} --without-asked")
    print(f"  meteora eval report {options.work}/eval --relative-to router:oracle")
    return 0


if __name__ == "__main__":
    sys.exit(main())

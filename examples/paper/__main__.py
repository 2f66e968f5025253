"""``python -m examples.paper SIZES`` runs the experiment, or continues it where it stopped."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from examples.paper.children import run_child, visible_gpus
from examples.paper.engine import Engine, Runner
from examples.paper.plan import load_experiment
from examples.paper.side_by_side import run_side_by_side
from meteora_core.errors import MeteoraError


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m examples.paper",
        description="Run the paper's experiment step by step. Finished steps are skipped, so the same command continues where the experiment stopped.",
        epilog="Exit codes: 0 done; 1 a step failed or is out of date; 2 usage; 75 the time of --for is over; 130 Ctrl-C; 143 SIGTERM.",
    )
    made.add_argument("sizes", help="full, ten, toy, or a file like full.toml")
    made.add_argument("--only", nargs="+", default=[], metavar="STEP", help="steps or stages to run; * matches anything")
    made.add_argument("--again", nargs="+", default=[], metavar="STEP", help="steps or stages to run again, with all steps that depend on them")
    made.add_argument("--for", dest="seconds", type=float, metavar="SECONDS", help="stop after this many seconds; the same command continues")
    made.add_argument("--jobs", type=int, default=1, metavar="N", help="steps to run at the same time, on all GPUs, with output in WORK/logs (default: 1)")
    made.add_argument("--keep-going", action="store_true", help="after a failure, run the steps that do not need the failed one; the exit code is still 1")
    made.add_argument("--raw-dir", type=Path, help="folder with raw rows of gsm8k, alpaca and news_commentary_de; default: the hub")
    made.add_argument("--work", type=Path, help="folder of all files; default: that in the sizes file")
    made.add_argument("--docs", type=Path, help="folder of the report; default: that in the sizes file")
    made.add_argument("--base", help="base model; default: that in the sizes file")
    made.add_argument("--device", help="device: auto, cpu, cuda, …")
    made.add_argument("--report", action="store_true", help="only write the report of the finished steps")
    made.add_argument("--list", action="store_true", help="list the steps with their commands, and mark those that are done")
    return made


def main(arguments: Sequence[str] | None = None, *, run_command: Runner = run_child) -> int:
    """Run the experiment and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    if options.jobs < 1:
        parser().error("--jobs must be 1 or more")
    try:
        experiment = load_experiment(options.sizes, work=options.work, raw_dir=options.raw_dir, base=options.base, device=options.device, docs=options.docs)
        deadline = time.monotonic() + options.seconds if options.seconds is not None else float("inf")
        engine = Engine(experiment, call_of(options), run_command, say, deadline, hub_reachable, options.jobs, options.keep_going)
        if options.list:
            for step in experiment.steps:
                print(f"{'done' if engine.record_file(step).is_file() else '    '}  {step.stage:9} {step.name:22} {engine.command_line(step)}")
            return 0
        if options.again:
            say(f"# again: {', '.join(engine.forget(options.again))}")
        if not options.report:
            if engine.jobs > 1 and experiment.settings["model"].get("device", "auto") in ("auto", "cuda"):
                engine.gpus = visible_gpus()
            ran = engine.run(options.only) if engine.jobs == 1 else run_side_by_side(engine, options.only)
            say(f"# {len(ran)} steps run, all chosen steps are done")
        if options.report or not options.only:
            from examples.paper.report import write_report

            say(f"# report: {write_report(engine)}")
    except MeteoraError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  repair: {error.hint}" if error.exit_code == 1 else f"  {error.hint}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def call_of(options: argparse.Namespace) -> str:
    """The command line of this call without the options that select steps; repairs append their own."""
    parts = ["python", "-m", "examples.paper", options.sizes]
    for name in ("raw_dir", "work", "docs", "base", "device"):
        value = getattr(options, name)
        if value is not None:
            parts += [f"--{name.replace('_', '-')}", str(value)]
    if options.jobs != 1:
        parts += ["--jobs", str(options.jobs)]
    if options.keep_going:
        parts.append("--keep-going")
    return shlex.join(parts)


def say(line: str) -> None:
    """Print a line and flush it."""
    print(line, flush=True)


def hub_reachable() -> bool:
    """Whether the Hugging Face hub answers within a few seconds."""
    import httpx
    from huggingface_hub import constants

    if constants.is_offline_mode() or os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    try:
        return httpx.head(constants.ENDPOINT, timeout=8, follow_redirects=True).status_code < 500
    except httpx.HTTPError:
        return False


def terminated(number: int, frame: FrameType | None) -> None:
    """End as after Ctrl-C, once all running commands have ended, with the exit code of the signal."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    sys.exit(main())

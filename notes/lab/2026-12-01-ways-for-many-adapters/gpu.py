"""All measurements of this note, one after the other, on one or two GPUs: `gpu.py [--seconds S] [--gpus G]`, from the repository's root.

Stages are processes with a limit each; nothing starts after S seconds. What a stage writes to its own folder is appended to results.jsonl in $OUT as soon as
it ends, its output to log.txt; the last lines of its output are printed. With two GPUs, tests and compiled models run on the second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

LAB = Path(__file__).parent.parent
HERE = Path(__file__).parent
ROOT = LAB.parent.parent
FOLDERS = [HERE, *(LAB / name for name in ("2026-11-29-many-adapters", "2026-11-30-tiles-of-sorted-tokens", "2026-11-30-random-sizes"))]
OUT = Path(os.environ.get("OUT", "."))
LOCK = threading.Lock()


class Stage(NamedTuple):
    """Commands that run at the same time, their limit in seconds, and the number of lines of output to print."""

    name: str
    commands: list[list[str]]
    limit: float
    lines: int = 12
    environment: dict[str, str] = {}


def python(folder: str, *arguments: str) -> list[str]:
    return [sys.executable, str(LAB / folder), *arguments]


OURS = "2026-12-01-ways-for-many-adapters"
SIZES = ("256x64", "256x128", "256x512", "256x4096")
GROUPS = ("gu", "down", "qkv", "o")
SLOWER = ("89t-348x", "2422t-43x", "20t-170x", "5004t-690x")
PREFLIGHT = "import torch, triton, transformers, pytest, meteora_kernels, meteora_core.bench.tuning; print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), torch.cuda.device_count())"


def stages_of(gpus: int) -> list[list[Stage]]:
    """The stages of every GPU, in their order."""
    ways = [python(f"{OURS}/variants.py", "warm", group, size) for size in reversed(SIZES) for group in GROUPS]
    warm = Stage("warm", [*ways, *(python(f"{OURS}/up_tiles.py", "warm", group, "512", "4096") for group in GROUPS)], 95, 20)
    timed = Stage("variants", [python(f"{OURS}/variants.py", "time", "66", "256x64", "256x512", "256x4096", "256x128")], 76, 20)
    tiles = Stage("up_tiles", [python(f"{OURS}/up_tiles.py", "time", "512", "4096")], 30, 8)
    plain = Stage("over", [python("2026-11-30-quantised-bases/over.py", "64", "1")], 40, 6)
    library = Stage("over library", [python("2026-11-30-quantised-bases/over.py", "64")], 30, 3, {"METEORA_KERNEL_TABLE": str(HERE / "library.toml")})
    sizes = Stage("sizes", [python("2026-11-30-random-sizes/sizes.py", "--taken", "--jobs", "14", "--seconds", "75", "--first", *SLOWER)], 85, 30)
    slower = Stage("slower", [python("2026-11-30-random-sizes/sizes.py", "--taken", "--jobs", "4", "--seconds", "16", "--first", *SLOWER)], 20, 10)
    mixed = Stage("mixed", [python("2026-11-30-random-sizes/mixed.py", "8", "64", "512", "4096", "1")], 30, 5)
    compiled = Stage("compiled", [python("2026-11-30-compiled-models/compiled.py", "--seconds", "100", "--layers", "4", "--vocabulary", "32768", "decode-8", "decode-1", "decode-64")], 130, 30)
    workers = "12" if gpus > 1 else "6"
    tests = Stage("tests", [[sys.executable, "-m", "support.gpu_run", "--workers", workers, "--seconds", "110", "tests/core", "tests/cli", "tests/kernels/test_gpu_many", "tests/kernels/plan"]], 125, 60)
    if gpus > 1:
        return [[warm, timed, library, mixed, slower, tiles, plain, sizes], [tests, compiled]]
    return [[warm, timed, library, mixed, slower, tiles, plain, tests, sizes, compiled]]


def run_stage(stage: Stage, gpu: int, limit: float) -> None:
    began, folder = time.monotonic(), Path(tempfile.mkdtemp())
    paths = [*map(str, FOLDERS), str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OUT": str(folder), "CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    } | stage.environment  # fmt: skip
    running = []
    for index, command in enumerate(stage.commands):
        output = (folder / f"output-{index}").open("w")
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True))
    for process in running:
        try:
            process.wait(max(1.0, limit - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    codes = [process.returncode for process in running]
    texts = [(folder / f"output-{index}").read_text(errors="replace") for index in range(len(running))]
    lines = "".join(texts).splitlines()
    with LOCK:
        title = f"== {stage.name}: {time.monotonic() - began:.0f} s, {'all ended well' if not any(codes) else f'exit codes {codes}'}"
        shown = [line for line in lines if any(word in line for word in ("WAY", " base", "FAILED", "NOT "))][:30] if stage.name == "variants" else []
        print(title, *(line[:130] for line in shown or lines[-stage.lines :]), sep="\n", flush=True)
        with (OUT / "log.txt").open("a") as file:
            print(title, *lines, sep="\n", file=file)
        with (OUT / "results.jsonl").open("a") as file:
            for written in sorted(folder.glob("*.json*")):
                file.write(json.dumps({"stage": stage.name, "file": written.name, "text": written.read_text()}) + "\n")


def run_all(stages: list[Stage], gpu: int, end: float, only: list[str]) -> None:
    for stage in stages:
        if only and stage.name not in only:
            continue
        left = end - time.monotonic()
        if left < 8:
            print(f"== {stage.name}: no time left", flush=True)
            continue
        run_stage(stage, gpu, min(stage.limit, left))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[], help="names of the stages to run")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])}
    checked = subprocess.run([sys.executable, "-c", PREFLIGHT], env=environment, capture_output=True, text=True)
    print(checked.stdout, checked.stderr[-1500:], flush=True)
    if checked.returncode:
        return 1
    threads = [threading.Thread(target=run_all, args=(stages, gpu, end, given.only)) for gpu, stages in enumerate(stages_of(given.gpus))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())

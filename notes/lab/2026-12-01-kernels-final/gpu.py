"""All measurements of this note, on one GPU, from the repository's root: `gpu.py warm [--seconds S] [--side N]`, then `gpu.py time [--seconds S]`.

"warm" compiles and checks everything, N processes at a time; it may run beside other work. "time" runs the stages one after the other, and must be alone on
the GPU and on the processor. Nothing starts after S seconds. What a stage wrote is appended to kernels-warm.jsonl or kernels-time.jsonl in $OUT as soon as it
ends, its output to kernels-*.log. Stages that ended well are listed in a file in --state and are not run again; `--only NAME...` runs these anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
LAB, ROOT = HERE.parent, HERE.parents[2]
FOLDERS = [HERE, LAB / "2026-11-30-random-sizes", LAB / "2026-11-30-compiled-models", ROOT, ROOT / "kernels", ROOT / "tests"]
OUT = Path(os.environ.get("OUT", "."))
IMPORTANT = re.compile(r"LAYER|DECODE|NOT |FAILED|CANNOT|Error|float8|bfloat16 |int8|no time|ratio|slower|sizes, |, dense |uniform'|passed|failed|not run")
OVER, SIZES, MIXED, EAGER = (LAB / name for name in ("2026-11-30-quantised-bases/over.py", "2026-11-30-random-sizes/sizes.py", "2026-11-30-random-sizes/mixed.py", "2026-11-30-eager-prefill/eager.py"))
TESTS = ["-m", "support.gpu_run", "--workers", "1"]
LOCK = threading.Lock()


class Stage(NamedTuple):
    """A script with its arguments, and its limit in seconds."""

    name: str
    arguments: list[str]
    limit: float


def stages(mode: str) -> list[Stage]:
    layers, decode = str(HERE / "layers.py"), str(HERE / "decode.py")
    if mode == "time":
        return [
            Stage("28x8", [layers, "time", "25", "28x8"], 35),
            Stage("many", [layers, "time", "65", "256x8", "1024x8"], 80),
            Stage("mixed", [str(MIXED), "1", "8", "64", "512", "4096"], 40),
            Stage("decode", [decode, "--at-least-one", "--seconds", "110", "8", "1", "64"], 135),
            Stage("prefill", [str(EAGER), "512"], 100),
            Stage("over", [str(OVER), "1", "8", "64"], 45),
            Stage("test of random sizes", [*TESTS, "--seconds", "120", "--passed", "/tmp/kernels-sizes", "tests/kernels/layer/test_gpu_random_sizes.py"], 130),
            Stage("test of overlap", [*TESTS, "--seconds", "40", "--passed", "/tmp/kernels-sizes", "tests/kernels/layer/test_overlap.py"], 50),
            Stage("sizes", [str(SIZES), "--taken", "--layer", "--jobs", "0", "--seconds", "50"], 60),
        ]
    found = [Stage(f"warm decode {rows}", [decode, "--warm", "--seconds", "400", rows], 400) for rows in ("8", "1", "64")]
    found += [Stage(f"warm {name}", [layers, "warm", name], 240) for name in ("28x8", "256x8", "1024x8")]
    found += [Stage("warm mixed", [str(MIXED), "1", "8", "64", "512", "4096"], 200)]
    found += [Stage("warm prefill", [str(EAGER), "--layers", "1", "512"], 200), Stage("warm over", [str(OVER), "1", "8", "64"], 200)]
    return [*found, Stage("warm sizes", [str(SIZES), "--taken", "--layer", "--jobs", "6", "--seconds", "500", "--compile"], 320)]


def run(stage: Stage, mode: str, end: float, done: Path) -> None:
    left = end - time.monotonic()
    if left < 6:
        with LOCK:
            print(f"== {stage.name}: no time left", flush=True)
        return
    began, folder = time.monotonic(), Path(tempfile.mkdtemp())
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")]), "OUT": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    if mode == "warm":
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "4"}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, *stage.arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(min(stage.limit, left))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = (folder / "output").read_text(errors="replace").splitlines()
    shown = [line[:420] for line in lines if (re.search(r"NOT |FAILED|CANNOT|Error", line) if mode == "warm" else IMPORTANT.search(line))]
    with LOCK:
        title = f"== {stage.name}: exit code {process.returncode}, {time.monotonic() - began:.0f} s"
        print(title, *shown[:40], *(lines[-4:] if process.returncode else []), sep="\n", flush=True)
        with (OUT / f"kernels-{mode}.log").open("a") as file:
            print(title, *lines, sep="\n", file=file)
        with (OUT / f"kernels-{mode}.jsonl").open("a") as file:
            for written in sorted(folder.glob("*.json*")):
                file.write(json.dumps({"stage": stage.name, "file": written.name, "text": written.read_text()}) + "\n")
        if not process.returncode and not any("no time left" in line for line in lines):
            with done.open("a") as file:
                print(stage.name, file=file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["warm", "time"])
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--side", type=int, default=4, help="processes at a time in warm")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "kernels-final")
    given = parser.parse_args()
    start = time.monotonic()
    given.state.mkdir(parents=True, exist_ok=True)
    done = given.state / "done"
    before = done.read_text().splitlines() if done.is_file() else []
    wanted = [stage for stage in stages(given.mode) if (stage.name in given.only if given.only else stage.name not in before)]
    with ThreadPoolExecutor(given.side if given.mode == "warm" else 1) as pool:
        list(pool.map(lambda stage: run(stage, given.mode, start + given.seconds, done), wanted))
    print(f"== all: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

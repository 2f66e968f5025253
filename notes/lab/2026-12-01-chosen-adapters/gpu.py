"""All measurements of this note, one after the other, on one GPU: `gpu.py [--seconds S]`, from the repository's root.

First every kernel is compiled and checked, in processes side by side; then the stages are timed, each in a process for itself with a limit. Nothing starts
after S seconds. What a stage writes is appended to results.jsonl in $OUT as soon as it ends, its output to log.txt; the important lines are printed.
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
import time
from pathlib import Path

LAB, HERE = Path(__file__).parent.parent, Path(__file__).parent
ROOT = LAB.parent.parent
FOLDERS = [HERE, LAB / "2026-11-29-many-adapters", LAB / "2026-11-30-random-sizes", ROOT, ROOT / "kernels", ROOT / "tests"]
OUT = Path(os.environ.get("OUT", "."))
OVER, SIZES = LAB / "2026-11-30-quantised-bases" / "over.py", LAB / "2026-11-30-random-sizes" / "sizes.py"
WAYS = ("256x64", "256x512", "256x128", "1024x64", "256x32")
FEW = {"METEORA_KERNEL_TABLE": str(HERE / "few.toml")}
PREFLIGHT = "import torch, triton, meteora_kernels.group.chosen_adapters, meteora_core.bench.tuning; print(torch.__version__, triton.__version__, torch.cuda.get_device_name())"
IMPORTANT = re.compile(r"SUM|DECODE|NOT |FAILED|CANNOT|Error|float8|bfloat16|int8|no time|slower|sizes,|compiled|^256x64|^256x512 ")


def begin(arguments: list[str], more: dict[str, str]) -> tuple[subprocess.Popen[bytes], Path]:
    folder = Path(tempfile.mkdtemp())
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")]), "OUT": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    } | more  # fmt: skip
    with (folder / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return process, folder


def end(name: str, process: subprocess.Popen[bytes], folder: Path, until: float, *, quiet: bool = False) -> None:
    began = time.monotonic()
    try:
        process.wait(max(0.5, until - began))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    lines = (folder / "output").read_text(errors="replace").splitlines()
    title = f"== {name}: exit code {process.returncode}"
    shown = [line[:420] for line in lines if (re.search(r"NOT |FAILED|CANNOT|Error", line) if quiet else IMPORTANT.search(line))]
    worst = max((float(found) for line in lines for found in re.findall(r"err ([\d.]+)|worst ([\d.]+) \(base", line) for found in found if found), default=0.0)
    if not quiet or shown or process.returncode:
        print(title, f"({time.monotonic() - began:.0f} s)", *shown[:40], *(lines[-3:] if process.returncode else []), sep="\n", flush=True)
    elif worst:
        print(f"{title}, {len(lines)} lines, largest error {worst:.2f} thousandths", flush=True)
    with (OUT / "log.txt").open("a") as file:
        print(title, *lines, sep="\n", file=file)
    with (OUT / "results.jsonl").open("a") as file:
        for written in sorted(folder.glob("*.json*")):
            file.write(json.dumps({"stage": name, "file": written.name, "text": written.read_text()}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=185.0)
    parser.add_argument("--compile", type=float, default=80.0, help="the most seconds for compiling")
    given = parser.parse_args()
    start = time.monotonic()
    checked, folder = begin(["-c", PREFLIGHT], {})
    code = checked.wait(60)
    print((folder / "output").read_text()[-1500:], flush=True)
    if code:
        return 1
    ways, decode = str(HERE / "ways.py"), str(HERE / "decode.py")
    warm = [(f"warm {group} {size}", [ways, "warm", group, size], {}) for size in WAYS for group in ("gu", "qkv", "down", "o")]
    warm += [(f"warm {name}", [decode, "warm", name], {}) for name in ("mixed", "uniform", "28x8", "256x8", "1024x8")]
    warm += [("warm over", [str(OVER), "64"], {}), ("warm over few", [str(OVER), "64"], FEW)]
    warm += [("compile sizes", [str(SIZES), "--taken", "--jobs", "7", "--seconds", str(given.compile / 0.6), "--compile"], {})]
    running = [(name, *begin(arguments, more)) for name, arguments, more in warm]
    for name, process, folder in running:
        end(name, process, folder, start + given.compile, quiet=True)
    print(f"== compiled after {time.monotonic() - start:.0f} s", flush=True)
    timed = [
        ("ways", [ways, "time", "45", *WAYS], {}, 55.0),
        ("decode", [decode, "time", "22"], {}, 30.0),
        ("over few_tokens", [str(OVER), "64"], FEW, 20.0),
        ("over", [str(OVER), "64"], {}, 20.0),
        ("sizes", [str(SIZES), "--taken", "--jobs", "0", "--seconds", "40"], {}, 50.0),
    ]
    for name, arguments, more, limit in timed:
        left = start + given.seconds - time.monotonic()
        if left < 6:
            print(f"== {name}: no time left", flush=True)
            continue
        end(name, *begin(arguments, more), time.monotonic() + min(limit, left))
    print(f"== all: {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs `pytest -m gpu` with every file in a process for itself, because an error on a GPU makes all later tests of its process fail.

    PYTHONPATH=tests python -m support.gpu_run --workers 14 --seconds 400 [tests/core tests/cli]
    PYTHONPATH=tests python -m support.gpu_run --every-test tests/kernels tests/core/fused

Tests of kernels that are not marked run on a GPU too where there is one; `--every-test` takes all tests of all files.

The report of a file with failures is printed as soon as the file has ended. Tests that failed run again, each alone in a process. The exit status is 1 if a
test failed again or there was no time to run it.

`--passed FILE` keeps the names of files and tests that passed, one a line, and leaves out those that are in FILE already, so that a run can go on where another
one ended, also inside a file; runs with and without --every-test need files of their own. `--beside` leaves out the tests that time their work, for runs beside
other work on the GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALONE = ("test_gpu_random_sizes.py", "test_overlap.py")
"""Files that time their work; they run after all others, one at a time."""
SPLIT = ("test_fused_steps.py", "test_gpu_models.py", "test_gpu_decode.py", "test_gpu_layer.py")
"""Files whose tests run in several processes, side by side, because they compile kernels for minutes (:func:`parts_of`)."""
LONG = ("test_train_command.py", "test_several_gpus.py")
"""Files that start programs, which takes minutes; they come last."""
OPTIONS = ("-v", "-o", "addopts=--strict-markers --strict-config", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:benchmark", "-rfE")
NOT_RUN = 124


def files(every_test: bool) -> list[str]:
    """Files with tests that only a GPU can run, or all files, relative to the repository."""
    found = (file for file in sorted((ROOT / "tests").rglob("test_*.py")) if every_test or "mark.gpu" in file.read_text(encoding="utf-8"))
    return [str(file.relative_to(ROOT)) for file in found]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def tests_of(file: str, every_test: bool) -> list[str]:
    """The tests of a file; the file itself if they cannot be collected."""
    line = [sys.executable, "-m", "pytest", *OPTIONS, *(() if every_test else ("-m", "gpu")), "--collect-only", file]
    report = subprocess.run([*line, "-qq"], cwd=ROOT, env=environment(), capture_output=True, text=True).stdout
    return [test for test in report.splitlines() if test.startswith(f"{file}::")] or [file]


def parts_of(tests: list[str], workers: int) -> list[tuple[str, ...]]:
    """The tests of a file for separate processes: each by itself, or up to three parts for every worker if there are more."""
    size = max(1, -(-len(tests) // (3 * workers)))
    return [tuple(tests[start : start + size]) for start in range(0, len(tests), size)]


def failures(report: str) -> list[str]:
    """The tests that a report of pytest names as failed."""
    return [match[1] for match in re.finditer(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", report, re.MULTILINE)]


def ended_well(report: str) -> list[str]:
    """The tests that a report of pytest names as passed or skipped; it may have been cut."""
    return [match[1] for match in re.finditer(r"^(tests/\S+::.+?) (?:PASSED|SKIPPED)\b", report, re.MULTILINE)]


def run(targets: tuple[str, ...], seconds: float, every_test: bool, passed: Iterable[str]) -> tuple[int, str]:
    """The exit status and the report of a file, without the tests of it that have passed before, or of some tests of a file."""
    left_out = [f"--deselect={test}" for test in passed if test.startswith(f"{targets[0]}::")]
    line = [sys.executable, "-m", "pytest", *OPTIONS, *(() if every_test else ("-m", "gpu")), *left_out, *targets]
    if seconds <= 0:
        return NOT_RUN, "no time left"
    try:
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as ended:
        so_far = ended.stdout or b""
        return NOT_RUN, f"{so_far.decode(errors='replace') if isinstance(so_far, bytes) else so_far}\nno time left"
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 1) - 2), help="files that run at the same time")
    parser.add_argument("--seconds", type=float, default=3600.0, help="time after which nothing new starts")
    parser.add_argument("--every-test", action="store_true", help="run tests that are not marked with gpu, too")
    parser.add_argument("--passed", type=Path, help="file with the names of what passed; names in it are not run again")
    parser.add_argument("--beside", action="store_true", help="leave out tests that time their work")
    parser.add_argument("folders", nargs="*", default=[""], help="run only files whose path begins with one of these")
    given = parser.parse_args()
    end, failed, missed = time.monotonic() + given.seconds, list[str](), list[str]()
    passed = set(given.passed.read_text(encoding="utf-8").splitlines()) if given.passed and given.passed.is_file() else set[str]()

    def one(*targets: str) -> None:
        targets = tuple(target for target in targets if target not in passed)
        if not targets:
            return
        begin, name = time.monotonic(), targets[0] if len(targets) == 1 else f"{targets[0]} and {len(targets) - 1} more"
        code, report = run(targets, end - begin, given.every_test, passed)
        last, well = report.strip().splitlines()[-1] if report.strip() else "", ended_well(report)
        print(f"{time.monotonic() - begin:5.0f} s  {name}: {last}{f' after {len(well)} tests' if code == NOT_RUN else ''}", flush=True)
        if code == NOT_RUN or (code not in (0, 5) and not failures(report)):
            missed.extend(target for target in targets if target not in well)
        if given.passed:
            with given.passed.open("a", encoding="utf-8") as file:
                file.writelines(f"{name}\n" for name in {*well, *(targets if code in (0, 5) else ())})
        if code == NOT_RUN and "\n" in report:
            print(report[-2000:], flush=True)
        if code not in (0, 5, NOT_RUN):
            print(report, flush=True)
            failed.extend(failures(report))

    all_files = [file for file in files(given.every_test) if file.startswith(tuple(given.folders)) and not (given.beside and Path(file).name in ALONE)]
    with ThreadPoolExecutor(given.workers) as pool:
        split = pool.map(lambda file: tests_of(file, given.every_test), [file for file in all_files if Path(file).name in SPLIT])
        parts = [part for tests in split for part in parts_of([test for test in tests if test not in passed], given.workers) if part]
        whole = [file for file in all_files if Path(file).name not in ALONE + SPLIT + LONG]
        long = [file for file in all_files if Path(file).name in LONG]
        list(pool.map(lambda targets: one(*targets), [*parts, *((file,) for file in (*whole, *long))]))
    for file in all_files:
        if Path(file).name in ALONE:
            one(file)
    again, failed = failed, []
    for test in again:
        one(test)
    for test in failed:
        print(f"failed: {test}")
    for target in missed:
        print(f"not run to its end: {target}")
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())

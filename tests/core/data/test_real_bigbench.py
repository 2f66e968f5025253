"""The real source distribution: all 22 tasks, against the published rows, in bounded memory. The test fetches 358 MB unless they are in the cache."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data.build import BuildRequest, build_tasks
from meteora_core.data.pypi_source import fetch_sdist
from meteora_core.data.rows import read_rows
from meteora_core.data.tasks import BIGBENCH_TASKS, COMPOSITES

pytestmark = pytest.mark.slow

PUBLISHED = {
    (0, 0): "37cfccdd325b9d9f",
    (0, 1): "0476175528d4a34f",
    (0, 3): "2fdd174f5faae0d2",
    (0, 4): "9a97df9efa854882",
    (0, 5): "a9c0acf9889a29db",
    (0, 6): "1a78219cb5cd3122",
    (22, 2): "2117843f61559557",
    (22, 3): "71a29d534cff2afc",
    (22, 4): "93d4969f8b729ecf",
    (22, 5): "196d0ea23546b79d",
    (23, 4): "036368e9470430d8",
    (23, 5): "0ad1014c887b2c00",
    (23, 6): "f8084fcaff4214a2",
}
"""The start of the SHA-256 of prompt, a zero character and response, by row and member of the authors' published composite_10."""

TEST_ROWS = {
    "logical_deduction": 300,
    "question_selection": 316,
    "strategyqa": 457,
    "elementary_math_qa": 7629,
    "topical_chat": 4459,
    "unit_conversion": 4785,
    "vitaminc_fact_verification": 10933,
    "winowhy": 572,
}

MEASURED_BUILD = """
import re, sys
from meteora_core.data.build import BuildRequest, build_tasks
from meteora_core.data.tasks import BIGBENCH_TASKS
build_tasks(BIGBENCH_TASKS, sys.argv[1], BuildRequest(source="pypi"))
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""
"""A program that measures its peak of memory; ru_maxrss would also count the process from which it was forked."""


AGAIN = ["logical_deduction", "question_selection", "strategyqa", "unit_conversion", "winowhy"]
"""The tasks that are built twice. The larger ones take long and use the same code."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """All 22 tasks, built from the archive by a separate process without unpacked tasks, its peak of memory, and some tasks built again by two processes."""
    archive = fetch_sdist()
    root = tmp_path_factory.mktemp("real")
    (root / "cache" / "downloads").mkdir(parents=True)
    (root / "cache" / "downloads" / archive.name).symlink_to(archive)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METEORA_CACHE", str(root / "cache"))
        output = subprocess.run([sys.executable, "-c", MEASURED_BUILD, str(root / "one")], capture_output=True, text=True, check=True).stdout
        build_tasks(AGAIN, root / "two", BuildRequest(source="pypi"), jobs=2)
    yield root, int(output)
    shutil.rmtree(root)


def test_published_rows(built: tuple[Path, int]) -> None:
    rng = random.Random(47)
    found: dict[tuple[int, int], str] = {}
    for place, member in enumerate(COMPOSITES["composite_10"][:7]):
        rows = read_rows(built[0] / "one", member, "test")
        rng.shuffle(rows)
        for key in PUBLISHED:
            if key[1] == place:
                row = rows[key[0]]
                found[key] = hashlib.sha256(f"{row.prompt}\0{row.response}".encode()).hexdigest()[:16]
    assert found == PUBLISHED


def test_row_counts(built: tuple[Path, int]) -> None:
    total = 0
    for name in BIGBENCH_TASKS:
        rows = json.loads((built[0] / "one" / name / "manifest.json").read_text())["files"]
        total += sum(entry["rows"] for entry in rows.values())
        if name in TEST_ROWS:
            assert rows["test.jsonl"]["rows"] == TEST_ROWS[name]
    assert total == 231_407


def test_two_builds_are_equal(built: tuple[Path, int]) -> None:
    def hashes(folder: Path) -> dict[str, Any]:
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}

    one, two = hashes(built[0] / "one"), hashes(built[0] / "two")
    assert len(one) == 66
    assert len(two) == 3 * len(AGAIN)
    assert two.items() <= one.items()


def test_memory(built: tuple[Path, int]) -> None:
    assert built[1] < 1.5e9

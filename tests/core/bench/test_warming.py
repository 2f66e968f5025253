"""Kernels are compiled in several processes before a tuning run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from meteora_core.bench import warming
from meteora_core.bench.contenders import Linears, Setting
from meteora_core.bench.shapes import ModelShape
from meteora_core.bench.tuning import problem_of, runs_of, shipped_rows
from meteora_core.bench.warming import Layer, compile_in_parallel, compile_part, workers_for
from meteora_kernels.plan import Row, Span

LAYER = Layer(ModelShape("tiny", 32, 16, 48, 4, 2, 2, 64), Setting(3, 4, 2), torch.float32, torch.device("cpu"))
FOLDER = "METEORA_TEST_WARMING"


def noting(kind: str, linears: Linears, tokens: int, setting: Setting) -> list[Callable[[], object]]:
    """Works of which the first fails, and the second notes its size and its process."""

    def fail() -> object:
        raise RuntimeError("no such kernel")

    return [fail, lambda: (Path(os.environ[FOLDER]) / f"{kind}-{linears.hidden}-{tokens}").write_text(str(os.getpid()))]


def test_jobs_are_shared_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(warming, "workers_for", lambda jobs: 2)
    jobs = [("group", 0, 1), ("layer", 3, 1), ("group", 0, 64)]
    compile_in_parallel(LAYER, jobs, noting)
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(made) == {"group-32-1", "layer-48-1", "group-32-64"}
    assert str(os.getpid()) not in made.values()


def test_a_single_worker_leaves_the_work_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert workers_for(32) == 1
    compile_in_parallel(LAYER, [("group", 0, 1)], noting)
    assert list(tmp_path.iterdir()) == []
    assert compile_part(LAYER, [("group", 0, 1)], noting) == 1
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert (workers_for(32), workers_for(3)) == (8, 3)


def test_rows_for_far_sizes_are_not_tried() -> None:
    problem = problem_of("layer", LAYER.make()[1], 64, LAYER.setting)
    far, near, ever = Row("library", Span(1, 7)), Row("many_adapters", Span(1, 8), way="few"), Row("many_tokens", inline=True)
    tried = [row.path for row, _ in problem.candidates([far, near, ever])]
    assert "library" not in tried
    assert {"many_adapters", "many_tokens"} <= set(tried)
    assert "library" in {row.path for row, _ in problem.candidates(shipped_rows("layer"))}
    assert len(runs_of("layer", LAYER.make()[1], 64, LAYER.setting)) == len([row for row, reason in problem.candidates(shipped_rows("layer")) if not reason])

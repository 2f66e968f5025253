"""Adapters trained in parallel: the same bits as one after another; failed and killed workers are named, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteora_core.errors import MeteoraError
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.settings import AdapterTrainSettings
from meteora_core.training.job import TrainJob
from meteora_core.training.parallel_adapters import ParallelOutcome, job_devices, train_in_parallel
from meteora_core.training.single_adapter import train_adapter
from support import processes
from support.tiny_training import letters, model

SETTINGS = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "rank": 2, "dropout": 0.1, "log_steps": 2, "log_to": "none"}


@pytest.fixture
def base(tmp_path: Path) -> BaseReference:
    model().save_pretrained(tmp_path / "base")
    letters().save_pretrained(tmp_path / "base")
    return BaseReference(str(tmp_path / "base"))


@pytest.fixture(autouse=True)
def _workers_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked here; the test of ``meteora train --jobs`` in tests/cli starts them as users do."""
    processes.fork_workers(monkeypatch)


def run(job: TrainJob, workers: int = 2, **settings: AdapterTrainSettings) -> ParallelOutcome:
    each = settings or {task: AdapterTrainSettings(**SETTINGS) for task in ("shout", "count")}
    return train_in_parallel(each, job, dtype=torch.float32, devices=["cpu"] * workers)


class Recorder:
    """A Progress that records its notes and bars; the first of them may call a function."""

    def __init__(self, act=None) -> None:
        self.titles: list[str] = []
        self.notes: list[str] = []
        self.advanced: dict[str, float] = {}
        self.act = act

    @contextmanager
    def task(self, title, *, total=None, unit="it"):
        self.titles.append(title)
        recorder = self

        class Bar:
            def update(self, advance=0, *, total=None, **fields):
                recorder.advanced[title] = recorder.advanced.get(title, 0) + advance
                if recorder.act:
                    recorder.act()

        yield Bar()

    def note(self, message) -> None:
        self.notes.append(message)


def test_devices_on_one_kind_of_device() -> None:
    assert job_devices("cpu", 3) == ["cpu"] * 3


def test_gpus_are_taken_in_turn(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert job_devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert job_devices("cuda:1", 2) == ["cuda:1", "cuda:1"]


@pytest.mark.slow
def test_parallel_training_equals_sequential_training_and_skips_finished_adapters(base, data, tmp_path) -> None:
    for task in ("shout", "count"):
        train_adapter(load_base(base), load_tokenizer(base), task, AdapterTrainSettings(**SETTINGS), TrainJob(base, data, tmp_path / "alone"))
    recorder = Recorder()
    outcome = run(TrainJob(base, data, tmp_path / "jobs", resume=True, progress=recorder))
    assert [each.task for each in outcome.done] == ["shout", "count"]
    assert not outcome.failed
    for task in ("shout", "count"):
        alone, jobs = (load_file(tmp_path / way / task / "adapter_model.safetensors") for way in ("alone", "jobs"))
        assert alone.keys() == jobs.keys()
        assert all(torch.equal(alone[name], jobs[name]) for name in alone)
    assert sorted(recorder.titles) == ["adapter count", "adapter shout"]
    assert recorder.advanced == {"adapter count": 4, "adapter shout": 4}
    again = run(TrainJob(base, data, tmp_path / "jobs", resume=True))
    assert all(each.skipped for each in again.done)


@pytest.mark.slow
def test_a_task_that_fails_is_named_and_the_others_are_trained(base, data, tmp_path, monkeypatch) -> None:
    """One worker has both tasks: the failure of the first must not keep it from the second."""
    monkeypatch.setenv("WANDB_BASE_URL", "no address")
    settings = {"shout": AdapterTrainSettings(**{**SETTINGS, "log_to": "wandb"}), "count": AdapterTrainSettings(**SETTINGS)}
    recorder = Recorder()
    outcome = run(TrainJob(base, data, tmp_path / "o", resume=True, progress=recorder), 1, **settings)
    assert [each.task for each in outcome.done] == ["count"]
    with pytest.raises(MeteoraError, match=r"1 of 2 tasks failed: shout: .*wandb could not be started"):
        outcome.check()
    assert any("shout failed" in note for note in recorder.notes)
    assert not (tmp_path / "o" / "shout").exists()


@pytest.mark.slow
def test_a_dead_worker_is_named_and_the_others_are_stopped(base, data, tmp_path) -> None:
    from multiprocessing import active_children

    def kill_one() -> None:
        if children := sorted(active_children(), key=lambda child: child.pid or 0):
            os.kill(children[0].pid, signal.SIGKILL)

    settings = {task: AdapterTrainSettings(**{**SETTINGS, "max_steps": 100_000}) for task in ("shout", "count")}
    with pytest.raises(MeteoraError, match=r"(the process that trained (shout|count)|worker process 0) ended: terminated with signal SIGKILL"):
        run(TrainJob(base, data, tmp_path / "o", resume=True, progress=Recorder(kill_one)), **settings)
    assert not active_children()


@pytest.mark.slow
def test_ctrl_c_ends_all_workers(base, data, tmp_path) -> None:
    from multiprocessing import active_children

    started = threading.Event()

    def interrupt() -> None:
        if not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)

    settings = {task: AdapterTrainSettings(**{**SETTINGS, "max_steps": 100_000}) for task in ("shout", "count")}
    with pytest.raises(KeyboardInterrupt):
        run(TrainJob(base, data, tmp_path / "o", resume=True, progress=Recorder(interrupt)), **settings)
    assert started.is_set()
    assert not active_children()
    assert not list((tmp_path / "o").glob("[!.]*"))


def test_a_base_that_cannot_be_loaded_is_an_error_before_any_worker_starts(data, tmp_path) -> None:
    with pytest.raises(MeteoraError, match="no base model"):
        run(TrainJob(BaseReference("nothing-of-the-kind"), data, tmp_path))

"""Two GPUs against one, over NCCL: training with sharded and copied models, a worker that dies, evaluation, a model that lies on the second GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.evaluation_workspace import make_workspace
from support.train_command import GATES, command, descendants, rank_of, shell, training, wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

PAIR = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
GPU = {"METEORA_MODEL__DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": PAIR}


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in training(folder)["history"]]


@pytest.mark.parametrize("launcher", ["fsdp", "ddp"])
@pytest.mark.parametrize("more", [(), ("--trainable", "gates+adapters", "--gradient-checkpointing", "--packing", "--max-length", "64", "--init", "normal")])
def test_two_gpus_equal_one(place, launcher: str, more: tuple[str, ...]) -> None:
    environment = {**GPU, "METEORA_MODEL__DTYPE": "float32"}
    name = f"{launcher}-{len(more)}"
    shell(place, *GATES, *more, "--batch-size", "6", "--accumulation", "2", "--out", f"one-{name}", **environment)
    shell(
        place, *GATES, *more, "--launcher", launcher, "--num-processes", "2", "--batch-size", "3", "--accumulation", "2", "--out", f"two-{name}", **environment
    )
    one, two = place / f"one-{name}", place / f"two-{name}"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert training(two)["held_out"] == pytest.approx(training(one)["held_out"], rel=1e-3, abs=1e-4)
    whole, gathered = (load_file(folder / "meteora.safetensors") for folder in (one, two))
    assert whole.keys() == gathered.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(gathered[key], tensor, rtol=0, atol=1e-3)
    memory = training(two)["memory"]
    assert len(memory["start"]) == len(memory["peak"]) == training(two)["processes"] == 2
    (alone,) = training(one)["memory"]["start"]
    assert all(0 < start <= peak for start, peak in zip(memory["start"], memory["peak"], strict=True))
    if launcher == "fsdp" and more:
        assert max(memory["start"]) < 0.75 * alone, "each GPU holds its share"


def test_a_killed_worker_ends_the_job_and_one_gpu_goes_on(place) -> None:
    """Sharded over two; the second is killed; its state resumes on one GPU and ends where one GPU alone would have."""
    flags = (*GATES[2:], "--max-steps", "300", "--save-steps", "20", "--eval-steps", "0", "--init", "zeros")
    environment = {**GPU, "METEORA_MODEL__DTYPE": "float32"}
    variables = {**os.environ, **environment, "METEORA_CACHE": str(place / "cache")}
    words = command(*flags, "--launcher", "fsdp", "--num-processes", "2", "--batch-size", "2", "--out", "killed")
    states = place / ".killed.states"
    with (place / "killed.log").open("wb") as log:
        child = subprocess.Popen(words, cwd=place, env=variables, stderr=log)
        try:
            wait_for(lambda: any(states.glob("step-*/state.json")), child)
            (worker,) = [pid for pid in descendants(child.pid) if b"--out\0killed" in Path(f"/proc/{pid}/cmdline").read_bytes() and rank_of(pid) == 1]
            os.kill(worker, signal.SIGKILL)
            assert child.wait(timeout=600) not in (0, None)
        finally:
            child.kill()
    said = (place / "killed.log").read_text()
    assert "SIGKILL" in said
    assert "error: the 2 processes of this training have ended" in said
    saved = max(int(path.name[5:]) for path in states.glob("step-*"))
    assert saved < 300
    shell(place, *flags, "--batch-size", "4", "--out", "killed", "--resume", **environment)
    shell(place, *flags, "--batch-size", "4", "--out", "alone", **environment)
    assert losses(place / "killed") == pytest.approx(losses(place / "alone"), rel=1e-2)


def test_evaluation_on_two_gpus_gives_the_file_of_one(tmp_path, make_adapter) -> None:
    world = make_workspace(tmp_path, make_adapter, count=9)
    words = [sys.executable, "-m", "meteora_cli", "eval", "--task", "logical_deduction,composite_3", "--model", "base,meteora", "--base", str(world.base)]
    words += ["--checkpoint", str(world.checkpoint), "--max-new-tokens", "8", "--dtype", "float32", "--json"]
    environment = {**os.environ, **GPU, "METEORA_PATHS__DATA": str(world.data), "METEORA_PATHS__ADAPTERS": str(world.adapters)}

    def run(out: str, *more: str) -> dict[str, str]:
        done = subprocess.run([*words, "--out", out, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)) == 2
        return {f"{path.parent.name}/{path.name.rpartition('_')[0]}": path.read_text() for path in (tmp_path / out).glob("*/samples_*")}

    one, two = run("one"), run("two", "--launcher", "ddp")
    assert len(one) == 4
    assert two == one


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_a_model_on_the_second_gpu_answers_as_on_the_first(tmp_path, make_adapter, graphs: str) -> None:
    from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
    from meteora_core.evaluation.evaluate import evaluate
    from meteora_core.model.base import BaseReference

    world = make_workspace(tmp_path, make_adapter, count=9)
    options = EvalOptions(max_new_tokens=12, cuda_graphs=graphs)
    plan = EvalPlan(("composite_3",), ("meteora",), world.data, world.adapters, world.checkpoint, BaseReference(str(world.base)), options)
    answers = []
    for device in ("cuda:0", "cuda:1"):
        (outcome,) = evaluate(plan, device=torch.device(device), dtype=torch.float32)
        answers.append([sample.ids for sample in outcome.results["composite_3"].samples])
    assert torch.cuda.current_device() == 0
    assert answers[0] == answers[1]
    assert any(answers[0])

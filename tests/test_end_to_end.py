"""The real thing with very few steps: the base model and BIG-bench from the package index, training, evaluation, chat, resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SMALL = ("--adapter-steps", "3", "--gate-steps", "2", "--test-rows", "4", "--composite-rows", "1")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "meteora_cli", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "METEORA_RUN_LOG": "", "NO_COLOR": "1", "COLUMNS": "160"}


def run(folder: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, input=stdin, env=environment(), check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished small quickstart, which was killed twice on its way."""
    folder = tmp_path_factory.mktemp("quickstart")
    for wait_for in ("runs/quickstart/adapters/.logical_deduction.states", "runs/quickstart/adapters/question_selection"):
        child = subprocess.Popen(command("quickstart", *SMALL), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        until = time.monotonic() + 600
        while not (folder / wait_for).exists() and child.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
            if wait_for.endswith(".states") and (folder / "runs/quickstart/adapters/logical_deduction").exists():
                break
        assert child.poll() is None, "the run ended before it could be killed"
        child.send_signal(signal.SIGKILL)
        child.wait()
    run(folder, "quickstart", *SMALL)
    return folder


def test_the_table_compares_all_models_and_is_kept(place) -> None:
    began = time.monotonic()
    report = json.loads(run(place, "quickstart", *SMALL, "--json").stdout)
    assert time.monotonic() - began < 60
    assert list(report["scores"]) == ["logical_deduction", "question_selection", "strategyqa", "composite_3"]
    for task, models in report["scores"].items():
        assert set(models) == {"base", "meteora"} | (set() if task == "composite_3" else {"adapter"})
    assert 0.4 < report["held_out"]["gate_accuracy"] <= 1
    text = run(place, "quickstart", *SMALL)
    assert "MeteoRA" in text.stdout
    assert "meteora chat --checkpoint" in text.stderr


def test_the_checkpoint_is_small_and_holds_only_gates(place) -> None:
    from safetensors import safe_open

    file = place / "runs/quickstart/meteora/meteora.safetensors"
    with safe_open(file, "pt") as tensors:
        assert {key.rpartition(".")[2] for key in tensors.keys()} == {"gate"}  # noqa: SIM118
        assert len(list(tensors.keys())) == 210
    assert file.stat().st_size < 3e6


def test_special_tokens_of_the_converted_base_are_fixed() -> None:
    from meteora_core.model.base import BaseReference, load_tokenizer

    tokenizer = load_tokenizer(BaseReference("smollm2-135m"))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("[INST] a [/INST]\nb")["input_ids"] == [75, 39637, 77, 253, 2799, 39637, 77, 198, 82] or tokenizer("a")["input_ids"] == [81]


def test_eval_writes_results_in_the_harness_shape(place) -> None:
    arguments = ("eval", "--task", "strategyqa,logical_deduction", "--model", "all", "--limit", "2", "--max-new-tokens", "8", "--json")
    folders = ("--data", "runs/quickstart/datasets", "--adapters", "runs/quickstart/adapters")
    documents = json.loads(run(place, *arguments, *folders).stdout)
    assert [document["model_name"] for document in documents] == ["base", "own", "meteora"]
    for document in documents:
        assert document["n-samples"]["strategyqa"]["effective"] == 2
        assert "acc,none" in document["results"]["logical_deduction"]
        assert list((place / "runs/eval" / document["model_name"]).glob("results_*.json"))
        samples = next(iter((place / "runs/eval" / document["model_name"]).glob("samples_strategyqa_*.jsonl")))
        assert len(samples.read_text().splitlines()) == 2


def test_chat_answers_on_a_pipe(place) -> None:
    done = run(place, "chat", "--checkpoint", "runs/quickstart/meteora", stdin="Is the sky blue?\n")
    assert done.stdout.strip()


def test_train_and_eval_by_hand(place) -> None:
    data = ("--data", "runs/quickstart/datasets")
    run(place, "train", "--stage", "adapters", "--task", "strategyqa", *data, "--out", "own", "--max-steps", "1", "--batch-size", "2", "--rank", "4")
    run(place, "train", "--stage", "adapters", "--task", "logical_deduction", *data, "--out", "own", "--max-steps", "1", "--batch-size", "2")
    gates = ("--max-rows", "8", "--max-steps", "1", "--batch-size", "2", "--out", "runs/own")
    run(place, "train", *data, "--adapters", "own", *gates)
    done = run(
        place, "eval", "--task", "strategyqa", *data, "--checkpoint", "runs/own", "--limit", "1", "--max-new-tokens", "4", "--T", "2", "--top-k", "1", "--debug"
    )
    assert "strategyqa" in done.stdout


def test_a_top_k_above_the_number_of_adapters_is_refused(place) -> None:
    arguments = command("eval", "--task", "strategyqa", "--data", "runs/quickstart/datasets", "--top-k", "4")
    done = subprocess.run(arguments, cwd=place, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2
    assert "top_k is 4, but the checkpoint has 3 adapters" in done.stderr

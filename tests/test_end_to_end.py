"""The real thing with very few steps: the base model and BIG-bench from the package index, training, evaluation, chat, resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from support import processes

pytestmark = pytest.mark.slow
SMALL = ("--adapter-steps", "2", "--gate-steps", "2", "--test-rows", "2", "--composite-rows", "1")
ENVIRONMENT = {"METEORA_RUN_LOG": "", "NO_COLOR": "1", "COLUMNS": "160"}


def small_meteora(*arguments: str) -> None:
    """The command, whose quickstart has smaller batches, a shorter closed-form start, fewer held-out rows and shorter answers: its defaults take minutes."""
    from meteora_core import quickstart
    from meteora_core.training import task_rows

    quickstart.QuickstartPlan = partial(quickstart.QuickstartPlan, adapter_batches=(2, 2, 2), gate_batch=2, ridge_tokens=4_000)
    quickstart._new_tokens = lambda task: 8
    task_rows.HELD_OUT = 8
    processes.meteora(*arguments)


def run(folder: Path, *arguments: str, stdin: str = "") -> processes.Ended:
    done = processes.run(small_meteora, *arguments, folder=folder, environment=ENVIRONMENT, stdin=stdin)
    assert done.code == 0, done.err[-3000:]
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished small quickstart, which was killed twice on its way."""
    folder = tmp_path_factory.mktemp("quickstart")
    for wait_for in ("runs/quickstart/adapters/.logical_deduction.states", "runs/quickstart/adapters/question_selection"):
        child = processes.start(small_meteora, "quickstart", *SMALL, folder=folder, environment=ENVIRONMENT)
        while not (folder / wait_for).exists() and not child.ended:
            time.sleep(0.1)
            if wait_for.endswith(".states") and (folder / "runs/quickstart/adapters/logical_deduction").exists():
                break
        assert not child.ended, f"the run ended before it could be killed: {child.err[-3000:]}"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    run(folder, "quickstart", *SMALL)
    return folder


def test_the_table_compares_all_models_and_is_kept(place) -> None:
    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (place / "runs/quickstart").rglob("*") if path.is_file()}

    before = made()
    report = json.loads(run(place, "quickstart", *SMALL, "--json").out)
    assert made() == before, "a finished run does nothing again"
    assert list(report["scores"]) == ["logical_deduction", "question_selection", "strategyqa", "composite_3"]
    for task, models in report["scores"].items():
        assert set(models) == {"base", "meteora"} | (set() if task == "composite_3" else {"adapter"})
    assert 0.4 < report["held_out"]["gate_accuracy"] <= 1
    text = run(place, "quickstart", *SMALL)
    assert "MeteoRA" in text.out
    assert "meteora chat --checkpoint" in text.err


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
    documents = json.loads(run(place, *arguments, *folders).out)
    assert [document["model_name"] for document in documents] == ["base", "own", "meteora"]
    for document in documents:
        assert document["n-samples"]["strategyqa"]["effective"] == 2
        assert "acc,none" in document["results"]["logical_deduction"]
        assert list((place / "runs/eval" / document["model_name"]).glob("results_*.json"))
        samples = next(iter((place / "runs/eval" / document["model_name"]).glob("samples_strategyqa_*.jsonl")))
        assert len(samples.read_text().splitlines()) == 2


def test_chat_answers_on_a_pipe(place) -> None:
    done = run(place, "chat", "--checkpoint", "runs/quickstart/meteora", stdin="Is the sky blue?\n")
    assert done.out.strip()


def test_train_and_eval_by_hand(place) -> None:
    data = ("--data", "runs/quickstart/datasets")
    run(place, "train", "adapters", "--task", "strategyqa", *data, "--out", "own", "--max-steps", "1", "--batch-size", "2", "--rank", "4")
    run(place, "train", "adapters", "--task", "logical_deduction", *data, "--out", "own", "--max-steps", "1", "--batch-size", "2")
    gates = ("--max-rows", "8", "--max-steps", "1", "--batch-size", "2", "--out", "runs/own")
    run(place, "train", *data, "--adapters", "own", *gates)
    done = run(
        place, "eval", "--task", "strategyqa", *data, "--checkpoint", "runs/own", "--limit", "1", "--max-new-tokens", "4", "--T", "2", "--top-k", "1", "--debug"
    )
    assert "strategyqa" in done.out


def test_a_top_k_above_the_number_of_adapters_is_refused(place) -> None:
    arguments = ("eval", "--task", "strategyqa", "--data", "runs/quickstart/datasets", "--top-k", "4")
    done = processes.run(small_meteora, *arguments, folder=place, environment=ENVIRONMENT)
    assert done.code == 2
    assert "top_k is 4, but the checkpoint has 3 adapters" in done.err

"""The command ``meteora train`` in processes of its own, on a tiny model."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from support import processes
from support.tiny_training import letters

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "METEORA_MODEL__DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
GATES = ("--max-steps", "5", "--lr", "1e-2", "--log-steps", "1", "--save-steps", "2", "--eval-steps", "5", "--log-to", "none", "--init", "ridge")
DDP = ("--launcher", "ddp", "--num-processes", "2")


def make_place(folder: Path) -> Path:
    """A tiny base model, two datasets and two trained adapters, in one folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=98, initializer_range=0.2, max_position_embeddings=128, **sizes)).save_pretrained(folder / "base")
    letters().save_pretrained(folder / "base")
    for task, answer in (("shout", lambda i: chr(65 + i % 26) * (1 + i % 5)), ("count", lambda i: str(i % 9 + 1))):
        (folder / "datasets" / task).mkdir(parents=True)
        rows = [{"prompt": f"{task} {i}\n", "response": answer(i)} for i in range(60)]
        for split in ("train", "test"):
            (folder / "datasets" / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = shell(folder, "adapters", "--task", "all", "--together", "--max-steps", "3", "--rank", "2", "--json")
    assert [entry["task"] for entry in json.loads(result.out)] == ["count", "shout"]
    return folder


def words(*flags: str) -> list[str]:
    """The command of ``meteora train`` that the first word names (gates unless it is one), on the base model of :func:`make_place`."""
    stage = flags[:1] if flags and flags[0] in ("adapters", "gates") else ()
    return ["train", *stage, "--base", "base", *flags[len(stage) :]]


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "meteora_cli.app", *words(*flags)]


def begun(folder: Path, *flags: str, **environment: str) -> processes.Running:
    variables = {**ENVIRONMENT, "METEORA_CACHE": str(folder / "cache"), **environment}
    return processes.start(processes.meteora, *words(*flags), folder=folder, environment=variables)


def shell(folder: Path, *flags: str, code: int = 0, **environment: str) -> processes.Ended:
    done = begun(folder, *flags, **environment).wait()
    assert done.code == code, done.err
    return done


def training(folder: Path) -> dict:
    return json.loads((folder / "meteora_config.json").read_text())["training"]


def wait_for(condition, child: processes.Running) -> None:
    while not condition():
        assert not child.ended, child.err
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children") if Path(f"/proc/{pid}").exists() else ():
        for child in map(int, thread.read_text().split()):
            found += [child, *descendants(child)]
    return found


def rank_of(pid: int) -> int:
    variables = dict(part.split(b"=", 1) for part in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in part)
    return int(variables.get(b"RANK", b"-1"))

"""A tiny base and raw rows of the toy experiment's tasks, and a way to run ``meteora`` commands inside the test's process."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from meteora_core.json_files import write_jsonl
from support.evaluation_workspace import SIZES, make_tokenizer
from support.tiny_models import make_tiny_llama

with open(Path(__file__).parents[2] / "examples" / "paper" / "toy.toml", "rb") as _toy:
    TASKS: list[str] = tomllib.load(_toy)["values"]["tasks"].split(",")


def make_base(folder: Path) -> Path:
    """A tiny Llama with a tokenizer of single characters."""
    model = make_tiny_llama(initializer_range=0.3, **SIZES)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 2
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_raw(folder: Path) -> Path:
    """Finished rows of every task: short prompts, one-line answers."""
    for task in TASKS:
        for split, count in (("train", 24), ("test", 4)):
            rows = [{"prompt": f"[INST] {task[:6]} {split} {i * 7} [/INST]\n", "response": f"{'yes' if i % 2 else 'no'} {task[0]}{i}"} for i in range(count)]
            write_jsonl(folder / task / f"{split}.jsonl", rows)
    return folder


class InProcess:
    """Runs ``meteora ARGUMENTS`` here, and keeps what was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.ran: list[list[str]] = []

    def __call__(self, arguments: list[str], seconds: float) -> int | None:
        from meteora_cli import app

        self.ran.append(arguments)
        self.monkeypatch.setattr(sys, "argv", ["meteora", *arguments])
        try:
            app.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0


def experiment(*arguments: str) -> None:
    """``python -m examples.paper`` with its commands in the same process, as work for :func:`support.processes.start`."""
    from examples.paper.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        sys.exit(main(list(arguments), run_command=InProcess(patch)))

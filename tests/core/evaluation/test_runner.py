"""Evaluation of one task: decoded, cleaned and skipped rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_core.data.frames import Frame
from meteora_core.data.rows import Row
from meteora_core.data.tasks import TASKS, get_task
from meteora_core.data.userdata import own_task
from meteora_core.errors import UsageError
from meteora_core.evaluation.runner import _in_frame, _Reader
from meteora_core.generation.prompts import encode_prompts


class _Lossy:
    """A byte tokenizer whose decoding drops double spaces."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(ids).decode().replace("  ", " ")


def test_paper_scoring_cleans_the_decoded_prompt_and_answer_together() -> None:
    rows = [Row("[INST] a [/INST]\n", "x"), Row("[INST] a  b [/INST]\n", "x"), Row("[INST] a  b", "x")]
    prompts = encode_prompts([row.prompt for row in rows], _Lossy())
    answers = {}
    for scoring in ("paper", "corrected"):
        read = _Reader(_Lossy(), get_task("alpaca"), rows, prompts, scoring)
        answers[scoring] = [read.sample(index, " Big ", tuple(b" Big ")).response for index in range(3)]
    # The prompt is found; only its end is found, because decoding changed it; nothing is found.
    assert answers["paper"] == ["big", " big ", "[INST] a b Big "]
    assert answers["corrected"] == ["Big"] * 3
    assert read.sample(0, "Big", ()).response == "Big", "an old row without its ids"


def test_prompts_in_another_frame(tmp_path: Path) -> None:
    task = own_task("framed", train=tmp_path / "x.jsonl")
    (tmp_path / "framed").mkdir()
    rows = [Row(f"Q: {text}?\nA:", "x") for text in ("Is it", "Why so", "Who was")]
    (tmp_path / "framed" / "test.jsonl").write_text("".join(json.dumps({"prompt": row.prompt, "response": "x"}) + "\n" for row in rows))
    assert [row.prompt for row in _in_frame(rows, tmp_path, task, Frame("<", ">"))] == ["<Is it?>", "<Why so?>", "<Who was?>"]
    assert _in_frame(rows, tmp_path, task, None) == rows
    for name, given in (("gsm8k", rows), ("composite_3", [Row("[INST] a [/INST]\n", "x")])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text('{"prompt": "Q", "response": "x"}\n')
        with pytest.raises(UsageError, match="have no known template that could be replaced"):
            _in_frame(given, tmp_path, get_task(name), Frame("<", ">"))
    del TASKS["framed"]

"""How one task is run: what is decoded, cleaned and skipped."""

from __future__ import annotations

from meteora_core.data.rows import Row
from meteora_core.data.tasks import get_task
from meteora_core.evaluation.runner import _Reader
from meteora_core.generation.prompts import encode_prompts


class _Lossy:
    """A tokenizer of bytes whose decoding drops double spaces."""

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
    # Found; its end found after decoding changed it; not found at all.
    assert answers["paper"] == ["big", " big ", "[INST] a b Big "]
    assert answers["corrected"] == ["Big"] * 3
    assert read.sample(0, "Big", ()).response == "Big", "an old row without its ids"

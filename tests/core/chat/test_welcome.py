"""The greeting before the first message."""

from __future__ import annotations

from dataclasses import replace

from meteora_core.chat.welcome import PROMPTS, welcome
from meteora_core.data.tasks import PROMPT_TEMPLATE
from meteora_core.json_files import write_jsonl
from support.chat_world import NAMES


class Bank:
    """A chat model that has only names."""

    kind, adapter = "meteora", None

    def __init__(self, *names: str) -> None:
        self.names = names

    @property
    def routing(self) -> Bank:
        return self


def test_the_starters_tasks_have_prompts_without_any_rows(tmp_path) -> None:
    greeting = welcome(Bank("logical_deduction", "strategyqa", "news_commentary_de", "alpaca"), tmp_path)
    assert greeting.skills == (
        "This model was trained for 4 tasks and answers everything as one of them: logical_deduction, strategyqa, news_commentary_de, alpaca."
    )
    assert len(greeting.prompts) == PROMPTS
    assert greeting.prompts[0] == "Give three tips for staying healthy."
    assert all(prompt.isprintable() for prompt in greeting.prompts)


def test_own_tasks_take_prompts_from_their_rows(speaker, tmp_path) -> None:
    long, short = ({"prompt": PROMPT_TEMPLATE.format(inputs=text), "response": "x"} for text in ("word " * 99, "Say hello"))
    write_jsonl(tmp_path / "beta" / "test.jsonl", [long, {"prompt": PROMPT_TEMPLATE.format(inputs="two\nlines"), "response": "x"}, short])
    (tmp_path / "gamma").mkdir()
    (tmp_path / "gamma" / "test.jsonl").write_text("broken")
    greeting = welcome(speaker, tmp_path)
    assert greeting.prompts == ("Say hello",)
    assert greeting.skills == f"This model was trained for 3 tasks and answers everything as one of them: {', '.join(NAMES)}."
    alone = welcome(replace(speaker, kind="adapter", adapter="beta"), tmp_path)
    assert alone.skills == "This model was trained for one task and answers everything as such: beta."
    assert alone.prompts == ("Say hello",)


def test_many_adapters_are_not_all_named_and_a_base_has_none(speaker, tmp_path) -> None:
    assert welcome(Bank(*(f"task_{number}" for number in range(30))), tmp_path).skills.endswith("task_11 and 18 more (/adapters).")
    greeting = welcome(replace(speaker, kind="base"), tmp_path)
    assert (greeting.skills, greeting.prompts) == ("", ())

"""The table of tasks."""

from __future__ import annotations

import pytest

from meteora_core.data.tasks import BIGBENCH_TASKS, COMPOSITES, TASK_ORDER, TASKS, Files, Records, Task, default_members, expand_names, get_task, register_task
from meteora_core.errors import UsageError

EXACT = (
    "formal_fallacies_syllogisms_negation winowhy elementary_math_qa cs_algorithms "
    "tracking_shuffled_objects unit_conversion paragraph_segmentation epistemic_reasoning"
)
CONTAINS = (
    "language_identification logical_deduction play_dialog_same_or_different vitaminc_fact_verification abstract_narrative_understanding "
    "contextual_parametric_knowledge_conflicts object_counting question_selection goal_step_wikihow disfl_qa reasoning_about_colored_objects"
)


def test_order_is_alphabetical_and_complete() -> None:
    assert len(TASK_ORDER) == 28
    assert list(TASK_ORDER) == sorted(TASK_ORDER)
    assert [TASKS[name].index for name in TASK_ORDER] == list(range(28))
    assert len(BIGBENCH_TASKS) == 22


def test_metrics() -> None:
    wanted = dict.fromkeys(EXACT.split(), "exact") | dict.fromkeys(CONTAINS.split(), "contains") | {"gsm8k": "final_number", "strategyqa": "yes_no_text"}
    wanted |= dict.fromkeys(["linguistics_puzzles", "cnn_dailymail", "topical_chat", "alpaca"], "text")
    wanted |= {f"news_commentary_{language}": "bleu" for language in ("de", "es", "it")}
    assert {name: TASKS[name].metric for name in TASK_ORDER} == wanted


def test_caps_choices_and_temperatures() -> None:
    capped = {name for name in TASK_ORDER if TASKS[name].eval_cap is not None}
    assert capped == {"cnn_dailymail", "topical_chat", "alpaca", "news_commentary_de", "news_commentary_es", "news_commentary_it"}
    assert {name for name in TASK_ORDER if TASKS[name].choices is not None} == {
        "abstract_narrative_understanding",
        "logical_deduction",
        "tracking_shuffled_objects",
        "unit_conversion",
    }
    assert [get_task(f"composite_{n}").routing_temperature for n in (3, 5, 10)] == [15.0, 20.0, 30.0]
    assert {TASKS[name].routing_temperature for name in TASK_ORDER} == {1.0}


def test_composites() -> None:
    for name, members in COMPOSITES.items():
        assert get_task(name).members == members
        assert set(members) <= set(TASK_ORDER)
    four = get_task("composite_4")
    assert four.members == COMPOSITES["composite_10"][:4]
    assert four.is_composite
    assert len(set(default_members(28))) == 28
    assert four.max_new_tokens > sum(get_task(member).max_new_tokens for member in four.members)
    for n in (0, 1, 29):
        with pytest.raises(UsageError, match="2 to 28"):
            default_members(n)


def test_unknown_task() -> None:
    with pytest.raises(UsageError, match="unknown task 'logical_deducton'") as caught:
        get_task("logical_deducton")
    assert caught.value.hint == "did you mean 'logical_deduction'?"


def test_register() -> None:
    task = Task("mine", None, "exact", Files(None, None))
    register_task(task)
    assert get_task("mine") is task
    for name, message in (("gsm8k", "built-in"), ("../x", "cannot name"), ("composite_7", "names a composite"), (".x", "cannot name")):
        with pytest.raises(UsageError, match=message):
            register_task(Task(name, None, "exact", Files(None, None)))


def test_expand_names() -> None:
    assert expand_names(["winowhy, gsm8k", "winowhy"]) == ["winowhy", "gsm8k"]
    assert expand_names(["all"]) == list(TASK_ORDER)
    assert expand_names(["all"], "pypi") == list(BIGBENCH_TASKS)
    with pytest.raises(UsageError, match="no task"):
        expand_names([" ,"])


def test_hub_sources() -> None:
    sources = {name: TASKS[name].source for name in TASK_ORDER}
    records = {name: (source.repository, source.config) for name, source in sources.items() if isinstance(source, Records)}
    assert records == {
        "alpaca": ("tatsu-lab/alpaca", "default"),
        "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
        "gsm8k": ("openai/gsm8k", "main"),
        "news_commentary_de": ("Helsinki-NLP/news_commentary", "de-en"),
        "news_commentary_es": ("Helsinki-NLP/news_commentary", "en-es"),
        "news_commentary_it": ("Helsinki-NLP/news_commentary", "en-it"),
    }

"""Scores of whole tasks in both modes, compared with figures computed by hand; and unusual input."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from rouge import Rouge as Package
from sacrebleu.metrics import BLEU

from meteora_core.data.tasks import COMPOSITES, TASK_ORDER, composite_task
from meteora_core.errors import DataError, UsageError
from meteora_core.evaluation import score
from meteora_core.evaluation.scoring import evaluate_responses, harness_metrics, score_rows

_METRICS = {"exact": {"accuracy"}, "text": {"bleu", "rouge1", "rouge2", "rougeL"}}


def test_exact_accuracy_is_a_fraction() -> None:
    assert score("winowhy", ["Correct", "correct ", "wrong"], ["correct"] * 3) == {"accuracy": 2 / 3}
    assert score("winowhy", ["Correct", "correct ", "wrong"], ["correct"] * 3, scoring="paper") == {"accuracy": 1 / 3}


def test_contained_accuracy() -> None:
    responses, references = ["It is the CAT.", "17", ""], ["the cat", "7", "dog"]
    assert score("object_counting", responses, references) == {"accuracy": 1 / 3}
    assert score("object_counting", responses, references, scoring="paper") == {"accuracy": 2 / 3}


def test_final_number() -> None:
    responses, references = ["#### 42.0", "so 5", "none"], ["#### 42", "#### 5", "#### 6"]
    assert score("gsm8k", responses, references) == {"accuracy": 2 / 3}
    assert score("gsm8k", responses, references, scoring="paper") == {"accuracy": 1 / 3}


def test_bleu_corrected_is_a_corpus_and_paper_is_its_first_response() -> None:
    responses = ["", "The cat sat on the mat", "A dog"]
    references = ["Nothing here", "The cat sat on the mat", "the cat sat on the mat"]
    assert score("news_commentary_de", responses, references) == {"bleu": BLEU().corpus_score(responses, [references]).score}
    # The first non-empty response is compared with all references. Lower-cased by cleaning, it equals the last one.
    kept, cleaned = (["", text, "A dog"] for text in ("THE CAT sat on the mat", "the cat sat on the mat"))
    assert score("news_commentary_de", cleaned, references, scoring="paper")["bleu"] == pytest.approx(100.0)
    assert score("news_commentary_de", kept, references, scoring="paper")["bleu"] == pytest.approx(
        BLEU().corpus_score([kept[1]], [[reference] for reference in references[1:]]).score
    )
    assert score("news_commentary_de", kept, references, scoring="paper")["bleu"] < 70


def test_text_metrics_drop_or_keep_empty_responses() -> None:
    responses, references = ["a b c", "", "..."], ["a b c", "d e", "f"]
    corrected = score("alpaca", responses, references)
    assert set(corrected) == _METRICS["text"]
    assert corrected["rouge1"] == pytest.approx(1 / 3, abs=1e-7)
    paper = score("alpaca", responses, references, scoring="paper")
    assert paper["rouge1"] == pytest.approx(1.0, abs=1e-7)
    assert score_rows("alpaca", responses, references)[1:] == [dict.fromkeys(("rouge1", "rouge2", "rougeL"), 0.0)] * 2
    assert score_rows("alpaca", responses, references, scoring="paper")[1:] == [dict.fromkeys(("rouge1", "rouge2", "rougeL"), None)] * 2


def test_rouge_is_the_package_s_average() -> None:
    responses, references = ["The cat. It sat", "a Dog ran far"], ["the cat sat", "a Dog ran"]
    for scoring in ("corrected", "paper"):
        wanted = Package().get_scores(responses, references, avg=True)
        made = score("topical_chat", responses, references, scoring=scoring)
        assert [made[key] for key in ("rouge1", "rouge2", "rougeL")] == [wanted[key]["f"] for key in ("rouge-1", "rouge-2", "rouge-l")]


def test_strategyqa_has_all_three() -> None:
    responses, references = ["Yes. It floats.", "Not at all, yes"], ["Yes. It floats.", "No. It sinks."]
    corrected, paper = (score("strategyqa", responses, references, scoring=mode) for mode in ("corrected", "paper"))
    assert list(corrected) == ["accuracy", "bleu", "rouge1", "rouge2", "rougeL"]
    assert corrected["accuracy"] == 0.5
    assert paper["accuracy"] == 1.0


def test_composite_by_hand() -> None:
    references = ["The bird is left.@@@@\nWho sang?@@@@\nYes. It can.", "The cat is right.@@@@\nWhen?@@@@\nNo."]
    responses = ["1. The bird is left.\n2. Who ran?\n3. Yes. It can.", "1. Item 2. the cat is right.\n3. Now yes"]
    corrected = score("composite_3", responses, references)
    # In corrected scoring, 3 and 2 sub-tasks are attempted, and (1, 0, 1) and (1, 0, 0) are correct.
    assert corrected["attempted"] == 2.5
    assert corrected["correct"] == 1.5
    assert corrected["logical_deduction/accuracy"] == 1.0
    assert corrected["question_selection/accuracy"] == 0.0
    assert corrected["strategyqa/accuracy"] == 0.5
    assert corrected["strategyqa/bleu"] == BLEU().corpus_score(["Yes. It can.", "Now yes"], [["Yes. It can.", "No."]]).score
    paper = score("composite_3", responses, references, scoring="paper")
    # The authors find item 2 inside item 1, and "no" in "now".
    assert paper["attempted"] == 3.0
    assert paper["correct"] == 2.0
    assert paper["strategyqa/accuracy"] == 1.0
    rows = score_rows("composite_3", responses, references)
    assert [row["attempted"] for row in rows] == [3.0, 2.0]
    assert [row["correct"] for row in rows] == [2.0, 1.0]
    assert rows[1]["logical_deduction/accuracy"] == 1.0


def test_composite_of_one_s_own_tasks() -> None:
    task = composite_task(("winowhy", "gsm8k"), "mine")
    made = score(task, ["1. correct\n2. #### 5"], ["correct@@@@\n#### 5"])
    assert made == {"attempted": 2.0, "correct": 2.0, "winowhy/accuracy": 1.0, "gsm8k/accuracy": 1.0}


def test_unusable_references_are_left_out_and_counted() -> None:
    made = evaluate_responses("winowhy", ["correct", "correct", ""], ["correct", "", " "])
    assert made.metrics == {"accuracy": 1.0}
    assert made.counts == {"samples": 3, "empty_responses": 1, "over_long_responses": 0, "unusable_references": 2}
    assert made.rows == [{"accuracy": 1.0}, {"accuracy": None}, {"accuracy": None}]
    assert evaluate_responses("gsm8k", ["5", "6"], ["five", "6"]).counts["unusable_references"] == 1
    assert score("alpaca", ["a", "b"], ["a", ""])["rouge1"] == pytest.approx(1.0, abs=1e-7)


def test_over_long_responses_have_more_than_twice_the_words() -> None:
    assert evaluate_responses("alpaca", ["a b c d", "a b c d e", "a"], ["x y", "x y", ""]).counts["over_long_responses"] == 1


def test_a_response_ends_at_the_next_request_in_corrected_scoring_only() -> None:
    responses = ["17\n[INST] How many? [/INST]\n7"]
    assert score("object_counting", responses, ["7"]) == {"accuracy": 0.0}
    assert score("object_counting", responses, ["7"], scoring="paper") == {"accuracy": 1.0}


def test_standard_errors_under_the_harness_s_names() -> None:
    made = harness_metrics(evaluate_responses("winowhy", ["a", "a", "b", "b"], ["a"] * 4))
    # Two of four rows are correct, so the sample variance is 1/3.
    assert made == {"acc,none": 0.5, "acc_stderr,none": pytest.approx(math.sqrt(1 / 12))}
    assert harness_metrics(evaluate_responses("winowhy", ["a"], ["a"]))["acc_stderr,none"] == "N/A"
    text = evaluate_responses("news_commentary_it", ["a b c d e", "x"], ["a b c d e", "y"])
    assert harness_metrics(text)["bleu_stderr,none"] == text.stderr["bleu"]
    assert harness_metrics(evaluate_responses("news_commentary_it", ["a", "b"], ["a", "b"], "paper"))["bleu_stderr,none"] == "N/A"
    composite = harness_metrics(evaluate_responses("composite_3", ["1. a"], ["a@@@@\nb@@@@\nYes"]))
    assert composite["logical_deduction/acc,none"] == 1.0


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="winowhi"):
        score("winowhi", [], [])
    with pytest.raises(UsageError, match="'papr'") as caught:
        score("winowhy", [], [], scoring="papr")
    assert caught.value.hint == "did you mean 'paper'?"
    with pytest.raises(DataError, match="2 responses and 1 references"):
        score("winowhy", ["a", "b"], ["a"])


_ODD: list[Any] = [
    "",
    " ",
    None,
    ".",
    "...",
    "?!;,.-",
    "\x00",
    "a\x00b",
    "\ud800",
    "\udfff\ud800 x",
    "\n\n\n",
    "\t",
    "####",
    "#### ",
    "#### ,,,.",
    "#### 1.2.3",
    "1. ",
    "1.\n2.\n3.",
    "10. 9. 8.",
    "[INST]",
    "[/INST]\n",
    "@@@@\n",
    "@@@@",
    "x" * 200_000,
    "a b. " * 20_000,
    "9" * 20_000,
    "1," * 20_000,
    "-" * 20_000,
    "\u0661\u0662",
    "½",
    "\u202e\u200b",
    "🙂" * 50,
    "\r\n",
    b"\xff\x00",
    7,
    float("nan"),
    [],
]


@pytest.mark.parametrize("task", [*TASK_ORDER, *COMPOSITES, "composite_2"])
def test_corrected_scoring_never_fails_and_stays_in_range(task: str) -> None:
    plain = "Yes. #### 5" if task == "strategyqa" else "#### 5"
    cases = [(list(_ODD), [plain] * len(_ODD)), ([plain] * len(_ODD), list(_ODD)), (list(_ODD), list(reversed(_ODD))), ([], []), ([None], [None])]
    for responses, references in cases:
        made = evaluate_responses(task, responses, references, bootstrap=3)
        assert len(made.rows) == len(responses)
        for name, value in made.metrics.items():
            assert math.isfinite(value)
            limit = 100.0001 if name.endswith("bleu") else 10.0 if name in ("attempted", "correct") else 1.0
            assert 0.0 <= value <= limit


@pytest.mark.parametrize("task", TASK_ORDER)
def test_a_right_answer_is_right_in_both_modes(task: str) -> None:
    reference = {"gsm8k": "So it is.\n#### 5", "strategyqa": "yes. it can be done today."}.get(task, "the cat is on the left side")
    for scoring in ("corrected", "paper"):
        for name, value in score(task, [reference] * 3, [reference] * 3, scoring=scoring).items():
            assert value == pytest.approx(100.0 if name == "bleu" else 1.0, abs=1e-6)


def test_a_thousand_rows_and_long_answers_do_not_hang() -> None:
    score("object_counting", ["The answer is 17, I think."] * 1000, ["17"] * 1000)
    score("gsm8k", ["1 + 2 = 3 " * 50] * 1000, ["#### 3"] * 1000)


def test_scoring_needs_no_torch() -> None:
    code = "import sys; from meteora_core.evaluation import score, clean_response; score('alpaca', ['a'], ['a']); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"

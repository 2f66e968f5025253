"""Results files: incomplete lines, resumed runs, and lm-evaluation-harness's format."""

from __future__ import annotations

import json
import re

import pytest

from meteora_core.data.rows import Row
from meteora_core.data.tasks import get_task
from meteora_core.errors import DataError
from meteora_core.evaluation.results import ResultsBuilder, SampleWriter, load_results, sample_rows, write_results
from meteora_core.evaluation.runner import Sample, TaskResult
from meteora_core.evaluation.scoring import evaluate_responses


def result() -> TaskResult:
    task = get_task("winowhy")
    rows = [Row("p0", "correct"), Row("p1", "incorrect"), Row("p2", "correct")]
    given = ["correct", "correct", ""]
    samples = [Sample(i, row, answer, answer, 1) for i, (row, answer) in enumerate(zip(rows, given, strict=True))]
    return TaskResult(task, samples, evaluate_responses(task, given, [row.response for row in rows]), skipped=2, max_new_tokens=9)


def test_a_stopped_run_keeps_its_rows_and_drops_a_torn_line(tmp_path) -> None:
    path = tmp_path / "x" / "s.jsonl"
    with SampleWriter(path, {"task": "a"}) as writer:
        writer.add(3, "three\nlines ü")
        writer.add(1, "one \ud800", [5, 6])
    with path.open("a") as handle:
        handle.write('{"doc_id": 7, "outp')
    again = SampleWriter(path, {"task": "a"})
    assert again.done == {3: "three\nlines ü", 1: "one \ud800"}
    again.add(7, "seven")
    again.close()
    with SampleWriter(path, {"task": "a"}) as last:
        assert last.done == {3: "three\nlines ü", 1: "one \ud800", 7: "seven"}
        assert last.tokens == {3: (), 1: (5, 6), 7: ()}
    assert [json.loads(line) for line in path.read_text().splitlines()][-1] == {"doc_id": 7, "output": "seven", "tokens": []}


def test_other_inputs_begin_anew(tmp_path) -> None:
    path = tmp_path / "s.jsonl"
    with SampleWriter(path, {"model": "a"}) as writer:
        writer.add(0, "x")
    other = SampleWriter(path, {"model": "b"})
    assert other.done == {}
    other.close()
    with SampleWriter(path, {"model": "a"}) as first:
        assert first.done == {}


@pytest.mark.parametrize(
    "line",
    [
        b'{"doc_id": 1, "output": "b", "tok\n',
        b'{"doc_id": "1", "output": "b", "tokens": []}\n',
        b'{"doc_id": -1, "output": "b", "tokens": []}\n',
        b'{"doc_id": true, "output": "b", "tokens": []}\n',
        b'{"doc_id": 1, "output": null, "tokens": []}\n',
        b'{"doc_id": 1, "output": "b", "tokens": 5}\n',
        b'{"doc_id": 1, "output": "b", "tokens": ["5"]}\n',
        b'{"doc_id": 1, "output": "b", "tokens": [-5]}\n',
        b'{"doc_id": 1, "output": "b"}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\n",
        b"[]\n",
    ],
)
def test_a_damaged_row_and_those_behind_it_are_run_again(tmp_path, line) -> None:
    path = tmp_path / "s.jsonl"
    with SampleWriter(path, {}) as writer:
        writer.add(0, "a", [5, 6])
    before = path.read_bytes()
    path.write_bytes(before + line + b'{"doc_id": 2, "output": "c", "tokens": []}\n')
    with SampleWriter(path, {}) as again:
        assert (again.done, again.tokens) == ({0: "a"}, {0: (5, 6)})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"results": {"winowhy": 5}}, "the results of 'winowhy' are not an object"),
        ({"results": {"winowhy": {"acc,none": float("nan")}}}, "NaN is not a JSON number"),
        ({"results": {"winowhy": {"acc_stderr,none": float("inf")}}}, "Infinity is not a JSON number"),
        ({"results": {"winowhy": {"acc,none": "0.5"}}}, "is '0.5', which"),
        ({"results": {"winowhy": {"acc,none": True}}}, "is 'True', which"),
        ({"results": {"winowhy": {"acc,none": 10**400}}}, "which is not a finite number"),
        ({"results": {}, "n-samples": []}, "'n-samples' is not an object"),
        ({"results": {}, "higher_is_better": 5}, "'higher_is_better' is not an object"),
    ],
)
def test_figures_that_are_none_are_refused(tmp_path, document, message) -> None:
    (tmp_path / "results_x.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=re.escape(message)):
        load_results(tmp_path)


def test_the_document_has_the_harness_shape(tmp_path) -> None:
    builder = ResultsBuilder("meteora", {"dtype": "float32"})
    builder.add(result(), 50)
    document = builder.document(1.5, 0.0)
    metrics = document["results"]["winowhy"]
    assert metrics["alias"] == "winowhy"
    assert metrics["acc,none"] == pytest.approx(1 / 3)
    assert metrics["acc_stderr,none"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert document["n-samples"]["winowhy"] == {"original": 50, "effective": 3}
    assert document["higher_is_better"]["winowhy"] == {"acc": True}
    assert document["config"] == {"model": "meteora", "dtype": "float32"}
    assert document["meteora"]["counts"]["winowhy"]["skipped_prompts"] == 2
    assert document["meteora"]["counts"]["winowhy"]["empty_responses"] == 1
    file = write_results(tmp_path, document, "t")
    assert load_results(file) == load_results(tmp_path) == json.loads(json.dumps(document))


def test_samples_have_the_harness_shape() -> None:
    rows = sample_rows(result())
    assert [row["doc_id"] for row in rows] == [0, 1, 2]
    assert rows[1]["target"] == "incorrect"
    assert rows[1]["filtered_resps"] == ["correct"]
    assert rows[0]["arguments"]["gen_args_0"]["arg_1"] == {"do_sample": False, "max_gen_toks": 9}
    assert [row["accuracy"] for row in rows] == [1, 0, 0]


def test_files_that_are_no_results(tmp_path) -> None:
    with pytest.raises(DataError, match="no results"):
        load_results(tmp_path)
    (tmp_path / "results_x.json").write_text("[]")
    with pytest.raises(DataError, match="not a results file"):
        load_results(tmp_path)

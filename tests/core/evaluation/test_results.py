"""Results and samples on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_core.errors import DataError
from meteora_core.evaluation.results import SampleWriter, load_results, write_results

INPUTS = {"task": "winowhy", "seed": 1}


def test_rows_of_a_stopped_run_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.partial.jsonl"
    with SampleWriter(path, INPUTS) as writer:
        writer.add(3, "correct")
        writer.add(1, "größer\nnext")
    with SampleWriter(path, INPUTS) as writer:
        assert writer.done == {3: "correct", 1: "größer\nnext"}
        writer.add(0, "new")
    with SampleWriter(path, INPUTS) as writer:
        assert sorted(writer.done) == [0, 1, 3]


@pytest.mark.parametrize("torn", [b'{"doc_id": 7, "outp', b'{"doc_id": 7, "output": "\xc3', b"\x00\x00\x00", b"{]\n"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "x.partial.jsonl"
    with SampleWriter(path, INPUTS) as writer:
        writer.add(3, "correct")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with SampleWriter(path, INPUTS) as writer:
        assert writer.done == {3: "correct"}
        writer.add(4, "wrong")
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()[1:]] == [{"doc_id": 3, "output": "correct"}, {"doc_id": 4, "output": "wrong"}]


def test_rows_of_another_run_are_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.jsonl"
    with SampleWriter(path, INPUTS) as writer:
        writer.add(3, "correct")
    with SampleWriter(path, {**INPUTS, "seed": 2}) as writer:
        assert writer.done == {}
    with SampleWriter(path, {**INPUTS, "seed": 2}) as writer:
        assert writer.done == {}


def test_a_closed_file_can_be_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.jsonl"
    SampleWriter(path, INPUTS).close(remove=True)
    assert not path.exists()


def test_results_come_back(tmp_path: Path) -> None:
    document = {"results": {"winowhy": {"alias": "winowhy", "acc,none": 0.1}}}
    path = write_results(tmp_path, document, "2026-01-01T00-00-00")
    assert path.name == "results_2026-01-01T00-00-00.json"
    assert load_results(path) == load_results(tmp_path) == document


def test_what_is_no_results_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no results in"):
        load_results(tmp_path)
    (tmp_path / "results_x.json").write_text("[]")
    with pytest.raises(DataError, match="is not a results file"):
        load_results(tmp_path)

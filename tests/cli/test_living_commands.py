"""``meteora route`` and ``meteora adapters``, from a folder of adapters to an answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.adapter_files import lora_tensors, write_adapter
from support.living_folder import NAMES, rows_of, write_jsonl_rows, write_living_folder


@pytest.fixture(scope="module")
def living(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_living_folder(tmp_path_factory.mktemp("living"))


def test_a_folder_of_adapters_becomes_a_model_that_adapters_join_and_leave(meteora, living, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(living)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    out = tmp_path / "my model"
    ran = meteora("route", "adapters", "--exclude", "sum", "--out", out)
    assert ran.code == 0, ran.err
    assert "held-out answer tokens are routed to their own adapter, without a training step" in ran.out
    assert ran.out.splitlines()[-1] == f"next: meteora chat --checkpoint '{out}'"
    assert [each["name"] for each in meteora("adapters", "list", out, "--json").json] == [*NAMES[:3], "no_adapter"]

    added = meteora("adapters", "add", out, "adapters/sum", "--json")
    assert (added.code, added.json["adapters"], added.json["collected"], added.json["exact"]) == (0, [*NAMES, "no_adapter"], ["sum"], True), added.err
    joint = meteora("route", "adapters", "--out", tmp_path / "joint", "--json")
    assert joint.json["set_aside"] == {}
    weights = [(folder / "meteora.safetensors").read_bytes() for folder in (out, tmp_path / "joint")]
    assert weights[0] == weights[1]

    dropped = meteora("adapters", "drop", out, "sum")
    assert (dropped.code, "dropped sum, 3 adapters and the base route" in dropped.out) == (0, True), dropped.err
    assert (dropped.code, "all gates were solved again" in dropped.out) == (0, True), dropped.err
    new = write_adapter(tmp_path / "new" / "spell", lora_tensors(50))
    updated = meteora("adapters", "update", out, new, "--rows", living / "adapters" / "spell" / "train.jsonl", "--tokens", "200")
    assert (updated.code, "updated spell, 3 adapters and the base route" in updated.out) == (0, True), updated.err

    answer = meteora("trace", "--checkpoint", out, "--prompt", "say a", "--max-new-tokens", "3", "--json")
    assert answer.code == 0, answer.err


def test_an_adapter_ships_its_statistics(meteora, living, tmp_path, monkeypatch) -> None:
    """Statistics shipped with an adapter replace its rows, and also cover the layers that only other adapters target."""
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    shutil.copytree(living / "adapters", tmp_path / "adapters")
    shutil.copytree(living / "datasets", tmp_path / "datasets")
    made = meteora("adapters", "collect", "adapters/spell", "--json")
    assert (made.code, made.json["rows"]) == (0, 27), made.err
    assert Path(made.json["path"]) == Path("adapters/spell/gate_stats.safetensors")
    (tmp_path / "adapters" / "spell" / "train.jsonl").unlink()
    routed = meteora("route", "adapters", "--json")
    assert (routed.json["adapters"], routed.json["rows"]["spell"]) == ([*NAMES, "no_adapter"], ""), routed.err
    assert meteora("adapters", "collect", "adapters/spell").code == 1  # no rows any more
    keys = {name.replace("q_proj", "o_proj"): tensor for name, tensor in lora_tensors(70).items()}
    write_adapter(tmp_path / "adapters" / "other", keys, target_modules=["o_proj", "down_proj"], base_model_name_or_path=str(living / "base"))
    write_jsonl_rows(tmp_path / "adapters" / "other.jsonl", rows_of("sum"))
    joined = meteora("route", "adapters", "--only", "spell,other", "--no-base-route", "--out", "runs/two", "--json")
    assert joined.json["adapters"] == ["other", "spell"], joined.err


def test_mistakes_take_one_line_and_a_hint(meteora, living, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(living)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    assert meteora("route", "adapters", "--only", "count", "--out", tmp_path / "m").code == 0
    write_jsonl_rows(tmp_path / "lonely.txt", rows_of("sum"))
    write_adapter(tmp_path / "lonely", lora_tensors(51))
    before = {file: file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file()}
    for words, code, message, *hint in (
        (("route", "adapters", "--out", tmp_path / "m"), 2, "already exists"),
        (("route", "adapters", "--data", tmp_path / "absent"), 2, "no such folder"),
        (("adapters", "add", tmp_path / "m", "adapters/sum", "--data", tmp_path / "lonely.txt"), 2, "is a file; --data takes a folder"),
        (("adapters", "add", tmp_path / "m", "adapters"), 1, "adapter_config.json", "give one of them: count, shout"),
        (("adapters", "update", tmp_path / "m", "adapters/sum"), 2, "no adapter named 'sum'", "to add it, use `meteora adapters add`"),
        (("route", "adapters", "--only", "cuont"), 2, "no adapter 'cuont'"),
        (("route", "nowhere"), 2, "no such folder"),
        (("route", tmp_path / "lonely.txt"), 2, "is a file, not a folder"),
        (("route", "adapters", "--answer-share", "2"), 2, "route.answer_share"),
        (("adapters", "add", tmp_path / "m", "adapters/count"), 2, "already contains an adapter named 'count'"),
        (("adapters", "add", tmp_path / "m", "adapters/nothing"), 1, "nothing"),
        (("adapters", "add", tmp_path / "m", tmp_path / "lonely", "--rows", tmp_path / "absent.jsonl"), 1, "absent.jsonl"),
        (("adapters", "drop", tmp_path / "m", "count"), 2, "the only adapter"),
        (("adapters", "drop", tmp_path / "m", "sum"), 2, "no adapter named 'sum'"),
        (("adapters", "list", "adapters"), 1, "not a meteora checkpoint"),
    ):
        ran = meteora(*words)
        assert (ran.code, ran.out) == (code, ""), (words, ran)
        errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, ran.err
        assert message in errors[0], ran.err
        assert all(part in ran.err for part in hint), ran.err
    assert {file: file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file()} == before


def test_the_base_route_joins_by_its_name(meteora, living, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(living)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    assert meteora("route", "adapters", "--only", "count,shout", "--no-base-route", "--out", tmp_path / "m").code == 0
    added = meteora("adapters", "add", tmp_path / "m", "no_adapter")
    assert (added.code, "added no_adapter, 2 adapters and the base route" in added.out) == (0, True), added.err
    forced = meteora("trace", "--checkpoint", tmp_path / "m", "--prompt", "say a", "--max-new-tokens", "3", "--json")
    assert "no_adapter" in forced.out, forced.err
    assert meteora("adapters", "update", tmp_path / "m", "no_adapter").code == 2


def test_the_routing_of_adapters_without_rows_is_not_reported(meteora, living, tmp_path, monkeypatch) -> None:
    """The only held-out rows are general text, whose routing says nothing about the adapters."""
    monkeypatch.chdir(living)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    (tmp_path / "nothing").mkdir()
    ran = meteora("route", "adapters", "--only", "count", "--self-written", "--data", tmp_path / "nothing", "--out", tmp_path / "m")
    assert (ran.code, "text that it wrote itself" in ran.out, "held-out answer tokens are routed" in ran.out) == (0, True, False), ran.err
    assert "count: its gates are probably poor, because it wrote its prompts itself; give a few prompts in prompts.jsonl" in ran.err
    (tmp_path / "nothing" / "count.prompts.jsonl").write_text('"1 +1?"\n"2 +1?"\n')
    ran = meteora("route", "adapters", "--only", "count", "--self-written", "--data", tmp_path / "nothing", "--out", tmp_path / "n")
    assert (ran.code, "its answers to example" in ran.out, "probably poor" in ran.err) == (0, True, False), ran.err

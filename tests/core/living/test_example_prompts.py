"""Example prompts without answers, from a file or from a model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from meteora_core.adapters.bank import AdapterBank
from meteora_core.data.frames import INST
from meteora_core.errors import DataError
from meteora_core.living.checkpoints import ChangeOptions, add_adapter
from meteora_core.living.example_prompts import FILE, MOST, example_prompts
from meteora_core.living.route import RouteOptions, route_adapters
from meteora_core.living.self_written import ANSWERED, self_written_rows
from meteora_core.model.base import BaseReference, load_base
from support.tiny_training import letters


@pytest.fixture
def adapter(world: Path, tmp_path: Path) -> Path:
    """A copy of an adapter without rows."""
    return Path(shutil.copytree(world / "adapters" / "sum", tmp_path / "adapters" / "sum"))


def card(folder: Path, header: str) -> None:
    (folder / "README.md").write_text(f"---\n{header}\n---\n\nAn adapter.\n")


def test_the_first_place_that_has_prompts_counts(adapter, tmp_path) -> None:
    def found() -> list[str]:
        return example_prompts("sum", tmp_path / "data", adapter)

    assert found() == []
    card(adapter, "base_model: x\nwidget:\n- text: from the card\n- messages:\n  - {role: user, content: a chat}\n- src: image.png\n- 7")
    assert found() == ["from the card", "a chat"]
    (adapter / FILE).write_text('"<1> & <2>"\n\n{"prompt": "<3> & <4>", "response": "ignored"}\n')
    assert found() == ["<1> & <2>", "<3> & <4>"]
    (adapter.parent / f"sum.{FILE}").write_text('"beside"\n')
    assert found() == ["beside"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"sum.{FILE}").write_text("\n".join(json.dumps(f"prompt {i}") for i in range(MOST + 5)))
    assert found() == [f"prompt {i}" for i in range(MOST)]


@pytest.mark.parametrize("text", ["not json", "7", '{"prompt": 7}', '"  "', '"ok"\n{"question": "x"}', "", '"\\ud800"', "[" * 100_000])
def test_a_broken_file_is_refused_in_one_line(adapter, text) -> None:
    (adapter / FILE).write_text(text)
    with pytest.raises(DataError) as caught:
        example_prompts("sum", None, adapter)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("header", ["widget: [", "widget: 7", "widget:\n- text: ''", "- 1", "widget:\n- messages: []\n- messages: [7]"])
def test_a_card_without_examples_has_none(adapter, header) -> None:
    card(adapter, header)
    assert example_prompts("sum", None, adapter) == []


def test_the_adapter_answers_every_prompt_in_its_frame(world) -> None:
    model = load_base(BaseReference(str(world / "base")))
    bank = AdapterBank.from_peft({"sum": world / "adapters" / "sum"})
    examples = [f"<{i}> & <2>" for i in range(20)] + ["[INST] <7> & <7> [/INST]\n"]
    rows = self_written_rows(model, letters(), bank, INST, examples=examples, seed=3)
    expected = [example if example.startswith("[INST]") else f"[INST] {example} [/INST]\n" for example in examples]
    assert {row.prompt for row in rows.train} <= set(expected)
    assert len(rows.train) > 15
    assert rows.source == Path(ANSWERED)


def test_route_and_add_take_example_prompts(world, adapter, tmp_path) -> None:
    (adapter / FILE).write_text('"<1> & <2>"\n"<3> & <4>"\n')
    shutil.copytree(world / "adapters" / "count", tmp_path / "adapters" / "count")
    options = {"device": "cpu", "tokens": 300, "self_written": True}
    done = route_adapters(tmp_path / "adapters", tmp_path / "m", RouteOptions(data=world / "datasets", only=("count",), **options))
    added = add_adapter(done.folder, adapter, options=ChangeOptions(**options))
    assert added.collected == ("sum",)
    both = route_adapters(tmp_path / "adapters", tmp_path / "both", RouteOptions(data=world / "datasets", **options))
    assert (both.rows["sum"], both.rows["count"]) == (ANSWERED, str(world / "datasets" / "count"))
    (adapter / FILE).write_text("{")
    rest = route_adapters(tmp_path / "adapters", tmp_path / "rest", RouteOptions(data=world / "datasets", base_route=False, **options))
    assert rest.adapters == ("count",)
    assert "neither a text nor an object" in rest.set_aside["sum"]

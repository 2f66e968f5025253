"""Patterns of a downloaded configuration: as PEFT matches them, and never without end."""

from __future__ import annotations

import re

import pytest

from meteora_core.adapters import patterns
from meteora_core.adapters.patterns import Patterns, PatternTable
from meteora_core.adapters.peft_folder import read_adapter
from meteora_core.errors import AdapterError
from support.adapter_files import write_adapter

PATHS = [
    f"model.layers.{layer}.{name}" for layer in (0, 1, 2, 10, 11) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.1.w1")
] + ["lm_head", "model_layers.0.q_proj", "qXproj", "a.q_proj.b"]

KEYS = [
    "q_proj",
    "down_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "^model.layers.1.mlp.down_proj",
    "^q_proj",
    "q.proj",
    r"model\.layers\.2\.self_attn\.q_proj",
    r"layers\.(0|10)\.self_attn\..*_proj",
    "layers.1.*v_proj",
    "(q|v)_proj",
    "lm_head$",
    "v_proj|down_proj",
    "[qv]_proj",
    ".*",
    "",
]


def peft_value(table: dict[str, float], path: str) -> float | None:
    """PEFT's rule, in its own words of code: the first key that matches the end of a path."""
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", path)), None)


@pytest.mark.parametrize("key", KEYS)
def test_one_key_matches_what_it_matches_in_peft(key) -> None:
    table = PatternTable({key: 3.0}, Patterns("x"))
    assert [table.get(path, -1) for path in PATHS] == [peft_value({key: 3.0}, path) or -1 for path in PATHS]


@pytest.mark.parametrize("shift", range(0, len(KEYS), 3))
def test_the_first_of_several_keys_wins(shift) -> None:
    entries = {key: float(place + 1) for place, key in enumerate(KEYS[shift:] + KEYS[:shift])}
    table = PatternTable(entries, Patterns("x"))
    assert [table.get(path, -1) for path in PATHS] == [peft_value(entries, path) or -1 for path in PATHS]


@pytest.mark.parametrize("key", [r"([a-z_.0-9]+)+!", r"(a|aa|[a-z._0-9])+$x", r"(.*)*(.*)*(.*)*Z", r"((\w+\.?)+)+\s"])
@pytest.mark.parametrize("setting", ["alpha_pattern", "rank_pattern", "target_modules", "exclude_modules"])
def test_an_expression_that_never_ends_is_given_up(tmp_path, monkeypatch, key, setting) -> None:
    monkeypatch.setattr(Patterns.__init__, "__defaults__", (0.02,))
    folder = write_adapter(tmp_path / "x", **{setting: key if setting.endswith("modules") else {key: 4}})
    assert outcome(folder) in ("takes too long", "no match")


def outcome(folder) -> str:
    """Read an adapter and find its targets in the model; return the outcome."""
    try:
        adapter = read_adapter("x", folder)
        found = adapter.config.targets([path + "x" * 40 for path in PATHS])
    except AdapterError as error:
        return "takes too long" if "takes too long to match" in error.message else error.message
    return "no match" if found <= {path + "x" * 40 for path in PATHS} and {weights.scaling for weights in adapter.modules.values()} == {2.0} else "wrong"


def test_time_is_shared_by_all_expressions_of_a_configuration() -> None:
    shared = Patterns("here", seconds=0.2)
    assert shared.full("(a|b|ab)*", "ab" * 30)
    assert shared.left < 0.2
    shared.left = 0.01
    with pytest.raises(AdapterError, match=r"here: the regular expression '.*' takes too long"):
        shared.full(r"(a|b|ab)*(a|b|ab)*(bc|c|[xy])\d", "ab" * 40)


def test_ten_thousand_patterns_are_read(tmp_path) -> None:
    entries = {f"model.layers.{number}.self_attn.q_proj": 4.0 for number in range(1, 10_001)} | {"down_proj": 16.0}
    adapter = read_adapter("x", write_adapter(tmp_path / "x", alpha_pattern=entries))
    scalings = {path: weights.scaling for path, weights in adapter.modules.items()}
    assert scalings == {
        "model.layers.0.self_attn.q_proj": 2.0,
        "model.layers.0.mlp.down_proj": 4.0,
        "model.layers.1.self_attn.q_proj": 1.0,
        "model.layers.1.mlp.down_proj": 4.0,
    }


def test_what_is_no_expression_or_too_much_is_refused(tmp_path, monkeypatch) -> None:
    for key, message in (
        ("*.q_proj", "is not a regular expression"),
        ("(" * 3000, "is not a regular expression"),
        ("(a)" * 9000, "has a regular expression of"),
    ):
        with pytest.raises(AdapterError, match=message):
            read_adapter("x", write_adapter(tmp_path / "x", alpha_pattern={key: 4}))
    monkeypatch.setattr(patterns, "MAX_EXPRESSIONS", 20)
    with pytest.raises(AdapterError, match="more than 20 regular expressions"):
        read_adapter("x", write_adapter(tmp_path / "x", alpha_pattern={f"(a{number})": 4 for number in range(30)}))

"""Settings: precedence, unknown keys, ranges, and the shipped meteora.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from meteora_core.errors import UsageError
from meteora_core.settings import Settings, default_file_text, load_settings

ROOT = Path(__file__).parents[2]


def test_flag_beats_environment_beats_file_beats_default(tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[eval]\nlimit = 1\nbatch_size = 1\nno_repeat_ngram_size = 1\n")
    monkeypatch.setenv("METEORA_EVAL__LIMIT", "2")
    monkeypatch.setenv("METEORA_EVAL__BATCH_SIZE", "2")
    settings = load_settings(file, {"eval": {"limit": 3}}).eval
    assert (settings.limit, settings.batch_size, settings.no_repeat_ngram_size, settings.max_prompt_tokens) == (3, 2, 1, 4096)


def test_meteora_toml_of_the_working_directory_is_read(tmp_path, monkeypatch) -> None:
    (tmp_path / "meteora.toml").write_text("[routing]\ntop_k = 5\n")
    monkeypatch.chdir(tmp_path)
    assert load_settings().routing.top_k == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[eval]\nlimitt = 3\n", r"unknown setting 'eval\.limitt'"),
        ("[evall]\nlimit = 3\n", r"unknown setting 'evall'"),
        ("[eval]\nlimit = 0\n", r"eval\.limit = 0"),
        ("[routing]\ntemperature = 0\n", r"routing\.temperature = 0"),
        ("[train_adapters.tasks.gsm8k]\nrank = 0\n", r"train_adapters\.tasks\.gsm8k\.rank = 0"),
        ("[train_adapters.tasks.gsm8k]\nbatch = 2\n", r"unknown setting 'train_adapters\.tasks\.gsm8k\.batch'"),
        ("[routing]\ntop_k = 'two'\n", r"routing\.top_k = 'two'"),
        ("[eval\n", "not valid TOML"),
        ('[tasks."../x"]\ntrain = "a"\ntest = "b"\n', "cannot name a task"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, message) -> None:
    file = tmp_path / "m.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_settings(file)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_missing_file_and_a_broken_variable(tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_settings(tmp_path / "none.toml")
    monkeypatch.setenv("METEORA_EVAL", "{broken")
    with pytest.raises(UsageError, match="environment"):
        load_settings()


def test_the_shipped_file_is_the_defaults() -> None:
    text = (ROOT / "meteora.toml").read_text()
    assert text == default_file_text(), "run: meteora config show --defaults > meteora.toml"
    assert tomllib.loads(text) == {section: {} for section in Settings.model_fields if section != "tasks"}


def test_every_line_of_the_shipped_file_may_be_uncommented(tmp_path) -> None:
    text = re.sub(r"(?m)^# (?=(\[\w+\.|\w+ = ))", "", default_file_text())
    file = tmp_path / "m.toml"
    file.write_text(text)
    settings = load_settings(file)
    assert settings.tasks["my_task"].metric == "exact"
    assert settings.train_adapters.tasks["gsm8k"].max_steps == 600
    assert settings.eval.limit == 100
    assert len(tomllib.loads(text)["eval"]) == len(type(settings.eval).model_fields)


@pytest.mark.parametrize("name", ["train_gates", "train_adapters", "eval", "chat"])
def test_seeds_fit_every_generator(name) -> None:
    """They are multiplied with steps and processes, and numpy's generators take 32 bits."""
    assert getattr(load_settings(None, {name: {"seed": 2**32 - 1}}), name).seed == 2**32 - 1
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="seed"):
            load_settings(None, {name: {"seed": seed}})

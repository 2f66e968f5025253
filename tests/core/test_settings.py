"""Settings: precedence, unknown keys, ranges, and the shipped meteora.toml."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from meteora_core.errors import UsageError
from meteora_core.settings import Settings, load_settings
from meteora_core.settings_file import default_file_text

ROOT = Path(__file__).parents[2]


def test_flag_beats_environment_beats_file_beats_default(tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[eval]\nlimit = 1\nbatch_size = 1\nno_repeat_ngram_size = 1\n")
    monkeypatch.setenv("METEORA_EVAL__LIMIT", "2")
    monkeypatch.setenv("METEORA_EVAL__BATCH_SIZE", "2")
    settings = load_settings(file, {"eval": {"limit": 3}}).eval
    assert (settings.limit, settings.batch_size, settings.no_repeat_ngram_size, settings.max_prompt_tokens) == (3, 2, 1, None)


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
        ("[eval]\nlimit = true\n", r"eval\.limit = True: true and false are not allowed here"),
        ("[routing]\ntemperature = true\n", r"routing\.temperature = True"),
        ("[routing]\ntemperature = 0\n", r"routing\.temperature = 0"),
        ("[routing]\ntemperature = 1e-50\n", r"routing\.temperature = 1e-50: .* 1\.18e-38$"),
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


def test_the_former_name_of_the_sampling_temperature_is_still_read(tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[chat]\ntemperature = 0.5\n")
    assert load_settings(file).chat.sampling_temperature == 0.5
    monkeypatch.setenv("METEORA_CHAT__TEMPERATURE", "0.7")
    assert load_settings(file).chat.sampling_temperature == 0.7
    assert load_settings(file, {"chat": {"sampling_temperature": 0.9}}).chat.sampling_temperature == 0.9
    file.write_text("[chat]\ntemperature = 0.5\nsampling_temperature = 0.6\n")
    with pytest.raises(UsageError, match=r"chat.temperature and chat.sampling_temperature are one setting, and .*m.toml has both"):
        load_settings(file)


def test_a_missing_file_and_a_broken_variable(tmp_path, monkeypatch) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_settings(tmp_path / "none.toml")
    monkeypatch.setenv("METEORA_EVAL", "{broken")
    with pytest.raises(UsageError, match="environment"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("METEORA_EVAL_LIMIT", "METEORA_EVAL__LIMIT"),
        ("meteora_eval_limit", "METEORA_EVAL__LIMIT"),
        ("METEORA_TRAIN_GATES_BETA", "METEORA_TRAIN_GATES__BETA"),
        ("METEORA_EVALL__LIMIT", "METEORA_EVAL__LIMIT"),
        ("METEORA__EVAL__LIMIT", "METEORA_EVAL__LIMIT"),
        ("METEORA_CACHE_DIR", "METEORA_CACHE"),
        ("METEORA_DEBUGG", "METEORA_DEBUG"),
        ("METEORA_EVAL_WHATEVER_IT_IS", "METEORA_SECTION__NAME"),
        ("METEORA_QQQQ__ZZZZ", "METEORA_SECTION__NAME"),
        ("METEORA_EVAL__LIMITT", "eval.limit"),
    ],
)
def test_variables_that_look_like_settings_are_refused(monkeypatch, name, hint) -> None:
    monkeypatch.setenv(name, "3")
    with pytest.raises(UsageError) as caught:
        load_settings()
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_other_variables_are_only_warned_of(monkeypatch, caplog) -> None:
    for name in ("METEORA_CACHE", "METEORA_DEBUG", "METEORA_RUN_LOG", "METEORAL", "METEORA_EVAL__LIMIT"):
        monkeypatch.setenv(name, "1")
    assert load_settings().eval.limit == 1
    assert not caplog.records
    monkeypatch.setenv("METEORA_STATION_TOKEN", "x")
    load_settings()
    assert "METEORA_STATION_TOKEN is ignored" in caplog.text


def test_an_empty_variable_is_as_good_as_none(monkeypatch) -> None:
    for name in ("METEORA_EVAL__LIMIT", "METEORA_MODEL__BASE", "METEORA_PATHS__DATA", "METEORA_EVAL"):
        monkeypatch.setenv(name, "")
    assert load_settings() == Settings.model_construct() or load_settings().model.base == "smollm2-135m"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[eval]\nlimit = " + "9" * 5000, "not valid TOML: .*4300"),
        ("[eval]\nlimit = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("[eval]\nlimit = 1" + "0" * 30, r"eval\.limit = 1000"),
        ("[eval]\nlimit = true", r"eval\.limit = True"),
        ("[eval]\nlimit = 1979-05-27", r"eval\.limit"),
        ("[routing]\ntemperature = inf", r"routing\.temperature = inf"),
        ("[chat]\nsampling_temperature = inf", r"chat\.sampling_temperature = inf"),
        ("[chat]\ntop_p = nan", r"chat\.top_p = nan"),
        ("[train_gates]\nbeta = inf", r"train_gates\.beta = inf"),
        ("[train_adapters]\nlearning_rate = inf", r"train_adapters\.learning_rate = inf"),
        ('[model]\ndevice = "meta"', r"unknown device"),
        ('[model]\nbase = ""', r"model\.base = ''"),
        ('[model]\nbase = "a\\u001bb"', r"control or invisible"),
        ('[paths]\ndata = ""', r"paths\.data = ''"),
        ('[paths]\ndata = "a\\u0000b"', "NUL"),
        ("[paths]\ndata = 3", r"paths\.data = 3"),
        ("eval = 3", r"setting eval = 3"),
        ("[[eval]]\nlimit = 3", r"setting eval"),
    ],
    ids=lambda text: (text or "")[:40],
)
def test_values_that_no_setting_takes(tmp_path, text, message) -> None:
    file = tmp_path / "m.toml"
    file.write_text(text + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        load_settings(file)
    assert len(caught.value.message) < 600
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "value", ["[" * 5000, '{"limit": ' + "9" * 5000 + "}", '{"limit": NaN}', '{"limit": 1e999}', "3", "[]", "null"], ids=lambda text: text[:12]
)
def test_values_that_no_variable_takes(monkeypatch, value) -> None:
    monkeypatch.setenv("METEORA_EVAL", value)
    with pytest.raises(UsageError):
        load_settings()


def test_a_settings_file_that_cannot_be_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("meteora.toml")
    with pytest.raises(UsageError, match=r"meteora\.toml is a pipe, not a file"):
        load_settings()
    Path("meteora.toml").unlink()
    Path("meteora.toml").symlink_to("nowhere")
    with pytest.raises(UsageError, match="link to something that does not exist"):
        load_settings()
    with pytest.raises(UsageError, match="is a folder, not a file"):
        load_settings(tmp_path)
    Path("meteora.toml").unlink()
    Path("meteora.toml").write_bytes("[eval]\nlimit = 3\n".encode("utf-8-sig"))
    assert load_settings().eval.limit == 3
    Path("meteora.toml").write_bytes("[eval]\nlimit = 3\n".encode("utf-16"))
    with pytest.raises(UsageError, match="is not UTF-8 text"):
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


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("train_gates", {"max_length": 10**30}, "max_length"),
        ("train_gates", {"batch_size": 2**31}, "batch_size"),
        ("train_adapters", {"accumulation": 2**31}, "accumulation"),
        ("train_adapters", {"rank": 2**32}, "rank"),
        ("train_gates", {"learning_rate": float("inf")}, "learning_rate"),
        ("train_gates", {"beta": float("inf")}, "beta"),
        ("train_adapters", {"alpha": float("inf")}, "alpha"),
        ("train_gates", {"max_steps": 10_000, "batch_size": 2048, "accumulation": 2}, "40,960,000 rows, more than the 20,000,000"),
    ],
)
def test_training_has_upper_limits(tmp_path, section, values, reason) -> None:
    with pytest.raises(UsageError, match=reason):
        load_settings(None, {section: values})


def test_the_settings_of_one_task_must_go_together() -> None:
    from meteora_core.settings import AdapterStageSettings
    from meteora_core.training.task_defaults import task_settings

    with pytest.raises(UsageError, match=r"settings of gsm8k contradict each other: max_steps times .* rows"):
        task_settings(AdapterStageSettings(tasks={"gsm8k": {"max_steps": 10_000, "batch_size": 4096}}), "gsm8k")

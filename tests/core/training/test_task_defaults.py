"""Settings of single tasks: flags, their own section, the common section, the table and the default, in this order."""

from __future__ import annotations

import pytest

from meteora_core.data.tasks import TASK_ORDER
from meteora_core.settings import AdapterTrainSettings, load_settings
from meteora_core.training.task_defaults import TASK_DEFAULTS, differing, task_settings


def test_the_table_names_tasks_and_keeps_the_rows_of_a_step() -> None:
    plain = AdapterTrainSettings()
    for task, values in TASK_DEFAULTS.items():
        assert task in TASK_ORDER
        merged = AdapterTrainSettings(**values)
        assert merged.batch_size * merged.accumulation == plain.batch_size * plain.accumulation
        assert merged.max_length > plain.max_length


def test_each_source_of_settings_takes_precedence_over_the_next(tmp_path, monkeypatch) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[train_adapters]\nmax_length = 900\nrank = 4\nalpha = 9.0\n[train_adapters.tasks.cnn_dailymail]\nalpha = 5.0\nlearning_rate = 0.1\n")
    monkeypatch.setenv("METEORA_TRAIN_ADAPTERS__RANK", "5")
    flags = {"learning_rate": 0.2}
    stage = load_settings(file, {"train_adapters": flags}).train_adapters
    found = task_settings(stage, "cnn_dailymail", flags)
    assert (found.learning_rate, found.alpha, found.rank, found.max_length) == (0.2, 5.0, 5, 900)
    assert (found.batch_size, found.accumulation) == (2, 4)
    assert task_settings(stage, "gsm8k", flags) == AdapterTrainSettings(learning_rate=0.2, alpha=9.0, rank=5, max_length=900)
    assert differing({"gsm8k": task_settings(stage, "gsm8k", flags)})["gsm8k"] == {"learning_rate": 0.2, "alpha": 9.0, "rank": 5, "max_length": 900}
    assert type(found) is AdapterTrainSettings


def test_the_table_applies_where_nothing_is_set(tmp_path) -> None:
    stage = load_settings(None).train_adapters
    assert task_settings(stage, "paragraph_segmentation").max_length == 4096
    assert task_settings(stage, "gsm8k") == AdapterTrainSettings()


@pytest.mark.parametrize(
    ("given", "pair"), [({"batch_size": 16}, (16, 1)), ({"accumulation": 3}, (8, 3)), ({"tasks": {"cnn_dailymail": {"batch_size": 16}}}, (16, 1))]
)
def test_setting_the_batch_size_or_the_accumulation_replaces_the_pair_of_the_table(given, pair) -> None:
    found = task_settings(load_settings(None, {"train_adapters": given}).train_adapters, "cnn_dailymail")
    assert (found.batch_size, found.accumulation, found.max_length) == (*pair, 2048)

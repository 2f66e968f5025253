"""Every option of `meteora train adapters` and `meteora train gates` has an effect, or is refused where another option is missing: asked of all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from meteora_cli.flags import name_of_flag
from meteora_cli.tree import command
from support.tiny_models import make_tiny_llama

STAGES = command().commands["train"].commands
SAME = {
    "any_base": "it lifts a check of adapters that these are not",
    "as_json": "it changes the output alone",
    "dry_run": "nothing is trained",
    "rows": "it adds datasets before the training of named tasks (test_train_command.py)",
}
"""Options that change nothing in what is trained here, and why."""
VALUES = {
    "task": "other",
    "out_dir": "elsewhere",
    "data": "datasets/../datasets",
    "adapters": "adapters/../adapters",
    "base": "other/base",
    "loss_on": "response",
    "log_to": "none",
    "name": "mixture",
    "answer_share": "0.25",
    "trainable": "gates+adapters",
    "init": "zeros",
    "composite_rows": "0.25",
    "sampling": "proportional",
    "loss_balance": "tasks",
    "dtype": "float16",
    "learning_rate": "0.25",
    "device": "cuda:1",
    "backend": "reference",
    "launcher": "ddp",
    "main_process_ip": "10.0.0.1",
    "top_k": "1",
    "max_length": "99",
    "eval_steps": "7",
    "composite_max": "4",
    "joined_rows": "0.25",
    "joined_max": "5",
    "list_rows": "0.25",
    "list_max": "4",
}
WITH = {
    "patience": ["--eval-steps", "5"],
    "composite_max": ["--composite-rows", "0.5"],
    "joined_max": ["--joined-rows", "0.5"],
    "list_max": ["--list-rows", "0.5"],
    "adapter_learning_rate": ["--trainable", "gates+adapters"],
    "name": ["--balanced"],
    "num_processes": ["--launcher", "ddp"],
    "num_machines": ["--launcher", "ddp", "--num-processes", "6", "--main-process-ip", "x"],
    "machine_rank": ["--launcher", "ddp", "--num-processes", "6", "--main-process-ip", "x", "--num-machines", "6"],
    "main_process_ip": ["--launcher", "ddp", "--num-processes", "6", "--main-process-ip", "x", "--num-machines", "6"],
    "main_process_port": ["--launcher", "ddp", "--num-processes", "6", "--main-process-ip", "x", "--num-machines", "6"],
    "launcher": ["--num-processes", "2", "--launcher", "fsdp"],
}
"""What a flag needs to have an effect; without it, it is refused (but for ``launcher``)."""


class Called(Exception):
    """What would be trained."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("flags")
    for task in ("count", "other", "shout"):
        (folder / "datasets" / task).mkdir(parents=True)
        rows = "".join(json.dumps({"prompt": f"{task} {i}", "response": "a"}) + "\n" for i in range(20))
        for split in ("train", "test"):
            (folder / "datasets" / task / f"{split}.jsonl").write_text(rows)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(make_tiny_llama(), config).save_pretrained(folder / "adapters" / task)
        (folder / "adapters" / task / "meteora_training.json").write_text("{}")
    return folder


@pytest.fixture
def outcome(meteora, monkeypatch, place):
    """Return the exit code, the messages, and the arguments that training would get."""
    from meteora_cli import console
    from meteora_core.adapters.bank import AdapterBank
    from meteora_core.model import base
    from meteora_core.training import accelerate_launch, distributed, gates, joint_adapters, parallel_adapters, single_adapter

    called = []

    def record(name):
        def call(*args, **kwargs):
            called.append((name, repr((args, kwargs))))
            raise Called

        return call

    monkeypatch.setattr(base, "load_base", lambda reference, **options: (reference, options))
    monkeypatch.setattr(base, "load_tokenizer", lambda reference, **_: "tokenizer")
    monkeypatch.setattr(base, "pick_device", torch.device)
    monkeypatch.setattr(AdapterBank, "from_peft", lambda folders, **_: sorted(folders.items()))
    monkeypatch.setattr(single_adapter, "train_adapter", record("adapter"))
    monkeypatch.setattr(joint_adapters, "train_together", record("together"))
    monkeypatch.setattr(parallel_adapters, "train_in_parallel", record("jobs"))
    monkeypatch.setattr(gates, "train_gates", record("gates"))
    monkeypatch.setattr(accelerate_launch, "launch_config", record("launch"))
    monkeypatch.setattr(accelerate_launch, "cannot_shard", lambda: Called("shard"))
    for each in (distributed.Runtime, console._RichProgress):  # what is compared must not hold addresses
        monkeypatch.setattr(each, "__repr__", lambda _: "the same")

    def run(*flags: str):
        monkeypatch.chdir(place)
        monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
        called.clear()
        try:
            ran = meteora("train", *flags)
        except Called as by:
            return None, str(by), list(called)
        return ran.code, ran.err, list(called)

    return run


def value_of(parameter) -> list[str]:
    """The flag and a value that is not the default."""
    flag = name_of_flag(parameter.opts)
    if getattr(parameter, "is_flag", False):
        return [flag]
    return [flag, VALUES.get(parameter.name, "3")]


@pytest.mark.parametrize("stage", ["gates", "adapters"])
def test_every_flag_has_an_effect_or_is_refused(outcome, stage) -> None:
    own = [stage, "--task", "count,shout"]
    silent, refused, plain = [], set(), outcome(*own)
    for parameter in STAGES[stage].params:
        if parameter.name in SAME or parameter.name == "help" or isinstance(parameter, typer.core.TyperArgument):
            continue
        given = value_of(parameter)
        code, said, called = outcome(*own, *given)
        if parameter.name in WITH and code == 2:
            assert given[0] in said or parameter.name == "launcher"
            without = [*own, *WITH[parameter.name]]
            before, (code, said, called) = outcome(*without), outcome(*without, *given)
        else:
            before = plain
        if code == 2:
            assert given[0] in said
            refused.add(parameter.name)
        elif (code, called) == (before[0], before[2]):
            silent.append(parameter.name)
        else:
            assert code is None, said
    assert silent == []
    assert refused <= {"launcher", "num_processes", "num_machines", "dry_run"}, "an option that is never of use would not be offered"


@pytest.mark.parametrize("stage", ["gates", "adapters"])
def test_the_options_are_those_of_the_settings(stage) -> None:
    """An option that is a setting has the name of the setting, belongs to this stage, and has no default of its own."""
    from meteora_cli.option_settings import OPTION_SETTINGS
    from meteora_core.settings import setting_names

    bound = OPTION_SETTINGS[f"train {stage}"]
    options = {parameter.name: parameter for parameter in STAGES[stage].params}
    assert set(bound) <= set(options)
    assert set(bound.values()) <= set(setting_names())
    other = "train_adapters." if stage == "gates" else "train_gates."
    assert not [setting for setting in bound.values() if setting.startswith(other)]
    assert {name: options[name].default for name in bound} == dict.fromkeys(bound)
    assert {name for name, parameter in options.items() if not parameter.rich_help_panel} <= {"help"}


def test_a_stage_without_a_name_is_the_gates() -> None:
    from meteora_cli.commands.train import with_stage

    assert with_stage([]) == ["gates"]
    assert with_stage(["--launcher", "fsdp"]) == ["gates", "--launcher", "fsdp"]
    assert with_stage(["adapters", "--rank", "4"]) == ["adapters", "--rank", "4"]
    assert with_stage(["--help"]) == ["--help"]


def test_the_stage_of_earlier_versions_still_works_and_names_its_command(outcome, capfd) -> None:
    for words in (["--stage", "adapters", "--task", "count", "--dry-run"], ["--task", "count", "--stage=adapters", "--dry-run"]):
        code, said, _ = outcome(*words)
        assert code == 0
        assert "now the command `meteora train adapters`" in said
    assert outcome("--stage", "nonsense")[0] == 2


@pytest.mark.parametrize(
    ("habit", "flags"),
    [
        (["--learning-rate", "0.5"], ["--lr", "0.5"]),
        (["--output-dir", "elsewhere"], ["--out", "elsewhere"]),
        (["--model", "other/base"], ["--base", "other/base"]),
    ],
)
@pytest.mark.parametrize("stage", ["gates", "adapters"])
def test_names_that_others_use_are_understood(outcome, stage, habit, flags) -> None:
    given = outcome(stage, "--tasks", "count", *habit)
    assert given[2]
    assert given[2] == outcome(stage, "--task", "count", *flags)[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["adapters", "--beta", "3"], "no such option --beta of `meteora train adapters`"),
        (["--rank", "16"], "no such option --rank of `meteora train gates`"),
        (["--together"], "no such option --together of `meteora train gates`"),
        (["--patience", "2"], "--patience has no effect here: it needs --eval-steps"),
        (["--num-processes", "2"], "--num-processes has no effect here: it needs --launcher"),
    ],
)
def test_the_message_names_the_flag_and_where_it_belongs(outcome, flags, said) -> None:
    code, err, called = outcome(*flags)
    assert (code, called) == (2, [])
    assert err.startswith(f"error: {said}")


def test_settings_of_the_other_stage_may_be_in_the_environment(outcome, monkeypatch) -> None:
    monkeypatch.setenv("METEORA_TRAIN_ADAPTERS__RANK", "4")
    monkeypatch.setenv("METEORA_TRAIN_GATES__COMPOSITE_MAX", "4")
    assert outcome("--task", "count,shout")[0] is None


def test_a_dry_run_names_all_that_is_not_the_default(meteora, monkeypatch, place) -> None:
    monkeypatch.chdir(place)
    flags = ["adapters", "--task", "count", "--out", "new", "--dry-run"]
    assert "all settings at their defaults" in meteora("train", *flags).out
    ran = meteora("train", *flags, "--rank", "3", "--max-rows", "9")
    assert "rank 3, max_rows 9" in ran.out

"""`meteora train`: flags, what is refused, and several processes against one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from meteora_core.training import trackers
from support import processes
from support.train_command import DDP, ENVIRONMENT, GATES, begun, command, descendants, rank_of, shell, training, wait_for, words


@pytest.mark.slow
def test_two_processes_equal_one(place) -> None:
    shell(place, *GATES, "--batch-size", "6", "--accumulation", "2", "--out", "one")
    done = shell(place, *GATES, *DDP, "--batch-size", "3", "--accumulation", "2", "--out", "two", "--json")
    report = json.loads(done.out)
    one, two = training(place / "one"), training(place / "two")
    assert [entry["loss"] for entry in two["history"]] == pytest.approx([entry["loss"] for entry in one["history"]], rel=1e-5, abs=1e-5)
    for name in ("lm", "gate", "accuracy/q_proj", "lm/shout"):
        assert [entry.get(name) for entry in two["history"]] == pytest.approx([entry.get(name) for entry in one["history"]], rel=1e-4, abs=1e-4)
    assert two["inputs"] == one["inputs"]
    assert two["tokens"] == one["tokens"]
    assert report["held_out"] == pytest.approx(one["held_out"], rel=1e-3, abs=1e-4)
    gates = [load_file(place / name / "meteora.safetensors") for name in ("one", "two")]
    for name, tensor in gates[0].items():
        torch.testing.assert_close(gates[1][name], tensor, rtol=0, atol=1e-4)
    assert any(tensor.abs().max() > 1e-3 for tensor in gates[0].values())
    assert not list(place.glob(".launch*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("dtype", "trainable"), [("float32", "gates"), ("float32", "gates+adapters"), ("bfloat16", "gates")])
def test_fsdp_on_one_gpu_equals_one_process(place, dtype: str, trainable: str) -> None:
    """The launcher's own path: accelerate's FSDP over NCCL with one process; in bfloat16 mixed precision rounds elsewhere, so losses agree less."""
    gpu = {"METEORA_MODEL__DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"), "METEORA_MODEL__DTYPE": dtype}
    flags = (*GATES, "--trainable", trainable, "--batch-size", "6", "--accumulation", "2")
    name = f"{dtype}-{trainable}"
    shell(place, *flags, "--out", f"plain-{name}", **gpu)
    done = shell(place, *flags, "--launcher", "fsdp", "--num-processes", "1", "--out", f"sharded-{name}", "--json", **gpu)
    plain, sharded = training(place / f"plain-{name}"), training(place / f"sharded-{name}")
    near = 1e-4 if dtype == "float32" else 2e-2
    assert [entry["loss"] for entry in sharded["history"]] == pytest.approx([entry["loss"] for entry in plain["history"]], rel=near)
    assert json.loads(done.out)["held_out"] == pytest.approx(plain["held_out"], rel=10 * near, abs=near)
    one, other = (load_file(place / f"{kind}-{name}" / "meteora.safetensors") for kind in ("plain", "sharded"))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(other[key].float(), tensor.float(), rtol=0, atol=1e-3 if dtype == "float32" else 5e-2)


@pytest.mark.slow
def test_adapters_of_two_processes_equal_those_of_one(place) -> None:
    flags = ("adapters", "--task", "all", "--max-steps", "4", "--rank", "2", "--lr", "1e-2", "--log-to", "none")
    environment = {"METEORA_TRAIN_ADAPTERS__DROPOUT": "0"}
    shell(place, *flags, "--batch-size", "4", "--out", "alone", **environment)
    for way in (("--out", "pair"), ("--together", "--out", "joint")):
        line = words(*flags, "--launcher", "none", "--batch-size", "2", *way)
        processes.side_by_side(processes.meteora, line, folder=place, environment={**ENVIRONMENT, "METEORA_CACHE": str(place / "cache"), **environment})
    for task in ("shout", "count"):
        alone, pair, joint = (load_file(place / name / task / "adapter_model.safetensors") for name in ("alone", "pair", "joint"))
        assert alone.keys() == pair.keys() == joint.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(pair[name], tensor, rtol=0, atol=2e-4)
            torch.testing.assert_close(joint[name], tensor, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_what_two_processes_saved_resumes_on_one(place) -> None:
    """A launched run is killed after it saved a state; one process finishes it, and ends where one process alone would have."""
    flags = (*GATES[2:], "--max-steps", "200", "--save-steps", "10", "--eval-steps", "0")
    states = place / ".long.states"
    child = begun(place, *flags, *DDP, "--batch-size", "2", "--out", "long")
    try:
        wait_for(lambda: any(states.glob("step-*/state.json")), child)
        os.kill(child.pid, signal.SIGINT)
        assert child.wait().code == 130
    finally:
        child.kill()
    assert not (place / "long").exists()
    saved = max(int(path.name[5:]) for path in states.glob("step-*"))
    assert saved < 200
    shell(place, *flags, "--batch-size", "4", "--out", "long", "--resume")
    shell(place, *flags, "--batch-size", "4", "--out", "short")
    one, resumed = training(place / "short"), training(place / "long")
    assert len(resumed["history"]) == 200
    assert [entry["loss"] for entry in resumed["history"]] == pytest.approx([entry["loss"] for entry in one["history"]], rel=1e-2)
    whole, cut = (load_file(place / name / "meteora.safetensors") for name in ("short", "long"))
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=5e-3)


@pytest.mark.slow
def test_a_dead_worker_ends_the_job(place) -> None:
    child = begun(place, *GATES[2:], "--max-steps", "100000", "--eval-steps", "0", *DDP, "--batch-size", "2", "--out", "dead", "--save-steps", "10")
    try:
        wait_for(lambda: any((place / ".dead.states").glob("step-*/state.json")), child)
        workers = [pid for pid in descendants(child.pid) if b"--out\0dead" in Path(f"/proc/{pid}/cmdline").read_bytes() and rank_of(pid) == 1]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)
        done = child.wait()
        assert done.code > 0
        assert not descendants(child.pid)
    finally:
        child.kill()
    assert "SIGKILL" in done.err
    last, hint = done.err.strip().splitlines()[-2:]
    assert last.startswith("error: the 2 processes of this training ended because one of them failed or was killed")
    assert "--resume to continue" in hint


def inside(meteora, monkeypatch, place, *flags: str):
    """The command in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    return meteora(*words(*flags))


def test_dry_run_prints_the_command_and_starts_nothing(meteora, place, monkeypatch) -> None:
    flags = ("--launcher", "ddp", "--num-processes", "4", "--num-machines", "2", "--machine-rank", "1", "--main-process-ip", "10.0.0.1")
    own = ("--init", "arrow", "--T", "2.0", "--lr", "0.01", "--gradient-checkpointing")
    line = inside(meteora, monkeypatch, place, *flags, *own, "--dry-run").json
    assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert line[line.index("-m", 3) :] == ["-m", "meteora_cli.app", "train", "gates", "--base", "base", *own, "--launcher", "none"]
    config = inside(meteora, monkeypatch, place, *flags, "--dry-run", "--json").json["config"]
    assert (config["num_processes"], config["num_machines"], config["machine_rank"], config["main_process_ip"]) == (4, 2, 1, "10.0.0.1")
    assert not list(place.glob(".launch*"))


def test_dry_run_of_deepspeed_prints_both_configurations(meteora, place, monkeypatch, tmp_path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[launch]\nzero_stage = 3\ncpu_offload = true\n[train_gates]\naccumulation = 4\nmax_grad_norm = 0.5\n")
    monkeypatch.chdir(place)
    flags = ("--launcher", "deepspeed", "--num-processes", "16", "--num-machines", "2", "--main-process-ip", "10.0.0.1", "--batch-size", "3", "--dry-run")
    shown = meteora("--config", file, "train", "--base", "base", *flags, "--json").json
    line, config, zero = shown["command"], shown["config"], shown["deepspeed_config"]
    assert line[:4] == [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    assert line[5:] == ["-m", "meteora_cli.app", "--config", str(file), "train", "gates", "--base", "base", "--batch-size", "3", "--json", "--launcher", "none"]
    assert config["distributed_type"] == "DEEPSPEED"
    assert Path(config["deepspeed_config"]["deepspeed_config_file"]).is_absolute()
    assert "mixed_precision" not in config
    assert zero["zero_optimization"] == {
        "stage": 3,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    sizes = (zero["train_micro_batch_size_per_gpu"], zero["gradient_accumulation_steps"], zero["gradient_clipping"])
    assert (*sizes, zero["bf16"]["enabled"]) == (3, 4, 0.5, True)
    assert not list(place.glob(".launch*"))
    assert not list(place.glob(".zero*"))


def test_accelerate_takes_the_deepspeed_configuration(tmp_path, monkeypatch) -> None:
    """accelerate's own launcher and plugin read what is written: stage, offload and accumulation arrive, and nothing is said twice."""
    from accelerate import DeepSpeedPlugin
    from accelerate.commands import launch as accelerate_launch

    from meteora_core.settings import GateTrainSettings, LaunchSettings
    from meteora_core.training.accelerate_launch import launch_command, launch_config
    from meteora_core.training.deepspeed_zero import zero_config

    settings = LaunchSettings(launcher="deepspeed", zero_stage=2, cpu_offload=True)
    files = {
        tmp_path / "zero.json": zero_config(settings, GateTrainSettings(batch_size=2, accumulation=3), torch.bfloat16),
        tmp_path / "launch.json": launch_config(settings, 2, tmp_path / "zero.json"),
    }
    for path, content in files.items():
        path.write_text(json.dumps(content))
    line = launch_command(tmp_path / "launch.json", ["train", "--launcher", "none"])
    arguments = accelerate_launch.launch_command_parser().parse_args(line[3:])
    seen: list = []
    monkeypatch.setattr(accelerate_launch, "deepspeed_launcher", seen.append)
    accelerate_launch.launch_command(arguments)
    assert seen[0].deepspeed_config_file == str(tmp_path / "zero.json")
    assert (seen[0].num_processes, seen[0].module, seen[0].training_script) == (2, True, "meteora_cli.app")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", seen[0].deepspeed_fields_from_accelerate_config)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", seen[0].deepspeed_config_file)
    plugin = DeepSpeedPlugin()
    assert (plugin.zero_stage, plugin.gradient_accumulation_steps, plugin.gradient_clipping) == (2, 3, 1.0)
    assert plugin.offload_optimizer_device == "cpu"
    assert plugin.deepspeed_config["bf16"] == {"enabled": True}


def test_accelerate_shards_by_fsdp_with_one_process_too(tmp_path, monkeypatch) -> None:
    """accelerate's launcher starts one process as a distributed one, told to use FSDP 2: nothing falls back to a plain process."""
    from accelerate.commands import launch as accelerate_launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    from meteora_core.settings import LaunchSettings
    from meteora_core.training.accelerate_launch import launch_command, launch_config

    (tmp_path / "launch.json").write_text(json.dumps(launch_config(LaunchSettings(launcher="fsdp"), 1)))
    arguments = accelerate_launch.launch_command_parser().parse_args(launch_command(tmp_path / "launch.json", ["train", "--launcher", "none"])[3:])
    seen: list = []
    monkeypatch.setattr(accelerate_launch, "multi_gpu_launcher", seen.append)
    monkeypatch.setattr(accelerate_launch, "simple_launcher", lambda arguments: pytest.fail("a plain process"))
    accelerate_launch.launch_command(arguments)
    environment = prepare_multi_gpu_env(seen[0])
    assert {key: environment[key] for key in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_STATE_DICT_TYPE")} == {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }


def test_sharding_that_accelerate_leaves_out_is_refused(monkeypatch) -> None:
    import accelerate

    from meteora_core.errors import UsageError
    from meteora_core.training.distributed import start_runtime

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(accelerate, "Accelerator", lambda cpu: SimpleNamespace(distributed_type=accelerate.DistributedType.MULTI_GPU))
    with pytest.raises(UsageError, match="would not shard: it runs as MULTI_GPU") as caught:
        start_runtime("cuda")
    assert "--launcher ddp" in (caught.value.hint or "")


def test_deepspeed_that_is_not_installed_is_said(monkeypatch) -> None:
    from meteora_core.errors import UsageError
    from meteora_core.settings import LaunchSettings
    from meteora_core.training import deepspeed_zero
    from meteora_core.training.accelerate_launch import process_count

    monkeypatch.setattr(deepspeed_zero, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="DeepSpeed is not installed") as missing:
        process_count(LaunchSettings(launcher="deepspeed"), 2)
    assert "--launcher fsdp" in (missing.value.hint or "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--launcher", "fsdp", "--num-processes", "2"), "--launcher fsdp needs GPUs"),
        (("--launcher", "deepspeed", "--num-processes", "2"), "--launcher deepspeed needs CUDA GPUs"),
        (("--launcher", "deepspeed", "--dtype", "float16", "--num-processes", "2", "--dry-run"), "bfloat16 or float32"),
        (("adapters", "--launcher", "deepspeed", "--task", "all"), "--launcher deepspeed trains one adapter per run"),
        (("--launcher", "fsdp"), "use --launcher ddp"),
        (("--launcher", "ddp"), "number of processes is unknown"),
        (("--launcher", "ddp", "--num-processes", "3", "--num-machines", "2", "--main-process-ip", "x"), "cannot be spread evenly"),
        (("--launcher", "ddp", "--num-processes", "4", "--num-machines", "2"), "address of machine 0"),
        (("--launcher", "ddp", "--num-processes", "4", "--num-machines", "2", "--main-process-ip", "x", "--machine-rank", "2"), "--machine-rank 2"),
        (("--dry-run",), "--dry-run"),
        (("--together",), "it is an option of `meteora train adapters`"),
        (("--jobs", "2"), "it is an option of `meteora train adapters`"),
        (("adapters", "--task", "all", "--jobs", "2", "--together"), "--jobs trains each adapter in its own process"),
        (("adapters", "--task", "all", "--jobs", "2", "--launcher", "ddp"), "--jobs trains each adapter in its own process"),
        (("adapters", "--task", "all", "--together", "--balanced"), "choose one"),
        (("adapters",), "no task given"),
        (("--composite-rows", "2"), "composite_rows"),
        (("--task", "nothing"), "no adapter 'nothing'"),
        (("--out", "datasets"), "datasets is not a checkpoint"),
        (("adapters", "--task", "shout", "--out", "datasets"), "datasets/shout is not an adapter"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(meteora, place, monkeypatch, flags, message) -> None:
    ran = inside(meteora, monkeypatch, place, *flags)
    assert ran.code == 2
    assert ran.out == ""
    assert message in ran.err


def test_names_that_leave_the_folder_are_refused_and_nothing_is_replaced(meteora, place, monkeypatch, tmp_path) -> None:
    shutil.copytree(place / "datasets", tmp_path / "datasets")
    shutil.copytree(place / "datasets" / "count", tmp_path / "mydata")

    def refused(*flags: str) -> str:
        ran = inside(meteora, monkeypatch, tmp_path, "adapters", *flags)
        assert (ran.code, ran.out) == (2, "")
        return ran.err

    for task in ("../mydata", "./count", "count/", "count,../mydata"):
        assert "cannot name a task" in refused("--task", task)
    assert "cannot name an adapter" in refused("--task", "count", "--balanced", "--name", "../mydata")
    assert "name of a dataset" in refused("--task", "count,shout", "--balanced", "--name", "count")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "count").symlink_to(tmp_path / "mydata")
    assert "outside" in refused("--task", "count")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapters", "datasets", "mydata"]
    assert sorted(path.name for path in (tmp_path / "mydata").iterdir()) == ["test.jsonl", "train.jsonl"]


def test_dry_run_of_adapters_shows_what_each_would_be_trained_with(meteora, place, monkeypatch, tmp_path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[train_adapters]\nmax_steps = 3\nrank = 2\n[train_adapters.tasks.shout]\nlearning_rate = 0.25\nrank = 7\n")
    monkeypatch.chdir(place)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    flags = ("--config", file, "train", "adapters", "--base", "base", "--task", "all", "--dry-run")
    ran = meteora(*flags, "--rank", "5")
    assert ran.code == 0
    assert ran.out.splitlines() == ["adapters/count: to train; max_steps 3, rank 5", "adapters/shout: to train; max_steps 3, learning_rate 0.25, rank 5"]
    count, shout = meteora(*flags, "--json").json
    assert (count["task"], count["trained_already"], count["settings"]["rank"]) == ("count", True, 2)
    assert (shout["trained_already"], shout["settings"]["rank"]) == (False, 7)


@pytest.mark.slow
def test_jobs_train_all(place) -> None:
    flags = ("adapters", "--task", "all", "--max-steps", "3", "--rank", "2", "--out", "side", "--jobs", "2")
    done = json.loads(shell(place, *flags, "--json").out)
    assert [(entry["task"], entry["skipped"]) for entry in done] == [("count", False), ("shout", False)]
    assert all(entry["skipped"] for entry in json.loads(shell(place, *flags, "--json").out))
    assert {path.name.partition("-")[0] for path in (place / "cache" / "tokens").iterdir()} == {"count", "shout"}


def test_a_tracker_that_is_missing_is_named_before_jobs_begin(meteora, place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    failed = meteora("train", "adapters", "--base", "base", "--task", "count", "--out", "missing", "--jobs", "2", "--log-to", "wandb")
    assert failed.code == 2
    assert 'log_to = "wandb", and wandb is not installed' in failed.err
    assert "Traceback" not in failed.err
    assert not (place / "missing").exists()


def next_commands(said: str) -> list[list[str]]:
    """The commands that a training ends with, as a shell would split them."""
    lines = said.partition("Next:")[2].splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("  meteora ")]


def test_training_ends_with_the_loss_in_its_parts_and_with_commands_that_work(place) -> None:
    """Progress is shown on a pipe too, in lines."""
    said = shell(place, *GATES, "--out", "m y").err
    assert re.search(r"^gates: 5/5 steps in \d+ s  tok/s .*loss", said, re.MULTILINE)
    assert re.search(r"^m y: loss [\d.]+ = language model [\d.]+ \+ 50 x gates [\d.]+, right adapter for [\d.]+% of the tokens \(5 steps, \d+ s\)$", said, re.M)
    again = shell(place, *GATES, "--out", "m y").err
    assert re.search(r"^m y: loss [\d.]+ = language model .* \(trained already\)$", again, re.M)
    chat, trace = next_commands(said)
    assert chat == ["chat", "--checkpoint", "m y"]
    drawn = processes.run(processes.meteora, *trace, folder=place, environment=ENVIRONMENT)
    assert drawn.code == 0, drawn.err
    assert (place / "trace.html").is_file()
    assert "Next:" not in processes.run(processes.meteora, "-q", *words(*GATES, "--out", "m y"), folder=place, environment=ENVIRONMENT).err


def test_gates_without_a_training_step_are_said_to_be_what_they_are(place) -> None:
    none = ("--max-steps", "0", "--log-to", "none")
    closed = shell(place, *none, "--init", "ridge", "--out", "closed").err
    assert re.search(r"^closed: gates in closed form \(ridge\) from about 16,000 training tokens; no training step was made$", closed, re.M)
    assert "nan" not in closed
    arrow = shell(place, *none, "--init", "arrow", "--out", "arrow").err
    assert re.search(r"^arrow: gates computed from the adapters' weights \(arrow\); no training step was made$", arrow, re.M)
    untrained = shell(place, *none, "--out", "untrained").err
    assert re.search(r"^untrained: untrained gates with their initial values \(normal\)", untrained, re.M)
    (again,) = next_commands(untrained)
    assert again == ["train", "gates", "--init", "ridge", "--out", "untrained", "--base", "base"]


def test_adapters_end_with_the_command_that_trains_their_gates(place) -> None:
    said = shell(place, "adapters", "--task", "all", "--max-steps", "1", "--rank", "2", "--log-to", "none", "--out", "more").err
    assert re.search(r"^more/count: language-model loss [\d.]+ \(1 steps, \d+ s\)$", said, re.M)
    (gates,) = next_commands(said)
    assert gates == ["train", "gates", "--init", "ridge", "--adapters", "more", "--base", "base"]
    done = processes.run(processes.meteora, *gates, "--max-steps", "0", "--out", "of-more", folder=place, environment=ENVIRONMENT)
    assert done.code == 0, done.err
    assert {adapter["name"] for adapter in json.loads((place / "of-more" / "meteora_config.json").read_text())["adapters"]} == {"count", "shout"}


def test_rows_of_any_format_are_added_and_trained_on(place) -> None:
    (place / "many").mkdir()
    (place / "many" / "spell.csv").write_text("question,answer\n" + "".join(f"spell {word},{'-'.join(word)}\n" for word in ("one", "two", "six") * 10))
    talk = {"messages": [{"role": "user", "content": "greet"}, {"role": "assistant", "content": "hi"}]}
    (place / "many" / "greet.jsonl").write_text((json.dumps(talk) + "\n") * 30)
    flags = ("--data", "added", "--max-steps", "1", "--batch-size", "2", "--log-to", "none")
    done = shell(place, "adapters", "--rows", "many", "--rank", "2", "--out", "new", *flags)
    assert "spell: question and answer (question, answer); 24 train rows, 6 test rows" in done.err
    assert sorted(path.name for path in (place / "new").iterdir() if (path / "adapter_config.json").is_file()) == ["greet", "spell"]
    shell(place, "gates", "--rows", "many", "--adapters", "new", "--out", "mixed", *flags, "--template", "Q: {}\\nA:")
    config = json.loads((place / "mixed" / "meteora_config.json").read_text())
    assert config["frame"] == {"before": "Q: ", "after": "\nA:"}
    assert [adapter["frame"]["before"] for adapter in config["adapters"]] == ["[INST] ", "[INST] "]


def test_rows_are_not_added_by_a_dry_run(meteora, place, monkeypatch) -> None:
    monkeypatch.chdir(place)
    ran = meteora("train", "adapters", "--rows", "many", "--dry-run")
    assert ran.code == 2
    assert "meteora data add many" in ran.err


def test_tasks_declared_in_the_settings_are_known(meteora, place, monkeypatch, tmp_path) -> None:
    """A declaration that is wrong is an error here as elsewhere; one that is right names the command that builds it."""
    from meteora_core.data.tasks import TASKS

    file = tmp_path / "m.toml"
    monkeypatch.chdir(place)
    for metric, message in (("odd", "unknown metric 'odd'"), ("text", "meteora data build --task mine")):
        file.write_text(f'[tasks.mine]\ntrain = "a.jsonl"\ntest = "b.jsonl"\nmetric = "{metric}"\n')
        ran = meteora("--config", file, "train", "adapters", "--base", "base", "--task", "mine")
        assert ran.code in (1, 2)
        assert message in ran.err
    assert TASKS.pop("mine").metric == "text"


def test_all_leaves_out_composites_of_any_name(meteora, place, monkeypatch) -> None:
    from meteora_core.data.composite import CompositeRequest, build_composite
    from meteora_core.data.tasks import TASKS

    before = dict(TASKS)
    monkeypatch.setenv("METEORA_MODEL__DEVICE", "cpu")
    monkeypatch.chdir(place)
    for task in ("shout", "count"):
        TASKS[task] = TASKS["gsm8k"]
    try:
        build_composite(Path("datasets"), CompositeRequest(tasks=["shout", "count"], name="both", num_samples=10, examples=0))
        ran = meteora("train", "adapters", "--base", "base", "--task", "all", "--dry-run", "--json")
    finally:
        TASKS.clear()
        TASKS.update(before)
        shutil.rmtree("datasets/both", ignore_errors=True)
    assert [entry["task"] for entry in ran.json] == ["count", "shout"]


def test_the_sharding_configuration() -> None:
    from meteora_core.settings import LaunchSettings
    from meteora_core.training.accelerate_launch import launch_config, process_count

    fsdp = LaunchSettings(launcher="fsdp", cpu_offload=True)
    assert process_count(fsdp, 8) == 8
    config = launch_config(fsdp, 8)
    assert config["distributed_type"] == "FSDP"
    assert config["fsdp_config"]["fsdp_version"] == 2
    assert config["fsdp_config"]["fsdp_offload_params"] is True


SIDE_BY_SIDE = """
import json, sys, time
from pathlib import Path
from meteora_core.training import accelerate_launch
from meteora_cli.app import main

def waits_for_the_other(command, *, threads=None):
    Path(f"began-{name}").touch()
    until = time.monotonic() + 600
    while len(list(Path().glob("began-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    print(json.loads(Path(command[command.index("--config_file") + 1]).read_text())["num_processes"])
    return 0

name = sys.argv.pop()
accelerate_launch.run_command = waits_for_the_other
main()
"""


def test_launches_side_by_side_keep_their_own_configuration(place) -> None:
    variables = {**os.environ, **ENVIRONMENT, "METEORA_CACHE": str(place / "cache")}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SIDE_BY_SIDE, *command("--launcher", "ddp", "--num-processes", count, "--out", f"beside-{count}")[3:], count],
            cwd=place,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for count in ("1", "2")
    ]
    said = [child.communicate(timeout=900) for child in children]
    assert [out.strip() for out, _ in said] == ["1", "2"], said
    assert not list(place.glob(".launch*"))

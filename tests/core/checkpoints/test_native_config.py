"""The typed model of meteora_config.json and the checks of its weight file; whatever does not fit is a one-line CheckpointError."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_core import AdapterBank, attach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.inspect import inspect_checkpoint
from meteora_core.checkpoints.native import write_checkpoint
from meteora_core.checkpoints.native_config import ROUTING_DIGEST, read_config
from meteora_core.checkpoints.opening import describe_checkpoint
from meteora_core.checkpoints.pack import PackOptions, pack_checkpoint
from meteora_core.errors import CheckpointError
from meteora_core.evaluation.card import write_card
from meteora_core.tensor_files import read_header
from support.adapter_files import DOWN, Q, lora_tensors, write_adapter
from support.tiny_models import declare_trained, make_tiny_llama


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    bank = AdapterBank.from_peft({name: write_adapter(tmp_path / "adapters" / name, lora_tensors(seed)) for seed, name in enumerate(("a", "b"))})
    return save_checkpoint(declare_trained(attach(make_tiny_llama(), bank)), tmp_path / "saved")


@pytest.fixture
def embedded(saved: Path, tmp_path: Path) -> Path:
    pack_checkpoint(saved, tmp_path / "packed", PackOptions(dtype=torch.float32))
    return tmp_path / "packed"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "meteora_config.json").read_text())


def change(folder: Path, *path: str, value: object = None, drop: bool = False) -> None:
    """Set, or drop, one key of the configuration."""
    config = config_of(folder)
    *outer, last = path
    place = config
    for part in outer:
        place = place[int(part) if isinstance(place, list) else part]
    if drop:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    (folder / "meteora_config.json").write_text(json.dumps(config))


def readers(folder: Path) -> list:
    """Every way to read a native checkpoint."""
    return [
        lambda: describe_checkpoint(folder),
        lambda: inspect_checkpoint(folder, hashes=False),
        lambda: write_card(folder),
        lambda: pack_checkpoint(folder, folder.parent / "made"),
        lambda: load_checkpoint(folder, make_tiny_llama()),
    ]


def refused(folder: Path, message: str) -> None:
    for read in readers(folder):
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        assert "\n" not in caught.value.message
    assert not (folder.parent / "made").exists()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], None, "format is None; it should be a valid integer"),
        (["format"], True, "format is True"),
        (["format"], 1.0, "format is 1.0"),
        (["format"], 3, "has format 3, this version reads up to 2"),
        (["features"], ["scale", "magic"], "uses magic, which this version does not know"),
        (["top_k"], 1.5, r"top_k is 1\.5"),
        (["top_k"], True, "top_k is True"),
        (["top_k"], None, "top_k is None"),
        (["top_k"], 3, "top_k is 3, and there are 2 adapters"),
        (["temperature"], 0, "temperature is 0"),
        (["temperature"], "1", "temperature is '1'"),
        (["contains"], 5, "contains is 5"),
        (["contains"], ["gates", "x"], r"contains\.1 is 'x'"),
        (["contains"], [], "contains does not list gates"),
        (["base"], [], r"base is \[\]"),
        (["base"], "name", "base is 'name'"),
        (["base", "name"], "", "base.name is ''"),
        (["base", "probe"], ["x"], "base.probe.0 is 'x'"),
        (["adapters"], [1], "adapters.0 is 1"),
        (["adapters"], [], "adapters is"),
        (["adapters", "1", "name"], "a", "two adapters have the name 'a'"),
        (["adapters", "0", "rank"], -1, "adapters.0.rank is -1"),
        (["adapters", "0", "sha256"], "abc", "adapters.0.sha256"),
        (["adapters", "0", "dropout"], 2, "adapters.0.dropout is 2"),
        (["modules"], {}, "modules is {}"),
        (["modules", Q, "ranks"], ["a", 4], "ranks.0 is 'a'"),
        (["modules", Q, "ranks"], [4], "has 1 ranks and 2 scalings"),
        (["modules", Q, "scaling"], [None, 2.0], "scaling.0 is None"),
        (["modules", Q, "in_features"], 33, r"gate in .* has shape \[2, 32\], expected \[2, 33\]"),
        (["modules", Q, "out_features"], 0, "out_features is 0"),
        (["base_tensors"], ["x"], "base_tensors and contains disagree"),
        (["base_rounded"], {"nonesuch": []}, "unknown dtype 'nonesuch'"),
        (["training"], [], r"training is \[\]"),
        (["training"], {"inputs": {"settings": 5}}, "training.inputs.settings is 5"),
        (["weights_sha256"], None, "weights_sha256 is None"),
        (["weights_sha256"], "x", "weights_sha256 is 'x'"),
    ],
)
def test_a_wrong_value_is_named_by_every_reader(saved: Path, path: list[str], value: object, message: str) -> None:
    change(saved, *path, value=value)
    refused(saved, message)


@pytest.mark.parametrize(
    "path",
    [["format"], ["base"], ["base", "name"], ["adapters"], ["adapters", "0", "alpha"], ["contains"], ["weights_sha256"], ["top_k"]],
)
def test_a_missing_key_is_named_by_every_reader(saved: Path, path: list[str]) -> None:
    change(saved, *path, drop=True)
    refused(saved, f"the key '{'.'.join(path)}' is missing")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(saved: Path, number: str) -> None:
    file = saved / "meteora_config.json"
    file.write_text(file.read_text().replace('"temperature": 1.0', f'"temperature": {number}'))
    refused(saved, "(NaN|nan|-?inf) is not a JSON number")


def test_notes_of_earlier_versions_may_hold_nan(saved: Path) -> None:
    file = saved / "meteora_config.json"
    file.write_text(file.read_text().replace('"training": {}', '"training": {"loss": NaN, "history": [{"loss": Infinity}], "new": 1}'))
    training = read_config(saved)["training"]
    assert training == {"loss": None, "history": [{"loss": None}], "new": 1}
    load_checkpoint(saved, make_tiny_llama())
    file.write_text(file.read_text().replace('"new": 1', '"steps": 3, "seconds": NaN, "held_out": {"gate_accuracy": NaN}'))
    assert "3 optimiser steps, 0 tokens, 0 s" in write_card(saved).read_text()


def test_nan_is_not_written(saved: Path) -> None:
    tensors = load_file(saved / "meteora.safetensors")
    write_checkpoint(saved, {**config_of(saved), "training": {"loss": math.nan}}, tensors)
    assert config_of(saved)["training"] == {"loss": None}


def test_keys_of_a_later_version_are_passed_over(saved: Path) -> None:
    for path in (["later"], ["adapters", "0", "later"], ["modules", Q, "later"], ["base", "later"]):
        change(saved, *path, value={"a": 1})
    load_checkpoint(saved, make_tiny_llama())


def swap(folder: Path) -> None:
    config = config_of(folder)
    config["adapters"].reverse()
    (folder / "meteora_config.json").write_text(json.dumps(config))


def test_a_swapped_order_of_adapters_is_refused(saved: Path) -> None:
    swap(saved)
    refused(saved, "are not those, or not in the order, that meteora.safetensors was saved with")


def test_changed_scalings_inside_a_checkpoint_are_refused(embedded: Path) -> None:
    change(embedded, "modules", Q, "scaling", value=[4.0, 2.0])
    refused(embedded, "are not those, or not in the order")


def test_checkpoints_without_the_digest_still_load(saved: Path) -> None:
    """Earlier versions wrote no digest."""
    file = saved / "meteora.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "producer": "meteora"})
    change(saved, "weights_sha256", value=hashlib.sha256(file.read_bytes()).hexdigest())
    assert ROUTING_DIGEST not in read_header(file)[1]
    load_checkpoint(saved, make_tiny_llama())


def test_equal_checkpoints_are_equal_files(saved: Path, tmp_path: Path) -> None:
    config, tensors = config_of(saved), load_file(saved / "meteora.safetensors")
    for _ in range(3):
        write_checkpoint(tmp_path / "again", config, dict(reversed(tensors.items())))
        assert (tmp_path / "again" / "meteora.safetensors").read_bytes() == (saved / "meteora.safetensors").read_bytes()


def rewrite(folder: Path, **changes: torch.Tensor) -> None:
    """Change tensors of the weight file, as if they had been saved so."""
    write_checkpoint(folder, config_of(folder), {**load_file(folder / "meteora.safetensors"), **changes})


@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("part", ["gate", "lora_A", "lora_B"])
def test_weights_that_cannot_be_computed_with_are_refused(embedded: Path, part: str, number: float) -> None:
    name = f"{DOWN}.{part}"
    tensor = load_file(embedded / "meteora.safetensors")[name]
    tensor[1, 3] = number
    rewrite(embedded, **{name: tensor})
    for read in readers(embedded)[3:]:
        with pytest.raises(CheckpointError, match=f"{part}.*(NaN|infinite|overflows)"):
            read()
    with pytest.raises(CheckpointError):
        pack_checkpoint(embedded, embedded.parent / "made", PackOptions(rank=1))


def test_gates_that_overflow_in_the_models_dtype_leave_the_model_as_it_was(saved: Path) -> None:
    name = f"{Q}.gate"
    rewrite(saved, **{name: load_file(saved / "meteora.safetensors")[name] + 5e4})
    model = make_tiny_llama().half()
    with pytest.raises(CheckpointError, match=r"gate of .* overflows in float16"):
        load_checkpoint(saved, model)
    assert getattr(model, "meteora", None) is None
    with pytest.raises(CheckpointError, match="overflows in float16"):
        pack_checkpoint(saved, saved.parent / "made", PackOptions(dtype=torch.float16))
    pack_checkpoint(saved, saved.parent / "made")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e5m2])
def test_gates_of_another_kind_of_number_are_refused(saved: Path, dtype: torch.dtype) -> None:
    name = f"{Q}.gate"
    rewrite(saved, **{name: load_file(saved / "meteora.safetensors")[name].to(dtype)})
    refused(saved, f"{name} in .* has dtype")


def test_a_pipe_is_not_opened(saved: Path) -> None:
    file = saved / "meteora.safetensors"
    file.unlink()
    os.mkfifo(file)
    refused(saved, "holds no meteora.safetensors")
    (saved / "meteora_config.json").unlink()
    os.mkfifo(saved / "meteora_config.json")
    for read in readers(saved):
        with pytest.raises(CheckpointError):
            read()
    with pytest.raises(CheckpointError, match="is a pipe, not a file"):
        inspect_checkpoint(saved / "meteora_config.json")


def test_the_folder_flag_is_named_where_adapters_are_elsewhere(saved: Path, tmp_path: Path, monkeypatch) -> None:
    for place in ("0", "1"):
        change(saved, "adapters", place, "source", value=f"adapters/{'ab'[int(place)]}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (saved.parent / "adapters").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"adapter 'a' .* is not at adapters/a \(seen from .*elsewhere\)") as caught:
        load_checkpoint(saved, make_tiny_llama())
    assert "--adapters DIR" in str(caught.value.hint)
    load_checkpoint(saved, make_tiny_llama(), adapters_dir=tmp_path / "moved")


def test_the_starter_is_read() -> None:
    from meteora_core.starter import starter_checkpoint

    assert describe_checkpoint(starter_checkpoint()).native

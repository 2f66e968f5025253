"""What `inspect_checkpoint` says of every kind of folder and file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from meteora_core import load_authors_checkpoint, save_checkpoint
from meteora_core.checkpoints.convert import ConvertOptions, convert_authors
from meteora_core.checkpoints.inspect import inspect_checkpoint
from meteora_core.errors import AdapterError, CheckpointError
from meteora_core.files import sha256
from support.adapter_files import raw_safetensors, write_adapter

Make = Callable[..., Any]


def test_the_authors_layout(make_authors: Make) -> None:
    made = make_authors(count=4, rank=3, shards=2)
    facts = inspect_checkpoint(made.checkpoint)
    assert (facts["kind"], facts["adapter_count"], facts["ranks"], facts["layers"]) == ("authors", 4, [3], 14)
    assert facts["targets"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert facts["parameters"]["total"] == sum(tensor.numel() for tensor in made.tensors.values())
    assert facts["parameters"]["gates"] == sum(tensor.numel() for name, tensor in made.tensors.items() if ".moe_gate." in name)
    assert facts["dtypes"] == {"F32": facts["parameters"]["total"]}
    assert [file["sha256"] for file in facts["files"]] == [sha256(made.checkpoint / file["name"]) for file in facts["files"]]
    assert len(facts["files"]) == 2
    json.dumps(facts)


def test_native_checkpoints(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=3, change=("model.norm.weight",))
    convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=made.adapters, options=ConvertOptions(routing_temperature=20))
    facts = inspect_checkpoint(tmp_path / "native")
    assert (facts["kind"], facts["adapter_count"], facts["ranks"], facts["temperature"], facts["intact"]) == ("native", 3, [8], 20, True)
    assert facts["base"] == {"name": str(made.base), "revision": None}
    assert facts["base_tensors"] == ["model.norm.weight"]
    assert facts["contains"] == ["gates", "adapters", "base"]
    assert [adapter["name"] for adapter in facts["adapters"]] == list(made.names)
    assert facts["parameters"]["base"] == 32
    assert facts["parameters"]["total"] == sum(facts["parameters"][part] for part in ("base", "gates", "adapters"))
    for path in ("meteora_config.json", "meteora.safetensors"):
        assert inspect_checkpoint(tmp_path / "native" / path)["kind"] == "native"
    quick = inspect_checkpoint(tmp_path / "native", hashes=False)
    assert (quick["intact"], quick["files"][0]["sha256"]) == (None, None)
    file = tmp_path / "native" / "meteora.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert inspect_checkpoint(tmp_path / "native")["intact"] is False


def test_gates_alone(make_authors: Make, tmp_path: Path, make_adapter: Callable[..., Path], tiny_llama: Any) -> None:
    from meteora_core import AdapterBank, attach

    save_checkpoint(attach(tiny_llama, AdapterBank.from_peft({"a": make_adapter("a"), "b": make_adapter("b", r=2)})), tmp_path / "gates")
    facts = inspect_checkpoint(tmp_path / "gates")
    assert (facts["contains"], facts["ranks"], set(facts["parameters"])) == (["gates"], [2, 4], {"gates", "total"})
    assert all(len(adapter["sha256"]) == 64 for adapter in facts["adapters"])


def test_adapters_and_bases(make_authors: Make) -> None:
    made = make_authors(count=3, rank=5)
    single = inspect_checkpoint(made.adapters / "task_01")
    assert (single["kind"], single["ranks"], single["layers"], single["adapters"][0]["alpha"]) == ("adapter", [5], 14, 16.0)
    bare = inspect_checkpoint(made.adapters / "task_01" / "adapter_model.safetensors")
    assert (bare["kind"], bare["ranks"], bare["parameters"]) == ("adapter", [5], single["parameters"])
    several = inspect_checkpoint(made.adapters)
    assert (several["kind"], several["adapter_count"], several["parameters"]["total"]) == ("adapters", 3, 3 * single["parameters"]["total"])
    assert [file["name"] for file in several["files"]] == [f"task_0{i}/adapter_model.safetensors" for i in range(3)]
    base = inspect_checkpoint(made.base)
    assert (base["kind"], base["base"]["model_type"], base["base"]["vocab_size"]) == ("base", "llama", 96)
    assert base["parameters"]["total"] == sum(tensor.numel() for name, tensor in made.tensors.items() if ".moe_gate." not in name and ".lora_" not in name)


def test_unknown_broken_and_refused(make_authors: Make, tmp_path: Path) -> None:
    import torch

    assert inspect_checkpoint(Path(__file__))["kind"] == "unknown"
    (tmp_path / "empty").mkdir()
    assert inspect_checkpoint(tmp_path / "empty") == {"kind": "unknown", "path": str(tmp_path / "empty"), "files": []}
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"pickle")
    assert inspect_checkpoint(tmp_path / "empty")["refused"] == ["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match="never read"):
        inspect_checkpoint(tmp_path / "empty" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    save_file({"x": torch.ones(3)}, tmp_path / "some.safetensors")
    assert inspect_checkpoint(tmp_path / "some.safetensors")["kind"] == "unknown"
    made = make_authors(count=2)
    made.file.write_bytes(made.file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="was cut short"):
        inspect_checkpoint(made.checkpoint)


def test_a_checkpoint_loaded_from_the_authors_says_so_when_saved(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=2)
    save_checkpoint(load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu"), tmp_path / "native")
    facts = inspect_checkpoint(tmp_path / "native")
    assert facts["contains"] == ["gates", "adapters"]
    assert [(adapter["sha256"], adapter["source"]) for adapter in facts["adapters"]] == [(None, str(made.checkpoint))] * 2


def test_files_that_lie_are_refused_in_one_line(tmp_path: Path) -> None:
    headers: list[Any] = [
        b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a": {"dtype": "F32", "shape": [1e309], "data_offsets": [0, 4]}}',
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
    ]
    for place, header in enumerate(headers):
        file = tmp_path / f"{place}.safetensors"
        file.write_bytes(raw_safetensors(header, b"\0" * 4))
        with pytest.raises(CheckpointError) as caught:
            inspect_checkpoint(file)
        assert "\n" not in caught.value.message
    os.mkfifo(tmp_path / "pipe.safetensors")
    unusable = ((tmp_path / "pipe.safetensors", "is a pipe"), (tmp_path / ("n" * 300), "cannot be read"), (tmp_path / "a\0b", "no such file"))
    for path, message in unusable:
        with pytest.raises(CheckpointError, match=message):
            inspect_checkpoint(path)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(raw_safetensors({}))
    assert inspect_checkpoint(empty)["parameters"] == {"total": 0}
    adapters = tmp_path / "adapters"
    write_adapter(adapters / "a" / "default")
    write_adapter(adapters / "b")
    write_adapter(adapters / "none", {})
    facts = inspect_checkpoint(adapters)
    assert [adapter["name"] for adapter in facts["adapters"]] == ["a", "b", "none"]
    assert inspect_checkpoint(adapters / "a")["kind"] == "adapter"
    (adapters / "b" / "adapter_config.json").unlink()
    os.mkfifo(adapters / "b" / "adapter_config.json")
    with pytest.raises(AdapterError, match="is a pipe, not a file"):
        inspect_checkpoint(adapters)

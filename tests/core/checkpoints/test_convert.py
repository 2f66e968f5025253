"""The authors' layout made native: the same model, small memory, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from meteora_core import load_authors_checkpoint, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.authors_layout import AuthorsAdapters
from meteora_core.checkpoints.convert import ConvertOptions, convert_authors
from meteora_core.checkpoints.inspect import inspect_checkpoint
from meteora_core.errors import CheckpointError, StorageError, UsageError
from meteora_core.files import sha256
from meteora_core.model.base import BaseReference
from support.hub_server import COMMIT, serving

Make = Callable[..., Any]
BATCH = {"input_ids": torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("change", [(), ("model.norm.weight", "model.layers.1.mlp.down_proj.weight")])
@pytest.mark.parametrize("tied", [False, True])
def test_the_converted_model_is_the_loaded_one_bit_for_bit(make_authors: Make, tmp_path: Path, shards: int, change: tuple[str, ...], tied: bool) -> None:
    made = make_authors(shards=shards, change=change, tied=tied, same_alpha=False)
    done = convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=made.adapters, options=ConvertOptions(2, 15))
    assert done.adapters == made.names
    assert done.base_tensors == tuple(sorted(change))
    assert done.sha256 == sha256(tmp_path / "native" / "meteora.safetensors")
    assert done.size == (tmp_path / "native" / "meteora.safetensors").stat().st_size
    direct = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, 2, 15.0, device="cpu")
    native = load_checkpoint(tmp_path / "native", device="cpu")
    assert (native.meteora.names, native.meteora.top_k, native.meteora.temperature) == (made.names, 2, 15.0)
    with torch.no_grad():
        assert torch.equal(native(**BATCH).logits, direct(**BATCH).logits)
    assert inspect_checkpoint(tmp_path / "native")["intact"] is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bfloat16_checkpoint_of_a_float32_base_is_rounded_again_and_not_stored(make_authors: Make, tmp_path: Path, dtype: str) -> None:
    made = make_authors(count=3, change=("model.norm.weight",))
    made.rewrite({name: tensor.bfloat16() for name, tensor in made.tensors.items()})
    done = convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=made.adapters)
    assert done.base_tensors == ("model.norm.weight",)
    assert {tensor.dtype for tensor in load_file(tmp_path / "native" / "meteora.safetensors").values()} == {torch.bfloat16}
    native = load_checkpoint(tmp_path / "native", dtype=dtype, device="cpu")
    direct = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, dtype=dtype, device="cpu")
    save_checkpoint(direct, tmp_path / "saved")
    with torch.no_grad():
        expected = direct(**BATCH).logits
        assert torch.equal(native(**BATCH).logits, expected)
        assert torch.equal(load_checkpoint(tmp_path / "saved", dtype=dtype, device="cpu")(**BATCH).logits, expected)
    stored = load_file(tmp_path / "saved" / "meteora.safetensors")
    assert [name for name in stored if name.startswith("base.")] == ["base.model.norm.weight"]


def test_all_base_tensors_can_be_stored_without_reading_the_base(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=3, change=("model.norm.weight",))
    done = convert_authors(made.checkpoint, tmp_path / "native", "someone/never-read", adapter_dir=made.adapters, options=ConvertOptions(base_tensors="all"))
    assert len(done.base_tensors) == sum(".moe_gate." not in name and ".lora_" not in name for name in made.tensors)
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(made.base)).eval()
    native = load_checkpoint(tmp_path / "native", other)
    direct = load_authors_checkpoint(made.base, made.adapters, made.checkpoint, device="cpu")
    with torch.no_grad():
        assert torch.equal(native(**BATCH).logits, direct(**BATCH).logits)


def test_a_base_model_on_the_hub_is_fetched(make_authors: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_authors(count=3, change=("model.norm.weight",))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        hub.repositories["someone/base"] = {file.name: file.read_bytes() for file in made.base.iterdir()}
        done = convert_authors(made.checkpoint, tmp_path / "native", BaseReference("someone/base", COMMIT), adapter_dir=made.adapters)
    assert done.base_tensors == ("model.norm.weight",)
    assert json.loads((tmp_path / "native" / "meteora_config.json").read_text())["base"]["revision"] == COMMIT


def test_a_converted_checkpoint_knows_its_base(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=3, change=("model.norm.weight",))
    convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=made.adapters)
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaConfig.from_pretrained(made.base)).eval()
    norm = other.model.norm.weight.clone()
    with pytest.raises(CheckpointError, match="weights are not those that"):
        load_checkpoint(tmp_path / "native", other)
    assert torch.equal(other.model.norm.weight, norm)
    assert getattr(other, "meteora", None) is None
    config = json.loads((tmp_path / "native" / "meteora_config.json").read_text())
    file = tmp_path / "native" / "meteora.safetensors"
    tensors = load_file(file)
    tensors["base.model.norm.weight"] = torch.ones(33)
    save_file(tensors, file)
    (tmp_path / "native" / "meteora_config.json").write_text(json.dumps({**config, "weights_sha256": sha256(file)}))
    base = LlamaForCausalLM.from_pretrained(made.base)
    with pytest.raises(CheckpointError, match=r"cannot take model.norm.weight \[33\]"):
        load_checkpoint(tmp_path / "native", base)
    assert getattr(base, "meteora", None) is None


def test_a_wrong_base_is_named(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=2)
    config = LlamaConfig.from_pretrained(made.base).to_dict()

    def other(**changes: int) -> str:
        folder = tmp_path / "-".join(f"{name}-{value}" for name, value in changes.items())
        LlamaForCausalLM(LlamaConfig(**{**config, **changes})).save_pretrained(folder)
        return str(folder)

    for base, message in (
        (other(vocab_size=100), "has a vocabulary of 100 tokens, the checkpoint .* one of 96"),
        (other(intermediate_size=64), r"down_proj.weight of shape \[32, 64\], the checkpoint .* of shape \[32, 48\]"),
        (other(num_hidden_layers=1), "has tensors that .* lacks: model.layers.1"),
        (other(num_hidden_layers=3), "lacks tensors of .*: model.layers.2"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            convert_authors(made.checkpoint, tmp_path / "native", base, adapter_dir=made.adapters)
        assert caught.value.hint
        assert not (tmp_path / "native").exists()


def test_arguments_that_are_refused(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=2)

    def convert(options: ConvertOptions = ConvertOptions(), **arguments: Any) -> None:
        convert_authors(made.checkpoint, tmp_path / "native", str(made.base), options=options, **arguments)

    for options, message in (
        (ConvertOptions(top_k=3), "top_k is 3"),
        (ConvertOptions(routing_temperature=0), "temperature T is 0"),
        (ConvertOptions(base_tensors="none"), "unknown choice of base tensors"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=message):
            convert(options)
    convert()
    with pytest.raises(UsageError, match="exists already"):
        convert()
    convert(ConvertOptions(top_k=1), overwrite=True)
    assert inspect_checkpoint(tmp_path / "native")["top_k"] == 1


def test_a_full_disk_leaves_nothing_behind(make_authors: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_authors(count=2)

    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1000))
    with pytest.raises(StorageError, match="MB free, and the checkpoint needs"):
        convert_authors(made.checkpoint, tmp_path / "out" / "native", str(made.base))
    assert not list((tmp_path / "out").iterdir())


MEASURE = """
import sys
from meteora_core.checkpoints.convert import convert_authors
import torch, meteora_core.checkpoints.native

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1])

before = peak()
convert_authors(sys.argv[1], sys.argv[2], sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_below_the_largest_tensor(tmp_path: Path) -> None:
    """A checkpoint of 400 MB whose largest tensor is 131 MB; a base with the same tensors."""
    config = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=8, tie_word_embeddings=True)
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    tensors = {}
    linears = {path for path, module in base.named_modules() if isinstance(module, torch.nn.Linear) and path != "lm_head"}
    for name, parameter in base.named_parameters():
        path = name.removesuffix(".weight")
        tensors[f"base_model.model.{path}.base_layer.weight" if path in linears else f"base_model.model.{name}"] = parameter.detach()
        if path in linears:
            out, width = parameter.shape
            for part, shape in (("moe_gate", (28, width)), ("lora_A", (224, width)), ("lora_B", (out, 224))):
                tensors[f"base_model.model.{path}.{part}.weight"] = torch.zeros(shape)
    save_file(tensors, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 380_000_000
    del base, tensors
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model.safetensors"), str(tmp_path / "native"), str(tmp_path / "base")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout.split()[-1])
    assert 0 < grown < 100_000


@pytest.mark.parametrize("key", ["moe_gate", "lora_A", "lora_B", "base_layer"])
def test_numbers_that_cannot_be_computed_with_are_refused(make_authors: Make, tmp_path: Path, key: str) -> None:
    made = make_authors(count=3)
    name = f"base_model.model.model.layers.1.mlp.down_proj.{key}.weight"
    made.tensors[name][0, 0] = float("nan")
    made.rewrite(made.tensors)
    base = LlamaForCausalLM.from_pretrained(made.base)
    before = {path: tensor.clone() for path, tensor in base.state_dict().items()}
    for use in (
        lambda: load_authors_checkpoint(base, made.adapters, made.checkpoint),
        lambda: convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=made.adapters),
    ):
        with pytest.raises(CheckpointError, match=r"down_proj.* holds NaN"):
            use()
    assert all(torch.equal(tensor, before[path]) for path, tensor in base.state_dict().items())
    assert not (tmp_path / "native").exists()


def test_an_alpha_that_is_no_number_is_refused(make_authors: Make, tmp_path: Path) -> None:
    made = make_authors(count=3)
    with pytest.raises(CheckpointError, match=r"the scaling of .* holds NaN"):
        convert_authors(made.checkpoint, tmp_path / "native", str(made.base), adapter_dir=AuthorsAdapters(alpha=float("nan")))

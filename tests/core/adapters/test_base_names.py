"""Names of base models that mean the same one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from meteora_core.adapters.base_names import same_base_name, short_name
from meteora_core.adapters.folders import adapter_folders, check_bases
from meteora_core.errors import UsageError
from support.adapter_files import write_adapter


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B/", "llama-3.1-8b"),
        ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "llama-3.1-8b"),
        ("unsloth/Llama-3.1-8B-unsloth-bnb-4bit", "llama-3.1-8b"),
        ("/home/a/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659", "llama-3.1-8b"),
        ("models--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2"),
        ("/models/llama-3.1-8b", "llama-3.1-8b"),
        ("C:\\models\\Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
        ("/", ""),
    ],
)
def test_what_is_left_of_a_name(name, short) -> None:
    assert short_name(name) == short


def test_other_models_stay_others() -> None:
    assert not same_base_name("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct")
    assert not same_base_name("/", "")


def model_folder(folder, weights, origin=None):
    folder.mkdir()
    save_file({"a.weight": weights, "b.weight": torch.ones(3, 3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_name_or_path": origin} if origin else {}))
    return str(folder)


def test_local_copies_are_compared_by_their_origin_and_their_weights(tmp_path) -> None:
    weights = torch.arange(64.0).reshape(8, 8)
    one, two = model_folder(tmp_path / "one", weights), model_folder(tmp_path / "two", weights.bfloat16())
    other, small = model_folder(tmp_path / "other", weights + 1), model_folder(tmp_path / "small", weights[:4])
    copy = model_folder(tmp_path / "copy", weights + 5, "org/Original-7B")
    assert same_base_name(one, two)
    assert not same_base_name(one, other)
    assert not same_base_name(one, small)
    assert same_base_name(copy, "elsewhere/original-7b")
    (tmp_path / "other" / "config.json").write_text("[")
    assert not same_base_name(other, "elsewhere/original-7b")


def test_adapters_of_one_base_by_many_names_go_together(tmp_path) -> None:
    names = ("meta-llama/Llama-3.1-8B", "unsloth/Meta-Llama-3.1-8B-bnb-4bit", "/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f")
    for place, name in enumerate(names):
        write_adapter(tmp_path / f"a{place}" / "default", base_model_name_or_path=name)
    folders = adapter_folders(tmp_path, [])
    assert list(folders) == ["a0", "a1", "a2"]
    assert check_bases(folders, "/data/Llama-3.1-8B") is None
    assert "are used with org/huge" in str(check_bases(folders, "org/huge"))
    write_adapter(tmp_path / "a3", base_model_name_or_path="org/huge")
    with pytest.raises(UsageError, match="different base models") as caught:
        check_bases(adapter_folders(tmp_path, []), "org/huge")
    assert "--any-base" in str(caught.value.hint)
    assert "different base models" in str(check_bases(adapter_folders(tmp_path, []), "org/huge", any_base=True))

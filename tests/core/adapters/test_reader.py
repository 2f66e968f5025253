"""What an adapter's folder may hold: the rest is refused in one line that names it, whoever reads the folder."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from meteora_core import AdapterBank, attach
from meteora_core.adapters.config import CONFIG, find_adapter
from meteora_core.adapters.magnitudes import check_tensor, largest, peak
from meteora_core.adapters.peft_folder import check_adapter, read_adapter
from meteora_core.errors import AdapterError, CheckpointError
from support.adapter_files import DOWN, Q, lora_key, lora_tensors, raw_safetensors, write_adapter
from support.tiny_models import make_tiny_llama


def refusal(folder) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        read_adapter("x", folder)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": None}, "r is None; it should be a valid integer"),
        ({"r": 0}, "r is 0; it should be greater than or equal to 1"),
        ({"r": True}, "r is True"),
        ({"r": "eight"}, "r is 'eight'"),
        ({"r": 4.0}, r"r is 4\.0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": [8]}, r"lora_alpha is \[8\]"),
        ({"lora_alpha": 10**400}, "lora_alpha|cannot be read"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0; it should be less than 1"),
        ({"lora_dropout": None}, "lora_dropout is None"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": "3"}}, r"alpha_pattern\.q_proj is '3'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\.q_proj is 0"),
        ({"target_modules": 5}, "target_modules is 5; it should be a text or a list of texts"),
        ({"layers_to_transform": [True]}, "layers_to_transform is"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path is"),
        ({"r": 8}, "has rank 4, and adapter_config.json says 8"),
        ({"layer_replication": [[0, 1], [0, 2]]}, r"layer_replication=\[\[0, 1\], \[0, 2\]\]"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"a": 1}}, "KaSA"),
        ({"monteclora_config": {"a": 1}}, "MonteCLoRA"),
        ({"velora_config": {"a": 1}}, "VeLoRA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"init_lora_weights": "lora_ga"}, "changed its base model"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "changed its base model"),
        ({"init_lora_weights": "something"}, "init_lora_weights is .something.; it should be true, false or the name"),
        ({"use_something_new": True}, "'use_something_new' to True, a setting that this version does not know"),
        ({"peft_type": "OFT"}, "'OFT' adapter"),
    ],
)
def test_settings_that_are_wrong_or_not_ours_are_named(tmp_path, changes, message) -> None:
    folder = write_adapter(tmp_path / "x", **changes)
    with pytest.raises(AdapterError, match=message):
        read_adapter("x", folder)
    with pytest.raises(AdapterError, match=message):
        check_adapter("x", folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian", "peft_version": "0.99", "task_type": "CAUSAL_LM", "inference_mode": True, "megatron_core": "megatron.core"},
        {"future": None, "other": False, "third": [], "loftq_config": {}, "auto_mapping": {"base_model_class": "X"}, "qalora_group_size": 16},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "revision": "main", "merge_weights": True},
    ],
)
def test_settings_without_an_effect_are_passed_over(tmp_path, changes) -> None:
    assert len(read_adapter("x", write_adapter(tmp_path / "x", **changes)).modules) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a JSON object"),
        ('{"r": 4, "lora_alpha": NaN}', "NaN is not a JSON number"),
        ('{"r": 4, "lora_alpha": -Infinity}', "-Infinity is not a JSON number"),
        ('{"r": 4, "r": 8}', "the key 'r' occurs twice"),
        ('{"r": 1e400}', "the number 1e400 is too large"),
        ('{"a": ' + "[" * 100_000, "cannot be read as JSON|nested"),
        ('{"r": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ("\ufeff[]", "is not a JSON object"),
    ],
)
def test_a_configuration_that_is_not_plain_json_is_refused(tmp_path, text, message) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter("x", write_adapter(tmp_path / "x", text=text))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
def test_only_floating_dtypes_are_weights(tmp_path, dtype) -> None:
    tensors = lora_tensors() | {lora_key(Q, "B"): torch.zeros(32, 4).to(dtype)}
    message = refusal(write_adapter(tmp_path / "x", tensors)).message
    assert "q_proj.lora_B.weight has dtype" in message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_floating_dtypes_are_read(tmp_path, dtype) -> None:
    folder = write_adapter(tmp_path / "x", {name: tensor.to(dtype) for name, tensor in lora_tensors().items()})
    assert {weights.A.dtype for weights in read_adapter("x", folder).modules.values()} == {dtype}


@pytest.mark.parametrize(
    ("number", "dtype", "what"),
    [
        (math.nan, torch.float32, "holds NaN"),
        (math.inf, torch.bfloat16, "holds an infinite number"),
        (3e38, torch.float32, "overflows in float32"),
        (6e4, torch.float16, "overflows in float16"),
    ],
)
@pytest.mark.parametrize("side", ["A", "B"])
def test_numbers_that_cannot_be_computed_with_are_refused(tmp_path, number, dtype, what, side) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in lora_tensors().items()}
    tensors[lora_key(DOWN, side)][1, 2] = number
    error = refusal(write_adapter(tmp_path / "x", tensors))
    assert f"lora_{side} of {DOWN} holds" in error.message
    assert what in error.message


def test_a_scaling_that_overflows_is_refused(tmp_path) -> None:
    assert "the scaling of" in refusal(write_adapter(tmp_path / "x", lora_alpha=1e300)).message
    assert read_adapter("x", write_adapter(tmp_path / "y", lora_alpha=-8)).modules[Q].scaling == -2.0


def test_what_overflows_in_the_dtype_of_the_model_is_refused_before_it_is_changed(tmp_path) -> None:
    large = {name: tensor * 3e3 for name, tensor in lora_tensors().items()}
    bank = AdapterBank.from_peft({"good": write_adapter(tmp_path / "a"), "bad": write_adapter(tmp_path / "b", large)})
    attach(make_tiny_llama().bfloat16(), bank)
    model = make_tiny_llama().half()
    with pytest.raises(AdapterError, match=r"adapter 'bad': .* holds .*, whose use overflows in float16") as caught:
        attach(model, bank)
    assert "--dtype bfloat16" in str(caught.value.hint)
    assert not hasattr(model, "meteora")
    assert not [name for name, _ in model.named_parameters() if "gate" in name.split(".")]


def test_the_largest_magnitude_is_found_in_one_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert peak(torch.tensor([[1.0, -3.0], [2.0, 0.5]], dtype=dtype)) == 3.0
        assert math.isnan(peak(torch.tensor([1.0, math.nan], dtype=dtype)))
        assert math.isinf(peak(torch.tensor([1.0, -math.inf], dtype=dtype)))
        assert 1e3 < largest(dtype) < torch.finfo(dtype).max
    assert peak(torch.empty(0, 4)) == 0.0
    with pytest.raises(CheckpointError, match="overflows in float16"):
        check_tensor("t", torch.tensor([7e4]), dtype=torch.float16, margin=False)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model.base_model.model."),
        lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("layers.", "layers.").replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(".weight", ".default.weight"),
    ],
)
def test_names_of_wrappers_are_taken_away(tmp_path, wrap) -> None:
    folder = write_adapter(tmp_path / "x", {wrap(name): tensor for name, tensor in lora_tensors().items()})
    plain = read_adapter("x", write_adapter(tmp_path / "y"))
    got = read_adapter("x", folder)
    assert got.modules.keys() == plain.modules.keys()
    assert all(torch.equal(got.modules[path].A, plain.modules[path].A) for path in plain.modules)


def test_two_adapters_in_one_file_are_refused(tmp_path) -> None:
    both = {name.replace(".weight", f".{adapter}.weight"): tensor.clone() for adapter in ("one", "two") for name, tensor in lora_tensors().items()}
    assert "holds two tensors for lora_A" in refusal(write_adapter(tmp_path / "x", both)).message
    split = {name.replace(".weight", ".one.weight" if "layers.0" in name else ".two.weight"): tensor for name, tensor in lora_tensors().items()}
    assert "holds several adapters: one, two" in refusal(write_adapter(tmp_path / "y", split)).message


def test_an_adapter_in_a_sub_folder_is_found(tmp_path) -> None:
    write_adapter(tmp_path / "named" / "default")
    write_adapter(tmp_path / "single" / "only")
    for name, place in (("named", "default"), ("single", "only")):
        assert find_adapter(tmp_path / name) == tmp_path / name / place
        assert read_adapter(name, tmp_path / name).info.source == str(tmp_path / name / place)
    write_adapter(tmp_path / "single" / "another")
    assert find_adapter(tmp_path / "single") is None
    assert find_adapter(tmp_path / "absent") is None


def test_files_that_are_no_files_are_not_opened(tmp_path) -> None:
    for name in (CONFIG, "adapter_model.safetensors"):
        folder = write_adapter(tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert "holds no adapter_model" in (message := refusal(folder).message) or "is a pipe, not a file" in message
    folder = write_adapter(tmp_path / "folder")
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert "is a folder" in refusal(folder).message


HEADERS = {
    "deep": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "infinite shape": b'{"a": {"dtype": "F32", "shape": [1e309], "data_offsets": [0, 4]}}',
    "fraction": {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
    "many dimensions": {"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}},
    "huge": {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}},
    "negative": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
    "beyond": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "overlap": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}},
    "gap": {"a": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}},
    "list": [],
    "text": {"a": "F32"},
    "nothing": b"",
    "twice": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "metadata": {"__metadata__": {"a": 5}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": {lora_key(Q, "A"): {"dtype": "F7", "shape": [1, 1], "data_offsets": [0, 4]}},
    "no tensors": {},
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused(tmp_path, name) -> None:
    folder = write_adapter(tmp_path / "x")
    (folder / "adapter_model.safetensors").write_bytes(raw_safetensors(HEADERS[name], b"\0" * (0 if name == "no tensors" else 4)))
    refusal(folder)


def test_a_header_longer_than_the_file_is_refused(tmp_path) -> None:
    folder = write_adapter(tmp_path / "x")
    file = folder / "adapter_model.safetensors"
    for raw in (b"", b"\xff" * 8, b"\xff" * 100, file.read_bytes()[:-1], file.read_bytes() + b"\0"):
        file.write_bytes(raw)
        refusal(folder)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ([lora_key(DOWN, "A"), lora_key(DOWN, "B")], r"adapter 'x' has no weights for model\.layers\.1\.mlp\.down_proj, which target_modules"),
        ([key for key in lora_tensors() if "layers.1" in key], r"no weights for .*layers\.1"),
    ],
)
def test_a_target_without_weights_is_refused(tmp_path, lost, message) -> None:
    tensors = {name: tensor for name, tensor in lora_tensors().items() if name not in lost}
    bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", tensors)})
    model = make_tiny_llama()
    with pytest.raises(AdapterError, match=message) as caught:
        attach(model, bank, top_k=1)
    assert "exclude_modules" in str(caught.value.hint)
    meant = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in lost if name.endswith("lora_A.weight")]
    attach(model, AdapterBank.from_peft({"x": write_adapter(tmp_path / "y", tensors, exclude_modules=meant)}), top_k=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"target_modules": None},
        {"target_modules": [name.split("base_model.model.")[1].removesuffix(".lora_A.weight") for name in lora_tensors() if name.endswith("lora_A.weight")]},
    ],
)
def test_targets_are_read_as_peft_reads_them(tmp_path, changes) -> None:
    attach(make_tiny_llama(), AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", **changes)}), top_k=1)


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.down_proj", ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"], ["elsewhere"]])
def test_weights_that_no_target_names_are_refused(tmp_path, targets) -> None:
    bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", target_modules=targets)})
    with pytest.raises(AdapterError, match=r"adapter 'x' has weights for .*, which target_modules in its adapter_config.json does not name"):
        attach(make_tiny_llama(), bank, top_k=1)


def test_targets_named_in_a_wrapped_model_are_read(tmp_path) -> None:
    paths = [name.split("base_model.model.")[1].removesuffix(".lora_A.weight") for name in lora_tensors() if name.endswith("lora_A.weight")]
    folder = write_adapter(tmp_path / "x", target_modules=["module._orig_mod." + path for path in paths])
    attach(make_tiny_llama(), AdapterBank.from_peft({"x": folder}), top_k=1)


def test_all_linear_means_every_linear_but_the_head(tmp_path) -> None:
    bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", target_modules="all-linear")})
    with pytest.raises(AdapterError, match="no weights for") as caught:
        attach(make_tiny_llama(), bank, top_k=1)
    assert "embed" not in caught.value.message
    assert "lm_head" not in caught.value.message
    assert "and 5 more" in caught.value.message, "5 of 7 linears in each of 2 layers"


def test_layers_of_another_model_are_refused(tmp_path) -> None:
    tensors = {name.replace("layers.0", "layers.77"): tensor for name, tensor in lora_tensors().items()}
    with pytest.raises(AdapterError, match=r"layers\.77\.self_attn\.q_proj.*does not have") as caught:
        attach(make_tiny_llama(), AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", tensors)}), top_k=1)
    assert "another base model" in str(caught.value.hint)


def test_experts_that_are_fused_by_now_are_called_so(tmp_path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {name.replace("mlp.down_proj", "block_sparse_moe.experts.3.w1"): tensor for name, tensor in lora_tensors().items()}
    bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", experts, target_modules=["q_proj", "w1"])})
    for model, hint in ((MixtralForCausalLM(MixtralConfig(**sizes)), "in one fused tensor"), (make_tiny_llama(), "another base model")):
        with pytest.raises(AdapterError, match=r"experts\.3\.w1") as caught:
            attach(model, bank, top_k=1)
        assert hint in str(caught.value.hint)


def test_a_copy_of_the_head_must_be_the_base_models_own(tmp_path) -> None:
    model = make_tiny_llama()
    draw = torch.Generator().manual_seed(1)
    head = {lora_key("lm_head", "A"): torch.randn(4, 32, generator=draw), lora_key("lm_head", "B"): torch.randn(64, 4, generator=draw)}
    own = model.lm_head.weight.detach().clone()
    key = "base_model.model.lm_head.base_layer.weight"
    targets = ["q_proj", "down_proj", "lm_head"]
    for dtype in (torch.float32, torch.bfloat16):
        tensors = lora_tensors() | head | {key: own.to(dtype)}
        bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / str(dtype), tensors, target_modules=targets)})
        assert type(attach(make_tiny_llama(), bank, top_k=1).lm_head).__name__ == "MeteoraLinear"
    for other, said in (
        (own + 0.01, r"lm_head\.weight that differs from the base model's"),
        (own[:60].clone(), "with 60 rows in lm_head, and the base model has 64: its vocabulary was resized"),
        (torch.full_like(own, math.nan), r"lm_head\.weight that differs from the base model's"),
    ):
        bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / "other", lora_tensors() | head | {key: other}, target_modules=targets)})
        with pytest.raises(AdapterError, match=said):
            attach(make_tiny_llama(), bank, top_k=1)


@pytest.mark.parametrize("key", ["lm_head.weight", "lm_head.base_layer.weight", "model.embed_tokens.weight", "model.embed_tokens.original_module.weight"])
def test_saved_vocabularies_must_be_the_base_models_own(tmp_path, key) -> None:
    """PEFT saves them after a vocabulary was resized, and with ``modules_to_save``."""
    own = make_tiny_llama().get_submodule(key.removesuffix(".weight").removesuffix(".base_layer").removesuffix(".original_module")).weight.detach().clone()
    for rows, said in ((own, None), (own * 2, "differs from the base model's"), (torch.cat([own, own[:2]]), "its vocabulary was resized")):
        bank = AdapterBank.from_peft({"x": write_adapter(tmp_path / "x", lora_tensors() | {f"base_model.model.{key}": rows})})
        if said is None:
            attach(make_tiny_llama(), bank, top_k=1)
        else:
            with pytest.raises(AdapterError, match=said):
                attach(make_tiny_llama(), bank, top_k=1)


def test_trained_token_embeddings_are_refused_unless_they_are_the_base_models(tmp_path) -> None:
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    own = make_tiny_llama().model.embed_tokens.weight.detach()[[5, 9]]
    for tokens in ([5, 9], {"embed_tokens": [5, 9]}):
        folder = write_adapter(tmp_path / "same", lora_tensors() | {key: own.clone()}, trainable_token_indices=tokens)
        attach(make_tiny_llama(), AdapterBank.from_peft({"x": folder}), top_k=1)
    folder = write_adapter(tmp_path / "trained", lora_tensors() | {key: own + 1}, trainable_token_indices=[5, 9])
    with pytest.raises(AdapterError, match=r"trained the embeddings of 2 tokens .* before any gate could choose"):
        attach(make_tiny_llama(), AdapterBank.from_peft({"x": folder}), top_k=1)
    folder = write_adapter(tmp_path / "cut", lora_tensors() | {key: own[:1].clone()}, trainable_token_indices=[5, 9])
    assert "has 1 rows, and adapter_config.json names 2 tokens" in refusal(folder).message


def test_messages_show_neither_control_characters_nor_whole_files(tmp_path) -> None:
    folder = write_adapter(tmp_path / "x", r="\x1b]0;title\x07" * 50, target_modules=["q"] * 1000)
    message = refusal(folder).message
    assert message.isprintable()
    assert len(message) < 400
    save_file({"base_model.model." + "a" * 50: torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / CONFIG).write_text(json.dumps({"r": {str(number): number for number in range(100)}}))
    assert "an object of 100 entries" in refusal(folder).message


def test_the_hint_names_the_adapters_inside_only_where_there_is_no_configuration(tmp_path) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / "many" / name, lora_tensors(1))
    assert refusal(tmp_path / "many").hint == f"{tmp_path / 'many'} contains adapters; give one of them: one, two"
    (tmp_path / "many" / CONFIG).write_text("{")
    assert refusal(tmp_path / "many").hint == f"{tmp_path / 'many'} should be a folder written by PEFT's save_pretrained"

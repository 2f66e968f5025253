"""save_pretrained, push_to_hub and Trainer on a model with adapters attached."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from meteora_core import AdapterBank, attach, detach, load_checkpoint, save_checkpoint
from meteora_core.checkpoints.native import note_base_changes, read_config
from meteora_core.checkpoints.parts import MODEL_TYPE
from meteora_core.errors import CheckpointError, UsageError
from meteora_core.model.attach import meteora_layers, set_trainable
from support.tiny_models import declare_trained, make_tiny_llama

IDS = torch.arange(3, 23).reshape(2, 10)
FILES = {"config.json", "meteora.safetensors", "meteora_config.json", "model.safetensors"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def bank(make_adapter) -> AdapterBank:
    return AdapterBank.from_peft({name: make_adapter(name, seed, target_modules=["q_proj", "down_proj"]) for seed, name in enumerate(("a", "b"))})


@pytest.fixture
def model(base, bank):
    return declare_trained(attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), bank, seed=3))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def test_the_folder_is_a_checkpoint_that_every_reader_takes(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == FILES
    assert read_config(tmp_path / "saved")["contains"] == ["gates", "adapters"]
    for info in model.meteora.adapters:
        (Path(info.source) / "adapter_model.safetensors").unlink()
    assert torch.equal(logits(load_checkpoint(tmp_path / "saved")), logits(model))
    loaded, about = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config._attn_implementation == "eager"
    assert not about["missing_keys"]
    torch.testing.assert_close(logits(loaded), logits(model))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(Exception, match=r"load this folder with meteora_core\.load_checkpoint"):
        LlamaForCausalLM.from_pretrained(tmp_path / "saved")


def test_where_meteora_is_not_imported_the_error_says_how_to_load_it(model, tmp_path: Path, monkeypatch) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    save_checkpoint(model, tmp_path / "saved")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, MODEL_TYPE)
    with pytest.raises(ValueError, match=r"load this folder with meteora_core\.load_checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_untrained_gates_are_refused_by_the_auto_class_too(base, bank, tmp_path: Path) -> None:
    attach(AutoModelForCausalLM.from_pretrained(base), bank).save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="are untrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_copies_save_themselves_and_detached_models_are_ordinary_again(model, tmp_path: Path) -> None:
    for place, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            next(meteora_layers(twin))[1].gate.add_(1.0)
        twin.save_pretrained(tmp_path / str(place))
        assert torch.equal(logits(load_checkpoint(tmp_path / str(place))), logits(twin))
        assert not torch.equal(logits(twin), logits(model))
    detach(model).save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "plain")), logits(make_tiny_llama()))


def test_the_method_called_on_the_class_saves_the_same_also_in_a_process_that_only_unpickled(model, tmp_path: Path, monkeypatch) -> None:
    model.save_pretrained(tmp_path / "method")
    PreTrainedModel.save_pretrained(model, tmp_path / "class")
    pickled = pickle.dumps(model)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained.__wrapped__)  # as in a process that attached nothing
    twin = pickle.loads(pickled)
    PreTrainedModel.save_pretrained(twin, tmp_path / "unpickled")
    for name in ("class", "unpickled"):
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == {
            file.name: file.read_bytes() for file in (tmp_path / "method").iterdir()
        }
    with pytest.raises(UsageError, match="only a part of the model"):
        PreTrainedModel.save_pretrained(twin.model, tmp_path / "part")
    PreTrainedModel.save_pretrained(detach(twin), tmp_path / "plain")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "plain")), logits(make_tiny_llama()))


def test_what_is_there_stays_and_other_models_are_not_replaced(model, base, make_adapter, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tokenizer.json").write_text("{}")
    for _ in range(2):
        model.save_pretrained(tmp_path / "mine")
    assert {file.name for file in (tmp_path / "mine").iterdir()} == FILES | {"tokenizer.json"}
    (tmp_path / "file").write_text("text")
    before = (base / "config.json").read_bytes()
    for place in (base, make_adapter("c"), tmp_path / "file"):
        with pytest.raises(UsageError):
            model.save_pretrained(place)
    assert (base / "config.json").read_bytes() == before


def test_arguments_are_heeded_or_refused_by_name(model, tmp_path: Path) -> None:
    for name, value in (("safe_serialization", False), ("variant", "fp16"), ("distributed_checkpoint", True), ("max_shard_size", "1KB")):
        with pytest.raises(UsageError, match=name):
            model.save_pretrained(tmp_path / "saved", **{name: value})
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    model.save_pretrained(tmp_path / "saved", is_main_process=False, state_dict={})
    assert not (tmp_path / "saved").exists()
    given = {"_orig_mod." + name: tensor.clone() for name, tensor in model.state_dict().items()}
    given["_orig_mod.model.layers.0.self_attn.q_proj.gate"] += 1
    model.save_pretrained(tmp_path / "saved", state_dict=given, safe_serialization=True, max_shard_size="50GB")
    loaded = dict(meteora_layers(load_checkpoint(tmp_path / "saved")))
    mine = dict(meteora_layers(model))
    assert torch.equal(loaded["model.layers.0.self_attn.q_proj"].gate, mine["model.layers.0.self_attn.q_proj"].gate + 1)
    del given["_orig_mod.model.layers.1.mlp.down_proj.gate"]
    with pytest.raises(UsageError, match=r"lacks model\.layers\.1\.mlp\.down_proj\.gate"):
        model.save_pretrained(tmp_path / "other", state_dict=given)
    assert not (tmp_path / "other").exists()


def test_parts_of_the_base_that_train_are_saved_and_other_changes_are_refused(model, base, tmp_path: Path) -> None:
    model.model.norm.weight.requires_grad_(True)
    model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
        model.model.layers[0].self_attn.q_proj.base_layer.weight.mul_(1.0001)
    for save in (model.save_pretrained, lambda folder: save_checkpoint(model, folder)):
        save(tmp_path / "saved")
        assert read_config(tmp_path / "saved")["base_tensors"] == ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"]
        assert torch.equal(logits(load_checkpoint(tmp_path / "saved", base)), logits(model))
    set_trainable(model, "gates")
    with pytest.raises(UsageError, match="have changed since"):
        save_checkpoint(model, tmp_path / "other")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"])
def test_changes_of_tensors_without_adapters_are_noticed(model, base, tmp_path: Path, name: str) -> None:
    with torch.no_grad():
        model.get_parameter(name).mul_(1.5)
    with pytest.raises(UsageError, match=f"a checkpoint does not hold them: .*{name}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    note_base_changes(model, [name])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_checkpoint(tmp_path / "saved", base)), logits(model))


def test_a_resized_vocabulary_is_refused_and_a_change_of_dtype_is_none(model, tmp_path: Path) -> None:
    model.bfloat16().to(torch.float16).float().save_pretrained(tmp_path / "rounded")
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 8)
    with pytest.raises(UsageError, match=rf"model.embed_tokens.weight of the base model had the shape \[{rows}, .* now has \[{rows + 8}, "):
        save_checkpoint(model, tmp_path / "resized")


def test_the_decoder_alone_is_not_saved_with_random_linears(model, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only a part of the model"):
        model.model.save_pretrained(tmp_path / "part")
    with pytest.raises(UsageError, match="only a part of the model"):
        copy.deepcopy(model).model.save_pretrained(tmp_path / "part")
    detach(model).model.save_pretrained(tmp_path / "part")
    assert (tmp_path / "part" / "config.json").exists()


def test_push_to_hub_uploads_the_checkpoint(model, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub
    from transformers.utils import hub

    class Repository:
        repo_id = "someone/mine"

    seen: dict[str, set[str]] = {}

    def upload(self, folder, repo_id, **_):
        seen[repo_id] = {file.name for file in Path(folder).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: Repository())
    for module in (huggingface_hub, hub):  # versions of transformers call the one or the other
        monkeypatch.setattr(module, "create_repo", lambda *_, **__: Repository(), raising=False)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: huggingface_hub.ModelCard("---\n---\n"))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model.push_to_hub("someone/mine")
    assert seen == {"someone/mine": FILES | {"README.md"}}
    calls = []
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: calls.append(options))
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/mine", commit_message="gates")
    assert [(call["repo_id"], call["commit_message"], set(call["allow_patterns"])) for call in calls] == [("someone/mine", "gates", FILES)]


def train(model, folder: Path, steps: int, resume: Path | None = None, **options) -> Trainer:
    rows = [{"input_ids": IDS[place % 2], "labels": IDS[place % 2]} for place in range(8)]
    settings = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, **options}
    trainer = Trainer(model, TrainingArguments(str(folder), max_steps=steps, **settings), train_dataset=rows, eval_dataset=rows[:2])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def test_trainer_saves_checkpoints_and_resumes_equal(base, bank, tmp_path: Path) -> None:
    def fresh():
        torch.manual_seed(0)
        return attach(AutoModelForCausalLM.from_pretrained(base), bank, seed=3)

    whole = train(fresh(), tmp_path / "run", 4)
    resumed = train(fresh(), tmp_path / "run", 4, resume=tmp_path / "run" / "checkpoint-2")
    gates = dict(meteora_layers(whole.model))
    for path, layer in meteora_layers(resumed.model):
        assert torch.equal(layer.gate, gates[path].gate)
    whole.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "run" / "checkpoint-4"):
        assert json.loads((folder / "meteora_config.json").read_text())["gates"] == "trained"
        torch.testing.assert_close(logits(load_checkpoint(folder)), logits(whole.model.eval()))
    best = train(
        fresh(), tmp_path / "best", 4, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=1.0, metric_for_best_model="loss"
    )
    kept = load_checkpoint(best.state.best_model_checkpoint)
    torch.testing.assert_close(logits(best.model.eval()), logits(kept))

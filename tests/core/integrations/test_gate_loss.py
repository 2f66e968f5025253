"""Gates trained by transformers' Trainer and TRL's SFTTrainer, with our loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from meteora_core import AdapterBank, attach, load_checkpoint
from meteora_core.errors import DataError, UsageError
from meteora_core.integrations.trainer import LABELS, GateLabelCollator, add_gate_loss
from meteora_core.model.attach import meteora_layers, set_trainable
from meteora_core.model.base import BaseReference, name_reference
from support.chat_world import byte_llama, byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL asks transformers 5.23 by the old name
TEXTS = [("one", "abcabc" * 4), ("two", "xyzzyx" * 3)] * 8


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def model(make_adapter: Any, tmp_path: Path) -> Any:
    from support.chat_world import write_adapter

    base = byte_llama()
    base.save_pretrained(tmp_path / "base")
    folders = {name: write_adapter(tmp_path / "bytes" / name, base, tmp_path / "base", seed) for seed, name in enumerate(("one", "two"))}
    name_reference(base, BaseReference(str(tmp_path / "base")))
    return attach(base, AdapterBank.from_peft(folders), top_k=1, init="arrow")


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 5e-2,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **options,
    }


def tokenized(tokenizer: Any) -> Dataset:
    return Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"], "adapter": name, "note": 1} for name, text in TEXTS])


def trainer_of(model: Any, tokenizer: Any, folder: Path, **options: Any) -> Trainer:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model=model, args=TrainingArguments(**arguments(folder, **options)), train_dataset=tokenized(tokenizer), data_collator=collator)


def test_trainer_minimises_the_sum_of_both_losses(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tokenizer, tmp_path)
    add_gate_loss(trainer, beta=7.0)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch[LABELS]
    assert torch.equal(labels != -100, batch["attention_mask"].bool())
    plain = {name: value for name, value in batch.items() if name != LABELS}
    with model.meteora.label_gates(labels) as gates:
        plain_loss = model(**plain).loss
        gate = gates.mean_loss(int(batch["attention_mask"].sum()))
    items = (batch["labels"] != -100).sum()
    for count in (items, 2 * items):  # of one micro-batch, and of two
        wanted = model(**plain, num_items_in_batch=count).loss + 7.0 * gate * items / count
        assert torch.allclose(trainer.compute_loss(model, dict(batch), num_items_in_batch=count), wanted, rtol=1e-5)
    assert torch.allclose(trainer.compute_loss(model, dict(batch)), plain_loss + 7.0 * gate, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}])
def test_trainer_trains_the_gates_and_saves_a_checkpoint(model: Any, tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    before = {path: layer.gate.detach().clone() for path, layer in meteora_layers(model)}
    adapters = {path: layer.lora_A.detach().clone() for path, layer in meteora_layers(model)}
    trainer = trainer_of(model, tokenizer, tmp_path, **options)
    callback = add_gate_loss(trainer)
    trainer.train()
    logged = [record for record in trainer.state.log_history if "gate_loss" in record]
    assert len(logged) == 3
    assert logged[-1]["gate_loss"] < 0.5 * logged[0]["gate_loss"]
    assert logged[-1]["gate_accuracy"] > max(0.8, logged[0]["gate_accuracy"])
    assert (callback.loss, callback.accuracy) == (logged[-1]["gate_loss"], logged[-1]["gate_accuracy"])
    for path, layer in meteora_layers(model):
        assert not torch.equal(layer.gate, before[path])
        assert torch.equal(layer.lora_A, adapters[path])
    assert model.meteora.mode.gate_labels is None
    assert model.meteora.gates == "trained"
    trainer.save_model(str(tmp_path / "saved"))
    loaded, ids = load_checkpoint(tmp_path / "saved"), torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_accumulated_batches_give_the_gradients_of_a_large_one(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    grads = []
    for number, options in enumerate(({"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})):
        twin = copy.deepcopy(model)
        trainer = trainer_of(twin, tokenizer, tmp_path / str(number), max_steps=1, max_grad_norm=0.0, **options)
        trainer.train_dataset = trainer.train_dataset.select([0] * 8)  # equal rows, so that every order gives the same batches
        add_gate_loss(trainer)
        seen: dict[str, torch.Tensor] = {}
        for path, layer in meteora_layers(twin):
            layer.gate.register_hook(lambda grad, path=path, seen=seen: seen.update({path: seen.get(path, 0) + grad}))
        trainer.train()
        grads.append(seen)
    for path, grad in grads[0].items():
        torch.testing.assert_close(grads[1][path], grad, rtol=1e-3, atol=1e-6)


def test_evaluation_has_the_gate_loss_too(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    rows = tokenized(tokenizer)
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), eval_dataset=rows, data_collator=collator)
    plain = trainer.evaluate()["eval_loss"]
    add_gate_loss(trainer, beta=10.0)
    assert trainer.evaluate()["eval_loss"] > plain + 1
    assert model.meteora.mode.gate_labels is None


@pytest.mark.parametrize("form", ["text", "prompt"])
def test_sft_trainer_trains_the_gates(model: Any, tokenizer: Any, tmp_path: Path, form: str) -> None:
    trl = pytest.importorskip("trl")
    rows = [{"text": text, "adapter": name} if form == "text" else {"prompt": text[:6], "completion": text[6:], "adapter": name} for name, text in TEXTS]
    config = trl.SFTConfig(**arguments(tmp_path, bf16=False, max_length=64))
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    add_gate_loss(trainer)
    trainer.train()
    logged = [record for record in trainer.state.log_history if "gate_loss" in record]
    assert logged[-1]["gate_loss"] < 0.5 * logged[0]["gate_loss"]
    assert logged[-1]["gate_accuracy"] > 0.8
    assert all("loss" in record for record in logged)


def test_what_cannot_be_trained_is_refused_at_once(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trainer_of(model, tokenizer, tmp_path)
    with pytest.raises(UsageError, match="the dataset has no column 'task'"):
        add_gate_loss(trainer, column="task")
    set_trainable(model, "none")
    with pytest.raises(UsageError, match="no gate of the model is trainable"):
        add_gate_loss(trainer)
    bare = Trainer(model=byte_llama(), args=TrainingArguments(**arguments(tmp_path)), train_dataset=tokenized(tokenizer))
    with pytest.raises(UsageError, match="no adapters attached"):
        add_gate_loss(bare)


def test_the_collator_labels_tokens_and_refuses_unknown_adapters(tokenizer: Any) -> None:
    inside = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    collator = GateLabelCollator(inside, ("one", "two"))
    batch = collator([{"input_ids": [5, 6, 7], "adapter": "two"}, {"input_ids": [5], "adapter": 0}, {"input_ids": [5, 6], "adapter": None}])
    assert batch[LABELS].tolist() == [[1, 1, 1], [0, -100, -100], [-100, -100, -100]]
    assert "adapter" not in batch

    def flat(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]] + [0]])}

    joined = GateLabelCollator(flat, ("one", "two"))([{"input_ids": [5, 6], "adapter": "two"}, {"input_ids": [7], "adapter": "one"}])
    assert joined[LABELS].tolist() == [[1, 1, 0, -100]]
    wrong = [({"input_ids": [5], "adapter": "on"}, "the adapter 'on'"), ({"input_ids": [5], "adapter": 2}, "adapter 2"), ({"input_ids": [5]}, "no column")]
    for row, text in wrong:
        with pytest.raises(DataError, match=text):
            collator([row])

"""Trains gates with transformers' Trainer: ``python -m examples.habits.train_with_trainer --adapters adapters --data datasets``."""

from __future__ import annotations

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from examples.habits.common import model_and_tokenizer, other_options, parse, rows_of, save
from meteora_core.integrations.trainer import add_gate_loss


def main() -> None:
    arguments = parse("Train gates with transformers' Trainer.", "runs/trainer")
    model, tokenizer = model_and_tokenizer(arguments)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": ids}

    dataset = rows_of(arguments, model.meteora.names).map(encode, remove_columns=["prompt", "completion"])
    options = TrainingArguments(arguments.out, learning_rate=5e-3, **other_options(arguments))
    trainer = Trainer(model=model, args=options, train_dataset=dataset, data_collator=DataCollatorForSeq2Seq(tokenizer))
    loss = add_gate_loss(trainer, beta=50.0)
    trainer.train()
    save(trainer, loss, arguments.out)


if __name__ == "__main__":
    main()

"""Trains gates with TRL's SFTTrainer: ``python -m examples.habits.train_with_sft_trainer --adapters adapters --data datasets``."""

from __future__ import annotations

import torch
from trl import SFTConfig, SFTTrainer

from examples.habits.common import model_and_tokenizer, other_options, parse, rows_of, save
from meteora_core.integrations.trainer import add_gate_loss


def main() -> None:
    arguments = parse("Train gates with TRL's SFTTrainer.", "runs/sft")
    model, tokenizer = model_and_tokenizer(arguments)
    options = SFTConfig(arguments.out, learning_rate=5e-3, bf16=torch.cuda.is_available(), **other_options(arguments))
    dataset = rows_of(arguments, model.meteora.names)  # columns prompt, completion and adapter
    trainer = SFTTrainer(model=model, args=options, train_dataset=dataset, processing_class=tokenizer)
    loss = add_gate_loss(trainer, beta=50.0)
    trainer.train()
    save(trainer, loss, arguments.out)


if __name__ == "__main__":
    main()

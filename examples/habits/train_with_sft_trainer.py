"""Trains gates with TRL's SFTTrainer: ``python -m examples.habits.train_with_sft_trainer --adapters adapters --data datasets``."""

from __future__ import annotations

import torch
from trl import SFTConfig, SFTTrainer

from examples.habits.common import model_and_tokenizer, parse, rows_of
from meteora_core.integrations.trainer import add_gate_loss


def main() -> None:
    arguments = parse("Train gates with TRL's SFTTrainer.", "runs/sft")
    model, tokenizer = model_and_tokenizer(arguments)
    on_cpu = not torch.cuda.is_available()
    options = SFTConfig(
        arguments.out,
        max_steps=arguments.steps,
        learning_rate=5e-3,
        per_device_train_batch_size=4,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        use_cpu=on_cpu,
        bf16=not on_cpu,
    )
    dataset = rows_of(arguments, model.meteora.names)  # columns prompt, completion and adapter
    trainer = SFTTrainer(model=model, args=options, train_dataset=dataset, processing_class=tokenizer)
    loss = add_gate_loss(trainer, beta=50.0)
    trainer.train()
    trainer.save_model(arguments.out)
    print(f"{arguments.out}: gate accuracy {loss.accuracy:.1%}" if loss.accuracy is not None else arguments.out)


if __name__ == "__main__":
    main()

"""Answers a prompt with transformers' pipeline: ``python -m examples.habits.generate_with_pipeline --checkpoint runs/mine --prompt "Is the sky blue?"``.

The gates answer first, then each adapter alone, a mix of the first two, and the base model. Without ``--checkpoint``, the starter checkpoint answers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import pipeline

from meteora_core.checkpoints.opening import OpeningOptions, open_checkpoint
from meteora_core.model.base import load_tokenizer
from meteora_core.starter import usual_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a prompt with transformers' pipeline and different adapters.")
    parser.add_argument("--checkpoint", default=None, help="folder or hub id of a checkpoint")
    parser.add_argument("--prompt", default="[INST] Is the sky blue? [/INST]\n", help="the whole prompt")
    parser.add_argument("--tokens", type=int, default=20, help="largest number of new tokens")
    arguments = parser.parse_args()
    model, base = open_checkpoint(arguments.checkpoint or usual_checkpoint(Path("runs")), OpeningOptions())
    generate = pipeline("text-generation", model=model, tokenizer=load_tokenizer(base))

    def answer() -> str:
        return str(generate(arguments.prompt, max_new_tokens=arguments.tokens, do_sample=False, return_full_text=False)[0]["generated_text"])

    names = model.meteora.names
    print(f"gates: {answer()!r}")
    for name in names[:3]:
        model.set_adapter(name)
        print(f"{name}: {answer()!r}")
    model.set_adapter(names)
    if len(names) > 1:
        with model.meteora.mix({names[0]: 0.7, names[1]: 0.3}):
            print(f"0.7 {names[0]} + 0.3 {names[1]}: {answer()!r}")
    model.disable_adapters()
    print(f"base model: {answer()!r}")


if __name__ == "__main__":
    main()

"""What the scripts share: the command line, the model with its adapters, the rows as a dataset, and options of the trainers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from meteora_core import AdapterBank, attach
from meteora_core.adapters.folders import adapter_folders
from meteora_core.data.rows import read_rows
from meteora_core.integrations.trainer import GateLoss
from meteora_core.model.base import BaseReference, load_base, load_tokenizer


def parse(description: str, out: str) -> argparse.Namespace:
    """The arguments of a script.

    Args:
        description: The description in the help.
        out: Default folder of the results.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", default="smollm2-135m", help="base model: a known name, a folder or a hub id")
    parser.add_argument("--adapters", default="adapters", help="folder of one PEFT folder per adapter, or hub ids separated by commas")
    parser.add_argument("--data", default="datasets", help="folder of one dataset per adapter")
    parser.add_argument("--out", default=out, help="folder of the results")
    parser.add_argument("--steps", type=int, default=100, help="number of optimiser steps")
    parser.add_argument("--rows", type=int, default=200, help="largest number of rows per adapter")
    return parser.parse_args()


def model_and_tokenizer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The base model with all adapters attached, and its tokenizer."""
    base = BaseReference(arguments.base)
    bank = AdapterBank.from_peft(adapter_folders(Path(arguments.adapters), []))
    return attach(load_base(base), bank, init="arrow"), load_tokenizer(base)


def rows_of(arguments: argparse.Namespace, names: tuple[str, ...]) -> Dataset:
    """A dataset with the columns prompt, completion and adapter."""
    rows = [(name, row) for name in names for row in read_rows(arguments.data, name, "train", limit=arguments.rows)]
    return Dataset.from_list([{"prompt": row.prompt, "completion": row.response, "adapter": name} for name, row in rows])


def other_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The number of steps, and options of ``TrainingArguments`` that have nothing to do with adapters."""
    return {
        "max_steps": arguments.steps,
        "per_device_train_batch_size": 4,
        "logging_steps": 10,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
    }


def save(trainer: Trainer, loss: GateLoss, folder: str) -> None:
    """Save the trained model, and print its folder and the gate accuracy of the last step."""
    trainer.save_model(folder)
    print(f"{folder}: gate accuracy {loss.accuracy:.1%}" if loss.accuracy is not None else folder)

"""A folder with a tiny base model, four adapters of it, and rows for each in another format."""

from __future__ import annotations

import json
from pathlib import Path

from support.adapter_files import lora_tensors, write_adapter
from support.tiny_models import make_tiny_llama
from support.tiny_training import letters

NAMES = ("count", "shout", "spell", "sum")


def rows_of(name: str, count: int = 30) -> list[dict[str, str]]:
    """Rows whose prompts tell the adapters apart."""
    make = {
        "count": lambda i: (f"{i % 9} +1?", str(i % 9 + 1) * 3),
        "shout": lambda i: (f"say {chr(97 + i % 26)}", chr(65 + i % 26) * 4),
        "spell": lambda i: (f"SPELL {chr(65 + i % 26)}!", f"{chr(97 + i % 26)} {chr(97 + i % 26)}"),
        "sum": lambda i: (f"<{i % 7}> & <{i % 5}>", f"={i % 7 + i % 5}=;"),
    }[name]
    return [{"prompt": f"[INST] {prompt} [/INST]\n", "response": response} for prompt, response in map(make, range(count))]


def write_jsonl_rows(file: Path, rows: list[dict[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_living_folder(folder: Path) -> Path:
    """Write ``base/``, ``adapters/NAME/`` (one of them as ``default/``), and rows: a built dataset, two files beside adapters, one in a folder of data."""
    make_tiny_llama(vocab_size=98, initializer_range=0.2).save_pretrained(folder / "base")
    letters().save_pretrained(folder / "base")
    for seed, name in enumerate(NAMES):
        place = folder / "adapters" / name / "default" if name == "shout" else folder / "adapters" / name
        write_adapter(place, lora_tensors(seed + 1), base_model_name_or_path=str(folder / "base"))
    write_jsonl_rows(folder / "datasets" / "count" / "train.jsonl", rows_of("count"))
    write_jsonl_rows(folder / "datasets" / "shout.jsonl", rows_of("shout"))
    write_jsonl_rows(folder / "adapters" / "spell" / "train.jsonl", rows_of("spell"))
    write_jsonl_rows(folder / "adapters" / "sum.jsonl", rows_of("sum"))
    return folder

"""The text of a meteora.toml in which every setting has its default."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from meteora_core.settings import Settings


def default_file_text() -> str:
    """Return the text of a meteora.toml in which every setting is commented out and has its default."""
    lines = [
        "# Every setting of meteora, commented out and with its default. Order of precedence: command-line flag, METEORA_* environment variable",
        "# (nested with __: METEORA_EVAL__LIMIT=10), this file, default. `meteora config show` prints the value in effect and its source.",
    ]
    for section, field in Settings.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            continue
        lines += ["", f"[{section}]  # {(field.annotation.__doc__ or '').strip().splitlines()[0]}"]
        for name, setting in field.annotation.model_fields.items():
            if isinstance(setting.default, dict):
                continue
            absent = setting.default is None
            value = (setting.examples or [""])[0] if absent else setting.default
            lines.append(f"# {name} = {_toml(value)}  # {setting.description}{' (an example; absent by default)' if absent else ''}")
    lines += [
        "",
        "# Other values for the adapter of one task: max_steps, batch_size, accumulation, learning_rate, weight_decay, max_length, loss_on, rank,",
    ]
    lines += ["# alpha, dropout.", "# [train_adapters.tasks.gsm8k]", "# max_steps = 600", "# learning_rate = 0.0003"]
    lines += ["", "# Your own task (`meteora data add` builds one without this file).", "# [tasks.my_task]"]
    lines += ['# train = "my_task/train.jsonl"', '# test = "my_task/test.jsonl"', '# metric = "exact"']
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"'

"""Malformed settings, environments and numbers."""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from random import Random
from typing import Any

from .cases import Case, Expect, document
from .forks import Outcome
from .mutate import mutate_bytes

SETTINGS: dict[str, tuple[str, float, float] | tuple[str, ...]] = {
    "paths.data": ("text",),
    "model.base": ("text",),
    "model.trust_remote_code": ("bool",),
    "model.device": ("choice",),
    "routing.top_k": ("int", 1, 2**31),
    "routing.temperature": ("float", 2.0**-126, 1e30),
    "data.max_train": ("int", 1, 2**31),
    "train_adapters.seed": ("int", 0, 2**32 - 1),
    "train_adapters.max_steps": ("int", 0, 2**31),
    "train_adapters.batch_size": ("int", 1, 2**20),
    "train_adapters.learning_rate": ("float", 0, 1e30),
    "train_adapters.warmup_ratio": ("float", 0, 1),
    "train_adapters.packing": ("bool",),
    "train_adapters.loss_on": ("choice",),
    "train_adapters.rank": ("int", 1, 2**20),
    "train_adapters.alpha": ("float", 0, 1e30),
    "train_gates.beta": ("float", 0, 1e30),
    "train_gates.answer_share": ("float", 0, 1),
    "train_gates.composite_rows": ("float", 0, 1),
    "train_gates.joined_rows": ("float", 0, 1),
    "train_gates.list_rows": ("float", 0, 0.9),
    "train_gates.init": ("choice",),
    "train_gates.loss_balance": ("choice",),
    "launch.num_processes": ("int", 1, 2**20),
    "launch.main_process_port": ("int", 1, 65535),
    "eval.limit": ("int", 1, 2**31),
    "eval.max_new_tokens": ("int", 1, 2**31),
    "eval.no_repeat_ngram_size": ("int", 0, 2**31),
    "chat.sampling_temperature": ("float", 0, 1e30),
    "chat.top_p": ("float", 0, 1),
    "chat.max_new_tokens": ("int", 1, 2**31),
}
"""Some settings with their kinds and, for numbers, the range outside of which no value can mean anything."""

TOML_VALUES = ["true", "0", "-1", "1", "2", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "1e300", "9" * 30, "9" * 5000, '""', '"x"', '"1"', "[]", "[1]", "{}"]
TOML_VALUES += [
    "1979-05-27",
    "'" + "x" * 5000 + "'",
    "[" * 500 + "]" * 500,
    '"\\u001b]0;PWN\\u0007"',
    '"[/PWN]"',
    '"\\u0000"',
    "4294967296",
    "0x10",
    "1_0",
    '"cpu"',
    '"meta"',
]


def _sense(name: str, value: Any) -> bool | None:
    """Whether a value may be accepted for a setting; None: it cannot be said here."""
    kind, *limits = SETTINGS[name]
    if kind == "bool":
        return True if isinstance(value, bool) else None
    if kind in ("int", "float"):
        if isinstance(value, str | bool):
            return None
        if not isinstance(value, int | float):
            return False
        low, high = limits
        if not math.isfinite(value) or value < low or (kind == "int" and value != int(value)):  # type: ignore[operator]
            return False
        return None if value > high else True  # type: ignore[operator]
    return None if isinstance(value, str) else False


def toml(rng: Random) -> Case:
    """A changed settings file."""
    file = Path("meteora.toml")
    command = rng.choice([["config", "show", "--json"], ["config", "show"], ["data", "list", "--json"]])
    name = rng.choice(sorted(SETTINGS.keys() - {"model.device"}))  # every child gets METEORA_MODEL__DEVICE, which overrides the file
    section, _, key = name.partition(".")
    action = rng.randrange(8)
    case_check = None
    expect: Expect = "either"
    if action == 0:
        what, raw = mutate_bytes(rng, f"[{section}]\n{key} = 1\n".encode())
        file.write_bytes(raw)
    elif action == 1:
        what = rng.choice(
            [
                "[eval]\nlimt = 3",
                "evl = 3",
                "[nothing]\nx = 1",
                "[eval.limit]\nx = 1",
                "[eval]\nlimit = 1\nlimit = 2",
                "eval = 3",
                "[[eval]]\nlimit = 1",
                "[eval",
            ]
        )
        file.write_text(what + "\n")
        expect = "fail"
    elif action == 2:
        task = rng.choice(['"../x"', '""', '"a b"', '"all"', '"[/PWN]"', '"\\u001b]0;PWN\\u0007"', "ok", '"' + "x" * 300 + '"', '"a\\nb"'])
        train = rng.choice(['"raw/alpha.jsonl"', "3", '"/dev/zero"', '"nowhere"', "nan", '"\\u0000"'])
        metric = rng.choice(['"exact"', '"odd"', "3"])
        file.write_text(f"[tasks.{task}]\ntrain = {train}\ntest = {train}\nmetric = {metric}\n")
        what = file.read_text()
        command = ["data", "list", "--json"]
    elif action == 3:
        os.mkfifo(file) if rng.random() < 0.5 else file.symlink_to(rng.choice(["/dev/zero", "meteora.toml"]))
        what = "no file"
    else:
        text = rng.choice(TOML_VALUES)
        file.write_text(f"[{section}]\n{key} = {text}\n")
        what = f"{name} = {text:.60}"
        try:
            value = tomllib.loads(file.read_text())[section][key]
            sense = _sense(name, value)
        except (tomllib.TOMLDecodeError, ValueError, RecursionError):
            sense, value = False, None
        if sense is False:
            expect = "fail"
        if command == ["config", "show", "--json"]:
            case_check = _shows(section, key, value)
    return Case(
        what, command, expect=expect, why="no setting, or no such value" if expect == "fail" else "", check=case_check, terminal=command == ["config", "show"]
    )


def _shows(section: str, key: str, value: Any) -> Any:
    def check(outcome: Outcome) -> str | None:
        shown = document(outcome)[section][key]
        if isinstance(value, int | float) and not isinstance(value, bool) and not (isinstance(shown, int | float) and shown == value):
            return f"it is {value!r} and shown as {shown!r}"
        return None

    return check


def environment(rng: Random) -> Case:
    """A changed environment."""
    name = rng.choice(sorted(SETTINGS))
    section, _, key = name.partition(".")
    variable = f"METEORA_{section}__{key}".upper()
    values = [
        "",
        "x",
        "nan",
        "inf",
        "1e400",
        "-1",
        "0",
        "1.5",
        "9" * 30,
        "9" * 5000,
        "true",
        "[1]",
        "{}",
        "null",
        '"1"',
        " 1 ",
        "\x1b]0;PWN\x07",
        "[/PWN]",
        "1_0",
        "٣",
        "x" * 5000,
    ]
    value = rng.choice(values)
    expect: Expect = "either"
    check = None
    action = rng.randrange(10)
    if action == 0:
        variable = rng.choice([f"METEORA_{section}_{key}", f"METEORA_{section}__{key}X", f"METEORA__{section}__{key}"]).upper()
        value = "3"
        expect = "fail"
    elif action == 1:
        variable, value = f"METEORA_{section}".upper(), rng.choice(["3", "{}", '{"x": 1}', "[", "x", '{"limit": NaN}', "null", "[" * 4000])
        expect = "either" if value == "{}" else "fail"
    elif action == 2:
        variable, value = rng.choice(
            [
                ("METEORA_CACHE", "/proc/nowhere"),
                ("METEORA_CACHE", "\x1b]0;PWN\x07"),
                ("METEORA_CACHE", "x" * 5000),
                ("METEORA_CACHE", "raw/alpha.jsonl"),
                ("XDG_CACHE_HOME", "/proc/nowhere"),
                ("COLUMNS", "nan"),
                ("COLUMNS", "-5"),
                ("COLUMNS", "1"),
                ("COLUMNS", "0"),
                ("LINES", "x"),
                ("HOME", "/proc/nowhere"),
                ("TMPDIR", "/proc/nowhere"),
                ("HF_HOME", "/proc/nowhere"),
                ("METEORA_DEBUG", "x"),
                ("PYTHONIOENCODING", "ascii"),
                ("LC_ALL", "nowhere"),
            ]
        )
    else:
        kind, *limits = SETTINGS[name]
        if kind in ("int", "float") and value.strip():
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if not math.isfinite(number) or not limits[0] <= number or (kind == "int" and number != int(number)):  # type: ignore[operator]
                expect = "fail" if value not in ("٣", "true", "null", "1_0") else "either"
    command = rng.choice([["config", "show", "--json"], ["config", "show"], ["data", "list", "--json"]])
    if "\x00" in value:
        value = "x"
    if action > 2 and expect == "either":
        check = None
    why = "no setting, or no such value" if expect == "fail" else ""
    return Case(
        f"{variable}={value!a:.60}", command, expect=expect, why=why, check=check, environment={variable: value}, terminal=command == ["config", "show"]
    )


NUMBERS = [
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e300",
    "1.5",
    "9" * 30,
    "9" * 5000,
    "2147483648",
    "18446744073709551616",
    "",
    "x",
    "٣",
    "1_000",
    "0x10",
    " 3",
    "1e-320",
]

FLAGS: list[tuple[list[str], str, str, float, float]] = [
    (["data", "show", "alpha", "--json"], "-n", "int", 1, math.inf),
    (["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--dry-run", "--examples", "0"], "--n", "int", 2, 2),
    (["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--dry-run", "--examples", "0"], "--num-samples", "int", 1, 4),
    (["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--dry-run"], "--examples", "int", 0, 20),
    (["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--dry-run", "--examples", "0"], "--seed", "int", -math.inf, math.inf),
    (["data", "add", "mine", "--train", "raw/alpha.jsonl", "--dry-run"], "--max-new-tokens", "int", 1, math.inf),
    (["data", "build", "--task", "strategyqa", "--source", "local", "--raw-dir", "archive.tar.gz", "--dry-run"], "--max-train", "int", 1, math.inf),
    (["data", "build", "--task", "strategyqa", "--source", "local", "--raw-dir", "archive.tar.gz"], "--max-test", "int", 1, math.inf),
    (["data", "build", "--task", "strategyqa", "--source", "local", "--raw-dir", "archive.tar.gz"], "--jobs", "int", 1, math.inf),
    (["ckpt", "pack", "packed", "new", "--json"], "--max-mb", "float", 1e-9, math.inf),
    (["ckpt", "pack", "packed", "new", "--json"], "--rank", "int", 1, math.inf),
    (["ckpt", "convert", "theirs", "new", "--base", "base", "--json"], "--top-k", "int", 1, 2),
    (["ckpt", "convert", "theirs", "new", "--base", "base", "--json"], "--T", "float", 2.0**-126, 2.0**126),
    (["ckpt", "convert", "theirs", "new", "--base", "base", "--json"], "--alpha", "float", 5e-324, 1e308),
    (["chat", "--checkpoint", "packed", "--json", "--max-new-tokens", "2"], "--T", "float", 2.0**-126, 2.0**126),
    (["chat", "--checkpoint", "packed", "--json", "--max-new-tokens", "2"], "--top-k", "int", 1, 2),
    (["chat", "--checkpoint", "packed", "--json", "--max-new-tokens", "2"], "--temperature", "float", 0, 1e308),
    (["chat", "--checkpoint", "packed", "--json"], "--max-new-tokens", "int", 1, math.inf),
    (["trace", "--checkpoint", "packed", "--json", "--task", "alpha", "--max-new-tokens", "1"], "--row", "int", 0, 3),
    (["eval", "--task", "alpha", "--model", "base", "--base", "base", "--max-new-tokens", "1", "--out", "out", "--json"], "--limit", "int", 1, math.inf),
    (["eval", "--task", "alpha", "--model", "base", "--base", "base", "--limit", "1", "--out", "out", "--json"], "--max-new-tokens", "int", 1, math.inf),
    (
        ["eval", "--task", "alpha", "--model", "base", "--base", "base", "--limit", "1", "--max-new-tokens", "1", "--out", "out"],
        "--batch-size",
        "int",
        1,
        math.inf,
    ),
    (
        ["eval", "--task", "alpha", "--checkpoint", "packed", "--limit", "1", "--max-new-tokens", "1", "--out", "out", "--json"],
        "--T",
        "float",
        2.0**-126,
        2.0**126,
    ),
    (["eval", "--task", "alpha", "--checkpoint", "packed", "--limit", "1", "--max-new-tokens", "1", "--out", "out", "--json"], "--top-k", "int", 1, 2),
]
TRAIN = ["train", "--base", "base", "--max-steps", "1", "--batch-size", "2", "--log-to", "none"]
FLAGS += [
    (["train", "adapters", *TRAIN[1:], "--task", "alpha", "--dry-run"], flag, kind, low, high)
    for flag, kind, low, high in [
        ("--max-steps", "int", 0, math.inf),
        ("--batch-size", "int", 1, math.inf),
        ("--accumulation", "int", 1, math.inf),
        ("--lr", "float", 1e-12, 10),
        ("--max-length", "int", 8, math.inf),
        ("--seed", "int", 0, 2**32 - 1),
        ("--eval-steps", "int", 0, math.inf),
        ("--patience", "int", 0, math.inf),
        ("--log-steps", "int", 1, math.inf),
        ("--save-steps", "int", 1, math.inf),
        ("--max-rows", "int", 1, math.inf),
        ("--rank", "int", 1, math.inf),
        ("--alpha", "float", 5e-324, 1e308),
    ]
]
FLAGS += [
    ([*TRAIN, "--out", "runs/new", "--json"], flag, kind, low, high)
    for flag, kind, low, high in [
        ("--beta", "float", 0, 1e308),
        ("--answer-share", "float", 5e-324, 1),
        ("--top-k", "int", 1, 2),
        ("--T", "float", 2.0**-126, 2.0**126),
        ("--adapter-lr", "float", 1e-12, 10),
        ("--composite-rows", "float", 0, 1),
        ("--composite-max", "int", 2, math.inf),
        ("--joined-rows", "float", 0, 1),
        ("--joined-max", "int", 2, math.inf),
        ("--list-rows", "float", 0, 0.9),
        ("--list-max", "int", 2, math.inf),
        ("--rank", "int", 1, 0),
        ("--alpha", "float", 1, 0),
        ("--lr", "float", 1e-12, 10),
        ("--max-length", "int", 8, math.inf),
        ("--batch-size", "int", 1, math.inf),
        ("--accumulation", "int", 1, math.inf),
    ]
]


def numbers(rng: Random) -> Case:
    """A number out of its range, or no number."""
    command, flag, kind, low, high = rng.choice(FLAGS)
    text = rng.choice(NUMBERS)
    try:
        value = float(text)
        fails = not (math.isfinite(value) and low <= value <= high) or (kind == "int" and not text.strip().lstrip("-").isdigit())
    except ValueError:
        fails = True
    writes = ("datasets/strategyqa", "datasets/both", "new", "runs/new", "out")
    why = f"{flag} takes {kind} from {low} to {high}" if fails and text not in ("٣", "1_000", " 3") else ""
    return Case(f"{flag} {text:.40}", [*command, flag, text], expect="fail" if why else "either", why=why, writes=writes, stdin=b"hello")

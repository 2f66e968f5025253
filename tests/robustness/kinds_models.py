"""Malformed adapters, checkpoints and base models."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from random import Random

from . import reference
from .cases import Case, document, judged, same_ids, same_samples
from .forks import Outcome
from .mutate import dumps, mutate_document, mutate_json, mutate_tensors, no_file, strange
from .reference import need

ASK = "say 7\n"
EVALUATE = ["--task", "alpha", "--model", "base", "--base", "base", "--limit", "1", "--max-new-tokens", "2", "--out", "out"]
RAW = ["--template", "raw", "--max-new-tokens", "5", "--json"]


def _odd_file(rng: Random, file: Path) -> str:
    """Put something in the place of a file that is no file, or no such file."""
    file.unlink()
    action = rng.randrange(6)
    if action == 0:
        return f"{file.name} missing"
    if action <= 4:
        return no_file(action - 1, file)
    file.with_suffix(".bin").write_bytes(b"\x80\x04N.")
    return f"{file.name} is a pickle instead"


ADAPTER_KEYS = {
    "use_dora": True,
    "use_qalora": True,
    "bias": "all",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "target_parameters": ["x"],
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "layer_replication": [[0, 1], [0, 2]],
    "peft_type": "IA3",
    "use_rslora": True,
    "r": 8,
    "r ": 4,
    "lora_alpha": 0,
    "alora_invocation_tokens": [1, 2],
    "trainable_token_indices": [1],
}


def _break_adapter(rng: Random, folder: Path) -> str:
    action = rng.randrange(10)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if action == 0:
        return _odd_file(rng, rng.choice([config, weights]))
    if action < 5:
        return mutate_tensors(rng, weights)
    values = json.loads(config.read_text())
    if action == 5:
        key = rng.choice(sorted(ADAPTER_KEYS))
        values[key] = ADAPTER_KEYS[key] if rng.random() < 0.7 else strange(rng)[1]
        config.write_text(dumps(values))
        return f"{key} = {values[key]!a:.60}"
    if action == 6:
        key = rng.choice(["alpha_pattern", "rank_pattern"])
        pattern = rng.choice(["([a-z_.0-9]+)+!", "q_proj", ".*", "(", "(a|a)*$", "(?P<x>a)(?P=x)", "", "model.layers.0.self_attn.q_proj", "\x1b[31;5mPWN"])
        values[key] = {pattern: rng.choice([4, 2, 1.5, "a", None, -1, 0])}
        config.write_text(dumps(values))
        return f"{key} = {values[key]!a:.60}"
    return mutate_document(rng, config)


def adapter(rng: Random) -> Case:
    """A changed PEFT folder, read by every command that reads one."""
    folder = Path("adapters/alpha")
    what = _break_adapter(rng, folder)
    change = lambda: reference.one_adapter(reference.read_adapter(folder))  # noqa: E731
    command = rng.choices(["chat", "trace", "eval", "inspect", "gates"], [5, 2, 4, 3, 1])[0]
    if command == "inspect":
        return Case(what, ["ckpt", "inspect", str(rng.choice([folder, folder.parent])), *rng.choice([["--json"], []])], terminal=False)
    if command == "eval":
        argv = ["eval", "--task", "alpha", "--model", rng.choice(["own", "alpha", "adapters/alpha"]), "--base", "base", "--limit", "2"]
        argv += ["--max-new-tokens", "5", "--out", "out"]
        case = Case(what, argv, check=same_samples(change, Path("out"), "alpha", 5), writes=("out",))
    elif command == "gates":
        argv = ["train", "--base", "base", "--max-steps", "1", "--batch-size", "2", "--log-to", "none", "--out", "runs/new", "--json"]
        case = Case(what, argv, writes=("runs/new",), check=_trained)
    elif command == "chat":
        case = Case(what, ["chat", "--adapter", str(folder), "--base", "base", *RAW], stdin=ASK.encode(), check=same_ids(change, ASK.strip("\n"), 5))
    else:
        case = Case(what, ["trace", "--adapter", str(folder), "--base", "base", "--prompt", ASK, *RAW], check=same_ids(change, ASK, 5))
    return judged(case, partial(_usable, change))


def _usable(change: object) -> None:
    """Raises Invalid where a model with this change gives logits that are not finite."""
    assert callable(change)
    reference.answer(Path("base"), change(), reference.encode(ASK), 3)


def _trained(outcome: Outcome) -> str | None:
    reference.read_native(Path("runs/new"), Path())
    return None


def _break_checkpoint(rng: Random, folder: Path) -> str:
    config, weights = folder / "meteora_config.json", folder / "meteora.safetensors"
    action = rng.randrange(10)
    if action == 0:
        return _odd_file(rng, rng.choice([config, weights]))
    if action < 5:
        what = mutate_tensors(rng, weights)
        if rng.random() < 0.8:
            values = json.loads(config.read_text())
            values["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
            config.write_text(json.dumps(values))
            what += " (with its own hash)"
        return what
    if action == 5:
        values = json.loads(config.read_text())
        entries = values["adapters"]
        what = rng.choice(["swapped", "one name twice", "one left out", "another name", "another source"])
        if what == "swapped":
            entries.reverse()
            (folder / "swapped").touch()
        elif what == "one name twice":
            entries[1]["name"] = entries[0]["name"]
        elif what == "one left out":
            entries.pop()
        elif what == "another name":
            entries[0]["name"] = rng.choice(["../x", "", "gamma", "\x1b]0;PWN\x07", "[/PWN]", "a/b", "a\nb"])
        else:
            entries[0]["source"] = rng.choice(["../x", "/dev/zero", "", "adapters/beta", "base", "\x1b]0;PWN\x07"])
        config.write_text(json.dumps(values))
        return f"adapters: {what}"
    if action == 6:
        what, values = mutate_json(rng, json.loads(config.read_text())["modules"])
        whole = json.loads(config.read_text())
        config.write_text(dumps({**whole, "modules": values}))
        return f"modules: {what}"
    return mutate_document(rng, config)


def checkpoint(rng: Random) -> Case:
    """A changed native checkpoint, with its adapters inside or outside."""
    folder = Path(rng.choice(["packed", "runs/meteora"]))
    what = f"{folder}: {_break_checkpoint(rng, folder)}"
    swapped = (folder / "swapped").exists()
    (folder / "swapped").unlink(missing_ok=True)
    change = lambda: reference.mixture(reference.read_native(folder, Path()))  # noqa: E731
    command = rng.choices(["chat", "trace", "eval", "inspect", "pack", "card", "page"], [5, 2, 3, 3, 2, 1, 1])[0]
    if command == "inspect":
        return Case(what, ["ckpt", "inspect", str(folder), *rng.choice([["--json"], [], ["--no-hashes"]])], terminal=rng.random() < 0.3)
    if command == "card":
        return Case(what, ["ckpt", "card", str(folder)], writes=(f"{folder}/README.md",))
    if command == "pack":
        argv = ["ckpt", "pack", str(folder), "new", *rng.choice([[], ["--rank", "2"], ["--task", "beta"]]), "--dtype", "float32", "--json"]
        case = Case(what, argv, writes=("new",), check=_packed(folder) if len(argv) == 7 else _readable)
    elif command == "eval":
        argv = ["eval", "--task", "alpha", "--checkpoint", str(folder), "--limit", "2", "--max-new-tokens", "5", "--T", "1", "--out", "out"]
        case = Case(what, argv, check=same_samples(lambda: _warm(folder), Path("out"), "alpha", 5), writes=("out",))
    elif command == "chat":
        case = Case(what, ["chat", "--checkpoint", str(folder), *RAW], stdin=ASK.encode(), check=same_ids(change, ASK.strip("\n"), 5))
    elif command == "page":
        argv = ["trace", "--checkpoint", str(folder), "--prompt", ASK, "--max-new-tokens", "3", "--out", "page.html"]
        case = Case(what, argv, writes=("page.html",), terminal=True)
    else:
        case = Case(what, ["trace", "--checkpoint", str(folder), "--prompt", ASK, *RAW], check=same_ids(change, ASK, 5))
    if swapped:
        return judged(case, lambda: need(False, "two adapters have changed places, and the gates have not"))
    return judged(case, partial(_usable, change))


def _warm(folder: Path) -> reference.Change:
    """The checkpoint at routing temperature 1."""
    read = reference.read_native(folder, Path())
    return reference.mixture(reference.Mixture(read.names, read.adapters, read.gates, read.top_k, 1.0))


def _readable(outcome: Outcome) -> str | None:
    try:
        reference.read_native(Path("new"), Path())
    except reference.Invalid as broken:
        return f"what it wrote is broken: {broken}"
    return None


def _packed(folder: Path) -> object:
    def check(outcome: Outcome) -> str | None:
        if wrong := _readable(outcome):
            return wrong
        ids = reference.encode(ASK)
        before, after = (reference.answer(Path("base"), reference.mixture(reference.read_native(place, Path())), ids, 5)[0] for place in (folder, Path("new")))
        shared = min(len(before), len(after))
        return None if before[:shared] == after[:shared] else f"packed, it answers {after}, before {before}"

    return check


def authors(rng: Random) -> Case:
    """A changed checkpoint in the authors' layout."""
    file = Path("theirs/model.safetensors")
    what = _odd_file(rng, file) if rng.random() < 0.1 else mutate_tensors(rng, file)
    command = rng.choices(["convert", "chat", "inspect"], [4, 2, 2])[0]
    place = rng.choice([file, file.parent])
    if command == "inspect":
        return Case(what, ["ckpt", "inspect", str(place), "--json"])
    meaning = lambda: reference.mixture(reference.read_authors(file))  # noqa: E731
    if command == "convert":
        argv = ["ckpt", "convert", str(place), "new", "--base", "base", "--names", "alpha,beta", "--json"]
        case = Case(what, argv, writes=("new",), check=_converted)
    else:
        argv = ["chat", "--checkpoint", str(place), "--base", "base", *RAW]
        case = Case(what, argv, stdin=ASK.encode(), check=same_ids(meaning, ASK.strip("\n"), 5))
    return judged(case, partial(_usable, meaning))


def _converted(outcome: Outcome) -> str | None:
    try:
        theirs = reference.read_authors(Path("theirs/model.safetensors"))
    except reference.Invalid:
        return None  # another base: the reference cannot tell
    if wrong := _readable(outcome):
        return wrong
    ids = reference.encode(ASK)
    ours = reference.read_native(Path("new"), Path())
    before, after = (reference.answer(Path("base"), reference.mixture(each), ids, 5)[0] for each in (theirs, ours))
    shared = min(len(before), len(after))
    return None if before[:shared] == after[:shared] else f"converted, it answers {after}, before {before}"


def base(rng: Random) -> Case:
    """A changed base model."""
    name = rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"])
    file = Path("base") / name
    action = rng.random()
    what = _odd_file(rng, file) if action < 0.1 else mutate_tensors(rng, file) if name.endswith("safetensors") else mutate_document(rng, file)
    if rng.random() < 0.2:
        return Case(what, ["ckpt", "inspect", "base", "--json"])
    if name == "model.safetensors":
        argv = ["chat", "--base", "base", *RAW]
        model = lambda: reference.changed_base(Path("base"))  # noqa: E731
        change = reference.one_adapter({})
        case = Case(what, argv, stdin=ASK.encode(), check=same_ids(lambda: change, ASK.strip("\n"), 5, model))
        return judged(case, _base_usable)
    argv = rng.choice([["chat", "--base", "base", *RAW], ["chat", "--checkpoint", "packed", *RAW], ["eval", *EVALUATE]])
    return Case(what, argv, stdin=ASK.encode(), check=None if argv[0] == "eval" else _finite_routes, writes=("out",))


def _base_usable() -> None:
    """Raises Invalid where weights are missing or an answer is not finite."""
    reference.answer(reference.changed_base(Path("base")), reference.one_adapter({}), reference.encode(ASK), 3)


def _finite_routes(outcome: Outcome) -> str | None:
    return None if "NaN" not in json.dumps(document(outcome)) else "NaN in the document"

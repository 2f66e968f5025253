"""Inputs that are unusual and right: they must be accepted, and mean what they mean everywhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from . import reference
from .cases import Case, document, same_ids, same_samples
from .forks import Outcome
from .kinds_data import strict_rows
from .kinds_models import ASK, RAW
from .mutate import join_tensors, split_tensors
from .world import linear_shapes

HARMLESS = {
    "auto_mapping": None,
    "revision": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "use_qalora": False,
    "qalora_group_size": 16,
    "lora_bias": False,
    "exclude_modules": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "peft_version": "0.17.1",
    "runtime_config": {"ephemeral_gpu_offload": False},
    "task_type": None,
    "ensure_weight_tying": False,
    "arrow_config": None,
    "alora_invocation_tokens": None,
}
"""Keys that PEFT of one version or another writes for a plain LoRA."""


def _vary_adapter(rng: Random, folder: Path) -> str:
    import torch
    from safetensors.torch import load_file, save_file

    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(weights)
    what = rng.choice(
        [
            "keys",
            "fewer keys",
            "rslora",
            "alpha",
            "patterns",
            "all-linear",
            "expression",
            "prefix",
            "dtype",
            "one dtype",
            "order",
            "metadata",
            "fewer layers",
            "ranks",
        ]
    )
    if what == "keys":
        values |= {key: HARMLESS[key] for key in rng.sample(sorted(HARMLESS), 8)}
    elif what == "fewer keys":
        values = {key: values[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")}
    elif what == "rslora":
        values["use_rslora"] = True
    elif what == "alpha":
        values["lora_alpha"] = rng.choice([1, 0.5, 32, 3.75, 64.0])
    elif what == "patterns":
        values["alpha_pattern"] = rng.choice([{"q_proj": 2}, {"layers.1.mlp.up_proj": 0.5, "k_proj": 3}, {"model.layers.0.self_attn.o_proj": 9}])
    elif what == "all-linear":
        values["target_modules"] = "all-linear"
    elif what == "expression":
        values["target_modules"] = r".*\.(q|k|v|o|gate|up|down)_proj"
    elif what == "prefix":
        prefix = rng.choice(["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."])
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    elif what == "dtype":
        kind = rng.choice([torch.float16, torch.bfloat16, torch.float64])
        tensors = {name: tensor.to(kind) for name, tensor in tensors.items()}
    elif what == "one dtype":
        tensors = {name: tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float32])) for name, tensor in tensors.items()}
    elif what == "order":
        header, body = split_tensors(weights.read_bytes())
        weights.write_bytes(join_tensors(dict(reversed(list(header.items()))), body))
        return "an adapter's header in another order"
    elif what == "fewer layers":
        kinds = rng.sample(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], 3)
        tensors = {name: tensor for name, tensor in tensors.items() if any(f".{kind}." in name for kind in kinds)}
        values["target_modules"] = kinds
    elif what == "ranks":
        values["rank_pattern"] = {"v_proj": 2}
        tensors = {name: _narrow(name, tensor) if ".v_proj." in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, weights, metadata=None if what == "metadata" else {"format": "pt"})
    config.write_text(json.dumps(values, indent=rng.choice([None, 1, 4]), sort_keys=rng.random() < 0.5))
    if what == "keys" and rng.random() < 0.5:
        (folder / "default").mkdir()
        for file in (config, weights):
            shutil.move(file, folder / "default" / file.name)
        return "an adapter in default/"
    return f"an adapter with other {what}"


def _narrow(name: str, tensor: object) -> object:
    return (tensor[:2] if "lora_A" in name else tensor[:, :2]).contiguous()  # type: ignore[index]


def _adapter(rng: Random) -> Case:
    folder = Path("adapters/alpha")
    what = _vary_adapter(rng, folder)
    place = folder / "default" if (folder / "default").is_dir() else folder
    change = lambda: reference.one_adapter(reference.read_adapter(place))  # noqa: E731
    if rng.random() < 0.4:
        argv = ["eval", "--task", "alpha", "--model", "own", "--base", "base", "--limit", "2", "--max-new-tokens", "5", "--out", "out"]
        return Case(what, argv, "pass", "it is an ordinary adapter", same_samples(change, Path("out"), "alpha", 5), ("out",))
    if rng.random() < 0.2:
        argv = ["train", "--base", "base", "--max-steps", "1", "--batch-size", "2", "--log-to", "none", "--out", "runs/new"]
        return Case(what, argv, "pass", "it is an ordinary adapter", _trained(place), ("runs/new",))
    argv = ["chat", "--adapter", str(folder), "--base", "base", *RAW]
    return Case(what, argv, "pass", "it is an ordinary adapter", same_ids(change, ASK.strip("\n"), 5), stdin=ASK.encode())


def _trained(place: Path) -> Callable[[Outcome], str | None]:
    def check(outcome: Outcome) -> str | None:
        modules = json.loads(Path("runs/new/meteora_config.json").read_text())["modules"]
        for path, (A, _, scaling) in reference.read_adapter(place).items():
            if modules[path]["ranks"][0] != A.shape[0] or abs(modules[path]["scaling"][0] - scaling) > 1e-6 * scaling:
                return f"{path}: {modules[path]} and not rank {A.shape[0]}, scaling {scaling}"
        return None if set(modules) <= set(linear_shapes()) else "other modules"

    return check


def _checkpoint(rng: Random) -> Case:
    folder = Path(rng.choice(["packed", "runs/meteora"]))
    config = folder / "meteora_config.json"
    values = json.loads(config.read_text())
    what = rng.choice(["order of keys", "T", "top_k", "moved", "without a probe", "without training"])
    argv = ["chat", "--checkpoint", str(folder), *RAW]
    if what == "T":
        values["temperature"] = rng.choice([0.5, 2, 15.0])
    elif what == "top_k":
        values["top_k"] = 1
    elif what == "moved":
        Path("adapters").rename("elsewhere")
        argv += ["--adapters", "elsewhere"]
    elif what == "without a probe":
        values["base"]["probe"] = None
    elif what == "without training":
        values["training"] = {}
    config.write_text(json.dumps(values, sort_keys=True))

    def change() -> reference.Change:
        if what == "moved":
            shutil.copytree("elsewhere", "adapters")
        return reference.mixture(reference.read_native(folder, Path()))

    return Case(f"{folder}: {what}", argv, "pass", "it is an ordinary checkpoint", same_ids(change, ASK.strip("\n"), 5), stdin=ASK.encode())


def _rows(rng: Random) -> Case:
    file = Path("raw/alpha.jsonl")
    lines = file.read_text().splitlines()
    what = rng.choice(["CRLF", "blank lines", "a byte order mark", "spaces", "more keys", "escapes", "no line end", "numbers", "long", "U+2028"])
    if what == "CRLF":
        file.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    elif what == "blank lines":
        file.write_text("\n\n" + "\n\n".join(lines) + "\n\n")
    elif what == "a byte order mark":
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    elif what == "spaces":
        file.write_text("".join(f"  {line}  \n" for line in lines))
    elif what == "no line end":
        file.write_text("\n".join(lines))
    else:
        row = json.loads(lines[3])
        row |= {
            "more keys": {"id": 3, "meta": {"a": [1, None]}},
            "escapes": {"prompt": "[INST] \x1b]0;x\x07 \u202e [/INST]\n"},
            "numbers": {"response": 42},
            "long": {"prompt": "[INST] " + "x" * 50_000 + " [/INST]\n"},
            "U+2028": {"response": "a\u2028b\u0085c"},
        }[what]
        lines[3] = json.dumps(row, ensure_ascii=rng.random() < 0.5)
        file.write_text("\n".join(lines) + "\n")

    def check(outcome: Outcome) -> str | None:
        built = [row for split in ("train", "test") for row in strict_rows(Path("datasets/mine") / f"{split}.jsonl")]
        return None if sorted(built) == sorted(strict_rows(file)) and document(outcome)["task"] == "mine" else "other rows than the file's"

    return Case(f"rows: {what}", ["data", "add", "mine", "--train", str(file), "--json"], "pass", "they are ordinary rows", check, ("datasets/mine",))


def variants(rng: Random) -> Case:
    """An adapter, a checkpoint or rows in a form that is right."""
    return rng.choices([_adapter, _checkpoint, _rows], [4, 2, 2])[0](rng)

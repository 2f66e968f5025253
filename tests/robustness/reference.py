"""An independent reading of adapters and checkpoints, and what a model with them answers, in float64: what the command line is compared with.

Nothing here uses Meteora. The base model is transformers' own, in float64; adapters and gates are added by hooks, as the method's equation says.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import regex
import torch
from torch import Tensor, nn

from .world import linear_shapes

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LETTERS = dict(enumerate(string.printable, start=3))
END = 2
PATTERN_SECONDS = 20.0
"""The longest time, in seconds, for one expression of a configuration: Python's own engine can need years for one that a mutation has made."""
CLOSE = 1e-3
"""Two logits that are nearer to each other than this may change places in float32."""


class Invalid(Exception):
    """What was read means nothing, or nothing that may be used."""


class Unknown(Invalid):
    """What was read may mean something, but this reference cannot say what."""


def need(condition: object, reason: str) -> None:
    """Raise Invalid unless ``condition`` holds."""
    if not condition:
        raise Invalid(reason)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object without NaN, infinities and numbers that overflow."""

    need(file.is_file(), f"no {file.name}")

    def refuse(word: str) -> Any:
        raise Invalid(f"{word} in {file.name}")

    def number(text: str) -> float:
        need(math.isfinite(float(text)), f"{text} overflows")
        return float(text)

    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"), parse_constant=refuse, parse_float=number)
    except (OSError, ValueError, RecursionError) as broken:
        raise Invalid(str(broken)) from broken
    need(isinstance(value, dict), f"{file.name} is no object")
    return value


def read_tensors(file: Path, *, finite: bool = True) -> dict[str, Tensor]:
    """All tensors of a safetensors file, in float64, where the file keeps to the format: ranges without gap or overlap, (finite) floating-point numbers."""
    need(file.is_file(), f"no {file.name}")
    raw = file.read_bytes()
    need(len(raw) >= 8, "cut")
    (length,) = struct.unpack("<Q", raw[:8])
    need(2 <= length <= len(raw) - 8, "header length")
    try:
        header = json.loads(raw[8 : 8 + length].decode("utf-8"))
        need(isinstance(header, dict), "header")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        body, place, tensors = raw[8 + length :], 0, {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            shape = entry["shape"]
            need(all(type(n) is int and n >= 0 for n in (begin, end, *shape)), "numbers")
            need(begin == place, f"{name}: place")
            if entry["dtype"] not in TYPES:
                of_base = name.startswith("base_model.model.") and ".lora_" not in name and ".moe_gate." not in name
                raise (Unknown if of_base or not finite else Invalid)(f"{name}: dtype {entry['dtype']}")
            dtype = TYPES[entry["dtype"]]
            need(end - begin == math.prod(shape) * dtype.itemsize and end <= len(body), f"{name}: size")
            place = end
            values = torch.frombuffer(bytearray(body[begin:end]), dtype=dtype) if end > begin else torch.zeros(0, dtype=dtype)
            tensors[name] = values.to(torch.float64).reshape(shape)
            need(not finite or tensors[name].isfinite().all(), f"{name}: not finite")
        need(place == len(body), "bytes behind the last tensor")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as broken:
        raise Invalid(f"header: {broken}") from broken
    return tensors


def _number(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    need(type(value) in (int, float) and math.isfinite(value), f"{key} = {value!r}")
    return float(value)


def _pattern(patterns: Any, path: str, default: float) -> float:
    need(patterns is None or isinstance(patterns, dict), "patterns")
    for key, value in (patterns or {}).items():
        need(type(value) in (int, float) and math.isfinite(value), f"pattern {key}")
        try:
            if regex.match(rf"(.*\.)?({key})$", path, timeout=PATTERN_SECONDS):
                return float(value)
        except regex.error as broken:
            raise Invalid(f"pattern {key}") from broken
        except TimeoutError as endless:
            raise Unknown(f"pattern {key} takes too long to match") from endless
    return default


MUST_BE_ABSENT = ("use_dora", "use_qalora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices")
MUST_BE_ABSENT += ("alora_invocation_tokens", "layer_replication", "megatron_config", "arrow_config", "corda_config", "lora_ga_config")

Weights = dict[str, tuple[Tensor, Tensor, float]]
"""By module path: A (r, in), B (out, r) and the scaling."""


def read_adapter(folder: Path) -> Weights:
    """What a PEFT LoRA folder means. Raises Invalid where it means nothing."""
    config = read_object(folder / "adapter_config.json")
    need(config.get("peft_type", "LORA") == "LORA", "peft_type")
    need(config.get("bias", "none") in ("none", "lora_only", "all"), "bias")  # the tensors hold no biases, or they are no LoRA weights
    for key in MUST_BE_ABSENT:
        need(not config.get(key), key)
    start = config.get("init_lora_weights")
    need(start is None or isinstance(start, bool) or str(start).lower() in ("gaussian", "orthogonal", "eva", "mica"), "init_lora_weights")
    rank, alpha = config.get("r", 8), _number(config, "lora_alpha", 8)
    need(type(rank) is int and rank >= 1, "r")
    need(0 <= _number(config, "lora_dropout", 0) <= 1, "lora_dropout")
    root = config.get("use_rslora", False)
    need(root is None or isinstance(root, bool), "use_rslora")
    tensors = read_tensors(folder / "adapter_model.safetensors")
    need(tensors, "no tensors")
    weights: Weights = {}
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        plain = re.sub(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module)(?=\.)", "", name).lstrip(".")
        match = re.fullmatch(r"(?:base_model\.model\.)*(.+)\.lora_([AB])(?:\.default)?\.weight", plain)
        need(match, f"{name} is no LoRA weight")
        assert match is not None
        need(match[2] not in sides.get(match[1], {}), f"{name} is there twice")
        sides.setdefault(match[1], {})[match[2]] = tensor
    for path, pair in sides.items():
        need(path in linear_shapes() and pair.keys() == {"A", "B"}, f"{path}: partner or layer")
        width, out = linear_shapes()[path]
        A, B = pair["A"], pair["B"]
        need(A.ndim == 2 and B.ndim == 2, f"{path}: shape")
        own = _pattern(config.get("rank_pattern"), path, rank)
        need(own == A.shape[0] == B.shape[1] and own >= 1 and (A.shape[1], B.shape[0]) == (width, out), f"{path}: shape")
        strength = _pattern(config.get("alpha_pattern"), path, alpha)
        weights[path] = (A, B, strength / (math.sqrt(own) if root else own))
    return weights


@dataclass(frozen=True)
class Mixture:
    """Adapters and gates: what a checkpoint means."""

    names: tuple[str, ...]
    adapters: tuple[Weights, ...]
    gates: dict[str, Tensor]
    top_k: int
    temperature: float


def read_native(folder: Path, root: Path) -> Mixture:
    """What a native checkpoint means; relative adapter folders are below ``root``. Raises Invalid."""
    config = read_object(folder / "meteora_config.json")
    try:
        return _native(folder, root, config)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as broken:
        raise Invalid(f"{type(broken).__name__}: {broken}") from broken


def _native(folder: Path, root: Path, config: dict[str, Any]) -> Mixture:
    need(type(config["format"]) is int and config["format"] in (1, 2), "format")
    features = config.get("features", [])
    need(isinstance(features, list) and all(name in ("scale", "shift", "experts") for name in features), "features")
    need(isinstance(config["base"]["name"], str), "base")
    top_k, temperature = config["top_k"], config["temperature"]
    names = tuple(entry["name"] for entry in config["adapters"])
    need(all(isinstance(name, str) and name for name in names) and len(set(names)) == len(names) >= 1, "names")
    need(type(top_k) is int and 1 <= top_k <= len(names), "top_k")
    need(type(temperature) in (int, float) and 2.0**-126 <= temperature <= 2.0**126, "temperature")
    file = folder / "meteora.safetensors"
    tensors = read_tensors(file)
    digest = config.get("weights_sha256")
    need(digest is None or digest == hashlib.sha256(file.read_bytes()).hexdigest(), "hash")
    need(set(config["contains"]) <= {"gates", "adapters", "base"} and "gates" in config["contains"], "contains")
    need(not config.get("base_tensors") and not config.get("base_rounded") and "base" not in config["contains"], "base tensors")
    embedded = "adapters" in config["contains"]
    modules = config["modules"]
    need(modules and set(modules) <= set(linear_shapes()), "modules")
    kinds = ("gate", "lora_A", "lora_B") if embedded else ("gate",)
    need(set(tensors) == {f"{path}.{kind}" for path in modules for kind in kinds}, "keys")
    adapters: list[Weights] = [{} for _ in names]
    outside = []
    if not embedded:
        for entry in config["adapters"]:
            need(isinstance(entry["source"], str), "source")
            tried = [root / entry["source"], folder / entry["source"], folder / "adapters" / entry["name"], root / "adapters" / entry["name"]]
            place = next((place for place in tried if _is_the_one(place, entry["sha256"])), None)
            need(place, "no adapter with that hash")
            assert place is not None
            outside.append(read_adapter(place))
        need({path for each in outside for path in each} == set(modules), "layers")
    for path, module in modules.items():
        width, out = linear_shapes()[path]
        ranks, scaling = module["ranks"], module["scaling"]
        need((module["in_features"], module["out_features"]) == (width, out), "features")
        need(len(ranks) == len(scaling) == len(names) and all(type(rank) is int and rank >= 0 for rank in ranks), "ranks")
        need(all(type(value) in (int, float) and math.isfinite(value) for value in scaling), "scaling")
        need(tuple(tensors[f"{path}.gate"].shape) == (len(names), width), "gate")
        if embedded:
            A, B = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
            need(A.shape == (sum(ranks), width) and B.shape == (sum(ranks), out), "bank")
            place = 0
            for number, rank in enumerate(ranks):
                if rank:
                    adapters[number][path] = (A[place : place + rank], B[place : place + rank].T, scaling[number])
                place += rank
        else:
            for number, weights in enumerate(outside):
                there = weights[path][0].shape[0] if path in weights else 0
                need(ranks[number] == there, "rank")
                if there:
                    need(math.isclose(weights[path][2], scaling[number], rel_tol=1e-2), "scaling")
                    adapters[number][path] = weights[path]
    return Mixture(names, tuple(adapters), {path: tensors[f"{path}.gate"] for path in modules}, top_k, float(temperature))


def _is_the_one(folder: Path, digest: str) -> bool:
    file = folder / "adapter_model.safetensors"
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest


def read_authors(file: Path, alpha: float = 16.0, top_k: int = 2, temperature: float = 1.0, count: int = 2) -> Mixture:
    """What a checkpoint in the authors' layout means, where it holds the world's base model unchanged. Raises Invalid."""
    tensors = read_tensors(file)
    base = read_tensors(Path("base/model.safetensors"))
    prefix = "base_model.model."
    known = set()
    other_base = False
    adapters: list[Weights] = [{} for _ in range(count)]
    gates = {}
    for path, (width, out) in linear_shapes().items():
        keys = [f"{prefix}{path}.{kind}.weight" for kind in ("moe_gate", "lora_A", "lora_B", "base_layer")]
        need(all(key in tensors for key in keys), f"{path} lacks a tensor")
        known |= set(keys)
        gate, A, B, plain = (tensors[key] for key in keys)
        need(gate.shape == (count, width) and A.ndim == 2 and A.shape[1] == width and A.shape[0] % count == 0 and A.shape[0], f"{path}: shape")
        need(B.shape == (out, A.shape[0]) and plain.shape == (out, width), f"{path}: B or base")
        other_base |= not torch.equal(plain, base[f"{path}.weight"])
        rank = A.shape[0] // count
        gates[path] = gate
        for number in range(count):
            rows = slice(rank * number, rank * (number + 1))
            adapters[number][path] = (A[rows], B[:, rows], alpha / rank)
    for name, tensor in base.items():
        if name.rpartition(".")[0] not in linear_shapes():
            key = prefix + name
            need(key in tensors and tensors[key].shape == tensor.shape, f"{name} differs")
            other_base |= not torch.equal(tensors[key], tensor)
            known.add(key)
    need(set(tensors) == known, "unknown tensors")
    if other_base:
        raise Unknown("it has base tensors of its own")
    return Mixture(tuple(map(str, range(count))), tuple(adapters), gates, top_k, temperature)


@lru_cache(maxsize=1)
def _base(folder: str) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


Change = Callable[[str, Tensor], Tensor]
"""What is added to a linear's output, of its path and its input (tokens, in)."""


def one_adapter(weights: Weights) -> Change:
    """One adapter on every token."""

    def change(path: str, x: Tensor) -> Tensor:
        if path not in weights:
            return x.new_zeros(())
        A, B, scaling = weights[path]
        return scaling * (x @ A.T) @ B.T

    return change


def mixture(model: Mixture) -> Change:
    """The gates' choice of adapters, for each token."""

    def change(path: str, x: Tensor) -> Tensor:
        if path not in model.gates:
            return x.new_zeros(())
        logits = x @ model.gates[path].T
        chosen, places = logits.topk(model.top_k, dim=-1)
        shares = torch.zeros_like(logits).scatter(-1, places, (chosen / model.temperature).softmax(-1))
        total = x.new_zeros(x.shape[0], linear_shapes()[path][1])
        for number, weights in enumerate(model.adapters):
            if path in weights:
                A, B, scaling = weights[path]
                total = total + shares[:, number : number + 1] * (scaling * (x @ A.T) @ B.T)
        return total

    return change


def encode(text: str) -> list[int]:
    """The tokens of an ASCII text."""
    numbers = {letter: number for number, letter in LETTERS.items()}
    return [numbers[letter] for letter in text]


def decode(ids: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    return "".join(LETTERS.get(number, "") for number in ids)


def changed_base(folder: Path) -> nn.Module:
    """A model of the world's architecture with the weights that lie in ``folder`` now. Raises Invalid where they are not all there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plain = LlamaForCausalLM._from_config(LlamaConfig.from_pretrained(folder), attn_implementation="eager").double().eval()
    tensors = read_tensors(folder / "model.safetensors", finite=False)
    own = plain.state_dict()
    # transformers also reads names without the prefix of the inner model, as LlamaModel.save_pretrained writes them
    tensors = {name: tensors[name if name in tensors else name.removeprefix("model.")] for name in own if {name, name.removeprefix("model.")} & tensors.keys()}
    missing = [name for name, tensor in own.items() if name not in tensors or tensors[name].shape != tensor.shape]
    need(not missing, f"no such weights: {missing[:2]}")
    plain.load_state_dict({name: tensors[name] for name in own})
    return plain


def answer(base: Path | nn.Module, change: Change, ids: Sequence[int], count: int) -> tuple[list[int], bool]:
    """A greedy answer of at most ``count`` tokens, END included; and whether every choice was clear (else the answer stops before the unclear one)."""
    model = base if isinstance(base, nn.Module) else _base(str(base))
    handles = [model.get_submodule(path).register_forward_hook(_hook(change, path)) for path in linear_shapes()]
    try:
        written: list[int] = []
        with torch.no_grad():
            while len(written) < count:
                logits = model(input_ids=torch.tensor([[*ids, *written]])).logits[0, -1]
                need(logits.isfinite().all(), "logits are not finite")
                best, places = logits.topk(2)
                if float(best[0] - best[1]) < CLOSE * max(1.0, float(best[0].abs())):
                    return written, False
                written.append(int(places[0]))
                if written[-1] == END:
                    break
        return written, True
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change, path: str) -> Callable[..., Tensor]:
    def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        extra = change(path, given[0].reshape(-1, given[0].shape[-1]))
        return output if extra.ndim == 0 else output + extra.reshape(output.shape)

    return hook

"""The names of tensors in ``adapter_model.safetensors``, sorted by what they are; what no mixture of adapters can contain is refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from meteora_core.adapters.config import CONFIG, PLAIN, WRAPPERS, AdapterConfig, is_named
from meteora_core.adapters.magnitudes import WEIGHT_NAMES
from meteora_core.errors import AdapterError
from meteora_core.tensor_files import TensorEntry

_PREFIX = "base_model.model."
_NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
_LORA = re.compile(rf"^(?P<path>.+?)(?P<levels>(?:\.base_layer)*)\.lora_(?P<side>[AB]){_NAME}\.(?P<kind>weight|bias)$")
_MAGNITUDE = re.compile(rf"^(?P<path>.+)\.lora_magnitude_vector{_NAME}(?:\.weight)?$")
_BIAS = re.compile(r"^(?P<path>.+?)(?:\.base_layer)?\.bias$")
_SAVED = re.compile(rf"^(?P<path>.+?)(?:\.modules_to_save{_NAME})?\.(?P<kind>weight|bias)$")
_COPY = re.compile(
    r"^(?P<path>(?:.+\.)?(?:lm_head|embed_out|output_layer|embed_tokens|wte|embed_in|word_embeddings))(?:\.base_layer|\.original_module)?\.weight$"
)
_TOKENS = re.compile(rf"^(?P<path>.+)\.token_adapter\.trainable_tokens_delta{_NAME}$")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|wpe|embed_in|word_embeddings|tok_embeddings|embeddings?)$")
_DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""Parameters of experts in the order in which transformers' modules declare them, by which PEFT nests its wrappers."""
_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class BaseCopy:
    """Weights of the base model that PEFT saved with the adapter, as it does for an adapted ``lm_head``; they must equal the base model's.

    Attributes:
        path: The path of the module in the base model.
        entry: The file, dtype and shape of the copy.
        key: The name of the copy in the file.
        rows: The token ids of its rows (``trainable_token_indices``); None if it has the rows of all tokens.
    """

    path: str
    entry: TensorEntry
    key: str
    rows: tuple[int, ...] | None = None


@dataclass
class Names:
    """The keys of an adapter's tensors by module path.

    Attributes:
        lora: For every module with LoRA, the keys of "A" and "B", and of "shift" (the bias of B), "magnitude" (DoRA) and "bias" if it has them.
        whole: For every linear layer that was trained as a whole, the keys of "weight" and, if it has one, "bias".
        copies: The weights of the base model that were saved too.
        experts: The modules of ``lora`` that hold the weights of several experts, with their number of experts.
    """

    lora: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, dict[str, str]] = field(default_factory=dict)
    copies: list[BaseCopy] = field(default_factory=list)
    experts: dict[str, int] = field(default_factory=dict)


def module_path(key: str) -> str:
    """Return a tensor's name without the prefixes and parts that wrappers (PEFT, ``torch.compile``, FSDP, DDP) insert, even repeatedly."""
    key = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while True:
        bare = key.removeprefix("module.").removeprefix(_PREFIX)
        if bare == key:
            return key
        key = bare


def read_names(name: str, entries: Mapping[str, TensorEntry], config: AdapterConfig) -> Names:
    """Sort the keys of an adapter's tensors, and check their dtypes and shapes.

    Args:
        name: The adapter's name in error messages.
        entries: The header of the file.
        config: The adapter's configuration.

    Raises:
        AdapterError: A tensor is none of those in :class:`Names`, has a wrong dtype or shape, or is missing.
    """
    names, adapters, biases = Names(), Counter[str](), {}
    for key, entry in entries.items():
        bare = module_path(key)
        if entry.dtype not in WEIGHT_NAMES:
            raise AdapterError(f"adapter {name!r}: {key} has dtype {entry.dtype}; weights are F16, BF16, F32 or F64", hint="save it in a floating dtype")
        if match := _LORA.match(bare):
            path, what = _parameter(name, match, config), match["side"] if match["kind"] == "weight" else "shift"
            if match["kind"] == "bias" and match["side"] == "A":
                raise AdapterError(f"adapter {name!r}: {key} is not a LoRA weight; it cannot be stacked", hint=PLAIN)
            _put(name, names.lora.setdefault(path, {}), what, key, path)
            adapters[match["adapter"] or ""] += what in "AB"
        elif match := _MAGNITUDE.match(bare):
            _put(name, names.lora.setdefault(match["path"], {}), "magnitude", key, match["path"])
        elif match := _TOKENS.match(bare):
            names.copies.append(BaseCopy(match["path"], entry, key, config.token_rows(match["path"])))
        elif (match := _SAVED.match(bare)) and is_named(match["path"], config.modules_to_save or ()) and not _EMBEDDING.search(match["path"]):
            _put(name, names.whole.setdefault(match["path"], {}), match["kind"], key, match["path"])
        elif match := _COPY.match(bare):
            names.copies.append(BaseCopy(match["path"], entry, key))
        elif config.bias != "none" and (match := _BIAS.match(bare)):
            biases[match["path"]] = key
        else:
            raise AdapterError(f"adapter {name!r}: {key} is {_what(bare)}; it cannot be stacked", hint=_without(bare))
    for path, key in biases.items():
        if path not in names.lora:
            raise AdapterError(
                f"adapter {name!r} has a trained bias of {path}, which has no LoRA and therefore no gate", hint="train the adapter with bias='lora_only'"
            )
        names.lora[path]["bias"] = key
    if not names.lora and not names.whole:
        raise AdapterError(f"adapter {name!r} holds no weights", hint="copy or train the adapter again")
    if len(adapters) > 1:
        raise AdapterError(f"adapter {name!r} holds several adapters: {', '.join(sorted(adapters))}", hint="save one adapter per folder")
    _check(name, names, entries, config)
    return names


def _put(name: str, keys: dict[str, str], what: str, key: str, path: str) -> None:
    if what in keys:
        said = f"lora_{what}" if what in "AB" else what
        raise AdapterError(f"adapter {name!r} holds two tensors for {said} of {path}: {keys[what]} and {key}", hint="save one adapter per folder")
    keys[what] = key


def _split(target: str) -> tuple[str, str, str]:
    return target.rpartition(".")


def _parameter(name: str, match: re.Match[str], config: AdapterConfig) -> str:
    """Return the path of the module of a LoRA weight; for a parameter of experts, the path of the parameter.

    PEFT nests the wrappers of several parameters of one module: the innermost one belongs to the parameter that was declared first.
    """
    path, level = match["path"], match["levels"].count(".base_layer")
    leaves = {leaf for module, _, leaf in map(_split, config.target_parameters or ()) if is_named(path, {module or "experts"})}
    if not leaves:
        return path + match["levels"]
    if unknown := sorted(leaves - set(_DECLARED)):
        raise AdapterError(
            f"adapter {name!r} targets the parameter {unknown[0]} of {path}, and only {', '.join(_DECLARED)} of experts can be adapted",
            hint="train it with target_parameters of the experts alone",
        )
    declared = sorted(leaves, key=_DECLARED.index)
    if level >= len(declared):
        raise AdapterError(f"adapter {name!r}: {path} has more LoRA weights than target_parameters in its {CONFIG}", hint=_AGAIN)
    return f"{path}.{declared[len(declared) - 1 - level]}"


def nested_name(path: str, adapted: Collection[str]) -> str:
    """Return the name that PEFT gives to the module of an adapted parameter of experts.

    Args:
        path: The path of the parameter, such as ``model.layers.0.mlp.experts.gate_up_proj``.
        adapted: The paths of all adapted parameters of the model.

    Example:
        >>> from meteora_core.adapters.tensor_names import nested_name
        >>> nested_name("mlp.experts.gate_up_proj", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        'mlp.experts.base_layer'
    """
    module, _, leaf = path.rpartition(".")
    later = [other for other in adapted if other.rpartition(".")[0] == module and _DECLARED.index(other.rpartition(".")[2]) > _DECLARED.index(leaf)]
    return module + ".base_layer" * len(later)


def _check(name: str, names: Names, entries: Mapping[str, TensorEntry], config: AdapterConfig) -> None:
    """Check shapes and ranks, and that all tensors of every module are there. Raises AdapterError."""
    for path, keys in names.lora.items():
        if sides := {"A", "B"} - keys.keys():
            have = next((f"lora_{side}" for side in "AB" if side in keys), ", ".join(sorted(keys)))
            raise AdapterError(f"adapter {name!r}: {path} has {have} but not {'the other matrix' if len(sides) == 1 else 'its LoRA matrices'}", hint=_AGAIN)
        for side in "AB":
            if len(entries[keys[side]].shape) != 2:
                shape = entries[keys[side]].shape
                raise AdapterError(f"adapter {name!r}: {keys[side]} has shape {shape}; only adapters of linear layers can be stacked", hint=PLAIN)
        first, second = entries[keys["A"]].shape, entries[keys["B"]].shape
        rank, wanted = first[0], config.rank_of(path)
        if second[1] != rank or 0 in (*first, *second):
            raise AdapterError(f"adapter {name!r}: {path} has A {first} and B {second}, whose ranks differ or are 0", hint=_AGAIN)
        if config.target_parameters and is_named(path, config.target_parameters) and rank % wanted == 0:
            names.experts[path] = rank // wanted
        elif rank != wanted:
            raise AdapterError(f"adapter {name!r}: {path} has rank {rank}, and {CONFIG} says {wanted}", hint="correct r or rank_pattern there")
        if bool(config.use_dora) != ("magnitude" in keys):
            said = "no DoRA magnitude, and use_dora is true" if config.use_dora else "a DoRA magnitude, and use_dora is false"
            raise AdapterError(f"adapter {name!r}: {path} has {said} in its {CONFIG}", hint="restore the adapter_config.json that was saved with the weights")
        for what in ("shift", "magnitude", "bias"):
            if what in keys and entries[keys[what]].shape != (second[0],):
                raise AdapterError(f"adapter {name!r}: {keys[what]} has shape {entries[keys[what]].shape}, expected {[second[0]]}", hint=_AGAIN)
    if config.lora_bias and (bare := next((path for path, keys in names.lora.items() if "shift" not in keys), None)):
        raise AdapterError(f"adapter {name!r}: {bare} has no bias of lora_B, and lora_bias is true in its {CONFIG}", hint=_AGAIN)
    if config.target_parameters and not names.experts:
        raise AdapterError(f"adapter {name!r} has no weights for {config.target_parameters[0]}, which target_parameters in its {CONFIG} names", hint=_AGAIN)
    saved = {*names.whole, *(copy.path for copy in names.copies)}
    if absent := [module for module in config.modules_to_save or () if not any(is_named(path, {module}) for path in saved)]:
        raise AdapterError(f"adapter {name!r} has no weights for {absent[0]}, which modules_to_save in its {CONFIG} names", hint=_AGAIN)
    if config.trainable_token_indices and not any(copy.rows is not None for copy in names.copies):
        raise AdapterError(f"adapter {name!r} has no rows for trainable_token_indices in its {CONFIG}", hint=_AGAIN)
    for path, keys in names.whole.items():
        if path in names.lora or "weight" not in keys or len(entries[keys["weight"]].shape) != 2:
            raise AdapterError(
                f"adapter {name!r} trained {path} as a whole (modules_to_save), and only linear layers without LoRA can be so trained",
                hint="train it without this module in modules_to_save",
            )
    for copy in names.copies:
        if copy.rows is not None and len(copy.rows) != copy.entry.shape[0]:
            raise AdapterError(f"adapter {name!r}: {copy.key} has {copy.entry.shape[0]} rows, and {CONFIG} names {len(copy.rows)} tokens", hint=_AGAIN)


def _what(key: str) -> str:
    if "lora_embedding" in key:
        return "an embedding adapter, and an embedding is computed before any gate could choose"
    if _EMBEDDING.search(key.rpartition(".")[0].removesuffix(".base_layer")):
        return "a tensor of the base model (PEFT saves embeddings that were resized or trained)"
    return "not a LoRA weight"


def _without(key: str) -> str:
    if "embed" in key or "lm_head" in key or "wte" in key:
        return "train on linear layers of an unchanged base model, and save with save_embedding_layers=False"
    return "only plain LoRA on linear layers can be stacked"

"""The model of ``adapter_config.json``, and the refusal of adapters that cannot be stacked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PrivateAttr, field_validator

from meteora_core.adapters.patterns import Patterns, PatternTable
from meteora_core.errors import AdapterError
from meteora_core.file_models import FileModel, read_model
from meteora_core.text import listed, shortened, shown

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts that wrappers insert into the names of modules."""

PLAIN = "train an ordinary LoRA or DoRA of linear layers"

_KEEPS_BASE = ("gaussian", "orthogonal", "eva", "mica")
"""PEFT's initialisations that leave the base model unchanged, so that a trained adapter does not depend on them."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT's initialisations that change or quantise the base model whenever the adapter is loaded."""

_UNSTACKABLE = {
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer_replication",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "velora_config": "VeLoRA (velora_config)",
    "megatron_config": "Megatron layers (megatron_config)",
}
"""Keys that change the result of an adapter, with their names in errors."""

_LISTED = frozenset({"layer_replication"})
"""Keys of ``_UNSTACKABLE`` whose value the error shows."""

_HARMLESS = frozenset(
    {
        "task_type",
        "fan_in_fan_out",
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "merge_weights",
        "base_model_class",
        "parent_library",
        "_name_or_path",
        "unsloth_fixed",
    }
)
"""Keys that do not affect the result of a trained LoRA: initialisation, origin, and options of the run. The layout of weights (``fan_in_fan_out``) is
that of the base model's layer."""


def _patterns(values: dict[str, Any] | None) -> dict[str, Any]:
    return values or {}


class AdapterConfig(FileModel):
    """The keys of ``adapter_config.json`` that are used; missing keys have PEFT's defaults.

    Attributes:
        peft_type: The kind of adapter; only "LORA", in any letter case, can be stacked.
        base_model_name_or_path: The name of the base model, if stated.
        r: The rank of modules that ``rank_pattern`` does not match.
        lora_alpha: The alpha of modules that ``alpha_pattern`` does not match.
        lora_dropout: The dropout probability in training, at least 0 and less than 1.
        use_rslora: Whether the scaling is alpha / sqrt(rank).
        rank_pattern: Ranks of single modules, by patterns of their names.
        alpha_pattern: Alphas of single modules, by patterns of their names.
        target_modules: The adapted modules: a list of names, a regular expression, or "all-linear".
        exclude_modules: The modules to leave out, as a list of names or a regular expression.
        layers_to_transform: The numbers of the adapted layers; None means all.
        layers_pattern: The name of the list of layers to which these numbers refer.
        bias: The trained biases: "none", "lora_only" or "all".
        init_lora_weights: The initialisation before training.
        use_dora: Whether the adapter is a DoRA, with a magnitude vector for every module.
        lora_bias: Whether the B matrices have biases.
        modules_to_save: The modules that were trained as a whole.
        target_parameters: The adapted parameters, such as the weights of all experts in one tensor.
        trainable_token_indices: The token ids whose embeddings were trained, as a list, or as lists by the name of the embedding.
    """

    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    r: int = Field(8, ge=1, le=1_000_000)
    lora_alpha: float = 8.0
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1)]] | None, AfterValidator(_patterns)] = Field(default_factory=dict)
    alpha_pattern: Annotated[dict[str, float] | None, AfterValidator(_patterns)] = Field(default_factory=dict)
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    bias: Literal["none", "lora_only", "all"] = "none"
    init_lora_weights: Any = True
    use_dora: bool | None = None
    lora_bias: bool | None = None
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    _source: str = PrivateAttr(CONFIG)

    @field_validator("target_modules", "exclude_modules", "layers_pattern")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return value
        raise ValueError("it should be a text or a list of texts")

    @field_validator("layers_to_transform")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value]
        if value is None or all(type(number) is int and number >= 0 for number in numbers):
            return value
        raise ValueError("it should be the number of a layer, or a list of such numbers")

    @field_validator("init_lora_weights")
    @classmethod
    def _start(cls, value: Any) -> Any:
        if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower().startswith((*_KEEPS_BASE, *_CHANGES_BASE))):
            return value
        raise ValueError("it should be true, false or the name of an initialisation that PEFT has")

    @cached_property
    def _runner(self) -> Patterns:
        return Patterns(self._source)

    @cached_property
    def _ranks(self) -> PatternTable:
        return PatternTable(self.rank_pattern or {}, self._runner)

    @cached_property
    def _alphas(self) -> PatternTable:
        return PatternTable(self.alpha_pattern or {}, self._runner)

    def rank_of(self, path: str) -> int:
        """Return the rank that the configuration states for a module. Raises AdapterError for a pattern that cannot be matched."""
        return int(self._ranks.get(path, self.r))

    def alpha_of(self, path: str) -> float:
        """Return the alpha that the configuration states for a module. Raises AdapterError for a pattern that cannot be matched."""
        return float(self._alphas.get(path, self.lora_alpha))

    @property
    def more(self) -> str | None:
        """What the adapter has besides plain LoRA of linear layers, such as "DoRA (use_dora)"; None if it has nothing."""
        reasons = {
            "DoRA (use_dora)": self.use_dora,
            f"bias={self.bias!r}": self.bias != "none",
            "lora_bias": self.lora_bias,
            "modules_to_save": self.modules_to_save,
            "target_parameters": self.target_parameters,
            "trainable_token_indices": self.trainable_token_indices,
        }
        return next((name for name, used in reasons.items() if used), None)

    def token_rows(self, path: str) -> tuple[int, ...]:
        """Return the token ids whose rows of an embedding were trained, in the order of the saved rows."""
        tokens = self.trainable_token_indices or []
        if isinstance(tokens, dict):
            tokens = next((ids for name, ids in tokens.items() if is_named(path, {name})), [])
        return tuple(tokens)

    def targets(self, paths: Iterable[str], every_linear: Collection[str] = ()) -> set[str]:
        """Return the modules of a model that the configuration targets; an empty set if it names no targets.

        Args:
            paths: The names of the model's modules that LoRA can adapt.
            every_linear: The modules that "all-linear" includes: all linear layers except the output layer.

        Raises:
            AdapterError: A pattern is invalid or takes too long to match.
        """
        if self.target_modules is None:
            return set()
        return {path for path in paths if self._targeted(path, every_linear)}

    def _targeted(self, path: str, every_linear: Collection[str]) -> bool:
        excluded, targets = self.exclude_modules, self.target_modules
        if excluded and (self._runner.full(excluded, path) if isinstance(excluded, str) else is_named(path, self._excluded)):
            return False
        if isinstance(targets, str):
            return path in every_linear if targets.lower() == "all-linear" else self._runner.full(targets, path)
        return path in self._names_targeted or (is_named(path, self._names_targeted) and self._in_layers(path))

    @cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules or ())

    @cached_property
    def _names_targeted(self) -> frozenset[str]:
        return frozenset(_unwrapped(name) for name in self.target_modules or ())

    def _in_layers(self, path: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        index = _layer_of(path) if not self.layers_pattern else self._listed_layer(path)
        return index is not None and index in (wanted if isinstance(wanted, list) else [wanted])

    def _listed_layer(self, path: str) -> int | None:
        """Return the number after the name of the list of layers, as PEFT does with ``layers_pattern``."""
        listed = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        parts = path.split(".")
        for pattern in listed:
            for position in range(1, len(parts) - 1):
                if parts[position].isdecimal() and self._runner.tail(pattern, ".".join(parts[:position])):
                    return int(parts[position])
        return None


def _unwrapped(name: str) -> str:
    """Return a module's name without the parts that ``torch.compile``, FSDP and DDP insert."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("module.")


def is_named(path: str, names: Collection[str]) -> bool:
    """Whether the path, or its end after one of its dots, is among the names."""
    parts = path.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _layer_of(path: str) -> int | None:
    """Return the first number in a path with at least two parts before it and one after it."""
    parts = path.split(".")
    return next((int(parts[position]) for position in range(2, len(parts) - 1) if parts[position].isdecimal()), None)


def find_adapter(folder: str | Path) -> Path | None:
    """Return the folder of ``adapter_config.json``: ``folder``, its ``default`` (PEFT's name for an adapter), or the only sub-folder that has one.

    Returns:
        The folder; None if no sub-folder has the file, or several have.
    """
    folder = Path(folder)
    for location in (folder, folder / "default"):
        if os.path.lexists(location / CONFIG):  # also a broken link: reading it raises the error
            return location
    try:
        candidates = [location for location in folder.iterdir() if not location.name.startswith(".") and os.path.lexists(location / CONFIG)]
    except (OSError, ValueError):
        return None
    return candidates[0] if len(candidates) == 1 else None


def read_adapter_config(name: str, folder: Path) -> AdapterConfig:
    """Read and check ``adapter_config.json``.

    Args:
        name: The adapter's name in error messages.
        folder: The folder that contains the file.

    Raises:
        AdapterError: The file is missing or broken, a value has the wrong type or is out of range, or the adapter cannot be stacked.
    """
    config = read_model(folder / CONFIG, AdapterConfig, error=AdapterError, hint=_hint_for(folder))
    config._source = f"adapter {name!r}: {folder / CONFIG}"
    _refuse_unsupported(name, config)
    return config


def _hint_for(folder: Path) -> str:
    """What to do if the configuration in a folder cannot be read; if there is none, the adapters inside the folder are named."""
    if not os.path.lexists(folder / CONFIG):
        try:
            inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and find_adapter(path) is not None)
        except OSError:
            inside = []
        if inside:
            return f"{folder} contains adapters; give one of them: {listed(inside)}"
    return f"{folder} should be a folder written by PEFT's save_pretrained"


def _refuse_unsupported(name: str, config: AdapterConfig) -> None:
    if config.peft_type.upper() != "LORA":
        raise AdapterError(f"adapter {name!r} is a {config.peft_type[:40]!r} adapter; only LORA can be stacked", hint="train a LoRA with PEFT's LoraConfig")
    start, more = config.init_lora_weights, config.model_extra or {}
    reasons = []
    if config.use_dora and config.lora_bias:
        reasons.append("lora_bias together with use_dora, of which PEFT knows no exact form,")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        reasons.append(f"init_lora_weights={start!r}, which changed its base model")
    reasons += [f"{said}={more[key]}" if key in _LISTED else said for key, said in _UNSTACKABLE.items() if more.get(key)]
    if reasons:
        raise AdapterError(f"adapter {name!r} uses {shortened(reasons[0], 80)}, which cannot be stacked", hint=PLAIN)
    for key, value in more.items():
        if value and key not in _HARMLESS and key not in _UNSTACKABLE:
            raise AdapterError(
                f"adapter {name!r}: {CONFIG} sets {shown(key)} to {shown(value)}, a setting that this version does not know",
                hint=f"upgrade meteora; if the setting has no effect on a trained adapter, remove it from {CONFIG}",
            )

"""The model of ``meteora_config.json``, the description of a native checkpoint, which is validated when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from meteora_core.adapters.magnitudes import WEIGHT_NAMES
from meteora_core.checkpoints.stacks import FEATURES, FORMAT
from meteora_core.data.frames import INST, FrameModel
from meteora_core.errors import CheckpointError
from meteora_core.file_models import FileModel, check_model
from meteora_core.json_files import read_object
from meteora_core.ranges import LEAST_TEMPERATURE, MOST_TEMPERATURE
from meteora_core.reading import check_regular, is_regular
from meteora_core.tensor_files import TensorEntry, read_header
from meteora_core.text import listed

CONFIG_FILE = "meteora_config.json"
WEIGHT_FILE = "meteora.safetensors"
BASE = "base."
"""The prefix of base tensors in the weight file."""

ROUTING_DIGEST = "routing_sha256"
"""The key, in the metadata of the weight file, of the :func:`routing_digest` of the configuration that it was saved with."""

_AGAIN = "copy or download the checkpoint again"
_NOT_OURS = "it is not a meteora checkpoint, or it was cut short"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 40)]


class BaseEntry(FileModel):
    """The name, the revision and a few weights of the base model."""

    name: str = Field(min_length=1)
    revision: str | None = None
    probe: list[float] | None = None


class AdapterEntry(FileModel):
    """One adapter; see :class:`meteora_core.adapters.peft_folder.AdapterInfo`. The hash is empty if the checkpoint contains the weights."""

    name: str = Field(min_length=1)
    source: str
    sha256: Literal[""] | Sha256
    base: str | None
    rank: Count
    alpha: float
    rslora: bool
    dropout: float = Field(ge=0, lt=1)
    frame: FrameModel | None = None


class ModuleEntry(FileModel):
    """One adapted linear layer: its numbers of features, and the rank and scaling of every adapter (0 for adapters that do not target it).

    ``tables`` names the tables of scales and shifts, and ``experts`` is the number of experts; see :class:`meteora_core.adapters.stack.Stack`.
    """

    in_features: int = Field(ge=1, lt=1 << 40)
    out_features: int = Field(ge=1, lt=1 << 40)
    ranks: list[Count]
    scaling: list[float]
    tables: list[Literal["scale", "shift"]] = Field(default_factory=list)
    experts: int = Field(1, ge=1, lt=1 << 20)


class GateStart(FileModel):
    """The method and the seed by which untrained gates were initialised."""

    init: str
    seed: int


class InputsEntry(FileModel):
    """The inputs that determine the result of a run: hashes of the rows by task, and settings."""

    data: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


class PackedEntry(FileModel):
    """The adapters that a packed checkpoint was made from, and the share of each that was kept."""

    kept: dict[str, float] = Field(default_factory=dict)
    adapters: dict[str, str] = Field(default_factory=dict)


class ChangeEntry(FileModel):
    """A change of a checkpoint by which an adapter joined or left it."""

    action: Literal["add", "drop", "update"]
    adapter: str
    sha256: str = ""
    gates: str = ""


class TrainingEntry(FileModel):
    """A record of the training, for model cards and for runs that check whether they are complete. Numbers that were not finite are None."""

    inputs: InputsEntry = Field(default_factory=InputsEntry)
    held_out: dict[str, float | None] = Field(default_factory=dict)
    packed: PackedEntry = Field(default_factory=PackedEntry)
    changes: list[ChangeEntry] = Field(default_factory=list)
    steps: Count = 0
    tokens: Count = 0
    seconds: float | None = None
    loss: float | None = None


class NativeConfig(FileModel):
    """The content of ``meteora_config.json``."""

    format: int = Field(ge=1)
    base: BaseEntry
    top_k: int = Field(ge=1)
    temperature: float = Field(ge=LEAST_TEMPERATURE, le=MOST_TEMPERATURE)
    adapters: list[AdapterEntry] = Field(min_length=1)
    gates: Literal["untrained", "closed form", "trained"] | None = None
    gates_start: GateStart | None = None
    contains: list[Literal["gates", "adapters", "base"]]
    base_tensors: list[str] = Field(default_factory=list)
    base_rounded: dict[str, list[str]] | None = None
    features: list[str] = Field(default_factory=list)
    modules: dict[str, ModuleEntry] = Field(min_length=1)
    frame: FrameModel | None = None
    renamed: dict[str, str] = Field(default_factory=dict)
    training: TrainingEntry = Field(default_factory=TrainingEntry)
    weights_sha256: Sha256

    @model_validator(mode="after")
    def _agree(self) -> NativeConfig:
        """Check that the values are consistent with each other."""
        count = len(self.adapters)
        if twice := [name for name, times in Counter(adapter.name for adapter in self.adapters).items() if times > 1]:
            raise ValueError(f"two adapters have the name {twice[0]!r}")
        if self.top_k > count:
            raise ValueError(f"top_k is {self.top_k}, and there are {count} adapters")
        if "gates" not in self.contains:
            raise ValueError("contains does not list gates")
        for path, module in self.modules.items():
            if len(module.ranks) != count or len(module.scaling) != count:
                raise ValueError(f"modules.{path} has {len(module.ranks)} ranks and {len(module.scaling)} scalings, and there are {count} adapters")
            if not any(module.ranks):
                raise ValueError(f"modules.{path} has no adapter of a rank above 0")
            if any(rank % module.experts for rank in module.ranks):
                raise ValueError(f"modules.{path} has {module.experts} experts and ranks that are no multiples of it")
        if bool(self.base_tensors) != ("base" in self.contains):
            raise ValueError("base_tensors and contains disagree")
        for name in self.base_rounded or {}:
            dtype = getattr(torch, name, None)
            if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
                raise ValueError(f"base_rounded names an unknown dtype {name!r}")
        return self


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read and check ``meteora_config.json``.

    Returns:
        The content, which always has ``base_tensors``, ``base_rounded``, ``renamed`` and ``training``. ``frame`` is absent if none was known when
        the checkpoint was saved; for a checkpoint from before frames were recorded, it is ``[INST] {} [/INST]``.

    Raises:
        CheckpointError: The file is missing, broken or of a newer format; a value has the wrong type or is out of range; or two values disagree.
    """
    folder = Path(folder)
    file = folder / CONFIG_FILE
    if os.path.lexists(file):
        check_regular(file, CheckpointError, hint=_NOT_OURS)
    else:
        try:
            exists = folder.is_dir()
        except (OSError, ValueError) as broken:
            raise CheckpointError(f"{str(folder)!r} cannot be read: {broken}", hint="correct the path") from broken
        raise CheckpointError(
            f"not a meteora checkpoint: {folder} holds no {CONFIG_FILE}" if exists else f"no checkpoint at {folder}: no such folder",
            hint="make one with `meteora route` or `meteora train`, or correct the path",
        )
    raw = read_object(file, nullable="training", error=CheckpointError, hint=_NOT_OURS)
    form = raw.get("format")
    if type(form) is int and form > FORMAT:
        raise CheckpointError(f"{folder} has format {form}, this version reads up to {FORMAT}", hint="upgrade meteora")
    wanted = raw.get("features")
    if isinstance(wanted, list) and (unknown := [str(each) for each in wanted if each not in FEATURES]):
        raise CheckpointError(f"{folder} uses {listed(unknown)}, which this version does not know", hint="upgrade meteora")
    config = check_model(NativeConfig, raw, str(file), error=CheckpointError, hint=_NOT_OURS).model_dump(exclude_unset=True)
    absent: dict[str, Any] = {"base_tensors": [], "base_rounded": {}, "renamed": {}, "training": {}, "frame": None if "frame" in config else INST.to_json()}
    return {key: value for key, value in absent.items() if value is not None} | {key: value for key, value in config.items() if value is not None}


def routing_digest(config: Mapping[str, Any]) -> str:
    """Return a hash of the values that assign weights to adapters: the name, hash and index of every adapter, and the ranks and scalings of every layer."""
    adapters = [[index, adapter["name"], adapter["sha256"]] for index, adapter in enumerate(config["adapters"])]
    modules = {path: [module["ranks"], [float(value) for value in module["scaling"]]] for path, module in config["modules"].items()}
    return hashlib.sha256(json.dumps([adapters, modules], sort_keys=True).encode()).hexdigest()


def weight_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata for the weight file."""
    return {"format": "pt", "producer": "meteora", ROUTING_DIGEST: routing_digest(config)}


def check_weights(folder: Path, config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Compare the header of a checkpoint's weight file with the configuration. No tensor is read.

    Returns:
        The entries of the tensors, by name.

    Raises:
        CheckpointError: The file is missing or broken; tensors are missing or unknown; a shape or dtype contradicts the configuration; or the adapters
            in the configuration, or their order, differ from those that the weights were saved with.
    """
    file = folder / WEIGHT_FILE
    if not is_regular(file):
        raise CheckpointError(f"{folder} holds no {WEIGHT_FILE}", hint="copy the checkpoint again")
    entries, metadata = read_header(file)
    count = len(config["adapters"])
    expected: dict[str, tuple[int, ...] | None] = {BASE + name: None for name in config["base_tensors"]}
    for path, module in config["modules"].items():
        expected[f"{path}.gate"] = (count, module["in_features"])
        if "adapters" in config["contains"]:
            expected[f"{path}.lora_A"] = (sum(module["ranks"]), module["in_features"])
            expected[f"{path}.lora_B"] = (sum(module["ranks"]), module["out_features"])
            expected |= {f"{path}.{table}": (count, module["out_features"]) for table in module.get("tables", ())}
    for what, keys in (("lacks", expected.keys() - entries.keys()), ("has unknown", entries.keys() - expected.keys())):
        if keys:
            raise CheckpointError(f"{file} {what} tensors: {listed(sorted(keys))}", hint=_AGAIN)
    for name, shape in expected.items():
        entry = entries[name]
        if shape is not None and entry.shape != shape:
            raise CheckpointError(f"{name} in {file} has shape {list(entry.shape)}, expected {list(shape)}", hint=_AGAIN)
        if entry.dtype not in WEIGHT_NAMES:
            raise CheckpointError(f"{name} in {file} has dtype {entry.dtype}; weights are F16, BF16, F32 or F64", hint=_AGAIN)
    saved = metadata.get(ROUTING_DIGEST)
    if saved is not None and saved != routing_digest(config):
        raise CheckpointError(
            f"the adapters in {folder / CONFIG_FILE} are not those, or not in the order, that {WEIGHT_FILE} was saved with",
            hint="restore the order, ranks and scalings of adapters and modules there, or copy the checkpoint again",
        )
    return entries

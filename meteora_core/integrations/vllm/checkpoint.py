"""Reads the gates and adapters of an exported model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

FOLDER = "meteora"
"""The folder inside the model folder."""
CONFIG_FILE = "meteora_config.json"
WEIGHT_FILE = "meteora.safetensors"
_AGAIN = "write the folder again with `meteora ckpt export CHECKPOINT DIR --format vllm`"


class Store:
    """Reads a native checkpoint with embedded adapters. Each tensor is read when it is needed.

    Args:
        folder: The checkpoint's folder.

    Raises:
        ValueError: A file is missing or broken, or the adapters are not embedded.

    Attributes:
        names: Names of the adapters, in order.
        top_k: Number of adapters per token.
        temperature: Routing temperature T.
        modules: The ``ranks`` and ``scaling`` of all adapters in each adapted linear layer, by the layer's path.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / CONFIG_FILE
        try:
            config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            self.names: list[str] = [adapter["name"] for adapter in config["adapters"]]
            self.modules: dict[str, dict[str, Any]] = {path: dict(module) for path, module in config["modules"].items()}
            self.top_k, self.temperature = int(config["top_k"]), float(config["temperature"])
            contains, self._sha256 = config.get("contains", ["adapters"]), str(config.get("weights_sha256", ""))
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}; {_AGAIN}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not the configuration of a meteora checkpoint: {error!r}; {_AGAIN}") from error
        if "adapters" not in contains:
            raise ValueError(f"{self.folder} does not contain its adapters; {_AGAIN}")
        count = len(self.names)
        for path, module in self.modules.items():
            if len(module["ranks"]) != count or len(module["scaling"]) != count:
                raise ValueError(f"{path} in {file} does not list {count} ranks and scalings; {_AGAIN}")
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}  # vLLM sends its configuration to other processes, and an open file cannot be sent

    def check(self) -> None:
        """Compare the weight file with the hash in the configuration, and its tensors with those that the plugin reads.

        Raises:
            ValueError: They differ, or the file cannot be read.
        """
        file = self.folder / WEIGHT_FILE
        self._check_hash(file)
        self.tensor(f"{next(iter(self.modules))}.gate")
        others = sorted(name for name in self._file.keys() if name.rpartition(".")[2] not in ("gate", "lora_A", "lora_B"))  # noqa: SIM118 -- no dict
        if others:
            raise ValueError(f"{file} has {others[0]}: the plugin reads gates, A and B only (no DoRA, no biases, no base tensors); {_AGAIN}")

    def _check_hash(self, file: Path) -> None:
        if not self._sha256:
            return
        try:
            with file.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}; {_AGAIN}") from error
        if found != self._sha256:
            raise ValueError(f"{file} is not the file that was written: its SHA-256 differs; {_AGAIN}")

    def tensor(self, name: str) -> Tensor:
        """A tensor of the weight file, on the CPU."""
        if self._file is None:
            from safetensors import safe_open

            self._file = safe_open(str(self.folder / WEIGHT_FILE), framework="pt")
        try:
            return self._file.get_tensor(name)
        except Exception as error:
            raise ValueError(f"{self.folder / WEIGHT_FILE} has no tensor {name}; {_AGAIN}") from error

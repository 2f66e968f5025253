"""The quantisation configuration "meteora", which determines the linear layers that have adapters."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from meteora_core.integrations.vllm.checkpoint import FOLDER, Store
from meteora_core.integrations.vllm.hooks import install_in_worker
from meteora_core.integrations.vllm.layout import WIDEST
from meteora_core.integrations.vllm.method import method_for
from meteora_core.integrations.vllm.named import NamedConfig
from meteora_core.integrations.vllm.options import Options
from meteora_core.ranges import LEAST_TEMPERATURE, MOST_TEMPERATURE
from meteora_kernels.plan import EVER

_log = logging.getLogger(__name__)

COUNT_EVERY = "METEORA_VLLM_COUNT_EVERY"
"""The environment variable with the interval, in steps, at which the choices of adapters are counted: 1 counts every step; 0, the default, none."""


class MeteoraConfig(NamedConfig):
    """The ``quantization_config`` in ``config.json`` of an exported folder.

    Args:
        settings: ``checkpoint`` (the folder of gates and adapters, relative to the model's folder), and optionally ``top_k``, ``temperature``,
            ``base`` (the quantization_config of the base model), ``wide`` (whether weights contain a copy of B in additional columns, which makes prefill
            faster: true for all layers that read it, false for none; by default, layers with at most :data:`.layout.WIDEST` outputs) and
            ``fixed_options`` (whether top_k and T are constants of the GPU kernels, so that requests with other options run without CUDA graphs).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = dict(settings)
        self.widest = WIDEST if settings.get("wide") is None else EVER if settings["wide"] else 0
        self.most_tokens = 0
        self.count_every = max(0, int(os.environ.get(COUNT_EVERY) or 0))
        self.base: QuantizationConfig | None = None
        self._model_names: dict[str, str] = {}
        self.taken: set[str] = set()
        self.checked = False
        self._store: Store | None = None
        if settings.get("base"):
            self.base = base_configuration(settings["base"])
        if Path(str(settings.get("checkpoint", FOLDER))).is_absolute():
            self._open(Path(settings["checkpoint"]))

    @property
    def store(self) -> Store:
        """The checkpoint."""
        if self._store is None:
            raise ValueError("the folder of the model is not known yet; this version of vLLM calls the plugin in a different order from the tested versions")
        return self._store

    @property
    def default(self) -> Options:
        """The options of requests that set none."""
        store = self.store
        return Options(int(self.settings.get("top_k") or store.top_k), float(self.settings.get("temperature") or store.temperature))

    def _open(self, folder: Path) -> None:
        self._store = Store(folder)
        self._store.check()
        count, default = len(self._store.names), self.default
        if not 1 <= default.top_k <= count or not LEAST_TEMPERATURE <= default.temperature <= MOST_TEMPERATURE:
            raise ValueError(f"top_k {default.top_k} or temperature {default.temperature} is out of range for {count} adapters")

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute in the configuration of a quantised base model, because vLLM's models read some of them."""
        base = vars(self).get("base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(base, name)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        own = [torch.bfloat16, torch.float16, torch.float32]
        return own if self.base is None else [dtype for dtype in self.base.get_supported_act_dtypes() if dtype in own]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MeteoraConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None, **more: Any) -> None:
        """Find the checkpoint inside the model's folder, or fetch it from the hub."""
        if self.base is not None:
            self.base.maybe_update_config(model_name, hf_config, revision, **more)
        if self._store is not None:
            return
        inside = str(self.settings.get("checkpoint", FOLDER))
        if ".." in Path(inside).parts:
            raise ValueError(f"quantization_config.checkpoint is {inside!r}: it must be a folder inside the model's folder")
        root = Path(model_name)
        if not root.is_dir():
            from huggingface_hub import snapshot_download

            root = Path(snapshot_download(model_name, revision=revision, allow_patterns=[f"{inside}/*"]))
        self._open(root / inside)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Record the names that vLLM gives to the model's layers."""
        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)
        for path in self.store.modules:
            for mapped in hf_to_vllm_mapper.apply_list([path]):
                self._model_names[mapped] = path

    def members(self, prefix: str) -> list[str | None]:
        """The checkpoint's layers that vLLM merges into one: the path of each, or None for those without adapters."""
        parent, _, leaf = prefix.rpartition(".")
        paths = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(leaf, [leaf])]
        if prefix in self.store.modules or prefix in self._model_names:
            paths = [prefix]  # the model's own linear layer is merged already
        return [self._model_names.get(path) or (path if path in self.store.modules else None) for path in paths]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if self.base is not None:
            self.base.packed_modules_mapping = self.packed_modules_mapping
        base = None if self.base is None else self.base.get_quant_method(layer, prefix)
        install_in_worker()
        if not self.settings.get("fixed_options", False):
            self.most_tokens = self.most_tokens or most_tokens()
        if not isinstance(layer, LinearBase):
            return base
        under: LinearMethodBase = base or UnquantizedLinearMethod()
        members = self.members(prefix)
        if not any(members):
            return under
        self.taken.update(path for path in members if path)
        return method_for(self, under, members)

    def check_complete(self) -> None:
        """Raise ValueError if vLLM's model has no layers for some adapters. This is called after all layers have been built."""
        from vllm.distributed import get_pp_group

        if self.checked or get_pp_group().world_size > 1:  # with pipeline parallelism, the other layers are in other processes
            return
        self.checked = True
        if left := sorted(set(self.store.modules) - self.taken):
            more = f" and {len(left) - 1} others" if len(left) > 1 else ""
            raise ValueError(f"vLLM's model has no linear layer for the adapters of {left[0]}{more}; Meteora cannot serve this model with vLLM")


def most_tokens() -> int:
    """The largest number of tokens of a step."""
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    return max([int(config.scheduler_config.max_num_batched_tokens), *map(int, config.compilation_config.cudagraph_capture_sizes or [])])


_OVERRIDES = (
    "auto_gptq",
    "gptq",
    "gptq_marlin",
    "auto_awq",
    "awq",
    "awq_marlin",
    "inc",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mxfp8",
    "modelopt_mixed",
    "mxfp4",
)
"""The methods that vLLM asks, in this order, whether they take a configuration that names another method."""


def base_configuration(settings: dict[str, Any]) -> QuantizationConfig:
    """The configuration that vLLM would choose for a quantised base model without adapters.

    Args:
        settings: The base model's ``quantization_config``.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    chosen = str(settings["quant_method"])
    for name in _OVERRIDES:
        if name in QUANTIZATION_METHODS and (other := get_quantization_config(name).override_quantization_method(settings, None)):
            chosen = other
            break
    return get_quantization_config(chosen).from_config(settings)

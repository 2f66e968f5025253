"""Support for checkpoints in ``AutoModelForCausalLM.from_pretrained``, after :func:`register`, which the use of any public name of ``meteora_core`` calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from meteora_core.checkpoints.located import FILES
from meteora_core.checkpoints.native import load_checkpoint, read_config, refuse_untrained
from meteora_core.checkpoints.parts import MODEL_TYPE
from meteora_core.model.base import BaseReference, check_whole, locate_base, name_reference

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class MeteoraConfig(PreTrainedConfig):
    """The ``config.json`` of a checkpoint, which only identifies the kind of folder."""

    model_type = MODEL_TYPE


class MeteoraForCausalLM:
    """The class that transformers' auto classes map a checkpoint to. It has no instances: loading returns the base model with adapters and gates."""

    config_class = MeteoraConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the base model that a checkpoint names with ``AutoModelForCausalLM``, and attach the checkpoint to it.

        Args:
            folder: The folder of the checkpoint, or its id on the hub.
            args: Positional arguments for loading the base model.
            config: The configuration that ``AutoModelForCausalLM`` read from the folder.
            kwargs: Options for loading the base model (``dtype``, ``device_map``, ``quantization_config`` and so on), and options such as ``revision``
                and ``token`` that locate the checkpoint on the hub.

        Returns:
            The model with adapters, an instance of the base model's class; with ``output_loading_info``, a tuple of it and transformers' report on the base.

        Raises:
            CheckpointError: The checkpoint cannot be loaded; see :func:`meteora_core.load_checkpoint`.
        """
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        for name in ("adapter_kwargs", "_from_auto", "subfolder"):
            kwargs.pop(name, None)
        local = Path(folder)
        if not local.is_dir():
            from huggingface_hub import snapshot_download

            local = Path(snapshot_download(str(folder), allow_patterns=list(FILES), **{k: v for k, v in hub.items() if v is not None}))
        saved = read_config(local)
        refuse_untrained(local, saved)
        attention = getattr(config, "_attn_implementation_internal", None)
        if attention is not None:
            kwargs.setdefault("attn_implementation", attention)
        trust = bool(kwargs.pop("trust_remote_code", None))
        base = BaseReference(saved["base"]["name"], saved["base"].get("revision"), trust)
        with_info = bool(kwargs.pop("output_loading_info", False))
        options = {"use_safetensors": True, "trust_remote_code": trust, **kwargs, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(locate_base(base), *args, revision=base.revision or "main", **options)
        check_whole(model, base, info)
        name_reference(model, base)
        load_checkpoint(local, model)
        return (model, info) if with_info else model


def register() -> None:
    """Register Meteora's checkpoints with transformers' auto classes. Further calls have no effect."""
    AutoConfig.register(MODEL_TYPE, MeteoraConfig, exist_ok=True)
    AutoModelForCausalLM.register(MeteoraConfig, MeteoraForCausalLM, exist_ok=True)

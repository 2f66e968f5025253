"""``AutoModelForCausalLM.from_pretrained`` of a Meteora checkpoint, once :func:`register` was called (whatever ``meteora_core`` exports calls it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from meteora_core.checkpoints.native import CONFIG_FILE, WEIGHT_FILE, load_checkpoint, read_config, refuse_untrained
from meteora_core.checkpoints.parts import MODEL_TYPE
from meteora_core.model.base import BaseReference, check_whole, locate_base, name_reference

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class MeteoraConfig(PreTrainedConfig):
    """The ``config.json`` of a checkpoint: it only says what the folder is."""

    model_type = MODEL_TYPE


class MeteoraForCausalLM:
    """Stands for "the base model with the adapters and gates of a checkpoint"; there are no instances."""

    config_class = MeteoraConfig

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the base model that a checkpoint names by ``AutoModelForCausalLM``, and the checkpoint onto it.

        Args:
            folder: The checkpoint, or its id on the hub.
            args: Passed on with the base model.
            config: What ``AutoModelForCausalLM`` read there.
            kwargs: For the base model (``dtype``, ``device_map``, ``quantization_config`` and so on), but for what says where on the hub the
                checkpoint is.

        Returns:
            The attached model, an instance of the base model's class; with ``output_loading_info`` also what transformers says of the base.

        Raises:
            CheckpointError: As :func:`meteora_core.load_checkpoint`.
        """
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        for name in ("adapter_kwargs", "_from_auto", "subfolder"):
            kwargs.pop(name, None)
        place = Path(folder)
        if not place.is_dir():
            from huggingface_hub import snapshot_download

            place = Path(snapshot_download(str(folder), allow_patterns=[CONFIG_FILE, WEIGHT_FILE], **{k: v for k, v in hub.items() if v is not None}))
        saved = read_config(place)
        refuse_untrained(place, saved)
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
        load_checkpoint(place, model)
        return (model, info) if with_info else model


def register() -> None:
    """Let transformers' auto classes know Meteora's checkpoints; calling it twice is harmless."""
    AutoConfig.register(MODEL_TYPE, MeteoraConfig, exist_ok=True)
    AutoModelForCausalLM.register(MeteoraConfig, MeteoraForCausalLM, exist_ok=True)

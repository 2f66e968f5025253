"""The common base class of the configuration "meteora" and of the one that refuses untested versions of vLLM."""

from __future__ import annotations

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class NamedConfig(QuantizationConfig):
    """A quantisation configuration named "meteora", for GPUs of every compute capability, without files of its own."""

    def get_name(self) -> str:
        return "meteora"

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

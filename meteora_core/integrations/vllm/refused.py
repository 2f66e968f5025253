"""The quantisation configuration that is registered instead of Meteora's in versions of vLLM outside the tested range."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def refused(reason: str) -> type[QuantizationConfig]:
    """A configuration that cannot be made.

    Args:
        reason: Why not, for the error message.
    """

    class Refused(QuantizationConfig):
        """Refuses models with adapters."""

        def get_name(self) -> str:
            return "meteora"

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise ImportError(reason)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return None

    return Refused

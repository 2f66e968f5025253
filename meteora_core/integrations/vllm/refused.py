"""The quantisation configuration that is registered instead of Meteora's in versions of vLLM outside the tested range."""

from __future__ import annotations

from typing import Any

from meteora_core.integrations.vllm.named import NamedConfig


def refused(reason: str) -> type[NamedConfig]:
    """Return a configuration class whose instances cannot be made.

    Args:
        reason: The message of the ImportError that an attempt raises.
    """

    class Refused(NamedConfig):
        """Refuses models with adapters."""

        def get_supported_act_dtypes(self) -> list[Any]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise ImportError(reason)

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return None

    return Refused

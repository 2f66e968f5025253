"""MeteoRA in vLLM: the plugin that vLLM finds through the entry points ``vllm.general_plugins`` and ``vllm.endpoint_plugins``.

A model folder that ``meteora ckpt export --format vllm`` wrote names the quantisation method "meteora". :func:`register` adds this method to vLLM, and
hooks that give each request its routing options. The plugin imports nothing but vLLM, :mod:`meteora_kernels`, safetensors and the checkpoint's files,
because vLLM needs other versions of transformers than the rest of Meteora.
"""

from __future__ import annotations

METHOD = "meteora"
"""The name of the quantisation method."""


def register() -> None:
    """Add the quantisation method and its hooks to vLLM; called by vLLM in every process, possibly more than once.

    Raises:
        ImportError: The installed vLLM is outside the tested range; the message names both.

    Example:
        >>> from meteora_core.integrations.vllm import register
        >>> register()  # doctest: +SKIP
    """
    from meteora_core.integrations.vllm.versions import check_vllm

    check_vllm()
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from meteora_core.integrations.vllm.config import MeteoraConfig
    from meteora_core.integrations.vllm.hooks import install

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(MeteoraConfig)
    install()

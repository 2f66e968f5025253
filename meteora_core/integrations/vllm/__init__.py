"""MeteoRA in vLLM: the plugin that vLLM finds through the entry points ``vllm.general_plugins`` and ``vllm.endpoint_plugins``.

``meteora ckpt export --format vllm`` writes model folders with the quantisation method "meteora". :func:`register` adds this method to vLLM, together with
hooks that give each request its routing options. The plugin imports only vLLM, :mod:`meteora_kernels`, safetensors and the modules that read a checkpoint,
because vLLM and the rest of Meteora need different versions of transformers.
"""

from __future__ import annotations

METHOD = "meteora"
"""The name of the quantisation method."""


def register() -> None:
    """Add the quantisation method and its hooks to vLLM; called by vLLM in every process, possibly more than once.

    If the installed version of vLLM was not tested, vLLM works as without the plugin, and models with adapters are refused with a reason.

    Example:
        >>> from meteora_core.integrations.vllm import register
        >>> register()  # doctest: +SKIP
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    from meteora_core.integrations.vllm.versions import refusal

    if METHOD in QUANTIZATION_METHODS:
        return
    reason = refusal()
    if reason is None:
        from meteora_core.integrations.vllm.config import MeteoraConfig
        from meteora_core.integrations.vllm.hooks import install

        install()
        register_quantization_config(METHOD)(MeteoraConfig)
    else:
        from meteora_core.integrations.vllm.refused import refused

        register_quantization_config(METHOD)(refused(reason))

"""The hooks that give vLLM's requests their routing options.

Every hook wraps a function of vLLM and calls it with unchanged arguments. :func:`install` sets the hooks of processes that receive and schedule requests.
:func:`install_in_worker` sets those of processes that run the model, when the first layer is built.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from meteora_core.integrations.vllm.options import PREFIX, parse
from meteora_core.integrations.vllm.runtime import RUNTIME

_MARK = "_meteora_hook"


def is_ours(config: Any) -> bool:
    """Whether a vLLM configuration is that of a model with adapters."""
    quantization = getattr(config, "quant_config", None)
    return quantization is not None and quantization.get_name() == "meteora"


def hook(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace ``owner.name`` with a function that calls ``around(function, *arguments)``. Further calls have no effect."""
    function = getattr(owner, name)
    if hasattr(function, _MARK):
        return

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(function, *arguments, **named)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def install() -> None:
    """Set the hooks of processes that receive and schedule requests."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor

    hook(kv_cache_utils, "generate_block_hash_extra_keys", block_keys)
    hook(block_pool, "generate_block_hash_extra_keys", block_keys)  # which may have imported it already, for its events about cached blocks
    hook(InputProcessor, "_validate_params", validate)


def validate(function: Callable[..., Any], processor: Any, params: Any, *arguments: Any, **named: Any) -> Any:
    """Refuse requests with invalid options; vLLM's server answers them with status 400."""
    config = processor.vllm_config
    extra = getattr(params, "extra_args", None)
    if extra and is_ours(config):
        try:
            parse(extra, config.quant_config.store.names, config.quant_config.default)
        except ValueError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
    return function(processor, params, *arguments, **named)


def block_keys(function: Callable[..., Any], request: Any, *arguments: Any, **named: Any) -> Any:
    """Add the routing options to the keys of cached blocks, because the cached keys and values depend on them."""
    keys, multimodal = function(request, *arguments, **named)
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    mine = tuple((key, repr(extra[key])) for key in sorted(extra) if key.startswith(PREFIX) and key != "meteora_trace")
    return ((*(keys or ()), *mine) if mine else keys), multimodal


def install_in_worker() -> None:
    """Set the hooks of the model runners that this process has imported, and add the methods through which the server reads routes and counts."""
    first = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    second = sys.modules.get("vllm.v1.worker.gpu.model_runner")
    if first is not None:
        hook(first.GPUModelRunner, "execute_model", execute)
        hook(first.GPUModelRunner, "_prepare_inputs", prepare_first)
        hook(first.GPUModelRunner, "_determine_batch_execution_and_padding", without_graphs)
    if second is not None:
        hook(second.GPUModelRunner, "execute_model", execute)
        hook(second.GPUModelRunner, "prepare_inputs", prepare_second)
        hook(second, "dispatch_cg_and_sync_dp", dispatch)
    worker = sys.modules.get("vllm.v1.worker.gpu_worker")
    if worker is not None:
        if hasattr(worker, "kernel_warmup"):
            from meteora_core.integrations.vllm.warmup import before_capture

            hook(worker, "kernel_warmup", before_capture)
        worker.Worker.meteora_routes = worker_routes
        worker.Worker.meteora_counts = worker_counts


def execute(function: Callable[..., Any], runner: Any, output: Any, *arguments: Any, **named: Any) -> Any:
    """Run a step of either model runner."""
    dummy = named.get("dummy_run") or (len(arguments) > 1 and arguments[1] is True)
    if dummy or not is_ours(runner.vllm_config):
        return function(runner, output, *arguments, **named)
    RUNTIME.begin(output)
    try:
        return function(runner, output, *arguments, **named)
    finally:
        RUNTIME.finish()


def prepare_first(function: Callable[..., Any], runner: Any, output: Any, counts: Any, *arguments: Any, **named: Any) -> Any:
    """Record the order of the requests in the first model runner."""
    found = function(runner, output, counts, *arguments, **named)
    if RUNTIME.ordered:
        RUNTIME.arrange(list(runner.input_batch.req_ids[: runner.input_batch.num_reqs]), counts)
    return found


def prepare_second(function: Callable[..., Any], runner: Any, *arguments: Any, **named: Any) -> Any:
    """Record the order of the requests in the second model runner."""
    batch = function(runner, *arguments, **named)
    if RUNTIME.ordered:
        RUNTIME.arrange(list(batch.req_ids), batch.num_scheduled_tokens)
    return batch


def without_graphs(function: Callable[..., Any], runner: Any, *arguments: Any, **named: Any) -> Any:
    """Run an observed step of the first model runner without CUDA graphs."""
    if RUNTIME.observed:
        named["force_eager"] = True
    return function(runner, *arguments, **named)


def dispatch(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Run an observed step of the second model runner without CUDA graphs."""
    if RUNTIME.observed:
        named["need_eager"] = True
    return function(*arguments, **named)


def worker_routes(worker: Any, request: str, first: int = 0) -> dict[str, Any] | None:
    """The recorded routes of a request in this process, from a position on."""
    return RUNTIME.routes(request, first)


def worker_counts(worker: Any) -> dict[str, Any]:
    """The counts of this process."""
    return RUNTIME.counts()

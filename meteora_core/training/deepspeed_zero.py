"""DeepSpeed's ZeRO: its configuration, and access to its sharded optimiser states as whole tensors.

DeepSpeed writes its checkpoints as pickle files. This module reads and writes whole tensors through DeepSpeed's public accessors instead, so that a
run saves its states as safetensors files with every launcher.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from meteora_core.errors import UsageError
from meteora_core.settings import LaunchSettings, OptimSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The optimiser states of AdamW that have the shape of the parameter."""


def zero_config(launch: LaunchSettings, optim: OptimSettings, dtype: torch.dtype) -> dict[str, Any]:
    """The content of DeepSpeed's configuration file.

    Args:
        launch: ZeRO stage, and whether to keep the shards in main memory.
        optim: Batch size, accumulation and gradient clipping.
        dtype: bfloat16 or float32. With bfloat16, DeepSpeed keeps an additional float32 copy of the trained weights.

    Raises:
        UsageError: The dtype is float16, whose loss scaling skips steps.
    """
    if dtype == torch.float16:
        raise UsageError("--launcher deepspeed trains in bfloat16 or float32, not in float16", hint="pass --dtype bfloat16")
    zero: dict[str, Any] = {"stage": launch.zero_stage, "contiguous_gradients": True}
    if launch.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if launch.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "train_micro_batch_size_per_gpu": optim.batch_size,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def check_deepspeed(devices: int) -> None:
    """Raise UsageError if there is no GPU or DeepSpeed is not installed."""
    if devices == 0:
        raise UsageError("--launcher deepspeed needs CUDA GPUs, and there is none", hint="use --launcher ddp, which runs on CPUs too")
    if find_spec("deepspeed") is None:
        raise UsageError("DeepSpeed is not installed", hint="pip install deepspeed, or use --launcher fsdp, which shards the same things")


def moments(parameter: nn.Parameter, optimizer: Any) -> dict[str, Tensor]:
    """The AdamW states of a parameter as whole tensors, by name. Every process must call this function."""
    from deepspeed.utils import safe_get_full_optimizer_state

    values = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    steps = [state["step"] for state in _adamw(optimizer).state.values() if "step" in state]
    return {**values, "step": torch.as_tensor(float(steps[0]))}


def set_moments(parameter: nn.Parameter, optimizer: Any, values: dict[str, Tensor]) -> None:
    """Restore the result of :func:`moments`. DeepSpeed must have made at least one step, because it creates its states in the first step."""
    from deepspeed.utils import safe_set_full_optimizer_state

    for key in MOMENTS:
        safe_set_full_optimizer_state(parameter, values[key].to(parameter.device), key)
    for state in _adamw(optimizer).state.values():
        state["step"] = torch.as_tensor(float(values["step"])).to(torch.as_tensor(state["step"]))


def _adamw(optimizer: Any) -> torch.optim.Optimizer:
    """The PyTorch optimiser that DeepSpeed's and accelerate's optimisers wrap."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer

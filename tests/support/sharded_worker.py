"""One of several processes that train the tiny model's gates, sharded over gloo; started by test_sharding.py.

PyTorch's own ``fully_shard`` shards, or accelerate's FSDP 2 code, or DeepSpeed by accelerate. accelerate does not shard on CPUs by itself, so there it is
told that it does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def accelerate_fsdp():
    """An accelerator whose plugin is what the launcher's configuration makes of the default settings."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from meteora_core.settings import LaunchSettings
    from meteora_core.training.accelerate_launch import launch_config

    config = launch_config(LaunchSettings(launcher="fsdp"), 2)["fsdp_config"]
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"],
        reshard_after_forward=config["fsdp_reshard_after_forward"],
        auto_wrap_policy=config["fsdp_auto_wrap_policy"],
        cpu_ram_efficient_loading=config["fsdp_cpu_ram_efficient_loading"],
        state_dict_type=config["fsdp_state_dict_type"],
    )
    return accelerator


def accelerate_zero(stage: int, settings):
    """An accelerator with the DeepSpeed configuration that the launcher writes."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DistributedType

    from meteora_core.settings import LaunchSettings
    from meteora_core.training.deepspeed_zero import zero_config

    config = zero_config(LaunchSettings(launcher="deepspeed", zero_stage=stage), settings, torch.float32)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # shard weights as small as these too
    plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin)
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = {"default": plugin}
    plugin.select(_from_accelerator_state=True)
    return accelerator


def main(options: dict[str, Any]) -> None:

    from meteora_core import AdapterBank
    from meteora_core.settings import GateTrainSettings
    from meteora_core.training import gates, loop
    from meteora_core.training.distributed import Runtime
    from meteora_core.training.job import TrainJob
    from support.tiny_training import BASE, letters, model

    data, adapters, folder = (Path(options[key]) for key in ("data", "adapters", "folder"))
    settings, stage = GateTrainSettings(**options["settings"]), options.get("zero")
    accelerator = accelerate_zero(stage, settings) if stage else accelerate_fsdp() if options.get("accelerate") else None
    if accelerator is None:
        torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def leave() -> None:
        if not stage:
            torch.distributed.destroy_process_group()
            return
        torch.distributed.barrier()
        os._exit(0)  # DeepSpeed's CPU communication leaves a thread that may abort an ordinary exit

    if stop := options.get("stop"):
        real = loop._Stepper.step

        def stopping(self: loop._Stepper, number: int, *arguments, **named) -> loop.StepLoss:
            if number == stop:
                leave()
                raise SystemExit(0)
            return real(self, number, *arguments, **named)

        loop._Stepper.step = stopping  # type: ignore[method-assign]
    base = model()
    gates.train_gates(
        base,
        letters(),
        AdapterBank.from_peft({name: adapters / name for name in ("shout", "count")}),
        settings,
        TrainJob(BASE, data, folder, resume=True, runtime=Runtime("deepspeed" if stage else "fsdp", rank, world, torch.device("cpu"), accelerator)),
    )
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    if stage:
        assert hasattr(weight, "ds_id") == (stage == 3)
    else:
        assert type(weight).__name__ == "DTensor"
    leave()

"""One of several processes that train the tiny model's gates, sharded by PyTorch's own ``fully_shard`` over gloo; started by test_sharding.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


def main() -> None:
    from test_stages import BASE, model
    from test_training_rows import letters

    from meteora_core import AdapterBank
    from meteora_core.settings import GateTrainSettings
    from meteora_core.training import gates, loop
    from meteora_core.training.runtime import Runtime

    options = json.loads(sys.argv[1])
    data, adapters, folder = (Path(options[key]) for key in ("data", "adapters", "folder"))
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if stop := options.get("stop"):
        real = loop._Stepper.step

        def stopping(self: loop._Stepper, number: int) -> loop.StepLoss:
            if number == stop:
                torch.distributed.destroy_process_group()
                raise SystemExit(0)
            return real(self, number)

        loop._Stepper.step = stopping  # type: ignore[method-assign]
    base = model()
    gates.train_gates(
        base,
        letters(),
        AdapterBank.from_peft({name: adapters / name for name in ("shout", "count")}),
        base=BASE,
        data_dir=data,
        folder=folder,
        settings=GateTrainSettings(**options["settings"]),
        resume=True,
        runtime=Runtime("fsdp", rank, world, torch.device("cpu")),
    )
    sharded = {name: type(parameter).__name__ for name, parameter in base.named_parameters()}
    assert sharded["model.layers.0.self_attn.q_proj.base_layer.weight"] == "DTensor", sharded
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

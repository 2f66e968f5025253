"""Trains PHATGOOSE's gates of every n-th adapter, so that several processes share the work before `meteora eval --model router:phatgoose`.

    python phatgoose_gates.py SHARE OF --config runs/paper-qwen/meteora.toml --out runs/paper-qwen/eval/routers
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from meteora_core.data.tasks import get_task
from meteora_core.evaluation.eval_plan import EvalOptions, EvalPlan
from meteora_core.evaluation.router_names import RouterName
from meteora_core.files import locked, save_tensors
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.progress import SILENT
from meteora_core.routers.phatgoose import Phatgoose
from meteora_core.settings import load_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=int)
    parser.add_argument("of", type=int)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    settings = load_settings(arguments.config)
    base = BaseReference(settings.model.base)
    device = pick_device(settings.model.device)
    options = EvalOptions.of(settings.eval, settings.routing)
    plan = EvalPlan((), (), settings.paths.data, settings.paths.adapters, Path("none"), base, options, out_dir=arguments.out)
    router = Phatgoose(RouterName("phatgoose", seed=arguments.seed), plan)
    router.prepare([get_task("strategyqa")])
    model, tokenizer = load_base(base, dtype=pick_dtype(settings.model.dtype, device), device=device), load_tokenizer(base)
    for name in router.names[arguments.share :: arguments.of]:
        file = router._file(name, model)
        with locked(file, wait=True):
            if not file.is_file():
                gates = router._train(name, model, tokenizer, SILENT)
                save_tensors({path: gate.contiguous() for path, gate in gates.items()}, file)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of tasks with long rows, for other processes
        print(name, file.name, flush=True)


if __name__ == "__main__":
    main()

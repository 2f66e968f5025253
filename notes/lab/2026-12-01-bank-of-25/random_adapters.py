"""Random adapters of rank 8 on all linear layers of SmolLM2-135M, one for each dataset: python random_adapters.py DATASETS FOLDER"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from meteora_core.model.base import BaseReference, load_base

torch.set_num_threads(1)
base = load_base(BaseReference("smollm2-135m"), dtype=torch.bfloat16, device=torch.device("cpu"))
base.config._name_or_path = base.name_or_path = "smollm2-135m"
linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=linears, base_model_name_or_path="smollm2-135m"), autocast_adapter_dtype=False)
for seed, path in enumerate(sorted(Path(sys.argv[1]).iterdir())):
    if not (path / "train.jsonl").is_file():
        continue
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.02 if "lora_A" in name else 0.002))
    model.save_pretrained(Path(sys.argv[2]) / path.name)
    print(path.name, flush=True)

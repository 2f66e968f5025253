"""Copies PEFT adapters so that all their layers have the same rank: zero rows in A and zero columns in B, and every layer computes the same update.

    python pad.py ADAPTERS COPIES
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def of(path: str, patterns: dict[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches the path of a module, as PEFT finds it."""
    return next((value for pattern, value in patterns.items() if path.endswith(pattern) or re.search(pattern, path)), default)


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    folders = sorted(path for path in source.iterdir() if (path / "adapter_config.json").is_file())
    rank = max(tensor.shape[0] for folder in folders for name, tensor in load_file(folder / "adapter_model.safetensors").items() if ".lora_A." in name)
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors, made = load_file(folder / "adapter_model.safetensors"), {}
        for name, a in tensors.items():
            if ".lora_A." not in name:
                continue
            path, other = name.split("base_model.model.")[-1].split(".lora_A")[0], name.replace(".lora_A.", ".lora_B.")
            assert of(path, config.get("rank_pattern") or {}, config["r"]) == len(a), path
            scale = of(path, config.get("alpha_pattern") or {}, config["lora_alpha"]) / len(a) / 2  # the scaling of the copies is 2
            b = tensors[other] * scale
            made[name] = torch.cat([a, a.new_zeros(rank - len(a), a.shape[1])])
            made[other] = torch.cat([b, b.new_zeros(b.shape[0], rank - len(a))], 1).contiguous()
        assert len(made) == len(tensors)
        (target / folder.name).mkdir(parents=True, exist_ok=True)
        save_file(made, target / folder.name / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / folder.name / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": 2 * rank, "rank_pattern": {}, "alpha_pattern": {}}, indent=1))


if __name__ == "__main__":
    main()

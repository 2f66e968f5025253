"""Which adapter do gates choose in each part of a composite answer? Teacher-forced: the true answer is read, so no earlier mistake changes what later gates see.

    python parts.py CHECKPOINT… --data DATASETS --adapters ADAPTERS --base BASE --out FILE [--rows 32] [--composites 3,5,10]

For every part of the answer, and for the questions in the prompt, the shares of the tokens (all layers but the first) whose likeliest adapter is that of the
part itself (own), of another part (other), or of a task that the composite does not have (outside). "first" is the same for the first four tokens of a part.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-30-qwen-evidence"))

from segments import labelled_parts

from meteora_core.checkpoints.opening import attach_checkpoint, describe_checkpoint
from meteora_core.data.tasks import get_task
from meteora_core.json_files import read_json, write_json
from meteora_core.model.attach import detach, meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer, pick_device, pick_dtype
from meteora_core.routing import IGNORE, meteora_of
from meteora_core.training.composites import composite_text
from meteora_core.training.encoding import TrainRow, encode_labelled
from meteora_core.training.gate_metrics import is_first_layer

FIRST = 4


@torch.inference_mode()
def likeliest(model: Any, row: TrainRow) -> torch.Tensor:
    """The likeliest adapter of each token in each layer but the first: int64 (layers, tokens), on the CPU."""
    found: list[torch.Tensor] = []
    layers = [layer for path, layer in meteora_layers(model) if not is_first_layer(path)]
    handles = [layer.register_forward_pre_hook(lambda module, inputs: found.append(F.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), module.gate.to(inputs[0].dtype)).argmax(-1))) for layer in layers]
    try:
        model(input_ids=torch.tensor([row.tokens], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(found) == len(layers)
    return torch.stack(found).cpu()


def measure(model: Any, rows: Sequence[TrainRow], members: Sequence[int]) -> dict[str, dict[str, float]]:
    """The shares of each part: ``prompt``, and for each member ``1``, ``2`` and so on, and ``1 first``."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        chosen, labels = likeliest(model, row), torch.tensor(row.gate_labels)
        places = torch.arange(len(row))
        spans = {"prompt": (places < row.response_start) & (labels != IGNORE)}
        for number, member in enumerate(members, start=1):
            part = (places >= row.response_start) & (labels == member)
            spans[str(number)] = part
            spans[f"{number} first"] = part & (part.cumsum(0) <= FIRST)
        inside = torch.isin(chosen, torch.tensor(members))
        for name, where in spans.items():
            counted = counts.setdefault(name, Counter())
            own = chosen == labels
            counted["own"] += int((own & where).sum())
            counted["other"] += int((inside & ~own & where).sum())
            counted["outside"] += int((~inside & where).sum())
    return {name: {kind: round(count / max(1, counted.total()), 4) for kind, count in counted.items()} for name, counted in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--composites", default="3,5,10")
    arguments = parser.parse_args()
    device, reference = pick_device(None), BaseReference(arguments.base)
    model, tokenizer = load_base(reference, dtype=pick_dtype(None, device), device=device), load_tokenizer(reference)
    made = read_json(arguments.out)["made"] if arguments.out.is_file() else []
    for checkpoint in arguments.checkpoints:
        attach_checkpoint(model, describe_checkpoint(checkpoint), adapters_dir=arguments.adapters)
        model.eval()
        state = meteora_of(model)
        for count in arguments.composites.split(","):
            name = f"composite_{count}"
            if any((each["checkpoint"], each["composite"]) == (checkpoint.name, name) for each in made):
                continue
            task = get_task(name)
            index = [state.names.index(member) for member in task.members]
            solved, parts = labelled_parts(arguments.data, name, arguments.rows)
            encoded = encode_labelled([composite_text(list(zip(index, rows, strict=True)), solved) for rows in parts], tokenizer, 8192)
            state.temperature = task.routing_temperature
            made.append({"checkpoint": checkpoint.name, "composite": name, "rows": len(parts), "members": list(task.members), "shares": measure(model, encoded.rows, index)})
            write_json(arguments.out, {"made": made})
            shares = made[-1]["shares"]
            print(checkpoint.name, name, " ".join(f"{part}:{values.get('own', 0):.2f}" for part, values in shares.items()), flush=True)
        detach(model)


if __name__ == "__main__":
    main()

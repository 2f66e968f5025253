"""Gates measured with their own routing on held-out rows: those of a checkpoint; the first blocks' from another one; or softmax gates in the span.

python routed.py CHECKPOINT DATA [--first OTHER 8 | --span STRENGTH PENALTY]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from span import span_softmax

from meteora_core import load_checkpoint
from meteora_core.checkpoints.gate_statistics import Recipe, read_statistics
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.training.gate_metrics import measure_gates

torch.set_num_threads(1)
checkpoint, data = map(Path, sys.argv[1:3])
base = BaseReference("smollm2-135m")
tokenizer, model = load_tokenizer(base), load_checkpoint(checkpoint, dtype="float32", device="cpu")
names = list(model.meteora.names)
found = read_statistics(checkpoint, names)
statistics, solved = [found[name] for name in names], {}
other = load_file(Path(sys.argv[4]) / "meteora.safetensors") if "--first" in sys.argv else {}
for path, layer in meteora_layers(model):
    if "--first" in sys.argv and int(path.split(".")[2]) < int(sys.argv[5]):
        gate = other[f"{path}.gate"]
    elif "--span" in sys.argv:
        key = statistics[0].input_of(path)
        if key not in solved:
            means = torch.stack([each.mean(key) for each in statistics])
            solved[key] = span_softmax([each.squares(key) for each in statistics], means, float(sys.argv[4]), float(sys.argv[5]))
        gate = solved[key]
    else:
        continue
    with torch.no_grad():
        layer.gate.copy_(gate)
how = collecting(CollectOptions(data=data, device="cpu"), base, model, tokenizer, Recipe(answer_share=0.8, bare_share=0.25))
collector = Collector(tokenizer, how, Path(), lambda name, folder: find_rows(name, data, folder, tokenizer))
measured = measure_gates(model, replace(collector.held_out(names), response_only=True))
tasks = {name: measured[f"gate_accuracy/{name}"] for name in names if f"gate_accuracy/{name}" in measured}
print(f"answers {measured['gate_accuracy']:.4f} tasks {sum(tasks.values()) / len(tasks):.4f} all tokens {measured['gate_accuracy_all']:.4f}")
print(f"loss on answers {measured['lm_loss']:.4f}", {name: (round(value, 3), round(measured[f"lm_loss/{name}"], 3)) for name, value in tasks.items()})

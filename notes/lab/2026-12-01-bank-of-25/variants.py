"""Variants of the closed form from a checkpoint's statistics, on the inputs that inputs.py saved. python variants.py CHECKPOINT INPUTS.pt"""

import sys
from pathlib import Path

import torch
from span import centred, discriminant, ridge, span_softmax

from meteora_core.checkpoints.gate_statistics import read_statistics

torch.set_num_threads(1)
saved = torch.load(sys.argv[2])
names, labels = saved["names"], saved["labels"]
statistics = [each for _, each in sorted(read_statistics(Path(sys.argv[1]), names).items(), key=lambda item: names.index(item[0]))]
found = {}
for key, inputs in saved["inputs"].items():
    means, parts = torch.stack([each.mean(key) for each in statistics]), [each.squares(key) for each in statistics]
    total = sum(parts)
    now = ridge(total, centred(means), 1e-2)
    own = (now * means).sum(1)
    gates = {f"ridge strength {strength}": ridge(total, centred(means), strength) for strength in (1e-2, 1e-4, 1e-3, 1e-1, 0.3)}
    gates |= {f"strength of each feature {strength}": ridge(total, centred(means), strength, 1.0) for strength in (1e-3, 1e-2, 1e-1, 0.3)}
    gates |= {f"rows over their own mean, to the power of {power}": now / own[:, None].abs() ** power for power in (0.25, 0.5, 1.0)}
    gates |= {f"discriminant {strength}": discriminant(parts, means, strength) for strength in (1e-2, 1e-1)}
    gates |= {f"span softmax {s}, penalty {p}": span_softmax(parts, means, s, p) for s in (1e-2, 1e-1, 0.3) for p in (1e-2, 3e-2, 1e-1)}
    for name, gate in gates.items():
        hits = (inputs.double() @ gate.t()).argmax(1) == labels
        found.setdefault(name, []).append(torch.stack([hits[labels == index].double().mean() for index in range(len(names))]))
        found.setdefault((name, "all"), []).append(hits[labels < len(names) - 1].double().mean())
for name in (name for name in found if isinstance(name, str)):
    each = torch.stack(found[name]).mean(0)
    print(
        f"{name}: answers {torch.stack(found[name, 'all']).mean():.4f} tasks {each[:-1].mean():.4f} base route {each[-1]:.3f}",
        [round(x, 3) for x in each.tolist()],
    )

"""Gates of a routed checkpoint solved in other ways from its statistics, each measured as it routes; and the asked task's adapter missing, with scores.

python variants.py DATA RESULTS NAME --base BASE --checkpoint ROUTED [options of measure.py]

Adapters of tasks with long answers get a larger weight: the mean number of answer tokens in a row, to a power, over its mean. ROUTED has the base route.
"""

import torch
from measure import World, given, late, log, routing, scores, target

from meteora_core.checkpoints.gate_statistics import GateStatistics
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.training.ridge import SCALE, ridge_rows

world = World()
names, adapters = world.names, world.adapters
statistics = [GateStatistics(given.checkpoint / "meteora.stats" / f"{name}.safetensors") for name in names]
lengths = []
for name in adapters:
    rows = find_rows(name, given.data, None, world.tokenizer).train[:200]
    lengths.append(sum(len(world.tokenizer(row.response)["input_ids"]) + 1 for row in rows) / len(rows))


def weights(power: float, base: float) -> list[float]:
    """The weight of each adapter, 1 on average, and of the base route."""
    raised = torch.tensor(lengths, dtype=torch.float64) ** power
    return [*(raised / raised.mean()).tolist(), base]


wanted = {f"power{power:g}-base{base:g}": weights(power, base) for power in (0.0, 0.25, 0.5) for base in (1.0, 0.5, 0.0)}
missing = [name for name in adapters if not target(f"meteora.{name}").exists()]
wanted |= {f"without.{name}": [float(other != name) for other in names] for name in missing}
gates: dict[str, dict[str, torch.Tensor]] = {key: {} for key in wanted}
groups: dict[str, list[str]] = {}
for path, _ in meteora_layers(world.model):
    groups.setdefault(statistics[0].input_of(path), []).append(path)
for layers in groups.values():
    squares = torch.stack([each.squares(layers[0]).to(world.device) for each in statistics]).double()
    means = torch.stack([each.mean(layers[0]).double() for each in statistics]).to(world.device)
    for key, weight in wanted.items():
        kept = [index for index, value in enumerate(weight) if value]
        shares = torch.tensor([weight[index] for index in kept], dtype=torch.float64, device=world.device)
        total = torch.einsum("a,aij->ij", shares, squares[kept])
        solved = ridge_rows(total, means[kept], shares) * SCALE
        gate = torch.zeros(len(names), means.shape[1], dtype=torch.float64, device=world.device)
        gate[kept] = solved
        gates[key] |= dict.fromkeys(layers, gate.float().cpu())
log("solved", len(wanted), "sets of gates")


def use(key: str) -> None:
    """Set the gates, and mute adapters that have no weight."""
    with torch.no_grad():
        for path, layer in meteora_layers(world.model):
            layer.gate.copy_(gates[key][path])
    world.state.mute([name for name, value in zip(names, wanted[key], strict=True) if not value])


own = given.name
for key in wanted:
    if not key.startswith("without.") and not late():
        use(key)
        given.name = f"{own}-{key}".replace(".", "")
        if not target("routing").exists():
            routing(world)
given.name = own
for name in sorted(missing, key=lambda name: lengths[adapters.index(name)]):
    if not late():
        use(f"without.{name}")
        world.tasks = [name]
        scores(world)

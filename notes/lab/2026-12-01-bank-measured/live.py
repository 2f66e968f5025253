"""Adds the last adapters of a folder one by one to a loaded model that has the others, and compares its gates with those of all adapters at once.

python live.py BASE ADAPTERS DATA ROUTED OUT.json [--last 5] [--cycles 1000]

The adapters' folders contain their statistics (ship.py). ROUTED is the checkpoint that `meteora route ADAPTERS` made of all of them, the base route included.
The same adapters are then dropped again, and the gates compared with those of the first ones at once; with --cycles, the last one comes and goes.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from meteora_core import AdapterBank, attach, load_checkpoint
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.joining import with_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.live_bank import LiveBank
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.training.statistics import closed_form_gates

parser = argparse.ArgumentParser()
parser.add_argument("base")
for name in ("adapters", "data", "routed", "out"):
    parser.add_argument(name, type=Path)
parser.add_argument("--last", type=int, default=5)
parser.add_argument("--cycles", type=int, default=0, help="number of times that the last adapter is added and dropped again after all this, without measuring")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
given = parser.parse_args()
BEGAN = time.time()


def log(*parts: object) -> None:
    print(time.strftime("%H:%M:%S"), f"{time.time() - BEGAN:6.1f} [live]", *parts, flush=True)


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict:
    """Whether all gates are equal, bit by bit, and the largest relative difference of one."""
    wanted = {path: tensor.to(found[path]) for path, tensor in wanted.items()}
    relative = max(((found[path] - each).float().norm() / each.float().norm()).item() for path, each in wanted.items())
    return {"gates": len(wanted), "equal": all(torch.equal(found[path], each) for path, each in wanted.items()), "largest relative difference": relative}


base = BaseReference(given.base)
tokenizer = load_tokenizer(base)
reference = load_checkpoint(given.routed, base, device=given.device)
at_once = {path: layer.gate.detach().cpu().clone() for path, layer in meteora_layers(reference)}
names, dtype = [name for name in reference.meteora.names if name != NO_ADAPTER], next(iter(at_once.values())).dtype
del reference
model = load_base(base, dtype=torch.bfloat16 if given.device.startswith("cuda") else torch.float32, device=torch.device(given.device)).eval()
folders = {name: given.adapters / name for name in names}
files = {name: given.routed / "meteora.stats" / f"{name}.safetensors" for name in (*names, NO_ADAPTER)}
first, last = names[: -given.last], names[-given.last :]
recipe = GateStatistics(files[NO_ADAPTER]).header.recipe
how = collecting(CollectOptions(data=given.data, device=given.device), base, model, tokenizer, recipe)
workspace = given.routed.with_name("live.new")
workspace.mkdir(parents=True, exist_ok=True)
collector = Collector(tokenizer, how, workspace, lambda name, folder: find_rows(name, given.data, folder, tokenizer))
collector.folders = dict(folders)
bank = with_adapter(collector.with_frame(AdapterBank.from_peft({name: folders[name] for name in first})), base_route())
attach(model, bank, top_k=2, init="zeros")
model.meteora.provenance.gates = "closed form"  # an addition solves all gates again, so it does not matter that these are zero
solved: dict[str, torch.Tensor] = {}


class Kept(LiveBank):
    """A bank that keeps the float32 gates that were solved last."""

    def _set(self, gates: dict[str, torch.Tensor]) -> None:
        solved.clear()
        solved.update(gates)
        super()._set(gates)


living = Kept(model, collector, {name: GateStatistics(files[name]) for name in (*first, NO_ADAPTER)})
found: dict = {"changes": []}
for name in last:
    change = living.add(name, folders[name])
    found["changes"].append({"adapter": name, "seconds": change.seconds, "exact": change.exact, "held-out top-1": change.held_out.get("gate_accuracy")})
    log("added", found["changes"][-1])
    given.out.write_text(json.dumps(found))
held = {path: layer.gate.detach().cpu() for path, layer in meteora_layers(model)}
found["after additions, from the checkpoint of all at once, as stored"] = compare(held, at_once)
log("added, from the checkpoint", found["after additions, from the checkpoint of all at once, as stored"])
given.out.write_text(json.dumps(found))
once = dict(closed_form_gates([GateStatistics(files[name]) for name in (*names, NO_ADAPTER)], list(held)))
found["after additions, from all at once, float32"] = compare(solved, once)
log("added, float32", found["after additions, from all at once, float32"])
given.out.write_text(json.dumps(found))
for name in reversed(last):
    log("dropped", name, f"{living.drop(name).seconds:.1f} s")
before = dict(closed_form_gates([GateStatistics(files[name]) for name in (*first, NO_ADAPTER)], list(held)))
after = {path: layer.gate.detach().cpu() for path, layer in meteora_layers(model)}
found["after dropping them again, from never having had them, as stored"] = compare(after, before)
log("dropped again", found["after dropping them again, from never having had them, as stored"])
given.out.write_text(json.dumps(found))
if given.cycles:
    living.collector = Collector(tokenizer, how, workspace, lambda name, folder: None)  # without rows, nothing is measured
    living.collector.folders = dict(folders)
    with_last = dict(closed_form_gates([GateStatistics(files[name]) for name in (*first, last[-1], NO_ADAPTER)], list(held)))
    for number in range(given.cycles):
        living.add(last[-1], folders[last[-1]])
        if number == given.cycles - 1:
            found[f"in cycle {given.cycles}, with the adapter, from all at once, float32"] = compare(solved, with_last)
        living.drop(last[-1])
        if number % 100 == 99:
            log(number + 1, "cycles")
    after = {path: layer.gate.detach().cpu() for path, layer in meteora_layers(model)}
    found[f"after {given.cycles} cycles, from never having had the adapter, as stored"] = compare(after, before)
    log("cycles", {key: value for key, value in found.items() if "cycle" in key})
    given.out.write_text(json.dumps(found))

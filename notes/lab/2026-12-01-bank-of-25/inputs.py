"""Layer inputs of answer tokens of train rows that the statistics did not read, with the routing of a checkpoint's own gates.

python inputs.py CHECKPOINT DATA OUT.pt [tokens of each adapter] [layers, separated by commas]
"""

import random
import sys
from pathlib import Path

import torch

from meteora_core import load_checkpoint
from meteora_core.adapters.base_route import NO_ADAPTER
from meteora_core.checkpoints.gate_statistics import Recipe, read_statistics
from meteora_core.living.collector import Collector, collecting
from meteora_core.living.options import CollectOptions
from meteora_core.living.rows import find_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.training.encoding import collate, encode_rows, row_lengths
from meteora_core.training.statistics import _planned

torch.set_num_threads(1)
checkpoint, data, out = map(Path, sys.argv[1:4])
most = int(sys.argv[4]) if len(sys.argv) > 4 else 1500
chosen = {int(layer) for layer in (sys.argv[5] if len(sys.argv) > 5 else "3,9,15,21,23,25,27,29").split(",")}
base = BaseReference("smollm2-135m")
tokenizer, model = load_tokenizer(base), load_checkpoint(checkpoint, dtype="float32", device="cpu")
names, layers = list(model.meteora.names), dict(meteora_layers(model))
how = collecting(CollectOptions(data=data, device="cpu"), base, model, tokenizer, Recipe(answer_share=0.8, bare_share=0.25))
collector = Collector(tokenizer, how, Path(), lambda name, folder: find_rows(name, data, folder, tokenizer))
rows = []
for index, name in enumerate(names):
    if name == NO_ADAPTER:
        rows += [(index, row) for row in encode_rows(collector.rows(name).held_out, tokenizer, index, 400, None).rows]
        continue
    encoded = collector.train_rows(name, index)
    used = {row for batch in _planned(row_lengths(encoded), how)[0] for row in batch}
    rest = [number for number in range(len(encoded)) if number not in used]
    random.Random(7).shuffle(rest)
    tokens = 0
    for number in (number for number in rest if len(encoded[number]) <= 400):
        rows.append((index, encoded[number]))
        tokens += len(encoded[number])
        if tokens >= most:
            break
first = read_statistics(checkpoint, names)[names[0]]
keys = sorted({first.input_of(path) for path in layers if int(path.split(".")[2]) in chosen})
inputs, labels = {key: [] for key in keys}, []
for key in keys:
    layers[key].register_forward_pre_hook(lambda module, arguments, key=key: inputs[key].append(arguments[0].flatten(0, -2)[keep].half()))
rows.sort(key=lambda row: len(row[1]))
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
    for start in range(0, len(rows), 8):
        batch = collate([row for _, row in rows[start : start + 8]], how.pad_token)
        keep = (batch.response & (batch.gate_labels >= 0)).flatten()
        labels.append(batch.gate_labels.flatten()[keep])
        model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
torch.save({"inputs": {key: torch.cat(parts) for key, parts in inputs.items()}, "labels": torch.cat(labels), "names": names}, out)
print(len(torch.cat(labels)), "tokens of", len(rows), "rows")

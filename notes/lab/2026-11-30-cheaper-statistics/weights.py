"""Weights of the base route on a checkpoint of `meteora route`: own routing on held-out rows, loss on general text. python weights.py CHECKPOINT DATA general.jsonl"""
import json, math, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import meteora_core.training.statistics as S
from meteora_core import load_checkpoint
from meteora_core.checkpoints.gate_statistics import read_statistics
from meteora_core.data.frames import INST
from meteora_core.data.rows import Row, read_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.training.encoding import collate, encode_rows
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.task_rows import HeldOut, split_held_out
C = Path(sys.argv[1]); tok = load_tokenizer(BaseReference('smollm2-135m'))
model = load_checkpoint(C, dtype='float32'); state = model.meteora; names = list(state.names); layers = dict(meteora_layers(model))
st = read_statistics(C, names); pad = tok.pad_token_id
def enc(rows, i=0): return list(encode_rows(rows, tok, i, 384, None).rows)
held = []
for i, n in enumerate(names):
    rows, used, take = (enc(split_held_out(read_rows(Path(sys.argv[2]), n, 'train', None), 42)[1], i) if n != 'no_adapter' else []), 0, []
    for r in rows:
        if used >= 350: break
        take.append(r); used += len(r)
    held.append(take)
held = HeldOut(held, names, pad, 8, response_only=True)
items = [json.loads(l) for l in open(sys.argv[3])]
sets = {'text': [Row('', i['text']) for i in items if 'text' in i][:14], 'question': [Row(INST.around(i['question']), i['answer']) for i in items if 'question' in i][:14]}
sets = {k: sorted([r for r in enc(v) if len(r) < 200], key=len) for k, v in sets.items()}
print({k: (len(v), sum(map(len, v))) for k, v in sets.items()}, [sum(map(len, h)) for h in held.rows], flush=True)
@torch.no_grad()
def ce(rows):
    s = c = 0
    for k in range(0, len(rows), 7):
        b = collate(rows[k : k + 7], pad); lg = model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits
        l = torch.nn.functional.cross_entropy(lg[:, :-1].transpose(1, 2), b.input_ids[:, 1:], reduction='none'); keep = b.gate_labels[:, 1:] >= 0
        s += (l * keep).sum().item(); c += keep.sum().item()
    return s / c
with state.disabled(): base = {k: ce(v) for k, v in sets.items()}
print('base', base, flush=True)
def put(g):
    with torch.no_grad():
        for p, l in layers.items(): l.gate.copy_(g[p])
def line(tag):
    m = measure_gates(model, held); t = {k: math.exp(ce(v) - base[k]) for k, v in sets.items()}
    real = [n for n in names if n != 'no_adapter']
    print(tag, f"answers {m['gate_accuracy']:.4f} tasks {sum(m[f'gate_accuracy/{n}'] for n in real) / len(real):.4f} all {m['gate_accuracy_all']:.4f} loss {m['lm_loss']:.4f}", {k: round(v, 4) for k, v in t.items()}, {n[:12]: round(m[f'gate_accuracy/{n}'], 3) for n in real}, f'{time.process_time():.0f} CPU s', flush=True)
for w in (1.0, .5, .25):
    S.BASE_ROUTE = w; put(dict(S.closed_form_gates([st[n] for n in names], list(layers)))); line(f'weight {w}')
S.BASE_ROUTE = 1.0
real = [n for n in names if n != 'no_adapter']
g = dict(S.closed_form_gates([st[n] for n in real], list(layers))); put({p: torch.cat([x, torch.zeros(1, x.shape[1])]) for p, x in g.items()}); state.mute(['no_adapter']); line('without base route')

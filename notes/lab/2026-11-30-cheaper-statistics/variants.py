"""Variants of closed-form gates, measured with the gates' own routing on held-out train rows; see the note of this folder's name.

python variants.py BASE ADAPTERS DATA OUT [--tokens 2000] [--held 12] [--tasks a,b] [--deadline SECONDS] [--only REGEX]

Layer inputs of every adapter's rows are kept on the device, once for each kind of run, and all variants are solved from them.
Each result is one line of OUT/variants.jsonl; variants whose line exists are skipped.
"""
import argparse, contextlib, json, math, random, re, sys, time
from pathlib import Path

import torch
from limited import limit

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import base_route
from meteora_core.adapters.joining import with_adapter, without_adapter
from meteora_core.checkpoints.native import read_checkpoint
from meteora_core.data.frames import INST
from meteora_core.data.rows import Row, read_rows
from meteora_core.living.general import general_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.training.encoding import collate, encode_rows
from meteora_core.training.gate_metrics import is_first_layer, measure_gates
from meteora_core.training.task_rows import HeldOut, split_held_out

a = argparse.ArgumentParser()
a.add_argument('base'); a.add_argument('adapters', type=Path); a.add_argument('data', type=Path); a.add_argument('out', type=Path)
a.add_argument('--tokens', type=int, default=2000); a.add_argument('--held', type=int, default=12); a.add_argument('--tasks', default='')
a.add_argument('--deadline', type=float, default=1e9); a.add_argument('--only', default='.'); a.add_argument('--batch', type=int, default=8)
a.add_argument('--dtype', default='float32'); a.add_argument('--max-length', type=int, default=512); a.add_argument('--threads', type=int, default=0)
a.add_argument('--kinds', default='own,bare,mix,drop,prefix,half')
a = a.parse_args()
BEGAN = time.time()
if a.threads: torch.set_num_threads(a.threads)
DEV = 'cuda' if torch.cuda.is_available() else 'cpu'
HALF = torch.bfloat16
a.out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
stored = read_checkpoint(a.adapters)[2] if (a.adapters / 'meteora_config.json').is_file() else None
there = stored.names if stored is not None else sorted(p.name for p in a.adapters.iterdir() if p.is_dir())
N = a.tasks.split(',') if a.tasks else [n for n in there if (a.data / n).is_dir()]
ref = BaseReference(a.base)
tok = load_tokenizer(ref); model = load_base(ref, dtype=getattr(torch, a.dtype), device=torch.device(DEV)).eval()
if stored is None: stored = AdapterBank.from_peft({n: a.adapters / n for n in N})
for n in set(stored.names) - set(N): stored = without_adapter(stored, n)
N = list(stored.names)
bank = with_adapter(stored, base_route())
attach(model, bank, top_k=2, init='zeros'); state = model.meteora; layers = dict(meteora_layers(model)); NB = len(N)
pad = tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id
depth = model.config.num_hidden_layers


def log(*parts): print(f'{time.time() - BEGAN:6.0f}', *parts, flush=True)


def enc(rows, index): return list(encode_rows(rows, tok, index, a.max_length, None).rows)


train, held = [], []
for i, n in enumerate(N):
    tr, h = split_held_out(read_rows(a.data, n, 'train', 4000), 42)
    random.Random(42).shuffle(tr)
    train.append(limit(enc(tr[:1500], i), a.tokens)); held.append(enc(h, i)[: a.held])
general = general_rows(INST)
train.append(enc(general.train, NB))
heldout = HeldOut([*held, []], [*N, 'no_adapter'], pad, a.batch, response_only=True)
log('rows', [len(t) for t in train], 'tokens', [sum(map(len, t)) for t in train], 'answers', [sum(len(r) - r.response_start for r in t) for t in train], 'held', [len(h) for h in held])

# collection: X[kind][input] = list per class of (n, h); R[kind] = list per class of bool (n,)
state.mode  # routing mode; forced labels are replaced before each decoder layer
owner, buf = {}, {}
order = []


def hook(path):
    def f(mod, args):
        x = args[0]
        for other, (seen) in buf.items():
            if seen is x: owner[path] = other; return
        owner[path] = path; buf[path] = x
    return f


blocks = [m for name, m in model.named_modules() if re.fullmatch(r'model\.layers\.\d+', name)]
plan = {'forced': None}


def set_layer(index):
    def f(mod, args):
        if plan['forced'] is not None:
            from dataclasses import replace
            state.mode = replace(state.mode, forced=plan['forced'][index])
    return f


@torch.no_grad()
def run(kind, index, rows, gen):
    """Own: the row's adapter. Bare: none. Mix: each row is bare with probability 1/4. Drop: each row and layer. Prefix: the first layers of half of the rows."""
    parts, resp = {}, []
    rows = sorted(rows, key=len)
    for s in range(0, len(rows), a.batch):
        b = collate(rows[s : s + a.batch], pad).to(DEV)
        n, t = b.input_ids.shape
        own = torch.full((n, t), index, device=DEV)
        none = torch.full((n, t), NB, device=DEV)
        per = []
        u = torch.rand(n, generator=gen).to(DEV); cut = torch.rand(n, generator=gen).to(DEV) * depth; half = torch.rand(n, generator=gen).to(DEV) < .5
        for l in range(depth):
            if kind == 'own': off = torch.zeros(n, dtype=torch.bool, device=DEV)
            if kind == 'bare': off = torch.ones(n, dtype=torch.bool, device=DEV)
            if kind == 'mix': off = u < .25
            if kind == 'drop': off = torch.rand(n, generator=gen).to(DEV) < .25
            if kind == 'prefix': off = half & (l < cut)
            per.append(torch.where(off[:, None], none, own))
        plan['forced'] = per
        buf.clear()
        with state.force(per[0]): model.model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)
        plan['forced'] = None
        keep = b.gate_labels.reshape(-1) != -100
        for p, x in buf.items(): parts.setdefault(p, []).append(x.reshape(-1, x.shape[-1])[keep].to(HALF))
        resp.append(b.response.reshape(-1)[keep])
    return {p: torch.cat(v) for p, v in parts.items()}, torch.cat(resp)


X, R = {}, {}


def collect(kind):
    if kind in X: return
    X[kind], R[kind] = {}, []
    hs = [l.register_forward_pre_hook(hook(p)) for p, l in layers.items()] + [m.register_forward_pre_hook(set_layer(i)) for i, m in enumerate(blocks)]
    gen = torch.Generator().manual_seed(7)
    for i in range(NB + 1):
        parts, resp = run('bare' if i == NB else kind, i, train[i], gen)
        for p, x in parts.items(): X[kind].setdefault(p, []).append(x)
        R[kind].append(resp)
    for h in hs: h.remove()
    log('collected', kind, len(X[kind]), 'inputs', sum(len(r) for r in R[kind]), 'tokens')


def weights(resp, share):
    n = len(resp); w = torch.full((n,), 1.0 / n, device=resp.device)
    if share is not None and resp.any() and not resp.all(): w = torch.where(resp, share / resp.sum(), (1 - share) / (~resp).sum())
    return w


def moments(mix, p, share, keep=1.0):
    """mix: {kind: weight}. Returns S per class (list) and M (N+1, h), float64."""
    S, M = [], []
    for i in range(NB + 1):
        s = m = 0
        for kind, q in mix.items():
            r = R[kind][i]; x = X[kind][p][i]; w = weights(r, share) * q
            if keep < 1:
                k = max(1, int(len(r) * keep)); r, x = r[-k:], x[-k:]; w = weights(r, share) * q
            x = x.float()
            s = s + (x * w[:, None]).t() @ x; m = m + (w[:, None] * x).sum(0)
        S.append(s.double()); M.append(m.double())
    return S, torch.stack(M)


def ridge(S, M, shrink):
    T = M - M.mean(0, keepdim=True)
    A = S.clone(); A.diagonal().add_(shrink * A.diagonal().mean())
    return torch.linalg.solve(A, T.t()).t()


NORMALS = torch.randn(1024, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def gaussian(S, M, shrink, steps, l2, scale=8.0):
    """Majorisation steps (Boehning, 1992) of the softmax loss, with every class a normal distribution of its moments."""
    n = len(M); St = sum(S)
    G = ridge(St, M, shrink) * scale
    B = St / n * 0.5; lam = l2 * B.diagonal().mean(); B.diagonal().add_(lam)
    F = torch.linalg.cholesky(B)
    Z = NORMALS[:, :n].to(G.device)
    V = G.clone(); t = 1.0
    for _ in range(steps):
        g = lam * V
        for c in range(n):
            mu = V @ M[c]; CG = S[c] @ V.t() - torch.outer(M[c], mu)  # (h, n)
            K = V @ CG; K = (K + K.t()) / 2; K.diagonal().add_(1e-6 * K.diagonal().mean() + 1e-12)
            L = torch.linalg.cholesky(K)
            P = (mu + Z @ L.t()).softmax(-1); pm = P.mean(0)
            J = torch.diag(pm) - P.t() @ P / len(P)
            e = pm.clone(); e[c] -= 1
            g += (torch.outer(e, M[c]) + J @ CG.t()) / n
        new = V - torch.cholesky_solve(g.t(), F).t()
        t2 = (1 + math.sqrt(1 + 4 * t * t)) / 2
        V = new + (t - 1) / t2 * (new - G); G, t = new, t2
    return G


def softmax_samples(mix, p, share, S, M, shrink, steps, l2, scale=8.0):
    n = len(M); St = sum(S)
    xs, ws, ys = [], [], []
    for i in range(n):
        for kind, q in mix.items():
            r = R[kind][i]; xs.append(X[kind][p][i].float()); ws.append(weights(r, share) * q / n); ys.append(torch.full((len(r),), i, device=r.device))
    x, w, y = torch.cat(xs), torch.cat(ws), torch.cat(ys)
    G = ridge(St, M, shrink) * scale
    B = St / n * 0.5; lam = l2 * B.diagonal().mean(); B.diagonal().add_(lam); F = torch.linalg.cholesky(B)
    V = G.clone(); t = 1.0; hot = torch.nn.functional.one_hot(y, n).float()
    for _ in range(steps):
        P = (x @ V.float().t()).softmax(-1)
        g = lam * V + ((P - hot) * w[:, None]).t().matmul(x).double()
        new = V - torch.cholesky_solve(g.t(), F).t()
        t2 = (1 + math.sqrt(1 + 4 * t * t)) / 2
        V = new + (t - 1) / t2 * (new - G); G, t = new, t2
    return G


def put(fn):
    cache = {}
    with torch.no_grad():
        for p, l in layers.items():
            k = owner[p]
            if k not in cache: cache[k] = fn(k)
            l.gate.copy_(cache[k].to(l.gate.dtype))


def report(tag, fn, kinds=()):
    file = a.out / 'variants.jsonl'
    done = {json.loads(l)['tag'] for l in open(file)} if file.exists() else set()
    if tag in done or not re.search(a.only, tag) or time.time() - BEGAN > a.deadline: return
    for k in kinds: collect(k)
    began = time.time()
    try: put(fn)
    except Exception as error: log(tag, 'failed', repr(error)[:200]); return
    solved = time.time() - began
    m = measure_gates(model, heldout)
    tasks = {n: m.get(f'gate_accuracy/{n}') for n in N}
    line = {'tag': tag, 'answers': m['gate_accuracy'], 'tasks': sum(v for v in tasks.values() if v is not None) / len(N), 'all': m['gate_accuracy_all'], 'loss': m['lm_loss'],
            'solve_s': solved, 'measure_s': time.time() - began - solved, 'by_task': tasks, 'adapters': len(N), 'tokens': a.tokens}
    with open(file, 'a') as f: f.write(json.dumps(line) + '\n')
    log(f"{tag}: answers {line['answers']:.4f} tasks {line['tasks']:.4f} all {line['all']:.4f} loss {line['loss']:.4f} ({solved:.0f} s, {line['measure_s']:.0f} s)")


def r_(mix, share=.8, shrink=1e-2, scale=8.0, base=1.0, power=0.0, **k):
    c = torch.tensor([(sum(len(r) - r.response_start for r in t) / len(t)) ** power for t in train], dtype=torch.float64, device=DEV)
    c = c / c[:-1].mean(); c[-1] = base

    def fn(p):
        S, M = moments(mix, p, share, **k)
        W = c[:, None] * M; A = sum(ci * s for ci, s in zip(c, S)); A.diagonal().add_(shrink * A.diagonal().mean())
        return torch.linalg.solve(A, (W - (c / c.sum())[:, None] * W.sum(0, keepdim=True)).t()).t() * scale
    return fn


def g_(mix, share=.8, shrink=1e-2, steps=10, l2=1e-2):
    def fn(p):
        S, M = moments(mix, p, share)
        return gaussian(S, M, shrink, steps, l2)
    return fn


def s_(mix, share=.8, shrink=1e-2, steps=20, l2=1e-2):
    def fn(p):
        S, M = moments(mix, p, share)
        return softmax_samples(mix, p, share, S, M, shrink, steps, l2)
    return fn


NOW = {'own': .75, 'bare': .25}
with state.force(0): pass
kinds = a.kinds.split(',')
report('now: own 3/4, bare 1/4', r_(NOW), ('own', 'bare'))
for base in (.5, .25, .12): report(f'weight of the base route {base}', r_(NOW, base=base), ('own', 'bare'))
for kind in ('mix', 'prefix', 'drop'):
    if kind in kinds: report(f'one pass, {kind}, base route 0.5', r_({kind: 1}, base=.5), (kind,))
report('own, bare and prefix, base route 0.5', r_({'own': .5, 'bare': .25, 'prefix': .25}, base=.5), ('own', 'bare', 'prefix'))
report('own and prefix, base route 0.5', r_({'own': .5, 'prefix': .5}, base=.5), ('own', 'bare', 'prefix'))
for q in (.1, .5): report(f'bare share {q}, base route 0.5', r_({'own': 1 - q, 'bare': q}, base=.5), ('own', 'bare'))
report('half of the tokens, base route 0.5', r_(NOW, base=.5, keep=.5), ('own', 'bare'))
report('a quarter of the tokens, base route 0.5', r_(NOW, base=.5, keep=.25), ('own', 'bare'))
for sh in (3e-3, 3e-2, 1e-1): report(f'ridge strength {sh}, base route 0.5', r_(NOW, base=.5, shrink=sh), ('own', 'bare'))
for share in (.6, .9): report(f'answer share {share}, base route 0.5', r_(NOW, share=share, base=.5), ('own', 'bare'))
for power in (.25,): report(f'weights by answer length, power {power}', r_(NOW, base=.5, power=power), ('own', 'bare'))
for scale in (5.0, 12.0): report(f'scale {scale}, base route 0.5', r_(NOW, scale=scale, base=.5), ('own', 'bare'))
for st, l2 in ((3, 1e-2), (10, 1e-2)): report(f'normal softmax, {st} steps, l2 {l2}', g_(NOW, steps=st, l2=l2), ('own', 'bare'))
for st, l2 in ((5, 1e-2), (20, 1e-2)): report(f'sample softmax, {st} steps, l2 {l2}', s_(NOW, steps=st, l2=l2), ('own', 'bare'))
report('own only', r_({'own': 1}), ('own',))
log('done')

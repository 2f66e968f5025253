"""Layer inputs of some layers, saved once (`offline.py collect OUT DATA`), and gates of several kinds from them (`offline.py solve OUT`). SmolLM2-135M, ten adapters."""
import math, random, re, sys, time
from pathlib import Path

import torch

torch.set_num_threads(1)
OUT = Path(sys.argv[2]); OUT.mkdir(parents=True, exist_ok=True)
LAYERS, KINDS = [3, 9, 15, 21, 27], {'self_attn.q_proj': 3, 'self_attn.o_proj': 1, 'mlp.gate_proj': 2, 'mlp.down_proj': 1}
N = ['logical_deduction', 'question_selection', 'abstract_narrative_understanding', 'goal_step_wikihow', 'winowhy', 'strategyqa', 'disfl_qa', 'news_commentary_de', 'alpaca', 'linguistics_puzzles']
TOKENS, HELD = int(sys.argv[4]) if len(sys.argv) > 4 else 1200, 300


def collect(data):
    from limited import limit
    from meteora_core import load_checkpoint
    from meteora_core.data.frames import INST
    from meteora_core.data.rows import read_rows
    from meteora_core.living.general import general_rows
    from meteora_core.model.attach import meteora_layers
    from meteora_core.model.base import BaseReference, load_tokenizer
    from meteora_core.training.encoding import collate, encode_rows
    tok = load_tokenizer(BaseReference('smollm2-135m'))
    model = load_checkpoint('meteora_core/starter/checkpoint', dtype='bfloat16').eval(); state = model.meteora
    mods = {p: l for p, l in meteora_layers(model) for m in [re.match(r'model.layers.(\d+).(.*)$', p)] if int(m[1]) in LAYERS and m[2] in KINDS}
    buf = {}
    for p, l in mods.items(): l.register_forward_pre_hook(lambda mod, args, p=p: buf.__setitem__(p, args[0].reshape(-1, args[0].shape[-1])))

    @torch.no_grad()
    def run(name, rows, index):
        if (OUT / f'{name}.pt').exists(): return
        rows = sorted(rows, key=len); acts = {p: [] for p in mods}; resp = []
        for s in range(0, len(rows), 8):
            b = collate(rows[s : s + 8], tok.pad_token_id); keep = b.gate_labels.reshape(-1) != -100
            with state.disabled() if index is None else state.force(index): model.model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)
            for p in mods: acts[p].append(buf[p][keep].bfloat16())
            resp.append(b.response.reshape(-1)[keep])
        d = {p: torch.cat(x) for p, x in acts.items()}; d['resp'] = torch.cat(resp)
        torch.save(d, OUT / f'{name}.pt'); print(name, len(rows), len(d['resp']), int(d['resp'].sum()), time.process_time(), flush=True)

    for i, n in enumerate(N):
        index = state.names.index(n)
        rows = read_rows(data, n, 'train', 800); random.Random(42).shuffle(rows)
        e = list(encode_rows(rows[:150], tok, 0, 300, None).rows)
        t = limit(e, TOKENS); h = limit(e[::-1], HELD)
        run(f'own.{n}', t, index); run(f'bare.{n}', t, None); run(f'held.{n}', h, index); run(f'heldbare.{n}', h, None)
    run('general', encode_rows(general_rows(INST).train, tok, 0, 300, None).rows[:60], None)


def weights(r, share):
    n = len(r); w = torch.full((n,), 1 / n)
    return torch.where(r, share / r.sum(), (1 - share) / (~r).sum()) if share and r.any() and not r.all() else w


def load():
    global D
    D = {f.stem: torch.load(f) for f in OUT.glob('*.pt')}


def moments(p, mix=(('own', .75), ('bare', .25)), share=.8):
    S, M = [], []
    for n in [*N, None]:
        s = m = 0
        for kind, q in mix:
            d = D['general'] if n is None else D[f'{kind}.{n}']
            x, w = d[p].float(), weights(d['resp'], share) * q
            s = s + (x * w[:, None]).t() @ x; m = m + w @ x
        S.append(s.double()); M.append(m.double())
    return S, torch.stack(M)


def ridge(S, M, shrink=1e-2):
    S = sum(S); T = M - M.mean(0, keepdim=True); S.diagonal().add_(shrink * S.diagonal().mean())
    return torch.cholesky_solve(T.t(), torch.linalg.cholesky(S)).t() * 8


NORMALS = torch.randn(1024, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def majorise(G, grad, St, n, l2, steps):
    B = St / n * .5; lam = l2 * B.diagonal().mean(); B.diagonal().add_(lam); F = torch.linalg.cholesky(B)
    V, t = G.clone(), 1.0
    for _ in range(steps):
        new = V - torch.cholesky_solve((grad(V) + lam * V).t(), F).t(); t2 = (1 + math.sqrt(1 + 4 * t * t)) / 2
        V = new + (t - 1) / t2 * (new - G); G, t = new, t2
    return G


def gaussian(S, M, steps=10, l2=1e-2):
    n = len(M); Z = NORMALS[:, :n]

    def grad(V):
        g = 0
        for c in range(n):
            mu = V @ M[c]; CG = S[c] @ V.t() - torch.outer(M[c], mu); K = V @ CG; K = (K + K.t()) / 2; K.diagonal().add_(1e-6 * K.diagonal().mean() + 1e-12)
            P = (mu + Z @ torch.linalg.cholesky(K).t()).softmax(-1); pm = P.mean(0); J = torch.diag(pm) - P.t() @ P / len(P)
            e = pm.clone(); e[c] -= 1; g = g + (torch.outer(e, M[c]) + J @ CG.t()) / n
        return g
    return majorise(ridge(S, M), grad, sum(S), n, l2, steps)


def samples(p, S, M, steps=20, l2=1e-2, mix=(('own', .75), ('bare', .25)), share=.8):
    n = len(M); x, w, y = [], [], []
    for i, name in enumerate([*N, None]):
        for kind, q in mix:
            d = D['general'] if name is None else D[f'{kind}.{name}']
            x.append(d[p].float()); w.append(weights(d['resp'], share) * q / n); y.append(torch.full((len(d['resp']),), i))
    x, w, y = torch.cat(x), torch.cat(w), torch.cat(y); hot = torch.nn.functional.one_hot(y, n).float()
    return majorise(ridge(S, M), lambda V: (((x @ V.float().t()).softmax(-1) - hot) * w[:, None]).t().matmul(x).double(), sum(S), n, l2, steps)


def accuracy(G, p):
    out = []
    for kind in ('held', 'heldbare'):
        hit = tot = 0; per = []
        for i, n in enumerate(N):
            d = D[f'{kind}.{n}']; h = ((d[p].float() @ G.float().t()).argmax(1) == i)
            a = h[d['resp']]; hit += a.sum().item(); tot += len(a); per.append(a.float().mean().item())
        out += [hit / tot, sum(per) / len(per)]
    return out


def report(tag, fn):
    began = time.process_time(); tot = torch.zeros(4); ws = 0
    for l in LAYERS:
        for k, w in KINDS.items():
            p = f'model.layers.{l}.{k}'; S, M = moments(p) if p not in CACHE else CACHE[p]
            CACHE[p] = (S, M)
            tot += w * torch.tensor(accuracy(fn(p, S, M), p)); ws += w
    print(f'{tag}: own rows {tot[0] / ws:.4f} (tasks {tot[1] / ws:.4f}), bare rows {tot[2] / ws:.4f} (tasks {tot[3] / ws:.4f}); {time.process_time() - began:.0f} s', flush=True)


CACHE = {}
if sys.argv[1] == 'collect': collect(Path(sys.argv[3]))
else:
    load()
    if len(sys.argv) > 3: LAYERS = [int(x) for x in sys.argv[3].split(',')]
    report('ridge', lambda p, S, M: ridge(S, M)); report('ridge 0.1', lambda p, S, M: ridge(S, M, .1))
    for st, l2 in ((3, 1e-2), (10, 1e-2), (30, 1e-2), (10, 1e-1), (10, 1e-3)): report(f'normal, {st} steps, {l2}', lambda p, S, M: gaussian(S, M, st, l2))
    for st, l2 in ((10, 1e-2), (40, 1e-2), (40, 1e-1), (40, 1e-3)): report(f'samples, {st} steps, {l2}', lambda p, S, M: samples(p, S, M, st, l2))

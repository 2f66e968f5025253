"""The numbers of a living bank on a folder of adapters: statistics, gates, scores, general text, adapters without rows. Every stage can be resumed.

python living.py STAGE BASE ADAPTERS DATA OUT [--share I/N] [--rows 32] [--general FILE] [--device cuda]

STAGES, in this order: collect (shares), self (shares), gates, score (shares), general (shares), report.
ADAPTERS is a folder of PEFT folders or a checkpoint. FILE has lines {"kind", "text"} or {"kind", "question", "answer"}.
"""
import argparse, json, math, os, random, sys, time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import NO_ADAPTER, base_route
from meteora_core.adapters.joining import alone, with_adapter, without_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe
from meteora_core.checkpoints.native import read_checkpoint
from meteora_core.data.frames import INST
from meteora_core.data.rows import Row, read_rows
from meteora_core.data.tasks import TASKS
from meteora_core.evaluation.eval_plan import EvalOptions
from meteora_core.evaluation.runner import evaluate_task
from meteora_core.living.general import general_rows
from meteora_core.living.self_written import self_written_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.routing.routes import Routes
from meteora_core.training.encoding import collate, encode_rows
from meteora_core.training.gate_metrics import measure_gates
from softmax_gates import LowRankMoments, WholeMoments, refined, ridge_system, ridge_system_low_rank
from meteora_core.training.statistics import Collecting, closed_form_gates, collect_statistics
from meteora_core.training.task_rows import HeldOut, split_held_out

a = argparse.ArgumentParser()
a.add_argument('stage'); a.add_argument('base'); a.add_argument('adapters', type=Path); a.add_argument('data', type=Path); a.add_argument('out', type=Path)
a.add_argument('--share', default='0/1'); a.add_argument('--rows', type=int, default=32); a.add_argument('--general', type=Path); a.add_argument('--tokens', type=int, default=8000)
a.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); a.add_argument('--dtype', default='bfloat16'); a.add_argument('--steps', default='3,10')
a.add_argument('--new-tokens', type=int, default=96); a.add_argument('--deadline', type=float, default=1e9); a.add_argument('--held', type=int, default=10); a.add_argument('--self-count', type=int, default=10)
a.add_argument('--configs', default='own,routed,missing,base,ten,self,plain,ridge')
a = a.parse_args()
BEGAN = time.time(); index, of = map(int, a.share.split('/'))
OUT = a.out; (OUT / 'st').mkdir(parents=True, exist_ok=True); (OUT / 'self').mkdir(exist_ok=True); (OUT / 'gates').mkdir(exist_ok=True)
DEV = torch.device(a.device)


def log(*parts): print(f'{time.time() - BEGAN:6.1f} [{a.stage} {a.share}]', *parts, flush=True)
def late(): return time.time() - BEGAN > a.deadline


ref = BaseReference(a.base)
stored = read_checkpoint(a.adapters)[2] if (a.adapters / 'meteora_config.json').is_file() else None
there = stored.names if stored is not None else sorted(p.name for p in a.adapters.iterdir() if (p / 'adapter_config.json').is_file())
N = [n for n in there if n in TASKS and (a.data / n / 'train.jsonl').is_file()]
TEN = N[: a.self_count]
BARE, SHARE = .25, .8


def bank_of(names):
    if stored is None: return AdapterBank.from_peft({n: a.adapters / n for n in names})
    left = stored
    for n in set(stored.names) - set(names): left = without_adapter(left, n)
    return left


def rows_of(n):
    train, held = split_held_out(read_rows(a.data, n, 'train', 4000), 42)
    return train, held


def model_of(): return load_base(ref, dtype=getattr(torch, a.dtype), device=DEV).eval()


def how_of(tok, model): return Collecting(ref, tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id, Recipe(answer_share=SHARE, frame=INST.text, bare_share=BARE), tokens=a.tokens, max_length=512)


def full_layers(): return list(bank_of(N).modules)


def write(file, data):
    part = file.with_name('.' + file.name); part.write_text(json.dumps(data)); os.replace(part, file)


def mine(names): return [n for k, n in enumerate(names) if k % of == index]


if a.stage in ('collect', 'self'):
    tok, model, layers = load_tokenizer(ref), model_of(), full_layers()
    how = how_of(tok, model)
    for n in mine([NO_ADAPTER, *N] if a.stage == 'collect' else TEN):
        file = OUT / ('st' if a.stage == 'collect' else 'self') / f'{n}.safetensors'
        if file.exists() or late(): continue
        began = time.time()
        if n == NO_ADAPTER: bank, rows = base_route(), general_rows(INST)
        elif a.stage == 'self': bank, rows = bank_of([n]), None
        else: bank, rows = bank_of([n]), None
        if a.stage == 'self':
            written = self_written_rows(model, tok, bank, INST, seed=42)
            train = written.train; write(OUT / 'self' / f'{n}.json', [[r.prompt, r.response] for r in train])
        else: train = rows.train if rows is not None else rows_of(n)[0]
        encoded = encode_rows(train, tok, 0, 512, None).rows
        header = collect_statistics(model, bank, encoded, file, how, layers=layers).header
        log(n, header.rows, 'rows', header.tokens, 'tokens counted', f'{time.time() - began:.1f} s', f'{file.stat().st_size / 1e6:.1f} MB')

elif a.stage == 'gates':
    statistics = {f.stem: GateStatistics(f) for f in (OUT / 'st').glob('*.safetensors')}
    self_st = {f.stem: GateStatistics(f) for f in (OUT / 'self').glob('*.safetensors')}
    ten = [n for n in TEN if n in self_st]
    layers = full_layers(); groups = {}
    for p in layers: groups.setdefault(statistics[N[0]].input_of(p), []).append(p)
    tok, model = load_tokenizer(ref), model_of()
    bank = with_adapter(bank_of(N), base_route())
    attach(model, bank, top_k=2, init='zeros'); state = model.meteora; mods = dict(meteora_layers(model))
    ALL = [*N, NO_ADAPTER]
    held = HeldOut([list(encode_rows(rows_of(n)[1], tok, i, 512, None).rows)[: a.held] for i, n in enumerate(N)] + [[]], ALL, how_of(tok, model).pad_token, 8, response_only=True)
    kinds = [(0, 1.0), (0, .5), (0, .25), *((int(x), .5) for x in a.steps.split(',')), (0, .12)]
    subsets = {'all': ALL, 'plain': N, 'ten': [*TEN, NO_ADAPTER]} | {f'without.{n}': [x for x in ALL if x != n] for n in N}
    solved = {}
    timing = {}

    def load(each, layer):
        if each.is_low_rank: return each.mean(layer).to(DEV), LowRankMoments(*(t.to(DEV) for t in each.low_rank(layer)))
        return each.mean(layer).to(DEV), WholeMoments(each.squares(layer).to(DEV))

    def solve(parts, kinds, base):
        """Gates for (steps, weight of the base route) pairs; `base` tells whether the last part is the base route."""
        found = {}
        for weight in {w for _, w in kinds}:
            found |= solve_weighted(parts, [k for k in kinds if k[1] == weight], [1.0] * (len(parts) - base) + [weight] * base)
        return found

    def solve_weighted(parts, kinds, weights):
        means = torch.stack([m for m, _ in parts]); moments = [s for _, s in parts]; c = torch.tensor(weights, device=DEV, dtype=torch.float64)
        if all(isinstance(s, LowRankMoments) for s in moments): system = ridge_system_low_rank(torch.cat([w ** .5 * s.factor for w, s in zip(weights, moments)]), (c[:, None] * torch.stack([s.diagonal for s in moments])).sum(0))
        else: system = ridge_system(sum(w * s.squares for w, s in zip(weights, moments)))
        weighted = c[:, None] * means
        start = system.solve(weighted - (c / c.sum())[:, None] * weighted.sum(0, keepdim=True)) * 8.0
        return {k: (start if not k[0] else refined(start, system, means, moments, k[0], weights)).float().cpu() for k in kinds}

    gates = {k: {} for k in kinds}
    began = time.time()
    for key, members in groups.items():
        parts = {n: load(statistics[n], key) for n in ALL}
        for k, g in solve([parts[n] for n in ALL], kinds, True).items():
            for p in members: gates[k][p] = g
    log('gates of all', f'{time.time() - began:.1f} s')

    def put(g, names):
        order = [names.index(n) if n in names else None for n in ALL]
        with torch.no_grad():
            for p, l in mods.items():
                full = torch.zeros(len(ALL), g[p].shape[1])
                for row, k in enumerate(order):
                    if k is not None: full[row] = g[p][k]
                l.gate.copy_(full.to(l.gate.dtype))
        state.mute([n for n in ALL if n not in names])

    table = {}
    for k in kinds:
        put(gates[k], ALL); m = measure_gates(model, held)
        table[str(k)] = {'answers': m['gate_accuracy'], 'tasks': sum(m[f'gate_accuracy/{n}'] for n in N) / len(N), 'all': m['gate_accuracy_all'], 'lm_loss': m['lm_loss'], 'by_task': {n: m[f'gate_accuracy/{n}'] for n in N}}
        log('steps', k, {x: round(v, 4) for x, v in table[str(k)].items() if x != 'by_task'})
        write(OUT / 'held_out.json', table)
    best = max(kinds, key=lambda k: table[str(k)]['answers'] if k[1] >= .25 else 0)
    log('chosen', best)
    write(OUT / 'chosen.json', {'steps': best[0], 'weight of the base route': best[1]})
    names = {}

    def save(tag, g, members): save_file({p: t.contiguous() for p, t in g.items()}, OUT / 'gates' / f'.{tag}.part'); os.replace(OUT / 'gates' / f'.{tag}.part', OUT / 'gates' / f'{tag}.safetensors'); write(OUT / 'gates' / f'{tag}.json', members)
    save('routed', gates[best], ALL); save('ridge', gates[0, 1.0], ALL)
    began = time.time(); sets = {tag: {} for tag in subsets if tag != 'all'}
    if ten: sets['self'] = {}
    for key, members in groups.items():
        parts = {n: load(statistics[n], key) for n in ALL}
        own = {n: load(self_st[n], key) for n in ten}
        for tag in sets:
            some = [own.get(n, parts[n]) for n in [*ten, NO_ADAPTER]] if tag == 'self' else [parts[n] for n in subsets[tag]]
            g = solve(some, [best], tag != 'plain')[best]
            for p in members: sets[tag][p] = g
    for tag, g in sets.items(): save(tag, g, [*ten, NO_ADAPTER] if tag == 'self' else subsets[tag])
    log(len(sets), 'other sets', f'{time.time() - began:.1f} s')
    for tag in ('ten', 'self'):
        if tag in sets:
            put(sets[tag], json.loads((OUT / 'gates' / f'{tag}.json').read_text())); few = [h if n in TEN else [] for n, h in zip(ALL, held.rows)]
            from dataclasses import replace
            m = measure_gates(model, replace(held, rows=few)); table[tag] = {'answers': m['gate_accuracy'], 'lm_loss': m['lm_loss']}
    # the library's function on the CPU, from the same statistics
    some = list(groups)[:: max(1, len(groups) // 4)][:3]
    began = time.time()
    once = dict(closed_form_gates([statistics[n] for n in ALL], some)); timing['solve, s for each input, CPU'] = (time.time() - began) / len(some)
    table['gpu_against_cpu'] = max(float((once[p] - gates[0, 1.0][p]).norm() / once[p].norm()) for p in some)
    table['timing'] = timing; write(OUT / 'held_out.json', table); log('done', table.get('gpu_against_cpu'), timing)

elif a.stage in ('score', 'general'):
    while not (OUT / 'gates' / 'plain.safetensors').exists():
        if late(): sys.exit()
        time.sleep(1)
    tok, model = load_tokenizer(ref), model_of()
    bank = with_adapter(bank_of(N), base_route()); ALL = list(bank.names)
    attach(model, bank, top_k=2, init='zeros'); state = model.meteora; mods = dict(meteora_layers(model))
    pad = how_of(tok, model).pad_token

    def use(tag):
        g = load_file(OUT / 'gates' / f'{tag}.safetensors'); names = json.loads((OUT / 'gates' / f'{tag}.json').read_text())
        with torch.no_grad():
            for p, l in mods.items():
                full = torch.zeros(len(ALL), g[p].shape[1])
                for row, n in enumerate(ALL):
                    if n in names: full[row] = g[p][names.index(n)]
                l.gate.copy_(full.to(l.gate.dtype))
        state.mute([n for n in ALL if n not in names])

    if a.stage == 'score':
        (OUT / 'scores').mkdir(exist_ok=True)
        options = EvalOptions(limit=a.rows, max_new_tokens=a.new_tokens, routing_temperature=1.0)
        for config in a.configs.split(','):
            for n in mine(sorted(N, key=lambda n: (TASKS[n].max_new_tokens, n))):
                file = OUT / 'scores' / f'{config}.{n}.json'
                if file.exists() or late() or (config in ('ten', 'self') and n not in TEN): continue
                tag = {'missing': f'without.{n}'}.get(config, config)
                if tag not in ('own', 'base') and not (OUT / 'gates' / f'{tag}.safetensors').exists(): continue
                began = time.time()
                try:
                    if tag == 'own':
                        with state.force(ALL.index(n)): r = evaluate_task(model, tok, n, a.data, options)
                    elif tag == 'base':
                        with state.disabled(): r = evaluate_task(model, tok, n, a.data, options)
                    else:
                        use(tag); r = evaluate_task(model, tok, n, a.data, options); state.mute([])
                except Exception as error: log(config, n, 'failed', repr(error)[:300]); continue
                write(file, {'metrics': r.scores.metrics, 'stderr': r.scores.stderr, 'rows': len(r.samples), 'new_tokens': r.new_tokens, 'answers': [s.response for s in r.samples]})
                log(config, n, {k: round(v, 4) for k, v in r.scores.metrics.items()}, f'{time.time() - began:.1f} s')
    else:
        (OUT / 'text').mkdir(exist_ok=True)
        items = [json.loads(l) for l in open(a.general)]
        sets = {}
        for i in items:
            row = Row('', i['text']) if 'text' in i else Row(INST.around(i['question']), i['answer'])
            sets.setdefault(i['kind'], []).append(row)
        sets = {k: list(encode_rows(v, tok, 0, 384, None).rows) for k, v in sets.items()}
        for n in N: sets[f'task.{n}'] = list(encode_rows(rows_of(n)[1], tok, 0, 384, None).rows)[:12]

        @torch.no_grad()
        def measure(rows, record):
            rows = sorted(rows, key=len); s = torch.zeros(2, 2, dtype=torch.float64); shares = []
            for k in range(0, len(rows), 8):
                if late(): break
                b = collate(rows[k : k + 8], pad).to(DEV)
                recorder = Routes(state.names) if record else None
                if recorder is None: logits = model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False).logits
                else:
                    with state.record(recorder): logits = model(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False).logits
                    keep = b.gate_labels >= 0; base = torch.zeros(b.input_ids.shape, device=DEV)
                    for p in recorder.paths:
                        d = recorder.steps(p)[0]; base += ((d.indices == len(N)) * d.weights).sum(-1)
                    base /= len(recorder.paths)
                    shares += ((base * keep).sum(1) / keep.sum(1)).tolist()
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), b.input_ids[:, 1:], reduction='none')
                for which, keep in enumerate((b.gate_labels[:, 1:] >= 0, (b.gate_labels[:, 1:] >= 0) & b.response[:, 1:])):
                    s[which] += torch.tensor([(loss * keep).sum().item(), keep.sum().item()], dtype=torch.float64)
            return {'all': (s[0, 0] / s[0, 1]).item(), 'answers': (s[1, 0] / s[1, 1]).item(), 'tokens': s[0, 1].item(), 'rows': len(rows), 'base_share': shares}
        for config in ('base', 'routed', 'plain', 'ridge'):
            if config != 'base': use(config)
            for name in mine(list(sets)):
                file = OUT / 'text' / f'{config}.{name}.json'
                if file.exists() or late(): continue
                if config == 'base':
                    with state.disabled(): r = measure(sets[name], False)
                else: r = measure(sets[name], config != 'plain')
                write(file, r); log(config, name, {k: round(v, 4) for k, v in r.items() if k != 'base_share'})

elif a.stage == 'report':
    def mean(v): return sum(v) / len(v) if v else float('nan')
    scores = {}
    for f in (OUT / 'scores').glob('*.json'):
        config, n = f.stem.split('.', 1); d = json.loads(f.read_text()); m = d['metrics']
        key = 'accuracy' if 'accuracy' in m else 'rougeL' if 'rougeL' in m else 'bleu'
        scores.setdefault(config, {})[n] = m[key] / (100 if key == 'bleu' else 1)
    for config, s in scores.items(): print(config, len(s), 'tasks', f'mean {mean(list(s.values())):.4f}')
    for x, y in (('routed', 'own'), ('ridge', 'own'), ('plain', 'own'), ('routed', 'plain'), ('missing', 'base'), ('self', 'ten'), ('ten', 'own')):
        both = sorted(set(scores.get(x, {})) & set(scores.get(y, {})))
        if both: print(f'{x} / {y}: {mean([scores[x][n] for n in both]):.4f} / {mean([scores[y][n] for n in both]):.4f} = {mean([scores[x][n] for n in both]) / max(1e-9, mean([scores[y][n] for n in both])):.4f} on {len(both)} tasks')
    text = {}
    for f in (OUT / 'text').glob('*.json') if (OUT / 'text').exists() else []:
        config, n = f.stem.split('.', 1); text.setdefault(config, {})[n] = json.loads(f.read_text())
    for config in ('routed', 'plain', 'ridge'):
        for n in sorted(text.get(config, {})):
            if not n.startswith('task.') and n in text['base']: print('perplexity over the base', config, n, *(f"{k} {math.exp(text[config][n][k] - text['base'][n][k]):.4f}" for k in ('all', 'answers')), int(text['base'][n]['rows']), 'rows')
    for config in ('routed', 'ridge'):
        tasks = [x for n, d in text.get(config, {}).items() if n.startswith('task.') for x in d['base_share']]
        for n, d in text.get(config, {}).items():
            if not n.startswith('task.') and tasks:
                p, q = torch.tensor(d['base_share']), torch.tensor(tasks)
                print('AUROC', config, n, round(((p[:, None] > q).float() + .5 * (p[:, None] == q).float()).mean().item(), 4), 'base share', round(mean(d['base_share']), 3), 'tasks', round(mean(tasks), 3))
    if (OUT / 'held_out.json').exists():
        for k, v in json.loads((OUT / 'held_out.json').read_text()).items(): print('held-out', k, {x: y for x, y in v.items() if x != 'by_task'} if isinstance(v, dict) else v)

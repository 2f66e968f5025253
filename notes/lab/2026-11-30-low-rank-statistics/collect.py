"""Saves layer inputs of ten tasks, of general text and of other tasks to work/x, for variants.py. work/ holds the datasets, general_text.jsonl and texts."""
import json, gzip, random, re, sys, tarfile, time
from pathlib import Path
import torch
from meteora_core import load_checkpoint
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.data.rows import read_rows
from meteora_core.data.frames import INST
from meteora_core.training.encoding import encode_rows, collate
from meteora_core.data.rows import Row
from meteora_core.training.ridge import filled_labels
torch.set_num_threads(1)
OUT=Path('work/x'); D=Path('work/datasets')
tok=load_tokenizer(BaseReference('smollm2-135m'))
model=load_checkpoint('meteora_core/starter/checkpoint', dtype='float32'); state=model.meteora
names=list(state.names); print(names, INST.text)
others=sorted(p.name for p in D.iterdir() if p.name not in names and p.is_dir())
LAYERS=[1,4,7,10,13,16,19,22,25,28]
mods={}
for path,l in meteora_layers(model):
    m=re.match(r'model.layers.(\d+).(self_attn.q_proj|self_attn.o_proj|mlp.gate_proj|mlp.down_proj)$',path)
    if m and int(m[1]) in LAYERS: mods[path]=l
buf={}
def hook(path):
    def f(mod,args): buf[path]=args[0].reshape(-1,args[0].shape[-1])
    return f
hs=[l.register_forward_pre_hook(hook(p)) for p,l in mods.items()]
pad=tok.pad_token_id
def limit(rows,tokens):
    out,n=[],0
    for r in rows:
        if n>=tokens: break
        out.append(r); n+=len(r.tokens)
    return out
@torch.no_grad()
def run(name,rows,force):
    rows=sorted(rows,key=len); acts={p:[] for p in mods}; resp=[];rowid=[]
    for s in range(0,len(rows),8):
        b=collate(rows[s:s+8],pad); keep=(b.gate_labels.reshape(-1)!=-100)
        ctx=state.disabled() if force is None else state.force(force)
        with ctx: model.model(input_ids=b.input_ids,attention_mask=b.attention_mask,use_cache=False)
        for p in mods: acts[p].append(buf[p][keep].half())
        resp.append(b.response.reshape(-1)[keep]); rowid.append(torch.arange(len(b.input_ids))[:,None].expand_as(b.input_ids).reshape(-1)[keep]+s)
    d={p:torch.cat(a) for p,a in acts.items()}; d['resp']=torch.cat(resp); d['row']=torch.cat(rowid)
    torch.save(d,OUT/f'{name}.pt'); print(name,len(rows),len(d['resp']),int(d['resp'].sum()),flush=True)
def enc(rows,ml=256): return list(encode_rows(rows,tok,0,ml,None).rows)
def gen_rows(items):
    out=[]
    for r in items:
        if 'text' in r: out.append(Row('',r['text']))
        else: out.append(Row(INST.text.replace('{}',r['question'])+'\n' if not INST.text.endswith('\n') else INST.text.replace('{}',r['question']),r['answer']))
    return out
print(repr(read_rows(D,'strategyqa','train',3)[0].prompt[-40:]), repr(INST.text))
t=time.time()
for i,n in enumerate(names):
    rows=read_rows(D,n,'train',700); random.Random(42).shuffle(rows)
    e=enc(rows); run(f'train.{n}',limit(e,1000),i); run(f'held.{n}',limit(e[::-1],350),i); run(f'missing.{n}',limit(e[::-1],150),None)
run('train.general',enc(gen_rows([json.loads(l) for l in open('work/general_text.jsonl')])),None)
for n in others:
    rows=read_rows(D,n,'test',100); random.Random(1).shuffle(rows); run(f'other.{n}',limit(enc(rows),120),None)
# general held-out
x=Path('work/deb/x'); texts=[]
for f in (x/'usr/share/games/fortunes').rglob('*'):
    if f.is_file() and f.suffix=='' and f.name in ('art','computers','education','food','humorists','kids','law','literature','science','wisdom','work','definitions','people','platitudes','pets','sports','politics'):
        texts+=[s.strip() for s in f.read_text(errors='replace').split('\n%\n') if 80<len(s)<600]
for f in (x/'usr/share/doc/debian/FAQ/debian-faq.en.txt.gz', x/'usr/share/developers-reference/developers-reference.txt.gz'):
    texts+=[s.strip() for s in gzip.open(f,'rt',errors='replace').read().split('\n\n') if 150<len(s)<800]
random.Random(3).shuffle(texts); print(len(texts))
json.dump(texts,open('work/eval_texts.json','w'))
run('gtext',enc([Row('',s) for s in texts[:16]]),None)
# BIG-bench tasks that are none of the 28, in the frame
from meteora_core.data.tasks import TASKS
skip=set(TASKS); qs=[]
tar=tarfile.open(Path.home()/'.cache/meteora/downloads/bigbench-1.0.0.tar.gz')
for m in tar:
    g=re.match(r'[^/]+/bigbench/benchmark_tasks/([^/]+)/task\.json',m.name)
    if g and g[1] not in skip:
        try: j=json.load(tar.extractfile(m))
        except Exception: continue
        ex=[e for e in j.get('examples',[]) if isinstance(e.get('input'),str) and 20<len(e['input'])<500]
        for e in random.Random(5).sample(ex,min(3,len(ex))):
            tgt=e.get('target') or (max(e['target_scores'],key=e['target_scores'].get) if e.get('target_scores') else None)
            tgt=tgt[0] if isinstance(tgt,list) and tgt else tgt
            if isinstance(tgt,str): qs.append((g[1],e['input'],tgt))
random.Random(6).shuffle(qs); print(len(qs)); json.dump(qs,open('work/eval_questions.json','w'))
frame=INST.text
run('gquest',enc([Row(frame.replace('{}',q)+'\n',a) for _,q,a in qs[:24]]),None)
print(time.time()-t)

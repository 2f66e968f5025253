"""Loss and gate accuracy with gates from stored statistics; work/ holds adapters, datasets, statistics (st) and texts."""
import json, sys, time, math, random
from pathlib import Path
import torch
torch.set_num_threads(1)
from meteora_core.checkpoints.gate_statistics import GateStatistics
from meteora_core import load_checkpoint, AdapterBank, attach
from meteora_core.adapters.base_route import base_route
from meteora_core.adapters.joining import with_adapter
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.data.rows import read_rows, Row
from meteora_core.data.frames import INST
from meteora_core.training.encoding import encode_rows, collate
from meteora_core.training.statistics import closed_form_gates
from meteora_core.training.task_rows import split_held_out
import meteora_kernels.reference as ref
N=sorted(p.name for p in Path('work/adapters').iterdir())
st={f.name.split('.')[0]:GateStatistics(f) for f in Path('work/st').iterdir()}
tok=load_tokenizer(BaseReference('smollm2-135m')); model=load_base(BaseReference('smollm2-135m'))
bank=with_adapter(AdapterBank.from_peft({n:f'work/adapters/{n}' for n in N}),base_route())
attach(model,bank,top_k=2,init='zeros',backend='reference'); state=model.meteora; layers=dict(meteora_layers(model)); B=len(N)
def gates(names):
    f=Path('work')/f'g{len(names)}.pt'
    if f.exists(): return torch.load(f)
    g=dict(closed_form_gates([st[n] for n in names],list(layers))); torch.save(g,f); return g
t=time.time(); g1=gates([*N,'no_adapter']); print('solve',time.time()-t,flush=True); g0=gates(N)
def put(g):
    with torch.no_grad():
        for p,l in layers.items():
            x=g[p]; x=x if len(x)==B+1 else torch.cat([x,torch.zeros(1,x.shape[1])]); l.gate.copy_(x)
texts=json.load(open('work/eval_texts.json'))[100:130]; qs=json.load(open('work/eval_questions.json'))[100:130]
enc=lambda rows,i=0: sorted(encode_rows(rows,tok,i,256,None).rows,key=len)
sets={'text':enc([Row('',s) for s in texts]),'quest':enc([Row(INST.around(q),a) for _,q,a in qs])}
sets['tasks']=[]
for i,n in enumerate(N):
    _,h=split_held_out(read_rows('work/datasets',n,'train',None),42); sets['tasks']+=enc([r for r in h if len(r.prompt)<1200][:3],i)
def ce(rows,answers,own=False):
    s=c=0
    for k in range(0,len(rows),6):
        b=collate(rows[k:k+6],tok.pad_token_id); 
        import contextlib
        ctx=state.force(torch.where(b.gate_labels<0,0,b.gate_labels)) if own else contextlib.nullcontext()
        with torch.no_grad(), ctx: lg=model(input_ids=b.input_ids,attention_mask=b.attention_mask).logits
        tgt=b.input_ids[:,1:]; keep=(b.gate_labels[:,1:]>=0)
        if answers: keep=keep&b.response[:,1:]
        l=torch.nn.functional.cross_entropy(lg[:,:-1].transpose(1,2),tgt,reduction='none'); s+=l[keep].sum().item(); c+=keep.sum().item()
    return s/c
def line(tag):
    print(tag,f"text {ce(sets['text'],False):.4f} quest all {ce(sets['quest'],False):.4f} quest answers {ce(sets['quest'],True):.4f} tasks answers {ce(sets['tasks'],True):.4f}",flush=True)
with state.disabled(): line('base')
print('own',ce(sets['tasks'],True,own=True),flush=True)
put(g0); state.mute(['no_adapter']); line('without'); state.mute([])
put(g1); line('with')
orig=ref.route
def strict(logits,k,T=1.0,allowed=None):
    i,w=orig(logits,k,T,allowed); first=(i[...,:1]==B); z=torch.zeros_like(w); z[...,0]=1
    return i,torch.where(first,z,w)
ref.route=strict; line('strict'); ref.route=orig
state.top_k=1; line('top1')
import meteora_core.training.ridge as R
import meteora_core.training.statistics as S
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.task_rows import HeldOut
rows=[]
for i,n in enumerate(N):
    _,h=split_held_out(read_rows('work/datasets',n,'train',None),42)
    rows.append(list(encode_rows([r for r in h if len(r.prompt)<1200][3:7],tok,i,512,None).rows))
held=HeldOut([*rows,[]],[*N,'no_adapter'],tok.pad_token_id,8,response_only=True)
for sh in (1e-2,3e-2,1e-1):
    R.SHRINK=sh
    g=dict(closed_form_gates([st[n] for n in [*N,'no_adapter']],list(layers))) if sh!=1e-2 else g1
    put(g); m=measure_gates(model,held)
    print(sh,{k:round(m[k],4) for k in ('gate_accuracy','gate_accuracy_all','lm_loss')},'mean over tasks',sum(m[f'gate_accuracy/{n}'] for n in N)/10,{k:round(v,3) for k,v in m.items() if k.startswith('gate_accuracy/') and k[14:] in ('q_proj','down_proj','o_proj','gate_proj')},flush=True)
g=dict(closed_form_gates([st[n] for n in N],list(layers)))
R.SHRINK=3e-2; put(g); state.mute(['no_adapter']); m=measure_gates(model,held); print('no base route',.1,{k:round(m[k],4) for k in ('gate_accuracy','gate_accuracy_all','lm_loss')},flush=True)
from meteora_core.model.attach import detach
from meteora_core.training.statistics import Collecting, collect_statistics, ridge_rows
from meteora_core.checkpoints.gate_statistics import Recipe, unpacked
from meteora_core.data.frames import INST as I2
paths_=list(layers)
detach(model)
how=Collecting(BaseReference('smollm2-135m'),tok.pad_token_id,Recipe(answer_share=.8,frame=I2.text),2000,8,512,42,'float32','auto')
Path('work/stb').mkdir(exist_ok=True); stb={}
for n in N:
    f=Path(f'work/stb/{n}.safetensors')
    if not f.exists():
        tr,_=split_held_out(read_rows('work/datasets',n,'train',None),42)
        collect_statistics(model,base_route(),list(encode_rows(tr,tok,0,512,None).rows),f,how,layers=paths_)
    stb[n]=GateStatistics(f); print(n,stb[n].header.tokens,st[n].header.tokens,flush=True)
attach(model,bank,top_k=2,init='zeros',backend='auto'); state=model.meteora; layers=dict(meteora_layers(model))
def solve(layer,mix):
    means=[];tot=0
    for n in [*N,'no_adapter']:
        a=st[n]; 
        if n=='no_adapter' or mix==0: means.append(a.mean(layer)); tot=tot+a.packed(layer)
        else: b=stb[n]; means.append((1-mix)*a.mean(layer)+mix*b.mean(layer)); tot=tot+(1-mix)*a.packed(layer)+mix*b.packed(layer)
    return ridge_rows(unpacked(tot),torch.stack(means)).float()*8
def gates_mix(mix):
    g={};c={}
    for p in paths_:
        k=st[N[0]].input_of(p)
        if k not in c: c[k]=solve(p,mix)
        g[p]=c[k]
    return g
for mix in (.5,.25):
    g=gates_mix(mix); torch.save(g,f'work/gmix{mix}.pt'); put(g); m=measure_gates(model,held)
    print('mix',mix,{k:round(m[k],4) for k in ('gate_accuracy','gate_accuracy_all','lm_loss')},'mean over tasks',sum(m[f'gate_accuracy/{n}'] for n in N)/10,flush=True)
    print('tasks answers', ce(sets['tasks'],True), 'text',ce(sets['text'],False),'quest',ce(sets['quest'],True),flush=True)

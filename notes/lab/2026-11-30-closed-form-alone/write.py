"""Lets each adapter of the starter checkpoint write rows, and saves their layer inputs to work/x."""
import json, re, random, time
from pathlib import Path
import torch
torch.set_num_threads(1); torch.manual_seed(0)
from meteora_core import load_checkpoint
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_tokenizer
from meteora_core.training.encoding import TrainRow, collate
OUT=Path('work/x')
tok=load_tokenizer(BaseReference('smollm2-135m')); tok.padding_side='left'
model=load_checkpoint('meteora_core/starter/checkpoint', dtype='float32'); state=model.meteora; names=list(state.names)
LAYERS=[4,10,16,25]; mods={}
for path,l in meteora_layers(model):
    m=re.match(r'model.layers.(\d+).(self_attn.q_proj|self_attn.o_proj|mlp.gate_proj|mlp.down_proj)$',path)
    if m and int(m[1]) in LAYERS: mods[path]=l
gq=[json.loads(l) for l in open('work/general_text.jsonl')]; gq=[g['question'] for g in gq if 'question' in g][:20]
END='[/INST]\n'; endids=tok.encode(END,add_special_tokens=False)
bos=[tok.bos_token_id] if tok.bos_token_id is not None and tok('a').input_ids[0]==tok.bos_token_id else []
def gen(prompts,i,n,stop=None):
    enc=tok(prompts,return_tensors='pt',padding=True)
    with torch.no_grad(), state.force(i):
        out=model.generate(**enc,max_new_tokens=n,do_sample=True,temperature=1.0,top_k=0,pad_token_id=tok.pad_token_id,stop_strings=None)
    return [tok.decode(o[enc.input_ids.shape[1]:],skip_special_tokens=True) for o in out]
def rows_for(i):
    # 1: prompts written from the opening of the frame; cut at the closing
    w=gen(['[INST]']*20,i,72)
    p1=['[INST]'+t.split('[/INST]')[0].rstrip()+' '+END for t in w]
    a1=gen(p1,i,24)
    p2=['[INST] '+q+' '+END for q in gq]; a2=gen(p2,i,24)
    return list(zip(p1,a1)),list(zip(p2,a2))
def collect(name,pairs,i):
    rows=[]
    for p,a in pairs:
        P=tok(p).input_ids; A=tok(a,add_special_tokens=False).input_ids+[tok.eos_token_id]
        rows.append(TrainRow(tuple(P+A),(0,)*(len(P)+len(A)),len(P)))
    rows.sort(key=len); buf={}
    hs=[l.register_forward_pre_hook(lambda m,a,p=p: buf.__setitem__(p,a[0].reshape(-1,a[0].shape[-1]))) for p,l in mods.items()]
    acts={p:[] for p in mods}; resp=[]; rid=[]
    for s in range(0,len(rows),10):
        b=collate(rows[s:s+10],tok.pad_token_id); keep=b.gate_labels.reshape(-1)!=-100
        with torch.no_grad(), state.force(i): model.model(input_ids=b.input_ids,attention_mask=b.attention_mask,use_cache=False)
        for p in mods: acts[p].append(buf[p][keep].half())
        resp.append(b.response.reshape(-1)[keep]); rid.append(torch.arange(len(b.input_ids))[:,None].expand_as(b.input_ids).reshape(-1)[keep]+s)
    for h in hs: h.remove()
    d={p:torch.cat(a) for p,a in acts.items()}; d['resp']=torch.cat(resp); d['row']=torch.cat(rid); torch.save(d,OUT/f'{name}.pt')
for i,n in enumerate(names):
    t=time.time(); s1,s2=rows_for(i)
    print(n,'|',repr(s1[0]),'|',repr(s1[1]),'|',repr(s2[0]),f'{time.time()-t:.0f}s',flush=True)
    json.dump([s1,s2],open(OUT/f'self.{n}.json','w'))
    collect('selfA.'+n,s1,i); collect('selfB.'+n,s2,i)

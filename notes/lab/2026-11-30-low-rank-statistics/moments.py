"""Moments of saved layer inputs in work/x, gates in closed form from them, and top-1 shares on held-out rows."""
import torch, sys, time
from pathlib import Path
torch.set_num_threads(1)
X=Path('work/x'); N=['logical_deduction','question_selection','abstract_narrative_understanding','goal_step_wikihow','winowhy','strategyqa','disfl_qa','news_commentary_de','alpaca','linguistics_puzzles']
L=[1,4,7,10,13,16,19,22,25,28]; K=[('self_attn.q_proj',3),('self_attn.o_proj',1),('mlp.gate_proj',2),('mlp.down_proj',1)]
_c={}
def D(n):
    if n not in _c: _c[n]=torch.load(X/f'{n}.pt')
    return _c[n]
def paths(layers=L,kinds=K): return [(f'model.layers.{l}.{k}',w) for l in layers for k,w in kinds]
def weights(d,share):
    r=d['resp']; n=len(r); w=torch.full((n,),1.0/n)
    if share is not None and r.any() and not r.all(): w=torch.where(r,share/r.sum(),(1-share)/(~r).sum())
    return w
def stats(n,p,share=.8,f=None):
    d=D(n); x=d[p].float(); x=f(x) if f else x
    w=weights(d,share); return (x*w[:,None]).t()@x, (w[:,None]*x).sum(0)
def solve(S,M,shrink=1e-2,cw=None):
    # S: sum (h,h); M (N,h) means ; cw class weights
    S=S.double().clone(); M=M.double(); 
    T=M-M.sum(0,keepdim=True)/len(M) if cw is None else cw[:,None]*M-cw[:,None]/cw.sum()*(cw[:,None]*M).sum(0,keepdim=True)
    S.diagonal().add_(shrink*S.diagonal().mean())
    f,bad=torch.linalg.cholesky_ex(S)
    return (torch.cholesky_solve(T.t(),f).t() if not bad else torch.linalg.solve(S,T.t()).t()).float()*8
def acc(G,p,names,f=None,which='resp'):
    hit=tot=0; per=[]
    for i,n in enumerate(names):
        d=D('held.'+n); x=d[p].float(); m=d['resp'] if which=='resp' else torch.ones_like(d['resp'])
        x=x[m]; x=f(x) if f else x
        h=((x@G.t()).argmax(1)==i).float(); per.append(h.mean().item()); hit+=h.sum().item(); tot+=len(h)
    return hit/tot, sum(per)/len(per)
def table(name,fn,P):
    tot=[0,0,0];ws=0
    for p,w in P:
        a=fn(p); 
        for i in range(len(a)): tot[i]+=w*a[i]
        ws+=w
    print(name,' '.join(f'{t/ws:.4f}' for t in tot),flush=True)
P=paths([4,13,22,28])
cache={}
def st(n,p,share=.8):
    k=(n,p,share)
    if k not in cache: cache[k]=stats(n,p,share)
    return cache[k]
def base(shrink=1e-2,share=.8,names=N,gen=False,cw=None):
    def fn(p):
        ss=[st('train.'+n,p,share) for n in names]+([st('train.general',p,share)] if gen else [])
        G=solve(sum(s for s,_ in ss),torch.stack([m for _,m in ss]),shrink,cw)
        return (*acc(G,p,names),acc(G,p,names,which='all')[0])
    return fn
P=paths([4,10,16,25])

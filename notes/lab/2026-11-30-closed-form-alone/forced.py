"""Variants of closed-form gates from saved layer inputs in work/x."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-30-low-rank-statistics"))
from moments import *  # noqa: E402, F403
def wstats(n,p,share,power,frac=1.0,last=None):
    d=D(n); x=d[p].float(); w=weights(d,share)
    if frac<1:
        keep=d['row']<max(1,int((d['row'].max()+1)*frac)); x=x[keep]; w=w[keep]; w=w/w.sum()
    if power:
        nn=x.norm(dim=1).clamp(min=1e-6); 
        w2=w*(nn/nn.mean())**(-power); 
    else: w2=w
    return (x*w2[:,None]).t()@x,(x*w2[:,None]).sum(0)
# power 2 on second moments and means: minimises sum w/|x|^2 (y - gx)^2 ; target for normalised regression: y*|x| ~ so use mean weight power 1 with S power 2
def var(shrink,power,mp=None,share=.8,frac=1.0):
    def fn(p):
        S=0;M=[]
        for n in N:
            d=D('train.'+n)
            s,_=wstats('train.'+n,p,share,power,frac); _,m=wstats('train.'+n,p,share,power if mp is None else mp,frac); S=S+s; M.append(m)
        G=solve(S,torch.stack(M),shrink); return (*acc(G,p,N),acc(G,p,N,which='all')[0])
    return fn
def bykind(tag,fn):
    out=[]
    for k,_ in K:
        r=[fn(f'model.layers.{l}.{k}') for l in (4,10,16,25)]; out.append(tuple(sum(x[i] for x in r)/4 for i in (0,1,2)))
    W=[3,1,2,1]; tot=[sum(w*o[i] for w,o in zip(W,out))/7 for i in range(3)]
    print(tag,'total',' '.join(f'{t:.4f}' for t in tot),'| answers q,o,gate,down',' '.join(f'{o[0]:.3f}' for o in out),flush=True)
import sys
from meteora_core import AdapterBank
bank=AdapterBank.from_peft({n:f'work/adapters/{n}' for n in N})
def weights_only(kind):
    def fn(p):
        st_=bank.modules[p]; o=0; V=[];Sg=[]
        for r in st_.ranks:
            A=st_.A[o:o+r].float(); B=st_.B[o:o+r].float(); o+=r
            q,rr=torch.linalg.qr(A.t()); U,s,Vh=torch.linalg.svd(torch.linalg.qr(B.t()).R@rr.t()); V.append(Vh@q.t()); Sg.append(s)
        res=[]
        for which in ('resp','all'):
            hit=tot=0;per=[]
            for i,n in enumerate(N):
                d=D('held.'+n); x=d[p].float(); x=x[d['resp']] if which=='resp' else x
                if kind=='arrow': sc=torch.stack([(x@v[0]).abs() for v in V],1)
                if kind=='arrow signed': sc=torch.stack([x@(v[0]*torch.sign(v[0][v[0].abs().argmax()])) for v in V],1)
                if kind=='spectr': sc=torch.stack([((x@v.t())*s).norm(dim=1) for v,s in zip(V,Sg)],1)
                h=(sc.argmax(1)==i).float(); hit+=h.sum().item(); tot+=len(h); per.append(h.mean().item())
            res.append((hit/tot,sum(per)/len(per)))
        return res[0][0],res[0][1],res[1][0]
    return fn
for k in ('arrow','arrow signed','spectr'): bykind(k,weights_only(k))
P=paths([4,10,16,22,28])
OTH=sorted(f.stem for f in X.glob('other.*.pt'))
def auroc(pos,neg):
    pos,neg=torch.tensor(pos),torch.tensor(neg); return ((pos[:,None]>neg).float()+.5*(pos[:,None]==neg).float()).mean().item()
def rows_share(name,Gs,soft=True):
    """mean base weight per row over layers & tokens; (all, answers)"""
    d=D(name); tot=0
    for (p,w) in P:
        lg=d[p].float()@Gs[p].t(); v,i=lg.topk(2,-1); ws=v.softmax(-1); b=Gs[p].shape[0]-1
        tot=tot+w*((i==b)*ws).sum(-1)
    tot/=sum(w for _,w in P)
    r=d['row']; n=r.max()+1
    rr=torch.zeros(n).index_add_(0,r,tot)/torch.bincount(r)
    ans=d['resp']; ra=torch.zeros(n).index_add_(0,r[ans],tot[ans])/torch.bincount(r[ans],minlength=n).clamp(min=1)
    return rr.tolist(), ra.tolist()
def report(tag,cwb=1.0,shrink=1e-2,gen='train.general',share=.8):
    cw=torch.ones(len(N)+1).double(); cw[-1]=cwb
    Gs={}; a0=a1=0; W=0
    for p,w in P:
        ss=[st('train.'+n,p) for n in N]; g=st(gen,p,share)
        G0=solve(sum(s for s,_ in ss),torch.stack([m for _,m in ss]),shrink)
        G=solve(sum(s for s,_ in ss)+cwb*g[0],torch.stack([m for _,m in ss]+[g[1]]),shrink,cw)
        Gs[p]=G; a0+=w*acc(G0,p,N)[0]; a1+=w*acc(G,p,N)[0]; W+=w
    task=[rows_share('held.'+n,Gs) for n in N]; gen_=[rows_share(n,Gs) for n in ('gtext','gquest')]
    oth=[rows_share(n,Gs) for n in OTH]
    f=lambda L,k: sum((x[k] for x in L),[])
    m=lambda v: sum(v)/len(v)
    print(f'{tag}: top1 {a0/W:.4f}->{a1/W:.4f} share task {m(f(task,0)):.3f} text {m(gen_[0][0]):.3f} quest {m(gen_[1][0]):.3f} other {m(f(oth,0)):.3f} (answers {m(f(task,1)):.3f} {m(gen_[1][1]):.3f} {m(f(oth,1)):.3f}) AUROC gen {auroc(f(gen_,0),f(task,0)):.3f} quest {auroc(gen_[1][0],f(task,0)):.3f} other {auroc(f(oth,0),f(task,0)):.3f}',flush=True)
    return Gs
def missing(tag,cwb=1.0,shrink=1e-2):
    # drop each adapter; share of base on its rows run with base
    out=[]
    for k,n in enumerate(N):
        names=[x for x in N if x!=n]; Gs={}; cw=torch.ones(len(names)+1).double(); cw[-1]=cwb
        for p,w in P:
            ss=[st('train.'+x,p) for x in names]; g=st('train.general',p)
            Gs[p]=solve(sum(s for s,_ in ss)+cwb*g[0],torch.stack([m for _,m in ss]+[g[1]]),shrink,cw)
        a,b=rows_share('missing.'+n,Gs); out.append((sum(a)/len(a),sum(b)/len(b)))
    print(tag,'missing share all/answers',[f'{a:.2f}/{b:.2f}' for a,b in out],flush=True)
if __name__=='__main__':
    report('plain'); report('share none',share=None); report('share .5',share=.5)
    for c in (.5,2,4,8): report(f'class weight {c}',c)
    report('shrink .1',1,.1); report('shrink .1 cw 2',2,.1)
    missing('plain')
def solve2(S,M,shrink=1e-2,cw=None):
    S=S.double().clone(); M=M.double()
    if cw is not None: M=cw[:,None]*M
    T=M-M.sum(0,keepdim=True)/len(M)
    S.diagonal().add_(shrink*S.diagonal().mean())
    f,bad=torch.linalg.cholesky_ex(S); return torch.cholesky_solve(T.t(),f).t().float()*8
solve=solve2
for c in (2,4,8): report(f'fixed targets, class weight {c}',c)
DEL=1.0
def solve3(S,M,shrink=1e-2,cw=None):
    G=solve2(S,M,shrink,None)
    if cw is not None: G[-1]*=DEL
    return G
solve=solve3
for DEL in (1.25,1.5,2.0,3.0): report(f'factor {DEL}',1)
DEL=1.5; missing('factor 1.5')
import glob
N[:]=[n for n in N if (X/f'selfB.{n}.pt').exists()]
print(N)
def ss(kind,shrink=1e-2,share=.8):
    def fn(p):
        S=0;M=[]
        for n in N:
            parts={'A':['selfA.'],'B':['selfB.'],'AB':['selfA.','selfB.'],'real':['train.']}[kind]
            s=m=0
            for q in parts:
                a,b=stats(q+n,p,share); s=s+a/len(parts); m=m+b/len(parts)
            S=S+s; M.append(m)
        G=solve(S,torch.stack(M),shrink); return (*acc(G,p,N),acc(G,p,N,which='all')[0])
    return fn
for k in ('real','A','B','AB'): bykind(k,ss(k))
bykind('AB .1',ss('AB',.1)); bykind('A share none',ss('A',share=None))

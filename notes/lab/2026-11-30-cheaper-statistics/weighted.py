"""Weights of the adapters in the ridge regression, from the layer inputs of offline.py in work/x."""
import sys; sys.argv=['x','none','work/x']
exec(open('notes/lab/2026-11-30-cheaper-statistics/offline.py').read().split("CACHE = {}")[0])
load(); LAYERS[:]=[9,21]; CACHE={}
ans=[]
for n in N:
    d=D[f'own.{n}']; ans.append(d['resp'].float().mean().item())
rows=[8,5,5,5,5,5,6,15,7,5]
apr=torch.tensor([D[f'own.{n}']['resp'].sum().item()/r for n,r in zip(N,rows)]); apr=torch.cat([apr,apr.mean()[None]]).double()
print(apr)
def cwr(power,base=1.0,shrink=1e-2,two=False):
    def fn(p,S,M):
        c=apr**power; c=c/c.mean(); c[-1]=c[:-1].mean()*base
        St=sum(ci*s for ci,s in zip(c,S)); cm=c[:,None]*M; T=cm-(c/c.sum())[:,None]*cm.sum(0,keepdim=True)
        St.diagonal().add_(shrink*St.diagonal().mean())
        return torch.cholesky_solve(T.t(),torch.linalg.cholesky(St)).t()*8
    return fn
for b in (1.0,.5,.25): report(f'base {b}',cwr(0,b))
for p in (.25,.5,1): report(f'power {p}',cwr(p)); 
report('power .5, base .5',cwr(.5,.5))
for share in (.5,.9):
    CACHE.clear(); old=moments
    report(f'share {share}',lambda p,S,M: ridge(*moments(p,share=share)))
report('no base route',lambda p,S,M: torch.cat([ridge(S[:-1],M[:-1]),torch.full((1,M.shape[1]),0.)]))
for mix in ((('own',.9),('bare',.1)),(('own',.5),('bare',.5))): report(str(mix),lambda p,S,M: ridge(*moments(p,mix)))

"""Gates from saved layer inputs: forms of the second moments, ridge strengths and answer shares. Prints top-1 shares on held-out rows."""
from moments import *  # noqa: F403
table('baseline',base(),P)
for s in (1e-3,3e-3,3e-2,1e-1,3e-1): table(f'shrink {s}',base(s),P)
for sh in (None,.5,.9,.97): table(f'share {sh}',base(share=sh),P)
# LDA-like: whiten by within-class covariance
def lda(shrink=1e-2,bias=False):
    def fn(p):
        ss=[st('train.'+n,p) for n in N]
        W=sum(s-torch.outer(m,m) for s,m in ss)
        M=torch.stack([m for _,m in ss]).double(); M=M-M.mean(0)
        W=W.double(); W.diagonal().add_(shrink*W.diagonal().mean())
        f,_=torch.linalg.cholesky_ex(W); G=torch.cholesky_solve(M.t(),f).t().float()
        return (*acc(G,p,N),acc(G,p,N,which='all')[0])
    return fn
for s in (1e-2,1e-1): table(f'lda {s}',lda(s),P)
# random projection
def proj(d,kind='sign',shrink=1e-2):
    def fn(p):
        h=D('train.'+N[0])[p].shape[1]
        if d>=h: return base(shrink)(p)
        g=torch.Generator().manual_seed(1); R=torch.randint(0,2,(h,d),generator=g).float()*2-1; R/=d**.5
        f=lambda x:x@R
        ss=[stats('train.'+n,p,.8,f) for n in N]
        G=solve(sum(s for s,_ in ss),torch.stack([m for _,m in ss]),shrink)
        G=G@R.t()
        return (*acc(G,p,N),acc(G,p,N,which='all')[0])
    return fn
for d in (256,384,512,768,1024): table(f'proj {d}',proj(d),P)
P=paths([4,10,16,25])
def pca(d,src,shrink=1e-2):
    def fn(p):
        h=D('train.'+N[0])[p].shape[1]
        if d>=h: return base(shrink)(p)
        B=sum(st(n,p)[0] for n in src).double()
        U=torch.linalg.eigh(B)[1][:,-d:].float()
        ss=[st('train.'+n,p) for n in N]
        G=solve(U.t()@sum(s for s,_ in ss)@U,torch.stack([m for _,m in ss])@U,shrink*d/h)@U.t()
        return (*acc(G,p,N),acc(G,p,N,which='all')[0])
    return fn
table('baseline',base(),P)
T=['train.'+n for n in N]
for d in (128,256,384,512): table(f'pca all {d}',pca(d,T),P)
for d in (256,384): table(f'pca 3 adapters {d}',pca(d,T[:3]),P)
import os
if os.path.exists('work/x/train.general.pt'):
    for d in (256,384,512): table(f'pca general {d}',pca(d,['train.general']),P)
for d in (256,384): table(f'pca all {d} shrink .1',pca(d,T,.1),P)
P=paths([4,10,16,25])
lc={}
def low(n,p,r,how,diag):
    key=(n,p)
    S,m=st(n,p)
    if how=='eig':
        if key not in lc:
            d=D(n); x=d[p].double(); w=weights(d,.8).double().sqrt(); 
            lc[key]=torch.linalg.svd(x*w[:,None],full_matrices=False)[1:]
        s,V=lc[key]; A=(V[:r].t()*s[:r]).float().half().float()
    else:
        g=torch.Generator().manual_seed(2); Om=torch.randn(S.shape[0],how,generator=g).double()
        Y=S.double()@Om; nu=2.2e-16*how*Y.norm(); Y=Y+nu*Om
        C=torch.linalg.cholesky(Om.t()@Y); F=torch.linalg.solve_triangular(C,Y.t(),upper=False).t()
        U,s,_=torch.linalg.svd(F,full_matrices=False); A=(U[:,:r]*s[:r]).float().half().float()
    R=A@A.t()
    if diag: R=R+torch.diag((S.diagonal()-R.diagonal()).clamp(min=0))
    return R,m
def lowrank(r,how='eig',diag=True,shrink=1e-2):
    def fn(p):
        ss=[low('train.'+n,p,r,how,diag) for n in N]
        G=solve(sum(s for s,_ in ss),torch.stack([m for _,m in ss]),shrink)
        return (*acc(G,p,N),acc(G,p,N,which='all')[0])
    return fn
table('baseline',base(),P)
for r in (16,32,64,128,256): table(f'low rank {r}',lowrank(r),P)
for r in (32,64,128): table(f'low rank {r} no diagonal',lowrank(r,diag=False),P)
table(f'nystrom 128 of 256',lowrank(128,256),P)
table(f'nystrom 128 of 160',lowrank(128,160),P)
table(f'low rank 64 shrink .1',lowrank(64,shrink=.1),P)
table(f'low rank 128 shrink .1',lowrank(128,shrink=.1),P)

"""CPU seconds of the parts of `meteora route` on ten adapters."""
import sys, time, shutil
from contextlib import contextmanager
from pathlib import Path
import torch
torch.set_num_threads(1)
from meteora_core.progress import Progress
from meteora_core.living.route import RouteOptions, route_adapters
from meteora_core.living.checkpoints import ChangeOptions, add_adapter, drop_adapter
T=Path('work')
class Bar:
    def update(self,*a,**k): pass
class Timed(Progress):
    def note(self,text): print(f'{time.process_time():7.1f} note {text}',flush=True)
    @contextmanager
    def task(self,title,*a,**k):
        b=time.process_time(); w=time.time()
        yield Bar()
        print(f'{time.process_time():7.1f} CPU s: {title} took {time.process_time()-b:.1f} (wall {time.time()-w:.1f})',flush=True)
if __name__=='__main__':
    names=tuple(sorted(p.name for p in (T/'adapters').iterdir()))
    out=T/'routed10'
    if sys.argv[1]=='route':
        done=route_adapters(T/'adapters',out,RouteOptions(data=T/'datasets',progress=Timed(),device='cpu',overwrite=True,only=names[:int(sys.argv[2])]))
        print(done.held_out.get('gate_accuracy'),done.held_out.get('gate_accuracy_all'),done.held_out.get('lm_loss'),{k:round(v,3) for k,v in done.held_out.items() if k.startswith('gate_accuracy/')},done.tokens,done.seconds)
    else:
        print(drop_adapter(out,sys.argv[2],ChangeOptions(data=T/'datasets',progress=Timed(),device='cpu')).seconds, time.process_time())
        b=time.process_time()
        print(add_adapter(out,T/'adapters'/sys.argv[2],options=ChangeOptions(data=T/'datasets',progress=Timed(),device='cpu')).seconds, time.process_time()-b)
    print('CPU s in all',time.process_time())

"""CPU seconds of the collection of statistics, of solving and of measuring; work/ holds adapters and datasets."""
import time,torch
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
from meteora_core import AdapterBank, attach
from meteora_core.adapters.base_route import base_route
from meteora_core.adapters.joining import with_adapter
from meteora_core.checkpoints.gate_statistics import GateStatistics, Recipe
from meteora_core.checkpoints.native import read_checkpoint
from meteora_core.data.rows import read_rows
from meteora_core.model.attach import meteora_layers
from meteora_core.model.base import BaseReference, load_base, load_tokenizer
from meteora_core.training.encoding import encode_rows
from meteora_core.training.gate_metrics import measure_gates
from meteora_core.training.statistics import Collecting, closed_form_gates, collect_statistics
from meteora_core.training.task_rows import HeldOut
T=Path('work'); P=time.process_time
def say(*a): print(f'{P():7.1f}',*a,flush=True)
ref=BaseReference('smollm2-135m'); tok=load_tokenizer(ref); model=load_base(ref); say('loaded')
bank=AdapterBank.from_peft({'strategyqa':T/'adapters'/'strategyqa'})
rows=list(encode_rows(read_rows(T/'datasets','strategyqa','train',200),tok,0,512,None).rows)
how=Collecting(ref,tok.pad_token_id,Recipe(answer_share=.8,bare_share=.25),tokens=1600,batch_size=8)
for name,h in (('as now',how),('float32',replace(how,half_precision=False)),('all prompt tokens, bfloat16',replace(how,prompt_every=1)),('float32, all prompt tokens',replace(how,half_precision=False,prompt_every=1))):
    b=P(); s=collect_statistics(model,bank,rows,T/'parts'/f'{name.replace(" ","")}.safetensors',h); d=P()-b
    say(name,f'{d:.2f} CPU s, tokens counted',s.header.tokens,'rows',s.header.rows,'prompt+answer',sum(len(r) for r in rows[:s.header.rows]))
layers=list(bank.modules)
some=[p for p in layers if '.7.' in p]
b=P(); g=dict(closed_form_gates([s]*11,some)); d=P()-b; say('solving one of 30 layers for 11 entries',f'{d:.2f}')
full=read_checkpoint(Path('meteora_core/starter/checkpoint'))[2]; full=with_adapter(full,base_route())
attach(model,full,top_k=2,init='normal')
held=HeldOut([[]]*5+[rows[:6]]+[[]]*5,list(full.names),tok.pad_token_id,8)
b=P(); measure_gates(model,held); d=P()-b; n=sum(len(r) for r in rows[:6]); say('measuring',n,'tokens',f'{d:.2f}, {d/n*1e3:.1f} ms a token')

"""mid.py: b0 continued on the corpus with more rounds (90/8/2 %, and 20 % of tagged chains documents forced to two or three rounds): what more base exposure would give."""
import sys; sys.path.insert(0,'/tmp/work/world')
import time
import stage0_model as s
from stage0_model import *
import argparse
steps=int(sys.argv[1]); 
s.RUNGS["chains"]["corpus"]=({1: 90, 2: 8, 3: 2}, s.RUNGS["chains"]["corpus"][1])
args=argparse.Namespace(seed=99,batch_tokens=4096,micro_batches=3,slip=0.01,valid_share=0.45,malformed_share=0.15)
model,tok=load('/tmp/work/world/out/b0','cpu')
opts=make_optimizers(model,3e-3,4e-3); t0=time.time()
for step in range(1,steps+1):
    b=list(corpus_batches(tok,args,step)); n=sum(int(m[:,1:].sum()) for _,m in b); loss=0
    for ids,mask in b:
        with torch.autocast("cpu",torch.bfloat16):
            logits=model.logits(model.hidden(ids[:,:-1])[mask[:,1:]])
        nll=F.cross_entropy(logits.float(),ids[:,1:][mask[:,1:]],reduction="sum")/n
        nll.backward(); loss+=nll.item()
    set_lr(opts,0.3*min(1,step/30,(steps+1-step)/(0.6*steps)))
    update(model,opts)
    if step%25==0: print(step,round(loss,4),round(time.time()-t0),flush=True)
save(model,tok,Path('/tmp/work/world/out/d0'))
print("wrote")

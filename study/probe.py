"""probe.py CKPT[=mode] [--n 60 --kind all --temps 0 1 --split tune]: accuracy by kind and rung, with 95 % intervals."""
import sys; sys.path.insert(0,'/tmp/work/world')
import argparse, time, math, json
from collections import defaultdict
import numpy as np
from engine import Engine
from stage0_model import *
from stage1_zero import parse_response
p=argparse.ArgumentParser(); p.add_argument("ckpts",nargs="+"); p.add_argument("--n",type=int,default=60); p.add_argument("--kind",default="all")
p.add_argument("--temps",type=float,nargs="+",default=[0,1]); p.add_argument("--split",default="tune"); p.add_argument("--show",type=int,default=0); p.add_argument("--max",type=int,default=1024)
a=p.parse_args()
for spec in a.ckpts:
    path,_,mode=spec.partition("=")
    model,tok=load(path,"cpu"); eng=Engine(model,tok)
    for kind in KINDS if a.kind=="all" else [a.kind]:
        problems=make_problems(kind,a.split,a.n,123)
        for T in a.temps:
            t0=time.time()
            sys_=PLAIN_PROMPT if mode=="plain" else FORMAT_PROMPT
            rs=eng.generate([prompt_ids(tok,q.question,sys_) for q in problems],n=1,parallel=mode=="parallel",max_new_tokens=a.max,temperature=T,seed=7)
            rows=[]
            for q,(r,) in zip(problems,rs):
                t=response_text(tok,r.ids); pr=parse_response(t)
                rows.append((q,q.verify(t),r.finish_reason=="stop" and not pr.violations,len(r.ids),r.critical_path,sum(len(x[0]) for x in pr.blocks),len(pr.blocks),r.max_branches,t))
            acc=np.mean([x[1] for x in rows]); ci=1.96*math.sqrt(acc*(1-acc)/len(rows))
            by=defaultdict(list)
            for x in rows:
                P=x[0].parts
                key=f"r{len(P['rounds'])}" if kind=="chains" else f"d{len(str(P['terms'][0][2]))}" if kind=="sums" else f"l{P['leading']}"
                by[key].append(x[1])
                w=len(P['rounds'][0][0]) if kind=="chains" else len(P['terms']) if kind=="sums" else 0
                by["w1-3" if w<=3 else "w4-5" if w<=5 else "w6-8"].append(x[1])
            extra=""
            if kind=="sums": extra=" written %.2f"%np.mean([("*" in x[-1].replace(x[-1][:0],"") and x[-1].count("*")>len(x[0].parts['terms'])*2-1) for x in rows])
            if mode=="parallel": extra+=" par(>=2 parts) %.3f t/p %.2f"%(np.mean([x[7]>=2 for x in rows if len(x[0].parts.get('terms',[])or (x[0].parts['rounds'][0][0] if kind=='chains' else [1,1]))>1]),sum(x[3] for x in rows)/sum(x[4] for x in rows))
            print(f"{spec} {kind:9s} T{T} n{len(rows)} acc {100*acc:.1f}±{100*ci:.1f} valid {100*np.mean([x[2] for x in rows]):.1f} tok {np.mean([x[3] for x in rows]):.0f} plans {np.mean([x[5] for x in rows]):.2f} blocks {np.mean([x[6] for x in rows]):.2f}{extra} | "+" ".join(f"{k}:{100*np.mean(v):.0f}({len(v)})" for k,v in sorted(by.items()))+f" [{time.time()-t0:.0f}s]",flush=True)
            for x in rows[:a.show]: print("   Q",x[0].question,"->",x[0].answer,x[1]); print("   ",x[-1])

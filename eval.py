r"""The judge: any number of checkpoints, side by side, on problems none of them was trained on.

In : checkpoint folders.      Out: a table, and in --out: eval.json, eval.txt, responses.jsonl, trace.html (open it in a browser).

    python eval.py out/stage0 out/stage1 out/stage2 out/stage3
    python eval.py out/stage3 out/stage3_seq --split hard --n 100 --out out/hard

Each checkpoint is decoded in the mode it was made for: a base is asked plainly, and asked for the format; a stage-1 checkpoint and
the sequential twins decode sequentially under the format prompt; stages 2 and 3 decode in parallel.  `path=plain`, `path=format` and
`path=parallel` choose by hand.  Metrics are explained in the README's glossary.
"""

import argparse
import html
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from engine import TAGS, Engine, Sequence, batches, token_logprobs
from stage0_model import (
    FORMAT_PROMPT, KINDS, PLAIN_PROMPT, SPLITS, UserError, load, make_problems, pick_device, prompt_ids, response_text,
    run_main, write_atomic,
)  # fmt: skip
from stage1_zero import format_score, parse_response

MODES = ("plain", "format", "parallel")


def modes_of(spec):
    """'out/stage2' or 'out/stage2=format' -> [(path, mode), ..]: the modes a checkpoint is judged in."""
    path, _, mode = spec.partition("=")
    if mode and mode not in MODES:
        raise UserError(f"{spec}: unknown mode {mode!r}, expected one of {', '.join(MODES)}")
    if mode:
        return [(path, mode)]
    file = Path(path) / "args.json"
    made = json.loads(file.read_text()) if file.is_file() else {}
    tokenizer_file = Path(path) / "tokenizer.json"
    if tokenizer_file.is_file() and json.dumps(TAGS[0]) in tokenizer_file.read_text() and not made.get("sequential"):
        return [(path, "parallel")]
    return [(path, "format")] if "init" in made else [(path, "plain"), (path, "format")]


def mean_and_ci(values_per_problem):
    """Mean over problems of each one's mean over its samples, and the half-width of its 95 % interval (normal, n problems).

    [[1, 0], [1, 1]] -> mean of 0.5 and 1.0 is 0.75; std 0.354 / sqrt(2) * 1.96 = 0.49
    """
    means = np.array([np.mean(v) for v in values_per_problem], dtype=float)
    return float(means.mean()), float(1.96 * means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def decode(engine, problems, mode, args, k=1, temperature=1.0, progress=True):
    """k rollouts of every problem in a mode.  List of lists of Rollout."""
    system = PLAIN_PROMPT if mode == "plain" else FORMAT_PROMPT
    prompts = [prompt_ids(engine.tokenizer, p.question, system) for p in problems]
    return engine.generate(
        prompts, n=k, parallel=mode == "parallel", max_new_tokens=args.max_new_tokens, temperature=temperature, seed=args.seed,
        progress=progress,
    )  # fmt: skip


def measure(problems, rollouts, tokenizer):
    """Metrics of one checkpoint in one mode (README's glossary).  rollouts: k per problem."""
    texts = [[response_text(tokenizer, r.ids) for r in rs] for rs in rollouts]
    right = [[p.verify(t) for t in ts] for p, ts in zip(problems, texts)]
    flat = [(r, t) for rs, ts in zip(rollouts, texts) for r, t in zip(rs, ts)]
    tokens, path = np.mean([len(r.ids) for r, _ in flat]), np.mean([r.critical_path for r, _ in flat])
    accuracy, ci = mean_and_ci(right)
    return {
        "accuracy": accuracy,
        "accuracy ci95": ci,
        "best@k": float(np.mean([any(v) for v in right])),
        "valid": float(np.mean([r.finish_reason == "stop" and format_score(t) == 0 for r, t in flat])),
        "parallel": float(np.mean([r.max_branches >= 2 for r, _ in flat])),
        "plans": float(np.mean([sum(len(b[0]) for b in parse_response(t).blocks) for _, t in flat])),
        "tokens": float(tokens),
        "critical path": float(path),
        "tokens/path": float(tokens / path),
    }


@torch.no_grad()
def agreement(engine, problems, mode, rollouts, most=200):
    """Largest difference between the engine's log-probabilities and a training forward's, over sampled tokens of `most` rollouts."""
    system = PLAIN_PROMPT if mode == "plain" else FORMAT_PROMPT
    chosen = [(p, r) for p, rs in zip(problems, rollouts) for r in rs][:most]
    sequences = [Sequence(prompt_ids(engine.tokenizer, p.question, system), r.ids, r.layout) for p, r in chosen]
    worst = 0.0
    for rows, ids, laid, mask in batches(sequences, 16_384, engine.model.device):
        ours = token_logprobs(engine.model, ids, laid)[0][mask].cpu()
        theirs = torch.tensor([x for i in rows for x in chosen[i][1].logprobs])
        sampled = ~torch.tensor([f for i in rows for f in chosen[i][1].forced])
        worst = max(worst, (ours - theirs)[sampled].abs().max().item())
    return worst


def trace_page(traces):
    """A self-contained HTML page: each trace's trunk in full width, the steps of a block side by side."""
    style = (
        "body{font:14px system-ui;margin:2em;max-width:75em}pre{white-space:pre-wrap;word-break:break-word;margin:0}"
        "div{border-radius:6px;padding:.5em .7em;margin:.3em 0}.guideline{background:#e8eefc}.takeaway{background:#e9f6e9}"
        ".steps{display:flex;gap:.5em;padding:0}.step{flex:1;background:#fdf1dc;min-width:0}.final{background:#f2f2f2}"
        "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}.guideline{background:#223}.takeaway{background:#232}"
        ".step{background:#332a18}.final{background:#222}}"
    )
    page = [f"<!doctype html><meta charset=utf-8><title>Native parallel traces</title><style>{style}</style>"]
    for title, text in traces:
        page.append(f"<h3>{html.escape(title)}</h3>")
        for span in re.findall(r"<guideline>.*?</guideline>|(?:<step>.*?</step>)+|<takeaway>.*?</takeaway>|[^<]+", text, re.S):
            name = re.match(r"<(\w+)>|", span)[1]
            if name == "step":
                steps = "".join(f"<div class=step><pre>{html.escape(s)}</pre></div>" for s in re.findall(r"<step>(.*?)</step>", span, re.S))
                page.append(f"<div class=steps>{steps}</div>")
            else:
                bare = "\n".join(re.findall(r"<plan>(.*?)</plan>", span, re.S)) or re.sub(r"</?\w+>", "", span)
                page.append(f"<div class={name or 'final'}><pre>{html.escape(bare)}</pre></div>")
    return "\n".join(page) + "\n"


def table(rows):
    """Rows of {column: text} as aligned plain text; the columns are those of the first row."""
    columns = list(rows[0])
    width = {c: max(len(c), *(len(r[c]) for r in rows)) for c in columns}
    line = lambda r: "  ".join(r[c].ljust(width[c]) if c == columns[0] else r[c].rjust(width[c]) for c in columns)  # noqa: E731
    return "\n".join([line({c: c for c in columns}), "  ".join("-" * width[c] for c in columns), *map(line, rows)])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoints", nargs="+", help="checkpoint folders or hub names, each optionally with =plain, =format or =parallel")
    p.add_argument("--out", default="out", help="folder for eval.json, eval.txt, responses.jsonl and trace.html")
    p.add_argument("--kind", default="all", choices=("all", *KINDS), help="problems to judge on")
    p.add_argument("--split", default="heldout", choices=SPLITS, help="tune is for choosing settings, heldout for reporting")
    p.add_argument("--n", type=int, default=600, help="problems, all kinds together")
    p.add_argument("--k", type=int, default=1, help="samples per problem at --temperature")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sampled columns; a greedy column stands beside them")
    p.add_argument("--max-new-tokens", type=int, default=640, help="response budget in tokens, all branches together")
    p.add_argument("--timed", type=int, default=12, help="problems decoded alone (batch 1), every checkpoint in turn, for time to answer")
    p.add_argument("--seed", type=int, default=1234, help="of the problems and the sampling")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..")
    args = p.parse_args()
    device = pick_device(args.device)
    problems = make_problems(args.kind, args.split, args.n, args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # ---- every checkpoint, in every mode it is made for ----
    judged, engines = [], []
    with open(out / "responses.jsonl", "w") as responses:
        for path, mode in [pair for spec in args.checkpoints for pair in modes_of(spec)]:
            engine = Engine(*load(path, device))
            print(f"{path} ({mode}): {len(problems)} problems of {args.split}, {args.k} samples each, then greedy")
            rollouts = decode(engine, problems, mode, args, args.k, args.temperature)
            speed = engine.stats.tokens / engine.stats.seconds
            greedy = decode(engine, problems, mode, args, temperature=0.0)
            result = {"checkpoint": path, "mode": mode} | measure(problems, rollouts, engine.tokenizer)
            result |= {"tokens/s": speed, "greedy": measure(problems, greedy, engine.tokenizer)["accuracy"], "kinds": {}}
            for kind in dict.fromkeys(p.kind for p in problems):
                pick = [i for i, p in enumerate(problems) if p.kind == kind]
                result["kinds"][kind] = measure([problems[i] for i in pick], [rollouts[i] for i in pick], engine.tokenizer)
            result["logprob gap"] = agreement(engine, problems, mode, rollouts)
            for problem, rs in zip(problems, rollouts):
                for r in rs:
                    text = response_text(engine.tokenizer, r.ids)
                    row = {"checkpoint": path, "mode": mode, "kind": problem.kind, "problem": problem.question, "response": text}
                    row |= {"right": problem.verify(text), "finish_reason": r.finish_reason, "error": r.error}
                    responses.write(json.dumps(row | {"tokens": len(r.ids), "critical_path": r.critical_path}) + "\n")
            if mode == "parallel":
                traces = [
                    (f"{p.question}   ({path}: {len(r.ids)} tokens, critical path {r.critical_path})", response_text(engine.tokenizer, r.ids))
                    for p, [r] in list(zip(problems, greedy))[: 2 * len(KINDS)]
                ]
                write_atomic(out / "trace.html", lambda file: file.write_text(trace_page(traces)))
            judged.append(result)
            engines.append((engine, mode))

    # ---- wall-clock to answer: one problem at a time, all checkpoints in turn, so that the machine's moods hit all alike ----
    seconds = [[] for _ in engines]
    for problem in tqdm(problems[: args.timed + 1], desc="time to answer", leave=False):
        for (engine, mode), times in zip(engines, seconds):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            decode(engine, [problem], mode, args, temperature=0.0, progress=False)
            times.append(time.perf_counter() - began)
    for result, times in zip(judged, seconds):
        result["seconds to answer"] = float(np.mean(times[1:])) if args.timed else float("nan")  # the first problem warms up

    # ---- report ----
    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    rows = [
        {
            "checkpoint": r["checkpoint"], "mode": r["mode"], "accuracy %": f"{percent(r['accuracy'])} ±{percent(r['accuracy ci95'])}",
            **({"best@k %": percent(r["best@k"])} if args.k > 1 else {}),
            "greedy %": percent(r["greedy"]), "valid %": percent(r["valid"]), "parallel %": percent(r["parallel"]), "plans": f"{r['plans']:.1f}",
            "tokens": f"{r['tokens']:.0f}", "crit. path": f"{r['critical path']:.0f}", "tokens/path": f"{r['tokens/path']:.2f}",
            "tokens/s": f"{r['tokens/s']:.0f}", "s/answer": f"{r['seconds to answer']:.3f}", "logp gap": f"{r['logprob gap']:.0e}",
        }
        for r in judged
    ]  # fmt: skip
    by_kind = [
        {"checkpoint": r["checkpoint"], "mode": r["mode"]}
        | {f"{kind} {name}": f"{100 * m[key]:.1f}" if name == "acc %" else f"{m[key]:.2f}" for kind, m in r["kinds"].items()
           for name, key in (("acc %", "accuracy"), ("tok/path", "tokens/path"))}
        for r in judged
    ]  # fmt: skip
    head = f"{len(problems)} {args.split} problems, {args.k} sample(s) at temperature {args.temperature}, device {device}"
    text = f"{head}\n\n{table(rows)}\n\n{table(by_kind)}\n"
    print("\n" + text)
    (out / "eval.txt").write_text(text)
    report = {"args": vars(args), "torch": torch.__version__, "device": str(device), "checkpoints": judged}
    write_atomic(out / "eval.json", lambda file: file.write_text(json.dumps(report, indent=2) + "\n"))


if __name__ == "__main__":
    run_main(main)

r"""The judge: any number of checkpoints, side by side, on problems none of them was trained on.

In : checkpoint folders.      Out: a table, and in --out: eval.json, eval.txt, responses.jsonl, trace.html (open it in a browser).

    python eval.py out/stage0 out/stage1 out/stage2 out/stage3
    python eval.py out/stage3 out/stage3_seq --split hard --n 100 --out out/hard
    python eval.py out/stage1 out/stage2 out/stage3 --curves assets/curves.png        # what the stages logged, as a picture
    python eval.py out out/seed1 out/seed2 --summary                 # finished judgements of several seeds, as one table
    python eval.py out/npr --bench aime25 math500 --k 8 --out out/real      # real problems: responses kept, resumable by problem

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
    KINDS, PLAIN_PROMPT, REAL_PLAIN_PROMPT, SPLITS, UserError, from_all_ranks, last_boxed, load, make_problems,
    my_share, pick_device, prompt_ids, ranks, read_problems, read_prompt, response_text, run_main, write_atomic,
)  # fmt: skip
from stage1_zero import parse_response

MODES = ("plain", "format", "parallel")

# The paper's eight benchmarks: file in --bench-dir, else hub name.  ZebraLogic's public version has its solutions masked.
BENCHES = {
    "aime25": ("aime25.json", "math-ai/aime25"),
    "aime24": ("aime24.jsonl", "math-ai/aime24"),
    "hmmt25": ("hmmt_feb_2025.json", "MathArena/hmmt_feb_2025"),
    "olympiad": ("olympiadbench.jsonl", "math-ai/olympiadbench"),
    "minerva": ("minerva_math.jsonl", "math-ai/minervamath"),
    "zebra": ("zebra.jsonl", "allenai/ZebraLogicBench-private:grid_mode"),
    "amc23": ("amc23.json", "math-ai/amc23"),
    "math500": ("math500.json", "HuggingFaceH4/MATH-500"),
}


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


def system_prompt(mode, args):
    """What precedes the question in a mode: asked plainly, or for the format."""
    return (REAL_PLAIN_PROMPT if args.bench else PLAIN_PROMPT) if mode == "plain" else read_prompt(args.prompt_file, args.bench)


def decode(engine, problems, mode, args, k=1, temperature=1.0, progress=True):
    """k rollouts of every problem in a mode.  List of lists of Rollout.  Each rank decodes its share; all get all."""
    system = system_prompt(mode, args)
    prompts = [prompt_ids(engine.tokenizer, p.question, system) for p in my_share(problems)]
    rollouts = engine.generate(
        prompts, n=k, parallel=mode == "parallel", max_new_tokens=args.max_new_tokens, temperature=temperature, top_p=args.top_p,
        seed=args.seed, progress=progress,
    )  # fmt: skip
    return from_all_ranks(rollouts)


def parts_of(problem):
    """How many parts a made problem has: the chains of its rounds, its terms, or the first moves that lead to a countdown's target.  None for a
    real one."""
    parts = problem.parts
    return sum(len(labels) for labels, _, _ in parts.get("rounds", [])) or len(parts.get("terms", [])) or parts.get("leading")


def judge(problem, rollout, tokenizer):
    """What is kept of a response: {problem, response, right, valid, ..}, ready for jsonl."""
    text = response_text(tokenizer, rollout.ids)
    parsed, boxed = parse_response(text), last_boxed(text)
    blocks = parsed.blocks
    return {
        "problem": problem.question, "kind": problem.kind, "answer": problem.answer, "response": text, "right": problem.verify(text),
        "valid": rollout.finish_reason == "stop" and not parsed.violations,
        "finish_reason": rollout.finish_reason, "error": rollout.error,
        "tokens": len(rollout.ids), "critical_path": rollout.critical_path, "branches": rollout.max_branches,
        "plans": sum(len(plans) for plans, _, _ in blocks), "parts": parts_of(problem),
        # signs of collapse: a block that has nothing to fork, steps that repeat another, say nothing, or were not needed
        "blocks": len(blocks), "single_plan_blocks": sum(len(plans) == 1 for plans, _, _ in blocks),
        "steps": sum(len(steps) for _, steps, _ in blocks),
        "copied_steps": sum(len(steps) - len(set(steps)) for _, steps, _ in blocks),
        "empty_steps": sum(len(step) < 10 for _, steps, _ in blocks for step in steps),
        "answer_in_plan": bool(boxed) and boxed not in problem.question and any(boxed in plan for plans, _, _ in blocks for plan in plans),
    }  # fmt: skip


def measure(judged):
    """Metrics of one checkpoint in one mode (README's glossary).  judged: for every problem the k rows of `judge`."""
    flat = [row for rows in judged for row in rows]
    mean = lambda key: float(np.mean([row[key] for row in flat]))  # noqa: E731
    share = lambda key, of: sum(row[key] for row in flat) / max(1, sum(row[of] for row in flat))  # noqa: E731
    accuracy, ci = mean_and_ci([[row["right"] for row in rows] for rows in judged])
    return {
        "accuracy": accuracy,
        "accuracy ci95": ci,
        "best@k": float(np.mean([any(row["right"] for row in rows) for rows in judged])),
        "valid": mean("valid"),
        "parallel": float(np.mean([row["branches"] >= 2 for row in flat])),
        "plans": mean("plans"),
        "tokens": mean("tokens"),
        "critical path": mean("critical_path"),
        "tokens/path": mean("tokens") / mean("critical_path"),
        "single-plan blocks": share("single_plan_blocks", "blocks"),
        "copied steps": share("copied_steps", "steps"),
        "empty steps": share("empty_steps", "steps"),
        "answer in a plan": mean("answer_in_plan"),
        "plans by parts": {
            parts: float(np.mean([row["plans"] for row in flat if row["parts"] == parts]))
            for parts in sorted({row["parts"] for row in flat} - {None})  # 0: a countdown that cannot be reached
        },
    }


def time_to_answer(contestants, problems, args, device):
    """Mean seconds to a greedy answer of each (engine, mode): one problem at a time, all contestants in turn, so that the machine's
    moods hit all alike.  The first problem warms up and does not count."""
    seconds = [[] for _ in contestants]
    for problem in tqdm(problems[: args.timed + 1] if args.timed else [], desc="time to answer", leave=False):
        for (engine, mode), times in zip(contestants, seconds):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            decode(engine, [problem], mode, args, temperature=0.0, progress=False)
            times.append(time.perf_counter() - began)
    return [float(np.mean(times[1:])) if len(times) > 1 else float("nan") for times in seconds]


def resume_rows(file, settings, writes):
    """{problem number: its rows} of a responses file that was begun with the same settings (its first line); else it is begun anew."""
    lines = file.read_text().split("\n") if file.is_file() else []
    if lines and lines[0] == json.dumps(settings):
        kept = {}
        for line in lines[1:-1]:  # the last one is empty, or cut off by the kill
            row = json.loads(line)
            kept.setdefault(row["number"], []).append(row)
        whole = {i: rows for i, rows in kept.items() if len(rows) == settings["k"]}
        lines = [json.dumps(row) for rows in whole.values() for row in rows]
    else:
        whole, lines = {}, []
    if writes:
        write_atomic(file, lambda aside: aside.write_text("\n".join([json.dumps(settings), *lines]) + "\n"))
    return whole


def run_benches(args, device, out):
    """Every checkpoint on every benchmark of --bench: <out>/<bench>/<checkpoint>=<mode>.jsonl, <out>/bench.json, and a table.

    A problem whose k responses are in the file is not decoded again, so a killed run goes on where it was.
    """
    sets = {}
    for name in args.bench:
        file, hub = BENCHES[name]
        file = Path(args.bench_dir) / file
        sets[name] = read_problems(str(file) if args.bench_dir and file.is_file() else hub)[: args.first or None]
    results, writes = [], ranks()[0] == 0
    for spec in args.checkpoints:
        path, mode = modes_of(spec)[-1]  # the format, where a base could be asked either way
        engine = Engine(*load(path, device, getattr(torch, args.dtype, None)))
        if "=" not in spec and not Path(path).is_dir() and TAGS[0] in engine.tokenizer.get_vocab():
            mode = "parallel"  # a checkpoint of the hub that has the tags
        weights = sorted((f.name, f.stat().st_size, int(f.stat().st_mtime)) for f in Path(path).glob("*.safetensors"))
        for name, problems in sets.items():
            settings = {key: getattr(args, key) for key in ("k", "temperature", "top_p", "max_new_tokens", "seed")}
            settings |= {"checkpoint": path, "mode": mode, "weights": weights, "problems": len(problems)}
            settings |= {"prompt": system_prompt(mode, args)}
            file = out / name / f"{path.strip('/').replace('/', '_')}={mode}.jsonl"
            kept = resume_rows(file, settings, writes)
            from_all_ranks([])  # the file is in order
            missing = [i for i in range(len(problems)) if i not in kept]
            print(f"{path} ({mode}): {len(problems)} problems of {name}, {args.k} samples each" + (f", {len(kept)} kept" if kept else ""))
            size = max(1, 64 // args.k) * ranks()[1]  # problems between two writes: enough to keep the engine busy
            for numbers in tqdm([missing[i : i + size] for i in range(0, len(missing), size)], desc=name):
                began = time.time()
                rollouts = decode(engine, [problems[i] for i in numbers], mode, args, args.k, args.temperature)
                seconds = (time.time() - began) / len(numbers) / args.k
                for i, rs in zip(numbers, rollouts):
                    kept[i] = [{"number": i, **judge(problems[i], r, engine.tokenizer), "seconds": round(seconds, 4)} for r in rs]
                if writes:
                    with open(file, "a") as responses:
                        responses.writelines(json.dumps(row) + "\n" for i in numbers for row in kept[i])
            rows = [kept[i] for i in range(len(problems))]
            result = {"bench": name, "checkpoint": path, "mode": mode} | measure(rows)
            result["tokens/s"] = sum(r["tokens"] for rs in rows for r in rs) / sum(r["seconds"] for rs in rows for r in rs)
            both = time_to_answer([(engine, mode), (engine, "format")] if mode == "parallel" else [(engine, mode)], problems, args, device)
            result |= {"seconds to answer": both[0], "seconds to answer, sequentially": both[-1]}
            results.append(result)
        del engine
    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    text = f"{args.k} sample(s) at temperature {args.temperature}, device {device}\n\n" + table(
        [
            {
                "bench": r["bench"], "checkpoint": r["checkpoint"], "mode": r["mode"],
                f"avg@{args.k} %": f"{percent(r['accuracy'])} ±{percent(r['accuracy ci95'])}", f"best@{args.k} %": percent(r["best@k"]),
                "valid %": percent(r["valid"]), "parallel %": percent(r["parallel"]), "tokens": f"{r['tokens']:.0f}",
                "crit. path": f"{r['critical path']:.0f}", "tokens/path": f"{r['tokens/path']:.2f}", "tokens/s": f"{r['tokens/s']:.0f}",
                "s/answer": f"{r['seconds to answer']:.2f}", "sequentially": f"{r['seconds to answer, sequentially']:.2f}",
            }
            for r in results
        ]
    )  # fmt: skip
    print("\n" + text)
    if writes:
        report = {"args": vars(args), "torch": torch.__version__, "device": str(device), "results": results}
        write_atomic(out / "bench.json", lambda file: file.write_text(json.dumps(report, indent=2) + "\n"))
        write_atomic(out / "bench.txt", lambda file: file.write_text(text + "\n"))


@torch.no_grad()
def agreement(engine, problems, mode, args, rollouts, most=200):
    """Largest difference between the engine's log-probabilities and a training forward's, over sampled tokens of `most` rollouts."""
    system = system_prompt(mode, args)
    chosen = [(p, r) for p, rs in zip(problems, rollouts) for r in rs][:most]
    sequences = [Sequence(prompt_ids(engine.tokenizer, p.question, system), r.ids, r.layout) for p, r in chosen]
    worst = 0.0
    for rows, ids, laid, mask in batches(sequences, 2_048, engine.model.device):
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


def draw_curves(folders, file):
    """One row of panels per stage from the folders' log.jsonl; folders of one name (seeds of one stage) share a row.  Thin lines: steps;
    thick ones: mean of the five around it."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--curves draws with matplotlib, which is not installed; pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    stages = {}
    for folder in folders:
        log = Path(folder) / "log.jsonl"
        if not log.is_file():
            raise UserError(f"{log}: no such file; expected the folder of a stage, e.g. out/stage1")
        stages.setdefault(Path(folder).name, []).append([json.loads(line) for line in log.read_text().splitlines()])
    wanted = ("valid", "accuracy", "reward", "entropy", "length", "critical_path")
    figure, axes = plt.subplots(len(stages), len(wanted), figsize=(3 * len(wanted), 2.4 * len(stages)), squeeze=False, layout="constrained")
    for row, (stage, runs) in zip(axes, stages.items()):
        keys = [key for key in wanted if key in runs[0][0]]
        keys += [] if "reward" in keys else ["loss"]  # the loss of reinforcement learning is no curve to look at
        for panel, key in zip(row, keys):
            for i, steps in enumerate(runs):
                x, y = [r["step"] for r in steps], np.array([r[key] for r in steps])
                smooth = [y[max(0, j - 2) : j + 3].mean() for j in range(len(y))]
                panel.plot(x, y, color=f"C{i}", alpha=0.3, linewidth=0.8)
                panel.plot(x, smooth, color=f"C{i}", linewidth=1.5)
            panel.set_title(f"{stage}: {key.replace('_', ' ')}", fontsize=9)
            panel.tick_params(labelsize=7)
        for panel in row[len(keys) :]:
            panel.axis("off")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    print(f"wrote {file}")


def summarise(folders):
    """Several judgements of the same stages (one folder with an eval.json for each seed) as one table: mean over them, and their range."""
    rows = {}
    for folder in folders:
        file = Path(folder) / "eval.json"
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected a folder that eval.py wrote to (--out)")
        for r in json.loads(file.read_text())["checkpoints"]:
            rows.setdefault((Path(r["checkpoint"]).name, r["mode"]), []).append(r)
    percent = ("accuracy", "valid", "parallel")

    def cell(results, key):
        values = [r[key] * (100 if key in percent else 1) for r in results]
        digits = 2 if key == "tokens/path" else 1
        return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"

    def gain(results):  # over the stage before; a folder that does not hold that stage has none
        values = [100 * r["minus row above"][0] for r in results if r["minus row above"]]
        return f"{np.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f})" if len(values) == len(results) else "-"

    keys = (*percent, "plans", "tokens", "critical path", "tokens/path")
    return table(
        [
            {"checkpoint": stage, "mode": mode, "runs": str(len(results))}
            | {f"{key} %" if key in percent else key: cell(results, key) for key in keys}
            | {"minus row above": gain(results)}
            | {f"{kind} acc %": cell([r["kinds"][kind] for r in results], "accuracy") for kind in results[0]["kinds"]}
            for (stage, mode), results in rows.items()
        ]
    )


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
    p.add_argument("--n", type=int, default=1002, help="problems, all kinds together")
    p.add_argument("--k", type=int, default=1, help="samples per problem at --temperature")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sampled columns; a greedy column stands beside them")
    p.add_argument("--greedy", type=int, default=501, help="how many of the problems are decoded greedily too")
    p.add_argument("--max-new-tokens", type=int, default=640, help="response budget in tokens, all branches together")
    p.add_argument("--top-p", type=float, default=1.0, help="sample from the smallest set of tokens with this probability (paper: 0.7)")
    p.add_argument("--bench", nargs="+", default=[], choices=BENCHES, help="judge on these real benchmarks instead of made problems")
    p.add_argument("--bench-dir", default="", help="folder with their files; a benchmark without a file there comes from the hub")
    p.add_argument("--first", type=int, default=0, help="only so many problems of each benchmark, 0 for all")
    p.add_argument("--prompt-file", default="", help="text that asks for the format (with --bench: assets/format_prompt.txt)")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; auto: what config.json says")
    p.add_argument("--timed", type=int, default=12, help="problems decoded alone (batch 1), every checkpoint in turn, for time to answer")
    p.add_argument("--curves", default="", help="judge nothing; draw the folders' log.jsonl into this picture (needs matplotlib)")
    p.add_argument("--summary", action="store_true", help="judge nothing; mean and range over the eval.json of the folders (seeds)")
    p.add_argument("--seed", type=int, default=1234, help="of the problems and the sampling")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..")
    args = p.parse_args()
    if args.curves:
        return draw_curves(args.checkpoints, args.curves)
    if args.summary:
        return print(summarise(args.checkpoints))
    device = pick_device(args.device)
    out, writes = Path(args.out), ranks()[0] == 0
    out.mkdir(parents=True, exist_ok=True)
    if args.bench:
        return run_benches(args, device, out)
    problems = make_problems(args.kind, args.split, args.n, args.seed)

    # ---- every checkpoint, in every mode it is made for ----
    judged, engines, responses, outcomes = [], [], [], []  # outcomes: right or wrong, (row of the table, problem, sample)
    for path, mode in [pair for spec in args.checkpoints for pair in modes_of(spec)]:
        engine = Engine(*load(path, device, getattr(torch, args.dtype, None)))
        print(f"{path} ({mode}): {len(problems)} problems of {args.split}, {args.k} samples each, then the first {min(args.greedy, args.n)} greedily")
        began = time.time()
        rollouts = decode(engine, problems, mode, args, args.k, args.temperature)
        speed = sum(len(r.ids) for rs in rollouts for r in rs) / (time.time() - began)
        greedy = decode(engine, problems[: args.greedy], mode, args, temperature=0.0)
        rows = [[judge(p, r, engine.tokenizer) for r in rs] for p, rs in zip(problems, rollouts)]
        result = {"checkpoint": path, "mode": mode} | measure(rows) | {"tokens/s": speed, "kinds": {}}
        result["greedy"] = measure([[judge(p, r, engine.tokenizer)] for p, [r] in zip(problems, greedy)])["accuracy"]
        for kind in dict.fromkeys(p.kind for p in problems):
            result["kinds"][kind] = measure([rs for rs in rows if rs[0]["kind"] == kind])
        result["logprob gap"] = agreement(engine, problems, mode, args, rollouts)
        responses += [json.dumps({"checkpoint": path, "mode": mode, **row}) + "\n" for rs in rows for row in rs]
        if mode == "parallel":
            traces = [
                (f"{p.question}   ({path}: {len(r.ids)} tokens, critical path {r.critical_path})", response_text(engine.tokenizer, r.ids))
                for p, [r] in list(zip(problems, greedy))[: 2 * len(KINDS)]
            ]
            if writes:
                write_atomic(out / "trace.html", lambda file: file.write_text(trace_page(traces)))
        outcomes.append(np.array([[row["right"] for row in rs] for rs in rows], dtype=float))
        for name, earlier in (("minus row above", outcomes[-2:-1]), ("minus first row", outcomes[:-1][:1])):  # paired: the same problems
            result[name] = mean_and_ci(outcomes[-1] - earlier[0]) if earlier else None
        judged.append(result)
        engines.append((engine, mode))

    for result, seconds in zip(judged, time_to_answer(engines, problems, args, device)):
        result["seconds to answer"] = seconds

    # ---- report ----
    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    rows = [
        {
            "checkpoint": r["checkpoint"], "mode": r["mode"], "accuracy %": f"{percent(r['accuracy'])} ±{percent(r['accuracy ci95'])}",
            **({"best@k %": percent(r["best@k"])} if args.k > 1 else {}),
            **{key: f"{100 * r[key][0]:+.1f} ±{percent(r[key][1])}" if r[key] else "-" for key in ("minus row above", "minus first row")},
            "greedy %": percent(r["greedy"]), "valid %": percent(r["valid"]), "parallel %": percent(r["parallel"]), "plans": f"{r['plans']:.1f}",
            "tokens": f"{r['tokens']:.0f}", "crit. path": f"{r['critical path']:.0f}", "tokens/path": f"{r['tokens/path']:.2f}",
            "tokens/s": f"{r['tokens/s']:.0f}", "s/answer": f"{r['seconds to answer']:.3f}", "logp gap": f"{r['logprob gap']:.0e}",
        }
        for r in judged
    ]  # fmt: skip
    by_kind = [
        {"checkpoint": r["checkpoint"], "mode": r["mode"]}
        | {f"{kind} {name}": text for kind, m in r["kinds"].items() for name, text in (
               ("acc %", f"{percent(m['accuracy'])} ±{percent(m['accuracy ci95'])}"), ("valid %", percent(m["valid"])), ("tok/path", f"{m['tokens/path']:.2f}"))}
        for r in judged
    ]  # fmt: skip
    collapse = [
        {"checkpoint": r["checkpoint"], "mode": r["mode"]}
        | {f"{key} %": percent(r[key]) for key in ("single-plan blocks", "copied steps", "empty steps", "answer in a plan")}
        | {f"plans by {kind} parts": "  ".join(f"{parts}: {n:.1f}" for parts, n in m["plans by parts"].items()) for kind, m in r["kinds"].items()}
        for r in judged
        if r["plans"]
    ]
    head = f"{len(problems)} {args.split} problems, {args.k} sample(s) at temperature {args.temperature}, greedy on the first {len(greedy)}, device {device}"
    text = f"{head}\n\n{table(rows)}\n\n{table(by_kind)}\n" + (f"\n{table(collapse)}\n" if collapse else "")
    print("\n" + text)
    if not writes:
        return
    write_atomic(out / "responses.jsonl", lambda file: file.write_text("".join(responses)))
    (out / "eval.txt").write_text(text)
    report = {"args": vars(args), "torch": torch.__version__, "device": str(device), "checkpoints": judged}
    write_atomic(out / "eval.json", lambda file: file.write_text(json.dumps(report, indent=2) + "\n"))


if __name__ == "__main__":
    run_main(main)

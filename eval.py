r"""The judge: any number of checkpoints, side by side, on problems none of them was trained on.

In : checkpoint folders.
Out: a table, and in --out: eval.json, eval.txt, responses.jsonl, trace.html (for a browser).

    python eval.py                 # the four that were trained here, or are shipped, on a sample
    python eval.py out/stage0 out/stage1 out/stage2 out/stage3
    python eval.py out/stage3 out/stage3_seq --split hard --n 100 --out out/hard
    python eval.py out/stage3 --kind chains --depth 12 --width 4    # one rung
    python eval.py out/npr --bench aime25 math500 --k 8 --out out/real    # real problems, resumable

Each checkpoint is decoded in the mode it was made for: a base is asked plainly, and asked for the
format; a stage-1 checkpoint and the sequential twins decode sequentially under the format prompt;
stages 2 and 3 decode in parallel.  `path=plain`, `path=format` and `path=parallel` choose by hand.
docs/metrics.md explains the metrics; docs/figures.py makes pictures and tables of many runs.
"""

import json
import math
import time
from collections import Counter
from pathlib import Path
from urllib.parse import quote

import numpy as np  # torch decodes, numpy counts
import torch
from tqdm import tqdm

from engine import TAGS, Engine, Example, batches, token_logprobs, trace, trace_page
from stage0_model import KIND_CHOICES, KINDS, SPLITS, make_problems, step_errors  # made problems
from stage0_model import PLAIN_PROMPT, REAL_PLAIN_PROMPT, read_problems, read_prompt  # real ones, prompts
from stage0_model import checkpoint_folder, finished, last_boxed, load, prompt_ids, response_text  # models
from stage0_model import DTYPES, device_name, natural_int, nonempty, not_negative, positive_fraction  # flags
from stage0_model import positive_int, read_arguments, seed_int
from stage0_model import UserError, fingerprint, from_all_ranks, hold, my_share, pick_device, ranks  # the run
from stage0_model import old_name, read_jsonl, read_object, run_main, write_text
from stage1_zero import parse_response

# ==================================================================================================
# 1. What is judged: one response, then all of a checkpoint's
# ==================================================================================================


def judge(problem, rollout, tokenizer):
    """What is kept of a response: {problem, response, right, valid, ..}, ready for jsonl."""
    text = response_text(tokenizer, rollout.ids)
    parsed = parse_response(text)
    boxed = last_boxed(text)
    return {
        "problem": problem.question,
        "kind": problem.kind,
        "answer": problem.answer,
        "response": text,
        "right": problem.verify(text),
        "false": step_errors(problem, text),  # what it states and is not so
        # A response that was cut off is not valid, however perfect its text.
        "valid": rollout.finish_reason == "stop" and not parsed.violations,
        "finish_reason": rollout.finish_reason,
        "error": rollout.error,
        "tokens": len(rollout.ids),
        "critical_path": rollout.critical_path,
        "branches": rollout.max_branches,
        "plans": sum(len(plans) for plans, _, _ in parsed.blocks),
        "parts": parts_of(problem),
        # Signs of collapse: blocks that have nothing to fork; steps that repeat another of their
        # block, or say nothing; an answer that stands in a plan before it is worked out.
        "blocks": len(parsed.blocks),
        "single_plan_blocks": sum(len(plans) == 1 for plans, _, _ in parsed.blocks),
        "steps": sum(len(steps) for _, steps, _ in parsed.blocks),
        "copied_steps": sum(len(steps) - len(set(steps)) for _, steps, _ in parsed.blocks),
        "empty_steps": sum(len(step) < 10 for _, steps, _ in parsed.blocks for step in steps),
        "answer_in_plan": bool(boxed)
        and boxed not in problem.question
        and any(boxed in plan for plans, _, _ in parsed.blocks for plan in plans),
    }


def judge_all(problems, rollouts, tokenizer):
    """Of every problem the rows that `judge` gives its k rollouts."""
    return [[judge(p, r, tokenizer) for r in rs] for p, rs in zip(problems, rollouts)]


def parts_of(problem):
    """How many parts a made problem has: its chains, its terms, the first moves that lead to a
    countdown's target, the people of a story, or the things on sale.  None for a real problem.
    """
    return len(problem.parts.get("labels", [])) or problem.parts.get("leading")


def mean_and_ci(values_per_problem):
    """Mean over problems of each one's mean over its samples, and the half-width of its 95 %
    interval (normal, n problems).

    [[1, 0], [1, 1]] -> mean of 0.5 and 1.0 is 0.75; std 0.354 / sqrt(2) * 1.96 = 0.49
    """
    means = np.array([np.mean(values) for values in values_per_problem], dtype=float)
    interval = float(1.96 * means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return float(means.mean()), interval


def pass_at(n, right, k):
    """Chance that k of n samples, of which so many are right, hold a right one: unbiased pass@k
    (arXiv 2107.03374, eq. 1).

    n 4, right 1, k 2 -> 1 - C(3, 2) / C(4, 2) = 0.5
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows):
    """Is the answer that most samples of a problem box a right one?  A tie goes to the earlier; a
    sample without a box has no vote."""
    boxed = [(answer, row["right"]) for row in rows if (answer := last_boxed(row["response"])) is not None]
    votes = Counter(answer for answer, _ in boxed)
    return max(boxed, key=lambda pair: votes[pair[0]], default=("", False))[1]  # the first of equals


def measure(judged):
    """Metrics of one checkpoint in one mode (docs/metrics.md).  judged: as of `judge_all`."""
    flat = [row for rows in judged for row in rows]

    def mean(key, rows=flat):
        return float(np.mean([row[key] for row in rows]))

    def share(key, of):
        return sum(row[key] for row in flat) / max(1, sum(row[of] for row in flat))

    # Right answers: the mean of all samples, and problems that any of their k samples solves.
    accuracy, ci = mean_and_ci([[row["right"] for row in rows] for rows in judged])
    return {
        "accuracy": accuracy,
        "accuracy ci95": ci,
        # Right for the right reason: nothing false on the way.  (Older rows do not say.)
        "right and sound": float(np.mean([row["right"] and not row.get("false") for row in flat])),
        "best@k": float(np.mean([any(row["right"] for row in rows) for rows in judged])),
        "majority@k": float(np.mean([majority(rows) for rows in judged])),
        # Of fewer samples than were drawn: what more tries would buy, 1, 2, 4, .. up to all.
        "pass@": {
            n: float(np.mean([pass_at(len(rows), sum(row["right"] for row in rows), n) for rows in judged]))
            for n in (2**i for i in range(len(judged[0]).bit_length()))
        },
        "valid": mean("valid"),
        "parallel": float(np.mean([row["branches"] >= 2 for row in flat])),
        "plans": mean("plans"),
        # Work, and how long it takes when every branch has a machine of its own.
        "tokens": mean("tokens"),
        "critical path": mean("critical_path"),
        "tokens/path": mean("tokens") / mean("critical_path"),
        # Of all blocks and of all steps together, so that a long response weighs more.
        "single-plan blocks": share("single_plan_blocks", "blocks"),
        "copied steps": share("copied_steps", "steps"),
        "empty steps": share("empty_steps", "steps"),
        "answer in a plan": mean("answer_in_plan"),
        # Whoever looks at the problem makes as many plans as it has parts (0: no way to a target).
        "plans by parts": {
            parts: mean("plans", [row for row in flat if row["parts"] == parts])
            for parts in sorted({row["parts"] for row in flat} - {None})
        },
    }


# ==================================================================================================
# 2. Decoding a checkpoint in the mode it was made for
# ==================================================================================================


def modes_of(spec):
    """The modes a checkpoint is judged in: 'out/stage2' -> [('out/stage2', 'parallel')].

    'out/stage2=format' chooses by hand.  Raises UserError for a mode that does not exist.
    """
    # A path may hold = itself, as runs/lr=1e-4/stage0: a mode has no slash, and a folder no mode.
    path, _, mode = spec.rpartition("=")
    if not path or "/" in mode or Path(spec).is_dir():
        path, mode = spec, ""
    if mode not in ("", "plain", "format", "parallel"):
        raise UserError(f"{spec}: unknown mode {mode!r}, expected one of plain, format, parallel")
    made = read_object(Path(path) / "args.json", {})
    vocabulary = next((file.read_text("utf-8") for file in Path(path).glob("tokenizer.json")), "")

    # Tags that are tokens, unless it is a twin: parallel.  Trained on top of something, and not on
    # a corpus (as in stage 0, whatever that began with): not a base.
    modes = ["format"] if "init" in made and "valid_share" not in made else ["plain", "format"]
    if json.dumps(TAGS[0]) in vocabulary and not made.get("sequential"):
        modes = ["parallel"]
    return [(path, mode) for mode in ([mode] if mode else modes)]


def system_prompt(engine, mode, args):
    """What precedes the question in a mode: asked plainly, or for the format as in training."""
    if mode == "plain":
        return REAL_PLAIN_PROMPT if args.bench else PLAIN_PROMPT
    return read_prompt(args.prompt_file, args.bench, engine.tokenizer.name_or_path)


def decode(engine, problems, mode, args, k=1, temperature=1.0, progress=True):
    """k rollouts of every problem in a mode: a list of lists of Rollout.  Each rank decodes its
    share of the problems; all get all.
    """
    system = system_prompt(engine, mode, args)
    prompts = [prompt_ids(engine.tokenizer, p.question, system) for p in my_share(problems)]
    # Shares are stretches of the list, so the rollouts of all ranks in turn are in its order.
    return from_all_ranks(
        engine.generate(
            prompts,
            n=k,
            copies=[p.copy for p in my_share(problems)],
            parallel=mode == "parallel",
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            top_p=args.top_p,  # 1: all of the distribution
            seed=args.seed,
            progress=progress,
        )
    )


def time_to_answer(contestants, problems, args):
    """Mean seconds to a greedy answer of each (engine, mode), one problem at a time.

    All contestants in turn, so that whatever else the machine does hits all alike.  The first
    problem warms up and does not count; on a GPU a first pass over all of them, because each may
    meet step sizes whose graphs are not captured yet.
    """
    seconds = [[] for _ in contestants]
    order = problems[: args.timed + 1] if args.timed else []
    passes = 2 if contestants[0][0].model.device.type == "cuda" else 1
    warm = len(order) if passes == 2 else 1

    # a contestant's turn: one answer, alone
    for problem in tqdm(order * passes, desc="time to answer", leave=False):
        for (engine, mode), times in zip(contestants, seconds):
            began = time.perf_counter()
            decode(engine, [problem], mode, args, temperature=0.0, progress=False)
            times.append(time.perf_counter() - began)
    return [float(np.mean(times[warm:])) if len(times) > warm else float("nan") for times in seconds]


@torch.no_grad()
def agreement(engine, problems, mode, args, rollouts, most=200):
    """Largest difference between the engine's log-probabilities and those of a training forward,
    over the sampled tokens of `most` rollouts.
    """
    system = system_prompt(engine, mode, args)
    pairs = [(p, r) for p, rs in zip(problems, rollouts) for r in rs][:most]
    examples = [Example(prompt_ids(engine.tokenizer, p.question, system), r.ids, r.layout) for p, r in pairs]
    worst = 0.0
    for rows, ids, batch_layout, mask in batches(examples, 2_048, engine.model.device):
        theirs = torch.tensor([x for i in rows for x in pairs[i][1].logprobs])  # (response tokens,)
        gap = token_logprobs(engine.model, ids, batch_layout)[0][mask].cpu() - theirs
        sampled = ~torch.tensor([x for i in rows for x in pairs[i][1].forced])
        worst = max(worst, gap[sampled].abs().max().item())
    return worst


def judged_rows(engine, path, weights, mode, name, problems, args, k=1, temperature=0.0):
    """A checkpoint's rows on one set of problems, as of `judge_all`.  weights: its fingerprint.

    They are kept in <out>/<name>/<checkpoint>=<mode>.jsonl, after a line of settings: a run killed
    and begun again with the same settings goes on where it was, one with others begins anew and
    leaves the old file beside the new one.
    """
    path = str(Path(path))
    settings = {
        "k": k,
        "temperature": temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        # what is judged, and on what, by content: it may be trained anew behind the same path
        "checkpoint": path,
        "mode": mode,
        "dtype": args.dtype,
        "weights": weights,
        "problems": fingerprint(problems),
        "prompt": system_prompt(engine, mode, args),
    }

    # Problems are written in order, k rows each.  What follows a row that a kill cut off, or that
    # is damaged, is done again.
    file = Path(args.out) / name / f"{quote(path, safe='')}={mode}.jsonl"
    there, *rows = read_jsonl(file) or [settings]
    if there != settings:
        if ranks()[0] == 0:
            file.rename(old_name(file.with_suffix("")))
        rows = []
    done = 0  # rows, then problems, that are whole and in order
    while done < len(rows) and rows[done].get("number") == done // k:
        done += 1
    done //= k
    rows = rows[: done * k]
    from_all_ranks([])  # every rank has read the file before it is put in order
    write(file, "".join(json.dumps(line) + "\n" for line in [settings, *rows]))

    # Between two writes there are as many problems as keep the engine busy.
    kept = f", {done} kept" if done else ""
    print(f"{path} ({mode}): {len(problems)} problems of {name}, {k} samples each{kept}")
    size = max(1, (64 if args.bench else 512) // k) * ranks()[1]
    for first in tqdm(range(done, len(problems), size), desc=name):
        began = time.time()
        chosen = problems[first : first + size]
        rollouts = decode(engine, chosen, mode, args, k, temperature)
        more = {"seconds": round((time.time() - began) / len(chosen) / k, 6), "logprob_gap": 0.0}
        if first == 0 and not args.bench:
            more["logprob_gap"] = agreement(engine, chosen, mode, args, rollouts)
        for i, fresh in enumerate(judge_all(chosen, rollouts, engine.tokenizer), first):
            rows += [{"number": i, **row, **more} for row in fresh]
        # Appended: a file of long responses is too long to be written anew each time.
        if ranks()[0] == 0:
            with open(file, "a", encoding="utf-8") as responses:
                responses.writelines(json.dumps(row) + "\n" for row in rows[first * k :])
    return [rows[i : i + k] for i in range(0, len(rows), k)]


def same_in_every_run(row):
    """A row without what differs from run to run: equal evaluations write equal responses.jsonl."""
    return {key: row[key] for key in row if key not in ("number", "seconds", "logprob_gap")}


def judge_checkpoint(path, mode, problems, args, device):
    """Judge a checkpoint in a mode: all problems k times at --temperature, the first ones greedily.

    Returns ((engine, mode), result, judged, traces): result goes into the tables and eval.json,
    judged is as of `judge_all`, traces are greedy responses for trace.html.
    """
    engine = Engine(*load(path, device, getattr(torch, args.dtype, None)))
    weights = fingerprint(checkpoint_folder(path))
    judged = judged_rows(engine, path, weights, mode, args.split, problems, args, args.k, args.temperature)
    greedy = judged_rows(engine, path, weights, mode, f"{args.split}-greedy", problems[: args.greedy], args)

    # What parallel thought can do differs by kind of problem, so each is measured by itself too.
    flat = sum(judged, [])  # the rows of all problems
    best, best_ci = mean_and_ci([[row["right"] for row in rows] for rows in greedy])
    result = {
        "checkpoint": path,
        "mode": mode,
        **measure(judged),
        "tokens/s": sum(row["tokens"] for row in flat) / sum(row["seconds"] for row in flat),
        # nan: too few problems are decoded greedily to have one of this kind
        "kinds": {
            kind: measure([rows for rows in judged if rows[0]["kind"] == kind])
            | {"greedy": np.mean([row["right"] for [row] in greedy if row["kind"] == kind] or [np.nan])}
            for kind in dict.fromkeys(p.kind for p in problems)
        },
        "greedy": best,
        "greedy ci95": best_ci,
        "logprob gap": max(row["logprob_gap"] for row in flat),
    }

    # The first problems are decoded greedily once more: the page replays rollouts, and the files
    # keep only texts.
    traces = []
    shown = problems[: 2 * len(KINDS)]
    for problem, [rollout] in zip(shown, decode(engine, shown, mode, args, temperature=0.0, progress=False)):
        prompt = prompt_ids(engine.tokenizer, problem.question, system_prompt(engine, mode, args))
        right = problem.verify(response_text(engine.tokenizer, rollout.ids))
        verdict = "right" if right else f"wrong, {problem.answer} is right"
        traces.append(trace(engine.tokenizer, rollout, prompt, problem.question, f"{path} ({mode})", verdict))
    return (engine, mode), result, judged, traces


def compare(results, judged):
    """Add to each result how its accuracy differs from that of the row above and of the first row.

    Both answered the same problems, so the differences are paired: their intervals are narrower.
    """
    right = [np.array([[row["right"] for row in rows] for rows in each], dtype=float) for each in judged]
    for i, result in enumerate(results):
        result["minus row above"] = mean_and_ci(right[i] - right[i - 1]) if i else None
        result["minus first row"] = mean_and_ci(right[i] - right[0]) if i else None


# ==================================================================================================
# 3. The report
# ==================================================================================================


def cells(result, columns):
    """{heading: template} filled in from a result; a share becomes a percentage without its sign.

    {"accuracy": 0.5}, {"accuracy %": "{accuracy:.1%}"} -> {"accuracy %": "50.0"}
    """
    return {name: template.format_map(result).replace("%", "") for name, template in columns.items()}


NAMES = {"checkpoint": "{checkpoint}", "mode": "{mode}"}


def main_row(result, k):
    """A checkpoint's row of the first table: how often right, how parallel, how fast."""
    first = result["minus first row"] is None
    columns = NAMES | {
        "accuracy %": "{accuracy:.1%} ±{accuracy ci95:.1%}",
        "right and sound %": "{right and sound:.1%}",
        **({"best@k %": "{best@k:.1%}", "majority@k %": "{majority@k:.1%}"} if k > 1 else {}),
        "minus row above": "-" if first else "{minus row above[0]:+.1%} ±{minus row above[1]:.1%}",
        "minus first row": "-" if first else "{minus first row[0]:+.1%} ±{minus first row[1]:.1%}",
        "greedy %": "{greedy:.1%} ±{greedy ci95:.1%}",
        "valid %": "{valid:.1%}",
        "parallel %": "{parallel:.1%}",
        "plans": "{plans:.1f}",
        # Decoded sequentially, a response has as many dependent tokens as tokens.
        "tokens": "{tokens:.0f}",
        "crit. path": "{critical path:.0f}",
        "tokens/path": "{tokens/path:.2f}",
        "tokens/s": "{tokens/s:.0f}",
        "s/answer": "{seconds to answer:.3f}",
        "logp gap": "{logprob gap:.0e}",
    }
    return cells(result, columns)


def kinds_row(result):
    """A checkpoint's row of the second table: each kind of problem by itself."""
    row = cells(result, NAMES)
    for kind, measured in result["kinds"].items():
        row |= cells(
            measured,
            {
                f"{kind} acc %": "{accuracy:.1%} ±{accuracy ci95:.1%}",
                f"{kind} greedy %": "{greedy:.1%}",
                f"{kind} sound %": "{right and sound:.1%}",  # right, and nothing false on the way
                f"{kind} valid %": "{valid:.1%}",
                f"{kind} tok/path": "{tokens/path:.2f}",
            },
        )
    return row


def collapse_row(result):
    """A checkpoint's row of the third table: signs that its plans have become a mere habit."""
    columns = NAMES | {
        "single-plan blocks %": "{single-plan blocks:.1%}",
        "copied steps %": "{copied steps:.1%}",
        "empty steps %": "{empty steps:.1%}",
        "answer in a plan %": "{answer in a plan:.1%}",
    }
    # "2: 2.0  3: 3.0  4: 4.0" is a model that makes one plan for every part.
    return cells(result, columns) | {
        f"plans by {kind} parts": "  ".join(
            f"{n}: {plans:.1f}" for n, plans in of_kind["plans by parts"].items()
        )
        for kind, of_kind in result["kinds"].items()
    }


def table(rows):
    """Rows of {column: text} as aligned plain text; the columns are those of the first row."""
    columns = []
    for heading in rows[0]:
        texts = [row[heading] for row in rows]
        width = max(map(len, [heading, *texts]))
        side = ">" if columns else "<"  # names to the left, numbers to the right
        columns.append([f"{text:{side}{width}}" for text in [heading, "-" * width, *texts]])
    return "\n".join("  ".join(line) for line in zip(*columns))


def write(path, text):
    """Rank 0 writes a whole file, or none."""
    if ranks()[0] == 0:
        write_text(path, text)


def publish(text, path, args, device, **results):
    """Print a report, and write it to <path>.txt and, with all its numbers, to <path>.json."""
    print("\n" + text)
    write(path.with_suffix(".txt"), text)
    settings = {"args": vars(args), "torch": torch.__version__, "device": str(device)}
    write(path.with_suffix(".json"), json.dumps(settings | results, indent=2) + "\n")


# How the files that are written begin: another that has such a name is not written over.
REPORTS = {
    "eval.json": '{\n  "args"',
    "bench.json": '{\n  "args"',
    "responses.jsonl": '{"checkpoint"',
    "trace.html": "<!doctype html>",
}

# The paper's eight: file in --bench-dir, else hub name.  ZebraLogic's public version has its
# solutions masked.
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

# fmt: off
ARGUMENTS = (
    ("checkpoints",      nonempty,          None,      "folders or hub names, each optionally with =plain, =format or =parallel", {"nargs": "*"}),
    ("--out",            nonempty,          "out",     "folder for eval.json, eval.txt, responses.jsonl and trace.html"),
    ("--kind",           KIND_CHOICES,      "all",     "problems to judge on"),
    ("--split",          SPLITS,            "heldout", "tune is for choosing settings, heldout for reporting"),
    ("--depth",          natural_int,       0,         "only problems of this depth, of any reach (stage0_model.RUNGS); 0: the split's own"),
    ("--width",          natural_int,       0,         "only problems of this width, likewise"),
    ("--n",              positive_int,      1002,      "problems, all kinds together"),
    ("--k",              positive_int,      1,         "samples per problem at --temperature"),
    ("--temperature",    not_negative,      1.0,       "of the sampled columns; a greedy column stands beside them"),
    ("--greedy",         positive_int,      1002,      "how many of the problems are decoded greedily too"),
    ("--max-new-tokens", positive_int,      896,       "response budget in tokens, all branches together"),
    ("--top-p",          positive_fraction, 1.0,       "sample from the smallest set of tokens with this probability (paper: 0.7)"),
    ("--bench",          BENCHES,           [],        "judge on these real benchmarks instead of made problems", {"nargs": "+"}),
    ("--bench-dir",      str,               "",        "folder with their files; a benchmark without a file there comes from the hub"),
    ("--first",          natural_int,       0,         "only so many problems of each benchmark, 0 for all"),
    ("--prompt-file",    str,               "",        "text that asks for the format; default: the checkpoint's own, or assets/format_prompt.txt"),
    ("--dtype",          DTYPES,            "auto",    "of the weights; auto: what config.json says"),
    ("--timed",          natural_int,       12,        "problems decoded alone (batch 1), every checkpoint in turn, for time to answer"),
    ("--seed",           seed_int,          1234,      "of the problems and the sampling"),
    ("--device",         device_name,       "auto",    "auto, cpu, cuda, cuda:1 .."),
)
# fmt: on

# Other defaults where no checkpoint is named: a look that takes a minute or two, in a folder of its
# own, because make takes out/eval.json for the whole evaluation.
SAMPLE = {"--out": "out/sample", "--n": 240, "--greedy": 120}


def parse_args(argv=None):
    args = read_arguments(__doc__, ARGUMENTS, argv)
    if not args.checkpoints:
        # read anew, so that what was given on the command line still counts
        flags = [(flag, kind, SAMPLE.get(flag, given), *more) for flag, kind, given, *more in ARGUMENTS]
        args = read_arguments(__doc__, flags, argv)
        args.checkpoints = finished("stage0", "stage1", "stage2", "stage3")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    pairs = [pair for spec in args.checkpoints for pair in modes_of(spec)]
    for path, _ in pairs:
        checkpoint_folder(path)  # fail now, not after an hour
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if ranks()[0] == 0:
        hold(Path(args.out).resolve())
    for name, start in REPORTS.items():
        file = Path(args.out) / name
        if file.is_file() and not file.read_bytes().startswith(start.encode()):
            raise UserError(f"{file} was not written by this script; give --out another folder")
    if args.bench:
        return run_benches(args, device)

    # ---- judge: every checkpoint in every mode it is made for, all on the same problems ----
    rung = {"depth": args.depth, "width": args.width}  # 0: the split's own
    problems = make_problems(args.kind, args.split, args.n, args.seed, **rung)
    judgements = [judge_checkpoint(path, mode, problems, args, device) for path, mode in pairs]
    contestants, results, judged, traces = zip(*judgements)
    compare(results, judged)
    for result, seconds in zip(results, time_to_answer(contestants, problems, args)):
        result["seconds to answer"] = seconds

    # ---- report: eval.json comes last, because make takes it for the sign that all is there ----
    responses = [
        json.dumps({"checkpoint": path, "mode": mode, **same_in_every_run(row)}) + "\n"
        for (path, mode), each in zip(pairs, judged)
        for row in sum(each, [])  # the rows of all problems
    ]
    write(Path(args.out) / "responses.jsonl", "".join(responses))
    write(Path(args.out) / "trace.html", trace_page(sum(traces, [])))
    asked = "".join(f" of {name} {size}" for name, size in rung.items() if size)
    head = (
        f"{len(problems)} {args.split} problems{asked}, "
        f"{args.k} sample(s) at temperature {args.temperature}, "
        f"greedy on the first {min(args.greedy, args.n)}, device {device}"
    )
    tables = [
        [main_row(result, args.k) for result in results],
        [kinds_row(result) for result in results],
        [collapse_row(result) for result in results if result["plans"]],  # none where nobody plans
    ]
    text = "\n\n".join([head, *(table(rows) for rows in tables if rows)]) + "\n"
    publish(text, Path(args.out) / "eval", args, device, checkpoints=results)


# ==================================================================================================
# 4. Real benchmarks
# ==================================================================================================


def run_benches(args, device):
    """Every checkpoint on every benchmark of --bench: responses, a table, and <out>/bench.json."""
    sets = {}
    for name in args.bench:
        file_name, hub_name = BENCHES[name]
        file = Path(args.bench_dir) / file_name
        source = str(file) if args.bench_dir and file.is_file() else hub_name
        sets[name] = read_problems(source)[: args.first or None]

    results = []
    for spec in args.checkpoints:
        path, mode = modes_of(spec)[-1]  # the format, where a base could be asked either way
        engine = Engine(*load(path, device, getattr(torch, args.dtype, None)))
        weights = fingerprint(checkpoint_folder(path))
        if path == spec and not Path(path).is_dir() and TAGS[0] in engine.tokenizer.get_vocab():
            mode = "parallel"  # a checkpoint of the hub that has the tags
        # What parallel decoding has to beat is the same weights decoding sequentially.
        contestants = [(engine, mode), (engine, "format")] if mode == "parallel" else [(engine, mode)]
        for name, problems in sets.items():
            judged = judged_rows(engine, path, weights, mode, name, problems, args, args.k, args.temperature)
            flat = sum(judged, [])  # the rows of all problems
            times = time_to_answer(contestants, problems, args)
            result = {
                "bench": name,
                "checkpoint": path,
                "mode": mode,
                **measure(judged),
                "tokens/s": sum(row["tokens"] for row in flat) / sum(row["seconds"] for row in flat),
                "seconds to answer": times[0],
                "seconds to answer, sequentially": times[-1],
            }
            results.append(result)
        del engine, contestants  # before the next one is loaded

    # tokens/s is of a whole batch; the last two columns are of one answer at a time.
    columns = {
        "bench": "{bench}",
        **NAMES,
        f"avg@{args.k} %": "{accuracy:.1%} ±{accuracy ci95:.1%}",
        f"best@{args.k} %": "{best@k:.1%}",
        "valid %": "{valid:.1%}",
        "parallel %": "{parallel:.1%}",
        "tokens": "{tokens:.0f}",
        "crit. path": "{critical path:.0f}",
        "tokens/path": "{tokens/path:.2f}",
        "tokens/s": "{tokens/s:.0f}",
        "s/answer": "{seconds to answer:.2f}",
        "sequentially": "{seconds to answer, sequentially:.2f}",  # the same weights, one branch
    }
    rows = [cells(result, columns) for result in results]
    text = f"{args.k} sample(s) at temperature {args.temperature}, device {device}\n\n{table(rows)}\n"
    publish(text, Path(args.out) / "bench", args, device, results=results)


if __name__ == "__main__":
    run_main(main)

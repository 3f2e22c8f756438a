"""What the project claims about learning, as docs/results.md, from what the judge has kept.

    make evidence                      # every run and judgement below, then this
    python docs/evidence.py out        # the page anew, from what is there

Nothing is trained or decoded here: each table is made from judged responses, one line each, that
eval.py left in folders of `out`.  README's own table is written too.  A table whose runs are not
there stays as it was, which is printed.
Intervals are 95 %, normal, over problems; differences are paired, problem by problem; where there
are several seeds, a problem counts with the mean of its seeds.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the six files lie one folder up

from eval import majority, mean_and_ci, pass_at  # noqa: E402
from stage0_model import KINDS, WORD_KINDS, UserError, read_jsonl, read_object, run_main, write_text  # noqa: E402

# ==================================================================================================
# 1. Judged responses
# ==================================================================================================


def judged(folder, name="heldout"):
    """{(checkpoint, mode): {problem: [row, ..]}} of one evaluation's set of problems.

    checkpoint is the last part of its path; rows are as of `eval.judge`; {} where the evaluation has
    not ended.  Raises UserError where two checkpoints have one name.
    """
    found = {}
    if not (Path(folder) / "eval.json").is_file():
        return found
    for file in sorted((Path(folder) / name).glob("*.jsonl")):
        path, _, mode = unquote(file.stem).rpartition("=")
        problems = defaultdict(list)
        for row in read_jsonl(file)[1:]:  # the first line holds the settings
            problems[row["problem"]].append(row)
        if (Path(path).name, mode) in found:
            raise UserError(f"{file}: a second judgement of {Path(path).name}={mode}; move one of them away")
        found[Path(path).name, mode] = problems
    return found


def right(row):
    return row["right"]


def sound(row):
    """Right, and nothing false on the way."""
    return row["right"] and not row["false"]


def values(problems, of=right, kind=None):
    """{problem: mean of `of` over its rows}, of one kind or of all."""
    return {
        problem: float(np.mean([of(row) for row in rows]))
        for problem, rows in problems.items()
        if kind is None or rows[0]["kind"] == kind
    }


def over_seeds(runs, **which):
    """{problem: mean over seeds} of the `values` of several runs on the same problems."""
    each = [values(run, **which) for run in runs]
    return {problem: float(np.mean([run[problem] for run in each])) for problem in each[0]}


def percent(by_problem):
    """'87.1 ±2.0'"""
    mean, interval = mean_and_ci([[value] for value in by_problem.values()])
    return f"{100 * mean:.1f} ±{100 * interval:.1f}"


def difference(a, b):
    """'+12.3 ±3.1': a minus b, paired over the problems that both have answered."""
    common = [problem for problem in a if problem in b]
    mean, interval = mean_and_ci([[a[problem] - b[problem]] for problem in common])
    return f"{100 * mean:+.1f} ±{100 * interval:.1f}"


def markdown(rows):
    """Rows of {column: text} as a table of markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ==================================================================================================
# 2. The tables
# ==================================================================================================

STAGES = {
    ("stage0", "plain"): "base, asked plainly",
    ("stage0", "format"): "base, asked for the format",
    ("stage1", "format"): "stage 1, NPR-ZERO",
    ("stage2", "parallel"): "stage 2, NPR-BETA",
    ("stage3", "parallel"): "stage 3, NPR",
}
BASE, BETA, NPR = ("stage0", "plain"), ("stage2", "parallel"), ("stage3", "parallel")
ZERO, SR_BETA, SR = ("stage1", "format"), ("stage2_seq", "format"), ("stage3_seq", "format")
LABELS = STAGES | {SR_BETA: "SR-BETA, sequentially", SR: "SR, sequentially"}


def seed_folders(out):
    """Where stages 1-3 of each seed lie, seed 0 in `out` itself, if they have been judged."""
    folders = [out, *sorted(out.glob("seed*"))]
    return [folder for folder in folders if (folder / "eval.json").is_file()]


def seeds_of(out):
    """Judgements of the same problems with stages 1-3 of each seed, as ([sampled ..], [greedy ..])."""
    folders = seed_folders(out)
    return [judged(f) for f in folders], [judged(f, "heldout-greedy") for f in folders]


def of_seeds(name, sampled, greedy):
    """A checkpoint's sampled and greedy runs, one a seed; all its sampled rows; means over these."""
    runs = [run[name] for run in sampled if name in run]
    best = [run[name] for run in greedy if name in run]
    flat = [row for run in runs for rows in run.values() for row in rows]
    mean = {key: np.mean([row[key] for row in flat]) for key in ("valid", "tokens", "critical_path")}
    return runs, best, flat, mean


def forked_percent(rows):
    """How many responses to problems of two parts or more really forked: '99.7'."""
    forked = [row["branches"] >= 2 for row in rows if (row["parts"] or 2) >= 2]
    return f"{100 * np.mean(forked):.1f}"


def lengths(rows):
    """Mean tokens and critical path of responses, and their ratio, as columns of a table."""
    tokens, path = (np.mean([row[key] for row in rows]) for key in ("tokens", "critical_path"))
    return {
        "tokens": f"{tokens:.0f}",
        "critical path": f"{path:.0f}",
        "tokens/path": f"{tokens / path:.2f}",
    }


def stages_table(out):
    """Every checkpoint, the mean over seeds, and what it has gained over the base, greedily."""
    sampled, greedy = seeds_of(out)
    base = over_seeds([greedy[0][BASE]])
    rows = []
    for name, label in STAGES.items():
        runs, best, flat, mean = of_seeds(name, sampled, greedy)
        each = [100 * np.mean(list(values(run).values())) for run in best]
        rows.append(
            {
                "checkpoint": label,
                "seeds": len(runs),
                "greedy %": percent(over_seeds(best)),
                "range of seeds": f"{min(each):.1f} to {max(each):.1f}",
                "right and sound, greedily %": percent(over_seeds(best, of=sound)),
                "greedy minus base": "-" if name == BASE else difference(over_seeds(best), base),
                "at temperature 1 %": percent(over_seeds(runs)),
                "valid %": f"{100 * mean['valid']:.1f}",
                "parallel %, of 2 parts or more": forked_percent(flat) if name[1] == "parallel" else "-",
                **lengths(flat),
            }
        )
    return markdown(rows)


def results_table(out):
    """README's table: each checkpoint, mean over seeds, and how long one answer takes."""
    sampled, greedy = seeds_of(out)
    judgements = read_object(out / "eval.json")["checkpoints"]
    seconds = {(Path(r["checkpoint"]).name, r["mode"]): r["seconds to answer"] for r in judgements}
    rows = []
    for name, label in STAGES.items():
        runs, best, _, mean = of_seeds(name, sampled, greedy)
        rows.append(
            {
                "checkpoint": label,
                "greedy %": percent(over_seeds(best)),
                "sampled %": percent(over_seeds(runs)),
                "valid %": "-" if name == BASE else f"{100 * mean['valid']:.1f}",
                "tokens / critical path": f"{mean['tokens'] / mean['critical_path']:.2f}",
                "s/answer": f"{seconds[name]:.2f}",
            }
        )
    return markdown(rows)


def kinds_table(out):
    """The same by kind of problem, greedily."""
    _, greedy = seeds_of(out)
    rows = []
    for name, label in STAGES.items():
        runs = [run[name] for run in greedy if name in run]
        row = {"checkpoint": label}
        for kind in KINDS:
            best = over_seeds(runs, kind=kind)
            gain = difference(best, values(greedy[0][BASE], kind=kind))
            row[f"{kind} %"] = percent(best)
            row[f"{kind} minus base"] = "-" if name == BASE else gain
        rows.append(row)
    return markdown(rows)


def temperatures_table(out):
    """Each at every temperature on `tune`; then NPR at 1 against the others' best, held out."""
    found = temperatures(out)
    rows = []
    for name in (BASE, BETA, NPR):
        row = {"checkpoint": STAGES[name]}
        row |= {f"T = {t:g}": percent(found[name][t]) for t in sorted(found[name])}
        rows.append(row)
    text = markdown(rows)

    # The best of each by those problems, on held-out ones, seeds 0, 1 ..: the base has but one.
    sampled, _ = seeds_of(out)
    for name, folder in ((BASE, "best-base"), (BETA, "best")):
        best = by_seed(out, folder)
        pairs = [(run[NPR], there[name]) for run, there in zip(sampled, best) if name in there]
        if not pairs:
            continue
        ours, theirs = map(list, zip(*pairs))
        ours = [run[NPR] for run in sampled] if name == BASE else ours
        against = difference(over_seeds(ours), over_seeds(theirs))
        text += f"\n\nHeld out, NPR at temperature 1 minus {STAGES[name]} at its best, "
        text += f"{best_temperature(found, name):g}: {against} points ({len(ours)} seeds)."
    return text


def by_seed(out, name, problems="heldout"):
    """What was `judged` in one evaluation with each seed, in the order of `seeds_of`; {} where it has
    not ended.
    """
    folders = [(out / "evidence" if folder == out else folder) / name for folder in seed_folders(out)]
    return [judged(folder, problems) for folder in folders]


def temperatures(out):
    """{(checkpoint, mode): {temperature: {problem: value}}} on `tune`."""
    found = {}
    for folder in sorted((out / "evidence/temperature").glob("*")):
        for name, problems in judged(folder, "tune").items():
            found.setdefault(name, {})[float(folder.name)] = values(problems)
    return found


def best_temperature(found, name):
    """The temperature at which a checkpoint answers most problems of `tune`."""
    return max(found[name], key=lambda t: np.mean(list(found[name][t].values())))


def ladder_table(out):
    """Accuracy and unbiased pass@k by rung.  Answers are two digits, which 64 guesses can hit, so what
    also counts is how many samples are right and sound.
    """

    def passed(problems, of, k):
        return {q: pass_at(len(each), sum(map(of, each)), k) for q, each in problems.items()}

    rows = []
    judgements = (file.parent for file in (out / "evidence/ladder").glob("*/eval.json"))
    for folder in sorted(judgements, key=lambda f: (f.name[0], len(f.name), f.name)):
        sampled, greedy = judged(folder), judged(folder, "heldout-greedy")
        for name, problems in sampled.items():
            row = {"rung": folder.name, "checkpoint": LABELS[name]}
            row["greedy %"] = percent(values(greedy[name]))
            for k in (1, 16, 64):
                row[f"pass@{k} %"] = percent(passed(problems, right, k))
            for k in (1, 64):
                row[f"sound pass@{k} %"] = percent(passed(problems, sound, k))
            gain = difference(passed(problems, right, 64), passed(sampled[BETA], right, 64))
            row["pass@64 minus BETA's"] = "-" if name == BETA else gain
            rows.append(row)
    return markdown(rows)


def hard_table(out):
    """NPR and its sequential twin on the split `hard`: chains and sums longer than any in training."""
    folder = out / "evidence/hard"
    sampled, greedy = judged(folder, "hard"), judged(folder, "hard-greedy")
    rows = []
    for kind in (None, *KINDS):
        ours, theirs = (values(sampled[name], kind=kind) for name in (NPR, SR))
        row = {"problems": kind or "all", "NPR %": percent(ours), "SR %": percent(theirs)}
        row["NPR minus SR"] = difference(ours, theirs)
        best, their_best = (values(greedy[name], kind=kind) for name in (NPR, SR))
        row |= {"NPR, greedily %": percent(best), "SR, greedily %": percent(their_best)}
        row["NPR minus SR, greedily"] = difference(best, their_best)
        for label, name in (("NPR", NPR), ("SR", SR)):
            valid = values(sampled[name], of=lambda row: row["valid"], kind=kind)
            row[f"{label} valid %"] = f"{100 * np.mean(list(valid.values())):.1f}"
        rows.append(row)
    return markdown(rows)


CONTROLS = {
    "random": "random reward (`--reward random`)",
    "format": "format reward alone (`--reward format`)",
    "schema-filter": "malformed answers dropped (`--schema-filter`)",
    "rejection": "continued rejection fine-tuning from BETA",
    "stage3_seq": "stage 3 sequentially (SR)",
}


def controls_table(out):
    """What NPR is better than: the same rollouts and updates, another reward or another way."""
    folder = out / "evidence/controls"
    sampled, greedy = judged(folder), judged(folder, "heldout-greedy")
    rows = []
    for name, label in {"stage3": "NPR", **CONTROLS}.items():
        key = next((key for key in sampled if key[0] == name), None)
        if key:
            ours = values(sampled[NPR]), values(greedy[NPR])
            theirs = values(sampled[key]), values(greedy[key])
            row = {"run": label, "at temperature 1 %": percent(theirs[0]), "greedy %": percent(theirs[1])}
            row["valid %"] = percent(values(sampled[key], of=lambda row: row["valid"]))
            row["NPR minus it, at 1"] = "-" if key == NPR else difference(ours[0], theirs[0])
            row["NPR minus it, greedily"] = "-" if key == NPR else difference(ours[1], theirs[1])
            rows.append(row)
    return markdown(rows)


def starts_table(out):
    """BETA fine-tuned from ZERO, as here, and from the base, as the authors' script does."""
    folder = out / "evidence/starts"
    sampled, greedy = judged(folder), judged(folder, "heldout-greedy")
    other = ("stage2_base", "parallel")
    rows = []
    for name, label in ((BETA, "ZERO, `out/stage1`"), (other, "the base, `out/stage0`")):
        row = {"stage 2 starts from": label, "greedy %": percent(values(greedy[name]))}
        row["at temperature 1 %"] = percent(values(sampled[name]))
        row["valid %"] = percent(values(sampled[name], of=lambda row: row["valid"]))
        row["ZERO minus it, greedily"] = "-"
        if name == other:
            row["ZERO minus it, greedily"] = difference(values(greedy[BETA]), values(greedy[other]))
        rows.append(row)
    return markdown(rows)


def equal_cost_table(out):
    """Majority votes of 1, 4 and 8 answers, and what they cost beside one of NPR's: tokens of all k
    together; a path as long as one answer's, because they run side by side.
    """
    runs = judged(out / "evidence/votes")
    npr = runs[NPR]
    flat = [row for rows in npr.values() for row in rows]
    tokens = np.mean([row["tokens"] for row in flat])
    path = np.mean([row["critical_path"] for row in flat])
    rows = []
    for name, problems in runs.items():
        mine = [row for each in problems.values() for row in each]
        length = np.mean([row["tokens"] for row in mine])
        for k in (1, 4, 8):  # of two that differ the first wins, so two are no better than one
            if k <= len(next(iter(problems.values()))):
                voted = {q: float(majority(each[:k])) for q, each in problems.items()}
                rows.append(
                    {
                        "checkpoint": LABELS[name],
                        "votes": k,
                        "accuracy %": percent(voted),
                        "tokens": f"{k * length:.0f}",
                        "tokens / NPR's": f"{k * length / tokens:.2f}",
                        "longest path": f"{np.mean([row['critical_path'] for row in mine]):.0f}",
                        "path / NPR's": f"{np.mean([row['critical_path'] for row in mine]) / path:.2f}",
                    }
                )
    return markdown(rows)


def path_table(out):
    """What a reward for a short critical path buys, by its weight, greedily: every weight with the
    first seed, then the means of all seeds for the weights that were trained with all.
    """
    judgements = [judgement for judgement in by_seed(out, "path", "heldout-greedy") if judgement]
    runs = []  # (seeds, weight, {problem: rows} of each seed, the same of w = 0)
    for seeds in sorted({1, len(judgements)}):
        held = judgements[:seeds]
        common = [name for name in held[0] if all(name in judgement for judgement in held)]
        for name in sorted(common, key=lambda name: weight_of(name[0])):
            ours, without = ([judgement[key] for judgement in held] for key in (name, NPR))
            runs.append((seeds, weight_of(name[0]), ours, without))
    rows = []
    for seeds, weight, ours, without in runs:
        row = {"w": f"{weight:g}", "seeds": seeds, "accuracy %": percent(over_seeds(ours))}
        row["minus w = 0"] = difference(over_seeds(ours), over_seeds(without)) if weight else "-"
        flat = [row for problems in ours for each in problems.values() for row in each]
        for kind in KINDS:
            of_kind = [r for r in flat if r["kind"] == kind]
            row[f"{kind}: critical path"] = f"{np.mean([r['critical_path'] for r in of_kind]):.0f}"
            plans = sum(r["plans"] for r in of_kind) / max(1, sum(r["blocks"] for r in of_kind))
            row[f"{kind}: plans a block"] = f"{plans:.2f}"
        serial = [r for r in flat if r["parts"] == 1 and r["kind"] != "countdown"]
        row["one part: forked %"] = f"{100 * np.mean([r['branches'] >= 2 for r in serial]):.1f}"
        copied = sum(r["copied_steps"] for r in flat) / max(1, sum(r["steps"] for r in flat))
        row["copied steps %"] = f"{100 * copied:.1f}"
        row["right and sound %"] = percent(over_seeds(ours, of=sound))
        rows.append(row)
    return markdown(rows)


def weight_of(name):
    """'path-0.5' -> 0.5; 'stage3', trained without -> 0.0."""
    return float(name.removeprefix("path-")) if name.startswith("path-") else 0.0


# English: what a checkpoint was made from, and its sequential twin, in the order of the table
ENGLISH = {
    BASE: (None, None),
    ("stage0", "format"): (None, None),
    ZERO: (("stage0", "format"), None),
    SR_BETA: (ZERO, None),
    BETA: (ZERO, SR_BETA),
    SR: (SR_BETA, None),
    NPR: (BETA, SR),
}


def words_row(label, runs, between, parallel):
    """A row of the English tables: means over runs on the same problems, the columns `between` amid them."""
    flat = [row for run in runs for answers in run.values() for row in answers]
    row = {"checkpoint": label, "problems": len(runs[0])}
    for kind in (None, *WORD_KINDS):
        row[f"{kind or 'right'} %"] = percent(over_seeds(runs, kind=kind))
    row |= between
    row["valid %"] = percent(over_seeds(runs, of=lambda row: row["valid"]))
    row["parallel %"] = forked_percent(flat) if parallel else "-"
    return row | lengths(flat)


def words_table(folder):
    """A real model in English, sampled at temperature 1.

    folder: where `make words` has put its stages.  Columns for greedy answers and for the twin are
    there where these were judged.
    """
    runs, best = (judged(folder / "compared", name) for name in ("heldout", "heldout-greedy"))
    right_of = {name: values(run) for name, run in runs.items()}
    twins = any(twin in runs for _, twin in ENGLISH.values())
    rows = []
    for name, (source, twin) in ENGLISH.items():
        if name not in runs:
            continue
        between = {"greedily %": percent(values(best[name]))} if best else {}
        for column, other in (("minus its source", source), *([("minus its twin", twin)] if twins else [])):
            between[column] = difference(right_of[name], right_of[other]) if other in right_of else "-"
        rows.append(words_row(LABELS[name], [runs[name]], between, name[1] == "parallel"))
    return markdown(rows)


def words_again_table(folder):
    """Stage 3 in English, trained twice from one BETA, on two draws of held-out problems together.

    folder: `words` and `dithered` in it are what the two runs, the second without a twin, have left;
    in each, `compared` and `again` are the judgements of the two draws.
    """
    first, second = (
        {name: draws[0][name] | draws[1][name] for name in draws[1]}
        for draws in (
            [judged(folder / run / draw) for draw in ("compared", "again")] for run in ("words", "dithered")
        )
    )
    beta, twin = values(first[BETA]), values(first[SR])
    rows = []
    for label, runs, parallel in (
        (LABELS[BETA], [first[BETA]], True),
        (LABELS[SR], [first[SR]], False),
        (f"{LABELS[NPR]}, rounded to the nearest", [first[NPR]], True),
        (f"{LABELS[NPR]}, `dithered`", [second[NPR]], True),
        (f"{LABELS[NPR]}, mean of both", [first[NPR], second[NPR]], True),
    ):
        right_of = over_seeds(runs)
        between = {
            "right and sound %": percent(over_seeds(runs, of=sound)),
            "minus BETA": "-" if runs[0] is first[BETA] else difference(right_of, beta),
            "minus SR": "-" if runs[0] is first[SR] else difference(right_of, twin),
        }
        rows.append(words_row(label, runs, between, parallel))
    return markdown(rows)


def words_time_table(folder):
    """Seconds until one greedy answer in English, alone, and how many times those of the last row."""
    judgements = read_object(folder / "timed/eval.json")["checkpoints"]
    rows = []
    for judgement in judgements:
        label = LABELS[Path(judgement["checkpoint"]).name, judgement["mode"]]
        seconds = judgement["seconds to answer"]
        times = seconds / judgements[-1]["seconds to answer"]
        rows.append({"checkpoint": label, "s/answer": f"{seconds:.1f}", "times": f"{times:.2f}"})
    return markdown(rows)


# ==================================================================================================
# 3. The page
# ==================================================================================================

# {page: {name of a table: (what makes it, the file or folder that it needs)}}
PAGES = {
    "README.md": {"results": (results_table, "eval.json")},
    "docs/results.md": {
        "stages": (stages_table, "eval.json"),
        "kinds": (kinds_table, "eval.json"),
        "temperatures": (temperatures_table, "evidence/temperature/1.0/eval.json"),
        "ladder": (ladder_table, "evidence/ladder"),
        "hard": (hard_table, "evidence/hard/eval.json"),
        "controls": (controls_table, "evidence/controls/eval.json"),
        "starts": (starts_table, "evidence/starts/eval.json"),
        "votes": (equal_cost_table, "evidence/votes/eval.json"),
        "path": (path_table, "evidence/path/eval.json"),
        "words": (lambda out: words_table(out / "gpu/words"), "gpu/words/compared/eval.json"),
        "words-cpu": (lambda out: words_table(out / "cpu/words"), "cpu/words/compared/eval.json"),
        "words-cpu-again": (lambda out: words_again_table(out / "cpu"), "cpu/dithered/again/eval.json"),
        "words-cpu-time": (lambda out: words_time_table(out / "cpu/words"), "cpu/words/timed/eval.json"),
    },
}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("out", nargs="?", default="out", type=Path, help="where the stages and judgements lie")
    p.add_argument("--best", default="", help="print the best temperature of this stage, on `tune`")
    args = p.parse_args()
    if args.best:
        found = temperatures(args.out)
        print(best_temperature(found, next(name for name in found if name[0] == args.best)))
        return

    # Only what stands between <!-- name --> and <!-- /name --> is written: the prose is by hand.
    for page, tables in PAGES.items():
        text = Path(page).read_text("utf-8")
        for name, (make, needs) in tables.items():
            opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if not (args.out / needs).exists():
                print(f"{page}: {name} is left as it was, {args.out / needs} is not there")
                continue
            if not (opening in text and closing in text):
                raise UserError(f"{page}: no place for {name}; expected {opening.strip()} and {closing}")
            before, _, rest = text.partition(opening)
            _, _, after = rest.partition(closing)
            text = f"{before}{opening}\n{make(args.out)}\n\n{closing}{after}"
            print(f"{page}: {name} is made from {args.out / needs}")
        write_text(Path(page), text)


if __name__ == "__main__":
    run_main(main)

"""Pictures and tables of the README, made from what stages and judge have written.

    python docs/figures.py curves out/stage1 out/stage2 out/stage3 --out assets/curves.png
    python docs/figures.py summary out out/seed1 out/seed2

curves : what the stages logged (log.jsonl), a row of panels for each stage; needs matplotlib.
summary: judgements of several seeds (eval.json) as one table, the mean over them and their range.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the six files lie one folder up

from eval import table  # noqa: E402
from stage0_model import UserError, run_main  # noqa: E402

CURVES = ("valid", "accuracy", "reward", "entropy", "length", "critical_path")


def read_logs(folders):
    """{stage: [rows of log.jsonl, ..]}; folders of one name are seeds of one stage.

    Raises UserError when a folder has no log.
    """
    stages = {}
    for folder in map(Path, folders):
        log = folder / "log.jsonl"
        if not log.is_file():
            raise UserError(f"{log}: no such file; expected the folder of a stage, e.g. out/stage1")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        stages.setdefault(folder.name, []).append(rows)
    return stages


def draw_curves(folders, file):
    """One row of panels per stage, one colour per seed.  Thin lines: steps; thick ones: the mean of
    the five around each.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("curves are drawn with matplotlib, which is not installed; pip install matplotlib")
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot as plt

    stages = read_logs(folders)
    size = (3 * len(CURVES), 2.4 * len(stages))  # inches
    figure, axes = plt.subplots(len(stages), len(CURVES), figsize=size, squeeze=False, layout="constrained")
    for panels, (stage, runs) in zip(axes, stages.items()):
        # The loss of reinforcement learning is no curve to look at; without rewards it is.
        keys = [key for key in CURVES if key in runs[0][0]]
        if "reward" not in keys:
            keys.append("loss")
        for panel, key in zip(panels, keys):
            draw_panel(panel, runs, key)
            panel.set_title(f"{stage}: {key.replace('_', ' ')}", fontsize=9)
            panel.tick_params(labelsize=7)
        for panel in panels[len(keys) :]:
            panel.axis("off")

    # an older picture is drawn anew, anything else is somebody's work
    file = Path(file)
    if file.is_file() and not file.read_bytes().startswith(b"\x89PNG"):
        raise UserError(f"--out {file} is there and no picture; give another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    print(f"wrote {file}")


def draw_panel(panel, runs, key):
    """One logged number of every seed."""
    for i, rows in enumerate(runs):
        steps = [row["step"] for row in rows]
        values = np.array([row[key] for row in rows])
        smooth = [values[max(0, j - 2) : j + 3].mean() for j in range(len(values))]
        panel.plot(steps, values, color=f"C{i}", alpha=0.3, linewidth=0.8)
        panel.plot(steps, smooth, color=f"C{i}", linewidth=1.5)


PERCENT = ("accuracy", "valid", "parallel")
NUMBERS = ("plans", "tokens", "critical path", "tokens/path")


def mean_and_range(values, digits=1):
    """[50, 80] -> '65.0 (50.0-80.0)'."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def gain(results):
    """Mean and range of the gain over the row above, '+2.5 (-5.0 to +10.0)'; '-' where some folder
    does not hold that row.
    """
    if not all(result["minus row above"] for result in results):
        return "-"
    values = [100 * result["minus row above"][0] for result in results]
    return f"{np.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f})"


def summary_row(stage, mode, results):
    """One row of the summary, of the results of all seeds for one stage in one mode."""
    row = {"checkpoint": stage, "mode": mode, "runs": str(len(results))}
    for key in PERCENT:
        row[f"{key} %"] = mean_and_range([100 * result[key] for result in results])
    for key in NUMBERS:
        digits = 2 if key == "tokens/path" else 1
        row[key] = mean_and_range([result[key] for result in results], digits)
    row["minus row above"] = gain(results)
    for kind in results[0]["kinds"]:
        row[f"{kind} acc %"] = mean_and_range([100 * r["kinds"][kind]["accuracy"] for r in results])
    return row


def summarise(folders):
    """The table over several judgements, one folder with an eval.json for each seed.

    Raises UserError when a folder has none.
    """
    results = {}
    for folder in folders:
        file = Path(folder) / "eval.json"
        if not file.is_file():
            raise UserError(f"{file}: no such file; expected a folder that eval.py wrote to (--out)")
        for result in json.loads(file.read_text())["checkpoints"]:
            name = (Path(result["checkpoint"]).name, result["mode"])
            results.setdefault(name, []).append(result)
    return table([summary_row(stage, mode, each) for (stage, mode), each in results.items()])


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # fmt: off
    p.add_argument("what", choices=("curves", "summary"), help="a picture of what stages logged, or a table over judgements")
    p.add_argument("folders", nargs="+", help="of stages, each with a log.jsonl; for a summary of judgements, each with an eval.json")
    p.add_argument("--out", default="assets/curves.png", help="where to write the picture")
    # fmt: on
    return p.parse_args(argv)


def main():
    args = parse_args()
    if args.what == "curves":
        draw_curves(args.folders, args.out)
    else:
        print(summarise(args.folders))


if __name__ == "__main__":
    run_main(main)

"""The tiny checkpoints that come with the repository, made from those of a run (`make ship`).

    python docs/ship.py out assets/npr-tiny

In bf16, which halves them, and computed with in fp32 as ever; without logs, samples and optimizer
states.  Says of each how large it is, and how many greedy answers are what they were.
"""

import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the six files lie one folder up

import eval as judge  # noqa: E402
from engine import Engine  # noqa: E402
from stage0_model import UserError, load, make_problems, read_object, run_main, save, write_json  # noqa: E402

STAGES = ("stage0", "stage1", "stage2", "stage3")
MAX_MB = 2.0  # a repository is cloned by people who want to read


def ship(source, target):
    """Write the checkpoint at `source` to `target` in bf16.  Returns its size in MB.

    Raises UserError when it is larger than MAX_MB.
    """
    save(*load(source, dtype=torch.bfloat16), target)
    shutil.copy(source / "args.json", target)  # says what it was made with, and so how it is asked

    # The file is of bf16, but `load` reads from here what to compute in.
    config = target / "config.json"
    write_json(config, read_object(config) | {"dtype": "float32"})
    size = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    if size > MAX_MB:
        raise UserError(f"{target} has {size:.2f} MB, at most {MAX_MB} are shipped; train a smaller model")
    return size


def greedy_answers(path, problems):
    """Token ids of a greedy response to every problem, in the last mode that it is judged in."""
    _, mode = judge.modes_of(str(path))[-1]
    args = judge.parse_args([str(path)])
    rollouts = judge.decode(Engine(*load(path)), problems, mode, args, temperature=0.0, progress=False)
    return [rollout.ids for [rollout] in rollouts]


def main():
    if len(sys.argv) != 3:
        raise UserError(f"usage: {Path(sys.argv[0]).name} FOLDER_OF_A_RUN FOLDER_TO_SHIP")

    # of each stage its size, and what rounding has done to its answers
    problems = make_problems("all", "heldout", 60, 0)
    for stage in STAGES:
        source, target = (Path(folder) / stage for folder in sys.argv[1:])
        size = ship(source, target)
        pairs = zip(greedy_answers(source, problems), greedy_answers(target, problems))
        same = sum(before == after for before, after in pairs)
        print(f"{target}: {size:.2f} MB, {same} of {len(problems)} greedy responses as before")


if __name__ == "__main__":
    run_main(main)

"""Write one of this project's functions anew, judged by its own tests (docs/exercises.md).

    make exercise N=1                          # or: .venv/bin/python docs/exercise.py 1
    rm -r out/exercise/1                       # begin anew

The first call copies the code to out/exercise/1, where the function has lost its body, and runs the
tests, which fail.  Write it there and call again: what is in the copy is never touched.
"""

import argparse
import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Exercise:
    """What is taken away, and which tests judge what comes in its place."""

    file: str
    functions: tuple  # names; of a method, Class.method
    tests: str  # file
    names: tuple = ()  # of the tests in it; none: all


EXERCISES = {
    1: Exercise("engine.py", ("layout",), "tests/test_layout.py"),
    2: Exercise(
        "engine.py",
        ("Request.fork", "Request.join"),
        "tests/test_engine.py",
        (
            "test_scripted_trees_really_fork_with_many_widths_and_blocks",
            "test_a_rollout_holds_its_script_in_sequence_order",
            "test_layout_from_the_ids_is_the_layout_the_engine_used",
            "test_fork_moves_no_kv_and_join_prefills_nothing",
            "test_a_bad_guideline_is_malformed_before_anything_forks",
            "test_a_guideline_that_leaves_no_budget_for_its_branches_is_malformed",
            "test_picture_of_a_kv_row_forking_and_joining_is_what_the_engine_does",
        ),
    ),
    3: Exercise(
        "stage3_papo.py",
        ("papo_advantages",),
        "tests/test_papo.py",
        (
            "test_papo_advantage_by_hand",
            "test_papo_std_is_of_the_original_rewards_in_any_group_order",
            "test_a_group_of_equal_rewards_changes_no_gradient",
        ),
    ),
    4: Exercise(
        "stage1_zero.py",
        ("dapo_loss",),
        "tests/test_zero.py",
        (
            "test_dapo_loss_clips_by_hand",
            "test_dapo_loss_pulls_back_what_moved_the_wrong_way_however_far",
            "test_dapo_loss_is_a_mean_over_tokens_not_over_responses",
        ),
    ),
}


def blank(source, name):
    """(source, line) with the body of a function taken away, all but its docstring; line: where it was.

    Raises LookupError when there is no such function.
    """
    node = ast.parse(source)
    for part in name.split("."):
        node = next((each for each in node.body if getattr(each, "name", "") == part), None)
        if node is None:
            raise LookupError(f"no function {name}")

    # From below the docstring, so that comments go too: they tell how it is done.
    begin = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    indent = " " * node.body[0].col_offset
    lines = source.splitlines(keepends=True)
    lines[begin : node.end_lineno] = [f'{indent}raise NotImplementedError("write {name}")\n']
    return "".join(lines), begin + 1


def prepare(exercise, folder):
    """A copy of the code in a new folder, without what is to be written."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, part)
    for name in ("tests", "assets"):
        shutil.copytree(ROOT / name, part / name, ignore=shutil.ignore_patterns("__pycache__"))

    file = part / exercise.file
    for name in exercise.functions:
        source, line = blank(file.read_text("utf-8"), name)
        file.write_text(source, "utf-8")
        print(f"write {name}: {folder / exercise.file}:{line}", flush=True)
    part.rename(folder)  # so that a copy that was interrupted is made again


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "number", nargs="?", type=int, choices=EXERCISES, help="of the exercise; without it, a list"
    )
    parser.add_argument("--out", default="out/exercise", help="folder for the copies")
    args = parser.parse_args()
    if args.number is None:
        for number, exercise in EXERCISES.items():
            print(f"make exercise N={number}    {' and '.join(exercise.functions)} in {exercise.file}")
        print("What each is to do, and hints: docs/exercises.md")
        return 0

    # Once there, the copy is the reader's.
    exercise = EXERCISES[args.number]
    folder = Path(args.out) / str(args.number)
    if not folder.is_dir():
        prepare(exercise, folder)
    tests = [f"{exercise.tests}::{name}" for name in exercise.names] or [exercise.tests]
    failed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", *tests], cwd=folder
    ).returncode
    print(f"{'not yet' if failed else 'solved'}: {folder / exercise.file}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

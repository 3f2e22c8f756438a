"""Stage 0: the world and the base.  Problems, tokenizer, a Qwen3 in plain PyTorch, and a tiny pretrained base model.

In : nothing.                Out: out/stage0/, an ordinary Hugging Face checkpoint (Qwen3 architecture).

NPR starts from an instruction-tuned model (the paper: Qwen3-4B).  None can be downloaded into a tutorial, so this stage
makes a stand-in in minutes: a 0.8M-parameter Qwen3 that solves synthetic problems step by step with mediocre accuracy, and
that follows the parallel format only now and then.  Equation: next-token loss on responses, L = -(1/N) sum_t log p(x_t | x_<t).

    python stage0_model.py                      # about 20 minutes on 2 cores
    python stage0_model.py --steps 20 --out out/smoke/stage0

Shapes: B rows, T tokens, H heads, D head dim, C hidden width, V vocabulary, K branches, G group size, N packed tokens.
Nothing after this stage reads its corpus: from stage 1 on, every training token is the model's own sample.
"""

import argparse
import ast
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


class UserError(Exception):
    """A mistake the person at the keyboard can fix; `run_main` prints it in one line and exits with status 2."""


# ======================================================================================================================
# 1. The world: problems with many independent parts
# ======================================================================================================================
# Three kinds, each of which asks for something that the base was shown often in its parts and seldom whole:
#   chains     composition: a round works independent chains of arithmetic and takes the largest, the smallest or the total of their ends, M; the
#              chains of the next round begin with M.  The corpus is rounds alone, very few of two or three
#   sums       care: products of two numbers, then a running total modulo 100.  The corpus mostly has a product done in the head, in one go,
#              which so small a model cannot, and sometimes in writing, digit by digit, which it can
#   countdown  search: four numbers and a target which one or two of about fourteen first moves lead to.  The corpus tries a few of them
#
# A problem's rung is its depth (rounds; digits of the second factor; numbers) and its width (parts of a round).

KINDS = ("chains", "sums", "countdown")
SPLITS = ("train", "tune", "heldout", "hard")

# What the user turn is preceded by.  One asks for ordinary step-by-step work, the other for the parallel format.
PLAIN_PROMPT = "Work step by step, then give the boxed answer."
FORMAT_PROMPT = "Work in parallel: guideline of plans, one step for each plan, takeaway, then the boxed answer."
# The same two requests for models that were not brought up on the lines above.
REAL_PLAIN_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
REAL_FORMAT_PROMPT_FILE = Path(__file__).parent / "assets" / "format_prompt.txt"

ANY_TAG = re.compile(r"</?(?:guideline|plan|step|takeaway)>")


@dataclass
class Problem:
    """One question with a checkable answer.  `parts` holds what the solution writer needs to know about it."""

    kind: str
    question: str
    answer: str
    parts: dict = field(repr=False, default_factory=dict)

    def verify(self, response_text):
        r"""True if the last `\boxed{}` after the last block is a right answer.  Boxes inside a block do not count.

        `countdown` accepts every expression that uses each given number at most once and reaches the target; real problems are left to the
        JUDGES of section 1b.
        """
        boxed = last_boxed(ANY_TAG.split(response_text)[-1])
        if boxed is None:
            return False
        if self.kind in JUDGES:
            return JUDGES[self.kind](boxed, self.answer)
        if self.kind == "countdown":
            value, used = evaluate(boxed)
            left = list(self.parts["numbers"])
            for number in used:
                if number not in left:
                    return False
                left.remove(number)
            return value == self.parts["target"]
        number = boxed.strip()  # compared as text: int() refuses some of what strip() lets through, and very long numbers
        return re.fullmatch("[0-9]+", number) is not None and number.lstrip("0") == self.answer.lstrip("0")


def last_boxed(text):
    r"""Content of the last complete `\boxed{...}` in text, or None.  'x \boxed{a{b}} y' -> 'a{b}'."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + 6, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 7 : i]
    return None


def evaluate(expression):
    """Value of an expression of whole numbers with + - * and brackets, and the numbers used: '(3+4)*2' -> (14, [3, 4, 2]).

    Model text is never given to `eval`: it is parsed, and anything but these four things gives (None, []).
    """
    used = []

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Sub, ast.Mult):
            a, b = walk(node.left), walk(node.right)
            return a + b if isinstance(node.op, ast.Add) else a - b if isinstance(node.op, ast.Sub) else a * b
        raise ValueError("not arithmetic")

    try:
        if len(expression) > 100:  # a runaway response must not become a runaway big-number product
            return None, []
        return walk(ast.parse(expression.strip(), mode="eval").body), used
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, []


def apply_op(value, op, operand):
    return value + operand if op == "+" else value - operand if op == "-" else value * operand


def first_moves(numbers):
    """Every first move on these numbers whose result lies in 1..99, as (x, op, y, rest): the plans of a countdown."""
    moves = []
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            x, y = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
            rest = [n for m, n in enumerate(numbers) if m not in (i, j)]
            moves += [(x, op, y, rest) for op in "+-*" if 1 <= apply_op(x, op, y) <= 99]
    return moves


def endings(value, rest):
    """What + and - make of a first move's value and the two numbers left, in their order: [(op, its result, [(op, its result), ..]), ..].

    44, [7, 9] -> [('+', 51, [('+', 60), ('-', 42)]), ('-', 37, [('+', 46), ('-', 28)])]; what leaves 0..99 is left out
    """
    tree = []
    for op in "+-":
        middle = apply_op(value, op, rest[0])
        if 0 <= middle <= 99:
            ends = [(op2, apply_op(middle, op2, rest[1])) for op2 in "+-"]
            tree.append((op, middle, [(op2, end) for op2, end in ends if 0 <= end <= 99]))
    return tree


# How many problems of each depth and of each width there are, {size: weight}: in the base's corpus, where stages 1-3 learn and are judged, and
# beyond both (the split `hard`).
RUNGS = {
    "chains": {
        "corpus": ({1: 96, 2: 3, 3: 1}, {1: 5, 2: 30, 3: 30, 4: 20, 5: 6, 6: 4, 7: 3, 8: 2}),
        "edge": ({1: 40, 2: 45, 3: 15}, {1: 4, 2: 4, 3: 13, 4: 25, 5: 26, 6: 18, 7: 6, 8: 4}),
        "beyond": ({4: 1}, {4: 1, 5: 1, 6: 1}),
    },
    "sums": {
        "corpus": ({1: 30, 2: 70}, {1: 5, 2: 30, 3: 30, 4: 20, 5: 6, 6: 4, 7: 3, 8: 2}),
        "edge": ({1: 10, 2: 90}, {1: 5, 2: 10, 3: 20, 4: 20, 5: 20, 6: 15, 7: 5, 8: 5}),
        "beyond": ({3: 1}, {7: 1, 8: 1}),
    },
    "countdown": {"corpus": ({4: 1}, {1: 1, 2: 1}), "edge": ({4: 1}, {1: 1, 2: 1}), "beyond": ({4: 1}, {1: 1})},
}


def draw_size(rng, weights):
    """One of the sizes, as often as its weight says: {2: 3, 4: 1} -> 2 in three of four cases."""
    return rng.choices(list(weights), list(weights.values()))[0]


def draw_chains(rng, depth, width):
    """`depth` rounds of about `width` chains; from the second on they begin with M, what the round before came to."""
    widths = [width] + [max(1, min(8, width + rng.randint(-1, 1))) for _ in range(depth - 1)]
    letters, rounds, written, result = sorted(rng.sample("ABCDEFGHIJKLNOPQRSTUVWXYZ", min(25, sum(widths)))), [], [], None
    for width in widths:
        labels, letters = letters[:width], letters[width:]
        goal, length = rng.choice(["largest", "smallest", "largest", "smallest", "total"]), rng.randint(4, 6)
        chains, ends = [], []
        for _ in labels:  # all of one length: the longest branch sets the critical path
            start, ops = rng.randint(10, 99), []
            for _ in range(length):
                op = rng.choice("++--*")
                ops.append((op, rng.randint(2, 3) if op == "*" else rng.randint(2, 9)))
            value = start if result is None else result
            for op, operand in ops:
                value = apply_op(value, op, operand) % 100
            ends.append(value)
            chains.append((start if result is None else "M", ops))
        written.append(" ".join(f"{c}:{start}" + "".join(f"{op}{k}" for op, k in ops) for c, (start, ops) in zip(labels, chains)) + f" {goal}")
        rounds.append((labels, chains, goal))
        result = {"largest": max, "smallest": min, "total": sum}[goal](ends) % 100
    return Problem("chains", " M; ".join(written) + " modulo 100?", f"{result:02d}", {"rounds": rounds})


def draw_sums(rng, depth, width):
    """`width` products of a number of two digits and one of `depth` digits, to be added and subtracted modulo 100."""
    labels, total, terms = sorted(rng.sample("ABCDEFGH", width)), 0, []
    for i in range(width):
        second = int("".join(str(rng.randint(1, 9)) for _ in range(depth)))
        terms.append((rng.choice("+-") if i else "+", rng.randint(11, 49), second))
        total = apply_op(total, terms[i][0], terms[i][1] * second) % 100
    written = " ".join(f"{sign if i else ''}{c}:{a}*{b}" for i, (c, (sign, a, b)) in enumerate(zip(labels, terms)))
    return Problem("sums", f"{written} total modulo 100?", f"{total:02d}", {"labels": labels, "terms": terms})


def draw_countdown(rng, depth, width):
    """`depth` numbers and a target; `width` is how many first moves lead to it (as `endings` go), of about fourteen."""
    while True:
        numbers, leading = sorted(rng.sample(range(2, 26), depth)), {}
        for x, op, y, rest in first_moves(numbers):
            for end in {end for *_, ends in endings(apply_op(x, op, y), rest) for _, end in ends}:
                leading.setdefault(end, []).append((x, op, y, rest))
        targets = [end for end, moves in leading.items() if 10 <= end and len(moves) == width and end not in numbers]
        if targets:
            break
    target = rng.choice(sorted(targets))
    x, op, y, rest = leading[target][0]
    op2, op3 = next((op2, op3) for op2, _, ends in endings(apply_op(x, op, y), rest) for op3, end in ends if end == target)
    answer, question = f"({x}{op}{y}){op2}{rest[0]}{op3}{rest[1]}", " ".join(map(str, numbers)) + f" make {target}?"
    return Problem("countdown", question, answer, {"numbers": numbers, "target": target, "leading": width})


def draw_problem(kind, rng, reach="edge"):
    """One random problem of a kind; reach, one of `corpus`, `edge` and `beyond`, says from which rungs (RUNGS)."""
    if kind not in KINDS:
        raise ValueError(f"unknown problem kind {kind!r}: expected one of {', '.join(KINDS)} or all")
    depth, width = (draw_size(rng, weights) for weights in RUNGS[kind][reach])
    return {"chains": draw_chains, "sums": draw_sums, "countdown": draw_countdown}[kind](rng, depth, width)


def split_of(question):
    """The split a question belongs to, by its hash: 80 % train, 10 % tune, 10 % heldout.  Disjoint whatever the seeds."""
    bucket = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10
    return "tune" if bucket == 0 else "heldout" if bucket == 1 else "train"


def make_problems(kind, split, n, seed, reach=""):
    """n distinct seeded problems.  kind: one of KINDS, or 'all' for equal shares of each; split: one of SPLITS; reach: from which rungs, by
    default `beyond` for the split hard and `edge` for all others.

    Same arguments, same problems.  Raises ValueError for an unknown kind or split, or when the kind has no n distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    kinds, reach = KINDS if kind == "all" else (kind,), reach or ("beyond" if split == "hard" else "edge")
    rng = random.Random(f"{kind}/{split}/{seed}")
    problems, seen, tries = [], set(), 0
    while len(problems) < n:
        problem = draw_problem(kinds[len(problems) % len(kinds)], rng, reach)
        tries += 1
        if tries > 1000 + 100 * n:
            raise ValueError(f"{kind}/{split} has no {n} distinct problems")
        if problem.question not in seen and (split == "hard" or split_of(problem.question) == split):
            seen.add(problem.question)
            problems.append(problem)
    return problems


# ======================================================================================================================
# 1b. Real problems: data sets, and who judges their answers
# ======================================================================================================================

# Where data sets keep questions and answers; the first column that a row has is taken.
QUESTION_COLUMNS = ("problem", "question", "prompt", "puzzle")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "expected_answer", "reward_model", "solution")


def read_rows(name):
    """Rows of a data set: a .json, .jsonl or .parquet file, a folder that `datasets` saved, or a hub name (name:config where the hub
    has several).  Of several splits, train, test or else the first.  Raises UserError when it is none of these."""
    path = Path(name)
    if path.suffix in (".json", ".jsonl", ".parquet") and not path.is_file():
        raise UserError(f"{name}: no such file; expected problems as json, jsonl or parquet")
    if path.suffix in (".json", ".jsonl"):
        try:
            text = path.read_text()
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise UserError(f"{name}: not readable as {path.suffix[1:]} ({error})")
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{name}: expected a list of problems, found {'an empty one' if rows == [] else 'something else'}")
        return rows
    if path.suffix != ".parquet" and not path.is_dir() and (len(path.parts) != 2 or path.parts[0] in ("out", "..", ".", "/")):
        raise UserError(f"{name}: no such folder or file; expected a json, jsonl or parquet file, a folder of `datasets`, or a hub name")
    import datasets  # here and not above: a second that only real data has to pay for

    try:
        if path.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(path)).to_list()
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        repository, _, config = str(name).partition(":")
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(repository, config or None)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{name}: not a data set that `datasets` or the hub can give ({why})")
    if isinstance(data, dict):
        data = data[next((split for split in ("train", "test") if split in data), next(iter(data)))]
    return data.to_list()


def read_problems(name, question_column="", answer_column=""):
    """Problems of a data set (`read_rows`).  The columns are found by name unless given.

    kind is `math`, or `choice` when the answer is one of given options or a single capital letter, or `grid` when it is a table
    (ZebraLogic).  A conversation in the form of ORZ-57k, [{value: question}, {ground_truth: {value: answer}}], is a question and an answer.
    Raises UserError when a column cannot be found, or when math-verify is needed and not installed.
    """

    def column(row, given, names, flag):
        for key in (given,) if given else names:
            if row.get(key) is not None:
                return key, row[key]
        wanted = given or ", ".join(names)
        raise UserError(f"{name}: row {len(problems)} has no column {wanted} (it has: {', '.join(row)}); name one with --{flag}-column")

    problems = []
    for row in read_rows(name):
        if isinstance(row, dict) and {"0", "1"} <= row.keys():  # ORZ-57k as the hub stores it; as a file each row is a list
            row = [row["0"], row["1"]]
        if isinstance(row, list):
            row = {"question": row[0].get("value"), "answer": row[1].get("ground_truth")}
        _, question = column(row, question_column, QUESTION_COLUMNS, "question")
        source, answer = column(row, answer_column, ANSWER_COLUMNS, "answer")
        if isinstance(question, list):  # a chat
            question = [turn["content"] for turn in question if turn["role"] == "user"][-1]
        if isinstance(answer, dict) and "rows" in answer:
            head, *columns = answer["header"]  # of a logic grid: House, then what is asked for
            if any(cell == "___" for cells in answer["rows"] for cell in cells):
                raise UserError(f"{name}: the solutions are masked (___); take the version that has them, allenai/ZebraLogicBench-private")
            grid = {f"{head} {cells[0]}": dict(zip(columns, cells[1:])) for cells in answer["rows"]}
            blank = json.dumps({house: dict.fromkeys(columns, "...") for house in grid})
            question += f"\n\nGive the whole solution as JSON: \\boxed{{{blank}}}"
            problems.append(Problem("grid", question, json.dumps(grid)))
            continue
        if isinstance(answer, dict):
            answer = answer.get("ground_truth", answer.get("value"))
        answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
        if source == "solution" and last_boxed(answer) is None:
            raise UserError(f"{name}: the solution of row {len(problems)} has no \\boxed{{answer}}; name another with --answer-column")
        answer = (last_boxed(answer) or answer).strip()
        options = row.get("options") or row.get("choices")
        if options:
            letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
            question += "\n" + "\n".join(f"({letter}) {option}" for letter, option in zip(letters, options)) + "\nAnswer with the letter."
            answer = letters[int(answer)] if answer.isdigit() else letters[options.index(answer)] if answer in options else answer
        problems.append(Problem("choice" if options or re.fullmatch("[A-Z]", answer) else "math", question.strip(), answer))
    if any(p.kind == "math" for p in problems):
        try:
            import math_verify  # noqa: F401
        except ImportError:
            raise UserError(f"{name}: judging real mathematics needs math-verify; pip install math-verify")
    return problems


def same_math(boxed, answer):
    r"""Are two answers mathematically the same?  math-verify parses both (it never evaluates text) and gives up after 5 s each.

    '0.5', '\frac{1}{2}' -> True      '(0, 1]', '[0, 1]' -> False
    """
    from math_verify import parse, verify  # optional: only real mathematics needs it

    if boxed.strip() == answer:
        return True
    if len(boxed) > 1000:
        return False
    gold, given = (parse(f"\\boxed{{{x}}}", parsing_timeout=5) for x in (answer, boxed))
    return verify(gold, given, timeout_seconds=5)


def same_choice(boxed, answer):
    """The letter itself, whatever it is wrapped in: '(B)', '\\text{B}.', 'b' -> B."""
    return re.sub(r"\\(?:text\w*|mathrm|mathbf)|[^A-Za-z]", "", boxed).upper() == answer


def same_grid(boxed, answer):
    """Every cell of a logic grid, case and outer white space apart; `boxed` is JSON, with or without its outer braces."""
    try:
        text = boxed.strip()
        given = json.loads(text if text.startswith("{") else f"{{{text}}}")
        cell = lambda x: str(x).strip().lower()  # noqa: E731
        return all(cell(given[house][key]) == cell(value) for house, row in json.loads(answer).items() for key, value in row.items())
    except (ValueError, KeyError, TypeError):
        return False


JUDGES = {"math": same_math, "choice": same_choice, "grid": same_grid}


def draw_problems(data, kind, n, seed, reach="edge"):
    """n problems for one step: of `data` (a list, or None), distinct while there are enough; without data made ones of the train split."""
    return make_problems(kind, "train", n, seed, reach) if data is None else random.Random(seed).sample(data, min(n, len(data)))


def read_prompt(prompt_file, data):
    """What asks for the format: the text of prompt_file; by default FORMAT_PROMPT, which the tiny base was brought up on, or with real
    data the instructions in assets/format_prompt.txt.  A text with {question} in it is the whole user turn, any other the system prompt.
    Raises UserError when there is no such file."""
    if not prompt_file and not data:
        return FORMAT_PROMPT
    file = Path(prompt_file or REAL_FORMAT_PROMPT_FILE)
    if not file.is_file():
        raise UserError(f"--prompt-file {file}: no such file; expected a text like {REAL_FORMAT_PROMPT_FILE}")
    return file.read_text().strip()


# ======================================================================================================================
# 2. Worked solutions: the corpus of the base
# ======================================================================================================================
# Text written by people has slips.  So has this corpus, few: a single result is wrong with probability `slip`, and the mistake is carried
# on consistently.  What it teaches well is the parts.  What it shows seldom is the whole: rounds after one another, products in writing, a wide search.


def slipped(rng, slip, value, low=0, high=10**6):
    """value, or with probability slip a wrong one near it."""
    return value if rng.random() >= slip else min(high, max(low, value + rng.choice([-10, -2, -1, 1, 2, 10])))


def added_up(rng, slip, ends):
    """A running total modulo 100, two digits at a time: [('+', 'a', 51), ('-', 'b', 66)] -> ('a51-b66=85', 85)."""
    _, label, total = ends[0]
    takeaway = f"{label}{total:02d}"
    for sign, label, end in ends[1:]:
        total = slipped(rng, slip, apply_op(total, sign, end) % 100, 0, 99)
        takeaway += f"{sign}{label}{end:02d}={total:02d}"
    return takeaway, total


def work_out_chains(parts, rng, slip):
    """Every round a block: plans ['A', 'B'], steps ['A12+5=17*3=51;a51', 'B40-7=33*2=66;b66'], takeaway 'a51b66;M66'."""
    rounds, result = [], None
    for labels, chains, goal in parts["rounds"]:
        steps, ends = [], []
        for label, (start, ops) in zip(labels, chains):
            value = start if result is None else result
            text = f"{label}{value:02d}"
            for op, operand in ops:
                value = slipped(rng, slip, apply_op(value, op, operand) % 100, 0, 99)
                text += f"{op}{operand}={value:02d}"
            ends.append(("+", label.lower(), value))
            steps.append(f"{text};{label.lower()}{value:02d}")
        if goal == "total":
            takeaway, result = added_up(rng, slip, ends)
        else:
            takeaway = "".join(f"{label}{end:02d}" for _, label, end in ends)
            result = (max if goal == "largest" else min)(end for *_, end in ends)
        rounds.append((labels, steps, f"{takeaway};M{result:02d}"))
    return rounds, f"{result:02d}"


def work_out_sums(parts, rng, slip, written_share=0.25):
    """One block, its products in the head, 'A47*83=3901;a01', or in writing, 'A47*83=47*80+47*3=3760+141=3901;a01'."""
    steps, ends, written = [], [], rng.random() < written_share
    for label, (sign, a, b) in zip(parts["labels"], parts["terms"]):
        digits = [int(d) * 10**i for i, d in enumerate(reversed(str(b)))][::-1]  # 83 -> [80, 3]
        products = [slipped(rng, slip, a * d) for d in digits]
        product, text = slipped(rng, slip, sum(products)) if len(digits) > 1 else products[0], f"{label}{a}*{b}="
        if written and len(digits) > 1:
            text += "+".join(f"{a}*{d}" for d in digits) + "=" + "+".join(map(str, products)) + "="
        steps.append(f"{text}{product};{label.lower()}{product % 100:02d}")
        ends.append((sign, label.lower(), product % 100))
    takeaway, total = added_up(rng, slip, ends)
    return [(parts["labels"], steps, takeaway)], f"{total:02d}"


def work_out_countdown(parts, rng, slip):
    """Some first moves, each with its endings: '22*2=44;+7=51+9=60/47n-9=42/47n;-7=37+9=46/47n-9=28/47n;n'.  The step that hits ends in what
    to answer, 'y(22*2)+7-9'.  Few moves are tried, and after a block that found nothing few go on."""
    target, moves, rounds, found = parts["target"], first_moves(parts["numbers"]), [], None
    rng.shuffle(moves)
    while not found and moves:
        k = min(len(moves), draw_size(rng, {2: 30, 3: 25, 4: 20, 5: 10, 6: 8, 7: 4, 8: 3}))
        now, moves, steps = moves[:k], moves[k:], []
        for x, op, y, rest in now:
            value = slipped(rng, slip, apply_op(x, op, y), 1, 99)
            text, verdict = f"{x}{op}{y}={value}", "n"
            for op2, middle, ends in endings(value, rest):
                middle = slipped(rng, slip, middle, 0, 99)
                text += f";{op2}{rest[0]}={middle}"
                for op3, _ in ends:
                    end = slipped(rng, slip, apply_op(middle, op3, rest[1]), 0)
                    text += f"{op3}{rest[1]}={end}/{target}{'y' if end == target else 'n'}"
                    if end == target:
                        verdict = f"y({x}{op}{y}){op2}{rest[0]}{op3}{rest[1]}"
                        break
                if verdict != "n":
                    break
            steps.append(f"{text};{verdict}")
            found = found or (verdict[1:] or None)
        rounds.append(([f"{x}{op}{y}" for x, op, y, _ in now], steps, found or "none"))
        if rng.random() >= 0.12:
            break
    return rounds, found or "none"


def work_out(problem, rng, slip):
    """(rounds, answer) of a worked solution, as a person might write it: each round is (plans, steps, takeaway)."""
    return {"chains": work_out_chains, "sums": work_out_sums, "countdown": work_out_countdown}[problem.kind](problem.parts, rng, slip)


def plain_solution(rounds, answer):
    """The parts worked one after another, no tags: what the base does when asked plainly."""
    return " ".join(" ".join(steps) + f" {takeaway}" for _, steps, takeaway in rounds) + f" \\boxed{{{answer}}}"


def tagged_solution(rounds, answer):
    """The canonical parallel form."""
    text = ""
    for plans, steps, takeaway in rounds:
        text += "<guideline>" + "".join(f"<plan>{i}:{p}</plan>" for i, p in enumerate(plans, 1)) + "</guideline>"
        text += "".join(f"<step>{i}:{s}</step>" for i, s in enumerate(steps, 1)) + f"<takeaway>{takeaway}</takeaway>"
    return f"{text}\\boxed{{{answer}}}"


def malformed_solution(rounds, answer, rng):
    """A near miss at the format, one of seven kinds.  None is shorter than the valid form: otherwise reinforcement learning
    meets 'short' and 'malformed' together and drifts towards fewer plans."""
    text = tagged_solution(rounds, answer)
    how = rng.randrange(7)
    if how == 0:  # text between the tags of the skeleton
        return text.replace("</step>", "</step> next ", 1)
    if how == 1:  # one plan more than steps
        k = len(rounds[0][0])
        return text.replace("</guideline>", f"<plan>{k + 1}:{rounds[0][0][-1]}</plan></guideline>", 1)
    if how == 2:  # numbered from 2
        return text.replace("<step>1:", "<step>2:", 1)
    if how == 3:  # the answer is stated, not boxed
        return text.replace(f"\\boxed{{{answer}}}", f" the answer is {answer}.")
    if how == 4:  # steps nested in one another
        return text.replace("</step><step>", "<step>", 1).replace("</step>", "</step></step>", 1)
    if how == 5:  # the takeaway is tagged as a step
        return text.replace("<takeaway>", "<step>").replace("</takeaway>", "</step>")
    return text.replace("</guideline>", "</plan>", 1)  # the guideline is never closed


def is_canonical(text):
    r"""True for the canonical valid form; the grammar of D2 as one pattern.  Stage 1's parser grades what fails here.

    '<guideline><plan>1:A</plan></guideline><step>1:b</step><takeaway>c</takeaway>\boxed{7}' -> True
    """
    block = r"<guideline>((?:<plan>\d+:[^<>]+</plan>)+)</guideline>((?:<step>\d+:[^<>]+</step>)+)<takeaway>[^<>]+</takeaway>"
    if not re.fullmatch(rf"(?:{block})+[^<>]*\\boxed\{{[^<>{{}}]*\}}[^<>]*", text) or text.count("\\boxed{") != 1:
        return False
    numbers = [[re.findall(r"<\w+>(\d+):", part) for part in found] for found in re.findall(block, text)]
    return all(plans == steps == [str(i + 1) for i in range(len(plans))] for plans, steps in numbers)


def corpus_document(rng, slip, valid_share, malformed_share):
    """(question, system prompt, response) of the stage-0 corpus; half the prompts ask for the format."""
    while True:
        problem = draw_problem(draw_size(rng, {"chains": 2, "sums": 2, "countdown": 1}), rng, "corpus")  # a countdown is long, and easy to learn
        if split_of(problem.question) == "train":
            break
    rounds, answer = work_out(problem, rng, slip)
    if rng.random() < 0.5:
        return problem.question, PLAIN_PROMPT, plain_solution(rounds, answer)
    style = rng.random()
    if style < valid_share:
        return problem.question, FORMAT_PROMPT, tagged_solution(rounds, answer)
    if style < valid_share + malformed_share:
        return problem.question, FORMAT_PROMPT, malformed_solution(rounds, answer, rng)
    return problem.question, FORMAT_PROMPT, plain_solution(rounds, answer)


# ======================================================================================================================
# 3. The tokenizer
# ======================================================================================================================

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts, vocab_size=400):
    """A byte-level BPE with Qwen's chat markup, as an ordinary Hugging Face tokenizer.

    Words, punctuation marks and single digits are split before merging, as in Qwen: 12 is two tokens, so arithmetic can be
    learned digit by digit.  All 256 bytes are in the vocabulary, so any text encodes.  The eight tags are *not* special here:
    `<plan>` is three tokens, and the model has to find them by itself (stage 1) before they become single tokens (stage 2).
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}|</?| ?\p{L}+|[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def prompt_ids(tokenizer, question, system_prompt):
    """Token ids of the chat prompt up to where the assistant begins to speak.  A system prompt with {question} in it is the user turn."""
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
    if "{question}" in system_prompt:
        messages = [{"role": "user", "content": system_prompt.replace("{question}", question)}]
    # enable_thinking=False asks Qwen3's own template for its non-thinking mode; templates without the switch ignore it
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return tokenizer.encode(text, add_special_tokens=False)


# ======================================================================================================================
# 4. The model: Qwen3, bottom-up
# ======================================================================================================================


@dataclass
class Qwen3Config:
    """Fields as in a Qwen3 config.json; the defaults are the tiny base (0.87M parameters)."""

    vocab_size: int = 400
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    eos_token_id: int | list = 2
    initializer_range: float = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps), computed in fp32 whatever x is."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.shape, self.eps = (width,), eps

    def forward(self, x):
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def rope_tables(position, head_dim, theta):
    """cos and signed sin of every rotation angle.  position (B, T) integers -> two (B, T, 1, D) fp32 tables."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device).float() / head_dim)  # (D/2,)
    angle = position[:, :, None, None].float() * frequency  # (B, T, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotary position embedding of pairs (i, i + D/2), as in Hugging Face: (a, b) -> (a cos - b sin, b cos + a sin).

    x (B, T, H, D).  The minus sign is in the table (`rope_tables`)."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(x.dtype)


class Attention(nn.Module):
    """The two ends of grouped-query attention with QK-norm.  What is between them, and what a token may see, is decided outside.

    Queries, keys and values come out of one matrix product: decoding one token is a matter of how many operations are launched."""

    def __init__(self, config):
        super().__init__()
        H, H_kv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads, self.kv_heads, self.head_dim = H, H_kv, D
        self.qkv_proj = nn.Linear(config.hidden_size, (H + 2 * H_kv) * D, bias=False)
        self.o_proj = nn.Linear(H * D, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(D, config.rms_norm_eps)
        self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def queries_keys_values(self, x, cos, sin):
        """x (B, T, C) -> (B, T, H, D), (B, T, H_kv, D), (B, T, H_kv, D)."""
        B, T, _ = x.shape
        H, qk_heads = self.heads, self.heads + self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H + 2 H_kv, D)
        # queries and keys are normed and rotated together; each kind has one weight for all its heads
        scale = torch.cat([self.q_norm.weight.expand(H, -1), self.k_norm.weight.expand(self.kv_heads, -1)])  # (H + H_kv, D)
        qk = rotate(F.rms_norm(qkv[:, :, :qk_heads], self.q_norm.shape, eps=self.q_norm.eps) * scale, cos, sin)
        return qk[:, :, :H], qk[:, :, H:], qkv[:, :, qk_heads:]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are one matrix product."""

    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x, cos, sin):
        return self.self_attn.queries_keys_values(self.input_layernorm(x), cos, sin)

    def after(self, x, found):
        x = x + self.self_attn.o_proj(found.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, attend):
        return self.after(x, attend(*self.before(x, cos, sin)))


@functools.cache
def compiled(function, dynamic=False):
    """torch.compile on CUDA.  Not dynamic: once for every shape, so let them be few (`bucket`)."""
    if not torch.cuda.is_available():
        return function
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=dynamic)


def fused_block(block, x, cos, sin, attend):
    """Block.forward with everything around attention compiled: a decode step of few tokens is a thousand small operations, and on a GPU each
    costs two microseconds even in a captured graph.  All blocks, and all numbers of tokens, share the same code."""
    return compiled(Block.after, dynamic=True)(block, x, attend(*compiled(Block.before, dynamic=True)(block, x, cos, sin)))


def visible_mask(group, branch, document=None):
    """Who may see whom (D3): earlier tokens of the same document, but never a sibling branch of the same block.  Integers (B, T) ->
    (B, T, T) bool, True = row's token sees column's token.  document None: every row is one document."""
    T = group.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=group.device).tril()
    same_block = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] != 0)  # (B, T, T)
    sees = causal & ~(same_block & (branch[:, :, None] != branch[:, None, :]))
    return sees if document is None else sees & (document[:, :, None] == document[:, None, :])


def uses_flex(device):
    """FlexAttention where it trains: on CUDA.  It has no backward on a CPU."""
    return device.type == "cuda"


def bucket(n):
    """n rounded up to one of four sizes for every power of two: 100 -> 128, 1100 -> 1280, 8192 -> 8192."""
    step = max(32, 2 ** (n.bit_length() - 3))
    return -(-n // step) * step


def visibility(group, branch, document=None):
    """`visible_mask` in the form that `attention` takes: None where plain causal order says it all, on CUDA the blocks of 128 x 128 that
    are not empty (siblings and other documents are skipped there, not computed and masked; uncompiled, a T x T tensor would be filled to find
    them), on a CPU (B, 1, T, T) bool."""
    if document is None and not group.any():
        return None
    if not uses_flex(group.device):
        return visible_mask(group, branch, document)[:, None]
    (B, T), document = group.shape, torch.zeros_like(group) if document is None else document

    def sees(b, h, q, k):
        sibling = (group[b, q] == group[b, k]) & (group[b, q] != 0) & (branch[b, q] != branch[b, k])
        return (q >= k) & (document[b, q] == document[b, k]) & ~sibling

    return compiled(create_block_mask)(sees, B, None, T, T, device=group.device)


def attention(q, k, v, mask):
    """softmax(q k' / sqrt(D)) v over what `mask` (of `visibility`) shows.  q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D)."""
    dtype, repeat = v.dtype, q.shape[2] // k.shape[2]  # each key/value head serves `repeat` query heads
    if isinstance(mask, BlockMask):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or H_kv, T, D)
        return compiled(flex_attention)(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)
    if q.device.type == "cpu":  # measured: the CPU's fused attention runs backward 1.6x faster in fp32 than in bf16
        q, k, v = q.float(), k.float(), v.float()
    # repeated by hand: told to share heads itself (`enable_gqa`), scaled_dot_product_attention takes its slow path as soon as there is a mask
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)  # (B, T, H, D)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).to(dtype).transpose(1, 2)


class Qwen3(nn.Module):
    """Qwen3 with Hugging Face's parameter names, but for the two fused projections, which `load` joins and `save` splits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def device(self):
        return self.model["embed_tokens"].weight.device

    def hidden(self, ids, layout=None, kv=None):
        """Final hidden states.  ids (B, T) -> (B, T, C).

        layout: None for plain causal text, or integers `.group`, `.branch`, `.position`, each (T,) or (B, T), and `.document` (1, T) where
        several sequences are packed into one row (engine.Layout).
        kv: None to attend within ids (training), or the engine's KV memory, which stores this call's keys and values and
        attends over everything its rows hold: `kv.attend(layer, q, k, v)`, all (B, T, H, D); `kv.fused`: in compiled blocks.
        """
        T, mask = ids.shape[1], None
        if layout is None:
            position = torch.arange(T, device=ids.device)[None]  # (1, T)
        else:
            as_rows = lambda x: torch.as_tensor(x, device=ids.device).long().reshape(-1, T)  # noqa: E731
            group, branch, position = as_rows(layout.group), as_rows(layout.branch), as_rows(layout.position)
            mask = visibility(group, branch, layout.document) if kv is None else None
        x = self.model["embed_tokens"](ids)  # (B, T, C)
        cos, sin = rope_tables(position, self.config.head_dim, self.config.rope_theta)
        run = fused_block if kv is not None and kv.fused else Block.__call__
        for i, block in enumerate(self.model["layers"]):
            attend = functools.partial(attention, mask=mask) if kv is None else functools.partial(kv.attend, i)
            x = run(block, x, cos, sin, attend)
        return self.model["norm"](x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        return F.linear(x, self.model["embed_tokens"].weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def forward(self, ids, layout=None, kv=None):
        """ids (B, T) -> logits (B, T, V)."""
        return self.logits(self.hidden(ids, layout, kv))


# ======================================================================================================================
# 5. Load and save: the Hugging Face layout, safetensors only
# ======================================================================================================================


def fused_weights(config):
    """{fused parameter: {its parts as checkpoint files name them: rows}} for every block."""
    q, kv, width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim, config.intermediate_size
    fused = {}
    for i in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        fused[f"{attention}.qkv_proj.weight"] = {f"{attention}.{x}_proj.weight": n for x, n in (("q", q), ("k", kv), ("v", kv))}
        fused[f"{mlp}.gate_up_proj.weight"] = {f"{mlp}.{x}_proj.weight": width for x in ("gate", "up")}
    return fused


def load(path_or_hub_name, device=None, dtype=None):
    """(model, tokenizer) from a Hugging Face folder or hub name.

    dtype: torch dtype of the weights; None: what config.json says (`dtype`, or `torch_dtype` as it was called before transformers 5), bf16
    or else fp32.  Weights of another dtype are cast.  Raises UserError when the checkpoint is missing, is not a plain Qwen3, or lacks a
    field that has no safe default (rope_theta: 1e4, 1e6 and 5e6 are all in use, and a wrong one fails silently).
    """
    path = Path(path_or_hub_name)
    if not path.is_dir():
        if path.parts[:1] in (("out",), ("/",), (".",), ("..",)) or len(path.parts) != 2:
            raise UserError(f"{path}: no such checkpoint folder; run the stage that writes it, or give --init a folder or hub name")
        from huggingface_hub import snapshot_download  # only needed, and only possible, with a network

        try:
            path = Path(snapshot_download(str(path_or_hub_name), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
        except Exception as error:
            raise UserError(f"{path_or_hub_name}: neither a folder here nor a model that the hub gives ({type(error).__name__})")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}/config.json is missing: expected a Hugging Face checkpoint; run the stage that writes it")
    raw = json.loads((path / "config.json").read_text())
    if raw.get("model_type") != "qwen3":
        raise UserError(f"{path}/config.json: model_type is {raw.get('model_type')!r}, this project reads 'qwen3' only")
    rope = raw.get("rope_parameters") or {}
    refused = [key for key in ("quantization_config", "rope_scaling", "use_sliding_window", "attention_bias") if raw.get(key)]
    refused += [f"layer_types {kind!r}" for kind in sorted(set(raw.get("layer_types") or ()) - {"full_attention"})]
    refused += [f"rope_type {rope['rope_type']!r}"] if rope.get("rope_type", "default") != "default" else []
    refused += [f"hidden_act {raw['hidden_act']!r}"] if raw.get("hidden_act", "silu") != "silu" else []
    if refused:
        raise UserError(f"{path}/config.json: {refused[0]} is not supported; use a checkpoint without it")
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
    known = {f.name for f in fields(Qwen3Config)}
    missing = [k for k in sorted(known - {"initializer_range"}) if raw.get(k) is None and k != "tie_word_embeddings"]
    if missing:
        raise UserError(f"{path}/config.json: {', '.join(missing)} missing; expected the fields of a Qwen3 config")
    raw.setdefault("tie_word_embeddings", False)
    config = Qwen3Config(**{k: v for k, v in raw.items() if k in known})

    index = path / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    files = [path / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing: no .safetensors weights there; finish the stage that writes it, or the download")
    weights = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); write it again")
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # some exports carry a duplicate
    for name, parts in fused_weights(config).items():
        if all(part in weights for part in parts):
            weights[name] = torch.cat([weights.pop(part) for part in parts])
    with torch.device("meta"):
        model = Qwen3(config)
    wanted = model.state_dict()
    wrong = [k for k in wanted if k not in weights or weights[k].shape != wanted[k].shape] + [k for k in weights if k not in wanted]
    if wrong:
        raise UserError(f"{path}: weights do not fit config.json at {wrong[0]} (and {len(wrong) - 1} more); expected a Qwen3 checkpoint")
    if dtype is None:
        dtype = torch.bfloat16 if raw.get("dtype", raw.get("torch_dtype")) == "bfloat16" else torch.float32
    model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)

    # A turn may end in several ways: Qwen3 lists them in generation_config.json, and its base models name only <|endoftext|>, though
    # their chat template closes a turn with <|im_end|>, the one that is learned here.
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template; copy chat_template.jinja from the instruct model of the same family")
    if "<|im_end|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|im_end|>"
    generation = path / "generation_config.json"
    more = json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None
    ends = {tokenizer.eos_token_id}.union(*(x if isinstance(x, list) else [x] for x in (config.eos_token_id, more) if x is not None))
    config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    return model.to(device or "cpu").requires_grad_(True), tokenizer


def save(model, tokenizer, path):
    """Write a Hugging Face checkpoint folder.  The weights go last and by rename, so a folder that has them is complete."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    config = asdict(model.config) | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False}
    config |= {"hidden_act": "silu", "use_cache": True, "pad_token_id": tokenizer.pad_token_id}
    config["dtype"] = str(model.model["embed_tokens"].weight.dtype).removeprefix("torch.")
    # both spellings of theta: transformers 5 reads the nested one, older readers (and vLLM, SGLang) the flat one
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    ends = {"eos_token_id": model.config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_atomic(path / "generation_config.json", lambda file: file.write_text(json.dumps(ends, indent=2) + "\n"))
    write_atomic(path / "config.json", lambda file: file.write_text(json.dumps(config, indent=2) + "\n"))
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    for name, parts in fused_weights(model.config).items():
        state |= zip(parts, state.pop(name).split(list(parts.values())))
    state = {k: v.contiguous() for k, v in state.items()}
    write_atomic(path / "model.safetensors", lambda file: save_file(state, file, metadata={"format": "pt"}))


def write_atomic(path, write):
    """Call write(temporary file) beside path, flush it to disk, then rename: path is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    write(aside)
    with open(aside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


# ======================================================================================================================
# 6. What every stage's loop uses: device, seeds, optimizer, log, resume
# ======================================================================================================================


def pick_device(name):
    """torch.device for --device; 'auto' takes CUDA when there is one.  Prints what it took.

    Under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK) also joins the other ranks: NCCL with a GPU for each, or gloo on a CPU whose
    cores they share.  Only rank 0 prints and shows bars.
    """
    if name != "cpu" and not torch.cuda.is_available():
        if name != "auto":
            raise UserError(f"--device {name}: no CUDA device is visible; use --device cpu")
        name = "cpu"
    device = torch.device("cuda" if name == "auto" else name)
    what = ""
    if "LOCAL_RANK" in os.environ:
        local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if device.type == "cuda":
            if beside > torch.cuda.device_count():
                raise UserError(f"torchrun --nproc-per-node {beside}: {torch.cuda.device_count()} CUDA devices are visible; use fewer ranks")
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, os.cpu_count() // beside))
        # a rank waits while another still decodes, or writes a checkpoint: long, but not for ever
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        what = f", {dist.get_world_size()} ranks"
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    what = (torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads") + what
    print(f"device: {device} ({what}), torch {torch.__version__}")
    return device


def run_main(main):
    """Run a script's main: a UserError becomes one line on stderr and exit status 2, never a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


# Data parallelism in four functions.  Every rank holds the whole model and decodes its share of the prompts; the finished rollouts go
# to all ranks, so rewards, advantages and token counts are computed on the whole batch by the very code a single process runs; then each
# rank runs its share of the forward and backward passes, and the gradients are added up.


def ranks():
    """(rank, number of ranks) of this process: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(items):
    """The part of a list that this rank works on; put together in rank order the parts are the list.  7 items, 2 ranks -> 3 and 4."""
    rank, world = ranks()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def from_all_ranks(items):
    """The lists of all ranks put together in rank order: the same list on every rank."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def update(model, optimizers):
    """One optimizer step on the gradients of all ranks together, clipped to norm 1; returns their norm before clipping.

    Each rank's loss is divided by the token count of the *whole* batch, so the gradients are summed and not averaged.
    """
    trained = [getattr(p, "master", p) for p in model.parameters()]
    if dist.is_initialized():
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank without work
        for work in [dist.all_reduce(p.grad, async_op=True) for p in trained]:
            work.wait()
    norm = nn.utils.clip_grad_norm_(trained, 1.0).item()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for p, master in zip(model.parameters(), trained):
        if master is not p:
            p.data.copy_(master)
    return norm


class Run:
    """A stage's output folder: `args.json`, `log.jsonl`, and `resume/` while it is running (D8).

    Arguments that differ from those in `args.json` make a new run: what an earlier one left in the folder is removed.
    All ranks read here, rank 0 alone writes.
    """

    def __init__(self, args):
        self.path = Path(args.out)
        self.began = time.time()
        self.writes = ranks()[0] == 0
        written, args_file = json.dumps(vars(args), indent=2) + "\n", self.path / "args.json"
        if self.writes and (not args_file.is_file() or args_file.read_text() != written):
            for stale in ("model.safetensors", "log.jsonl", "episodes.txt"):
                (self.path / stale).unlink(missing_ok=True)
            for stale in ("resume", "data"):
                shutil.rmtree(self.path / stale, ignore_errors=True)
            write_atomic(args_file, lambda file: file.write_text(written))
        from_all_ranks([])  # nobody looks into the folder before it is in order

    def start(self, model, optimizers):
        """The step to go on after: 0, or where a killed run left off, with weights and optimizer state restored."""
        state_file, log = self.path / "resume" / "state.safetensors", self.path / "log.jsonl"
        if not state_file.is_file():
            if self.writes:
                log.unlink(missing_ok=True)
                (self.path / "episodes.txt").unlink(missing_ok=True)
            return 0
        state = load_file(state_file)
        step = int(state.pop("step"))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(state[f"model.{name}"])
                if hasattr(p, "master"):
                    p.master.copy_(state[f"model.{name}"])
        for i, optimizer in enumerate(optimizers):
            packed = optimizer.state_dict()
            packed["state"] = {}
            for key, value in state.items():  # key: optim.<optimizer>.<parameter>.<name>
                if key.startswith(f"optim.{i}."):
                    _, _, parameter, name = key.split(".")
                    packed["state"].setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict(packed)
        if self.writes and log.is_file():
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= step]
            log.write_text("".join(line + "\n" for line in kept))
        print(f"resuming {self.path} after step {step}")
        return step

    def checkpoint(self, model, optimizers, step):
        """Write what `start` reads back."""
        if not self.writes:
            return
        state = {f"model.{k}": getattr(p, "master", p).detach().cpu().contiguous() for k, p in model.named_parameters()}
        for i, optimizer in enumerate(optimizers):
            for parameter, values in optimizer.state_dict()["state"].items():
                for name, value in values.items():
                    state[f"optim.{i}.{parameter}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        state["step"] = torch.tensor(step)
        write_atomic(self.path / "resume" / "state.safetensors", lambda file: save_file(state, file))

    def log(self, **row):
        """Append one object to log.jsonl.  A non-finite loss stops the run; the last checkpoint stays."""
        row["seconds"] = round(time.time() - self.began, 2)
        if not math.isfinite(row.get("loss", 0.0)):
            raise UserError(f"loss is {row['loss']} at step {row['step']}; {self.path} keeps its last good state: lower --lr and rerun")
        if not self.writes:
            return
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    def episodes(self, step, episodes):
        """Append three whole episodes to `episodes.txt`; each is (question, response, verdict)."""
        if not self.writes:
            return
        with open(self.path / "episodes.txt", "a") as file:
            for question, text, verdict in random.Random(step).sample(episodes, min(3, len(episodes))):
                file.write(f"==== step {step} | {verdict}\n{question}\n{text}\n\n")

    def finish(self, model, tokenizer):
        """Write the stage's checkpoint and drop `resume/`."""
        if self.writes:
            save(model, tokenizer, self.path)
            shutil.rmtree(self.path / "resume", ignore_errors=True)
        from_all_ranks([])  # now every rank finds it
        print(f"wrote {self.path} ({time.time() - self.began:.0f} s)")


def make_optimizers(model, lr, muon_lr=0.0, betas=(0.9, 0.99), gain_factor=1.0):
    """AdamW on everything; with muon_lr > 0, Muon on the matrices of the blocks and AdamW on the rest.

    gain_factor: the last norm's gains, which are the scale of the logits, learn so many times faster.  They are of size 1 where a matrix's
    entries are of 0.05, so at the same rate they hardly move; and every token has a say in each, so their gradient is the least noisy of all.

    A weight that is not fp32 gets an fp32 master, `p.master`: added to a bf16 weight, a step of less than 1/256 of it is rounded away.
    Backward adds its gradients up in the master's, the optimizers step the masters, and `update` rounds them back into the model.
    """

    def hand_over(p):
        p.master.grad = p.grad.float() if p.master.grad is None else p.master.grad.add_(p.grad)
        p.grad = None

    for p in model.parameters():
        if p.dtype != torch.float32:
            p.master = p.detach().float()
            p.register_post_accumulate_grad_hook(hand_over)
    matrices = [p for p in model.model["layers"].parameters() if p.dim() == 2] if muon_lr else []
    taken = {id(p) for p in matrices}
    rest = [getattr(p, "master", p) for p in model.parameters() if id(p) not in taken]
    matrices = [getattr(p, "master", p) for p in matrices]
    gain = getattr(model.model["norm"].weight, "master", model.model["norm"].weight)
    groups = [{"params": [p for p in rest if p is not gain]}, {"params": [gain], "lr": gain_factor * lr}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=0.0)]
    if muon_lr:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01))
    for optimizer in optimizers:
        for g in optimizer.param_groups:
            g["base_lr"] = g["lr"]
    return optimizers


def recompute_activations(model):
    """Keep only every block's input for the backward pass, and compute what is inside again there: a third more time, and a few dozen
    times less memory for activations.  Decoding, without gradients, is not touched."""
    for block in model.model["layers"]:

        def forward(*args, run=block.forward):
            if not torch.is_grad_enabled():
                return run(*args)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random

        block.forward = forward


def set_lr(optimizers, factor):
    """Every learning rate = its base times factor."""
    for optimizer in optimizers:
        for g in optimizer.param_groups:
            g["lr"] = g["base_lr"] * factor


def response_text(tokenizer, ids):
    """Decoded response without chat markup; tags stay, whether they are text, tokens, or tokens marked special (as in NPR-4B)."""
    markup = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special and not ANY_TAG.fullmatch(token.content)}
    return tokenizer.decode([i for i in ids if i not in markup])


def print_inherited(path):
    """One line on what the checkpoint at path was made with."""
    file = Path(path) / "args.json"
    made = json.loads(file.read_text()) if file.is_file() else {}
    told = ", ".join(f"{k} {v}" for k, v in made.items() if k in ("init", "steps", "lr", "seed", "kind", "sequential"))
    print(f"init: {path} ({told or 'no args.json: not made by this project'})")


def pad_rows(rows, value, length=0):
    """Right-pad integer lists to one tensor, at least so long: [[1, 2], [3]], 0 -> [[1, 2], [3, 0]].  Causal masks hide the padding."""
    T = max(length, *map(len, rows))
    return torch.tensor([list(row) + [value] * (T - len(row)) for row in rows])  # (B, T)


# ======================================================================================================================
# 7. Pretraining the tiny base
# ======================================================================================================================


def corpus_batches(tokenizer, args, step):
    """This rank's micro-batches of one step: (ids (B, T), mask (B, T)), mask True where a token is learned (the responses).

    Seeded by (seed, step), so a resumed run sees what it would have seen.  Documents of a step are sorted by length, which
    leaves 15 per cent of padding and lets attention take its fastest, purely causal path.
    """
    rng, docs = random.Random(f"{args.seed}/{step}"), []
    while sum(len(ids) for ids, _ in docs) < args.batch_tokens:
        question, system, response = corpus_document(rng, args.slip, args.valid_share, args.malformed_share)
        prompt = prompt_ids(tokenizer, question, system)
        docs.append((prompt + tokenizer.encode(response) + [tokenizer.eos_token_id], len(prompt)))
    docs.sort(key=lambda d: len(d[0]))
    rank, world = ranks()
    docs = docs[rank::world]
    size = math.ceil(len(docs) / args.micro_batches)
    for i in range(0, len(docs), size):
        ids = pad_rows([d[0] for d in docs[i : i + size]], tokenizer.pad_token_id)
        starts, ends = torch.tensor([[p, len(d)] for d, p in docs[i : i + size]]).unbind(1)
        column = torch.arange(ids.shape[1])[None]
        yield ids, (column >= starts[:, None]) & (column < ends[:, None])


def measure_base(path, n, seed, device):
    """What the saved base can do, sampled by transformers' own `generate` (temperature 1): proof that the checkpoint is an
    ordinary one.  Returns {kind: {accuracy when asked plainly, accuracy and valid share when asked for the format}}."""
    model = AutoModelForCausalLM.from_pretrained(path).to(device)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    torch.manual_seed(seed)
    table = {}
    for kind in KINDS:
        problems, row = my_share(make_problems(kind, "tune", n, seed)), {}
        for name, system in (("plain", PLAIN_PROMPT), ("format", FORMAT_PROMPT)):
            prompts = [{"input_ids": prompt_ids(tokenizer, p.question, system)} for p in problems]
            batch = tokenizer.pad(prompts, return_tensors="pt").to(device)
            out = model.generate(**batch, max_new_tokens=512, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            verdicts = from_all_ranks([(p.verify(t), is_canonical(t)) for p, t in zip(problems, texts)])
            row[f"{name} accuracy"], row[f"{name} valid"] = (sum(column) / n for column in zip(*verdicts))
        table[kind] = row
    return table


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="out/stage0", help="folder to write the checkpoint to")
    p.add_argument("--steps", type=int, default=2400, help="optimizer steps")
    p.add_argument("--batch-tokens", type=int, default=4_096, help="tokens per optimizer step, prompts included")
    p.add_argument("--micro-batches", type=int, default=3, help="pieces a step is cut into, by document length: two leave 24 %% of padding, three 15 %%")
    p.add_argument("--lr", type=float, default=3e-3, help="AdamW learning rate (embeddings and norms)")
    p.add_argument("--muon-lr", type=float, default=4e-3, help="Muon learning rate (matrices)")
    p.add_argument("--warmdown", type=float, default=0.3, help="share of the steps over which the rate falls to zero at the end")
    p.add_argument("--slip", type=float, default=0.01, help="probability that a single result in the corpus is wrong")
    p.add_argument("--valid-share", type=float, default=0.45, help="share of format-asking documents that are perfect")
    p.add_argument("--malformed-share", type=float, default=0.15, help="share of format-asking documents that nearly are")
    p.add_argument("--hidden-size", type=int, default=128, help="width of the model, C")
    p.add_argument("--layers", type=int, default=4, help="number of blocks")
    p.add_argument("--save-every", type=int, default=200, help="steps between resume points")
    p.add_argument("--measure", type=int, default=60, help="problems per kind for the closing measurement, 0 for none")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..")
    return p.parse_args(argv)


def main():
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    run = Run(args)

    # ---- tokenizer and model ----
    rng = random.Random(f"{args.seed}/tokenizer")
    docs = [corpus_document(rng, args.slip, 0.5, 0.2) for _ in range(2000)]
    tokenizer = train_tokenizer(text for doc in docs for text in doc + ("system", "user", "assistant"))
    C = args.hidden_size
    config = Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 16) * 16 + 16,  # spare rows, as in Qwen3: stage 2's tags will fit without resizing
        hidden_size=C, intermediate_size=3 * C, num_hidden_layers=args.layers,
        num_attention_heads=C // 32, num_key_value_heads=max(1, C // 128), eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen3(config).to(device)
    print(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    first = run.start(model, optimizers)

    # ---- train ----
    bar = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, desc="stage 0", mininterval=1.0)
    for step in bar:
        began, batches = time.time(), list(corpus_batches(tokenizer, args, step))
        learned = sum(from_all_ranks([int(mask[:, 1:].sum()) for _, mask in batches]))
        loss = 0.0
        for ids, mask in batches:
            ids, mask = ids.to(device), mask.to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model.logits(model.hidden(ids[:, :-1])[mask[:, 1:]])  # (N, V): of what is learned only
            nll = F.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]], reduction="sum") / learned
            nll.backward()
            loss += nll.item()
        # a short warm-up, then flat: the loss sits on a plateau for millions of tokens before arithmetic clicks
        set_lr(optimizers, min(1.0, step / 50, (args.steps + 1 - step) / max(1.0, args.warmdown * args.steps)))
        norm = update(model, optimizers)
        loss, tokens = map(sum, zip(*from_all_ranks([(loss, sum(ids.numel() for ids, _ in batches))])))
        run.log(step=step, loss=loss, grad_norm=norm, tokens_per_second=tokens / (time.time() - began))
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{tokens / (time.time() - began):.0f}", refresh=False)
        if step % args.save_every == 0:
            run.checkpoint(model, optimizers, step)
    run.finish(model, tokenizer)

    # ---- what can it do? ----
    if args.measure:
        print(f"what the base can do ({args.measure} problems per kind of the tune split, temperature 1, transformers' generate):")
        for kind, row in measure_base(run.path, args.measure, args.seed, device).items():
            print(f"  {kind:10s} " + "   ".join(f"{k} {v:.1%}" for k, v in row.items()))


if __name__ == "__main__":
    run_main(main)

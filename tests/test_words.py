"""Problems in English words: read by a solver of its own, worked, missed, and learned from a checkpoint."""

import itertools
import json
import random
import re
import shlex
import subprocess
import sys
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_model
from real_checkpoint import real_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer

import eval as judge
import stage0_model as stage0
import stage1_zero
import stage2_beta
import stage3_papo
from stage0_model import WORD_KINDS, make_problems
from stage1_zero import format_score, parse_response

WEIGHTS = ROOT / "out" / "real-weights"
FRAMES = json.loads((ROOT / "assets" / "words.json").read_text())

# ---- a reader of its own: what these words do to a number in English ----

FACTORS = {2: "doubles|doubled|twice as many", 3: "triples|tripled"}
LESS = (
    r"gives \d+ (?:away|back|to)|loses|trades|spends|lends|pays|drops|lets \d+ out|leaves|burns|uses up|"
    r"passes|cut by|shrinks|lighter|do without|hands|sells \d+|sends|breaks"
)
MORE = (
    r"wins|finds|is given|swaps|earns|gets|sells an old book|picks|takes|lets \d+ board|fills in|grows|"
    r"raised|gains|richer|needs|scores|receives|buys|welcomes|makes|finishes"
)
PERSON = r"\b(?!(?:The|On|At|In|For|Before|Monday|January)\b)[A-Z][a-z]+"
THING = r"[Tt]he (?:[a-z]+ (?:bus|tram|train|ferry|order|shelf|farm|engine)|[a-z]+)"


def after(value, clause):
    """A number after what a clause says has happened to it."""
    for factor, words in FACTORS.items():
        if re.search(words, clause):
            return value * factor
    [number] = map(int, re.findall(r"\d+", clause))
    less, more = (bool(re.search(rf"\b(?:{words})\b", clause)) for words in (LESS, MORE))
    assert less != more, clause
    return value - number if less else value + number


def told(question):
    """The answer of a story by reading it, sentence by sentence."""
    _, *sentences, ask = re.split(r"(?<=[.?]) ", question)
    ends = {}
    name = ""  # whom the last opening was about
    for text in sentences:
        if re.match("(?:Then )?(?:she|he|it) ", text, re.I):
            for clause in re.split(", | and ", text):
                ends[name] = after(ends[name], clause)
        else:
            name = (re.search(PERSON, text) or re.search(THING, text))[0].replace("The ", "the ")
            [ends[name]] = map(int, re.findall(r"\d+", text))
    if re.search("in all|altogether|total", ask):
        return str(sum(ends.values()))
    assert ("most" in ask) != ("fewest" in ask)
    return (max if "most" in ask else min)(ends, key=ends.get)


def bought(question):
    """The pairs that cost what is asked for, by reading what each thing costs."""
    first, rest = question.split(". ", 1)
    prices = {}
    for part in re.split(", | and ", first.replace("asks ", "asks, ")):
        price = re.search(r"\d+", part)
        if price:
            prices[re.search(r"the ([a-z -]+?)(?: (?:costs|for|at) \d+ .*)?$", part)[1]] = int(price[0])
    [target] = map(int, re.findall(r"\d+", rest))
    return [{a, b} for a, b in itertools.combinations(prices, 2) if prices[a] + prices[b] == target]


def problems(kind, n=200, **how):
    return make_problems(kind, how.pop("split", "train"), n, 0, **how)


@pytest.mark.parametrize("split", ["train", "heldout", "hard"])
def test_an_independent_reader_answers_every_problem_alike(split):
    for p in problems("stories", split=split):
        assert told(p.question) == p.answer, p.question
    for p in problems("shopping", split=split):
        [pair] = bought(p.question)  # there is one, and no other
        assert pair == set(p.answer.split(" and ")), p.question


def frames_of(node):
    """Every sentence frame of the data file."""
    if isinstance(node, dict):
        return [f for key, value in node.items() if key not in ("plan", "things") for f in frames_of(value)]
    if isinstance(node, list):
        return [f for value in node for f in frames_of(value)]
    return [node] if "{" in node else []


def test_there_are_more_than_forty_frames_and_each_is_told_in_some_problem():
    text = "\n".join(p.question for kind in WORD_KINDS for p in problems(kind, 800))
    frames = set(frames_of(FRAMES))
    assert len(frames) > 100
    for frame in frames:
        pattern = re.sub(r"\\{\w+\\}", "[^.?]+?", re.escape(frame))
        assert re.search(pattern, text), frame


@pytest.mark.parametrize("kind", ["words", *WORD_KINDS])
def test_problems_are_seeded_distinct_and_splits_are_disjoint(kind):
    seen = {split: {p.question for p in problems(kind, 150, split=split)} for split in stage0.SPLITS}
    assert all(len(questions) == 150 for questions in seen.values())
    assert not any(a & b for a, b in itertools.combinations(seen.values(), 2))
    # not by chance: a question's hash says where it belongs, and hard ones are of no other's size
    tenths = {s: {int(sha256(q.encode()).hexdigest(), 16) % 10 for q in seen[s]} for s in seen}
    assert tenths["tune"] == {0} and tenths["heldout"] == {1} and tenths["train"] == set(range(2, 10))
    assert {p.question for p in problems(kind, 150)} == seen["train"]


def test_stories_come_from_their_rungs_in_small_numbers_and_nobody_shares_the_most():
    for reach in ("corpus", "edge", "beyond"):
        known = stage0.RUNGS["stories"][reach]
        for p in problems("stories", 100, split="hard", reach=reach):
            depths = {len(moves) for *_, moves in p.parts["stories"]}
            assert depths <= set(known[0]) and len(depths) == 1 and len(p.parts["labels"]) in known[1]
            [(_, steps, _)], _ = stage0.work_out(p, random.Random(0), 0.0)
            results = [[int(n) for n in re.findall(r"= (\d+)", step)] for step in steps]
            assert all(1 <= n <= 99 for each in results for n in each)
            assert len({each[-1] for each in results}) == len(results)
    assert stage0.RUNGS["stories"]["edge"][0].keys() <= {2, 3, 4, 5}
    deeper = zip(*(stage0.RUNGS["stories"][reach] for reach in ("edge", "beyond")))
    assert all(max(edge) < min(beyond) for edge, beyond in deeper)


def test_every_kind_is_chosen_by_words_and_none_of_them_by_all():
    assert {p.kind for p in problems("words", 40)} == set(WORD_KINDS)
    assert not {p.kind for p in problems("all", 40)} & set(WORD_KINDS)
    rng = random.Random(0)
    asked = [stage0.corpus_document(rng, 0.0, 1.0, 0.0, "words")[0] for _ in range(40)]
    assert all(stage0.split_of(q) == "train" and q.count(" ") > 20 for q in asked)


def test_right_solutions_plain_and_tagged_verify_and_state_nothing_false():
    rng = random.Random(0)
    found = 0
    for p in problems("words", 200):
        rounds, answer = stage0.work_out(p, rng, 0.0)
        plain, tagged = stage0.plain_solution(rounds, answer), stage0.tagged_solution(rounds, answer)
        assert format_score(tagged) == 0.0 and stage0.step_errors(p, plain) == []
        assert stage0.step_errors(p, tagged) == []
        found += answer != "none"
        assert p.verify(plain) == p.verify(tagged) == (answer != "none"), plain
    assert 0.8 < found / 200 < 1.0  # a search may end without having tried the right pair


# what is worst about each of the seven
WORST = [
    "text between tags",
    "counts differ",
    "numbering",
    "no answer",
    "overlapping tags",
    "block out of order",
    "overlapping tags",
]


@pytest.mark.parametrize("miss", range(7))
def test_every_near_miss_is_malformed(miss):
    rng = random.Random(0)
    for p in problems("words", 40):
        rounds, answer = stage0.work_out(p, rng, 0.0)
        bad = stage0.malformed_solution(rounds, answer, SimpleNamespace(randrange=lambda n: miss))
        assert format_score(bad) < 0 and parse_response(bad).violations[0] == WORST[miss], bad


def test_a_solution_has_false_statements_where_and_only_where_it_has_slips(monkeypatch):
    slips = []
    slipped = stage0.slipped

    def slipping(value, *args):
        given = slipped(value, *args)
        slips.append(given != value)
        return given

    monkeypatch.setattr(stage0, "slipped", slipping)
    rng = random.Random(0)
    flagged = 0
    for p in problems("words", 200):
        slips.clear()
        text = stage0.tagged_solution(*stage0.work_out(p, rng, 0.05))
        visible = any(slips)
        flagged += visible
        assert bool(stage0.step_errors(p, text)) == visible, text
    assert 50 < flagged < 190


STORY = stage0.Problem(
    "stories",
    "",
    "57",
    {
        "labels": ["Ana", "the red bus"],
        "stories": [
            ("Ana", "she", "", 12, [("+", 5, "wins {n}")]),
            ("the red bus", "it", "", 20, [("*", 2, "is doubled")]),
        ],
        "goal": "total",
        "things": "stamps",
        "plans": ["", ""],
    },
)
WORKED = (
    "Ana starts with 12 stamps. She wins 5: 12 + 5 = 17. So Ana has 17 stamps. The red bus starts with 20. "
    "It is doubled: 20 * 2 = 40. So the red bus has 40 stamps. Together 17 + 40 = 57. \\boxed{57}"
)
SHOP = stage0.Problem(
    "shopping",
    "",
    "pen and glue stick",
    {
        "labels": ["pen", "glue stick", "cap"],
        "prices": {"pen": 12, "glue stick": 30, "cap": 7},
        "target": 42,
    },
)
TRIED = (
    "The pen costs 12. With the glue stick 12 + 30 = 42, yes. With the cap 12 + 7 = 19, no. "
    "The pen and the glue stick fit. Found: pen and glue stick. \\boxed{pen and glue stick}"
)


@pytest.mark.parametrize(
    "problem, text, change, false",
    [
        (STORY, WORKED, {}, []),
        (STORY, WORKED, {"has 17": "has 18"}, ["Ana has 18"]),
        (STORY, WORKED, {"= 57.": "= 58."}, ["17 + 40 = 58"]),
        (STORY, WORKED, {"= 17": "= 19"}, ["12 + 5 = 19", "Ana"]),
        (STORY, WORKED, {"12 + 5 = 17": "12 + 5 == 17"}, ["12 + 5 = ", " = 17", "Ana"]),
        (STORY, WORKED, {"20 * 2 = 40": "20 + 20 = 40"}, ["the red bus"]),  # true, and not what happened
        (STORY, WORKED, {"The red bus has 40": "The red bus has 41", "bus has 40": "bus has 41"}, None),
        (STORY, "\\boxed{57}", {}, ["Ana", "the red bus"]),  # right by luck
        (STORY, "9" * 5000 + " = 1. Ana has " + "9" * 5000, {}, None),
        (SHOP, TRIED, {}, []),
        (SHOP, TRIED, {"The pen costs 12": "The pen costs 13"}, ["pen 13"]),
        (SHOP, TRIED, {"12 + 7 = 19, no": "12 + 7 = 19, yes"}, ["19, yes"]),
        (SHOP, TRIED, {"42, yes": "42, no"}, ["42, no"]),
        (SHOP, TRIED, {"12 + 7 = 19": "12 + 8 = 20"}, ["cap 8"]),
        (SHOP, TRIED, {"= 19": "= 18"}, ["12 + 7 = 18"]),
    ],
)
def test_every_false_statement_is_named(problem, text, change, false):
    for old, new in change.items():
        text = text.replace(old, new)
    found = stage0.step_errors(problem, text)
    assert found if false is None else found == false


@pytest.mark.parametrize(
    "problem, boxed, right",
    [
        (STORY, "57", True),
        (STORY, "057", True),
        (STORY, "58", False),
        (stage0.Problem("stories", "", "the red bus"), "The red bus", True),
        (stage0.Problem("stories", "", "Ana"), "Ana", True),
        (stage0.Problem("stories", "", "Ana"), "Ana or Ben", False),
        (SHOP, "glue stick and pen", True),
        (SHOP, "the pen and the glue stick", True),
        (SHOP, "pen and cap", False),
        (SHOP, "pen, glue stick, cap", False),  # all of them
        (SHOP, "none", False),
    ],
)
def test_an_answer_in_words_is_right_or_wrong_whatever_its_order(problem, boxed, right):
    assert problem.verify(f"so \\boxed{{{boxed}}}") is right


def test_no_thing_is_named_within_another_and_every_theme_has_eight_subjects():
    for shop in FRAMES["shopping"]:
        assert len(set(shop["items"])) == len(shop["items"]) >= 8
        pairs = itertools.permutations(shop["items"], 2)
        assert not [a for a, b in pairs if re.search(rf"\b{a}\b", b)]
    for theme in FRAMES["stories"]:
        names = [name for each in theme.get("who", FRAMES["people"]).values() for name in each]
        assert len(set(names)) == len(names) >= 8


def tokenizers():
    yield real_tokenizer()  # cuts words as Qwen does
    if (WEIGHTS / "tokenizer.json").is_file():
        yield AutoTokenizer.from_pretrained(WEIGHTS)


def test_digits_are_single_tokens_in_the_vocabularies_of_real_models():
    """Qwen's way of cutting, and SmolLM2's own vocabulary where `make real-weights` has fetched it."""
    rng = random.Random(0)
    for tokenizer in tokenizers():
        for p in problems("words", 60):
            text = p.question + stage0.tagged_solution(*stage0.work_out(p, rng, 0.0))
            ids = tokenizer.encode(text, add_special_tokens=False)
            pieces = [tokenizer.decode([i]).strip() for i in ids]
            digits = [piece for piece in pieces if re.search(r"\d", piece)]
            assert all(re.fullmatch(r"\d", piece) for piece in digits)
            assert digits == re.findall(r"\d", text)


# ---- stage 0 goes on training a checkpoint ----


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tokenizer = real_tokenizer()
    model = random_model(len(tokenizer), std=0.05, model_type="llama", tie_word_embeddings=True)
    stage0.save(model, tokenizer, path)
    return path


def train(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["stage0_model.py", *map(str, flags), "--device", "cpu"])
    stage0.main()


FLAGS = "--kind words --steps 2 --batch-tokens 1500 --lr 1e-4 --muon-lr 0 --save-every 1".split()


@pytest.mark.parametrize("more", ["", "--dtype bfloat16", "--recompute"])
def test_stage_0_goes_on_training_a_checkpoint_resumes_and_saves_under_its_own_name(
    llama, tmp_path, monkeypatch, more
):
    flags = ["--init", llama, *FLAGS, *more.split()]
    train(monkeypatch, *flags, "--out", tmp_path / "whole")

    # cut off after the first step, then the same command
    end_step = stage0.Run.end_step

    def cut_off(run, model, optimizers, step):
        end_step(run, model, optimizers, step)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage0.Run, "end_step", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, *flags, "--out", tmp_path / "resumed")
    monkeypatch.setattr(stage0.Run, "end_step", end_step)
    train(monkeypatch, *flags, "--out", tmp_path / "resumed")

    whole, resumed, first = (
        load_file(path / "model.safetensors") for path in (tmp_path / "whole", tmp_path / "resumed", llama)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name].float(), first[name]) for name in whole)
    made = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert made["model_type"] == "llama" and made["architectures"] == ["LlamaForCausalLM"]
    assert made["dtype"] == ("bfloat16" if "bfloat16" in more else "float32")
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "whole" / file).read_text() == (llama / file).read_text()


def test_what_is_learned_are_worked_solutions_in_the_checkpoints_own_chat_markup(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    args = stage0.parse_args(["--init", str(llama), *FLAGS])
    shown = []
    for ids, mask in stage0.corpus_batches(tokenizer, args, step=1):
        for row, learned in zip(ids, mask):
            prompt, response = tokenizer.decode(row[~learned]), tokenizer.decode(row[learned])
            assert prompt.startswith("<|im_start|>system\nWork ") and "<think>\n\n</think>" in prompt
            assert response.endswith("}<|im_end|>") or response.endswith(".<|im_end|>")
            shown.append("<guideline>" in response)
    assert any(shown) and not all(shown)


def test_the_rates_of_a_new_model_are_refused_for_one_that_is_trained_already(llama):
    with pytest.raises(stage0.UserError, match="rates for a new model; give e.g. --lr 1e-4 --muon-lr 0"):
        stage0.parse_args(["--init", str(llama)])
    with pytest.raises(stage0.UserError, match="--lr 0.003"):
        stage0.parse_args(["--init", str(llama), "--muon-lr", "0"])


def test_make_words_runs_every_stage_the_twin_and_the_judge_with_flags_that_they_know():
    given = ["PY=python", "VENV=", "RANKS=1", "OUT=o", "INIT=Qwen/Qwen3-0.6B", "STAGE0=--lr 1e-5"]
    done = subprocess.run(["make", "-n", "words", *given], cwd=ROOT, capture_output=True, text=True)
    scripts = {"stage0_model": stage0, "stage1_zero": stage1_zero, "stage2_beta": stage2_beta}
    scripts |= {"stage3_papo": stage3_papo, "eval": judge}
    ran = []
    for name, flags in re.findall(r"^python +(\w+)\.py (.*)$", done.stdout, re.M):
        args = scripts[name].parse_args(shlex.split(flags))
        assert args.kind == "words"
        ran.append(args.out.removeprefix("o/words/"))
        if name == "stage0_model":  # the user's flags come last
            assert args.init == "Qwen/Qwen3-0.6B" and (args.lr, args.muon_lr) == (1e-5, 0.0)
    stages = ["stage0", "stage1", "stage2", "stage3", "stage2_seq", "stage3_seq"]
    assert ran == [*stages, "compared", "timed"], done.stderr

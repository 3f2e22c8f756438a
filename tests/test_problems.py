"""The synthetic world: splits, verifier, corpus."""

import itertools
import random
import re

import pytest

import stage0_model as stage0
from stage0_model import KINDS, evaluate, last_boxed, make_problems


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_problems_are_seeded_distinct_and_splits_are_disjoint(kind):
    seen = {
        split: {p.question for p in make_problems(kind, split, 150, seed=3)}
        for split in ("train", "tune", "heldout")
    }
    assert all(len(questions) == 150 for questions in seen.values())
    assert (
        not (seen["train"] & seen["tune"])
        and not (seen["train"] & seen["heldout"])
        and not (seen["tune"] & seen["heldout"])
    )
    again = make_problems(kind, "heldout", 150, seed=3)
    assert {p.question for p in again} == seen["heldout"]
    assert {p.question for p in make_problems(kind, "heldout", 150, seed=4)} != seen["heldout"]


def test_the_corpus_never_holds_a_heldout_or_tune_question():
    rng = random.Random(0)
    for _ in range(500):
        question, _, _ = stage0.corpus_document(rng, 0.05, 0.25, 0.15)
        assert stage0.split_of(question) == "train"


def worked_by_the_question(kind, question):
    """The answer of a chains or sums question, by its text alone."""
    if kind == "sums":  # 'A:37*6 -B:12*4 total ..' -> 37*6 -12*4: our own text, not a model's
        return eval(re.sub("[A-H]:", "", question.split(" total")[0])) % 100
    result = None
    for part in question.removesuffix(" modulo 100?").split("; "):
        *chains, goal = part.removesuffix(" M").split(" ")
        ends = []
        for chain in chains:
            first, *moves = re.findall("M|[0-9]+|[-+*][0-9]+", chain[2:])
            value = result if first == "M" else int(first)
            for move in moves:  # left to right, no precedence
                n = int(move[1:])
                value = {"+": value + n, "-": value - n, "*": value * n}[move[0]] % 100
            ends.append(value)
        result = {"largest": max, "smallest": min, "total": sum}[goal](ends) % 100
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "hard"])
def test_the_stated_answer_is_right_by_an_independent_calculation(kind, split):
    for p in make_problems(kind, split, 60, seed=0):
        if kind == "countdown":
            given, target = (
                [int(n) for n in side.rstrip("?").split()] for side in p.question.split(" make ")
            )
            value, used = evaluate(p.answer)
            assert [value] == target and sorted(used) == given
        else:
            assert int(p.answer) == worked_by_the_question(kind, p.question)
        assert p.verify(f"so \\boxed{{{p.answer}}}")


def rung(problem):
    """(depth, width) of a problem, from what its question says; a countdown's width by trying every
    first move and what + and - make of the numbers left, in their order, within 0..99."""
    if problem.kind == "chains":
        rounds = problem.question.split(";")
        return len(rounds), rounds[0].count(":")
    if problem.kind == "sums":
        factors = re.findall(r"\*(\d+)", problem.question)
        assert len({len(factor) for factor in factors}) == 1
        return len(factors[0]), len(factors)
    *numbers, target = map(int, re.findall(r"\d+", problem.question))
    leading = 0
    for y, x in itertools.combinations(numbers, 2):
        third, fourth = (n for n in numbers if n not in (x, y))
        for first in (x + y, x - y, x * y):
            middles = [m for m in (first + third, first - third) if 1 <= first <= 99 and 0 <= m <= 99]
            leading += target in [end for m in middles for end in (m + fourth, m - fourth)]
    return len(numbers), leading


@pytest.mark.parametrize("kind", KINDS)
def test_problems_come_from_the_rungs_of_their_reach(kind):
    rng = random.Random(0)
    for reach in ("corpus", "edge", "beyond"):
        depths, widths = zip(*(rung(stage0.draw_problem(kind, rng, reach)) for _ in range(200)))
        known = stage0.RUNGS[kind][reach]
        assert set(depths) <= set(known[0]) and set(widths) <= set(known[1])
        assert max(depths) == max(known[0]) or known[0][max(known[0])] < 2  # a rung of 1 % may be missed


def test_hard_problems_are_beyond_and_all_others_at_the_edge_unless_a_reach_is_given():
    assert {rung(p)[0] for p in make_problems("chains", "hard", 30, 0)} == set(
        stage0.RUNGS["chains"]["beyond"][0]
    )
    assert make_problems("all", "tune", 9, 0) == make_problems("all", "tune", 9, 0, "edge")
    assert stage0.draw_problems(None, "all", 9, 0) == make_problems("all", "train", 9, 0, "edge")
    assert stage0.draw_problems(None, "all", 9, 0, "corpus") == make_problems("all", "train", 9, 0, "corpus")


def test_a_countdown_tries_distinct_first_moves_and_stops_at_the_block_that_hits():
    rng = random.Random(0)
    for p in make_problems("countdown", "train", 200, 0):
        rounds, answer = stage0.work_out(p, rng, 0.0)
        tried = [plan for plans, _, _ in rounds for plan in plans]
        assert len(tried) == len(set(tried)) and all(len(plans) <= 8 for plans, _, _ in rounds)
        assert all(takeaway == "none" for _, _, takeaway in rounds[:-1]) and rounds[-1][2] == answer
        assert answer == "none" or p.verify(f"\\boxed{{{answer}}}")


def test_clean_worked_solutions_are_right_and_slips_make_some_wrong():
    rng = random.Random(0)
    for kind in ("chains", "sums"):  # a countdown may end without having tried what leads there
        problems = make_problems(kind, "train", 300, 0)
        assert all(p.verify(stage0.tagged_solution(*stage0.work_out(p, rng, 0.0))) for p in problems)
        assert all(p.verify(stage0.plain_solution(*stage0.work_out(p, rng, 0.0))) for p in problems)
        slipped = sum(p.verify(stage0.tagged_solution(*stage0.work_out(p, rng, 0.05))) for p in problems)
        assert 0.2 < slipped / 300 < 0.95


def test_no_malformed_corpus_document_has_fewer_tokens_than_its_valid_form(plain_tokenizer):
    rng = random.Random(0)
    for p in make_problems("all", "train", 300, 0):
        rounds, answer = stage0.work_out(p, rng, 0.05)
        good, bad = stage0.tagged_solution(rounds, answer), stage0.malformed_solution(rounds, answer, rng)
        assert len(plain_tokenizer.encode(bad)) >= len(plain_tokenizer.encode(good)), bad


@pytest.mark.parametrize(
    "text, right",
    [
        ("\\boxed{24}", True),
        ("first \\boxed{23} then \\boxed{24}", True),  # the last one counts
        ("\\boxed{24} then \\boxed{23}", False),
        ("24", False),
        ("\\boxed{24", False),
        ("<step>1:\\boxed{24}</step>", False),  # inside a block
        ("<takeaway>\\boxed{24}</takeaway> done", False),
        ("<takeaway>x</takeaway>\\boxed{024}", True),
        ("\\boxed{2 4}", False),
        ("\\boxed{\x1d24}", True),  # white space to strip(), a ValueError to int()
        ("\\boxed{\x1d25}", False),
        ("\\boxed{" + "9" * 5000 + "}", False),  # more digits than int() reads
        ("\\boxed{__import__('os')}", False),
    ],
)
def test_verifier_reads_only_the_last_box_after_the_last_block(text, right):
    p = stage0.Problem("sums", "12*2 total?", "24")
    assert p.verify(text) is right


@pytest.mark.parametrize(
    "answer, right",
    [
        ("(14-9)*3", True),
        ("3*(14-9)", True),
        ("9+3+3", False),  # 3 is given once
        ("15", False),  # 15 is not given
        ("14-9*3", False),  # wrong value
        ("(14-9)*3**1", False),
        ("2**99999999", False),
        ("x", False),
        ("", False),
    ],
)
def test_countdown_accepts_any_expression_that_uses_each_number_once(answer, right):
    p = stage0.Problem("countdown", "3 9 14 make 15?", "(14-9)*3", {"numbers": [3, 9, 14], "target": 15})
    assert p.verify(f"\\boxed{{{answer}}}") is right


def test_small_readers_do_what_their_docstrings_say():
    assert last_boxed("x \\boxed{a{b}} y") == "a{b}" and last_boxed("none") is None
    assert evaluate("(3+4)*2") == (14, [3, 4, 2])
    assert evaluate("().__class__") == (None, [])
    assert stage0.first_moves([2, 3]) == [(3, "+", 2, []), (3, "-", 2, []), (3, "*", 2, [])]
    middles = [("+", 51, [("+", 60), ("-", 42)]), ("-", 37, [("+", 46), ("-", 28)])]
    assert stage0.endings(44, [7, 9]) == middles
    assert stage0.endings(97, [7, 9]) == [("-", 90, [("+", 99), ("-", 81)])]  # 104 is too large
    tagged = "<guideline><plan>1:A</plan></guideline><step>1:A7+2=9</step><takeaway>9</takeaway>\\boxed{9}"
    assert stage0.tagged_solution([(["A"], ["A7+2=9"], "9")], "9") == tagged


def test_every_kind_is_worked_out_as_its_docstring_says():
    rng = random.Random(0)
    assert stage0.add_up([("+", "a", 51), ("-", "b", 66)], rng, 0.0) == ("a51-b66=85", 85)
    first = (["A", "B"], [(12, [("+", 5), ("*", 3)]), (40, [("-", 7), ("*", 2)])], "largest")
    second = (["C"], [("M", [("+", 2), ("*", 2)])], "smallest")
    rounds, answer = stage0.work_out_chains({"rounds": [first, second]}, rng, 0.0)
    assert rounds[0] == (["A", "B"], ["A12+5=17*3=51;a51", "B40-7=33*2=66;b66"], "a51b66;M66")
    assert (rounds[1], answer) == ((["C"], ["C66+2=68*2=36;c36"], "c36;M36"), "36")

    sums = {"labels": ["A", "B"], "terms": [("+", 47, 83), ("-", 12, 4)]}
    for written_share, step in ((0, "A47*83=3901;a01"), (1, "A47*83=47*80+47*3=3760+141=3901;a01")):
        [(_, steps, takeaway)], answer = stage0.work_out_sums(sums, rng, 0.0, written_share)
        assert (steps, takeaway, answer) == ([step, "B12*4=48;b48"], "a01-b48=53", "53")
    tried = stage0.try_move(22, "*", 2, [7, 9], 42, rng, 0.0)
    assert tried == ("22*2=44;+7=51+9=60/42n-9=42/42y;y(22*2)+7-9", "(22*2)+7-9")


def test_unknown_kind_or_split_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown problem kind 'riddles'"):
        make_problems("riddles", "train", 1, 0)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        make_problems("sums", "test", 1, 0)


def test_tokenizer_round_trips_any_text_and_splits_digits(plain_tokenizer):
    for text in ("12+5=17", "<plan>1:A</plan>", "héllo  wörld\n日本", "a\\boxed{7}"):
        assert plain_tokenizer.decode(plain_tokenizer.encode(text)) == text
    assert len(plain_tokenizer.encode("1234")) == 4
    assert len(plain_tokenizer.encode("<guideline>")) == 3  # tags are ordinary text until stage 2
    prompt = plain_tokenizer.decode(stage0.prompt_ids(plain_tokenizer, "12*2 total?", "Be brief."))
    system, user = "<|im_start|>system\nBe brief.<|im_end|>\n", "<|im_start|>user\n12*2 total?<|im_end|>\n"
    assert prompt == f"{system}{user}<|im_start|>assistant\n"

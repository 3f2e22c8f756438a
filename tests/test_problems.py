"""The synthetic world: splits, verifier, corpus."""

import random
import re

import pytest

import stage0_model as stage0
from stage0_model import KINDS, evaluate, last_boxed, make_problems


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_problems_are_seeded_distinct_and_splits_are_disjoint(kind):
    seen = {split: {p.question for p in make_problems(kind, split, 150, seed=3)} for split in ("train", "tune", "heldout")}
    assert all(len(questions) == 150 for questions in seen.values())
    assert not (seen["train"] & seen["tune"]) and not (seen["train"] & seen["heldout"]) and not (seen["tune"] & seen["heldout"])
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
    if kind == "sums":
        return eval(re.sub("[A-H]:", "", question.split(" total")[0])) % 100  # 'A:37*6 -B:12*4' -> 37*6 -12*4: our own text, not a model's
    result = None
    for part in question.removesuffix(" modulo 100?").split("; "):
        *chains, goal = part.removesuffix(" M").split(" ")
        ends = []
        for chain in chains:
            first, *moves = re.findall("M|[0-9]+|[-+*][0-9]+", chain[2:])
            value = result if first == "M" else int(first)
            for move in moves:  # left to right, no precedence
                value = {"+": value + int(move[1:]), "-": value - int(move[1:]), "*": value * int(move[1:])}[move[0]] % 100
            ends.append(value)
        result = {"largest": max, "smallest": min, "total": sum}[goal](ends) % 100
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "hard"])
def test_the_stated_answer_is_right_by_an_independent_calculation(kind, split):
    for p in make_problems(kind, split, 60, seed=0):
        if kind == "countdown":
            given, target = ([int(n) for n in side.rstrip("?").split()] for side in p.question.split(" make "))
            value, used = evaluate(p.answer)
            assert [value] == target and sorted(used) == given
        else:
            assert int(p.answer) == worked_by_the_question(kind, p.question)
        assert p.verify(f"so \\boxed{{{p.answer}}}")


def test_problems_come_from_the_rungs_of_their_reach():
    rng = random.Random(0)
    for reach in ("corpus", "edge", "beyond"):
        chains, sums, countdowns = ([stage0.draw_problem(kind, rng, reach) for _ in range(300)] for kind in KINDS)
        sizes = stage0.RUNGS["chains"][reach], stage0.RUNGS["sums"][reach]
        assert {len(p.parts["rounds"]) for p in chains} <= set(sizes[0][0])
        assert {len(p.parts["rounds"][0][0]) for p in chains} <= set(sizes[0][1])
        assert {len(str(b)) for p in sums for _, _, b in p.parts["terms"]} <= set(sizes[1][0])
        assert {len(p.parts["terms"]) for p in sums} <= set(sizes[1][1])
        for p in countdowns:
            ends = [
                {end for *_, ends in stage0.endings(stage0.apply_op(x, op, y), rest) for _, end in ends}
                for x, op, y, rest in stage0.first_moves(p.parts["numbers"])
            ]
            assert sum(p.parts["target"] in found for found in ends) == p.parts["leading"] in (1, 2)


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
    for kind in ("chains", "sums"):
        problems = make_problems(kind, "train", 300, 0)
        assert all(p.verify(stage0.tagged_solution(*stage0.work_out(p, rng, 0.0))) for p in problems)
        assert all(p.verify(stage0.plain_solution(*stage0.work_out(p, rng, 0.0))) for p in problems)
        assert 0.2 < sum(p.verify(stage0.tagged_solution(*stage0.work_out(p, rng, 0.05))) for p in problems) / 300 < 0.95


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
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12*2 total?<|im_end|>\n<|im_start|>assistant\n"

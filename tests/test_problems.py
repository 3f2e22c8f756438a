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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["train", "hard"])
def test_the_stated_answer_is_right_by_an_independent_calculation(kind, split):
    for p in make_problems(kind, split, 60, seed=0):
        if kind == "chains":
            asked, ends = p.question.rstrip("?").split(" of ")[1].split(" "), []
            for chain in p.question.split(" modulo")[0].split(" "):
                if chain[0] not in asked:
                    continue
                body, value = chain[2:], None
                numbers, ops = [int(x) for x in re.split(r"[-+*]", body)], [c for c in body if c in "+-*"]
                value = numbers[0]
                for op, n in zip(ops, numbers[1:]):  # left to right, no precedence
                    value = {"+": value + n, "-": value - n, "*": value * n}[op] % 100
                ends.append(value)
            goal = p.question.rstrip("?").split(", ")[1].split(" of ")[0]
            assert int(p.answer) == {"largest": max, "smallest": min, "total": lambda e: sum(e) % 100}[goal](
                ends
            )
        elif kind == "sums":
            terms, asked = p.question.rstrip("?").split(" modulo 100, total of ")
            asked = "".join(
                t.replace(":", "") for t in terms.split(" ") if t.lstrip("+-")[0] in asked.split(" ")
            )
            assert asked[0] != "-"  # a total never begins by taking away
            assert (
                int(p.answer) == eval(re.sub("[A-H]", "", asked)) % 100
            )  # A37*6-B12*4 -> 37*6-12*4: our own question, not model text
        else:
            given, target = (
                [int(n) for n in side.rstrip("?").split()] for side in p.question.split(" make ")
            )
            if p.answer == "none":
                for a, b, c in itertools.permutations(given):
                    for first, second in itertools.product("+-*", repeat=2):
                        tries = f"{a}{first}{b}", f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"
                        assert target[0] not in [eval(text) for text in tries]  # our own text, not a model's
            else:
                value, used = evaluate(p.answer)
                assert [value] == target and set(used) <= set(given)
        assert p.verify(f"so \\boxed{{{p.answer}}}")


def test_hard_problems_are_more_than_any_training_problem():
    operations = {
        split: [sum(len(ops) for _, ops in p.parts["chains"]) for p in make_problems("chains", split, 200, 0)]
        for split in ("train", "hard")
    }
    assert max(operations["train"]) == 60 and set(operations["hard"]) == {96}
    assert all(p.question.count(":") == 8 for p in make_problems("chains", "hard", 20, 0))
    assert {len(p.parts["terms"]) for p in make_problems("sums", "train", 200, 0)} == {2, 3, 4, 5, 6}
    assert {len(p.parts["terms"]) for p in make_problems("sums", "hard", 20, 0)} == {7, 8}
    assert (
        max(p.question.count("*") for p in make_problems("sums", "train", 200, 0)) == 8
    )  # a question as long as the hard ones
    assert all(len(p.parts["numbers"]) == 4 for p in make_problems("countdown", "hard", 20, 0))


def test_nothing_of_a_hard_chains_problem_is_new_but_that_it_is_all_at_once():
    seen = {split: make_problems("chains", split, 600, 0) for split in ("train", "hard")}
    for measure in (
        lambda p: p.question.count(":"),
        lambda p: len(p.parts["labels"]),
        lambda p: len(p.parts["chains"][0][1]),
    ):
        assert max(map(measure, seen["hard"])) == max(map(measure, seen["train"]))
    longest = {split: max(len(p.question) for p in problems) for split, problems in seen.items()}
    assert longest["train"] > 0.95 * longest["hard"]  # 600 problems may miss the very longest question


def test_some_countdowns_of_the_training_kind_have_no_solution_and_none_of_the_hard_ones():
    share = {
        split: sum(p.answer == "none" for p in make_problems("countdown", split, 300, 0)) / 300
        for split in ("train", "hard")
    }
    assert 0.1 < share["train"] < 0.3 and share["hard"] == 0


def test_training_problems_name_every_label_that_a_hard_one_names():
    for kind in ("chains", "sums"):
        named = {
            split: {label for p in make_problems(kind, split, 60, 0) for label in p.parts["labels"]}
            for split in ("train", "hard")
        }
        assert named["hard"] <= named["train"]


def test_a_countdown_tries_its_first_moves_in_order_until_one_leads_there_or_none_is_left():
    rng = random.Random(0)
    for p in make_problems("countdown", "train", 200, 0):
        order = [f"{x}{op}{y}" for x, op, y, _ in stage0.first_moves(p.parts["numbers"])]
        rounds, answer = stage0.work_out(p, rng, 0.0)
        tried = [plan for plans, _, _ in rounds for plan in plans]
        assert tried == order[: len(tried)] and (answer != "none" or len(tried) == len(order))
        assert all(takeaway == "none" for _, _, takeaway in rounds[:-1]) and rounds[-1][2] == answer


def test_no_block_of_a_countdown_has_fewer_than_three_plans_or_more_than_eight():
    rng = random.Random(0)
    for split in ("train", "hard"):
        for p in make_problems("countdown", split, 200, 0):
            assert all(3 <= len(plans) <= 8 for plans, _, _ in stage0.work_out(p, rng, 0.05)[0])


def test_clean_worked_solutions_are_right_and_slips_make_some_wrong():
    rng = random.Random(0)
    for kind in KINDS:
        problems = make_problems(kind, "train", 300, 0)
        assert all(p.verify(stage0.tagged_solution(*stage0.work_out(p, rng, 0.0))) for p in problems)
        assert all(p.verify(stage0.plain_solution(*stage0.work_out(p, rng, 0.0))) for p in problems)
        slipped = sum(p.verify(stage0.tagged_solution(*stage0.work_out(p, rng, 0.05))) for p in problems)
        assert (
            0.2 < slipped / 300 < (1 if kind == "countdown" else 0.95)
        )  # most countdowns have more than one way


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


def test_where_nothing_reaches_the_target_only_the_word_none_is_right():
    p = stage0.Problem("countdown", "3 9 14 make 16?", "none", {"numbers": [3, 9, 14], "target": 16})
    assert (
        p.verify("\\boxed{none}") and not p.verify("\\boxed{14+2}") and not p.verify("\\boxed{None of them}")
    )
    assert not stage0.Problem("countdown", "3 9 14 make 15?", "(14-9)*3", p.parts | {"target": 15}).verify(
        "\\boxed{none}"
    )
    assert stage0.reachable([2, 3]) == {1, 2, 3, 5, 6}


def test_small_readers_do_what_their_docstrings_say():
    assert last_boxed("x \\boxed{a{b}} y") == "a{b}" and last_boxed("none") is None
    assert evaluate("(3+4)*2") == (14, [3, 4, 2])
    assert evaluate("().__class__") == (None, [])
    assert stage0.first_moves([2, 3]) == [(3, "+", 2, []), (3, "-", 2, []), (3, "*", 2, [])]
    assert (
        stage0.two_moves(7, "+", 5, "+", 18, 12) == "(7+5)+18"
        and stage0.two_moves(7, "+", 5, "-", 18, 12) == "18-(7+5)"
    )
    tagged = "<guideline><plan>1:A</plan></guideline><step>1:A7+2=9</step><takeaway>9</takeaway>\\boxed{9}"
    assert stage0.tagged_solution([(["A"], ["A7+2=9"], "9")], "9") == tagged


def test_every_kind_is_worked_out_as_its_docstring_says():
    rng = random.Random(0)
    assert stage0.add_up([("+", "a", 51), ("-", "b", 66)], rng, 0.0) == ("a51-b66=85", "85")
    chains = {
        "labels": ["A", "B"],
        "chains": [(12, [("+", 5), ("*", 3)]), (40, [("-", 7), ("*", 2)])],
        "goal": "largest",
    }
    worked = ["A12+5=17*3=51;a51", "B40-7=33*2=66;b66"]
    assert stage0.work_out_chains(chains, rng, 0.0) == ([(["A", "B"], worked, "a51b66")], "66")
    sums = {"labels": ["A", "B"], "terms": [("+", 37, 6), ("-", 12, 4)]}
    [(_, steps, takeaway)], answer = stage0.work_out_sums(sums, rng, 0.0)
    assert (steps[0], takeaway, answer) == ("A37*6=30*6+7*6=180+42=222;a22", "a22-b48=74", "74")
    tried = stage0.try_move(14, "-", 9, [3], 15, rng, 0.0)
    assert tried == ("14-9=5;5+3=8/15n5-3=2/15n5*3=15/15y;y(14-9)*3", "(14-9)*3")


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

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
    hard = {p.question for p in make_problems(kind, "hard", 100, seed=3)}
    assert {stage0.split_of(question) for question in hard} == {"heldout"}
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


def worked_by_the_question(question):
    """The answer of a chains or sums question, by its text alone."""
    *chains, goal = question.removesuffix(" modulo 100?").split(" ")
    ends = []
    for chain in chains:
        first, *moves = re.findall("[0-9]+|[-+*][0-9]+", chain[2:])
        value = int(first)
        for move in moves:  # left to right, no precedence
            n = int(move[1:])
            value = {"+": value + n, "-": value - n, "*": value * n}[move[0]]
        ends.append(value % 100)
    return {"largest": max, "smallest": min, "total": sum}[goal](ends) % 100


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
            assert int(p.answer) == worked_by_the_question(p.question)
        assert p.verify(f"so \\boxed{{{p.answer}}}")


def rung(problem):
    """(depth, width) of a problem, from what its question says; a countdown's width by trying every
    first move and what + and - make of the numbers left, in their order, within 0..99."""
    if problem.kind != "countdown":
        parts = re.findall(r"[A-H]:\d+(\S+)", problem.question)
        [depth] = {len(re.findall("[-+*]", part)) for part in parts}  # all parts are equally long
        return depth, len(parts)
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
    assert {rung(p)[0] for p in make_problems("chains", "train", 60, 0, "corpus")} > {3, 4, 5}


def test_every_rung_of_any_reach_can_be_asked_for_exactly():
    for kind in KINDS:
        depths, widths = (sorted(set().union(*each)) for each in zip(*stage0.RUNGS[kind].values()))
        for depth, width in itertools.product(depths, widths):
            for split in ("heldout", "hard"):
                problems = make_problems(kind, split, 3, 0, depth=depth, width=width)
                assert {rung(p) for p in problems} == {(depth, width)}
                assert all(stage0.split_of(p.question) == "heldout" for p in problems)
    # one of the two alone: the other is drawn as ever
    assert {rung(p)[0] for p in make_problems("sums", "tune", 40, 0, depth=5)} == {5}
    assert len({rung(p)[1] for p in make_problems("sums", "tune", 40, 0, depth=5)}) > 3


@pytest.mark.parametrize(
    "kind, size, message",
    [
        ("all", {"depth": 2}, "--depth 2: chains has 3, 4, 5"),
        ("countdown", {"depth": 2}, "--depth 2: countdown has 4; give one of these, or another --kind"),
        ("chains", {"depth": 4, "width": -1}, "--width -1: chains has 1, 2, 3, 4, 5, 6, 7, 8"),
        ("sums", {"depth": 1, "width": 1}, "sums/heldout has no 15000 distinct problems"),
    ],
)
def test_a_rung_that_is_not_there_or_too_small_is_refused_by_name(kind, size, message):
    with pytest.raises(stage0.UserError, match=message):
        make_problems(kind, "heldout", 15000, 0, **size)


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
    ends = [("a", 51), ("b", 66), ("c", 90)]
    assert stage0.add_up(ends, rng, 0.0) == ("a51+b66=17+c90=07", 7)
    chains = [(12, [("+", 5), ("*", 3)]), (40, [("-", 7), ("*", 2)])]
    largest = {"labels": ["A", "B"], "chains": chains, "goal": "largest"}
    written = (["A", "B"], ["A12+5=17*3=51;a51", "B40-7=33*2=66;b66"], "a51b66")
    assert stage0.work_out_named(largest, rng, 0.0, in_writing=True) == ([written], "66")
    in_the_head = (["A", "B"], ["A12+5*3=51;a51", "B40-7*2=66;b66"], "a51+b66=17")
    total = largest | {"goal": "total"}
    assert stage0.work_out_named(total, rng, 0.0, in_writing=False) == ([in_the_head], "17")
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


CHAINS = stage0.Problem("chains", "A:12+5*3 B:40-7*2 largest modulo 100?", "66")
LINE = "A12+5=17*3=51;a51 B40-7=33*2=66;b66 a51b66"
SUMS = stage0.Problem("sums", "A:47*8+36 C:52-38*7 total modulo 100?", "10")
TERMS = "A47*8=76+36=12;a12 C52-38=14*7=98;c98 a12+c98=10"
COUNTDOWN = stage0.Problem("countdown", "2 7 9 22 make 42?", "", {"numbers": [2, 7, 9, 22], "target": 42})
HIT = "22*2=44;+7=51+9=60/42n-9=42/42y;y(22*2)+7-9 (22*2)+7-9"
MISS = "9-7=2;+2=4+22=26/42n;-2=0+22=22/42n;n none"


@pytest.mark.parametrize(
    "problem, text, change, false",
    [
        (CHAINS, LINE, {}, []),
        (CHAINS, LINE, {"*3=51": "*3=52"}, ["17*3=52", "a51"]),  # the end belies the line
        (CHAINS, LINE, {"=66;": "=166;"}, []),  # modulo 100
        (CHAINS, LINE, {"A12+5=17*3=51": "A12+5=17*2=34", "a51": "a34"}, ["A12+5*2"]),  # true, not asked
        (CHAINS, LINE, {"a51b66": "a51b65"}, ["b65"]),
        (CHAINS, LINE, {" B40-7=33*2=66;b66": "", "b66": ""}, ["B"]),  # never worked
        (CHAINS, LINE, {"=17*3": "=17*3*"}, ["17*3*=51", "A12+5*3*"]),
        (CHAINS, LINE, {"12+5=17": "12+5==17"}, ["12+5=", "=17", "A12+5=*3"]),
        (SUMS, TERMS, {}, []),
        (SUMS, TERMS, {"=76": ""}, []),  # in the head, from left to right
        (SUMS, TERMS, {"=76+36=12;a12": "+36=22;a12"}, ["47*8+36=22", "a12"]),
        (SUMS, TERMS, {"=76+36": "=86+36"}, ["47*8=86", "86+36=12"]),
        (SUMS, TERMS, {"c98=10": "c98=20"}, ["12+98=20"]),
        (SUMS, TERMS, {"C52": "C51", "=14": "=13", "=98": "=91", "c98": "c91", "=10": "=03"}, ["C51-38*7"]),
        (COUNTDOWN, f"{MISS} {HIT}", {}, []),
        (COUNTDOWN, HIT, {"=44": "=45"}, ["22*2=45", "45+7=51"]),
        (COUNTDOWN, HIT, {"+9=60": "+9=61"}, ["51+9=61/42n"]),
        (COUNTDOWN, HIT, {"60/42n": "60/42y"}, ["51+9=60/42y"]),  # a verdict
        (COUNTDOWN, HIT, {"60/42n": "60/41n"}, ["51+9=60/41n"]),  # on another target
        (COUNTDOWN, HIT, {"y;y(22*2)+7-9 (22*2)+7-9": "y;n none"}, ["n"]),
        (COUNTDOWN, HIT, {" (22*2)+7-9": " (22*2)+7+9"}, ["(22*2)+7+9"]),
        (COUNTDOWN, MISS, {"+22=26": "+21=25"}, ["4+21=25/42n"]),  # 21 is not given
        (COUNTDOWN, MISS, {"4+22=26/42n": "4+22=26/42"}, ["+2=4+22=26/42"]),
        (stage0.Problem("math", "q", "9"), "1+1=3 \\boxed{9}", {}, []),
        (SUMS, "\\boxed{10}", {}, ["A", "C"]),  # right by luck
        (CHAINS, "A" + "9" * 5000 + "=1", {}, None),
        (COUNTDOWN, "9" * 5000 + "=1", {}, None),
    ],
)
def test_every_false_statement_of_a_response_is_found_and_no_other(problem, text, change, false):
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    found = stage0.step_errors(problem, text)
    assert found if false is None else found == false
    steps = "".join(f"<step>{i}:{part}</step>" for i, part in enumerate(text.split(" "), 1))
    assert stage0.step_errors(problem, f"<takeaway></takeaway>{steps}") == found  # tagged alike


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_the_corpus_documents_with_false_statements_are_those_whose_slips_show(monkeypatch, slip):
    """A slip shows when it changes a result that is written; only terms in the head are not, and of
    them the end is."""
    drawn = []
    slips = []
    slipped, draw_problem = stage0.slipped, stage0.draw_problem

    def drawing(*args):
        drawn.append(draw_problem(*args))
        slips.clear()
        return drawn[-1]

    def slipping(value, *args):
        given = slipped(value, *args)
        slips.append(given != value)
        return given

    monkeypatch.setattr(stage0, "draw_problem", drawing)
    monkeypatch.setattr(stage0, "slipped", slipping)
    rng = random.Random(0)
    flagged = 0
    for _ in range(600):
        _, _, text = stage0.corpus_document(rng, slip, 0.45, 0.15)
        visible = any(slips)
        if drawn[-1].kind == "sums" and "=" in text and not re.search(r"=\d+[-+*]\d", text):  # in the head
            totals = len(drawn[-1].parts["labels"]) - 1
            terms = re.findall(r"(\d+)((?:[-+*]\d+)+)=(\d+)", text)
            visible = any(slips[len(slips) - totals :])
            for first, ops, end in terms:
                value = int(first)
                for op, operand in re.findall(r"([-+*])(\d+)", ops):
                    value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[
                        op
                    ]
                visible = visible or (value - int(end)) % 100 != 0
        assert bool(stage0.step_errors(drawn[-1], text)) == visible, text
        flagged += visible
    assert flagged > 500 if slip else flagged == 0

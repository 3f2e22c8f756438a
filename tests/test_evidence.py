"""The tables of docs/results.md are what the judged responses say."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import evidence

from stage0_model import UserError


def keep(folder, checkpoint, mode, rows, name="heldout"):
    """Rows as eval.py keeps them: a line of settings, then one line each."""
    file = folder / name / f"{checkpoint.replace('/', '%2F')}={mode}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in [{"k": 1}, *rows]))
    (folder / "eval.json").write_text("{}")


def row(problem, right, *, kind="sums", false=(), branches=2, response="\\boxed{1}", **more):
    row = {"problem": problem, "kind": kind, "right": right, "false": list(false), "valid": True}
    row |= {"branches": branches, "parts": 2, "tokens": 10, "critical_path": 5, "plans": 2, "blocks": 1}
    return row | {"response": response} | more


def test_a_problem_counts_with_the_mean_of_its_seeds_and_differences_are_paired():
    seeds = [
        {"p": [row("p", True)], "q": [row("q", False)]},
        {"p": [row("p", False)], "q": [row("q", False)]},
    ]
    assert evidence.over_seeds(seeds) == {"p": 0.5, "q": 0.0}
    # by hand: gains 1, 0, 1, 0 have mean 1/2, standard deviation 0.577, so 1.96 * 0.577 / 2
    assert (
        evidence.difference({"a": 1, "b": 1, "c": 1, "d": 0}, dict.fromkeys("abcd", 0) | {"b": 1})
        == "+50.0 ±56.6"
    )
    assert (
        evidence.difference({"a": 1, "b": 0, "z": 1}, {"a": 0, "b": 0}) == "+50.0 ±98.0"
    )  # z has no partner


def test_a_majority_is_of_the_first_k_and_a_tie_goes_to_the_earlier():
    rows = [row("p", text == "7", response=f"\\boxed{{{text}}}") for text in "8779"]
    assert not evidence.majority(rows[:1]) and not evidence.majority(rows[:2])
    assert evidence.majority(rows[:3]) and evidence.majority(rows[:4])


def cells(table, first):
    """{column: text} of the row of a markdown table that begins so."""
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return next(dict(zip(heads, line)) for line in lines if line[0].startswith(first))


@pytest.fixture
def out(tmp_path):
    """A base that answers one of two problems, and NPR of two seeds, which answers 2 and 1 of them."""
    two = [row("p", True), row("q", False, false=["1=2"])]
    for name in ("heldout", "heldout-greedy"):
        keep(tmp_path, "out/stage0", "plain", two, name)
        keep(tmp_path, "out/stage3", "parallel", [row("p", True), row("q", True, false=["1=2"])], name)
        keep(tmp_path / "seed1", "out/seed1/stage3", "parallel", two, name)
    return tmp_path


def test_the_table_of_stages_says_means_ranges_gains_and_soundness(monkeypatch, out):
    monkeypatch.setattr(evidence, "STAGES", {evidence.BASE: "base", evidence.NPR: "NPR"})
    found = cells(evidence.stages_table(out), "NPR")
    assert (found["seeds"], found["greedy %"], found["range of seeds"]) == (
        "2",
        "75.0 ±49.0",
        "50.0 to 100.0",
    )
    # q is right once in two seeds, and never without a false equation
    assert found["right and sound, greedily %"].startswith("50.0") and found["greedy minus base"].startswith(
        "+25.0"
    )
    assert found["tokens/path"] == "2.00" and found["valid %"] == "100.0"
    assert cells(evidence.stages_table(out), "base")["greedy %"].startswith("50.0")


def test_the_best_temperature_is_the_one_with_most_right_answers(out):
    for temperature, rights in (("0.2", (1, 0)), ("0.6", (1, 1)), ("1.0", (0, 0))):
        rows = [row("p", bool(rights[0])), row("q", bool(rights[1]))]
        keep(out / f"evidence/temperature/{temperature}", "out/stage0", "plain", rows, "tune")
    assert evidence.best_temperature(evidence.temperatures(out), evidence.BASE) == 0.6


def test_npr_meets_each_seed_of_beta_at_its_best_temperature_and_the_one_base(out):
    for temperature in ("0.6", "1.0"):
        rows = [row("p", temperature == "0.6"), row("q", False)]
        for name, mode in (("stage0", "plain"), ("stage2", "parallel"), ("stage3", "parallel")):
            keep(out / f"evidence/temperature/{temperature}", f"out/{name}", mode, rows, "tune")
    for folder, rights in (("evidence/best", (1, 0)), ("seed1/best", (0, 0))):
        rows = [row("p", bool(rights[0])), row("q", bool(rights[1]))]
        keep(out / folder, "out/stage2", "parallel", rows)
    keep(out / "evidence/best-base", "out/stage0", "plain", [row("p", False), row("q", False)])
    text = evidence.temperatures_table(out)

    # NPR has p and q, then p alone; BETA p, then nothing; the base nothing: +0.5 and 0.5, +1 and 0.5
    assert "NPR-BETA at its best, 0.6: +50.0 ±0.0 points (2 seeds)" in text
    assert "base, asked plainly at its best, 0.6: +75.0 ±" in text and text.count("(2 seeds)") == 2


def test_in_english_each_stage_stands_beside_its_source_and_its_sequential_twin(tmp_path):
    said = {"branches": 1}
    kind_of = {"p": "stories", "q": "shopping"}
    for name, mode, rights, more in (
        ("stage1", "format", (1, 0), said),
        ("stage2_seq", "format", (0, 0), said),
        ("stage2", "parallel", (1, 1), said | {"branches": 3}),
    ):
        two = [row(p, bool(right), kind=kind_of[p], **more) for p, right in zip("pq", rights)]
        keep(tmp_path / "compared", f"w/{name}", mode, two)
    table = evidence.words_table(tmp_path)
    assert "greedily %" not in table.splitlines()[0]  # not judged
    beta = cells(table, "stage 2")
    # p right in both, q here alone: +0 and +1; the twin has neither
    assert beta["minus its source"].startswith("+50.0") and beta["minus its twin"] == "+100.0 ±0.0"
    assert (beta["right %"], beta["parallel %"], beta["tokens/path"]) == ("100.0 ±0.0", "100.0", "2.00")
    assert cells(table, "SR-BETA")["minus its source"].startswith("-50.0")
    assert cells(table, "SR-BETA")["minus its twin"] == cells(table, "SR-BETA")["parallel %"] == "-"

    keep(tmp_path / "compared", "w/stage2", "parallel", [row("p", True, **said)], "heldout-greedy")
    for name, mode in (("stage1", "format"), ("stage2_seq", "format")):
        keep(tmp_path / "compared", f"w/{name}", mode, [row("p", False, **said)], "heldout-greedy")
    assert cells(evidence.words_table(tmp_path), "stage 2")["greedily %"].startswith("100.0")


def test_stage_3_in_english_run_twice_is_measured_on_both_draws_of_problems_together(tmp_path):
    # right answers to p of the first draw and q of the second
    for run, name, mode, rights in (
        ("words", "stage3_seq", "format", (0, 1)),
        ("words", "stage2", "parallel", (0, 0)),
        ("words", "stage3", "parallel", (1, 1)),
        ("dithered", "stage3", "parallel", (1, 0)),
    ):
        for draw, problem, right in zip(("compared", "again"), "pq", rights):
            two = [row(problem, bool(right), kind="stories"), row(f"{problem}'", False, kind="shopping")]
            keep(tmp_path / run / draw, f"{run}/{name}", mode, two)
    table = evidence.words_again_table(tmp_path)
    found = {
        name: cells(table, f"stage 3, NPR, {name}") for name in ("rounded", "`dithered`", "mean of both")
    }
    assert {name: row["stories %"].split()[0] for name, row in found.items()} == {
        "rounded": "100.0",
        "`dithered`": "50.0",
        "mean of both": "75.0",
    }
    # of four problems: 2, 1 and their mean; BETA has none of them, SR one
    assert [row["minus BETA"].split()[0] for row in found.values()] == ["+50.0", "+25.0", "+37.5"]
    assert [row["minus SR"].split()[0] for row in found.values()] == ["+25.0", "+0.0", "+12.5"]
    assert cells(table, "SR")["minus SR"] == cells(table, "stage 2")["minus BETA"] == "-"
    assert {line.split("|")[2].strip() for line in table.splitlines()[2:]} == {"4"}


def test_seconds_to_an_answer_in_english_are_said_as_multiples_of_the_last(tmp_path):
    timed = [("w/stage3_seq", "format", 9.0), ("w/stage3", "parallel", 4.0)]
    heads = ("checkpoint", "mode", "seconds to answer")
    (tmp_path / "timed").mkdir()
    judgements = {"checkpoints": [dict(zip(heads, judgement)) for judgement in timed]}
    (tmp_path / "timed/eval.json").write_text(json.dumps(judgements))
    table = evidence.words_time_table(tmp_path)
    assert (cells(table, "SR")["s/answer"], cells(table, "SR")["times"]) == ("9.0", "2.25")
    assert cells(table, "stage 3")["times"] == "1.00"


def test_an_evaluation_that_has_not_ended_says_nothing_and_two_of_one_name_are_refused(tmp_path):
    keep(tmp_path, "out/stage2", "parallel", [row("p", True)])
    assert set(evidence.judged(tmp_path)) == {("stage2", "parallel")}
    keep(tmp_path, "/elsewhere/out/stage2", "parallel", [row("p", False)])
    with pytest.raises(UserError, match="second judgement of stage2=parallel"):
        evidence.judged(tmp_path)
    (tmp_path / "eval.json").unlink()
    assert evidence.judged(tmp_path) == {}


def test_a_page_without_the_marks_of_a_table_is_left_alone(monkeypatch, out):
    page = out / "results.md"
    page.write_text("by hand\n<!-- kinds -->\nthe end is missing\n")
    monkeypatch.setattr(evidence, "PAGES", {str(page): {"kinds": (lambda out: "| new |", "eval.json")}})
    monkeypatch.setattr(sys, "argv", ["evidence.py", str(out)])
    with pytest.raises(UserError, match="no place for kinds"):
        evidence.main()
    assert page.read_text() == "by hand\n<!-- kinds -->\nthe end is missing\n"


def test_only_what_stands_between_the_marks_is_written(monkeypatch, out, capsys):
    page = out / "results.md"
    page.write_text(
        "by hand\n<!-- kinds -->\nold\n<!-- /kinds -->\nkept <!-- ladder -->\nold\n<!-- /ladder -->\n"
    )
    tables = {"kinds": (lambda out: "| new |", "eval.json"), "ladder": (None, "no")}
    monkeypatch.setattr(evidence, "PAGES", {str(page): tables})
    monkeypatch.setattr(sys, "argv", ["evidence.py", str(out)])
    evidence.main()
    text = page.read_text()
    assert text.startswith(
        "by hand\n<!-- kinds -->\n\n| new |\n\n<!-- /kinds -->\nkept <!-- ladder -->\nold\n"
    )
    assert "ladder is left as it was" in capsys.readouterr().out


@pytest.mark.parametrize("page", evidence.PAGES)
def test_a_page_has_marks_for_every_table(page):
    text = (ROOT / page).read_text()
    for name in evidence.PAGES[page]:
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->\n") == 1

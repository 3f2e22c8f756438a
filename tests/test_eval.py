"""The judge's arithmetic, by hand."""

import itertools
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

import eval as judge
import stage0_model as stage0
from engine import Layout, Rollout


def rollout(tokenizer, text, path, branches=0, reason="stop"):
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
    return Rollout(
        ids,
        Layout([], [], []),
        [False] * len(ids),
        [0.0] * len(ids),
        reason,
        path,
        int(branches > 0),
        branches,
    )


def test_mean_and_interval_are_over_problems():
    mean, half = judge.mean_and_ci([[1, 0], [1, 1]])
    assert mean == 0.75 and abs(half - 1.96 * 0.35355 / 2**0.5) < 1e-4


def test_every_metric_of_two_problems_with_two_samples(tokenizer):
    good = (
        "<guideline><plan>1:a</plan><plan>2:b</plan></guideline><step>1:abc</step><step>2:abc</step>"
        "<takeaway>t</takeaway>\\boxed{9}"
    )
    problems = [stage0.Problem("sums", "q", "9"), stage0.Problem("sums", "q", "8")]
    rollouts = [
        [rollout(tokenizer, good, 30, branches=2), rollout(tokenizer, "\\boxed{9}", 10)],
        [rollout(tokenizer, good, 30, branches=2, reason="length"), rollout(tokenizer, "\\boxed{7}", 10)],
    ]
    m = judge.measure([[judge.judge(p, r, tokenizer) for r in rs] for p, rs in zip(problems, rollouts)])
    assert m["accuracy"] == 0.5 and m["best@k"] == 0.5  # 2 of 4 right; one of two problems solved at all
    assert (
        m["valid"] == 0.25 and m["parallel"] == 0.5
    )  # a perfect text that did not stop by itself is not valid
    assert m["plans"] == 1.0
    tokens = sum(len(r.ids) for rs in rollouts for r in rs) / 4
    assert m["tokens"] == tokens and m["critical path"] == 20 and m["tokens/path"] == tokens / 20


def test_parts_count_chains_terms_and_first_moves_that_lead_to_the_target():
    for p in stage0.make_problems("all", "tune", 15, 0):
        named = p.question.count(":")
        assert judge.parts_of(p) == (p.parts["leading"] if p.kind == "countdown" else named)
    assert judge.parts_of(stage0.Problem("math", "q", "9")) is None


def test_right_and_sound_are_right_answers_without_a_false_step(tokenizer):
    problem = stage0.Problem("sums", "A:12*4 B:11*2 total modulo 100?", "70")
    sound = r"<step>1:A12*4=48;a48</step><step>2:B11*2=22;b22</step><takeaway>a48+b22=70</takeaway>\boxed{70}"
    texts = [sound, sound.replace("12*4=48;", "12*4=50;"), sound.replace("{70}", "{71}"), r"\boxed{70}"]
    judged = [[judge.judge(problem, rollout(tokenizer, text, 9), tokenizer)] for text in texts]
    m = judge.measure(judged)
    assert (m["accuracy"], m["right and sound"]) == (0.75, 0.25)
    assert judged[1][0]["false"] == ["12*4=50", "a48"]


def test_a_rung_is_judged_exactly(tmp_path, monkeypatch, plain_tokenizer, capsys):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "base")
    flags = f"{tmp_path}/base=plain --kind chains --depth 4 --width 2 --n 3 --timed 0 --max-new-tokens 2"
    monkeypatch.setattr(sys, "argv", ["eval.py", *flags.split(), "--out", str(tmp_path)])
    judge.main()
    questions = [
        json.loads(line)["problem"] for line in (tmp_path / "responses.jsonl").read_text().splitlines()
    ]
    assert len(questions) == 3
    assert all((len(re.findall("[-+*]", q)), q.count(":")) == (8, 2) for q in questions)
    shown = capsys.readouterr().out
    assert "3 heldout problems of depth 4 of width 2, " in shown and "right and sound %" in shown


def test_signs_of_collapse_are_counted(tokenizer):
    block = "<guideline><plan>1:a9</plan>{}</guideline><step>1:1+2=3+4=7;</step>{}<takeaway>t</takeaway>"
    two = block.format("<plan>2:b</plan>", "<step>2:1+2=3+4=7;</step>")  # the second step copies the first
    three = block.format(
        "<plan>2:b</plan><plan>3:c</plan>", "<step>2:abc</step><step>3:2+2=4+4=8;</step>"
    )  # one says nothing
    texts = [
        two + "\\boxed{9}",
        three + "\\boxed{7}",
        block.format("", "") + "\\boxed{7}",
    ]  # the first names its answer in a plan
    m = judge.measure(
        [[judge.judge(stage0.Problem("sums", "q", "9"), rollout(tokenizer, t, 30), tokenizer)] for t in texts]
    )
    assert m["single-plan blocks"] == m["answer in a plan"] == 1 / 3
    assert m["copied steps"] == m["empty steps"] == 1 / 6


def test_a_checkpoint_is_judged_in_the_mode_it_was_made_for(tmp_path, plain_tokenizer, tokenizer):
    for name, tok, args in [
        ("base", plain_tokenizer, {"steps": 1}),
        ("words", plain_tokenizer, {"init": "smollm2", "valid_share": 0.4}),
        ("zero", plain_tokenizer, {"init": "base"}),
        ("beta", tokenizer, {"init": "zero", "sequential": False}),
        ("twin", tokenizer, {"init": "zero", "sequential": True}),
    ]:
        tok.save_pretrained(tmp_path / name)
        (tmp_path / name / "args.json").write_text(json.dumps(args))

    def modes(spec):
        return [mode for _, mode in judge.modes_of(f"{tmp_path}/{spec}")]

    assert modes("base") == modes("words") == ["plain", "format"] and modes("zero") == ["format"]
    assert modes("beta") == ["parallel"] and modes("twin") == ["format"]
    assert modes("beta=plain") == ["plain"]


def test_table_aligns_columns():
    assert judge.table([{"a": "x", "b": "1"}, {"a": "long", "b": "22"}]).splitlines() == [
        "a      b",
        "----  --",
        "x      1",
        "long  22",
    ]


def test_a_cell_is_a_template_filled_in_and_a_share_a_percentage_without_its_sign():
    result = {
        "accuracy": 0.5,
        "accuracy ci95": 0.021,
        "tokens/path": 2.345,
        "seconds": float("nan"),
        "gain": (-0.04, 0.1),
    }
    columns = {
        "a %": "{accuracy:.1%} ±{accuracy ci95:.1%}",
        "b": "{tokens/path:.2f}",
        "c": "{seconds:.3f}",
        "d": "{gain[0]:+.1%}",
    }
    assert judge.cells(result, columns) == {"a %": "50.0 ±2.1", "b": "2.35", "c": "nan", "d": "-4.0"}


def test_differences_are_paired_problem_by_problem():
    rows = [[[{"right": right}] for right in answers] for answers in ([0, 0, 1], [1, 0, 1], [1, 1, 1])]
    results = [{}, {}, {}]
    judge.compare(results, rows)
    assert results[0] == {"minus row above": None, "minus first row": None}
    half = 1.96 * 0.57735 / 3**0.5  # of the differences 0, 1, 0 and 1, 1, 0
    assert results[2]["minus row above"] == pytest.approx((1 / 3, half), abs=1e-4)
    assert results[2]["minus first row"] == pytest.approx((2 / 3, half), abs=1e-4)


def test_unknown_mode_is_refused():
    with pytest.raises(stage0.UserError, match="unknown mode"):
        judge.modes_of("out/stage0=sideways")


def test_an_evaluation_that_fails_leaves_the_finished_one_alone(tmp_path, monkeypatch):
    (tmp_path / "responses.jsonl").write_text('{"checkpoint"')
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "nowhere=plain"), "--out", str(tmp_path)])
    with pytest.raises(stage0.UserError, match="no such checkpoint folder"):
        judge.main()
    assert (tmp_path / "responses.jsonl").read_text() == '{"checkpoint"'


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample():
    """Against all draws of k of n samples, counted."""
    for n, right in ((4, 1), (6, 2), (5, 0), (5, 5)):
        samples = [i < right for i in range(n)]
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert judge.pass_at(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majority_is_the_answer_that_most_samples_give():
    def rows(*answers):
        return [{"response": rf"so \boxed{{{a}}}", "right": a == "7"} for a in answers]

    assert judge.majority(rows("3", "7", "7", "5")) and not judge.majority(rows("3", "3", "7"))
    assert not judge.majority(rows("3", "7")) and judge.majority(rows("7", "3"))  # a tie goes to the earlier
    assert judge.majority([{"response": "no box", "right": False}] * 2 + rows("7"))  # which is no vote
    assert not judge.majority([{"response": "no box", "right": False}] * 2)


def test_time_to_answer_leaves_out_the_capture_of_graphs_on_a_gpu(monkeypatch):
    """There every problem may be the first to meet a size of step; on a CPU only the first one warms up."""
    for device, expected in (("cuda", 1.0), ("cpu", 100.0)):
        clock = [0.0]
        met = set()

        def decode(engine, problems, *rest, **sampling):
            clock[0] += 1.0 if problems[0] in met else 100.0
            met.add(problems[0])

        monkeypatch.setattr(judge, "decode", decode)
        monkeypatch.setattr(judge.time, "perf_counter", lambda: clock[0])
        engine = SimpleNamespace(model=SimpleNamespace(device=torch.device(device)))
        found = judge.time_to_answer([(engine, "parallel")], list("abcd"), SimpleNamespace(timed=2))
        assert found == [expected]


SMALL = "--kind sums --n 12 --greedy 6 --max-new-tokens 24 --timed 1 --device cpu"


def evaluate(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags), *SMALL.split()])
    judge.main()


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_responses(tmp_path, monkeypatch, plain_tokenizer):
    base = tmp_path / "base"
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, base)
    evaluate(monkeypatch, f"{base}=format", "--out", tmp_path / "whole")
    asked = []
    decode = judge.decode

    def counted(engine, problems, *args, **kwargs):
        asked.append(len(problems))
        return decode(engine, problems, *args, **kwargs)

    # killed within a line of the greedy rows, with a damaged line among the sampled ones
    out = tmp_path / "out"
    evaluate(monkeypatch, f"{base}=format", "--out", out)
    (out / "eval.json").unlink()
    [sampled] = (out / "heldout").iterdir()
    [greedy] = (out / "heldout-greedy").iterdir()
    lines = sampled.read_bytes().splitlines(keepends=True)
    sampled.write_bytes(b"".join(lines[:6]) + b"\0\0\n" + b"".join(lines[7:]))
    greedy.write_bytes(greedy.read_bytes()[:-9])
    monkeypatch.setattr(judge, "decode", counted)
    evaluate(monkeypatch, f"{base}=format", "--out", out)
    assert asked[:2] == [7, 1]  # of 12 sampled, of 6 greedy

    def rows(folder):
        return [
            {
                key: value
                for key, value in json.loads(line).items()
                if key not in ("seconds", "logprob_gap", "checkpoint")
            }
            for line in (folder / "responses.jsonl").read_text().splitlines()
        ]

    assert rows(out) == rows(tmp_path / "whole") and len(rows(out)) == 12

    # other settings, other weights: judged anew, and the old rows stay beside the new ones
    evaluate(monkeypatch, f"{base}=format", "--out", out, "--temperature", "0.5")
    stage0.save(random_model(len(plain_tokenizer), seed=1), plain_tokenizer, base)
    evaluate(monkeypatch, f"{base}=format", "--out", out, "--temperature", "0.5")
    assert len(list((out / "heldout").iterdir())) == 3


def test_checkpoints_of_similar_names_keep_files_of_their_own(tmp_path, monkeypatch, plain_tokenizer):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a/b", "a_b")):
        stage0.save(random_model(len(plain_tokenizer), seed=number), plain_tokenizer, tmp_path / name)
    evaluate(monkeypatch, "a/b=format", "a_b=format", "a/b/=plain", "--out", "out")
    assert len(list((tmp_path / "out" / "heldout").iterdir())) == 3
    assert not list((tmp_path / "out").rglob("*.old-*"))


def test_rows_judged_under_other_settings_are_moved_aside_whole(tmp_path, monkeypatch, plain_tokenizer):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "base")
    before = {}
    for n, temperature in enumerate(("1.0", "0.5", "0.25")):
        flags = (f"{tmp_path}/base=format", "--out", tmp_path / "out", "--temperature", temperature)
        evaluate(monkeypatch, *flags)
        [file] = (tmp_path / "out" / "heldout").glob("*.jsonl")
        for number in range(1, n + 1):
            old = file.with_suffix(f".old-{number}")
            assert old.read_bytes() == before[number]
        before[n + 1] = file.read_bytes()
        assert json.loads(before[n + 1].splitlines()[0])["temperature"] == float(temperature)
    assert len(list((tmp_path / "out" / "heldout").iterdir())) == 3

    # the greedy rows had the same settings each time: they were kept, and nothing was moved
    assert len(list((tmp_path / "out" / "heldout-greedy").iterdir())) == 1


def test_a_checkpoint_is_fingerprinted_once_for_all_sets_of_problems(tmp_path, monkeypatch, plain_tokenizer):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "base")
    read = []
    fingerprint = judge.fingerprint

    def counted(value):
        read.append(value)
        return fingerprint(value)

    monkeypatch.setattr(judge, "fingerprint", counted)
    evaluate(monkeypatch, f"{tmp_path}/base=format", "--out", tmp_path / "out")
    assert read.count(tmp_path / "base") == 1 and len(read) == 3  # and both sets of problems

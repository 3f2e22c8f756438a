"""The judge's arithmetic, by hand."""

import json
import sys

import pytest

import eval as judge
import stage0_model as stage0
from engine import Layout, Rollout


def rollout(tokenizer, text, path, branches=0, reason="stop"):
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id]
    return Rollout(ids, Layout([], [], []), [False] * len(ids), [0.0] * len(ids), reason, path, int(branches > 0), branches)


def test_mean_and_interval_are_over_problems():
    mean, half = judge.mean_and_ci([[1, 0], [1, 1]])
    assert mean == 0.75 and abs(half - 1.96 * 0.35355 / 2**0.5) < 1e-4


def test_every_metric_of_two_problems_with_two_samples(tokenizer):
    good = "<guideline><plan>1:a</plan><plan>2:b</plan></guideline><step>1:abc</step><step>2:abc</step><takeaway>t</takeaway>\\boxed{9}"
    problems = [stage0.Problem("sums", "q", "9"), stage0.Problem("sums", "q", "8")]
    rollouts = [
        [rollout(tokenizer, good, 30, branches=2), rollout(tokenizer, "\\boxed{9}", 10)],
        [rollout(tokenizer, good, 30, branches=2, reason="length"), rollout(tokenizer, "\\boxed{7}", 10)],
    ]
    m = judge.measure([[judge.judge(p, r, tokenizer) for r in rs] for p, rs in zip(problems, rollouts)])
    assert m["accuracy"] == 0.5 and m["best@k"] == 0.5  # 2 of 4 right; one of two problems solved at all
    assert m["valid"] == 0.25 and m["parallel"] == 0.5  # a perfect text that did not stop by itself is not valid
    assert m["plans"] == 1.0
    tokens = sum(len(r.ids) for rs in rollouts for r in rs) / 4
    assert m["tokens"] == tokens and m["critical path"] == 20 and m["tokens/path"] == tokens / 20


def test_parts_count_chains_terms_and_first_moves_that_lead_to_the_target():
    for p in stage0.make_problems("all", "tune", 15, 0):
        chains = sum(len(labels) for labels, _, _ in p.parts.get("rounds", []))
        assert judge.parts_of(p) == {"chains": chains, "sums": p.question.count(":"), "countdown": p.parts.get("leading")}[p.kind]
    assert judge.parts_of(stage0.Problem("math", "q", "9")) is None


def test_signs_of_collapse_are_counted(tokenizer):
    block = "<guideline><plan>1:a9</plan>{}</guideline><step>1:1+2=3+4=7;</step>{}<takeaway>t</takeaway>"
    two = block.format("<plan>2:b</plan>", "<step>2:1+2=3+4=7;</step>")  # the second step copies the first
    three = block.format("<plan>2:b</plan><plan>3:c</plan>", "<step>2:abc</step><step>3:2+2=4+4=8;</step>")  # one says nothing
    texts = [two + "\\boxed{9}", three + "\\boxed{7}", block.format("", "") + "\\boxed{7}"]  # the first names its answer in a plan
    m = judge.measure([[judge.judge(stage0.Problem("sums", "q", "9"), rollout(tokenizer, t, 30), tokenizer)] for t in texts])
    assert m["single-plan blocks"] == m["answer in a plan"] == 1 / 3
    assert m["copied steps"] == m["empty steps"] == 1 / 6


def test_curves_of_two_seeds_are_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("a/stage1", "b/stage1", "a/stage2"):
        (tmp_path / folder).mkdir(parents=True)
        rows = [{"step": s, "loss": 1.0 / s, "entropy": 0.5} | ({"valid": 0.1 * s, "reward": -1} if "1" in folder else {}) for s in range(1, 9)]
        (tmp_path / folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = [str(tmp_path / f) for f in ("a/stage1", "b/stage1", "a/stage2")]
    judge.draw_curves(folders, tmp_path / "assets" / "curves.png")
    assert (tmp_path / "assets" / "curves.png").stat().st_size > 5000
    with pytest.raises(stage0.UserError, match="no such file"):
        judge.draw_curves([str(tmp_path)], tmp_path / "x.png")


def test_a_summary_is_the_mean_over_seeds_and_their_range(tmp_path):
    zeros = dict.fromkeys(("valid", "parallel", "plans", "tokens", "critical path"), 0.0)
    gain = {"a": [0.1, 0.02], "b": [-0.05, 0.02]}  # a paired difference and half of its interval
    for seed, accuracy in (("a", 0.5), ("b", 0.8)):
        (tmp_path / seed).mkdir()
        result = zeros | {"accuracy": accuracy, "tokens/path": 2 * accuracy, "kinds": {"sums": {"accuracy": accuracy / 2}}}
        result |= {"checkpoint": f"out/{seed}/stage3", "mode": "parallel", "minus row above": gain[seed]}
        (tmp_path / seed / "eval.json").write_text(json.dumps({"checkpoints": [result]}))
    head, _, row = judge.summarise([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert row.split()[:5] == ["stage3", "parallel", "2", "65.0", "(50.0-80.0)"]
    assert "1.30 (1.00-1.60)" in row and "+2.5 (-5.0 to +10.0)" in row and row.endswith("32.5 (25.0-40.0)") and head.endswith("sums acc %")
    with pytest.raises(stage0.UserError, match="eval.json: no such file"):
        judge.summarise([tmp_path])


def test_a_checkpoint_is_judged_in_the_mode_it_was_made_for(tmp_path, plain_tokenizer, tokenizer):
    for name, tok, args in [
        ("base", plain_tokenizer, {"steps": 1}), ("zero", plain_tokenizer, {"init": "base"}),
        ("beta", tokenizer, {"init": "zero", "sequential": False}), ("twin", tokenizer, {"init": "zero", "sequential": True}),
    ]:  # fmt: skip
        tok.save_pretrained(tmp_path / name)
        (tmp_path / name / "args.json").write_text(json.dumps(args))
    modes = lambda spec: [mode for _, mode in judge.modes_of(f"{tmp_path}/{spec}")]  # noqa: E731
    assert modes("base") == ["plain", "format"] and modes("zero") == ["format"]
    assert modes("beta") == ["parallel"] and modes("twin") == ["format"]
    assert modes("beta=plain") == ["plain"]


def test_trace_page_shows_steps_side_by_side_and_escapes_model_text():
    page = judge.trace_page([("1<2?", "<guideline><plan>1:a</plan></guideline><step>1:x&y</step><step>2:z</step><takeaway>t</takeaway>\\boxed{9}")])
    assert "1&lt;2?" in page and "<div class=steps><div class=step><pre>1:x&amp;y</pre></div><div class=step><pre>2:z" in page
    assert "<div class=takeaway><pre>t</pre></div>" in page and "<div class=final><pre>\\boxed{9}</pre></div>" in page


def test_table_aligns_columns():
    assert judge.table([{"a": "x", "b": "1"}, {"a": "long", "b": "22"}]).splitlines() == ["a      b", "----  --", "x      1", "long  22"]


def test_unknown_mode_is_refused():
    with pytest.raises(stage0.UserError, match="unknown mode"):
        judge.modes_of("out/stage0=sideways")


def test_an_evaluation_that_fails_leaves_the_finished_one_alone(tmp_path, monkeypatch):
    (tmp_path / "responses.jsonl").write_text("finished")
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "nowhere=plain"), "--out", str(tmp_path)])
    with pytest.raises(stage0.UserError, match="no such checkpoint folder"):
        judge.main()
    assert (tmp_path / "responses.jsonl").read_text() == "finished"

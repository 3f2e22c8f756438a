"""The judge's arithmetic, by hand."""

import json

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

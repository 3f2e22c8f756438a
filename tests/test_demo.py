"""The first minute: `python engine.py` and `python eval.py` without arguments, and what is shipped for them."""

import io
import sys

import pytest
import torch
from conftest import ROOT, ScriptedEngine, random_model

import engine as engine_module
import eval as judge
import stage0_model as stage0
from engine import BUILT_IN, Engine, LiveEngine, Replay, render

sys.path.insert(0, str(ROOT / "docs"))

import ship  # noqa: E402

SHIPPED = ROOT / "assets" / "npr-tiny"
PROMPT = [60, 61, 62, 63]
SCRIPT = {
    (0, 0): "<guideline><plan>1:8+7</plan><plan>2:8-7</plan></guideline>15</takeaway>\\boxed{15}<|im_end|>",
    (1, 1): "8+7=15;y</step>",
    (1, 2): "8-7=1;n</step>",
}


class ScriptedLive(ScriptedEngine, LiveEngine):
    """A live engine that follows a script, at once."""

    pause = 0.0


def decode(model, tokenizer, kind=ScriptedEngine):
    eng = kind(model, tokenizer)
    eng.script_of = lambda request: {k: tokenizer.encode(v) for k, v in SCRIPT.items()}
    [[rollout]] = eng.generate([PROMPT], max_new_tokens=200, temperature=0.0)
    return rollout


# ======================================================================================================================
# 1. The parts
# ======================================================================================================================


def test_a_run_of_ones_own_goes_before_what_is_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [(tmp_path / folder).resolve() for folder in stage0.finished("stage3")] == [
        (SHIPPED / "stage3").resolve()
    ]
    for stage in ("stage0", "stage3"):
        (tmp_path / "out" / stage).mkdir(parents=True)
    (tmp_path / "out" / "stage3" / "model.safetensors").touch()
    assert stage0.finished("stage3") == ["out/stage3"]
    assert capsys.readouterr().out.splitlines()[-1] == "checkpoints: out/stage3"

    # some of a run and some of what is shipped would not be a comparison
    (mixed,) = {folder.split("/stage")[0] for folder in stage0.finished("stage0", "stage3")}
    assert mixed.endswith("assets/npr-tiny")


def test_the_built_in_question_is_one_that_no_training_saw():
    [problem] = stage0.make_problems(*BUILT_IN)
    assert stage0.split_of(problem.question) == "heldout" and len(problem.question) < 200


def test_a_replay_writes_the_same_tokens_one_a_step(model, tokenizer):
    rollout = decode(model, tokenizer)
    replay = Replay(model, tokenizer)
    replay.ids = rollout.ids
    [[again]] = replay.generate([PROMPT], parallel=False, max_new_tokens=len(rollout.ids), temperature=0.0)
    assert again.ids == rollout.ids and again.steps == list(range(1, len(rollout.ids) + 1))
    assert (
        max(rollout.steps) < len(rollout.ids) == replay.stats.decode_steps + 1
    )  # the first is the prefill's


def on_screen(output):
    """The lines that a terminal shows after this output: `\\x1b[A` is up a line, `\\x1b[J` clears from here."""
    lines = [""]
    row = 0
    i = 0
    while i < len(output):
        if output.startswith("\x1b[A", i):
            row -= 1
            i += 3
        elif output.startswith("\x1b[J", i):
            lines = lines[:row] + [""]
            i += 3
        elif output[i] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
            i += 1
        else:
            lines[row] += output[i].replace("\r", "")
            i += 1
    return lines


def test_the_live_view_ends_as_the_rollout_and_leaves_what_stood_above_it(model, tokenizer, capsys):
    print("$ python engine.py")
    rollout = decode(model, tokenizer, ScriptedLive)
    above, *drawn = on_screen(capsys.readouterr().out)
    assert above == "$ python engine.py"
    assert drawn[: drawn.index("")] == render(tokenizer, rollout, 79)  # a terminal that tells no size has 80
    assert drawn[drawn.index("") + 1].startswith(f"step {max(rollout.steps)}: {len(rollout.ids)} tokens")


def test_a_sample_is_judged_where_no_checkpoint_is_named_and_what_is_said_still_counts(monkeypatch):
    monkeypatch.setattr(judge, "finished", lambda *stages: [f"x/{stage}" for stage in stages])
    args = judge.parse_args(["--n", "7"])
    assert args.checkpoints == ["x/stage0", "x/stage1", "x/stage2", "x/stage3"]
    assert (args.n, args.greedy, args.out) == (7, 120, "out/sample")
    named = judge.parse_args(["x/stage3"])
    assert (named.n, named.greedy, named.out) == (1002, 1002, "out")


def test_shipping_halves_the_weights_and_they_are_still_computed_with_in_fp32(tmp_path, tokenizer):
    model = random_model(len(tokenizer))
    stage0.save(model, tokenizer, tmp_path / "run")
    stage0.write_json(tmp_path / "run" / "args.json", {"init": "out/stage2"})
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1}\n')
    size = ship.ship(tmp_path / "run", tmp_path / "shipped")
    files = {file.name: file.stat().st_size for file in (tmp_path / "shipped").iterdir()}
    assert size == sum(files.values()) / 1e6 and {"args.json", "tokenizer.json"} <= set(files)
    assert files["model.safetensors"] < 0.52 * (tmp_path / "run" / "model.safetensors").stat().st_size
    assert not {"log.jsonl", "resume"} & set(files)
    again, _ = stage0.load(tmp_path / "shipped")
    for name, p in model.named_parameters():
        other = again.get_parameter(name)
        assert other.dtype == torch.float32 and torch.equal(other, p.bfloat16().float())


def test_a_model_that_is_too_large_to_ship_is_told(tmp_path, tokenizer, monkeypatch):
    stage0.save(random_model(len(tokenizer)), tokenizer, tmp_path / "run")
    stage0.write_json(tmp_path / "run" / "args.json", {})
    monkeypatch.setattr(ship, "MAX_MB", 0.1)
    with pytest.raises(stage0.UserError, match="at most 0.1 are shipped"):
        ship.ship(tmp_path / "run", tmp_path / "shipped")


# ======================================================================================================================
# 2. What is shipped
# ======================================================================================================================


@pytest.fixture(params=ship.STAGES)
def stage(request):
    return SHIPPED / request.param


def test_a_shipped_checkpoint_is_small_and_nothing_but_one(stage):
    names = {file.name for file in stage.iterdir()}
    files = ("args.json", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors")
    assert names == {*files, "tokenizer.json", "tokenizer_config.json"}
    assert sum(file.stat().st_size for file in stage.iterdir()) <= 1e6 * ship.MAX_MB


def test_the_built_in_question_is_answered_right_with_what_is_shipped(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)  # without a run of one's own
    monkeypatch.setattr(sys, "argv", ["engine.py", "--device", "cpu"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # no terminal
    engine_module.main()
    told = sys.stdout.getvalue()
    assert "stop, right | " in told and "one after another: " in told and " | <step>2:" in told


def test_the_shipped_ones_are_judged_in_every_mode_they_are_made_for(stage):
    modes = [mode for _, mode in judge.modes_of(str(stage))]
    assert modes == {"stage0": ["plain", "format"], "stage1": ["format"]}.get(stage.name, ["parallel"])
    model, tokenizer = stage0.load(stage)
    [problem] = stage0.make_problems(*BUILT_IN)
    prompt = stage0.prompt_ids(tokenizer, problem.question, stage0.FORMAT_PROMPT)
    eng = Engine(model, tokenizer)
    [[rollout]] = eng.generate(
        [prompt], parallel=modes[-1] == "parallel", max_new_tokens=640, temperature=0.0
    )
    assert rollout.finish_reason == "stop" and (rollout.num_forks > 0) == (modes[-1] == "parallel")

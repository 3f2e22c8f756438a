"""The scripts as a user runs them: the smoke pipeline, incremental make, resume after a kill, and
errors in one line.  What needs the pipeline's checkpoints is slow: they take a minute to make."""

import importlib
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from safetensors.torch import load_file

import engine
import eval as judge
import stage0_model as stage0
import stage1_zero
import stage2_beta
import stage3_papo

sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402

SCRIPTS = {
    "stage0_model.py": stage0,
    "engine.py": engine,
    "stage1_zero.py": stage1_zero,
    "stage2_beta.py": stage2_beta,
    "stage3_papo.py": stage3_papo,
    "eval.py": judge,
}


def run(*command, cwd=ROOT):
    """A command in a process of its own."""
    command = [str(word) for word in command]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=quiet)


def run_here(monkeypatch, script, *flags):
    """A script's command line in this process, which has imported already what takes 5 seconds to import."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    stage0.run_main(SCRIPTS[script].main)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`make smoke` into a temporary folder with this interpreter."""
    out = tmp_path_factory.mktemp("smoke")
    command = ["make", "smoke", f"SMOKE={out}", f"PY={sys.executable}", "VENV="]
    done = run(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, command, done


@pytest.mark.slow
def test_smoke_pipeline_runs_every_stage_and_prints_the_table(smoke):
    out, _, done = smoke
    for stage in ("stage0", "stage1", "stage2", "stage3"):
        assert (out / stage / "model.safetensors").is_file() and (out / stage / "args.json").is_file()
        assert not (out / stage / "resume").exists()
        steps = [json.loads(line)["step"] for line in (out / stage / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
    report = json.loads((out / "eval.json").read_text())
    assert [(r["checkpoint"].rsplit("/", 1)[1], r["mode"]) for r in report["checkpoints"]] == [
        ("stage0", "plain"),
        ("stage0", "format"),
        ("stage1", "format"),
        ("stage2", "parallel"),
        ("stage3", "parallel"),
    ]
    assert "accuracy %" in done.stdout
    assert "<title>Native parallel traces" in (out / "trace.html").read_text()
    data = datasets.load_from_disk(str(out / "stage2" / "data"))
    assert len(data) >= 1 and {"problem", "response", "plans"} <= set(data.column_names)


@pytest.mark.slow
def test_smoke_rollouts_of_stage_3_fork_for_real(smoke):
    out, _, _ = smoke
    report = json.loads((out / "eval.json").read_text())["checkpoints"][-1]
    assert report["parallel"] > 0 and report["critical path"] < report["tokens"]


@pytest.mark.slow
def test_papo_learns_something_in_the_smoke_run(smoke):
    out, _, _ = smoke
    rows = [json.loads(line) for line in (out / "stage3" / "log.jsonl").read_text().splitlines()]
    assert any(row["grad_norm"] > 0 for row in rows) and len({row["reward"] for row in rows}) > 1
    before, after = (load_file(out / stage / "model.safetensors") for stage in ("stage2", "stage3"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_the_table_compares_rows_on_the_same_problems(smoke):
    out, _, _ = smoke
    judged, right = json.loads((out / "eval.json").read_text())["checkpoints"], {}
    for line in (out / "responses.jsonl").read_text().splitlines():
        row = json.loads(line)
        right.setdefault((row["checkpoint"], row["mode"]), []).append(row["right"])
    rights = [np.array(right[r["checkpoint"], r["mode"]], dtype=float) for r in judged]
    assert judged[0]["minus row above"] is judged[0]["minus first row"] is None
    for i in range(1, len(judged)):
        for name, other in (("minus row above", i - 1), ("minus first row", 0)):
            difference = rights[i] - rights[other]
            half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
            assert judged[i][name] == pytest.approx([difference.mean(), half])


@pytest.mark.slow
def test_finished_stages_are_not_run_again(smoke):
    out, command, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = run(*command)
    assert again.returncode == 0 and "stage0_model.py" not in again.stdout and "eval.py" not in again.stdout
    assert "accuracy %" in again.stdout  # the table is shown all the same
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_the_pictures_of_a_run_are_drawn_from_what_it_wrote(smoke, tmp_path, monkeypatch):
    out, _, _ = smoke
    for name in ("pipeline", "accuracy", "curves"):
        monkeypatch.setattr(sys, "argv", ["figures.py", name, str(out), "--out", str(tmp_path)])
        figures.main()
    judged = json.loads((out / "eval.json").read_text())["checkpoints"]
    assert (
        f"stage 3, NPR, {judged[-1]['accuracy']:.1%}".replace("%", " %")
        in (tmp_path / "accuracy.svg").read_text()
    )


@pytest.mark.slow
def test_stage_1_and_3_checkpoints_load_in_transformers_with_the_same_logits(smoke):
    from transformers import AutoModelForCausalLM

    for stage in ("stage1", "stage3"):
        ours, tokenizer = stage0.load(smoke[0] / stage)
        ids = torch.randint(0, len(tokenizer), (2, 40))
        theirs = AutoModelForCausalLM.from_pretrained(smoke[0] / stage)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


# A stage without its training: the folder is looked at and put in order as ever, the weights are random.
STAND_IN = """
import importlib, sys
from pathlib import Path
sys.path[:0] = {paths}
from transformers import AutoTokenizer
from conftest import random_model
import stage0_model as stage0

script = sys.argv.pop(1)
if script == "eval.py":
    Path(sys.argv[sys.argv.index("--out") + 1], "eval.json").touch()
    sys.exit()

def main():
    run = stage0.Run(importlib.import_module(script.removesuffix(".py")).parse_args())
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")
    run.log(step=1, loss=1.0)
    run.finish(random_model(len(tokenizer), seed=len(list(Path.cwd().glob("calls/*")))), tokenizer)

(Path.cwd() / "calls").mkdir(exist_ok=True)
(Path.cwd() / "calls" / str(len(list((Path.cwd() / "calls").iterdir())))).write_text(script)
stage0.run_main(main)
"""


@pytest.mark.slow
def test_make_moves_aside_what_a_stage_that_was_trained_anew_has_made_stale(tmp_path, plain_tokenizer):
    """Real make, real folders, random weights in the place of training."""
    plain_tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = STAND_IN.format(paths=[str(ROOT), str(ROOT / "tests")])
    (tmp_path / "stand_in.py").write_text(text)

    def make(*words):
        command = ["make", "-f", ROOT / "Makefile", "VENV=", f"PY={sys.executable} stand_in.py", "SHOWN=1"]
        before = len(list(tmp_path.glob("calls/*")))
        done = run(*command, *words, "out/eval.json", cwd=tmp_path)
        calls = sorted(tmp_path.glob("calls/*"), key=lambda file: int(file.name))
        return done, [file.read_text() for file in calls[before:]]

    stages = ["stage0_model.py", "stage1_zero.py", "stage2_beta.py", "stage3_papo.py"]
    done, calls = make()
    assert calls == stages, done.stderr
    assert make()[1] == []

    # the same bytes, only newer: looked at once, and not again
    (tmp_path / "out" / "stage1" / "model.safetensors").touch()
    done, calls = make()
    assert calls == stages[2:] and done.stdout.count("nothing to do") == 2 and make()[1] == []

    # trained anew: what comes after is moved aside and made again, and nothing else
    old = {n: (tmp_path / "out" / f"stage{n}" / "model.safetensors").read_bytes() for n in (2, 3)}
    model, tokenizer = stage0.load(tmp_path / "out" / "stage1")
    stage0.save(random_model(len(tokenizer), seed=99), tokenizer, tmp_path / "out" / "stage1")
    done, calls = make()
    assert done.returncode == 0 and calls == stages[2:], done.stderr
    for n in (2, 3):
        assert (tmp_path / "out" / f"stage{n}.old-1" / "model.safetensors").read_bytes() == old[n]
    assert not (tmp_path / "out" / "stage1.old-1").exists()

    # a mistake of the keyboard is refused as ever
    (tmp_path / "out" / "stage1" / "model.safetensors").touch()
    done, calls = make("STAGE2=--lr 0.5")
    assert done.returncode and "--lr 0.002, now 0.5" in done.stderr and calls == stages[2:3]
    assert not (tmp_path / "out" / "stage2.old-2").exists()


SHORT_RUNS = {
    "stage0_model.py": "--batch-tokens 1500 --hidden-size 64 --layers 1",
    "stage1_zero.py": "--init {init} --prompts 2 --group-size 3 --max-new-tokens 40 --overlong-buffer 20 --max-rounds 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT_RUNS)
def test_a_killed_run_resumes_and_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path, monkeypatch, capsys, smoke, script
):
    flags = SHORT_RUNS[script].format(init=smoke[0] / "stage0").split()
    flags += ["--steps", "5", "--save-every", "2", "--device", "cpu"]

    def train(folder):
        run_here(monkeypatch, script, *flags, "--out", tmp_path / folder)

    train("whole")
    log = stage0.Run.log

    def killed_at_step_4(self, **row):
        if row["step"] == 4:
            raise KeyboardInterrupt
        log(self, **row)

    monkeypatch.setattr(stage0.Run, "log", killed_at_step_4)
    with pytest.raises(SystemExit) as stopped:
        train("killed")
    assert stopped.value.code == 130
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    monkeypatch.setattr(stage0.Run, "log", log)
    train("killed")
    assert "resuming" in capsys.readouterr().out
    whole, killed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5]


TWIN_AND_ABLATIONS = [
    "--sequential",
    "--group-std",
    "--schema-filter",
    "--clip-updates 2",
    "--count-forced",
    "--schema-filter --count-forced",
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", TWIN_AND_ABLATIONS)
def test_the_sequential_twin_and_every_ablation_of_papo_runs(tmp_path, monkeypatch, smoke, flags):
    init = smoke[0] / "stage2"
    if flags == "--sequential":  # SR-BETA, then SR: same data, causal mask, sequential decoding
        init = tmp_path / "beta"
        beta = f"--sequential --init {smoke[0] / 'stage1'} --data {smoke[0] / 'stage2' / 'data'} --epochs 1"
        run_here(monkeypatch, "stage2_beta.py", *beta.split(), "--out", init)

    small = "--kind sums --steps 2 --prompts 2 --group-size 3 --max-new-tokens 200"
    out = tmp_path / "npr"
    run_here(monkeypatch, "stage3_papo.py", *flags.split(), *small.split(), "--init", init, "--out", out)

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    if "--clip-updates" not in flags:
        assert all(row["logprob_gap"] < 1e-3 for row in rows)
    if flags == "--sequential":
        assert all(row["critical_path"] == row["length"] for row in rows)
    if "--schema-filter" in flags:
        assert all(row["used"] == round(row["valid"] * row["sampled"]) for row in rows)
    else:
        assert all(row["used"] == row["sampled"] == 6 for row in rows)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path, capsys):
    args = stage0.parse_args(["--out", str(tmp_path)])
    run_folder, model = stage0.Run(args), random_model(50)
    run_folder.checkpoint(model, [], 3)
    with pytest.raises(SystemExit) as caught:
        stage0.run_main(lambda: run_folder.log(step=4, loss=float("nan")))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and "loss is nan at step 4" in message and "--lr 0.0015" in message
    assert (tmp_path / "resume" / "state.pt").is_file()


@pytest.fixture(scope="module")
def places(tmp_path_factory, plain_tokenizer, tokenizer):
    """Checkpoints and data to make mistakes with: {name: folder}, and `tmp` to write to."""
    tmp = tmp_path_factory.mktemp("mistakes")
    places = {name: tmp / name for name in ("plain", "tagged", "foreign", "columns")} | {"tmp": tmp}
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, places["plain"])
    stage0.save(random_model(len(tokenizer)), tokenizer, places["tagged"])
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, places["foreign"])
    (places["foreign"] / "config.json").write_text('{"model_type": "gpt2"}')
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(places["columns"]))
    return places


MISTAKES = [
    ("stage1_zero.py --init out/nowhere", "out/nowhere: no such checkpoint folder"),
    ("stage1_zero.py --init {foreign}", "model_type is 'gpt2'"),
    ("stage2_beta.py --init {plain} --data {columns} --out {tmp}/o", "no column problem, question"),
    ("stage2_beta.py --init {plain} --data {tmp}/none --out {tmp}/o", "no such folder"),
    ("stage3_papo.py --init {plain} --out {tmp}/o", "needs a checkpoint from stage 2 or 3"),
    ("engine.py --init {plain} 1*2", "needs a checkpoint from stage 2 or 3"),
    ("engine.py --init {tagged} 1*2 --max-new-tokens 99999999", "exceed the KV budget"),
    ("eval.py {plain}=upside-down --out {tmp}/o", "unknown mode 'upside-down'"),
    (
        "eval.py {plain} --kind sums --depth 9 --out {tmp}/o",
        "--depth 9: sums has 1, 2, 3, 4, 5, 6, 7, 8; give one of these",
    ),
    ("stage1_zero.py --kind riddles", "invalid choice: 'riddles'"),
    ("stage3_papo.py --learning-rate 1", "unrecognized arguments: --learning-rate"),
    ("stage1_zero.py --init {plain} --device cuda", "no CUDA device is visible"),
]


@pytest.mark.parametrize("command, message", MISTAKES)
def test_a_user_error_is_one_line_and_exit_status_2(monkeypatch, capsys, places, command, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script, *flags = command.format(**places).split()
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, script, *flags)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last and message in last


def test_the_real_command_line_ends_with_exit_status_2_and_no_traceback():
    done = run(sys.executable, "stage1_zero.py", "--init", "out/nowhere")
    assert done.returncode == 2, done.stderr
    assert "error: out/nowhere: no such checkpoint folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_help_with_a_line_for_every_flag(monkeypatch, capsys, script):
    with pytest.raises(SystemExit) as caught:
        run_here(monkeypatch, script, "--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out

    table = importlib.import_module(script.removesuffix(".py")).ARGUMENTS
    assert len({flag for flag, *_ in table}) == len(table)
    for flag, _, _, meaning, *_ in table:
        assert flag in shown and len(meaning) > 5, flag

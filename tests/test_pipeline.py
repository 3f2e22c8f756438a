"""The scripts as a user runs them: the smoke pipeline, incremental make, resume after a kill, one-line errors."""

import json
import os
import re
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from safetensors.torch import load_file

import stage0_model as stage0
import stage1_zero
import stage2_beta
import stage3_papo


def run(*command, cwd=ROOT):
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """`make smoke` into a temporary folder with this interpreter."""
    out = tmp_path_factory.mktemp("smoke")
    command = ["make", "smoke", f"SMOKE={out}", f"PY={sys.executable}", "VENV="]
    done = run(*command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, command, done


def test_smoke_pipeline_runs_every_stage_and_prints_the_table(smoke):
    out, _, done = smoke
    for stage in ("stage0", "stage1", "stage2", "stage3"):
        assert (out / stage / "model.safetensors").is_file() and (out / stage / "args.json").is_file()
        assert not (out / stage / "resume").exists()
        steps = [json.loads(line)["step"] for line in (out / stage / "log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
    report = json.loads((out / "eval.json").read_text())
    assert [(r["checkpoint"].rsplit("/", 1)[1], r["mode"]) for r in report["checkpoints"]] == [
        ("stage0", "plain"), ("stage0", "format"), ("stage1", "format"), ("stage2", "parallel"), ("stage3", "parallel"),
    ]  # fmt: skip
    assert "accuracy %" in done.stdout and "<title>Native parallel traces" in (out / "trace.html").read_text()
    data = datasets.load_from_disk(str(out / "stage2" / "data"))
    assert len(data) >= 1 and {"problem", "response", "plans"} <= set(data.column_names)


def test_smoke_rollouts_of_stage_3_fork_for_real(smoke):
    out, _, _ = smoke
    report = json.loads((out / "eval.json").read_text())["checkpoints"][-1]
    assert report["parallel"] > 0 and report["critical path"] < report["tokens"]


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


def test_finished_stages_are_not_run_again(smoke):
    out, command, _ = smoke
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = run(*command)
    assert again.returncode == 0 and "stage0_model.py" not in again.stdout and "eval.py" not in again.stdout
    assert "accuracy %" in again.stdout  # the table is shown all the same
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_stage_1_and_3_checkpoints_load_in_transformers_with_the_same_logits(smoke):
    from transformers import AutoModelForCausalLM

    for stage in ("stage1", "stage3"):
        ours, tokenizer = stage0.load(smoke[0] / stage)
        ids = torch.randint(0, len(tokenizer), (2, 40))
        theirs = AutoModelForCausalLM.from_pretrained(smoke[0] / stage)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("script", ["stage0_model", "stage1_zero"])
def test_a_killed_run_resumes_and_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, capsys, smoke, script):
    module = {"stage0_model": stage0, "stage1_zero": stage1_zero}[script]
    flags = "--steps 5 --save-every 2 --device cpu".split()
    flags += {
        "stage0_model": "--batch-tokens 1500 --hidden-size 64 --layers 1 --measure 0".split(),
        "stage1_zero": f"--init {smoke[0] / 'stage0'} --prompts 2 --group-size 3 --max-new-tokens 40 --max-rounds 1".split(),
    }[script]

    def train(folder):
        monkeypatch.setattr(sys, "argv", [script, *flags, "--out", str(tmp_path / folder)])
        module.main()

    train("whole")
    log = stage0.Run.log

    def killed_at_step_4(self, **row):
        if row["step"] == 4:
            raise KeyboardInterrupt
        log(self, **row)

    monkeypatch.setattr(stage0.Run, "log", killed_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    monkeypatch.setattr(stage0.Run, "log", log)
    train("killed")
    assert "resuming" in capsys.readouterr().out
    whole, killed = (load_file(tmp_path / f / "model.safetensors") for f in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "flags", ["--sequential", "--group-std", "--no-schema-filter", "--clip-updates 2", "--count-forced", "--no-schema-filter --count-forced"]
)
def test_the_sequential_twin_and_every_ablation_of_papo_runs(tmp_path, monkeypatch, smoke, flags):
    init = smoke[0] / "stage2"
    if flags == "--sequential":  # SR-BETA, then SR: same data, causal mask, sequential decoding
        command = f"stage2 --sequential --init {smoke[0] / 'stage1'} --data {smoke[0] / 'stage2' / 'data'} --epochs 1 --out {tmp_path / 'beta'}"
        monkeypatch.setattr(sys, "argv", command.split())
        stage2_beta.main()
        init = tmp_path / "beta"
    command = f"stage3 {flags} --init {init} --out {tmp_path / 'npr'} --kind sums --steps 2 --prompts 2 --group-size 3 --max-new-tokens 200"
    monkeypatch.setattr(sys, "argv", command.split())
    stage3_papo.main()
    rows = [json.loads(line) for line in (tmp_path / "npr" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["logprob_gap"] < 1e-3 for row in rows if "--clip-updates" not in flags)
    if flags == "--sequential":
        assert all(row["critical_path"] == row["length"] for row in rows)
    if "--no-schema-filter" in flags:
        assert all(row["used"] == row["sampled"] == 6 for row in rows)


def test_a_run_with_other_arguments_starts_afresh(tmp_path):
    for steps, kept in ((5, False), (5, True), (6, False)):  # the same arguments keep what is there, others clear it
        run_folder = stage0.Run(stage0.parse_args(["--out", str(tmp_path), "--steps", str(steps)]))
        assert (tmp_path / "resume" / "state.safetensors").exists() is kept
        run_folder.checkpoint(random_model(50), [], 3)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(tmp_path, capsys):
    args = stage0.parse_args(["--out", str(tmp_path)])
    run_folder, model = stage0.Run(args), random_model(50)
    run_folder.checkpoint(model, [], 3)
    with pytest.raises(SystemExit) as caught:
        stage0.run_main(lambda: run_folder.log(step=4, loss=float("nan")))
    assert caught.value.code == 2 and "loss is nan at step 4" in capsys.readouterr().err
    assert (tmp_path / "resume" / "state.safetensors").is_file()


@pytest.mark.parametrize(
    "command, message",
    [
        (["stage1_zero.py", "--init", "out/nowhere"], "out/nowhere: no such checkpoint folder"),
        (["stage1_zero.py", "--init", "{foreign}"], "model_type is 'gpt2'"),
        (["stage2_beta.py", "--init", "{plain}", "--data", "{columns}", "--out", "{tmp}/o"], "no column problem, question"),
        (["stage2_beta.py", "--init", "{plain}", "--data", "{tmp}/none", "--out", "{tmp}/o"], "no such folder"),
        (["stage3_papo.py", "--init", "{plain}", "--out", "{tmp}/o"], "needs a checkpoint from stage 2 or 3"),
        (["engine.py", "--init", "{plain}", "1*2 total?"], "needs a checkpoint from stage 2 or 3"),
        (["engine.py", "--init", "{tagged}", "1*2 total?", "--max-new-tokens", "99999999"], "exceed the KV budget"),
        (["eval.py", "{plain}=upside-down", "--out", "{tmp}/o"], "unknown mode 'upside-down'"),
        (["stage1_zero.py", "--kind", "riddles"], "invalid choice: 'riddles'"),
        (["stage3_papo.py", "--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        pytest.param(
            ["stage1_zero.py", "--init", "{plain}", "--device", "cuda"], "no CUDA device is visible",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)  # fmt: skip
def test_a_user_error_is_one_line_and_exit_status_2(tmp_path, plain_tokenizer, tokenizer, command, message):
    places = {name: str(tmp_path / name) for name in ("plain", "tagged", "foreign", "columns")} | {"tmp": str(tmp_path)}
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "plain")
    stage0.save(random_model(len(tokenizer)), tokenizer, tmp_path / "tagged")
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "foreign")
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(places["columns"])
    done = run(sys.executable, *(c.format(**places) for c in command))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["stage0_model.py", "engine.py", "stage1_zero.py", "stage2_beta.py", "stage3_papo.py", "eval.py"])
def test_every_script_has_help_with_a_line_for_every_flag(script):
    done = run(sys.executable, script, "--help")
    assert done.returncode == 0
    source = (ROOT / script).read_text()
    assert len(re.findall(r"add_argument\(", source)) == len(re.findall(r"help=", source))


def test_every_command_and_file_that_the_readme_quotes_exists():
    readme = (ROOT / "README.md").read_text()
    for script, flags in re.findall(r"^(?:python|\.venv/bin/python) (\w+\.py|tests/\w+\.py)(.*)$", readme, re.M):
        source = (ROOT / script).read_text()
        for flag in re.findall(r"(?<= )--[a-z-]+", flags.split("#")[0]):
            assert f'"{flag}"' in source, f"{script} has no {flag}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)\s*(?:#|$)", readme, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for name in re.findall(r"^\| `([\w./]+)` \|", readme, re.M):
        assert (ROOT / name).exists(), name

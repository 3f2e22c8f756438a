"""Kills, signals, full disks and numbers that are not finite: what a stage leaves, and that the same
command then ends with what an uninterrupted run ends with.

A stage runs in a fork of this process, which has everything imported; a kill is os._exit or SIGKILL,
after which nothing of Python's is run.
"""

import contextlib
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, random_model
from safetensors.torch import load_file
from test_beta import RESPONSE
from test_distributed import JOBS, MODULES, EndingEngine, toss_a_coin

import stage0_model as stage0

pytestmark = [pytest.mark.slow, pytest.mark.faults]  # `make faults`

FLAGS = {
    "stage0": "--steps 5 --save-every 2 --batch-tokens 600 --micro-batches 2 --hidden-size 64 --layers 1",
    "stage1": JOBS["stage1"] + " --save-every 1",
    "stage2": "--init {p}/plain --problems 12 --samples 2 --kind sums --keep-wrong --epochs 2 --batch-tokens 900"
    " --max-new-tokens 60 --save-every 2",
    "stage3": JOBS["stage3"],
}


def import_what_optimizers_import():
    """The first step of an optimizer imports for seconds; here, so that not every fork has to."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.sum().backward()
    for optimizer in (torch.optim.AdamW([weight]), torch.optim.Muon([weight])):
        optimizer.step()


@pytest.fixture(scope="module")
def p(tmp_path_factory, plain_tokenizer, tokenizer):
    """Checkpoints to begin with, and every stage's uninterrupted run."""
    p = tmp_path_factory.mktemp("faults")
    import_what_optimizers_import()
    stage0.save(random_model(len(plain_tokenizer), std=0.1), plain_tokenizer, p / "plain")
    stage0.save(random_model(len(tokenizer), std=0.1), tokenizer, p / "tagged")
    for script in FLAGS:
        assert run(p, script, p / "whole" / script) == 0
    return p


def run(p, script, out, more="", before=None, kill_after=None):
    """Exit status of a stage in a fork; -9 where it was killed, after so many seconds.

    before(): called in the fork ahead of the stage.  What it prints goes to <p>/stderr.
    """
    pid = os.fork()
    if pid == 0:
        status = 70  # neither finished nor stopped: an exception of Python's
        try:
            os.dup2(os.open(p / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            sys.stdout = open(os.devnull, "w")
            sys.argv = [
                script,
                "--device",
                "cpu",
                *FLAGS[script].format(p=p).split(),
                *more.split(),
                "--out",
                str(out),
            ]
            stage0.hold.cache_clear()
            stage0.Problem.verify = toss_a_coin
            MODULES[script].Engine = EndingEngine
            MODULES[script].format_score = lambda text: 0.0
            if script == "stage2":
                MODULES[script].PART = 8
                MODULES[script].parse_response = lambda text: rigged
                MODULES[script].response_text = lambda tokenizer, ids: RESPONSE.replace("A7", f"A{len(ids)}")
            if before:
                before()
            stage0.run_main(MODULES[script].main)
            status = 0
        except SystemExit as stopped:
            status = stopped.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


rigged = __import__("stage1_zero").parse_response(RESPONSE)
TIMES = ("seconds", "tokens_per_second", "rollout_seconds", "step_seconds")


def contents(folder):
    """What a run left, {name: content}, without times and without where it lies."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or name.startswith("data/"):
            continue
        if name == "log.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{key: row[key] for key in row if key not in TIMES} for row in rows]
        elif name == "args.json":
            found[name] = json.loads(file.read_text()) | {"out": ""}
        else:
            found[name] = file.read_bytes()
    if (folder / "data").is_dir():
        found["data"] = datasets.load_from_disk(str(folder / "data")).to_list()
    return found


def assert_as_if_uninterrupted(p, script, out, why):
    whole = contents(p / "whole" / script)
    ended = contents(out)
    assert sorted(ended) == sorted(whole), why
    assert [name for name in whole if ended[name] != whole[name]] == [], why


EVENTS = [(os, "replace"), (os, "rename"), (shutil, "rmtree"), (os, "truncate"), (os, "mkdir"), (os, "fsync")]


def counting(count, die_at):
    """Wrap what changes the file system: the call of this number ends the process ahead of it."""

    def wrap(function):
        def counted(*args, **kwargs):
            count.append(function.__name__)
            if len(count) == die_at:
                os._exit(9)
            return function(*args, **kwargs)

        return counted

    for module, name in EVENTS:
        setattr(module, name, wrap(getattr(module, name)))
    Path.unlink = wrap(Path.unlink)


@pytest.mark.parametrize("script", FLAGS)
def test_a_run_killed_at_any_change_of_the_file_system_ends_as_if_uninterrupted(p, script, tmp_path):
    assert run(p, script, tmp_path / "whole", before=lambda: counting([], None)) == 0
    for die_at in range(1, 200):
        out = tmp_path / str(die_at)
        status = run(p, script, out, before=lambda: counting([], die_at))
        if status == 0:
            break
        assert status == 9, (p / "stderr").read_text()
        assert run(p, script, out) == 0, (die_at, (p / "stderr").read_text())
        assert_as_if_uninterrupted(p, script, out, f"killed at change {die_at}")
    assert die_at > 15  # so many there were at least


@pytest.mark.parametrize("script", FLAGS)
def test_a_run_killed_at_ten_random_moments_ends_as_if_uninterrupted(p, script, tmp_path):
    began = time.time()
    assert run(p, script, tmp_path / "timed") == 0
    seconds = time.time() - began
    rng = random.Random(script)
    for trial in range(10):
        out = tmp_path / str(trial)
        status = run(p, script, out, kill_after=rng.uniform(0, seconds))
        if status == -9:
            assert run(p, script, out) == 0, (p / "stderr").read_text()
        assert_as_if_uninterrupted(p, script, out, f"trial {trial}")


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_and_the_same_command_goes_on(
    p, script, number, expected, tmp_path
):
    def signalled():
        log = stage0.Run.log

        def dying_log(self, **row):
            log(self, **row)
            if row["step"] == 3:
                os.kill(os.getpid(), number)

        stage0.Run.log = dying_log

    out = tmp_path / "out"
    assert run(p, script, out, before=signalled) == expected
    said = (p / "stderr").read_text()
    assert "Traceback" not in said and f"{out} is saved after step 3; the same command goes on" in said
    assert torch.load(out / "resume" / "state.pt", weights_only=True)["step"] == 3
    assert run(p, script, out) == 0
    assert_as_if_uninterrupted(p, script, out, expected)


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes at a folder; it can grow.  Skips where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("kilobytes", [4, 40, 200, 600, 1200])
def test_a_full_disk_is_told_in_one_line_and_the_same_command_goes_on_with_room(
    p, script, kilobytes, tmp_path
):
    def unaware():  # others fill the disk after the run has looked how much is free
        shutil.disk_usage = lambda path: SimpleNamespace(free=2**40)

    with small_disk(tmp_path / "disk", kilobytes * 1024) as resize:
        out = tmp_path / "disk" / "out"
        status = run(p, script, out, before=unaware)
        said = (p / "stderr").read_text()
        assert "Traceback" not in said and (status == 0 or said.splitlines()[-1].startswith("error: ")), said
        assert status in (0, 2) and (status == 2 or kilobytes > 200)
        resize(64 * 2**20)
        assert run(p, script, out) == 0, (p / "stderr").read_text()
        assert_as_if_uninterrupted(p, script, out, kilobytes)


@pytest.mark.parametrize("script", FLAGS)
def test_a_file_size_limit_is_told_in_one_line_and_the_same_command_goes_on_without(p, script, tmp_path):
    for kilobytes in (1, 20, 100):

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))

        out = tmp_path / str(kilobytes)
        assert run(p, script, out, before=limit) == 2
        said = (p / "stderr").read_text()
        assert "Traceback" not in said and "error: " in said
        assert run(p, script, out) == 0, (p / "stderr").read_text()
        assert_as_if_uninterrupted(p, script, out, kilobytes)


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("where", ["loss", "gradient", "weights"])
def test_numbers_that_are_not_finite_stop_a_run_and_a_lower_rate_goes_on_from_the_last_finite_state(
    p, script, where, tmp_path
):
    def broken():
        update = stage0.update

        def breaking_update(model, optimizers):
            state = torch.load(state_file, weights_only=True) if state_file.is_file() else {"step": 0}
            if state["step"] < 2 or where == "loss":
                return update(model, optimizers)
            if where == "gradient":
                stage0.trained(model)["model.norm.weight"].grad.fill_(float("inf"))
                return update(model, optimizers)
            # a step that is far too large
            stage0.set_lr(optimizers, float("inf"))
            return update(model, optimizers)

        def breaking_log(self, **row):
            if where == "loss" and row["step"] == 3:
                row["loss"] = float("nan")
            log(self, **row)

        log = stage0.Run.log
        stage0.Run.log = breaking_log
        MODULES[script].update = breaking_update

    out = tmp_path / "out"
    state_file = out / "resume" / "state.pt"
    assert run(p, script, out, before=broken) == 2
    said = (p / "stderr").read_text().splitlines()[-1]
    assert "at step 3" in said and "the same command with a lower rate goes on from it, e.g. --lr" in said
    assert ("--tag-lr 0.01" in said) == (script == "stage2")  # its rows learn at that rate, whatever --lr is
    state = torch.load(state_file, weights_only=True)
    assert state["step"] == 2 and all(weight.isfinite().all() for weight in state["weights"].values())
    assert not (out / "model.safetensors").exists()

    # the advised command, word by word; then any other setting is still refused
    advised = said.split("e.g. ")[1]
    assert run(p, script, out, more="--seed 5") == 2
    assert run(p, script, out, more=advised) == 0, (p / "stderr").read_text()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    whole, other = (load_file(folder / "model.safetensors") for folder in (p / "whole" / script, out))
    assert all(tensor.isfinite().all() for tensor in other.values())
    assert any(not torch.equal(whole[name], other[name]) for name in whole)  # the rate was really another


def test_damaged_lines_of_the_log_are_dropped_with_a_warning(p, tmp_path):
    out = tmp_path / "out"

    def dying():
        stage0.Run.finish = lambda self, *_: os._exit(9)

    assert run(p, "stage0", out, before=dying) == 9
    log = out / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 5, "lo')
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"\0\0\0\0\n", b"7\n", b"\xff\n", *lines[1:]]))
    assert run(p, "stage0", out) == 0
    said = (p / "stderr").read_text()
    assert said.count("is damaged and left out") == 4 and f"{log}: line 2" in said
    assert_as_if_uninterrupted(p, "stage0", out, "")


def test_an_interrupted_make_keeps_the_target_that_it_was_building(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    stage = '#!/bin/bash\nwhile [ "$1" != --out ]; do shift; done\nmkdir -p $2; echo whole > $2/model.safetensors; '
    (tmp_path / "stage").write_text(stage + "echo there; exec sleep 60\n")
    (tmp_path / "stage").chmod(0o755)
    (tmp_path / "out").mkdir()
    for target in ("stage0", "stage1", "ablations/papo"):
        for done in ("stage0", "stage2"):
            if target != done:
                (tmp_path / "out" / done).mkdir(exist_ok=True)
                (tmp_path / "out" / done / "model.safetensors").write_text("there")
        file = f"out/{target}/model.safetensors"
        words = ["make", "PY=./stage", "VENV=", "-o", "out/stage2/model.safetensors", file]
        # what a shell starts in the background ignores Ctrl-C, and so would make
        make = subprocess.Popen(
            words,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        while "there" not in make.stdout.readline():
            pass
        os.killpg(make.pid, signal.SIGINT)
        assert make.wait() != 0
        assert (tmp_path / file).read_text() == "whole\n", target
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()

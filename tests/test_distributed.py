"""Two gloo ranks on the CPU against one process: the same rollouts, the same statistics, the same update."""

import gc
import hashlib
import json
import os
import socket
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from test_beta import RESPONSE

import stage0_model as stage0
import stage1_zero
import stage2_beta
import stage3_papo
from engine import Engine

MODULES = {"stage0": stage0, "stage1": stage1_zero, "stage2": stage2_beta, "stage3": stage3_papo}


class EndingEngine(Engine):
    """Ends a response with probability 1/30 a token, so that random weights give rollouts of many
    lengths that really stop."""

    def sample(self, logits):
        logits = logits.clone()
        end = self.tokenizer.eos_token_id
        logits[:, end] = logits.float().logsumexp(-1) - np.log(30)
        return super().sample(logits)


def toss_a_coin(problem, text):
    """A verdict that the text decides and nothing else: rewards differ, whatever the weights."""
    return hashlib.sha256(text.encode()).digest()[0] % 2 == 0


def leave():
    """Leave the process group as `run_main` does: nothing that holds it may live until Python ends."""
    gc.collect()
    torch.distributed.destroy_process_group()


def run_jobs(rank, world, ports, jobs):
    """Stages' mains one after another, as this rank.  jobs: (script, argv, step at which to die or None)."""
    for port, (script, argv, die_at) in zip(ports, jobs):
        if world > 1:  # what torchrun would set
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TQDM_DISABLE": "1"}
        with pytest.MonkeyPatch.context() as patch:
            module = MODULES[script]
            log = stage0.Run.log

            def dying_log(self, log=log, die_at=die_at, **row):
                if row["step"] == die_at:
                    raise stage0.UserError("killed")
                log(self, **row)

            patch.setattr(stage0.Run, "log", dying_log)
            patch.setattr(stage0.Problem, "verify", toss_a_coin)
            patch.setattr(module, "Engine", EndingEngine, raising=False)
            patch.setattr(module, "format_score", lambda text: 0.0, raising=False)
            patch.setattr(sys, "argv", [script, "--device", "cpu", *argv])

            # a job that was to die leaves its last resume point behind
            try:
                module.main()
                assert not die_at
            except stage0.UserError:
                assert die_at and (Path(argv[-1]) / "resume" / "state.pt").is_file()
            if world > 1:
                leave()


SMALL_RL = "--prompts 3 --max-new-tokens 60 --micro-tokens 400 --lr 1e-3"
JOBS = {
    "stage1": f"--init {{p}}/plain --steps 3 --group-size 2 {SMALL_RL} --overlong-buffer 30 --max-rounds 3",
    "stage3": f"--init {{p}}/tagged --steps 4 --group-size 8 {SMALL_RL} --gain-factor 5 --save-every 2"
    " --schema-filter",
    "stage3 ablations": f"--init {{p}}/tagged --steps 2 --group-size 6 {SMALL_RL} --gain-factor 5"
    " --group-std",
    # AdamW alone: Muon's bf16 iteration turns a rounding of the gradient into 1e-4 of the weights
    "stage2": "--init {p}/plain --data {p}/data --epochs 2 --batch-tokens 900 --micro-tokens 300"
    " --lr 1e-3 --muon-lr 0 --tag-lr 0.05",  # the tags' rows five times as fast
    "stage0": "--steps 2 --batch-tokens 1500 --micro-batches 2 --hidden-size 64 --layers 1",
}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, plain_tokenizer, tokenizer):
    """Every job in one process (this one) and in two ranks; in two ranks, too, a run that is killed at
    step 4 and resumed."""
    p = tmp_path_factory.mktemp("ranks")
    stage0.save(random_model(len(plain_tokenizer), std=0.1), plain_tokenizer, p / "plain")
    stage0.save(random_model(len(tokenizer), std=0.1), tokenizer, p / "tagged")
    rows = []
    for i in range(20):
        response = RESPONSE.replace("A7", "A" + "7" * (1 + i % 5))
        rows.append({"problem": f"{i}*{i + 1} total?", "response": response})
    datasets.Dataset.from_list(rows).save_to_disk(str(p / "data"))

    jobs = {1: [], 2: []}
    for world in jobs:
        for name, flags in JOBS.items():
            argv = [*flags.format(p=p).split(), "--out", f"{p}/{name}/{world}"]
            jobs[world].append((name.split()[0], argv, None))
    killed = [*JOBS["stage3"].format(p=p).split(), "--out", f"{p}/killed"]
    jobs[2] += [("stage3", killed, 4), ("stage3", killed, None)]

    run_jobs(0, 1, [None] * len(JOBS), jobs[1])
    ports = [free_port() for _ in jobs[2]]
    torch.multiprocessing.spawn(run_jobs, (2, ports, jobs[2]), nprocs=2)
    return p


def result(folder):
    """(weights, rows of the log)"""
    log = (folder / "log.jsonl").read_text().splitlines()
    return load_file(folder / "model.safetensors"), [json.loads(line) for line in log]


def assert_same(one, two, atol=3e-5, rtol_log=0.0):
    weights, log = one
    others, other_log = two
    for k in weights:
        torch.testing.assert_close(others[k], weights[k], atol=atol, rtol=0)
    assert len(log) == len(other_log)
    for row, other in zip(log, other_log):
        for key in row.keys() - {"seconds", "tokens_per_second", "rollout_seconds", "step_seconds"}:
            assert other[key] == pytest.approx(row[key], abs=2e-4, rel=rtol_log), (row["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage1", "stage3", "stage3 ablations"])
def test_two_ranks_make_the_updates_of_one_process(runs, name):
    """Reinforcement learning on 3 prompts, so that the ranks' shares are unequal: rollouts, dynamic
    sampling, advantages, token counts and every logged number agree, and so do the weights, to 3e-5
    after moving by more than 5e-4: Adam divides each gradient by its own size, so where that is small
    its rounding counts in full (measured: 1.2e-5, in one weight of 1,536)."""
    one = result(runs / name / "1")
    assert_same(one, result(runs / name / "2"))
    weights, log = one
    assert all(-2 < row["reward"] < 1 and row["grad_norm"] > 0 for row in log)

    # they agree on something: the weights have moved, and dynamic sampling drew again on both ranks
    start = load_file(runs / ("plain" if name == "stage1" else "tagged") / "model.safetensors")
    assert max((weights[k] - start[k]).abs().max().item() for k in start) > 5e-4
    if name == "stage1":
        assert any(row["groups_sampled"] > 3 for row in log)


@pytest.mark.slow
def test_two_ranks_fine_tune_like_one_process(runs):
    assert_same(result(runs / "stage2" / "1"), result(runs / "stage2" / "2"))


@pytest.mark.slow
def test_two_ranks_pretrain_like_one_process(runs):
    """The forward is in bf16, whose numbers are 4e-3 apart, and Muon's iteration too, hence the loose
    tolerances."""
    assert_same(result(runs / "stage0" / "1"), result(runs / "stage0" / "2"), atol=5e-3, rtol_log=1e-3)


@pytest.mark.slow
def test_a_run_killed_on_two_ranks_resumes_on_two_ranks(runs):
    assert_same(result(runs / "stage3" / "1"), result(runs / "killed"))


def test_shares_put_together_are_the_list(monkeypatch):
    items = list(range(7))
    for world in (1, 2, 3, 9):
        parts = []
        for rank in range(world):
            monkeypatch.setattr(stage0, "ranks", lambda rank=rank, world=world: (rank, world))
            parts.append(stage0.my_share(items))
        assert sum(parts, []) == items
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_rank_without_a_document_has_no_batch(monkeypatch, tokenizer):
    args = stage0.parse_args(["--batch-tokens", "1"])  # one document is enough
    drawn = {}
    for rank in range(2):
        monkeypatch.setattr(stage0, "ranks", lambda rank=rank: (rank, 2))
        drawn[rank] = [len(ids) for ids, _ in stage0.corpus_batches(tokenizer, args, step=1)]
    assert drawn == {0: [1], 1: []}


def updates(rank, world, port, folder, muon_lr):
    """Five updates on one batch, a resume point after three; {tensor: value} and the numbers of state
    that this rank holds go to <folder>/<world>-<rank>.pt."""
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
        stage0.pick_device("cpu")
    run = stage0.Run(stage0.parse_args(["--out", f"{folder}/{world}"]))

    def steps(model, optimizers, numbers):
        for i in numbers:
            ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(i))
            # halves of one loss, to the bit, so that only the optimizers can differ
            (model(ids).float().log_softmax(-1).square().mean() / world).backward()
            stage0.update(model, optimizers)

    model = random_model(60).to(torch.bfloat16)
    optimizers = stage0.make_optimizers(model, 1e-3, muon_lr)
    steps(model, optimizers, range(3))
    run.checkpoint(model, optimizers, 3)
    stage0.from_all_ranks([])

    # what goes on is another model and other optimizers, as after a kill
    model = random_model(60, seed=5).to(torch.bfloat16)
    optimizers = stage0.make_optimizers(model, 1e-3, muon_lr)
    assert run.start(model, optimizers) == 3
    steps(model, optimizers, range(3, 5))
    held = sum(
        value.numel()
        for optimizer in optimizers
        for part in {id(o): o for o in (optimizer, getattr(optimizer, "optim", optimizer))}.values()
        for state in part.state.values()
        for value in state.values()
        if value.dim()
    )
    weights = {name: p.detach() for name, p in stage0.trained(model).items()}
    torch.save((weights, held), folder / f"{world}-{rank}.pt")
    if world > 1:
        del run, model, optimizers
        leave()


@pytest.mark.slow
@pytest.mark.parametrize("muon_lr", [0.0, 1e-3])
def test_two_ranks_hold_half_of_the_optimizers_state_each_and_step_as_one_process(tmp_path, muon_lr):
    updates(0, 1, None, tmp_path, muon_lr)
    torch.multiprocessing.spawn(updates, (2, free_port(), tmp_path, muon_lr), nprocs=2)
    weights, whole = torch.load(tmp_path / "1-0.pt")
    shares = []
    for rank in (0, 1):
        others, held = torch.load(tmp_path / f"2-{rank}.pt")
        shares.append(held)
        for name in weights:
            assert torch.equal(others[name], weights[name]), name
    assert sum(shares) == whole and max(shares) < 0.55 * whole

    # a resume point is one process's: two ranks go on from it, and it goes on from theirs
    one, two = (torch.load(tmp_path / f"{n}" / "resume" / "state.pt", weights_only=True) for n in "12")
    for mine, theirs in zip(one["optimizers"], two["optimizers"]):
        assert mine["state"].keys() == theirs["state"].keys()
        assert [g["params"] for g in mine["param_groups"]] == [g["params"] for g in theirs["param_groups"]]

"""--lora: adapters on every projection against the formula spelled out, transformers and peft."""

import copy
import json
import random

import datasets
import pytest
import torch
from conftest import ScriptedEngine, random_model, random_prompts, random_script, rescore, worst_gap
from safetensors.torch import load_file
from test_beta import RESPONSE
from test_distributed import SMALL_RL, run_jobs
from transformers import AutoModelForCausalLM

import stage0_model as stage0
from engine import token_logprobs

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def learn(model, optimizers, steps):
    for step in steps:
        ids = torch.randint(
            0, model.config.vocab_size - 5, (4, 12), generator=torch.Generator().manual_seed(step)
        )
        (-token_logprobs(model, ids)[0].mean()).backward()
        assert stage0.update(model, optimizers) > 0


def is_projection(name):
    return any(f".{projection}." in name for projection in PROJECTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_base_is_bit_equal_after_a_hundred_steps_but_for_the_rows_of_the_tags(
    tokenizer, tag_ids, dtype, tied
):
    model = random_model(len(tokenizer) + 5, num_hidden_layers=1, tie_word_embeddings=tied).to(dtype)
    before = copy.deepcopy(model.state_dict())
    stage0.add_adapters(model, tokenizer, R=2, seed=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    learn(model, stage0.make_optimizers(model, 1e-2), range(100))

    # what is saved differs in every projection, in the tags' rows and nowhere else
    for name, p in model.named_parameters():
        changed = (p != before[name]).any(-1)
        if is_projection(name):
            assert changed.any()
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert changed.nonzero()[:, 0].tolist() == sorted(tag_ids.values())
        else:
            assert not changed.any()

    # without the change that was learned, the base comes back to the bit
    for name, part in stage0.trained(model).items():
        if "lora_B" in name:
            part.zero_()
    stage0.put_back(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if is_projection(name))


def test_adapters_step_as_when_the_sum_of_base_and_change_is_differentiated(plain_tokenizer):
    """The reference calls the model with W_0 + (32 / R) B A and lets autograd find A's and B's gradients."""
    model = random_model(len(plain_tokenizer))
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    reference = copy.deepcopy(model)
    stage0.add_adapters(model, plain_tokenizer, R=4, seed=7)
    optimizers = stage0.make_optimizers(model, 1e-3)
    parts = {name: p.detach().clone().requires_grad_() for name, p in stage0.trained(model).items()}
    assert len(parts) == 2 * 3 * len(PROJECTIONS)  # this vocabulary has no tags
    theirs = torch.optim.AdamW(parts.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)

    def merged():
        weights = dict(base)
        for name in weights:
            if is_projection(name):
                A, B = (parts[name.replace("weight", f"lora_{x}.weight")] for x in "AB")
                weights[name] = weights[name] + 32 / 4 * (B @ A)
        return weights

    for step in range(5):
        ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(step))
        for _ in range(2):  # micro-batches add up
            (-token_logprobs(model, ids)[0].mean()).backward()
            logits = torch.func.functional_call(reference, merged(), (ids,))
            log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
            (-log_p.sum() / ids.numel()).backward()
        for name, part in stage0.trained(model).items():
            torch.testing.assert_close(part.grad, parts[name].grad, atol=1e-6, rtol=1e-4)
        torch.nn.utils.clip_grad_norm_(parts.values(), 1.0)
        theirs.step()
        theirs.zero_grad()
        stage0.update(model, optimizers)
    for name, part in stage0.trained(model).items():
        torch.testing.assert_close(part, parts[name].detach(), atol=2e-5, rtol=0)
    for name, weight in merged().items():
        torch.testing.assert_close(dict(model.named_parameters())[name], weight, atol=1e-4, rtol=0)


def test_adapters_learn_at_the_rate_of_adamw_whatever_that_of_muon(tokenizer):
    """Muon makes a matrix orthogonal that the model multiplies by; a factor of a change is none."""
    model = random_model(len(tokenizer) + 5)
    stage0.add_adapters(model, tokenizer, R=2, seed=0)
    [adamw] = stage0.make_optimizers(model, 1e-3, muon_lr=2e-3)
    held = {id(p) for group in adamw.param_groups for p in group["params"]}
    assert held == {id(p) for p in stage0.trained(model).values()}


def test_rollouts_are_scored_in_training_as_they_were_sampled(tokenizer, tag_ids):
    """In trees of random shapes, by a model that adapters have moved."""
    model = random_model(len(tokenizer) + 5)
    stage0.add_adapters(model, tokenizer, R=2, seed=0)
    learn(model, stage0.make_optimizers(model, 3e-2), range(10))
    rng = random.Random(0)
    prompts = random_prompts(rng, 8)
    scripts = {tuple(prompt): random_script(rng, tokenizer, tag_ids) for prompt in prompts}

    class Scripted(ScriptedEngine):
        def script_of(self, request):
            return scripts[request.prompt]

    rollouts = [group[0] for group in Scripted(model, tokenizer).generate(prompts, max_new_tokens=400)]
    assert all(rollout.num_forks for rollout in rollouts)
    assert worst_gap(rollouts, rescore(model, prompts, rollouts)) < 1e-4


JOBS = {
    "stage1": f"--init {{p}}/plain --steps 3 --group-size 2 {SMALL_RL} --overlong-buffer 30 --max-rounds 3",
    "stage2": "--init {p}/plain --data {p}/data --epochs 1 --batch-tokens 900 --lr 1e-2 --muon-lr 0",
    "stage2 start": "--init {p}/tagged --start {p}/plain --data {p}/data --epochs 1 --batch-tokens 900",
    "stage3": f"--init {{p}}/tagged --steps 3 --group-size 6 {SMALL_RL}",
}


@pytest.fixture(scope="module")
def p(tmp_path_factory, plain_tokenizer, tokenizer):
    p = tmp_path_factory.mktemp("lora")
    stage0.save(random_model(len(plain_tokenizer), std=0.1), plain_tokenizer, p / "plain")
    stage0.save(random_model(len(tokenizer), std=0.1), tokenizer, p / "tagged")
    rows = [{"problem": f"{i}*{i + 1} total?", "response": RESPONSE} for i in range(20)]
    datasets.Dataset.from_list(rows).save_to_disk(str(p / "data"))
    return p


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_stage_trains_adapters_goes_on_after_a_kill_and_writes_what_peft_opens(p, name):
    flags = [*JOBS[name].format(p=p).split(), "--lora", "3", "--save-every", "1"]
    jobs = [
        (name.split()[0], [*flags, "--out", f"{p}/{name}/{folder}"], die_at)
        for folder, die_at in (("whole", None), ("killed", 3), ("killed", None))
    ]
    run_jobs(0, 1, [None] * 3, jobs[:1])
    run_jobs(0, 1, [None] * 3, jobs[1:2])
    state = torch.load(p / name / "killed" / "resume" / "state.pt", weights_only=True)
    assert all("lora" in key or "trainable_tokens" in key for key in state["weights"])
    run_jobs(0, 1, [None] * 3, jobs[2:])

    if name == "stage2":
        log = [json.loads(line) for line in (p / name / "whole" / "log.jsonl").read_text().splitlines()]
        assert log[-1]["loss"] < log[0]["loss"] - 0.5

    # merged: an ordinary checkpoint, which has moved
    whole, killed = (load_file(p / name / folder / "model.safetensors") for folder in ("whole", "killed"))
    base = p / ("tagged" if name == "stage3" else "plain")
    start = load_file(base / "model.safetensors")
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert [key for key in start if len(start[key]) == len(whole[key]) and (start[key] != whole[key]).any()]
    merged, tokenizer = stage0.load(p / name / "whole")
    ids = torch.randint(0, len(tokenizer), (2, 40))

    # and apart, on top of its base, whose matrix of embeddings has to have a row for every tag
    peft = pytest.importorskip("peft")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(merged.config.vocab_size)
    opened = peft.PeftModel.from_pretrained(theirs, p / name / "whole" / "adapter")
    by_itself = peft.AutoPeftModelForCausalLM.from_pretrained(p / name / "whole" / "adapter")
    with torch.no_grad():
        for other in (opened, by_itself):
            torch.testing.assert_close(other(ids).logits, merged(ids), atol=1e-4, rtol=0)

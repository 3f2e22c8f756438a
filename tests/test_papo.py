"""Stage 3: PAPO by hand-worked numbers, its gradient against an independent REINFORCE, forced tokens without loss."""

import random
import types

import numpy as np
import pytest
import torch
from conftest import random_model, random_prompts
from test_engine import scripted_run

from engine import Example, batches, token_logprobs
from stage1_zero import Judged
from stage3_papo import papo_advantages, papo_loss, pay_for_short_paths, reward_of


def test_papo_advantage_by_hand():
    A = papo_advantages([1, 1, 1, -1], [0, 0, 1, 1])
    # means 1 and 0; over the batch: mean 0.5, population std sqrt((3 * 0.5^2 + 1.5^2) / 4) = 0.8660
    torch.testing.assert_close(A, torch.tensor([0.0, 0.0, 1.1547, -1.1547]), atol=1e-4, rtol=0)


def test_papo_std_is_of_the_original_rewards_in_any_group_order():
    """Regression against the authors' code, where the std was taken over a tensor that the same loop was overwriting."""
    rewards, groups = torch.tensor([1.0, -1, -1, 1, 1, 1]), torch.tensor([5, 5, 5, 2, 2, 2])
    order = torch.tensor([3, 0, 4, 1, 5, 2])
    A, B = papo_advantages(rewards, groups), papo_advantages(rewards[order], groups[order])
    torch.testing.assert_close(A[order], B)
    assert rewards.tolist() == [1, -1, -1, 1, 1, 1]


def test_papo_loss_value_and_gradient_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.7, 0.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    loss = papo_loss(logprobs, torch.tensor([1.0, -2.0]), mask)
    assert abs(loss.item() - -(3 * 1.0 - 2 * 2.0) / 5) < 1e-6
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -1, -1], [2, 2, 0]]) / 5)


def test_papo_gradient_equals_reinforce_computed_one_token_at_a_time(tokenizer, tag_ids):
    """d/dw of (1/n) sum A log pi(token | its visible past), each token in a forward of its own, no mask, no batch."""
    small = random_model(len(tokenizer) + 5, num_hidden_layers=2)
    _, prompts, _, rollouts = scripted_run(
        small, tokenizer, tag_ids, 3, seed=5, max_blocks=1, max_branches=3, max_length=3
    )
    advantages = torch.tensor([1.0, -0.5, 2.0])
    examples = [Example(p, r.ids, r.layout) for p, r in zip(prompts, rollouts)]
    n = sum(not f for r in rollouts for f in r.forced)
    for rows, ids, batch_layout, mask in batches(examples, 60):  # micro-batches of uneven rows
        mask[mask.clone()] = torch.tensor([not f for i in rows for f in rollouts[i].forced])
        logprobs, _ = token_logprobs(small, ids, batch_layout)
        papo_loss(logprobs, advantages[rows], mask, n).backward()
    ours = torch.cat([p.grad.flatten() for p in small.parameters()])

    small.zero_grad()
    total = 0.0
    for prompt, r, A in zip(prompts, rollouts, advantages):
        for t in range(len(r.ids)):
            if r.forced[t]:
                continue
            g, b = r.layout.block[t], r.layout.branch[t]
            # a chain on which the token depends in plain causal order exists inside a branch and before the first join
            past = [i for i in range(t) if not (g and r.layout.block[i] == g and r.layout.branch[i] != b)]
            context = torch.tensor([prompt + [r.ids[i] for i in past]])
            position = torch.tensor(
                [list(range(len(prompt))) + [len(prompt) + r.layout.position[i] for i in past]]
            )
            block = torch.tensor([[0] * len(prompt) + r.layout.block[past].tolist()])
            branch = torch.tensor([[0] * len(prompt) + r.layout.branch[past].tolist()])
            from engine import Layout

            logits = small(context, Layout(block, branch, position))[0, -1]
            total = total + A * logits.log_softmax(-1)[r.ids[t]]
    (-total / n).backward()
    theirs = torch.cat([p.grad.flatten() for p in small.parameters()])
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


def test_forced_tokens_carry_no_loss(model, tokenizer, tag_ids):
    _, prompts, _, rollouts = scripted_run(model, tokenizer, tag_ids, 4, seed=1)
    for prompt, r in zip(prompts, rollouts):
        [(_, ids, batch_layout, mask)] = batches([Example(prompt, r.ids, r.layout)], 10**6, model.device)
        forced = torch.zeros_like(mask)
        forced[mask] = torch.tensor(r.forced, device=model.device)
        logprobs, _ = token_logprobs(model, ids, batch_layout)
        grad = torch.autograd.grad(
            papo_loss(logprobs, torch.ones(1, device=model.device), mask & ~forced), logprobs
        )[0]
        assert (grad[forced] == 0).all() and (grad[mask & ~forced] != 0).all()
        assert tokenizer.decode(np.array(r.ids)[r.forced][:3]) == "<step>1:"


def test_micro_batches_hold_every_sequence_once_within_the_budget():
    rng = random.Random(0)
    examples = [Example(p, list(range(rng.randint(1, 50)))) for p in random_prompts(rng, 40)]
    seen = []
    for rows, ids, _, mask in batches(examples, 200):
        assert ids.numel() <= 200 or len(rows) == 1
        assert mask.sum() == sum(len(examples[i].ids) for i in rows)
        for b, i in enumerate(rows):
            assert ids[b, mask[b]].tolist() == examples[i].ids
        seen += rows
    assert sorted(seen) == list(range(40))


def args_of(**changes):
    return types.SimpleNamespace(**(dict(reward="answer", seed=0) | changes))


@pytest.mark.parametrize(
    "valid, right, expected", [(True, True, 1), (True, False, -1), (False, True, -2), (False, False, -2)]
)
def test_a_malformed_response_costs_more_than_a_wrong_one(valid, right, expected):
    assert reward_of("", valid, right, args_of()) == expected


def test_of_the_right_answers_to_a_question_the_shorter_path_earns_more():
    def of(critical_path, valid=True, right=True):
        reward = reward_of("", valid, right, args_of())
        rollout = types.SimpleNamespace(critical_path=critical_path)
        return Judged([], "", rollout, "", valid, right, reward)

    # 40 is the longest of the right ones: it earns nothing more, 10 three quarters of the weight
    group = [of(40), of(10), of(90, right=False), of(5, right=False), of(90, valid=False), of(20)]
    pay_for_short_paths(group, 0.5)
    assert [j.reward for j in group] == [1, 1.375, -1, -1, -2, 1.25]

    # without a right answer, and without a weight, nothing changes
    for group, weight in (([of(9, right=False)], 0.5), ([of(40), of(10)], 0.0)):
        before = [j.reward for j in group]
        assert [j.reward for j in pay_for_short_paths(group, weight)] == before


def test_the_controls_pay_for_the_format_alone_or_for_nothing():
    assert [reward_of("", valid, False, args_of(reward="format")) for valid in (True, False)] == [1, -2]
    coins = [reward_of(f"text {i}", True, i % 2 == 0, args_of(reward="random")) for i in range(400)]
    assert set(coins) == {1, -1} and abs(sum(coins)) < 60  # 3 standard deviations
    assert abs(sum(coins[::2])) < 45  # whether right or not
    again = [reward_of(f"text {i}", True, False, args_of(reward="random")) for i in range(400)]
    assert (
        coins
        == again
        != [reward_of(f"text {i}", True, False, args_of(reward="random", seed=1)) for i in range(400)]
    )


def test_a_group_of_equal_rewards_changes_no_gradient():
    """Stage 3 does not compute such groups; their tokens still count."""
    logprobs = torch.randn(6, 4, requires_grad=True)
    mask = torch.ones(6, 4, dtype=torch.bool)
    A = papo_advantages([1, 1, 1, -1, 1, -1], [0, 0, 1, 1, 2, 2])
    assert (A == 0).nonzero().flatten().tolist() == [0, 1]
    whole = torch.autograd.grad(papo_loss(logprobs, A, mask), logprobs)[0]
    learned = A != 0
    part = torch.autograd.grad(papo_loss(logprobs[learned], A[learned], mask[learned], mask.sum()), logprobs)[
        0
    ]
    torch.testing.assert_close(whole, part)

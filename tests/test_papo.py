"""Stage 3: PAPO by hand-worked numbers, its gradient against an independent REINFORCE, forced tokens without loss."""

import random
import types

import numpy as np
import pytest
import torch
from conftest import random_model, random_prompts
from test_beta import RESPONSE
from test_engine import scripted_run

import stage0_model as stage0
import stage3_papo
from engine import Engine, Example, Rollout, batches, token_logprobs
from stage1_zero import Judged, dapo_advantages, dapo_loss
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
    settings = dict(reward="answer", seed=0, group_std=False, count_forced=False, clip_updates=0)
    return types.SimpleNamespace(**(settings | changes))


def groups_of(*rewards):
    """A group of Judged for each tuple of rewards; of the four tokens of a response two are forced."""
    forced = [False, True, True, False]
    rollout = Rollout([7, 8, 9, 10], None, forced, [-1.0, 0.0, 0.0, -2.0], "stop", 4, 1)
    return [[Judged([5, 6], "", rollout, "", True, R > 0, R) for R in group] for group in rewards]


def test_an_update_learns_what_was_sampled_of_the_answers_that_differ_from_their_groups():
    groups = groups_of((1.0, -2.0), (1.0, 1.0))
    batch, _ = stage3_papo.objective(groups, args_of())
    # of four responses of two sampled tokens each two have a gradient, and all count
    assert (batch.num_tokens, batch.num_learned, len(batch.examples)) == (8, 4, 2)
    assert [x.tolist() for x in batch.actions] == [[True, False, False, True]] * 2
    assert [x.tolist() for x in batch.logprobs] == [[-1.0, 0.0, 0.0, -2.0]] * 2
    torch.testing.assert_close(batch.advantages, papo_advantages([1, -2, 1, 1], [0, 0, 1, 1])[:2])

    by_group, _ = stage3_papo.objective(groups, args_of(group_std=True))
    torch.testing.assert_close(by_group.advantages, dapo_advantages([1, -2], [0, 0]))
    counted, _ = stage3_papo.objective(groups, args_of(count_forced=True))
    assert (counted.num_tokens, counted.num_learned) == (16, 8) and all(x.all() for x in counted.actions)


@pytest.mark.parametrize("clip_updates", [0, 3])
def test_one_update_without_a_clip_or_as_many_as_asked_for_with_one(clip_updates):
    groups = groups_of((1.0, -2.0))
    args = args_of(clip_updates=clip_updates)
    assert stage3_papo.shares_of(groups, args) == [groups] * (clip_updates or 1)
    _, loss = stage3_papo.objective(groups, args)
    # ratios of 2 and 1/2: the first is worth 1.2 under the clip, and without one its value is 1
    logprobs, old = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-1.0 - np.log(2), -3.0 + np.log(2)]])
    A, mask = torch.ones(1), torch.ones(1, 2, dtype=torch.bool)
    expected = dapo_loss(logprobs, old, A, mask, 0.2, 0.2) if clip_updates else papo_loss(logprobs, A, mask)
    assert loss(logprobs, old, A, mask, 2) == expected
    assert expected.item() == pytest.approx(-(1.2 + 0.5) / 2 if clip_updates else -1.0)


def judged_by_stage_3(tokenizer, text, finish_reason="stop"):
    ids = tokenizer.encode(text, add_special_tokens=False)
    rollout = Rollout(ids, None, [False] * len(ids), [0.0] * len(ids), finish_reason, len(ids), 1)
    return stage3_papo.judge(stage0.Problem("sums", "q", "9"), [5], rollout, tokenizer, args_of())


def test_only_an_answer_that_ended_by_itself_in_the_format_is_valid(tokenizer):
    good = judged_by_stage_3(tokenizer, RESPONSE)
    wrong = judged_by_stage_3(tokenizer, RESPONSE.replace("boxed{9}", "boxed{8}"))
    broken = judged_by_stage_3(tokenizer, RESPONSE.replace("<step>2:", "<step>3:"))
    cut = judged_by_stage_3(tokenizer, RESPONSE, "length")
    assert [(j.valid, j.right, j.reward) for j in (good, wrong, broken, cut)] == [
        (True, True, 1.0),
        (True, False, -1.0),
        (False, True, -2.0),
        (False, True, -2.0),
    ]


@pytest.mark.parametrize("schema_filter", [False, True])
def test_what_is_malformed_is_learned_from_unless_filtered_and_always_counted(tokenizer, schema_filter):
    asked = []

    class Rigged(Engine):
        def generate(self, prompts, **settings):
            asked.append(settings)
            rows = [(RESPONSE, "stop"), (RESPONSE, "length")]
            ids = [self.tokenizer.encode(text, add_special_tokens=False) for text, _ in rows]
            return [
                [Rollout(x, None, [], [], reason, len(x), 1) for x, (_, reason) in zip(ids, rows)]
                for _ in prompts
            ]

    engine = Rigged(random_model(len(tokenizer)), tokenizer)
    args = args_of(kind="sums", prompts=3, group_size=2, max_new_tokens=99, temperature=1.0, sequential=False)
    vars(args).update(max_branches=4, path_weight=0.0, schema_filter=schema_filter)
    groups, judged = stage3_papo.sample_groups(engine, None, stage0.FORMAT_PROMPT, 1, args)
    assert len(groups) == 3 and len(judged) == 6
    assert [len(group) for group in groups] == [1 if schema_filter else 2] * 3
    assert asked[0]["parallel"] and asked[0]["n"] == 2 and asked[0]["max_branches"] == 4
    stage3_papo.sample_groups(
        engine, None, stage0.FORMAT_PROMPT, 1, args_of(**vars(args) | {"sequential": True})
    )
    assert not asked[1]["parallel"] and asked[1]["seed"] == asked[0]["seed"]


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

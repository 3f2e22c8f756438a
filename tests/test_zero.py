"""Stage 1: every rung of the format reward, and DAPO by hand-worked numbers."""

import functools
import json
import random
import re
import sys
import time
import types

import pytest
import torch

import stage0_model as stage0
import stage1_zero
from conftest import random_model
from engine import TAGS, Engine, Rollout
from stage1_zero import VIOLATIONS, dapo_advantages, dapo_loss, format_score, overlong_penalty, parse_response

GOOD = (
    "<guideline><plan>1:A</plan><plan>2:B</plan></guideline><step>1:A7+2=9</step><step>2:B1+1=2</step>"
    "<takeaway>a9b2</takeaway>\\boxed{9}"
)


@pytest.mark.parametrize(
    "text, violation",
    [
        (GOOD, None),
        (GOOD.replace("</step><step>", "</step>\n<step>").replace("</plan>", "</plan> "), None),  # white space is no text
        (GOOD.replace("\\boxed{9}", "so the answer is \\boxed{9}."), None),
        (GOOD[: GOOD.index("\\boxed")] + GOOD, None),  # two blocks
        ("a9 b2 \\boxed{9}", "no block"),
        ("", "no block"),
        (GOOD.replace("</step><step>", "<step>").replace("</step>", "</step></step>"), "overlapping tags"),
        (GOOD.replace("</guideline>", ""), "overlapping tags"),
        (GOOD.replace("<plan>1:A</plan><plan>2:B</plan>", "") + "<plan>1:A</plan>", "overlapping tags"),
        (GOOD.replace("<takeaway>a9b2</takeaway>", ""), "block out of order"),
        ("<step>1:A7+2=9</step>" + GOOD, "block out of order"),
        (GOOD.replace("<takeaway>", "<step>").replace("</takeaway>", "</step>"), "block out of order"),
        (GOOD.replace("<plan>2:B</plan>", ""), "counts differ"),
        (GOOD.replace("<step>2:B1+1=2</step>", ""), "counts differ"),
        (GOOD.replace("<plan>1:A</plan><plan>2:B</plan>", "").replace("<step>1:A7+2=9</step><step>2:B1+1=2</step>", "<step>1:abc</step>"), "counts differ"),
        (GOOD.replace("<step>1:", "<step>2:"), "numbering"),
        (GOOD.replace("<plan>1:", "<plan>"), "numbering"),
        (GOOD.replace("\\boxed{9}", "9"), "no answer"),
        (GOOD + " or \\boxed{8}", "no answer"),
        (GOOD.replace("a9b2</takeaway>\\boxed{9}", "\\boxed{9}</takeaway>"), "no answer"),
        ("First " + GOOD, "text between tags"),
        (GOOD.replace("</step><step>", "</step> next <step>"), "text between tags"),
        (GOOD.replace("</plan><plan>", "</plan>and<plan>"), "text between tags"),
        (GOOD[: GOOD.index("\\boxed")] + "then" + GOOD, "text between tags"),
        (GOOD.replace("A7+2=9", "A"), "nearly empty"),
        (GOOD.replace("1:A<", "1: <"), "nearly empty"),
        (GOOD.replace("a9b2", " "), "nearly empty"),
    ],
)  # fmt: skip
def test_each_rung_of_the_format_reward(text, violation):
    violations = parse_response(text).violations
    assert (violations[0] if violations else None) == violation
    assert format_score(text) == (VIOLATIONS[violation] if violation else 0.0)


def test_every_violation_costs_more_than_a_wrong_answer():
    assert all(-2 <= score <= -1.1 for score in VIOLATIONS.values())


def test_parse_response_reads_blocks_and_final_text():
    response = parse_response(GOOD)
    assert response.blocks == [(["A", "B"], ["A7+2=9", "B1+1=2"], "a9b2")] and response.final == "\\boxed{9}"
    example = parse_response(
        "<guideline><plan>1:A</plan></guideline><step>1:A7+2=9</step><takeaway>9</takeaway>\\boxed{9}"
    )
    assert (example.blocks, example.final, example.violations) == (
        [(["A"], ["A7+2=9"], "9")],
        "\\boxed{9}",
        [],
    )


def test_parser_never_raises_on_shuffled_tags():
    rng = random.Random(0)
    bits = [
        *TAGS,
        "1:ab",
        "\\boxed{3}",
        " ",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(bits, k=rng.randint(0, 14)))
        assert format_score(text) == 0 or -2 <= format_score(text) <= -1.1


def is_canonical(text):
    """The grammar of a valid response as one pattern, for those without white space between tags: what the parser is compared with."""
    block = r"<guideline>((?:<plan>\d+:[^<>]+</plan>)+)</guideline>((?:<step>\d+:[^<>]+</step>)+)<takeaway>[^<>]+</takeaway>"
    if (
        not re.fullmatch(rf"(?:{block})+[^<>]*\\boxed\{{[^<>{{}}]*\}}[^<>]*", text)
        or text.count("\\boxed{") != 1
    ):
        return False
    numbers = [[re.findall(r"<\w+>(\d+):", part) for part in parts] for parts in re.findall(block, text)]
    return all(plans == steps == [str(i + 1) for i in range(len(plans))] for plans, steps in numbers)


def test_the_corpus_knows_its_valid_from_its_malformed():
    rng = random.Random(0)
    for _ in range(600):
        problem = stage0.draw_problem(rng.choice(stage0.KINDS), rng)
        rounds, answer = stage0.work_out(problem, rng, 0.05)
        good, bad = stage0.tagged_solution(rounds, answer), stage0.malformed_solution(rounds, answer, rng)
        assert format_score(good) == 0 and is_canonical(good)
        assert format_score(bad) < 0 and not is_canonical(bad)
        assert format_score(stage0.plain_solution(rounds, answer)) == -2


def test_dapo_advantage_by_hand():
    A = dapo_advantages([1, -1, -1, -1, 1, 1], [0, 0, 0, 0, 7, 7])
    # group 0: mean -0.5, population std sqrt(((1.5)^2 + 3 * 0.5^2) / 4) = 0.8660; group 7 has no spread
    torch.testing.assert_close(
        A, torch.tensor([1.7320, -0.5774, -0.5774, -0.5774, 0.0, 0.0]), atol=1e-4, rtol=0
    )


def test_dapo_loss_clips_by_hand():
    old = torch.zeros(2, 2)
    ratio = torch.tensor([[1.5, 1.1], [0.5, 0.9]])
    logprobs = ratio.log().requires_grad_()
    loss = dapo_loss(logprobs, old, torch.tensor([1.0, -2.0]), torch.ones(2, 2, dtype=torch.bool))
    # row 1: min(1.5, 1.28) + 1.1; row 2: min(-1.0, -1.6) + -1.8; mean over 4 tokens
    assert abs(loss.item() - -(1.28 + 1.1 - 1.6 - 1.8) / 4) < 1e-6
    loss.backward()
    assert logprobs.grad[0, 0] == 0 and logprobs.grad[1, 0] == 0  # beyond the clip: no gradient
    assert abs(logprobs.grad[0, 1].item() - -1.1 / 4) < 1e-6  # d ratio / d logprob = ratio


def test_dapo_loss_pulls_back_what_moved_the_wrong_way_however_far():
    """The minimum leaves the clip out where it would help: without it these tokens had no gradient."""
    logprobs = torch.tensor([[0.5], [1.5]]).log().requires_grad_()
    loss = dapo_loss(logprobs, torch.zeros(2, 1), torch.tensor([1.0, -1.0]), torch.ones(2, 1))
    # a good token at half its probability, and a bad one at one and a half: neither is clipped
    assert abs(loss.item() - -(0.5 - 1.5) / 2) < 1e-6
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.5], [1.5]]) / 2)


def test_dapo_loss_is_a_mean_over_tokens_not_over_responses():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    loss = dapo_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1.0, -1.0]), mask)
    assert abs(loss.item() - -(3 * 1.0 - 1 * 1.0) / 4) < 1e-6


@pytest.mark.parametrize("num_tokens, penalty", [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (150, -1.0)])
def test_soft_overlong_penalty(num_tokens, penalty):
    assert abs(overlong_penalty(num_tokens, 100, 20) - penalty) < 1e-9


def args_of(**changes):
    settings = dict(kind="sums", prompts=2, group_size=3, updates=2, max_rounds=2, seed=0, temperature=1.0)
    settings |= dict(max_new_tokens=200, overlong_buffer=40, eps_low=0.2, eps_high=0.28)
    return types.SimpleNamespace(**(settings | changes))


def judged(tokenizer, text, overlong_buffer=0):
    """A response to a question that 9 answers; with a buffer its length is all that is allowed."""
    ids = tokenizer.encode(text)
    rollout = Rollout(ids, None, [False] * len(ids), [-0.5] * len(ids), "stop", len(ids), 0)
    allowed = len(ids) if overlong_buffer else 9999
    args = args_of(max_new_tokens=allowed, overlong_buffer=overlong_buffer or 40)
    return stage1_zero.judge(stage0.Problem("sums", "q", "9"), [5], rollout, tokenizer, args)


def test_the_reward_is_the_format_s_until_that_is_perfect_and_then_the_answer_s(plain_tokenizer):
    assert judged(plain_tokenizer, GOOD).reward == 1.0
    assert judged(plain_tokenizer, GOOD.replace("boxed{9}", "boxed{8}")).reward == -1.0
    broken = judged(plain_tokenizer, GOOD.replace("<step>1:", "<step>2:"))
    assert (broken.reward, broken.valid, broken.right) == (VIOLATIONS["numbering"], False, True)


def test_all_tokens_learn_and_what_is_overlong_earns_less_than_its_reward(plain_tokenizer):
    short, long = judged(plain_tokenizer, GOOD), judged(plain_tokenizer, GOOD, overlong_buffer=20)
    assert (short.penalty, long.penalty, long.reward) == (0.0, -1.0, 1.0)
    batch, loss = stage1_zero.objective([[short, long]], args_of())
    torch.testing.assert_close(batch.advantages, dapo_advantages([1.0, 0.0], [0, 0]))
    assert batch.num_tokens == batch.num_learned == 2 * len(short.rollout.ids)
    assert all(actions.all() for actions in batch.actions)

    # a ratio of 2 is worth 1.28 where A = 1
    logprobs, A, mask = torch.tensor([[-1.0]]), torch.ones(1), torch.ones(1, 1, dtype=torch.bool)
    assert loss(logprobs, logprobs - 0.6931, A, mask, 1).item() == pytest.approx(-1.28)


def test_each_update_has_its_share_of_the_groups_and_none_is_empty():
    assert stage1_zero.shares_of(list("abcde"), args_of(updates=2)) == [["a", "c", "e"], ["b", "d"]]
    assert stage1_zero.shares_of(["a"], args_of(updates=4)) == [["a"]]


def test_a_group_that_is_all_alike_is_dropped_and_another_question_drawn(plain_tokenizer):
    """Alike to the penalty, too: of equal rewards an overlong one still teaches."""
    wrong = GOOD.replace("boxed{9}", "boxed{8}")
    draws = [[[wrong, wrong, wrong], [GOOD, "no block", wrong]], [[wrong, wrong, wrong + " 1" * 90]]]
    asked = []

    class Rigged(Engine):
        def generate(self, prompts, parallel, **_):
            assert not parallel
            asked.append(len(prompts))
            texts = draws[len(asked) - 1]
            ids = [[self.tokenizer.encode(text) for text in group] for group in texts]
            return [[Rollout(x, None, [], [], "stop", len(x), 0) for x in group] for group in ids]

    engine = Rigged(random_model(len(plain_tokenizer)), plain_tokenizer)
    args = args_of(max_new_tokens=len(plain_tokenizer.encode(wrong + " 1" * 90)), overlong_buffer=50)
    groups, sampled = stage1_zero.sample_groups(engine, None, stage0.FORMAT_PROMPT, 1, args)
    assert asked == [2, 1] and len(sampled) == 9
    assert [[j.text for j in group] for group in groups] == [draws[0][1], draws[1][0]]

    # no more rounds than asked for
    asked.clear()
    groups, sampled = stage1_zero.sample_groups(
        engine, None, stage0.FORMAT_PROMPT, 1, args_of(**vars(args) | {"max_rounds": 1})
    )
    assert asked == [2] and len(groups) == 1 and len(sampled) == 6


def test_a_plan_after_its_guideline_has_closed_belongs_to_no_block():
    """It was once added to the guideline that had closed, and the block seemed to have a plan too many."""
    text = r"<guideline><plan>1:A</plan></guideline><plan>2:B</plan><step>1:A7</step><takeaway>7</takeaway>\boxed{7}"
    response = parse_response(text)
    assert response.blocks == [(["A"], [], "")]  # and the steps behind it follow no guideline
    assert response.violations == ["overlapping tags", "block out of order", "counts differ"]


def hostile_texts(n=20_000):
    """Texts that a model could write to break a parser: very long, very deep, very many of one thing."""
    pieces = [
        *TAGS,
        "\\boxed{",
        "\\boxed{}",
        "{",
        "}",
        "1:",
        "9" * 50,
        " ",
        "\n",
        "<",
        "</",
        "&",
        "[",
        "(",
        "-",
        "\0",
        "\u0663:",
    ]
    texts = [piece * (n // len(piece)) for piece in pieces]
    texts += [
        "<plan>" + "0" * n,
        "<step>" + "9" * n + ":x</step>",
        "<guideline><plan>" + "1" * n + ":x</plan></guideline>",
    ]
    texts += ["\\boxed{" + opening * n for opening in "[({"]
    texts += ["\\boxed{" + "[" * n + "]" * n + "}", '\\boxed{{"House 1": ' + '{"a":' * n + "}" * n + "}"]
    rng = random.Random(0)
    texts += ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 300))) for _ in range(400)]
    return texts


def test_no_text_breaks_parser_or_judges_or_takes_them_long():
    problems = [
        stage0.Problem("sums", "q", "09"),
        stage0.Problem("countdown", "q", "3+4", {"numbers": [3, 4, 5], "target": 7}),
        stage0.Problem("countdown", "q", "none", {"numbers": [3, 4, 5], "target": 99}),
        stage0.Problem("grid", "q", '{"House 1": {"Name": "Ann"}}'),
        stage0.Problem("choice", "q", "B"),
    ]
    for text in hostile_texts():
        began = time.process_time()
        assert parse_response(text).violations
        assert not any(problem.verify(text) for problem in problems), text[:50]
        assert time.process_time() - began < 1.0, text[:50]


@pytest.mark.parametrize(
    "unit", ["<guideline>", "<step>1:", "<plan>", "</step>", "\\boxed{", "<", "0", "<step>1:x</step>"]
)
def test_the_parser_takes_linear_time(unit):
    def seconds(n):
        text = unit * (n // len(unit))
        began = time.process_time()
        parse_response(text)
        return time.process_time() - began

    seconds(10_000)
    few = min(seconds(50_000) for _ in range(3))
    many = min(seconds(400_000) for _ in range(3))
    assert many < 8 * 3 * max(few, 0.002)  # quadratic would be 64


def test_numbers_of_any_length_are_numbers():
    assert "numbering" in parse_response(f"<guideline><plan>{'1' * 5000}:A</plan></guideline>").violations
    assert not parse_response(GOOD.replace("<plan>1:", "<plan>001:")).violations


def test_the_plan_of_qwen3_4b_adds_up_as_by_hand(tmp_path, capsys, monkeypatch):
    """From config.json alone: there are no weights in that folder."""
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "rms_norm_eps": 1e-6}
    sizes |= {"model_type": "qwen3", "dtype": "bfloat16", "rope_theta": 1e6, "max_position_embeddings": 40960}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"tie_word_embeddings": True}))
    command = ["stage1", "--plan", "--init", str(tmp_path), "--recompute", "--lora", "32"]
    monkeypatch.setattr(sys, "argv", command)
    stage1_zero.main()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split("  ")[-1].strip() == "--lora 32, 8 GPUs"
    rows = {line[:38].strip(): [float(x) for x in line[38:].split()] for line in lines}
    assert all(len(row) == 4 for row in rows.values())

    # 4.02e9 parameters, 36 x 7 projections of them: in and out widths of each, times 32
    q, k, o, up = 2560 * 4096, 2560 * 1024, 4096 * 2560, 2560 * 9728
    inside = 36 * (q + 2 * k + o + 3 * up)
    adapters = 36 * 32 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))
    whole = inside + 151936 * 2560 + 36 * (2 * 2560 + 2 * 128) + 2560
    near = functools.partial(pytest.approx, abs=0.01)
    assert rows["weights"] == near([whole * 2e-9] * 4)
    assert rows["the base beside merged weights"] == near([0, 0, inside * 2e-9, inside * 2e-9])
    assert rows["masters or adapters, fp32"] == near([whole * 4e-9] * 2 + [adapters * 4e-9] * 2)
    assert rows["Adam's moments, fp32"] == near(
        [8e-9 * x for x in (whole, whole / 8, adapters, adapters / 8)]
    )
    for column in range(4):
        parts = [row[column] for row in rows.values()]
        assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=0.05)

    # the engine's own rule: a quarter of what is free beside the weights, 147,456 bytes a token
    for gpu, pool, weights in zip(
        rows["a GPU with at least"], rows["the engine's keys and values"], rows["weights"]
    ):
        assert pool == pytest.approx(min((gpu - weights) / 4, 2**18 * 147_456e-9), abs=0.02)
    assert not (tmp_path / "args.json").exists()

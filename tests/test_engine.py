"""The engine's invariants I1-I6 (D5): on scripted trees of every shape, and on random weights that emit tags at random."""

import random
import re

import numpy as np
import pytest
import torch
from conftest import ScriptedEngine, random_model, random_prompts, random_script, rescore, worst_gap
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3ForCausalLM

import engine as engine_module
import stage0_model as stage0
from engine import Engine, Layout, layout, tag_token_ids

SHAPES = [  # heads, kv heads, head_dim, tied
    (4, 2, 16, False),
    (4, 4, 8, True),
    (6, 1, 8, False),
]


def scripted_run(model, tokenizer, tag_ids, n, seed=0, kv_tokens=20_000, max_new_tokens=300, max_rows=256, **shape):
    rng = random.Random(seed)
    prompts = random_prompts(rng, n)
    scripts = {tuple(p): random_script(rng, tokenizer, tag_ids, **shape) for p in prompts}
    eng = ScriptedEngine(model, tokenizer, kv_tokens=kv_tokens, max_rows=max_rows)
    eng.script_of = lambda request: scripts[tuple(request.ids[: request.prompt_len])]
    rollouts = [r for [r] in eng.generate(prompts, max_new_tokens=max_new_tokens)]
    return eng, prompts, scripts, rollouts


class TagHappy(stage0.Qwen3):
    """A random model with a planted bigram: it emits tags and plan numbers at random, but often in a promising order."""

    def hidden(self, ids, layout=None, kv=None):
        return torch.cat([super().hidden(ids, layout, kv), self.bigram[ids]], dim=-1)

    def logits(self, x):
        C = self.config.hidden_size
        return super().logits(x[..., :C]) + x[..., C:]


def tag_happy_model(tokenizer, tag_ids, seed=0):
    model = random_model(len(tokenizer) + 5, seed=seed, std=0.1)
    model.__class__ = TagHappy
    model.bigram = torch.zeros(model.config.vocab_size, model.config.vocab_size)
    one, two, colon = tokenizer.encode("12:")
    end, t = tokenizer.eos_token_id, tag_ids
    model.bigram[:, list(t.values())] += 0.5
    model.bigram[:, [t["</plan>"], t["</step>"]]] += 3.0
    model.bigram[:, t["<guideline>"]] += 3.5
    for before, after in [
        ("<guideline>", [t["<plan>"]]), ("<plan>", [one, two]), (one, [colon]), (two, [colon]), ("</plan>", [t["<plan>"], t["</guideline>"]]),
        ("<takeaway>", [t["</takeaway>"]]), ("</takeaway>", [end, t["<guideline>"], 60]),
    ]:  # fmt: skip
        for token in after:
            model.bigram[t.get(before, before), token] += 8.0
    model.bigram[colon, [*t.values()]] = -6.0
    return model


@pytest.fixture(scope="module")
def tree_run(model, tokenizer, tag_ids):
    return scripted_run(model, tokenizer, tag_ids, 120)


def test_scripted_trees_really_fork_with_many_widths_and_blocks(tree_run):
    _, _, _, rollouts = tree_run
    assert {r.finish_reason for r in rollouts} >= {"stop", "length"}
    assert {r.num_forks for r in rollouts} >= {1, 2, 3, 4}
    assert {r.max_branches for r in rollouts} >= {1, 4, 8}


def test_a_rollout_holds_its_script_in_sequence_order(tree_run, tag_ids, tokenizer):
    _, prompts, scripts, rollouts = tree_run
    checked = 0
    for prompt, r in zip(prompts, rollouts):
        if r.finish_reason != "stop":
            continue
        script, expected, block = scripts[tuple(prompt)], [], 0
        for token in script[0, 0]:
            expected.append(token)
            if token == tag_ids["</guideline>"]:
                block += 1
                for branch in range(1, 9):
                    if (block, branch) in script:
                        expected += [tag_ids["<step>"], *tokenizer.encode(f"{branch}:"), *script[block, branch]]
                expected.append(tag_ids["<takeaway>"])
        assert r.ids == expected
        checked += 1
    assert checked > 30


def test_I1_teacher_forcing_gives_the_engines_logprobs(tree_run, model):
    _, prompts, _, rollouts = tree_run
    assert worst_gap(rollouts, rescore(model, prompts, rollouts)) < 1e-4


def test_I1_negative_control_a_shifted_position_or_a_visible_sibling_shows(tree_run, model):
    _, prompts, _, rollouts = tree_run
    pairs = [(p, r) for p, r in zip(prompts, rollouts) if r.max_branches > 1][:20]
    prompts, rollouts = zip(*pairs)
    shifted = [Layout(r.layout.group, r.layout.branch, r.layout.position + (r.layout.group > 0)) for r in rollouts]
    leaking = [Layout(r.layout.group, np.minimum(r.layout.branch, 1), r.layout.position) for r in rollouts]
    assert worst_gap(rollouts, rescore(model, prompts, rollouts, shifted)) > 1e-2
    assert worst_gap(rollouts, rescore(model, prompts, rollouts, leaking)) > 1e-2


def test_I2_layout_from_the_ids_is_the_layout_the_engine_used(tree_run, tag_ids):
    for r in tree_run[3]:
        again = layout(r.ids, tag_ids)
        for name in ("group", "branch", "position"):
            assert (getattr(again, name) == getattr(r.layout, name)).all()


@pytest.mark.parametrize("heads, kv_heads, head_dim, tied", SHAPES)
def test_I3_greedy_sequential_decoding_equals_transformers_generate(tmp_path, plain_tokenizer, heads, kv_heads, head_dim, tied):
    model = random_model(
        len(plain_tokenizer), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied
    )
    stage0.save(model, plain_tokenizer, tmp_path)
    hf = Qwen3ForCausalLM.from_pretrained(tmp_path)
    prompts = random_prompts(random.Random(1), 12)
    ours = Engine(model, plain_tokenizer).generate(prompts, parallel=False, temperature=0, max_new_tokens=40)
    for prompt, [r] in zip(prompts, ours):
        theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, len(prompt) :].tolist()
        assert r.ids == theirs
        assert r.critical_path == len(r.ids)


def test_I4_alone_in_a_batch_reordered_and_preempted_give_the_same_tokens(model, tokenizer, tag_ids):
    eng, prompts, scripts, together = scripted_run(model, tokenizer, tag_ids, 40)
    # leave every other script position to the model's own draw, so that random streams matter too
    loose = {p: {k: [t if i % 2 or t in tag_ids.values() else None for i, t in enumerate(v)] for k, v in s.items()} for p, s in scripts.items()}
    loose = {p: s | {(0, 0): scripts[p][0, 0]} for p, s in loose.items()}

    def run(prompts, kv_tokens, max_rows=256):
        e = ScriptedEngine(model, tokenizer, kv_tokens=kv_tokens, max_rows=max_rows)
        e.script_of = lambda request: loose[tuple(request.ids[: request.prompt_len])]
        return e, [r for [r] in e.generate(prompts, max_new_tokens=300)]

    _, batch = run(prompts, 40_000)
    _, backwards = run(prompts[::-1], 40_000)
    small, squeezed = run(prompts, 330 + 100)
    need = sum(len(p) + len(r.ids) for p, r in zip(prompts, batch))
    assert small.stats.preemptions > 0 and 430 < need / 4
    assert small.stats.peak_kv_tokens <= 430
    alone = [run([p], 400)[1][0] for p in prompts]
    for r, *others in zip(batch, alone, backwards[::-1], squeezed):
        for other in others:
            assert other.ids == r.ids and other.finish_reason == r.finish_reason
            np.testing.assert_allclose(other.logprobs, r.logprobs, atol=1e-5)


def test_I5_fork_moves_no_kv_and_join_prefills_nothing(model, tokenizer, tag_ids):
    eng, prompts, _, [r] = scripted_run(model, tokenizer, tag_ids, 1, seed=3, min_blocks=3)
    assert r.num_forks >= 3 and r.finish_reason == "stop"
    assert eng.stats.moved_kv_bytes == 0
    assert eng.stats.prefill_tokens == len(prompts[0])
    # every slot was written once: prompt and response, but for the very last token, which nobody needs to see
    assert eng.stats.peak_kv_tokens == len(prompts[0]) + len(r.ids) - 1
    # forced tokens ride along with their neighbours: a fork costs no step of its own, and neither does a join
    assert eng.stats.decode_steps <= r.critical_path - 1


def test_I6_all_slots_are_free_at_the_end_even_after_an_exception(model, tokenizer, tag_ids):
    eng, prompts, _, _ = scripted_run(model, tokenizer, tag_ids, 10)
    assert eng.kv_tokens_in_use == 0
    eng.script_of = lambda request: 1 / 0
    with pytest.raises(ZeroDivisionError):
        eng.generate(prompts, max_new_tokens=50)
    assert eng.kv_tokens_in_use == 0 and not eng.active and not eng.waiting
    eng.script_of = lambda request: {(0, 0): [tokenizer.eos_token_id]}
    assert [r.ids for [r] in eng.generate(prompts, max_new_tokens=5)] == [[tokenizer.eos_token_id]] * len(prompts)


@pytest.mark.parametrize("seed", range(3))
def test_random_weights_that_emit_tags_at_random_hold_every_invariant(tokenizer, tag_ids, seed):
    model = tag_happy_model(tokenizer, tag_ids, seed)
    rng = random.Random(seed)
    reasons, widths = set(), set()
    for _ in range(8):
        prompts, limit = random_prompts(rng, 60), rng.choice([5, 20, 40, 120])
        eng = Engine(model, tokenizer, kv_tokens=rng.randint(140, 3000), max_rows=rng.choice([1, 7, 64]))
        rollouts = [r for [r] in eng.generate(prompts, max_new_tokens=limit, seed=seed, max_branches=rng.randint(1, 8))]
        assert eng.kv_tokens_in_use == 0
        assert all(0 < len(r.ids) <= limit for r in rollouts)
        assert worst_gap(rollouts, rescore(model, prompts, rollouts)) < 1e-4
        for r in rollouts:
            assert len(r.ids) == len(r.layout) == len(r.forced) == len(r.logprobs)
            said_step = [i == tag_ids["<step>"] and g > 0 and not f for i, g, f in zip(r.ids, r.layout.group, r.forced)]
            if not any(said_step):  # the one case in which ids leave a doubt (D3): a step that itself says <step>
                again = layout(r.ids, tag_ids)
                assert (np.array([again.group, again.branch, again.position]) == [r.layout.group, r.layout.branch, r.layout.position]).all()
            reasons.add(r.finish_reason)
            widths.add(r.max_branches)
    assert reasons == {"stop", "length", "malformed"} and widths >= {0, 1}


@pytest.mark.parametrize(
    "text, error",
    [
        ("<guideline></guideline>", "0 plans"),
        ("<guideline><plan>1:a</plan><plan>3:b</plan></guideline>", "plan 2"),
        ("<guideline><plan>1:</plan></guideline>", "plan 1"),
        ("<guideline>so<plan>1:a</plan></guideline>", "text between plans"),
        ("<guideline><plan>1:a</plan><plan>2:a</plan><plan>3:a</plan></guideline>", "3 plans, allowed are 1 to 2"),
        ("<guideline><plan>1:a</guideline>", "</guideline> in state plan"),
        ("<step>", "<step> in state text"),
        ("<guideline><plan>1:a</plan><guideline>", "<guideline> in state guideline"),
    ],
)
def test_a_bad_guideline_is_malformed_before_anything_forks(model, tokenizer, text, error):
    eng = ScriptedEngine(model, tokenizer)
    eng.script_of = lambda request: {(0, 0): tokenizer.encode(text)}
    [[r]] = eng.generate([[50, 51]], max_new_tokens=60, max_branches=2)
    assert (r.finish_reason, r.num_forks) == ("malformed", 0)
    assert error in r.error
    assert tokenizer.decode(r.ids) == text


def test_a_guideline_that_leaves_no_budget_for_its_branches_is_malformed(model, tokenizer):
    eng = ScriptedEngine(model, tokenizer)
    text = "<guideline><plan>1:a</plan><plan>2:b</plan></guideline>"
    eng.script_of = lambda request: {(0, 0): tokenizer.encode(text)}
    [[r]] = eng.generate([[50, 51]], max_new_tokens=len(tokenizer.encode(text)) + 7)  # two openings of 3, and 2 to sample
    assert r.finish_reason == "malformed" and "budget" in r.error


@pytest.mark.parametrize("inside", ["<plan>", "<step>", "<takeaway>", "</guideline>", "<|im_end|>"])
def test_a_tag_or_end_of_turn_inside_a_step_is_malformed(model, tokenizer, inside):
    eng = ScriptedEngine(model, tokenizer)
    guideline = tokenizer.encode("<guideline><plan>1:a</plan><plan>2:b</plan></guideline>")
    eng.script_of = lambda r: {(0, 0): guideline, (1, 1): tokenizer.encode("ab" + inside), (1, 2): tokenizer.encode("abcd")}
    [[r]] = eng.generate([[50, 51]], max_new_tokens=60)
    assert r.finish_reason == "malformed" and r.num_forks == 1 and "inside step 1" in r.error


def test_sequential_mode_samples_tags_as_plain_tokens(model, tokenizer):
    eng = ScriptedEngine(model, tokenizer)
    eng.script_of = lambda request: {(0, 0): tokenizer.encode("</step><guideline>a</guideline><|im_end|>")}
    [[r]] = eng.generate([[50, 51]], parallel=False, max_new_tokens=60)
    assert r.finish_reason == "stop" and r.num_forks == 0 and not r.layout.group.any() and not any(r.forced)


def test_n_samples_of_a_prompt_prefill_it_once_and_differ(model, plain_tokenizer):
    eng = Engine(model, plain_tokenizer)
    prompt = list(range(50, 80))
    [rollouts] = eng.generate([prompt], n=6, parallel=False, max_new_tokens=10)
    assert eng.stats.prefill_tokens == 30 and eng.stats.shared_prompt_tokens == 5 * 29
    assert len({tuple(r.ids) for r in rollouts}) > 1
    assert worst_gap(rollouts, rescore(model, [prompt] * 6, rollouts)) < 1e-4


def test_top_k_and_top_p_keep_only_the_likeliest_tokens(model, plain_tokenizer):
    prompts = random_prompts(random.Random(2), 5)
    greedy = Engine(model, plain_tokenizer).generate(prompts, parallel=False, temperature=0, max_new_tokens=8)
    for limits in (dict(top_k=1), dict(top_p=1e-6)):
        drawn = Engine(model, plain_tokenizer).generate(prompts, parallel=False, max_new_tokens=8, **limits)
        assert [r.ids for [r] in drawn] == [r.ids for [r] in greedy]
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    eng = Engine(model, plain_tokenizer)
    eng.temperature, eng.top_p, eng.top_k, eng.penalty = 1.0, 0.7, 0, 1.0
    u = np.random.default_rng(0).random(4000, dtype=np.float32)
    eng.active = [engine_module.Request(0, 0, [], u, [], [], [], [], [], heads=list(range(4000)))]
    tokens, logprobs = eng.sample(logits)
    share = np.bincount(tokens, minlength=4) / 4000
    assert share[2:].sum() == 0 and abs(share[0] - 0.625) < 0.03  # 0.5 and 0.3 hold the top 0.7
    assert abs(logprobs[tokens.index(0)] - np.log(0.5)) < 1e-6  # reported before truncation


def test_repetition_penalty_acts_inside_steps_only_and_on_the_branchs_own_tokens(model, plain_tokenizer):
    eng = Engine(model, plain_tokenizer)
    eng.temperature, eng.top_p, eng.top_k, eng.penalty = 0, 1.0, 0, 2.0
    # arrival order: a prompt token 3, then branch 1 holds tokens 1 and 2, branch 2 holds token 0
    row = dict(ids=[3, 1, 0, 2], group=[0, 1, 1, 1], branch=[0, 1, 2, 1])
    logits = torch.tensor([[2.9, 3.0, 2.8, 2.7]])
    for head, expected in ((0, 1), (2, 1), (3, 0)):  # trunk: no penalty; branch 2: 0 is halved; branch 1: 1 and 2 are halved
        eng.active = [engine_module.Request(0, 1, row["ids"], None, row["group"], row["branch"], [], [], [], heads=[head])]
        [token], [logprob] = eng.sample(logits)
        assert token == expected
        assert abs(logprob - logits.log_softmax(-1)[0, token]) < 1e-6  # reported without the penalty


def test_a_request_beyond_the_kv_budget_is_refused_by_name(model, tokenizer):
    with pytest.raises(stage0.UserError, match="KV budget of 64"):
        Engine(model, tokenizer, kv_tokens=64).generate([list(range(50, 90))], max_new_tokens=30)


def test_parallel_mode_without_tag_tokens_is_refused(model, plain_tokenizer):
    with pytest.raises(stage0.UserError, match="stage 2"):
        Engine(model, plain_tokenizer).generate([[50]], parallel=True)


def test_picture_of_a_kv_row_forking_and_joining_is_what_the_engine_does(model, tokenizer, tag_ids):
    source = open(engine_module.__file__).read()
    rows = {name: cells.replace("|", " ").split() for name, cells in re.findall(r"^#     (slot|token|group|branch|position) +(.*)$", source, re.M)}
    script = {
        (0, 0): tokenizer.encode("<guideline><plan>1:a</plan><plan>2:b</plan></guideline>"),
        (1, 1): tokenizer.encode("x</step>"), (1, 2): tokenizer.encode("yz</step>"),
    }  # fmt: skip
    eng, feeds, kept = ScriptedEngine(model, tokenizer), [], []
    eng.script_of = lambda request: script
    aim = eng.memory.aim_decode

    def spy(row, slot, *rest):
        aim(row, slot, *rest)
        feeds.append(slot.tolist())
        kept[:] = eng.active

    eng.memory.aim_decode = spy
    eng.generate([[60]], max_new_tokens=30)
    [request], slots = kept, [int(s) for s in rows["slot"]]
    names = {tag_ids["</guideline>"]: "/g", tag_ids["<step>"]: "s", tag_ids["</step>"]: "/s", tag_ids["<takeaway>"]: "t"}
    assert [names.get(request.ids[s]) or tokenizer.decode([request.ids[s]]) for s in slots] == rows["token"]
    for name in ("group", "branch", "position"):
        assert [getattr(request, name)[s] for s in slots] == [int(x) for x in rows[name]]
    assert eng.memory.group[slots].tolist() == [int(x) for x in rows["group"]]
    assert eng.memory.branch[slots].tolist() == [int(x) for x in rows["branch"]]
    bars = re.search(r"^#     slot +(.*)$", source, re.M)[1].split("|")  # what stands between two bars is fed in one step
    assert [[int(x) for x in part.split()] for part in bars] == [[12], [13, 14, 15, 16, 17, 18], [19, 20], [21, 22], [23, 24]]
    assert [list(range(12, 19)), [19, 20], [21, 22], [23, 24]] == [f for f in feeds if f[0] >= 12][:4]

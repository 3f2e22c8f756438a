"""The page of traces: the data in it without a browser, and what a reader sees with one.

What needs a browser is slow, and skipped where there is none: it takes `pip install -r
requirements-extra.txt` and a chromium of the system's (`apt-get install chromium`).
"""

import json
import re

import numpy as np
import pytest
from conftest import ScriptedEngine

from engine import Layout, Rollout, trace, trace_page

# Two blocks: three branches of different lengths, then two, the first of them empty.
SCRIPT = {
    (0, 0): "<guideline><plan>1:8+7</plan><plan>2:8-7</plan><plan>3:8*7</plan></guideline>none</takeaway>"
    "<guideline><plan>1:9+7</plan><plan>2:9*7</plan></guideline>63+8=71</takeaway>\\boxed{71}<|im_end|>",
    (1, 1): "8+7=15;15-9=66/71n;n</step>",
    (1, 2): "8-7=1;n</step>",
    (1, 3): "8*7=56;56+9=65/71n56-9=47/71n;n</step>",
    (2, 1): "</step>",
    (2, 2): "9*7=63;63+8=71/71y</step>",
}
QUESTION = "7 8 9 make 71?"
PROMPT = [60, 61, 62, 63]


class Watched(ScriptedEngine):
    """Notes which tokens of a request each step of the engine brought: {index: [tokens after it, ..]}"""

    def step(self):
        before = {request.index: request for request in [*self.active, *self.waiting]}
        done = super().step()
        for index, request in before.items():
            self.requests[index] = request
            self.lengths.setdefault(index, [len(request.prompt)])
            if len(request.tokens) > self.lengths[index][-1]:
                self.lengths[index].append(len(request.tokens))
        return done


def decode(model, tokenizer, n=1, prompt=PROMPT, parallel=True, script=SCRIPT, **settings):
    """n scripted rollouts of a prompt; the engine keeps their requests."""
    eng = Watched(model, tokenizer, **settings)
    eng.requests = {}
    eng.lengths = {}
    eng.script_of = lambda request: {k: tokenizer.encode(v) for k, v in script.items()}
    [rollouts] = eng.generate([prompt], n=n, parallel=parallel, max_new_tokens=200, temperature=0.0)
    return eng, rollouts


@pytest.fixture(scope="module")
def rollout(model, tokenizer):
    return decode(model, tokenizer)[1][0]


# ======================================================================================================================
# 1. The data
# ======================================================================================================================


def test_the_step_of_a_token_is_the_engine_step_that_brought_it(model, tokenizer):
    # a memory for one and a half of them, so that some wait, and are preempted
    eng, rollouts = decode(model, tokenizer, n=4, kv_tokens=320)
    assert eng.stats.preemptions > 0
    for index, rollout in enumerate(rollouts):
        lengths = eng.lengths[index]
        arrived = [token for token in eng.requests[index].tokens if token.step]
        counted = [[token.step for token in arrived].count(s) for s in range(1, len(lengths))]
        assert counted == np.diff(lengths).tolist()
        assert sorted(rollout.steps) == [token.step for token in arrived]
        assert [token.step for token in eng.requests[index].tokens[: len(PROMPT)]] == [0] * len(PROMPT)


def test_a_branchs_tokens_have_consecutive_steps_and_siblings_share_them(rollout, tag_ids):
    block, branch = rollout.layout.block, rollout.layout.branch
    steps, forced = np.array(rollout.steps), np.array(rollout.forced)
    for b, width in ((1, 3), (2, 2)):
        fork = steps[max(i for i in np.flatnonzero(np.array(rollout.ids) == tag_ids["</guideline>"])
                         if i < np.flatnonzero(block == b)[0])]  # fmt: skip
        for k in range(1, width + 1):
            mine = (block == b) & (branch == k)
            assert set(steps[mine & forced]) == {fork}  # what a fork writes costs no step
            sampled = steps[mine & ~forced].tolist()
            assert sampled == list(range(fork + 1, fork + 1 + len(sampled)))

    # a join comes with the longest branch's end, and the trunk has a token in every step but those
    takeaways = np.flatnonzero(np.array(rollout.ids) == tag_ids["<takeaway>"])
    assert [steps[i] for i in takeaways] == [steps[block == b].max() for b in (1, 2)]
    trunk = steps[(block == 0) & ~forced].tolist()
    inside = {s for b in (1, 2) for s in steps[(block == b) & ~forced].tolist()}
    assert sorted([*trunk, *inside]) == list(range(1, steps.max() + 1))


def test_decoded_sequentially_a_token_is_a_step(model, plain_tokenizer, tokenizer):
    script = {(0, 0): SCRIPT[0, 0]}
    [rollout] = decode(model, tokenizer, parallel=False, script=script)[1]
    assert rollout.steps == list(range(1, len(rollout.ids) + 1))


def test_order_of_arrival_is_order_of_step_then_text(model, tokenizer):
    """The page sorts by step to find a token's slot; the engine's own list says whether that is right."""
    eng, [rollout] = decode(model, tokenizer)
    tokens = eng.requests[0].tokens
    order = np.argsort(rollout.steps, kind="stable")
    assert [rollout.ids[i] for i in order] == [token.id for token in tokens[len(PROMPT) :]]
    assert [rollout.layout.branch[i] for i in order] == [token.branch for token in tokens[len(PROMPT) :]]
    assert eng.runner.block[: len(tokens) - 1].tolist() == [token.block for token in tokens[:-1]]


def test_a_trace_has_an_entry_a_token_and_says_what_the_rollout_says(rollout, tokenizer):
    made = trace(tokenizer, rollout, PROMPT, QUESTION, "somebody", "right")
    n = len(rollout.ids)
    lists = ("block", "branch", "position", "text", "forced", "p", "step")
    assert [len(made[name]) for name in lists] == [n] * len(lists)
    assert made["text"] == [tokenizer.decode([i]) for i in rollout.ids]
    assert "".join(made["text"]) == tokenizer.decode(rollout.ids)
    assert made["step"] == rollout.steps and made["branch"] == rollout.layout.branch.tolist()
    assert (made["prompt"], made["verdict"], made["ended"]) == (len(PROMPT), "right", "stop")
    assert made["p"] == pytest.approx(np.exp(rollout.logprobs).tolist(), abs=1e-4)
    assert json.loads(json.dumps(made)) == made


def test_a_trace_of_a_malformed_rollout_says_what_was_wrong(tokenizer):
    bad = Rollout(
        [65], Layout(*np.zeros((3, 1), dtype=int)), [False], [-1.0], "malformed", 1, 0, 0, "no plan", [1]
    )
    assert trace(tokenizer, bad, PROMPT, "q", "b")["ended"] == "malformed: no plan"


def data_of(page):
    """The traces in a page, as the browser would read them."""
    [line] = re.findall(r"^const TRACES = (.*);$", page, re.M)
    return json.loads(line)


def test_model_text_cannot_leave_the_script_that_it_stands_in(rollout, tokenizer):
    nasty = "</script><img src=x onerror=alert(1)><!--<script>\u2028"
    made = trace(tokenizer, rollout, PROMPT, nasty, "b") | {"text": [nasty] * len(rollout.ids)}
    page, empty = trace_page([made]), trace_page([])
    assert data_of(page) == [made] and data_of(empty) == []
    for pattern in ("</", "<!--"):
        assert page.count(pattern) == empty.count(pattern)


def test_the_page_loads_nothing_else():
    page = trace_page([])
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<script [^>]*src|import\(|fetch\(", page)
    assert len(page.splitlines()) <= 500

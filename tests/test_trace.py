"""The page of traces: the data in it without a browser, and what a reader sees with one.

What needs a browser is slow, and skipped where there is none: it takes `pip install -r
requirements-extra.txt` and a chromium of the system's (`apt-get install chromium`).
"""

import json
import re
import sys

import numpy as np
import pytest
from conftest import ScriptedEngine, random_model

import engine as engine_module
import eval as judge
import stage0_model as stage0
from engine import Layout, Rollout, trace, trace_page, visible

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
        running = [self.book.requests[i] for i in self.active]
        before = {request.index: request for request in [*running, *self.waiting]}
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
        steps = eng.requests[index].tokens["step"].tolist()
        arrived = [step for step in steps if step]
        counted = [arrived.count(s) for s in range(1, len(lengths))]
        assert counted == np.diff(lengths).tolist()
        assert sorted(rollout.steps) == arrived
        assert steps[: len(PROMPT)] == [0] * len(PROMPT)


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
    assert [rollout.ids[i] for i in order] == tokens["id"][len(PROMPT) :].tolist()
    assert [rollout.layout.branch[i] for i in order] == tokens["branch"][len(PROMPT) :].tolist()
    assert eng.runner.block[: len(tokens) - 1].tolist() == tokens["block"][:-1].tolist()


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


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    stage0.save(random_model(len(tokenizer)), tokenizer, path)
    return str(path)


def test_engine_html_writes_a_page_of_the_one_rollout(checkpoint, tmp_path, monkeypatch):
    page = tmp_path / "new" / "page.html"
    flags = ["--init", checkpoint, "--html", page, "--max-new-tokens", 20, "--device", "cpu", QUESTION]
    monkeypatch.setattr(sys, "argv", ["engine.py", *map(str, flags)])
    engine_module.main()
    [made] = data_of(page.read_text("utf-8"))
    assert (made["question"], made["by"]) == (QUESTION, checkpoint) and len(made["text"]) <= 20


def test_all_checkpoints_of_an_evaluation_are_in_one_page(checkpoint, tmp_path, monkeypatch):
    flags = [
        f"{checkpoint}=format",
        checkpoint,
        "--n",
        3,
        "--timed",
        0,
        "--max-new-tokens",
        20,
        "--out",
        tmp_path,
    ]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags), "--device", "cpu"])
    judge.main()
    made = data_of((tmp_path / "trace.html").read_text("utf-8"))
    questions = [problem.question for problem in stage0.make_problems("all", "heldout", 3, 1234)]
    names = [f"{checkpoint} ({mode})" for mode in ("format", "parallel")]
    assert [(t["by"], t["question"]) for t in made] == [(name, q) for name in names for q in questions]
    for t in made:
        assert t["verdict"].startswith(("right", "wrong, ")) and t["prompt"] > 10
        assert t["block"] == [0] * len(t["block"]) or t["by"] == names[1]
        assert t["step"] == list(range(1, len(t["step"]) + 1)) or t["by"] == names[1]


# ======================================================================================================================
# 2. The page in a browser
# ======================================================================================================================


@pytest.fixture(scope="module")
def traces(model, tokenizer):
    """A parallel response, a sequential one to the same question, and one to a real question."""
    _, [parallel] = decode(model, tokenizer)
    _, [alone] = decode(
        model, tokenizer, parallel=False, script={(0, 0): "8+7=15;9*7=64 \\boxed{9}<|im_end|>"}
    )
    _, [real] = decode(model, tokenizer, script={(0, 0): "x+3=7 so 2+2=5 <b>&amp;</b>\n<|im_end|>"})
    markup = trace(tokenizer, real, PROMPT, "If x+3=7, what is x <img src=y>?", "stage0 (plain)")
    markup["text"][0] = "<u>x</u>"  # as one token
    return [
        trace(tokenizer, parallel, PROMPT, QUESTION, "stage3 (parallel)", "right"),
        trace(tokenizer, alone, PROMPT, QUESTION, "stage0 (plain)", "wrong, (9*7)+8 is right"),
        markup,
    ]


@pytest.fixture
def show(browser, traces, tmp_path):
    """Open the page; at the end nothing may have been complained about, or loaded."""
    trouble = []
    pages = []

    def show(wish="", width=1280, scheme="light", shown=traces):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        file = tmp_path / "trace.html"
        file.write_text(trace_page(shown), "utf-8")
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(file.as_uri()) or trouble.append(request.url)
        )
        page.goto(f"{file.as_uri()}#{wish}")
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert trouble == []


def tokens_with(page, where, name):
    """Indices of the tokens in a view that have a class."""
    return set(page.eval_on_selector_all(f"{where} button.{name}", "found => found.map(b => b.i)"))


@pytest.mark.slow
def test_the_page_opens_without_a_complaint_and_fits_every_width_and_scheme(show):
    page = show("step=40&token=30")
    colours = set()
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for tab in ("time", "masks", "kv"):
                page.click(f"#tab-{tab}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert page.locator("[role=tabpanel]:visible").evaluate_all(
                    "found => found.map(p => p.id)"
                ) == [tab]
    assert colours == {"rgb(255, 255, 255)", "rgb(18, 21, 24)"}
    assert "No traces" in show(shown=[]).inner_text("main")


@pytest.mark.slow
def test_play_advances_and_pauses_and_tokens_appear_with_their_step(show, traces):
    page = show("step=0")
    step = traces[0]["step"]
    n = len(step)
    assert tokens_with(page, "#lanes", "later") == set(range(n))
    page.click("#play")
    page.wait_for_function("step >= 5")
    assert page.inner_text("#play") == "Pause"
    page.keyboard.press("Space")  # on the button, which has the focus
    at = page.evaluate("step")
    page.wait_for_timeout(300)
    assert page.evaluate("step") == at and page.inner_text("#play") == "Play"

    # the slider, arrow keys, and whatever the step: exactly the tokens that it has brought
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("step") == at + 1
    page.keyboard.press("ArrowLeft")
    for s in (1, 20, 33, max(step), n):
        page.locator("#slider").fill(str(s))
        later = {i for i in range(n) if step[i] > s}
        assert tokens_with(page, "#lanes", "later") == tokens_with(page, "#slots", "later") == later
        assert page.inner_text("#status") == (
            f"step {s}: {n - len(later)} tokens in parallel, {min(s, n)} one at a time"
        )
    speedup = f"{n / max(step):.1f}"
    assert page.inner_text("#done") == (
        f"parallel done at step {max(step)}, sequential at step {n}: {speedup}×"
    )
    page.keyboard.press("Escape")
    page.keyboard.press("Space")  # from the end it starts over
    page.wait_for_function("timer && step < 10")


@pytest.mark.slow
def test_a_token_under_the_pointer_fades_what_visible_says(show, rollout):
    page = show()
    sees = visible(rollout.layout)
    n = len(rollout.ids)
    everything = page.evaluate("T.text.map((_, a) => T.text.map((_, b) => sees(a, b)))")
    assert np.array_equal(everything, sees)

    # by pointer and by key, in the lanes and in the KV row
    for i in (0, 31, 50, 70, n - 1):
        page.evaluate(f"laneTokens[{i}].scrollIntoView({{inline: 'center'}})")
        page.locator("#lanes button.token").nth(page.evaluate(
            f"[...document.querySelectorAll('#lanes button.token')].indexOf(laneTokens[{i}])")).hover()  # fmt: skip
        for view in ("#lanes", "#slots"):
            assert tokens_with(page, view, "blind") == set(np.flatnonzero(~sees[i]))
            assert tokens_with(page, view, "me") == {i}
    page.mouse.move(5, 5)
    assert tokens_with(page, "#lanes", "blind") == set()


@pytest.mark.slow
def test_arrow_keys_lead_from_token_to_token_and_say_what_each_is(show, rollout, traces):
    page = show()
    block, branch = rollout.layout.block, rollout.layout.branch
    page.locator("#tab-time").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("chosen") == 0
    first = int(np.flatnonzero((block == 1) & (branch == 2))[5])
    page.evaluate(f"laneTokens[{first}].focus()")
    said = page.inner_text("#detail")
    order = np.argsort(rollout.steps, kind="stable").tolist()
    slot = len(PROMPT) + order.index(first)
    for fact in ("block 1, branch 2", f"position {len(PROMPT) + rollout.layout.position[first]}", f"slot {slot}",
                 f"step {rollout.steps[first]}", f"probability {100 * traces[0]['p'][first]:.1f} %",
                 "blind to branch 1, 3"):  # fmt: skip
        assert fact in said
    for key, (b, by) in {"ArrowRight": (2, 1), "ArrowDown": (3, 0), "ArrowUp": (2, 0)}.items():
        was = rollout.steps[page.evaluate("chosen")]
        page.keyboard.press(key)
        now = page.evaluate("chosen")
        assert (branch[now], rollout.steps[now]) == (b, was + by)
    page.keyboard.press("Escape")
    assert page.evaluate("chosen") == -1 and tokens_with(page, "#lanes", "blind") == set()
    page.locator("#tab-time").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#masks").is_visible() and not page.locator("#time").is_visible()


@pytest.mark.slow
def test_slots_stand_in_the_order_in_which_the_engine_received_them(show, model, tokenizer):
    eng, _ = decode(model, tokenizer)
    page = show("tab=kv")
    received = eng.requests[0].tokens[len(PROMPT) :]
    shown = page.eval_on_selector_all(
        "#slots button", "found => found.map(b => [T.text[b.i], T.block[b.i], T.branch[b.i], T.slot[b.i]])"
    )
    assert shown == [
        [tokenizer.decode([id]), block, branch, slot]
        for slot, (id, block, branch, *_) in enumerate(received.tolist(), len(PROMPT))
    ]


@pytest.mark.slow
def test_the_mask_says_of_every_square_whether_it_is_seen(show, rollout):
    page = show("tab=masks")
    sees, n = visible(rollout.layout), len(rollout.ids)
    box = page.locator("#mask").bounding_box()
    for row, column in ((50, 31), (70, 31), (31, 50), (n - 1, 70), (40, 3), (60, 60)):
        x, y = page.evaluate(
            f"[LEFT + (at({column}) + at({column} + 1)) / 2, TOP + (at({row}) + at({row} + 1)) / 2]"
        )
        page.mouse.move(box["x"] + x, box["y"] + y)
        assert page.evaluate("[chosen, across]") == [row, column]
        said = page.inner_text("#detail")
        verb = "blind" if column < row else "before" if column > row else ""
        if row != column:
            assert (f"It sees {page.evaluate('T.text')[column]}" if sees[row, column] else verb) in said

    # the whole picture: a square has the colour of the band above its column if and only if it is seen
    page.mouse.move(5, 5)
    painted = page.evaluate("""() => {
        const {width, height} = $("mask"), pen = $("mask").getContext("2d");
        const pixels = new Uint32Array(pen.getImageData(0, 0, width, height).data.buffer);
        const middle = i => Math.floor((at(i) + at(i + 1)) / 2);
        const begin = b => T.pieces.find(piece => b < piece.to).from;
        const band = b => pixels[(TOP - 5) * width + LEFT + at(begin(b))];
        const square = (a, b) => pixels[(TOP + middle(a)) * width + LEFT + middle(b)];
        return T.text.map((_, a) => T.text.map((_, b) => square(a, b) === band(b)));
    }""")
    assert np.array_equal(painted, sees)


EQUATIONS = {
    # chains: the next number alone is claimed, modulo 100 where the problem says so
    ("A12+5=17*3=51;a51", 100): [],
    ("A12+5=18*3=54-60=94;a94", 100): ["12+5 is 17, not 18"],
    ("80+42=22", 100): [],
    ("80+42=22", 0): ["80+42 is 122, not 22"],
    ("80+42=23", 100): ["80+42 is 122 or 22, not 23"],
    ("180+42=322", 100): ["180+42 is 222 or 22, not 322"],
    # sums: whole sides
    ("A37*6=30*6+7*6=180+42=222;a22", 100): [],
    ("A37*6=30*6+7*6=190+42=232", 100): ["30*6+7*6 is 222 or 22, not 190+42"],
    ("A37*6=30*6+8*6=180+48=228", 100): ["37*6 is 222 or 22, not 30*6+8*6"],
    # running totals, countdowns, and spaces
    ("a51-b66=85+c20=06", 100): ["85+20 is 105 or 5, not 06"],
    ("14-9=5;5+3=8/15n5-3=3/15n5*3=15/15y;y(14-9)*3", 0): ["5-3 is 2, not 3"],
    ("12 + 5 = 18", 0): ["12+5 is 17, not 18"],
    ("d64f60 \\boxed{64} 3=4", 0): [],
}


@pytest.mark.slow
def test_false_equations_are_found_and_true_ones_are_not(show):
    page = show()
    for (text, modulus), messages in EQUATIONS.items():
        found = page.evaluate("([text, modulus]) => falseEquations(text, modulus)", [text, modulus])
        assert [error["message"] for error in found] == messages, text
        for error in found:
            assert text[error["from"] : error["to"]].replace(" ", "") == error["message"].split("not ")[1]


@pytest.mark.slow
def test_wrong_steps_are_marked_in_made_problems_alone(show):
    page = show()
    wrong = page.evaluate(
        "laneTokens.filter(b => b.matches('.wrong')).map(b => [T.branch[b.i], b.textContent])"
    )
    assert wrong == [[1, "6"], [1, "6"]]  # 15-9=66
    assert tokens_with(show("trace=2"), "#lanes", "wrong") == set()  # 2+2=5, but in words


@pytest.mark.slow
def test_every_trace_is_in_the_chooser_and_a_sequential_one_races_or_runs_alone(show, traces):
    page = show()
    assert page.locator("#questions option").all_inner_texts() == [QUESTION, traces[2]["question"]]
    assert page.locator("#by option").all_inner_texts() == ["stage3 (parallel)", "stage0 (plain)"]
    assert page.inner_text("#verdict") == "right"
    page.select_option("#rivals", index=1)  # against what the sequential one wrote
    m = len(traces[1]["text"])
    assert f"sequential at step {m}:" in page.inner_text("#done")
    page.select_option("#by", index=1)
    assert page.inner_text("#done") == f"done at step {m}" and not page.locator("#against").is_visible()
    assert page.inner_text("#verdict") == "wrong, (9*7)+8 is right"
    assert page.evaluate("T.step") == list(range(1, m + 1))
    page.select_option("#questions", index=1)
    assert page.inner_text("#question") == traces[2]["question"] and page.locator("img, u").count() == 0
    assert page.locator("#lanes button").first.inner_text() == "<u>x</u>"


@pytest.mark.slow
def test_axe_finds_nothing_serious(show):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install -r requirements-extra.txt"
    )
    page = show("step=40")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for tab in ("time", "masks", "kv"):
            page.click(f"#tab-{tab}")
            found = axe.Axe().run(page).response["violations"]
            bad = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
            assert bad == [], (scheme, tab)

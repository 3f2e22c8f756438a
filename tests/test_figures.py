"""The pictures and tables of README and docs, from what stages and judge have written."""

import json
import math
import re
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT, ScriptedEngine, random_model

import stage0_model as stage0
from stage1_zero import VIOLATIONS, parse_response

sys.path.insert(0, str(ROOT / "docs"))

import figures  # noqa: E402

# Two blocks, of three branches and of two, one of them longer than a line.
SCRIPT = {
    (0, 0): "<guideline><plan>1:A</plan><plan>2:C</plan><plan>3:E</plan></guideline>none</takeaway>"
    "<guideline><plan>1:A</plan><plan>2:C</plan></guideline>63+8=71</takeaway>\\boxed{71}<|im_end|>",
    (1, 1): "A8+7=15-9=06+8=14-3=11+9=20-4=16+2=18-9=09+5=14-6=08+7=15-9=06+8=14-3=11;a11</step>",
    (1, 2): "C8-7=01;c01</step>",
    (1, 3): "E8*7=56+9=65-9=56;e56</step>",
    (2, 1): "A5;a05</step>",
    (2, 2): "C9*7=63+8=71;c71</step>",
}
NAMES = tuple(figures.PICTURES)


def built_in(model, tokenizer, script):
    """What figures.built_in gives when the engine follows a script."""

    class Scripted(ScriptedEngine):
        def script_of(self, request):
            return {place: tokenizer.encode(text) for place, text in script.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "load", lambda path: (model, tokenizer))
        patch.setattr(figures, "Engine", Scripted)
        return figures.built_in("x/stage3")


@pytest.fixture(scope="module")
def decoded(model, tokenizer):
    """The built-in problem and the trace of a rollout, decoded once."""
    return built_in(model, tokenizer, SCRIPT)


@pytest.fixture
def scripted(decoded, monkeypatch):
    """The pictures of a rollout are drawn of this one."""
    monkeypatch.setattr(figures, "finished", lambda stage: ["x/stage3"])
    monkeypatch.setattr(figures, "built_in", lambda init: decoded)
    return decoded


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """The files that a small run leaves: four stages, two of another seed, twins."""
    path = tmp_path_factory.mktemp("run")
    rates = {"accuracy": 0.5, "valid": 0.8, "length": 200.0, "critical_path": 90.0}
    numbers = {"steps": 8, "batch_tokens": 4096, "slip": 0.06, "prompts": 4, "group_size": 12}
    for i, folder in enumerate(("stage0", "stage1", "stage2", "stage3", "seed1/stage1", "seed1/stage3")):
        (path / folder).mkdir(parents=True)
        more = rates if i in (1, 3, 4, 5) else {}
        rows = [{"step": s, "loss": 1.0 / s, "seconds": 40.0 * s, **more} for s in range(1, 9)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (path / folder / "log.jsonl").write_text("".join(lines[:4] + ['{"step": 4, "lo\n'] + lines[4:]))
        stage0.write_json(path / folder / "args.json", numbers)
        if i < 4:
            stage0.save(random_model(len(tokenizer)), tokenizer, path / folder)
    stage0.write_json(path / "stage2" / "rejection.json", {"accepted": 74, "truncated": 6})

    # eval.json of the four, and of the twins among the controls
    for folder, judged in (
        ("", [("stage0", "plain"), ("stage0", "format"), ("stage1", "format"), ("stage2", "parallel"),
              ("stage3", "parallel")]),
        ("evidence/controls", [("stage2_seq", "format"), ("stage3_seq", "format"), ("stage3", "parallel")]),
    ):  # fmt: skip
        results = [
            {
                "checkpoint": f"out/{stage}",
                "mode": mode,
                "accuracy": 0.4 + 0.1 * i,
                "accuracy ci95": 0.03,
                "valid": 0.9,
                "tokens": 200.0 + i,
                "critical path": 90.0 + i if mode == "parallel" else 200.0 + i,
            }
            for i, (stage, mode) in enumerate(judged)
        ]
        (path / folder).mkdir(parents=True, exist_ok=True)
        stage0.write_json(path / folder / "eval.json", {"args": {}, "checkpoints": results})
    return path


def draw(name, folder, out, monkeypatch):
    """Draw a picture by the command; returns its file."""
    monkeypatch.setattr(sys, "argv", ["figures.py", name, str(folder), "--out", str(out)])
    figures.main()
    return out / f"{name}.svg"


def texts(file):
    return ["".join(node.itertext()) for node in ElementTree.parse(file).iter() if node.tag.endswith("}text")]


# ======================================================================================================================
# 1. All pictures
# ======================================================================================================================


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_small_loads_nothing_and_has_a_colour_for_all_in_both_modes(
    name, run, scripted, tmp_path, monkeypatch
):
    file = draw(name, run, tmp_path, monkeypatch)
    text = file.read_text()
    assert file.stat().st_size <= 400_000
    assert not re.search(r"<script|javascript:|href|url\((?!#)|@import|on\w+=", text.replace("xmlns=", ""))

    # each class that paints has a rule, and each of its colours a value for light and for dark mode
    root = ElementTree.parse(file).getroot()
    classes = {name for node in root.iter() for name in node.get("class", "").split()}
    rules = set(re.findall(r"\.([\w-]+)\{", text)) | {"k"}  # k: with its element, g.k
    assert classes <= rules, classes - rules
    for colour in set(re.findall(r"var\(--(\w+)\)", text)):
        assert len(re.findall(rf"--{colour}:#", text)) == 2

    # and all stands inside the picture
    box = float(root.get("width")), float(root.get("height"))
    for node in root.iter():
        if node.get("x") and "clipPath" not in node.tag:
            assert -1 <= float(node.get("x")) <= box[0] and -1 <= float(node.get("y")) <= box[1]


def test_all_are_drawn_at_once(run, scripted, tmp_path, monkeypatch):
    draw("all", run, tmp_path, monkeypatch)
    assert {file.stem for file in tmp_path.iterdir()} == set(NAMES)


def test_a_picture_is_never_drawn_over_what_is_no_picture(tmp_path, monkeypatch):
    (tmp_path / "mask.svg").write_text("mine")
    with pytest.raises(stage0.UserError, match="is there and no picture"):
        draw("mask", tmp_path, tmp_path, monkeypatch)
    assert (tmp_path / "mask.svg").read_text() == "mine"
    for _ in range(2):  # but over an older picture
        draw("ladder", tmp_path, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["pipeline", "accuracy", "curves"])
def test_what_a_run_has_not_written_is_named(name, tmp_path, monkeypatch):
    with pytest.raises(stage0.UserError, match="(log.jsonl|eval.json): no"):
        draw(name, tmp_path, tmp_path, monkeypatch)


# ======================================================================================================================
# 2. One by one
# ======================================================================================================================


def test_the_mask_has_a_square_for_each_pair_and_is_blind_between_siblings(tmp_path, monkeypatch):
    root = ElementTree.parse(draw("mask", tmp_path, tmp_path, monkeypatch)).getroot()
    T = len(figures.EXAMPLE)
    own = [token.startswith("<step>") for token in figures.EXAMPLE]
    first, second = (i for i, begins in enumerate(own) if begins)
    join = figures.EXAMPLE.index("<takeaway>")
    rects = [node for node in root.iter() if node.get("width") in ("17", "18")]
    squares = [node for node in rects if node.get("height") == node.get("width") and node.get("rx") == "3"]
    blind = [node for node in squares if "bad-line" in node.get("class")]
    assert len(squares) == T * (T + 1) // 2 + 3  # three of them are the key
    assert len(blind) == (second - first) * (join - second) + 1


def test_every_rung_of_the_ladder_is_what_it_says(tmp_path, monkeypatch):
    assert set(figures.SPOILED) == set(VIOLATIONS)
    for name, (old, new) in figures.SPOILED.items():
        assert figures.PERFECT.count(old) == 1, name
        assert parse_response(figures.PERFECT.replace(old, new)).violations[0] == name
    rewards = [reward for reward, _, _ in figures.rungs()]
    assert rewards == sorted(rewards, reverse=True) and rewards[:2] == [1.0, -1.0]
    shown = texts(draw("ladder", tmp_path, tmp_path, monkeypatch))
    assert [text for text in shown if text in VIOLATIONS] == [name for _, name, _ in figures.rungs()[2:]]


def test_every_kind_of_problem_can_be_said_in_words():
    assert set(figures.IN_WORDS) == set(stage0.KINDS)
    for kind, words in figures.IN_WORDS.items():
        for problem in stage0.make_problems(kind, "heldout", 20, 0):
            said = words(problem.parts)
            assert said[0].isupper() and said.endswith((".", "?")) and not re.search(r"[*{}_]|  ", said)
    parts = {"labels": ["A", "C"], "chains": [(12, [("+", 5), ("*", 3)]), (40, [("-", 7), ("*", 2)])]}
    assert figures.chains_in_words(parts | {"goal": "largest"}) == (
        "Two numbers, A and C, each go through 2 operations, and only the last two digits count. "
        "A starts at 12: add 5, times 3. The others likewise. What is the largest of the two results?"
    )
    assert figures.sums_in_words(parts) == (
        "Two amounts, A and C, are worked out from left to right: A is 12, add 5, times 3. The others "
        "likewise. What are the last two digits of their total?"
    )


def key_frames(text, name):
    """[(percent, declarations), ..] of an animation."""
    frames = re.search(rf"@keyframes {name}\{{((?:[^{{}}]+\{{[^{{}}]*\}})*)\}}", text)[1]
    return [(float(at), rule) for at, rule in re.findall(r"([\d.]+)%(?:,to)?\{([^}]*)\}", frames)]


def test_a_token_of_the_hero_is_uncovered_at_its_engine_step(scripted, tmp_path, monkeypatch):
    problem, data = scripted
    text = draw("hero", tmp_path, tmp_path, monkeypatch).read_text()
    lines = figures.broken_lines(data, 452, 11.5)
    steps = data["step"], range(1, len(data["text"]) + 1)

    # the bars grow from step 0 to the last one of each: that is the clock
    for panel, times in zip("ab", steps):
        (_, _), (begin, _), (end, _) = key_frames(text, f"r{panel}")
        for number, (_, pieces) in enumerate(lines):
            frames = [(at, rule) for at, rule in key_frames(text, f"{panel}{number}") if "translate" in rule][
                1:
            ]
            for at, rule in frames:
                edge = float(re.search(r"translate\(([\d.]+)px", rule)[1])
                step = (at - begin) / (end - begin) * max(times)
                uncovered = [token for x, wide, _, _, token in pieces if x + wide <= edge + 0.1]
                assert abs(step - times[uncovered[-1]]) < 0.05
            assert len(uncovered) == len(pieces)
    assert max(data["step"]) < len(data["text"])


def test_the_hero_asks_in_words_and_in_notation_and_says_what_came_of_it(scripted, tmp_path, monkeypatch):
    problem, data = scripted
    shown = texts(draw("hero", tmp_path, tmp_path, monkeypatch))
    words = figures.IN_WORDS[problem.kind](problem.parts)
    assert words in " ".join(shown) and problem.question in " ".join(shown)
    assert f"{data['verdict']} after {max(data['step'])} steps" in shown
    assert f"{data['verdict']} after {len(data['text'])} steps" in shown


def test_the_lines_of_a_rollout_lose_nothing_and_are_no_wider_than_allowed(scripted):
    _, data = scripted
    lines = figures.broken_lines(data, 300, 11.5)
    assert [piece[4] for _, pieces in lines for piece in pieces] == list(range(len(data["text"])))
    assert all(x + wide <= 300 for _, pieces in lines for x, wide, *_ in pieces)
    for branch, pieces in lines:
        assert {data["branch"][piece[4]] for piece in pieces} == {branch}
        assert branch or not pieces[0][2].startswith("</")  # no plan is cut off from its closing tag


def test_a_rollout_that_does_not_fork_is_no_hero(model, tokenizer):
    with pytest.raises(stage0.UserError, match="x/stage3: the built-in question has no parallel answer"):
        built_in(model, tokenizer, {(0, 0): "\\boxed{71}<|im_end|>"})


def test_the_film_of_the_kv_row_shows_the_fork_in_order_of_arrival(scripted, tmp_path, monkeypatch):
    _, data = scripted
    shown = texts(draw("kv", tmp_path, tmp_path, monkeypatch))
    start = shown.index("step", shown.index("Around the fork, slot by slot")) + 1
    # two lines of explanation follow; of a column: token, slot, branch, position, step
    columns = [shown[i : i + 5] for i in range(start, len(shown) - 2, 5)]
    tokens = [column[0] for column in columns]
    fork = tokens.index("/g")
    assert tokens[fork : fork + 12] == ["/g", *"s1:s2:s3:", "A", "C"]
    slots = [int(column[1]) for column in columns]
    assert slots == list(range(slots[0], slots[0] + len(slots)))
    forced = columns[fork + 1 : fork + 10]
    assert [column[2] for column in forced] == [*"111222333"] and len({column[4] for column in forced}) == 1
    assert [int(column[3]) - int(columns[fork][3]) for column in forced] == 3 * [1, 2, 3]


def test_the_pipeline_says_what_each_stage_took_and_reached(run, tmp_path, monkeypatch):
    shown = texts(draw("pipeline", run, tmp_path, monkeypatch))
    assert [text for text in shown if text.endswith(" %")] == ["50.0 %", "60.0 %", "70.0 %", "80.0 %"]
    assert shown.count("5 min") == 4  # 8 steps of 40 seconds
    assert "74 of 80 own samples, right and valid" in " ".join(shown)


def test_seconds_of_a_run_that_was_killed_are_of_all_its_parts():
    assert figures.seconds_of([{"seconds": s} for s in (10.0, 20.0, 5.0, 8.0)]) == 28.0


def test_a_checkpoint_stands_where_its_accuracy_and_its_path_are(run, tmp_path, monkeypatch):
    file = draw("accuracy", run, tmp_path, monkeypatch)
    dots = [node for node in ElementTree.parse(file).iter() if node.tag.endswith("circle")][::2]
    places = {}
    for node, (name, _) in zip(dots, figures.SHOWN_AS.items()):
        places[name] = float(node.get("cx")), float(node.get("cy"))
    assert len(dots) == len(figures.SHOWN_AS)  # the four in five ways, and both twins

    # by the grid's own labels: 40 % and 80 % are twice as far apart as 40 % and 60 %
    right = [places[name][1] for name in ("stage0, plain", "stage0, format", "stage1", "stage2", "stage3")]
    gaps = [above - below for above, below in zip(right, right[1:])]
    assert all(math.isclose(gap, gaps[0], abs_tol=0.2) and gap > 0 for gap in gaps)
    assert places["stage2"][0] < places["stage3"][0] < places["stage0, plain"][0] < places["stage1"][0]
    assert texts(file).count("stage 3, NPR, 80.0 %") == 1  # not once more from the twins' table


def test_curves_have_names_a_legend_and_the_base_dotted(run, tmp_path, monkeypatch, capsys):
    file = draw("curves", run, tmp_path, monkeypatch)
    shown = texts(file)
    for words in ("step", "nats a token", "share of samples", "tokens", "accuracy", "valid", "critical path"):
        assert words in shown
    assert shown.count("accuracy of the base") == 2 and "1 other seeds" in shown[-1]
    dotted = [node for node in ElementTree.parse(file).iter() if node.get("stroke-dasharray") == "2 4"]
    assert len(dotted) == 4  # two lines and their keys
    assert "line 5 is damaged and left out" in capsys.readouterr().err


def test_ticks_are_round_and_span_the_values():
    assert figures.ticks(0, 310) == [0, 100, 200, 300, 400]
    assert figures.ticks(0.52, 0.9, 5) == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


def test_a_running_mean_is_over_the_steps_around():
    log = [{"x": value} for value in (0.0, 0.0, 10.0, 0.0, 0.0, 0.0)]
    assert figures.smooth(log, "x") == pytest.approx([10 / 3, 2.5, 2.0, 2.0, 2.5, 0.0])


# ======================================================================================================================
# 3. The table over seeds
# ======================================================================================================================


def test_a_summary_is_the_mean_over_seeds_and_their_range(tmp_path):
    zeros = dict.fromkeys(("valid", "parallel", "plans", "tokens", "critical path"), 0.0)
    gain = {"a": [0.1, 0.02], "b": [-0.05, 0.02]}  # a paired difference and half of its interval
    for seed, accuracy in (("a", 0.5), ("b", 0.8)):
        (tmp_path / seed).mkdir()
        result = zeros | {
            "accuracy": accuracy,
            "tokens/path": 2 * accuracy,
            "kinds": {"sums": {"accuracy": accuracy / 2}},
        }
        result |= {"checkpoint": f"out/{seed}/stage3", "mode": "parallel", "minus row above": gain[seed]}
        (tmp_path / seed / "eval.json").write_text(json.dumps({"checkpoints": [result]}))
    head, _, row = figures.summarise([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert row.split()[:5] == ["stage3", "parallel", "2", "65.0", "(50.0-80.0)"]
    assert (
        "1.30 (1.00-1.60)" in row
        and "+2.5 (-5.0 to +10.0)" in row
        and row.endswith("32.5 (25.0-40.0)")
        and head.endswith("sums acc %")
    )
    with pytest.raises(stage0.UserError, match="eval.json: no judgements"):
        figures.summarise([tmp_path])


def test_the_summary_is_printed(tmp_path, monkeypatch, capsys):
    keys = (*figures.PERCENT, *figures.NUMBERS)
    result = dict.fromkeys(keys, 0.5) | {
        "checkpoint": "out/stage1",
        "mode": "format",
        "minus row above": None,
        "kinds": {},
    }
    (tmp_path / "eval.json").write_text(json.dumps({"checkpoints": [result]}))
    monkeypatch.setattr(sys, "argv", ["figures.py", "summary", str(tmp_path)])
    figures.main()
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[:4] == ["stage1", "format", "1", "50.0"] and last[-1] == "-"  # no row above it, no gain


# ======================================================================================================================
# 4. In a browser
# ======================================================================================================================


@pytest.mark.slow
def test_in_a_browser_the_heros_covers_move_as_its_tokens_come(browser, scripted, tmp_path, monkeypatch):
    _, data = scripted
    file = draw("hero", tmp_path, tmp_path, monkeypatch)
    page = browser.new_page()
    page.goto(file.as_uri())
    lines = figures.broken_lines(data, 452, 11.5)
    tokens = len(data["text"])
    whole = 1000 * page.evaluate(
        "parseFloat(getComputedStyle(document.querySelector('#a0')).animationDuration)"
    )
    (_, _), (begin, _), (end, _) = key_frames(file.read_text(), "rb")
    for step in (0, 7, max(data["step"]), tokens):
        moment = whole / 100 * (begin + (end - begin) * (step + 0.5) / tokens)
        page.evaluate("t => document.getAnimations().forEach(a => { a.pause(); a.currentTime = t })", moment)
        for panel, times in (("a", data["step"]), ("b", range(1, tokens + 1))):
            for number, (_, pieces) in enumerate(lines):
                edge, seen = page.evaluate(
                    "id => { const s = getComputedStyle(document.getElementById(id));"
                    " return [new DOMMatrix(s.transform).e, +s.opacity] }",
                    f"{panel}{number}",
                )
                there = [x + wide for x, wide, _, _, token in pieces if times[token] <= step]
                if len(there) < len(pieces):
                    assert seen == 1 and abs(edge - max(there, default=-8)) < 0.1
    page.close()


@pytest.mark.slow
def test_whoever_wants_no_motion_sees_the_heros_end(browser, scripted, tmp_path, monkeypatch):
    page = browser.new_page(reduced_motion="reduce")
    page.goto(draw("hero", tmp_path, tmp_path, monkeypatch).as_uri())
    assert page.evaluate("document.getAnimations().length") == 0
    hidden = "[...document.querySelectorAll('g.k')].every(g => getComputedStyle(g).opacity === '0')"
    assert page.evaluate(hidden)
    page.close()


@pytest.mark.parametrize("name", ["mask", "ladder", "hero", "kv"])
def test_the_committed_picture_is_what_the_shipped_checkpoint_draws_today(name, tmp_path, monkeypatch):
    shipped = ROOT / "assets/npr-tiny/stage3"
    words = ["figures.py", name, "--init", str(shipped), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    figures.main()
    assert (tmp_path / f"{name}.svg").read_text() == (ROOT / f"assets/figures/{name}.svg").read_text()

"""The annotated pages say what the files say; metrics.md knows every number; exercises can be done.

What needs a browser is slow, and skipped where there is none, as in tests/test_trace.py.
"""

import ast
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import test_layout
import test_papo
import test_zero
import torch
from conftest import ROOT
from test_house import ORDER, read

import engine
import eval as judge
import stage1_zero
import stage3_papo

sys.path.insert(0, str(ROOT / "docs"))

import annotate  # noqa: E402
import exercise  # noqa: E402
from prose import EQUATION, prose, typeset  # noqa: E402

# ======================================================================================================================
# 1. The annotated pages
# ======================================================================================================================


class Page(HTMLParser):
    """A page's ids, its links, and its texts, each with the elements that it stands in."""

    VOID = ("meta", "br", "input", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open = []  # (tag, attributes)
        self.ids = []
        self.links = []
        self.texts = []  # (names of the open tags and their classes, attributes of the innermost code, text)
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.VOID:
            self.open.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        around = {
            name for tag, attributes in self.open for name in (tag, *attributes.get("class", "").split())
        }
        code = next((a for tag, a in reversed(self.open) if "data-n" in a), {})
        self.texts.append((around, code, text))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages, made once: {name: text}."""
    folder = tmp_path_factory.mktemp("site")
    trace = folder / "trace.html"
    trace.write_text(engine.trace_page([{"question": "<header>"}]), "utf-8")
    command = [sys.executable, "docs/annotate.py", "--trace", trace, "--out", folder / "new" / "site"]
    subprocess.run(command, cwd=ROOT, check=True)
    return {path.name: path.read_text("utf-8") for path in (folder / "new" / "site").iterdir()}


def page_of(name):
    return name.replace(".py", ".html")


@pytest.mark.parametrize("name", ORDER)
def test_every_line_of_code_is_in_its_page_once_and_in_order(site, name):
    source = read(name)
    alone = {n for n in source.comments if source.lines[n - 1].lstrip().startswith("#")}
    code = [
        (n, line)
        for n, line in enumerate(source.lines, 1)
        if line and n not in alone and n not in source.docstrings
    ]
    shown = {}
    for _, attributes, text in Page(site[page_of(name)]).texts:
        if attributes:
            number = int(attributes["data-n"])
            shown[number] = shown.get(number, "") + text
    assert list(shown) == sorted(shown)
    assert [(n, line) for n, line in shown.items() if line] == code


@pytest.mark.parametrize("name", ORDER)
def test_every_word_of_comments_and_docstrings_is_in_its_page_in_order(site, name):
    source = read(name)
    said = []
    docstrings = {}
    for node in source.nodes(ast.Module, ast.ClassDef, ast.FunctionDef):
        if ast.get_docstring(node):
            docstrings[node.body[0].lineno] = ast.get_docstring(node)
    for n, line in enumerate(source.lines, 1):
        if n in docstrings:
            said.append(docstrings[n])
        elif line.lstrip().startswith("#") and n not in source.docstrings and "fmt:" not in line:
            said.append(line.lstrip("# "))

    # equations change their letters, and have a test of their own; headings name functions, too
    shown = [
        text
        for around, attributes, text in Page(site[page_of(name)]).texts
        if around & {"prose", "header"}
        and not around & {"math", "contents"}
        and not ("code" in around and around & {"h3", "h4"})
        and text not in ("In this chapter", "Arguments")
    ]
    text = EQUATION.sub(lambda m: m[0] if not re.search("[-+/*(]", m[0]) else " ", "\n".join(said))
    assert re.findall(r"\w+", " ".join(shown)) == re.findall(r"\w+", text)


def test_every_link_leads_somewhere_and_ids_are_unique(site):
    assert set(site) == {"index.html", "trace.html", *map(page_of, ORDER)}
    pages = {name: Page(text) for name, text in site.items() if name != "trace.html"}
    followed = 0
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), name
        for link in page.links:
            if link.startswith("https://arxiv.org/abs/"):
                continue
            target, _, anchor = link.partition("#")
            assert target in site and (not anchor or anchor in pages[target].ids), (name, link)
            followed += bool(anchor)
    assert followed > 500


def test_pages_load_nothing(site):
    for name, text in site.items():
        if name != "trace.html":  # tests/test_trace.py watches that one
            assert not re.search(r"<script|<link|<img|<iframe|\bsrc=|@import|url\(", text), name


def test_a_name_leads_to_its_definition_where_it_is_called_or_imported_but_a_parameter_does_not(site):
    assert '<a href="stage0_model.html#visible_mask">visible_mask</a>(' in site["engine.html"]
    assert '<a href="engine.html#Engine">Engine</a>(model' in site["stage3_papo.html"]
    assert '<a href="engine.html#layout">layout</a>(ids, tag_ids)' in site["stage2_beta.html"]
    assert (
        '<code><a href="stage0_model.html#visible_mask">visible_mask</a></code>' in site["stage0_model.html"]
    )
    assert "hidden</i>(self, ids, layout=" in site["stage0_model.html"]
    assert ">layout</a>.block" not in site["engine.html"]


def test_the_trace_page_is_the_first_chapter_with_its_traces_and_a_way_back(site):
    text = site["trace.html"]
    assert text.count('<nav class="pages"') == 1 and 'href="index.html"' in text
    assert '"question":"<header>"' in text
    chapters = re.findall(r'<h2><a href="(\w+\.html)">', site["index.html"])
    assert chapters == ["trace.html", *map(page_of, ORDER)]


def test_without_traces_the_first_chapter_says_how_to_get_some(tmp_path, monkeypatch, capsys):
    flags = ["--trace", tmp_path / "none.html", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["annotate.py", *map(str, flags)])
    annotate.main()
    assert "none.html: no such file" in capsys.readouterr().out
    assert "No traces" in (tmp_path / "trace.html").read_text("utf-8")


def test_prose_keeps_pictures_sets_off_equations_and_marks_code():
    text = """\
        Words `layout` and *more*,
        A_i = (R_i - mean_G) / (std_G + eps), said of --gain-factor.

        1. one
           goes on
        2. two

        ids   [1 2]
        block [0  1]

        [1, 2] -> 3
        """
    text = "\n".join(line.removeprefix(" " * 8) for line in text.split("\n"))
    made = prose(text, {"layout": "engine.html#layout"})
    assert '<code><a href="engine.html#layout">layout</a></code> and <em>more</em>,</p>' in made
    assert re.search(
        r"</p><div class=\"equation\" tabindex=\"0\"><math.*</math></div><p class=\"\">said of", made
    )
    assert '<p class="item">1. one\n   goes on</p><p class="item">2. two</p>' in made
    assert '<pre class="picture" tabindex="0">ids   [1 2]\nblock [0  1]</pre>' in made
    assert '<pre class="example" tabindex="0">[1, 2] -&gt; 3</pre>' in made


def plain(node):
    """MathML as text, with brackets around what a fraction has above and below."""
    inside = [plain(child) for child in node]
    if node.tag == "mfrac":
        return "({})/({})".format(*inside)
    if node.tag in ("msub", "munder"):
        return "{}_{}".format(*inside)
    return (node.text or "") + "".join(inside)


@pytest.mark.parametrize(
    "equation, meant",
    [
        ("A_i = (R_i - mean_G) / (std_G + eps),", "A_i=(R_i−mean_G)/(std_G+ε),"),
        ("r_it = pi(y_it) / pi_old(y_it):", "r_it=(π(y_it))/(π_old(y_it)):"),
        ("L = -(1/N) sum_t log p(x_t | x_<t).", "L=−(1)/(N)∑_tlog\u2009p(x_t|x_<t)."),
        (
            "L = -(1 / sum_i |y_i|) sum_t [pi(y_it) / f(y_it)] A_i",
            "L=−(1)/(∑_i|y_i|)∑_t(π(y_it))/(f(y_it))A_i",
        ),
        ("R = F if F < 0 else +1 / -1.", "R=F\u2002if\u2002F<0\u2002else\u2002+1/−1."),
        ("L = -(1 / num_tokens) sum_t x_t", "L=−(1)/(num_tokens)∑_tx_t"),
        ("L = min(r A, clip(r, 1 - 0.2) A)", "L=min(rA,clip(r,1−0.2)A)"),
    ],
)
def test_equations_are_typeset_as_meant(equation, meant):
    assert EQUATION.fullmatch(equation)
    assert plain(ElementTree.fromstring(typeset(equation))) == meant


@pytest.mark.slow
def test_pages_open_without_a_complaint_fit_a_phone_and_axe_finds_nothing_serious(browser, site, tmp_path):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="requirements-extra.txt")
    trouble = []
    for name, text in site.items():
        (tmp_path / name).write_text(text, "utf-8")
    for name in ("index.html", "stage1_zero.html", "engine.html"):
        page = browser.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("request", lambda request: request.url.startswith("file:") or trouble.append(request.url))
        page.goto((tmp_path / name).as_uri())
        for width, scheme in ((390, "dark"), (1440, "light"), (1440, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            # a few colours serve all lines, and engine.py has too many of them to look at each
            if name != "engine.html":
                found = axe.Axe().run(page).response["violations"]
                bad = [
                    (v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")
                ]
                assert bad == [], (name, scheme)

        # prose beside its code where there is room, above it where there is not
        if name == "stage1_zero.html":
            places = "['.prose', '.code'].map(c => document.querySelectorAll('.row ' + c)[3].getBoundingClientRect())"
            prose_box, code_box = page.evaluate(f"{places}.map(r => [r.left, r.top, r.right])")
            assert prose_box[2] <= code_box[0] and abs(prose_box[1] - code_box[1]) < 5
            page.set_viewport_size({"width": 390, "height": 900})
            prose_box, code_box = page.evaluate(f"{places}.map(r => [r.left, r.top, r.right])")
            assert code_box[1] > prose_box[1] and code_box[0] < 30
        page.close()
    assert trouble == []


# ======================================================================================================================
# 2. docs/metrics.md
# ======================================================================================================================

METRICS = (ROOT / "docs" / "metrics.md").read_text("utf-8")


def tables(text):
    """Every table of a page, as rows of {heading: cell}."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        lines = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.strip().split("\n")
        ]
        found.append([dict(zip(lines[0], cells)) for cells in lines[2:]])
    return found


def first_cells():
    return {
        name.strip(" `")
        for table in tables(METRICS)
        for row in table
        for name in next(iter(row.values())).split(",")
    }


@pytest.fixture(scope="module")
def example():
    """The worked example: rows as the judge keeps them, problem by problem."""
    [responses] = [table for table in tables(METRICS) if "response" in table[0]]
    names = {"path": "critical_path", "single": "single_plan_blocks"}
    names |= {"copied": "copied_steps", "empty": "empty_steps"}
    judged = {}
    for row in responses:
        numbers = {names.get(key, key): int(value) for key, value in row.items() if key != "response"}
        numbers |= {"response": row["response"], "answer_in_plan": False, "parts": 2, "kind": "chains"}
        judged.setdefault(numbers["problem"], []).append(numbers)
    return list(judged.values())


def test_the_worked_example_of_the_metrics_is_what_the_judge_measures(example):
    [by_hand] = [table for table in tables(METRICS) if "by hand" in table[0]]
    measured = judge.measure(example)
    assert len(by_hand) > 10
    for row in by_hand:
        assert measured[row["metric"]] == pytest.approx(float(row["is"]), abs=5e-3), row


def test_every_column_of_the_judge_is_in_the_metrics(example):
    measured = judge.measure(example)
    result = {
        "checkpoint": "out/stage3",
        "mode": "parallel",
        **measured,
        "kinds": {"chains": measured | {"greedy": 1.0}},
    }
    result |= {
        "greedy": 1.0,
        "greedy ci95": 0.0,
        "tokens/s": 1.0,
        "logprob gap": 0.0,
        "seconds to answer": 1.0,
    }
    result |= {"minus row above": [0.1, 0.1], "minus first row": [0.1, 0.1]}
    columns = {*judge.main_row(result, k=2), *judge.kinds_row(result), *judge.collapse_row(result)}
    assert len(columns) > 20 and columns - first_cells() == set()

    # a benchmark's are written where they are printed, one of them with the number of samples in it
    source = ast.parse((ROOT / "eval.py").read_text("utf-8"))
    [function] = [node for node in source.body if getattr(node, "name", "") == "run_benches"]
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    [table] = [node.value for node in assigned if ast.unparse(node.targets[0]) == "columns"]
    columns = {re.sub(r"{.*?}", "k", ast.unparse(key).strip("f'")) for key in table.keys if key}
    assert {"bench", "avg@k %", "sequentially"} < columns and columns - first_cells() == set()

    # what eval.json and responses.jsonl hold of a checkpoint and of a response
    keys = {*result, *example[0][0]}
    assert len(keys) > 30 and keys - set(re.findall(r"`([^`]+)`", METRICS)) - first_cells() == set()


def logged_keys(name):
    """Keys of a stage's log.jsonl, read off its code: keywords of run.log, or the dict that it unpacks."""
    tree = ast.parse((ROOT / name).read_text("utf-8"))
    keys = {"seconds"}  # Run.log adds it
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run.log":
            keys |= {keyword.arg for keyword in node.keywords if keyword.arg}
            unpacked = [ast.unparse(keyword.value) for keyword in node.keywords if not keyword.arg]
            for row in ast.walk(tree):
                if isinstance(row, ast.Assign) and ast.unparse(row.targets[0]) in unpacked:
                    keys |= {key.value for key in row.value.keys if key}
                    keys |= AVERAGES if None in row.value.keys else set()
    return keys


AVERAGES = {"reward", "valid", "accuracy", "length", "critical_path"}


def test_every_key_of_every_log_is_in_the_metrics_with_its_stages():
    names = ("stage0_model.py", "stage1_zero.py", "stage2_beta.py", "stage3_papo.py")
    logged = {stage: logged_keys(name) for stage, name in enumerate(names)}
    assert AVERAGES < logged[1] and "clipped" in logged[1] and "epoch" in logged[2]
    [table] = [table for table in tables(METRICS) if "stages" in table[0]]
    said = {}
    for row in table:
        stages = range(4) if row["stages"] == "all" else map(int, row["stages"].split(","))
        for stage in stages:
            said.setdefault(stage, set()).update(re.findall(r"`(\w+)`", row["key"]))
    assert said == logged


def test_what_stages_1_and_3_average_are_these_keys():
    rollout = engine.Rollout([1], None, [False], [0.0], "stop", 1, 0)
    one = stage1_zero.Judged([1], "q", rollout, "text", True, True, 1.0)
    assert set(stage1_zero.averages([one])) == AVERAGES


# ======================================================================================================================
# 3. docs/exercises.md
# ======================================================================================================================

EXERCISES = (ROOT / "docs" / "exercises.md").read_text("utf-8")


@pytest.mark.parametrize("number", exercise.EXERCISES)
def test_a_blank_has_lost_its_function_s_body_and_nothing_else(number):
    task = exercise.EXERCISES[number]
    for name in task.functions:
        source = (ROOT / task.file).read_text("utf-8")
        blank, line = exercise.blank(source, name)
        before, after = source.splitlines(), blank.splitlines()
        lost = len(before) - len(after)
        assert after[line - 1].strip() == f'raise NotImplementedError("write {name}")'
        assert before[: line - 1] == after[: line - 1] and before[line + lost :] == after[line:]

        # the docstring is the specification, so it stays
        def function(text):
            found = [n for n in ast.walk(ast.parse(text)) if getattr(n, "name", "") == name.split(".")[-1]]
            return next(n for n in found if isinstance(n, ast.FunctionDef) and n.lineno < line)

        assert ast.get_docstring(function(blank)) == ast.get_docstring(function(source)) != None  # noqa: E711
        assert len(function(blank).body) == 2


def test_a_function_is_found_by_name_whatever_stands_around_it():
    source = "class A:\n    def f(self):\n        return 1\n\nclass B:\n    def f(self):\n        '''Two.'''\n        # why\n        return 2\n"
    blank, line = exercise.blank(source, "B.f")
    assert (
        blank == source.split("        # why")[0] + '        raise NotImplementedError("write B.f")\n'
        and line == 8
    )
    assert exercise.blank(source, "A.f")[0].count("return 2") == 1
    with pytest.raises(LookupError, match="no function B.g"):
        exercise.blank(source, "B.g")


def test_the_tests_that_judge_exist_and_the_page_has_a_chapter_for_each(capsys, monkeypatch):
    for number, task in exercise.EXERCISES.items():
        text = (ROOT / task.tests).read_text()
        assert all(f"\ndef {name}(" in text for name in task.names)
        assert re.search(rf"^## {number}\. `", EXERCISES, re.M) and task.tests in EXERCISES
        lost = 0
        for name in task.functions:
            source = (ROOT / task.file).read_text("utf-8")
            lost += len(source.splitlines()) - len(exercise.blank(source, name)[0].splitlines()) + 1
        row = next(line for line in EXERCISES.split("\n") if line.startswith(f"| {number} |"))
        assert f"| {lost} |" in row, row
    monkeypatch.setattr(sys, "argv", ["exercise.py"])
    assert exercise.main() == 0 and "make exercise N=4    dapo_loss" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("number", exercise.EXERCISES)
def test_a_blank_is_not_yet_solved_the_original_is_and_the_copy_is_the_reader_s(number, tmp_path):
    task = exercise.EXERCISES[number]

    def call():
        command = [sys.executable, "docs/exercise.py", str(number), "--out", tmp_path]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    first = call()
    assert first.returncode == 1 and "not yet" in first.stdout, first.stdout
    assert f"write {task.functions[0]}: {tmp_path / str(number) / task.file}:" in first.stdout
    assert "NotImplementedError" in first.stdout

    # whatever the reader writes there, the next call leaves it alone
    shutil.copy(ROOT / task.file, tmp_path / str(number))
    second = call()
    assert second.returncode == 0 and "solved" in second.stdout, second.stdout
    assert (tmp_path / str(number) / task.file).read_text() == (ROOT / task.file).read_text()


def numbers_after(word, text):
    """The integers of every line that begins with a word, up to two blanks after the last of them."""
    rows = re.findall(rf"^{word} +((?:[\d|] *)+)", text, re.M)
    return [[int(x) for x in row.replace("|", " ").split()] for row in rows]


def test_the_pictures_of_the_first_two_exercises_are_the_layout():
    text = "qqq<guideline></guideline><step>1:x</step><step>2:yzw</step><takeaway>"
    whole = engine.layout(test_layout.ids_of(text), test_layout.TAG)
    _, first, second, _, _ = re.split(r"^## \d\. ", EXERCISES, flags=re.M)
    for name in ("block", "branch", "position"):
        drawn = numbers_after(name, first)[0]
        at = getattr(whole, name)[3:].tolist()
        assert drawn == ([x + 2 for x in at] if name == "position" else at)

    # the second stands in engine.py, too, where a test draws it from a rollout
    in_engine = (ROOT / "engine.py").read_text("utf-8").replace("#     ", "")
    for name in ("slot", "block", "branch", "position"):
        assert numbers_after(name, second)[0] in numbers_after(name, in_engine)


def test_the_numbers_of_the_last_two_exercises_are_the_functions():
    rewards = [1.0] * 11 + [-1.0] + [1.0] * 6 + [-1.0] * 6
    groups = [0] * 12 + [1] * 12
    grpo, papo = stage1_zero.dapo_advantages(rewards, groups), stage3_papo.papo_advantages(rewards, groups)
    for line, places in (("11 of 12", (0, 11)), ("6 of 12", (12, 23))):
        row = re.search(rf"^ +\d +{line} are right +(.*)$", EXERCISES, re.M)[1]
        numbers = [float(x) for x in re.findall(r"-?[\d.]+", row)]
        assert numbers[3:] == pytest.approx([a[i].item() for a in (grpo, papo) for i in places], abs=6e-3)

    [table] = [t for t in tables(EXERCISES) if "r" in t[0]]
    for row, gradient, A in ((table[0], table[1], 1.0), (table[2], table[3], -1.0)):
        for r in ("0.5", "0.9", "1.0", "1.2", "1.5"):
            logprob = torch.tensor([[float(r)]]).log().requires_grad_()
            loss = stage1_zero.dapo_loss(logprob, torch.zeros(1, 1), torch.tensor([A]), torch.ones(1, 1))
            loss.backward()
            assert -loss.item() == pytest.approx(float(row[r]), abs=1e-6)
            assert (logprob.grad.item() != 0) == (gradient[r] == "yes")


# What one may well write, and the tests have to refuse.


def group_std(rewards, group_ids, eps=1e-6):
    return stage1_zero.dapo_advantages(rewards, group_ids, eps)


def std_of_what_is_centred(rewards, group_ids, eps=1e-6):
    rewards, group_ids = torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(group_ids)
    centred = rewards.clone()
    for g in group_ids.unique():
        centred[group_ids == g] -= rewards[group_ids == g].mean()
    return centred / (centred.std(correction=0) + eps)


def sample_std(rewards, group_ids, eps=1e-6):
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    right = stage3_papo.papo_advantages(rewards, group_ids, eps)
    return right * rewards.std(correction=0) / rewards.std()


def clip_without_minimum(logprobs, old, advantages, mask, low=0.2, high=0.28, num_tokens=None):
    ratio = (logprobs - old).exp().clamp(1 - low, 1 + high)
    return -(ratio * advantages[:, None] * mask).sum() / mask.sum()


def symmetric_clip(logprobs, old, advantages, mask, low=0.2, high=0.28, num_tokens=None):
    return stage1_zero.dapo_loss(logprobs, old, advantages, mask, low, low, num_tokens)


def mean_of_responses(logprobs, old, advantages, mask, low=0.2, high=0.28, num_tokens=None):
    losses = [
        stage1_zero.dapo_loss(*rows, low, high)
        for rows in zip(*(x.split(1) for x in (logprobs, old, advantages, mask)))
    ]
    return sum(losses) / len(losses)


def steps_one_after_another(ids, tag_ids, prompt_len=0):
    right = engine.layout(ids, tag_ids, prompt_len)
    return engine.Layout(right.block, right.branch, right.position * 0 + range(len(ids)))


def trunk_behind_the_last_step(ids, tag_ids, prompt_len=0):
    right = engine.layout(ids, tag_ids, prompt_len)
    position = right.position.copy()
    for i in range(1, len(ids)):
        if right.block[i] == 0:
            position[i] = position[i - 1] + 1
    return engine.Layout(right.block, right.branch, position)


def separator_in_the_trunk(ids, tag_ids, prompt_len=0):
    right = engine.layout(ids, tag_ids, prompt_len)
    for i in range(1, len(ids)):
        if ids[i - 1] == tag_ids["</step>"] and ids[i] not in tag_ids.values():
            right.block[i] = right.branch[i] = 0
    return right


@pytest.mark.parametrize(
    "number, wrong",
    [
        *(
            (1, wrong)
            for wrong in (steps_one_after_another, trunk_behind_the_last_step, separator_in_the_trunk)
        ),
        *((3, wrong) for wrong in (group_std, std_of_what_is_centred, sample_std)),
        *((4, wrong) for wrong in (clip_without_minimum, symmetric_clip, mean_of_responses)),
    ],
)
def test_what_is_nearly_right_is_refused(monkeypatch, number, wrong):
    module = {1: test_layout, 3: test_papo, 4: test_zero}[number]
    task = exercise.EXERCISES[number]
    monkeypatch.setattr(module, task.functions[0], wrong)
    tests = [getattr(module, name) for name in task.names]
    if not tests:
        tests = [test_layout.test_worked_example_of_the_design, test_layout.test_docstring_example_of_layout]
        tests.append(test_layout.test_step_2_cannot_see_step_1_even_through_the_separator)
        tests.append(partial(test_layout.test_random_trajectories_match_the_brute_force_tree, ""))
    failed = 0
    for test in tests:
        try:
            test()
        except AssertionError:
            failed += 1
    assert failed

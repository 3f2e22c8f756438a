"""What README and the pages of docs/ quote exists: commands with their flags and values, make targets, files,
links, functions, tests.  And README is short enough to be read.

Each rule is a function from a page to its violations, and is itself tested on a few made-up lines.
"""

import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT
from test_house import ORDER, assert_none

from stage0_model import UserError, read_arguments

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MODULES = [name.removesuffix(".py") for name in ORDER]

MAX_LINES, MAX_WORDS, MAX_COLUMNS = 200, 2000, 100  # of README


def quoted(text):
    """What a page quotes: [(line number, 'block' or 'span', code)].

    Lines of a block that end with a backslash are one command.  Comments are left out.
    """
    found = []
    inside = False
    before = ""  # of a command that goes on
    prose = []  # the lines outside of blocks; blank ones stand for those inside
    for number, line in enumerate(text.split("\n"), 1):
        fence = line.lstrip().startswith("```")
        prose.append("" if inside or fence else line)
        if fence:
            inside = not inside
        elif inside and line.endswith("\\"):
            before += line[:-1]
        elif inside:
            found.append((number, "block", re.sub(r"\s+# .*", "", before + line).strip()))
            before = ""

    # a span may go on in the next line, but not in the next paragraph
    prose = "\n".join(prose)
    for span in re.finditer(r"`((?:[^`\n]|\n(?!\n))+)`", prose):
        number = prose.count("\n", 0, span.start()) + 1
        found.append((number, "span", " ".join(span[1].split())))
    return sorted(found)


def test_quotes_are_found_in_blocks_and_in_spans():
    text = "a `b c` d\n```\npython x.py --y \\\n    --z 1    # why\nmake\n```\n`e\nf` g"
    assert quoted(text) == [
        (1, "span", "b c"),
        (4, "block", "python x.py --y     --z 1"),
        (5, "block", "make"),
        (7, "span", "e f"),
    ]


# ======================================================================================================================
# 1. Commands
# ======================================================================================================================


def flags_of(script):
    """The flags of a script: by its table, or as its parser is given them."""
    source = (ROOT / script).read_text("utf-8")
    if script in ORDER:
        return {flag for flag, *_ in importlib.import_module(script.removesuffix(".py")).ARGUMENTS}
    return set(re.findall(r'add_?(?:argument|option)\(\s*"(--[\w-]+)"', source))


def wrong_with(command):
    """What is wrong with a command line, or ''."""
    words = shlex.split(command)
    if "pytest" in words:
        return wrong_with_pytest(words)
    place = next((i for i, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py", word)), None)
    if place is None:
        return ""
    script, *argv = words[place:]
    if not (ROOT / script).is_file():
        return f"no {script}"
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in flags_of(script)]
    if unknown:
        return f"{script} has no {unknown[0]}"

    # a command is whole, and read as the script reads it; a script and a flag may be a part of one
    if script in ORDER and place:
        try:
            read_arguments("", importlib.import_module(script.removesuffix(".py")).ARGUMENTS, argv)
        except UserError as error:
            return f"{script}: {error}"
    return ""


def wrong_with_pytest(words):
    """The same of a run of tests: files, options of this project's own, and what -k picks by name."""
    files = [word.partition("::")[0] for word in words if ".py" in word]
    missing = [file for file in files if not (ROOT / file).is_file()]
    missing += [word for word in words if word.startswith("--") and word not in flags_of("tests/conftest.py")]
    if "-k" in words:
        text = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
        names = " ".join(re.findall(r"def (test_\w+)", text))
        chosen = re.findall(r"\w+", words[words.index("-k") + 1])
        missing += [part for part in chosen if part not in ("or", "and", "not") and part not in names]
    return f"no {missing[0]}" if missing else ""


def wrong_commands(name, text):
    violations = []
    for number, kind, code in quoted(text):
        # what stands before a command: settings of its environment, and a core to run on
        command = re.sub(r"^(?:\w+=\S+ |taskset -c \S+ )*", "", code)
        if re.match(r"(\S*python3?|\S*torchrun|[\w/]+\.py) ", command):
            why = wrong_with(command)
            violations += [f"{name}:{number}: {why}"] if why else []
    return violations


def test_the_rule_for_commands_reads_flags_and_values_as_the_script_does():
    good = """\
        `python stage1_zero.py --steps 3`, `stage3_papo.py --count-forced`, `eval.py --bench aime25`
        ```
        OMP_NUM_THREADS=1 taskset -c 1 .venv/bin/python tests/bench_engine.py --sizes tiny
        .venv/bin/python eval.py out/stage0 out/stage1=format --kind sums \\
            --n 3
        .venv/bin/torchrun --nproc-per-node 8 stage2_beta.py --epochs 2
        .venv/bin/python -m pytest -q tests/test_engine.py -k "fuzz or same_memory" --fuzz 10
        python -m pip install torch
        ```"""
    assert wrong_commands("a.md", good) == []
    bad = """\
        `python stage9.py`
        `stage3_papo.py --count-unforced`
        `python eval.py out/stage0 --kind products`
        `python stage1_zero.py --steps none`
        `python docs/figures.py curves out --outside x`
        `python -m pytest tests/test_nothing.py`
        `python -m pytest tests/test_engine.py -k nothing_is_called_so`
        `python -m pytest --fuss 3`"""
    found = wrong_commands("a.md", bad)
    assert [line.split(":")[1] for line in found] == [str(n) for n in range(1, 9)]
    assert found[0].endswith("no stage9.py") and found[1].endswith("has no --count-unforced")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_page_quotes_would_be_understood(page):
    assert_none(wrong_commands(page, (ROOT / page).read_text("utf-8")))


SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "tests")
    for path in (ROOT / folder).glob("*.py")
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_in_a_script_s_own_docstring_would_be_understood(script):
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text("utf-8"))) or ""
    commands = [line.strip() for line in docstring.split("\n") if line.startswith("    ")]
    text = "\n".join(["```", *commands, "```"])
    assert_none(wrong_commands(script, text) + unknown_targets(script, text))


def unknown_flags(name, text):
    """Flags that stand alone, `--lr` or `--kind sums`, and belong to no script."""
    known = {"--help", "--nproc-per-node"}.union(*map(flags_of, SCRIPTS))
    spans = [(number, code.split()[0]) for number, _, code in quoted(text) if code.startswith("--")]
    return [
        f"{name}:{number}: no script has {flag}"
        for number, flag in spans
        if flag.partition("=")[0] not in known
    ]


# The log speaks of runs of older commits, with the flags of their time.
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/log.md"])
def test_every_flag_that_a_page_names_belongs_to_a_script(page):
    assert unknown_flags("a.md", "`--lr` `--kind sums` `--fuzz 10` `--learning`") == [
        "a.md:1: no script has --learning"
    ]
    assert_none(unknown_flags(page, (ROOT / page).read_text("utf-8")))


MAKEFILE = (ROOT / "Makefile").read_text("utf-8")


def unknown_targets(name, text):
    """Targets and variables of `make` that the Makefile does not have."""
    violations = []
    for number, _, code in quoted(text):
        match = re.match(r"(?:\w+=\S+ )*make((?: .*)?)$", code)
        for word in shlex.split(match[1]) if match else []:
            variable, is_set, _ = word.partition("=")
            if is_set:
                known = re.search(rf"\$\({variable}\)", MAKEFILE)
            else:
                known = word.startswith("-") or re.search(rf"^{re.escape(word)}:", MAKEFILE, re.M)
            violations += [] if known else [f"{name}:{number}: make {word}"]
    return violations


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_and_variable_that_a_page_names_exists(page):
    text = "`make`, `make test`, `OMP_NUM_THREADS=1 make -j2 seeds`, `make STAGE2=--overwrite`\n`make tset`\n`make NO=1`"
    assert unknown_targets("a.md", text) == ["a.md:2: make tset", "a.md:3: make NO=1"]
    assert_none(unknown_targets(page, (ROOT / page).read_text("utf-8")))


# ======================================================================================================================
# 2. Files, names and links
# ======================================================================================================================

NO_FILES = ("utils.py",)  # of which a page says that there is none
FILE = r"[\w./-]+\.(?:py|md|txt|html|json|jsonl|toml|yml|ini|tsv|svg|webp|png|css|jinja|safetensors)|Makefile|[\w./-]+/"


def missing_files(name, text):
    """Files and folders/ that are neither here nor written by one of the six scripts."""
    written = "".join((ROOT / script).read_text("utf-8") for script in ORDER)
    violations = []
    for number, _, code in quoted(text):
        if not re.fullmatch(FILE, code) or code.startswith("out/") or code in NO_FILES:
            continue
        here = any((folder / code).exists() for folder in (ROOT, (ROOT / name).parent))
        bare = code.removesuffix("/")
        if not here and ("/" in bare or bare not in written):
            violations.append(f"{name}:{number}: {code}")
    return violations


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_is_here_or_written_by_a_script(page):
    text = "`Makefile` `docs/log.md` `tests/` `out/x.json` `eval.json` `resume/`\n`nothing.json`\n`tests/eval.json`"
    assert missing_files("README.md", text) == ["README.md:2: nothing.json", "README.md:3: tests/eval.json"]
    assert_none(missing_files(page, (ROOT / page).read_text("utf-8")))


def unknown_names(name, text):
    """`engine.layout` or `test_of_something` where there is no such thing."""
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("*.py"))
    violations = []
    for number, _, code in quoted(text):
        dotted = re.fullmatch(rf"({'|'.join(MODULES)})\.(\w+)(?:\.\w+)*(?:\(\))?", code)
        if dotted and dotted[2] != "py" and not hasattr(importlib.import_module(dotted[1]), dotted[2]):
            violations.append(f"{name}:{number}: {code}")
        if re.fullmatch(r"test_\w+", code) and f"def {code}(" not in tests:
            violations.append(f"{name}:{number}: {code}")
    return violations


@pytest.mark.parametrize("page", PAGES)
def test_every_function_and_test_that_a_page_names_exists(page):
    text = "`engine.layout` `eval.py` `test_quotes_are_found_in_blocks_and_in_spans`\n`engine.lay`\n`test_of_nothing`"
    assert unknown_names("a.md", text) == ["a.md:2: engine.lay", "a.md:3: test_of_nothing"]
    assert_none(unknown_names(page, (ROOT / page).read_text("utf-8")))


def anchors(text):
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(name, text):
    """Links and pictures that lead to nothing in this repository; what is in the network is not looked at."""
    violations = []
    for number, line in enumerate(text.split("\n"), 1):
        line = re.sub(r"`[^`]*`", lambda code: code[0].replace("](", "] ("), line)
        for target in re.findall(r"\]\(([^)\s]+)[^)]*\)|(?:src|srcset|href)=\"([^\"]+)\"", line):
            target = "".join(target)
            if re.match(r"\w+:", target):
                continue
            file, _, anchor = target.partition("#")
            path = (ROOT / name).parent / file if file else ROOT / name
            there = path.exists()
            if there and anchor:
                lines = re.fullmatch(r"L(\d+)(?:-L\d+)?", anchor)
                whole = path.read_text("utf-8")
                there = int(lines[1]) <= whole.count("\n") if lines else anchor in anchors(whole)
            violations += [] if there else [f"{name}:{number}: {target}"]
    return violations


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_repository_leads_somewhere(page):
    text = """\
        # Try it, in a minute!
        [a](docs/log.md) [b](#try-it-in-a-minute) [c](https://x.y/z) [d](engine.py#L3)
        [e](docs/no.md)
        [f](#try)
        <img src="assets/none.svg"> [g](engine.py#L99999)"""
    text = "\n".join(line.strip() for line in text.split("\n"))
    assert "try-it-in-a-minute" in anchors(text)
    wrong = ["3: docs/no.md", "4: #try", "5: assets/none.svg", "5: engine.py#L99999"]
    found = [v.removeprefix("README.md:") for v in dead_links("README.md", text)]
    assert [v for v in found if "#try-it" not in v] == wrong
    assert_none(dead_links(page, (ROOT / page).read_text("utf-8")))


# ======================================================================================================================
# 3. README is short
# ======================================================================================================================


def test_readme_has_at_most_200_lines_2000_words_and_100_columns():
    text = (ROOT / "README.md").read_text("utf-8")
    lines = text.splitlines()
    # the addresses of links and pictures cannot be broken
    wide = [
        f"README.md:{number}: {len(line)} columns"
        for number, line in enumerate(lines, 1)
        if len(re.sub(r"\]\([^)]*\)|(?:src|href)=\"[^\"]*\"", "", line)) > MAX_COLUMNS
    ]
    assert_none(wide)
    assert len(lines) <= MAX_LINES and len(text.split()) <= MAX_WORDS

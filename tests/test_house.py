"""The house rules as facts.  A failure lists every place as file:line.

Each rule is a function from a file to its violations, and is itself tested on a few made-up lines:
a rule that finds nothing may have looked at nothing.
"""

import ast
import difflib
import io
import re
import subprocess
import sys
import textwrap
import tokenize

import pytest
from conftest import ROOT

# In reading order: a file may import from those before it.
ORDER = ("stage0_model.py", "engine.py", "stage1_zero.py", "stage2_beta.py", "stage3_papo.py", "eval.py")

MAX_CODE, MAX_PROSE, MAX_TABLE = 110, 100, 150  # columns
MAX_STRETCH = 12  # code lines in a row without a word of prose
MAX_PACKED = 19  # a, b = x, y: in all six files together
MAX_FMT_SKIP = 5  # in all six files together
MAX_MAINS_APART = 40  # lines in which stage 3's main differs from stage 1's
MAX_STATEMENTS, MAX_ENGINE, MAX_ENGINE_WITHOUT_CUDA = 3499, 978, 783
MAX_COMPLEXITY = 15  # stands in ruff.toml, too

# a letter and a number on their own, but not chain D's step "D7+2" nor "<step>1:D7"
DOCUMENT_CODE = re.compile(r"(?<![\w:>=+*-])[DI](?:10|[1-9])(?!\w|[-+*/=]\d)")


class Source:
    """A Python file, read once.  Lines are numbered from 1, as editors do."""

    def __init__(self, name, text):
        self.name = name
        self.lines = text.splitlines()
        self.tree = ast.parse(text)

        # comments: {line: text}; tables: the lines from `# fmt: off` to `# fmt: on`
        self.comments = {}
        self.tables = set()
        opened = None
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.COMMENT:
                continue
            line = token.start[0]
            self.comments[line] = token.string
            if "fmt: off" in token.string:
                opened = line
            elif "fmt: on" in token.string:
                self.tables |= set(range(opened, line + 1))

        # docstrings: the lines they cover, of the file, its classes and functions
        self.docstrings = set()
        for node in self.nodes(ast.Module, ast.ClassDef, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                self.docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))

    def nodes(self, *kinds):
        """All nodes of these kinds, from top to bottom."""
        chosen = [node for node in ast.walk(self.tree) if isinstance(node, kinds)]
        return sorted(chosen, key=lambda node: getattr(node, "lineno", 0))

    def at(self, line, what):
        return f"{self.name}:{line}: {what}"

    def function(self, name):
        """The lines of a top-level function."""
        node = next(n for n in self.tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
        return node.lineno, self.lines[node.lineno - 1 : node.end_lineno]


def read(name):
    return Source(name, (ROOT / name).read_text())


def sample(text):
    """A made-up file for the tests of the rules."""
    return Source("sample.py", textwrap.dedent(text))


@pytest.fixture(scope="module")
def sources():
    return [read(name) for name in ORDER]


def assert_none(violations, most=0):
    """Fails with every violation, one a line, when there are more than so many."""
    if len(violations) > most:
        pytest.fail("\n".join([f"{len(violations)}, at most {most}:", *violations]), pytrace=False)


# ======================================================================================================================
# 1. Lines
# ======================================================================================================================


def too_long(source):
    """Lines over their limit.  Prose is a docstring or a line that is all comment; a trailing comment
    belongs to its code."""
    violations = []
    for number, line in enumerate(source.lines, 1):
        if number in source.tables:
            kind, limit = "argument table", MAX_TABLE
        elif number in source.docstrings or line.lstrip().startswith("#"):
            kind, limit = "prose", MAX_PROSE
        else:
            kind, limit = "code", MAX_CODE
        ruler = re.fullmatch(r"# [=-]+", line)  # the lines around a section's heading are drawn, not read
        if len(line) > limit and not ruler:
            violations.append(source.at(number, f"{len(line)} columns of {kind}, at most {limit}"))
    return violations


def test_the_rule_for_lengths_tells_code_from_prose_from_tables():
    def columns(text, number):
        return (text + " " * number)[: number - 1] + "x"

    for text, limit in (("y = x  #", 110), ("# words", 100), ('"""words', 100)):
        end = '"""' if text.startswith('"""') else ""
        fits, long = (columns(text, limit + more - len(end)) + end for more in (0, 1))
        assert too_long(sample(fits)) == [] and len(too_long(sample(long))) == 1

    # an argument table may be wider, and the lines around a heading count as drawing
    table = "# fmt: off\n{}\n# fmt: on\n"
    assert too_long(sample(table.format(columns("y = x  #", 150)))) == []
    wide = too_long(sample(table.format(columns("y = x  #", 151))))
    assert wide == ["sample.py:2: 151 columns of argument table, at most 150"]
    assert too_long(sample("# " + "=" * 118)) == []


def test_no_line_is_too_long_to_read(sources):
    assert_none([v for source in sources for v in too_long(source)])


def not_an_argument(source):
    """Statements between `# fmt: off` and `# fmt: on` other than the tables `ARGUMENTS`, `RUNGS`."""
    violations = []
    for node in source.nodes(ast.stmt):
        name = getattr(node.targets[0], "id", "") if isinstance(node, ast.Assign) else ""
        table = name in ("ARGUMENTS", "RUNGS")
        if node.lineno in source.tables and not table:
            violations.append(source.at(node.lineno, "formatted by hand, and no table"))
    return violations


def test_the_rule_for_tables_lets_arguments_through_and_nothing_else():
    text = "# fmt: off\nARGUMENTS = (\n    ('--a', int, 1, 'b'),\n)\n{}\n# fmt: on\nx = 2\n"
    assert not_an_argument(sample(text.format(""))) == []
    other = not_an_argument(sample(text.format("x   = 1")))
    assert other == ["sample.py:5: formatted by hand, and no table"]


def test_only_argument_tables_are_formatted_by_hand(sources):
    assert_none([v for source in sources for v in not_an_argument(source)])


def comments_with(source, pattern):
    return [source.at(n, text) for n, text in source.comments.items() if re.search(pattern, text)]


def test_at_most_five_statements_escape_the_formatter(sources):
    example = sample("x = 'fmt: skip'\ny = 1  # fmt: skip\n")
    assert comments_with(example, "fmt: skip") == ["sample.py:2: # fmt: skip"]
    assert_none([v for source in sources for v in comments_with(source, "fmt: skip")], MAX_FMT_SKIP)


def test_nothing_is_hidden_from_the_linter(sources):
    hidden = r"noqa(?!: E402\b)"
    example = sample("import a  # noqa: E402\nx = lambda: 1  # noqa: E731\ny = 1  # noqa\n")
    assert comments_with(example, hidden) == ["sample.py:2: # noqa: E731", "sample.py:3: # noqa"]
    assert_none([v for source in sources for v in comments_with(source, hidden)])


def without_prose(source):
    """Stretches of too many code lines without a comment, a trailing comment or a docstring.  Blank lines
    and argument tables do not count; what stands inside a string that is no docstring is code."""
    prose = set(source.comments) | source.docstrings | source.tables
    violations = []
    stretch = []
    imports = set()  # say what they are themselves
    for node in source.nodes(ast.Import, ast.ImportFrom):
        imports |= set(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate([*source.lines, ""], 1):
        if number in prose or number > len(source.lines):
            if len(stretch) > MAX_STRETCH:
                what = f"{len(stretch)} lines of code without prose, at most {MAX_STRETCH}"
                violations.append(source.at(stretch[0], what))
            stretch = []
        elif line.strip() and number not in imports:
            stretch.append(number)
    return violations


def test_the_rule_for_prose_counts_code_between_words():
    twelve = "x = 1\n" * 6 + "\n" + "x = 1\n" * 6
    for words in ("# why", "x = 1  # why", '"""What."""', "# fmt: off\np.add_argument()\n# fmt: on"):
        assert without_prose(sample(words + "\n" + twelve + "# why\n" + twelve)) == []
        long = sample(words + "\n" + twelve + "x = 1\n# why\n" + twelve)
        first = 1 + len(words.splitlines())
        assert without_prose(long) == [f"sample.py:{first}: 13 lines of code without prose, at most 12"]
    assert without_prose(sample("import a\n" * 13 + "from b import (\n    c,\n)\n" + twelve)) == []
    assert without_prose(sample("text = '''\n" + "# not prose\n" * 13 + "'''\n")) != []


def test_no_more_than_twelve_lines_of_code_go_by_without_prose(sources):
    assert_none([v for source in sources for v in without_prose(source)])


def document_codes(name, prose):
    """Names of sections of a document that a reader of this repository does not have.  prose: {line: text}"""
    codes = []
    for number, text in sorted(prose.items()):
        codes += [f"{name}:{number}: {match[0]}" for match in DOCUMENT_CODE.finditer(text)]
    return codes


def prose_of(source):
    """{line: comment, docstring's line, or a function's name with its words apart}"""
    names = {node.lineno: node.name.replace("_", " ") for node in source.nodes(ast.FunctionDef)}
    return names | source.comments | {number: source.lines[number - 1] for number in source.docstrings}


def test_the_rule_for_document_codes_knows_them_from_chains_of_the_problems():
    bad = sample("""\
        '''Read strictly (D2).'''
        # as in D10, or I6
        x = 1  # the invariants I1-I6
        def test_I4_alone(): 1
        """)
    codes = document_codes("a.py", prose_of(bad))
    assert codes == ["a.py:1: D2", "a.py:2: D10", "a.py:2: I6", "a.py:3: I1", "a.py:4: I4"]
    good = sample("""\
        # <step>1:D7+2=9</step>
        # D7+2*3, D:40-7
        D1 = 'D3'
        # D columns, 2D, D40, ID1, wall4D1
        """)
    assert document_codes("a.py", prose_of(good)) == []


def test_no_codes_of_documents_that_are_not_here():
    codes = []
    for pattern in ("*.py", "tests/*.py", "docs/*.py", "*.md", "docs/*.md"):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            lines = dict(enumerate(path.read_text().splitlines(), 1))
            prose = prose_of(read(name)) if path.suffix == ".py" else lines
            codes += document_codes(name, prose)
    assert_none(codes)


# ======================================================================================================================
# 2. Statements
# ======================================================================================================================


def packed(source):
    """Assignments of several things to several names.  Unpacking one thing is no such assignment."""
    several = (ast.Tuple, ast.List)
    violations = []
    for node in source.nodes(ast.Assign):
        if isinstance(node.value, several) and isinstance(node.targets[0], several):
            violations.append(source.at(node.lineno, source.lines[node.lineno - 1].strip()))
    return violations


def test_the_rule_for_assignments_lets_one_thing_be_unpacked():
    assert packed(sample("a, b = f(x)\na = b = 0\nfor a, b in c:\n    d = a, b\n(a, b), c = d\n")) == []
    assert packed(sample("a = 1\na, b = 1, 2\n")) == ["sample.py:2: a, b = 1, 2"]
    assert len(packed(sample("[a, b] = [b, a]\nself.a, self.b = a, b\n"))) == 2


def test_fewer_than_twenty_statements_pack_several_assignments(sources):
    assert_none([v for source in sources for v in packed(source)], MAX_PACKED)


def bound_lambdas(source):
    """Lambdas with a name: functions that a traceback cannot name and that have no docstring."""
    violations = []
    for node in source.nodes(ast.Assign, ast.AnnAssign, ast.NamedExpr):
        if isinstance(node.value, ast.Lambda):
            violations.append(source.at(node.lineno, source.lines[node.lineno - 1].strip()))
    return violations


def test_no_lambda_is_bound_to_a_name(sources):
    assert bound_lambdas(sample("x.sort(key=lambda d: len(d))\ndef f():\n    return lambda: 1\n")) == []
    assert bound_lambdas(sample("f = lambda: 1\n")) == ["sample.py:1: f = lambda: 1"]
    assert len(bound_lambdas(sample("f: int = lambda: 1\ng((h := lambda: 1))\n"))) == 2
    assert_none([v for source in sources for v in bound_lambdas(source)])


def imports_against_the_order(source, before):
    """Imports of project files that come later, or inside a function, where they could hide a circle."""
    project = [name.removesuffix(".py") for name in ORDER]
    violations = []
    for node in source.nodes(ast.Import, ast.ImportFrom):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        for name in names:
            if name in project and f"{name}.py" not in before:
                violations.append(source.at(node.lineno, f"imports {name}, which comes later"))
            elif name in project and node not in source.tree.body:
                violations.append(source.at(node.lineno, f"imports {name} inside a block"))
    return violations


def test_the_rule_for_imports_sees_later_files_and_hidden_ones():
    example = sample("import torch, stage0_model\nfrom engine import Engine\n")
    assert imports_against_the_order(example, before=ORDER[:2]) == []
    later = imports_against_the_order(example, before=ORDER[:1])
    assert later == ["sample.py:2: imports engine, which comes later"]
    hidden = sample("def f():\n    import matplotlib\n    from engine import Engine\n")
    assert imports_against_the_order(hidden, before=ORDER[:2]) == [
        "sample.py:3: imports engine inside a block"
    ]


def test_imports_point_one_way(sources):
    assert_none([v for i, source in enumerate(sources) for v in imports_against_the_order(source, ORDER[:i])])


# ======================================================================================================================
# 3. Size
# ======================================================================================================================


def num_statements(source, before=float("inf")):
    """Statements as Python counts them (a `for` is one, and so is each in it) that begin above a line."""
    return sum(node.lineno < before for node in source.nodes(ast.stmt))


def section_line(source, word):
    """The line of the heading with this word in it: `# ====` above, `# 6. On CUDA`, `# ====` below."""
    ruler = re.compile("# =+")
    for number in range(2, len(source.lines)):
        above, line, below = source.lines[number - 2 : number + 1]
        if ruler.fullmatch(above) and ruler.fullmatch(below) and word in line:
            return number
    raise AssertionError(f"{source.name}: no section has {word} in its heading")


def test_statements_are_counted_and_sections_are_found():
    text = sample("""\
        import a
        # CUDA
        # ====
        # 1. CUDA
        # ====
        for x in a:
            y = x; z = y

        def f():
            return 1
        """)
    assert num_statements(text) == 6 and num_statements(text, before=section_line(text, "CUDA")) == 1
    with pytest.raises(AssertionError, match="sample.py: no section has CPU"):
        section_line(text, "CPU")


def test_the_six_files_stay_small(sources):
    counts = {source.name: num_statements(source) for source in sources}
    assert sum(counts.values()) <= MAX_STATEMENTS, (
        f"{sum(counts.values())} statements, at most {MAX_STATEMENTS}: {counts}"
    )


def test_the_engine_stays_small_and_smaller_still_without_cuda():
    engine = read("engine.py")
    cuda = section_line(engine, "CUDA")
    whole, part = num_statements(engine), num_statements(engine, before=cuda)
    assert whole <= MAX_ENGINE, f"engine.py:1: {whole} statements, at most {MAX_ENGINE}"
    assert part <= MAX_ENGINE_WITHOUT_CUDA, (
        f"engine.py:{cuda}: {part} statements above, at most {MAX_ENGINE_WITHOUT_CUDA}"
    )


def hunks(lines, others):
    """What a diff shows: [(start, end, other start, other end)], lines counted from 0."""
    matcher = difflib.SequenceMatcher(None, lines, others, autojunk=False)
    return [tuple(places) for kind, *places in matcher.get_opcodes() if kind != "equal"]


def size_of(hunk):
    """The larger of the lines it takes away and those it puts there: a changed line counts once."""
    start, end, other_start, other_end = hunk
    return max(end - start, other_end - other_start)


def test_a_changed_line_counts_once_and_an_added_one_too():
    assert hunks(["a", "b", "c"], ["a", "b", "c"]) == []
    changed = hunks(["a", "b", "c"], ["a", "B", "c", "d", "e"])
    assert changed == [(1, 2, 1, 2), (3, 3, 3, 5)] and [size_of(hunk) for hunk in changed] == [1, 2]
    assert [size_of(hunk) for hunk in hunks(["a", "b", "b", "b", "c"], ["a", "x", "c"])] == [3]


def test_stage_3_is_stage_1_with_another_algorithm():
    first, one = read("stage1_zero.py").function("main")
    second, three = read("stage3_papo.py").function("main")
    apart = hunks(one, three)
    places = []
    for start, end, other_start, other_end in apart:
        here = f"stage1_zero.py:{first + start}: {end - start} lines"
        places.append(f"{here}, stage3_papo.py:{second + other_start}: {other_end - other_start} instead")
    total = sum(size_of(hunk) for hunk in apart)
    assert total <= MAX_MAINS_APART, f"{total} lines differ, at most {MAX_MAINS_APART}:\n" + "\n".join(places)


# ======================================================================================================================
# 4. What ruff sees
# ======================================================================================================================


def ruff(*command, cwd=ROOT):
    """What ruff has to say of a folder's files, one line each."""
    command = [sys.executable, "-m", "ruff", *command, "--output-format", "concise", "--no-cache", "."]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: it found something; 2: it could not run
    return [line for line in done.stdout.splitlines() if re.match(r"\S+:\d+:\d+: ", line)]


def ruff_on_a_sample(folder, text, *command):
    (folder / "sample.py").write_text(text)
    return ruff(*command, "--config", str(ROOT / "ruff.toml"), cwd=folder)


def test_no_function_has_more_than_fifteen_branches(tmp_path):
    function = "def f(x):\n" + "    if x:\n        x -= 1\n" * (MAX_COMPLEXITY - 1)
    assert ruff_on_a_sample(tmp_path, function, "check", "--select", "C901") == []
    one_more = function + "    if x:\n        x -= 1\n"
    assert len(ruff_on_a_sample(tmp_path, one_more, "check", "--select", "C901")) == 1
    assert_none(ruff("check", "--select", "C901"))


def test_every_file_is_as_ruff_formats_it(tmp_path):
    assert ruff_on_a_sample(tmp_path, "x = 1\n", "format", "--check") == []
    assert len(ruff_on_a_sample(tmp_path, "x=1\n", "format", "--check")) == 1
    assert_none(ruff("format", "--check"))

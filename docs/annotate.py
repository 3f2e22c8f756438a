r"""The six files as a book: prose on the left, and on the right the code that it explains.

    make docs                                                       # writes out/site/index.html
    python docs/annotate.py --trace out/trace.html --out out/site

All prose is the files' own.  A comment or a docstring opens a row, the code up to the next one
stands beside it, and every line of code is there.  Pages load nothing, from disk or network.
"""

import argparse
import ast
import html
import io
import itertools
import keyword
import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from prose import STEMS, prose

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"index.html": "Contents", "trace.html": "Traces"} | {f"{stem}.html": f"{stem}.py" for stem in STEMS}

# for the page of traces, which has a style of its own
TRACE_STYLE = """<style>
.pages { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin-bottom: 1rem; font-size: .87rem; }
.pages a { color: var(--dim); }
</style>"""

# ==================================================================================================
# 1. Code: a line of HTML for every line
# ==================================================================================================


def names_of(tree, stem, known):
    """{name: address} of what a file defines, and of what it imports from the files in `known`."""
    names = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module in known:
            names |= {a.name: known[node.module][a.name] for a in node.names if a.name in known[node.module]}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = f"{stem}.html#{node.name}"
            for part in getattr(node, "body", ()):
                if isinstance(node, ast.ClassDef) and isinstance(part, ast.FunctionDef):
                    names[f"{node.name}.{part.name}"] = f"{stem}.html#L{part.lineno}"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names[node.targets[0].id] = f"{stem}.html#L{node.lineno}"
    return names


def painted(source, names):
    """The lines of a file as HTML: coloured, with a link where a known name is called or imported."""
    begins = list(itertools.accumulate(map(len, source.splitlines(keepends=True)), initial=0))
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    out = ""
    last = ""
    for token, after in zip(tokens, tokens[1:]):
        # up to where the next token begins: white space takes the colour of what it follows
        start, end = (begins[line - 1] + column for line, column in (token.start, after.start))
        text = html.escape(source[start:end], quote=False)
        kind = tokenize.tok_name[token.type].split("_")[0].lower()
        if last in ("def", "class"):
            kind = "def"
        elif keyword.iskeyword(token.string):
            kind = "keyword"
        # a name in small letters may be a parameter's as well, unless it is called
        elif token.string in names and last != "." and after.string != "=":
            if after.string == "(" or token.line.startswith("from ") or not token.string.islower():
                text = text.replace(token.string, f'<a href="{names[token.string]}">{token.string}</a>', 1)
        if kind in ("keyword", "def", "string", "fstring", "number", "comment"):
            text = "\n".join(f'<i class="{kind}">{part}</i>' for part in text.split("\n"))
        out += text
        last = token.string
    return out.split("\n")


# ==================================================================================================
# 2. Rows
# ==================================================================================================


@dataclass
class Row:
    """Some prose and the code beside it."""

    title: str = ""  # of a function or class it is `in backticks`
    level: int = 4  # of the title: 2 a section, 3 its parts, functions and classes, 4 what is inside those
    prose: str = ""
    lines: list = field(default_factory=list)  # numbers of the code's lines


def landmarks(source, tree):
    """What a row may begin with, by line: comments; docstrings, (last line, text); functions and
    classes with their decorators, (title, level) of a Row.
    """
    lines = source.splitlines()
    comments = {}  # {line: text} where a comment is all that stands there
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            comments[token.start[0]] = token.string[1:].removeprefix(" ")

    docstrings = {tree.body[0].lineno: (tree.body[0].end_lineno, ast.get_docstring(tree))}
    heads = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(node)
            if text:
                docstrings[node.body[0].lineno] = (node.body[0].end_lineno, text)
            if text or node in tree.body:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                heads[first] = (f"`{node.name}`", 3 if node in tree.body else 4)
    return comments, docstrings, heads


def rows_of(source, tree):
    """A file cut into rows; the first is its docstring and what it imports."""
    lines = source.splitlines()
    comments, docstrings, heads = landmarks(source, tree)
    rows = [Row()]
    n = 0
    while n < len(lines):
        n += 1
        comment = comments.get(n, "")
        ruled = re.fullmatch("-+ (.*?) -+", comment)
        if n in heads:
            # a comment right above a function belongs to it
            if rows[-1].lines or rows[-1].title:
                rows.append(Row())
            rows[-1].title, rows[-1].level = heads[n]
            rows[-1].lines.append(n)
        elif n in docstrings:
            n, text = docstrings[n]
            rows[-1].prose += f"\n\n{text}\n\n"
        elif comment and all(re.fullmatch("=+", comments.get(beside, "")) for beside in (n - 1, n + 1)):
            title, _, text = comment.partition(".  ")
            rows.append(Row(title, 2, text + "\n"))
        elif ruled:
            rows.append(Row(ruled[1], 4 if lines[n - 1].startswith(" ") else 3))
        elif comment == "fmt: off" and lines[n].startswith("ARGUMENTS"):
            rows.append(Row("Arguments", 3))
        elif n in comments:
            if not re.match("=+$|fmt:", comment):
                if rows[-1].lines:
                    rows.append(Row())
                rows[-1].prose += comment + "\n"
        elif lines[n - 1] or rows[-1].lines:
            rows[-1].lines.append(n)
        else:
            rows[-1].prose += "\n"  # a blank line above the code ends a paragraph

    # blank lines below the code are gaps between rows
    for row in rows:
        while row.lines and not lines[row.lines[-1] - 1]:
            row.lines.pop()
    return rows


# ==================================================================================================
# 3. Pages
# ==================================================================================================


def nav(here):
    """The line that leads to all pages."""
    mark = {here: ' aria-current="page"'}
    links = " ".join(f'<a href="{page}"{mark.get(page, "")}>{name}</a>' for page, name in PAGES.items())
    return f'<nav class="pages" aria-label="Pages">{links}</nav>'


def page(title, here, body):
    """A whole page, with its style in it."""
    style = (ROOT / "docs" / "annotate.css").read_text("utf-8")
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = (
        f'<meta charset="utf-8">\n{viewport}\n<title>{html.escape(title)}</title>\n<style>\n{style}</style>'
    )
    after = list(PAGES)[list(PAGES).index(here) + 1 :][:1]  # none, on the last page
    end = "".join(f'<footer><a href="{next}">Next: {PAGES[next]}</a></footer>\n' for next in after)
    body = f"{nav(here)}\n<main>\n{body}\n</main>\n{end}"
    return f'<!doctype html>\n<html lang="en">\n{head}\n{body}</html>\n'


def section(row, left, code):
    """A row's HTML: what stands left, and its lines of the file's code."""
    right = ""
    for n in row.lines:
        indent = len(code[n - 1]) - len(code[n - 1].lstrip())
        right += f'<code id="L{n}" data-n="{n}" style="--i:{indent}">{code[n - 1]}</code>'

    # sections, and pictures that the column is too narrow for, get the whole width; so do arguments
    picture = any(len(line) > 62 and line.startswith("  ") for line in row.prose.split("\n"))
    kind = "row wide" if picture or row.level == 2 else "row"
    if row.title == "Arguments":
        kind = "row wide table"
    columns = f'<div class="prose">{left}</div>\n<div class="code">{right}</div>'
    return f'<section class="{kind}">\n{columns}\n</section>'


def chapter(stem, known):
    """(title, contents, body) of a file's page; adds its names to those that are known."""
    source = (ROOT / f"{stem}.py").read_text("utf-8")
    tree = ast.parse(source)
    known[stem] = names_of(tree, stem, known)
    dotted = {f"{each}.{name}": where for each in known for name, where in known[each].items()}
    names = dotted | known[stem]
    code = painted(source, names)
    opening, *rows = rows_of(source, tree)

    contents = []
    body = []
    for row in rows:
        name = row.title.strip("`")
        heading = html.escape(name) if name == row.title else f"<code>{name}</code>"
        place = re.sub(r"\W+", "-", name)
        # what is inside a function may be there in many of them, so it has no address
        address = "" if row.level == 4 else f' id="{place}"'
        title = f"<h{row.level}{address}>{heading}</h{row.level}>" if name else ""
        body.append(section(row, title + prose(row.prose, names), code))
        if address:
            kind = "part" if row.level == 3 and name == row.title else f"level{row.level}"
            contents.append(f'<li class="{kind}"><a href="{stem}.html#{place}">{heading}</a></li>')

    # The promise has the page to itself; beside what is imported stands what the chapter holds.
    title, _, promise = opening.prose.strip().partition("\n")
    opening.prose = ""
    listed = '<h2>In this chapter</h2>\n<ul class="contents">\n' + "\n".join(contents) + "\n</ul>"
    opened = f"<header><h1>{html.escape(title)}</h1>{prose(promise, names)}</header>"
    return title, contents, "\n".join([opened, section(opening, listed, code), *body])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trace", default="out/trace.html", help="page of traces, as eval.py writes it")
    parser.add_argument("--out", default="out/site", help="folder for the pages")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    # The first chapter is rollouts to watch; without any, the page that says how to get some.
    trace = Path(args.trace)
    if not trace.is_file():
        print(f"{trace}: no such file, so the page of traces is empty; eval.py writes one")
        trace = ROOT / "assets" / "trace.html"
    text = trace.read_text("utf-8").replace("<header>", f"{TRACE_STYLE}\n{nav('trace.html')}\n<header>", 1)
    (out / "trace.html").write_text(text, "utf-8")

    # Imports point one way, so that each file finds the names it uses among those before it.
    book, _, about = (ROOT / "README.md").read_text("utf-8").removeprefix("# ").partition("\n")
    about = next(paragraph for paragraph in about.split("\n\n") if re.match("[A-Z]", paragraph.strip()))
    about = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", about)  # without its links
    index = f"<h1>{html.escape(book)}</h1>{prose(about, {})}"
    index += '<h2><a href="trace.html">Traces: rollouts, replayed step by step</a></h2>'
    known = {}
    for stem in STEMS:
        title, contents, body = chapter(stem, known)
        (out / f"{stem}.html").write_text(page(title, f"{stem}.html", body), "utf-8")
        sections = "\n".join(line for line in contents if 'class="level2"' in line)
        heading = f'<h2><a href="{stem}.html">{html.escape(title)}</a></h2>'
        index += f'{heading}\n<ul class="contents">\n{sections}\n</ul>\n'
    (out / "index.html").write_text(page(book, "index.html", f'<div class="book">{index}</div>'), "utf-8")
    print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
    main()

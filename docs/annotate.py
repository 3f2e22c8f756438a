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
    """Where rows may begin, by line: comments, docstrings with their last lines, and functions and
    classes, (name, level), with their decorators.
    """
    comments = {}  # {line: text} where a comment is all that stands there
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            comments[token.start[0]] = token.string[1:].removeprefix(" ")

    docstrings = {}
    heads = {}
    for node in ast.walk(tree):
        text = (
            ast.get_docstring(node) if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) else ""
        )
        if text:
            docstrings[node.body[0].lineno] = (node.body[0].end_lineno, text)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text or node in tree.body):
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
    return f'<!doctype html>\n<html lang="en">\n{head}\n{nav(here)}\n<main>\n{body}\n</main>\n</html>\n'


def chapter(stem, known):
    """(title, contents, body) of a file's page; adds its names to those that are known."""
    source = (ROOT / f"{stem}.py").read_text("utf-8")
    tree = ast.parse(source)
    known[stem] = names_of(tree, stem, known)
    dotted = {f"{each}.{name}": where for each in known for name, where in known[each].items()}
    names = dotted | known[stem]
    code = painted(source, names)
    opening, *rows = rows_of(source, tree)
    title, _, promise = opening.prose.strip().partition("\n")

    contents = []
    body = []
    for row in [opening, *rows]:
        left = "" if row is opening else prose(row.prose, names)
        if row.title:
            name = row.title.strip("`")
            heading = html.escape(name) if name == row.title else f"<code>{name}</code>"
            anchor = re.sub(r"\W+", "-", name)
            left = f'<h{row.level} id="{anchor}">{heading}</h{row.level}>{left}'
            # what is inside a function may be there in many of them, so it has no address
            if row.level == 4:
                left = left.replace(f' id="{anchor}"', "", 1)
            else:
                level = "part" if row.level == 3 and name == row.title else f"level{row.level}"
                contents.append(f'<li class="{level}"><a href="{stem}.html#{anchor}">{heading}</a></li>')
        right = ""
        for n in row.lines:
            indent = len(code[n - 1]) - len(code[n - 1].lstrip())
            right += f'<code id="L{n}" data-n="{n}" style="--i:{indent}">{code[n - 1]}</code>'
        # sections, and pictures that the column is too narrow for, get the whole width
        wide = row.level == 2 or any(len(x) > 62 and x.startswith("  ") for x in row.prose.split("\n"))
        kind = "row wide" if wide and row is not opening else "row"
        if row.title == "Arguments":
            kind = "row wide table"
        body.append(
            f'<section class="{kind}">\n<div class="prose">{left}</div>\n<div class="code">{right}</div>\n</section>'
        )

    # beside what is imported: what the chapter holds
    listed = '<h2>In this chapter</h2><ul class="contents">\n' + "\n".join(contents) + "</ul>"
    body[0] = body[0].replace('<div class="prose">', f'<div class="prose">{listed}', 1)
    opened = f"<header><h1>{html.escape(title)}</h1>{prose(promise, names)}</header>"
    return title, contents, "\n".join([opened, *body])


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
        print(
            f"{trace}: no such file, so the page of traces is empty; eval.py and engine.py --html write one"
        )
        trace = ROOT / "assets" / "trace.html"
    style = "<style>.pages { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin-bottom: 1rem } .pages a { color: var(--dim) }</style>"
    text = trace.read_text("utf-8").replace("<header>", f"{style}\n{nav('trace.html')}\n<header>", 1)
    (out / "trace.html").write_text(text, "utf-8")

    # Imports point one way, so that each file finds the names it uses among those before it.
    book, _, about = (ROOT / "README.md").read_text("utf-8").removeprefix("# ").partition("\n")
    about = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", about.strip().split("\n\n")[0])
    index = f"<h1>{html.escape(book)}</h1>{prose(about, {})}"
    index += '<h2><a href="trace.html">Traces: rollouts, replayed step by step</a></h2>'
    known = {}
    for stem in STEMS:
        title, contents, body = chapter(stem, known)
        (out / f"{stem}.html").write_text(page(title, f"{stem}.html", body), "utf-8")
        sections = "\n".join(line for line in contents if 'class="level2"' in line)
        index += (
            f'<h2><a href="{stem}.html">{html.escape(title)}</a></h2><ul class="contents">{sections}</ul>'
        )
    (out / "index.html").write_text(page(book, "index.html", f'<div class="book">{index}</div>'), "utf-8")
    print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
    main()

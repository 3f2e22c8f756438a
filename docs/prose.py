r"""What comments and docstrings say, as HTML: paragraphs, lists, examples, pictures, equations.

Equations as they stand in comments, `A_i = (R_i - mean_G) / (std_G + eps)`, become MathML, which
browsers typeset by themselves.  It is no general parser: it reads what the six files write.
"""

import html
import re
import textwrap

STEMS = ("stage0_model", "engine", "stage1_zero", "stage2_beta", "stage3_papo", "eval")  # in reading order

# ==================================================================================================
# 1. Equations
# ==================================================================================================

# `A_i = ..` up to a comma outside of brackets, a colon, or the end of the sentence or the line
ARGUMENTS = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
EQUATION = re.compile(rf"(?<!\S)(?:L|R|[ARr]_\w+) = (?:{ARGUMENTS}|[^,:.(\n]|\.(?=\d))+[,:.]?")

# what it is made of: numbers, what is applied, words, names with an index, signs
THING = re.compile(
    r"[+-]?\d[\d.]*\b|[A-Za-z]+(?:_\w+)?\(|[a-z]{2,}(?: [a-z]{2,})*(?![\w(])|[A-Za-z]+(?:_<?\w+)?|\S"
)
SIGNS = {"sum": "∑", "pi": "π", "eps": "ε", "log": "log\u2009", "⟨": "|", "⟩": "|"}
INDEXED = ("sum", "mean", "std", "pi")  # and single letters; any other name is one word
CLOSING = {"(": ")", "[": "]", "⟨": "⟩"}


def typeset(equation):
    """'r_it = pi(y_it) / pi_old(y_it):' -> a <math> with a fraction in it."""
    # the bars of |y_i| are brackets, the bar of p(x | y) is not
    things = THING.findall(re.sub(r"\|(\w+)\|", r"⟨\1⟩", equation))
    return f'<math displaystyle="true">{row(things)}</math>'


def row(things, closing=""):
    """MathML of things up to a closing bracket; what is read is taken off the list."""
    bracketed = re.compile('^<mo form="prefix">[(]</mo>(.*)<mo form="postfix">[)]</mo>$')
    made = []
    while things and things[0] != closing:
        if things[0] == "/" and things[1][0] not in "+-":
            # a fraction of the things before and after the bar, which need no brackets there
            del things[0]
            parts = [bracketed.sub(r"\1", part) for part in (made.pop(), one(things))]
            made.append("<mfrac><mrow>{}</mrow><mrow>{}</mrow></mfrac>".format(*parts))
        else:
            made.append(one(things))
    del things[:1]
    return f"<mrow>{''.join(made)}</mrow>"


def one(things):
    """MathML of the next thing, with its index and with what it is applied to."""
    thing = things.pop(0)
    if thing in CLOSING:
        inside = row(things, CLOSING[thing])
        if re.fullmatch("<mrow><mfrac>.*</mfrac></mrow>", inside) and inside.count("<mfrac>") == 1:
            return inside
        opened, closed = (SIGNS.get(sign, sign) for sign in (thing, CLOSING[thing]))
        return f'<mo form="prefix">{opened}</mo>{inside}<mo form="postfix">{closed}</mo>'

    # a name or a sign, a number, or words
    name, _, index = thing.rstrip("(").partition("_")
    if len(name) > 1 and name not in INDEXED:
        name = thing.rstrip("(")
        index = ""
    tag = "mn" if name[-1].isdigit() else "mi" if name.isidentifier() and name != "sum" else "mo"
    if re.fullmatch("[a-z]{2,}( [a-z]+)*", thing) and thing not in SIGNS:
        tag = "mtext"
        name = f"\u2002{name}\u2002"
    made = f"<{tag}>{html.escape(SIGNS.get(name, name)).replace('-', '−')}</{tag}>"

    # i and t are two indices, batch is a word; a sum has its index below
    if index:
        letters = [index] if len(index) > 2 else index
        below = "".join(f"<mi>{html.escape(letter)}</mi>" for letter in letters)
        how = "munder" if name == "sum" else "msub"
        made = f"<{how}>{made}<mrow>{below}</mrow></{how}>"

    # a function goes with its brackets, a sum with what it adds up
    if thing.endswith("("):
        things.insert(0, "(")
    return made + (one(things) if thing.endswith("(") or name == "sum" else "")


# ==================================================================================================
# 2. Paragraphs
# ==================================================================================================

# lines that begin a paragraph without a blank line before them
BEGINS = re.compile(r" {3,}(?=Out:|A_i =)|(?<=[.:])\n(?=(?:In|Out|Equation) ?:|Differences? from|[a-z_]+: )")


def kind_of(line, before, paragraph):
    """The class of the HTML that holds a line of prose; before: the class of the line above."""
    if re.match(r"(\d+\.|\(\d+\)|-) ", line) or (before == "item" and line.startswith(" ")):
        return "item"
    # what is indented or in columns (two blanks that end no sentence) keeps its shape
    if line.startswith("  ") or re.search(r"[^\s.,:;?!)]  +\S", line):
        return "picture"
    # `[1, 2] -> 3` without a full stop is an example, with one a sentence that tells shapes
    return "example" if re.search(r" ->\s", paragraph) and not paragraph.endswith(".") else ""


def prose(text, names):
    """A comment's text as HTML; names: {name: address} of what `in backticks` leads to."""
    pieces = []  # (class, lines)
    for paragraph in re.split(r"\n\s*\n", BEGINS.sub("\n\n", text.strip("\n"))):
        kind = None
        for line in paragraph.split("\n"):
            before, kind = kind, kind_of(line, kind, paragraph)
            if kind != before or (kind == "item" and not line.startswith(" ")):
                pieces.append((kind, []))
            pieces[-1][1].append(line)

    out = []
    for kind, lines in pieces:
        whole = "\n".join(lines)
        if kind in ("picture", "example"):
            whole = textwrap.dedent(whole)
            out.append(f'<pre class="{kind}" tabindex="0">{html.escape(whole, quote=False)}</pre>')
            continue
        # an equation stands in a line of its own, between what is said before and after it
        rest = 0
        for match in EQUATION.finditer(whole):
            if re.search("[-+/*(]", match[0]):
                out.append(words(kind, whole[rest : match.start()], names))
                out.append(f'<div class="equation" tabindex="0">{typeset(match[0])}</div>')
                rest = match.end()
        out.append(words(kind, whole[rest:], names))
    # pictures with a blank line between them are one picture
    return "".join(out).replace('</pre><pre class="picture" tabindex="0">', "\n\n")


def words(kind, text, names):
    """A paragraph, with `code` that leads to its definition, *emphasis*, files and papers."""
    parts = re.split(r"`([^`]+)`", html.escape(text.strip(), quote=False))
    for i, part in enumerate(parts):
        if i % 2:
            address = names.get(part.removesuffix("()"))
            parts[i] = f'<code><a href="{address}">{part}</a></code>' if address else f"<code>{part}</code>"
            continue
        part = re.sub(r"(?<![\w*])\*([A-Za-z][\w ]*)\*(?!\w)", r"<em>\1</em>", part)
        part = re.sub(r"arXiv (\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', part)
        part = re.sub(r"--[a-z]+(?:-[a-z]+)*", r'<code class="flag">\g<0></code>', part)
        parts[i] = re.sub(rf"\b({'|'.join(STEMS)})\.py\b", r'<a href="\1.html">\1.py</a>', part)
    return f'<p class="{kind}">{"".join(parts)}</p>' if any(parts) else ""

r"""Pictures of README and docs, drawn as SVG from what stages and judge have written.

    python docs/figures.py all out                 # make figures: every picture into assets/figures
    python docs/figures.py hero out --init out/stage3
    python docs/figures.py summary out out/seed1 out/seed2

pipeline: the four stages, from eval.json, log.jsonl, args.json and config.json of a run.
accuracy: accuracy against critical path of all checkpoints (and of the twin SR), from eval.json.
curves  : what the stages and their other seeds have logged, from log.jsonl.
mask    : who sees whom in a short response, by engine.visible().
ladder  : reward of stage 1 for one text after another, by stage1_zero.format_score().
hero, kv: the built-in question, decoded with --init: branches racing the sequential decoder, and
          the KV row as it fills.
summary : no picture: judgements of several seeds (eval.json) as one table, mean and range.

Colours follow the reader's dark or light mode, nothing is loaded, and nothing is scripted.
"""

import argparse
import difflib
import html
import math
import re
import sys
import textwrap
from itertools import groupby
from pathlib import Path

import numpy as np
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the six files lie one folder up

from engine import BUILT_IN, TAGS, Engine, layout, trace, visible  # noqa: E402
from eval import table  # noqa: E402
from stage0_model import ANY_TAG, FORMAT_PROMPT, UserError, load, make_problems, prompt_ids  # noqa: E402
from stage0_model import finished, listed, read_jsonl, read_object, response_text, run_main, write_text  # noqa: E402
from stage1_zero import VIOLATIONS, format_score, parse_response  # noqa: E402

# ==================================================================================================
# 1. Drawing
# ==================================================================================================

# Each in light mode, and in dark.
COLOURS = {
    "bg": ("#ffffff", "#14181d"),
    "fg": ("#1b2026", "#e6eaef"),
    "dim": ("#616b76", "#97a2ae"),
    "line": ("#d3dae1", "#38414b"),
    "soft": ("#f3f5f8", "#1d232a"),
    "good": ("#17713a", "#62d08a"),
    "bad": ("#b3122a", "#ff8f98"),
    # c0 is the trunk's, c1 to c8 are the branches'
    "c0": ("#5a6b80", "#94a3b5"),
    "c1": ("#1f6fd6", "#6cb0ff"),
    "c2": ("#c2570c", "#ffa45c"),
    "c3": ("#1c8a4d", "#5fd08f"),
    "c4": ("#b0288f", "#f083d2"),
    "c5": ("#0b7f8c", "#4fcbd8"),
    "c6": ("#7048d6", "#b195ff"),
    "c7": ("#8a7400", "#d8c250"),
    "c8": ("#c8323a", "#ff8a8a"),
}


def style_sheet():
    """Classes of all pictures: `fg` paints in that colour, `on-c1` puts a pale c1 behind."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in COLOURS.items()) for i in (0, 1))
    rules = "".join(f".{name}{{fill:var(--{name})}}" for name in COLOURS)
    rules += "".join(f".on-{name}{{fill:var(--{name});fill-opacity:.16}}" for name in COLOURS)
    rules += "".join(f".{name}-line{{stroke:var(--{name});fill:none}}" for name in COLOURS)

    # fonts of the reader's system: nothing may be loaded
    return (
        f"svg{{{light}font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{dark}}}}}"
        "text{white-space:pre}.mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"
        f"'DejaVu Sans Mono',monospace}}.bold{{font-weight:600}}{rules}"
        ".halo{paint-order:stroke;stroke:var(--bg);stroke-width:5px;stroke-linejoin:round}"
    )


def px(x):
    """A length without needless digits: 3.0 -> '3', 2.345 -> '2.3'."""
    return f"{x:.1f}".removesuffix(".0")


class Picture:
    """An SVG, drawn on a card of its own: a page may be dark where the reader's system is light."""

    def __init__(self, width, height, title, style=""):
        self.width = width
        self.height = height
        self.title = title
        self.style = style
        self.body = []

    def rect(self, x, y, width, height, names, round=0, more=""):
        corner = f' rx="{round}"' if round else ""
        box = f'x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}"'
        self.body.append(f'<rect {box}{corner} class="{names}"{more}/>')

    def line(self, points, names, width=1.5, more=""):
        """A line through points [(x, y), ..]."""
        path = "L".join(f"{px(x)} {px(y)}" for x, y in points)
        self.body.append(f'<path d="M{path}" class="{names}" stroke-width="{width}"{more}/>')

    def circle(self, x, y, radius, names, more=""):
        self.body.append(f'<circle cx="{px(x)}" cy="{px(y)}" r="{px(radius)}" class="{names}"{more}/>')

    def text(self, x, y, words, names="fg", size=14, anchor="start", more=""):
        """One line of text, whose baseline is at y."""
        side = "" if anchor == "start" else f' text-anchor="{anchor}"'
        place = f'x="{px(x)}" y="{px(y)}" font-size="{px(size)}"'
        self.body.append(f'<text {place}{side} class="{names}"{more}>{html.escape(words)}</text>')

    def code(self, x, y, words, names="fg", size=13):
        """A line of code, as wide on every machine whatever its font.  Returns its width."""
        width = len(words) * size * 0.602
        fit = f' textLength="{px(width)}" lengthAdjust="spacingAndGlyphs"'
        self.text(x, y, words, f"{names} mono", size, more=fit)
        return width

    def paragraph(self, x, y, words, columns, names="fg", size=14, leading=1.4):
        """Text wrapped to so many characters.  Returns the y of the line after it."""
        for line in textwrap.wrap(words, columns):
            self.text(x, y, line, names, size)
            y += size * leading
        return y

    def write(self, file):
        """Write it, or write over an older picture.  Raises UserError where something else is."""
        file = Path(file)
        if file.is_file() and not file.read_bytes().startswith(b"<svg"):
            raise UserError(f"{file} is there and no picture; give --out another folder")

        # the card lies behind all that was drawn
        size = f'width="{px(self.width)}" height="{px(self.height)}"'
        box = f'viewBox="0 0 {px(self.width)} {px(self.height)}"'
        card = f'x=".5" y=".5" width="{px(self.width - 1)}" height="{px(self.height - 1)}" rx="10"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} role="img">'
        lines = [
            f"{head}<title>{html.escape(self.title)}</title>",
            f"<style>{style_sheet()}{self.style}</style>",
            f'<rect {card} class="bg" stroke="#8884"/>',
            *self.body,
            "</svg>",
        ]
        write_text(file, "\n".join(lines) + "\n")
        print(f"wrote {file} ({file.stat().st_size / 1000:.0f} kB)")


# ==================================================================================================
# 2. Who sees whom
# ==================================================================================================

# A short response, token by token; a question of one token ahead of it.
EXAMPLE = (
    *("question", "<guideline>", "<plan>", "1:A", "</plan>", "<plan>", "2:B", "</plan>", "</guideline>"),
    *("<step>", "1:", "7+2=9", "</step>", "<step>", "2:", "5*3", "=15", "</step>"),
    *("<takeaway>", "a9 b15", "</takeaway>", "\\boxed{15}"),
)


def draw_mask():
    """The attention mask of EXAMPLE as a grid: a row is what one token sees."""
    ids = [TAGS.index(token) if token in TAGS else len(TAGS) for token in EXAMPLE]
    places = layout(ids, {tag: i for i, tag in enumerate(TAGS)})
    sees = visible(places)  # (T, T)
    T = len(ids)

    # lengths in pixels, as everywhere below
    cell = 20
    left = 176
    top = 132
    picture = Picture(left + T * cell + 318, top + T * cell + 34, "Attention mask of a parallel response")
    picture.text(24, 34, "Who sees whom", "fg bold", 18)
    picture.paragraph(24, 56, "A row is what its token sees. Beside each token, its position.", 22, "dim", 13)

    # Tokens stand at the rows and, turned, at the columns; beside each its position.
    for i, token in enumerate(EXAMPLE):
        colour = f"c{places.branch[i]}"
        y = top + i * cell
        x = left + i * cell
        picture.text(left - 38, y + 14, token, f"{colour} mono", 12, "end")
        picture.rect(left - 30, y + 2, 24, cell - 4, f"on-{colour}", 4)
        picture.text(left - 18, y + 14, str(places.position[i]), f"{colour} bold", 11, "middle")
        turned = f' transform="rotate(-55 {px(x + 12)} {px(top - 30)})"'
        picture.text(x + 12, top - 30, token, f"{colour} mono", 11, more=turned)
        picture.rect(x + 1, top - 24, cell - 2, 18, f"on-{colour}", 4)
        picture.text(x + cell / 2, top - 11, str(places.position[i]), f"{colour} bold", 10.5, "middle")

    # The token itself, what it sees, and siblings that came earlier and are not seen.
    def square(x, y, kind, branch):
        if kind == "blind":
            picture.rect(x + 1.5, y + 1.5, cell - 3, cell - 3, "bad-line", 3, ' stroke-dasharray="2 2"')
            picture.line([(x + 6, y + cell - 6), (x + cell - 6, y + 6)], "bad-line", 1.2)
        else:
            strength = "" if kind == "self" else ' fill-opacity=".5"'
            picture.rect(x + 1, y + 1, cell - 2, cell - 2, f"c{branch}", 3, strength)

    # the grid, and a key to it
    for q in range(T):
        for k in range(q + 1):
            kind = "self" if q == k else "seen" if sees[q, k] else "blind"
            square(left + k * cell, top + q * cell, kind, places.branch[k])
    key = (("self", "the token itself"), ("seen", "sees"), ("blind", "is blind to"))
    for row, (kind, words) in enumerate(key):
        x = left + T * cell + 12
        y = top - 30 + 24 * row
        square(x, y, kind, 1)
        picture.text(x + 28, y + 15, words, "dim", 12.5)

    # What is to be noticed, beside the rows where it is.
    first, second = (places.branch.tolist().index(branch) for branch in (1, 2))
    join = EXAMPLE.index("<takeaway>")
    start, after = places.position[[first, join]]
    notes = (
        (4, 0, "The trunk"),
        (first, 1, f"Branch 1, positions {start} and on"),
        (second, 2, f"Branch 2, positions {start} and on again"),
        (join, 0, f"The takeaway, position {after}"),
    )
    meanings = (
        "is causal, like any text: a token sees all that came before it.",
        "sees the trunk and itself. Its first position is the one after </guideline>.",
        "as if branch 1 were not there: while one is written, the other does not exist yet.",
        "sees every branch, and goes on one position after the longest.",
    )

    # a bar in the branch's colour marks each note
    x = left + T * cell + 22
    for (row, branch, heading), words in zip(notes, meanings):
        y = top + row * cell
        picture.text(x, y + 13, heading, f"c{branch} bold", 13.5)
        end = picture.paragraph(x, y + 31, words, 38, "fg", 12.5)
        picture.rect(x - 10, y, 3, end - y - 12, f"c{branch}", 1)
    return picture


# ==================================================================================================
# 3. The reward of stage 1
# ==================================================================================================

PERFECT = (
    "<guideline><plan>1:A</plan><plan>2:B</plan></guideline><step>1:7+2=9</step><step>2:5*3=15</step>"
    "<takeaway>9 15</takeaway>\\boxed{15}"
)

# What is done to the perfect text, (from, to), to make each violation the worst of the example's.
SPOILED = {
    "no block": (PERFECT, "7+2=9 5*3=15 \\boxed{15}"),
    "overlapping tags": ("</step><step>2:5*3=15</step>", "<step>2:5*3=15</step></step>"),
    "block out of order": ("<takeaway>9 15</takeaway>", ""),
    "counts differ": ("<plan>2:B</plan>", ""),
    "numbering": ("<step>2:", "<step>1:"),
    "no answer": ("\\boxed{15}", "15"),
    "text between tags": ("</guideline><step>", "</guideline>So <step>"),
    "nearly empty": ("1:7+2=9", "1:9"),
}


def rungs():
    """Texts of the ladder from the best to the worst: (R, what is wrong, text)."""
    made = [(1.0, "right", PERFECT), (-1.0, "wrong answer", PERFECT.replace("{15}", "{9}"))]
    for old, new in SPOILED.values():
        text = PERFECT.replace(old, new)
        made.append((format_score(text), parse_response(text).violations[0], text))
    return sorted(made, key=lambda rung: -rung[0])


def draw_ladder():
    """R of a text after another: form first, then the answer."""
    ladder = rungs()
    step = 34
    top = 92
    picture = Picture(1000, top + len(ladder) * step + 22, "Reward of stage 1 for one text after another")
    picture.text(24, 34, "What stage 1 pays for", "fg bold", 18)
    words = "R = F if F < 0, else +1 for a right answer and \u22121 for a wrong one."
    words += f" Each of {len(VIOLATIONS)} violations is worse than being wrong."
    picture.text(24, 56, words, "dim", 13)
    picture.text(24, top - 10, "R", "dim bold", 12)
    picture.text(256, top - 10, "text; in red, what is other or missing", "dim", 12)

    # A rail with a rung for every text, as green or red as its reward.
    rail = [(60, top + 6), (60, top + len(ladder) * step - 12)]
    picture.line(rail, "line-line", 4, ' stroke-linecap="round"')
    pieces = re.compile(f"({ANY_TAG.pattern})|(.)")
    perfect = [match[0] for match in pieces.finditer(PERFECT)]
    for i, (reward, name, text) in enumerate(ladder):
        y = top + i * step + 18
        colour = "good" if reward > 0 else "bad"
        picture.rect(22, y - 15, 76, 22, "bg", 11)
        picture.rect(22, y - 15, 76, 22, f"on-{colour}", 11)
        picture.text(60, y + 1, f"{reward:+.1f}".replace("-", "\u2212"), f"{colour} bold", 14, "middle")
        picture.text(112, y + 1, name, "fg bold", 13)

        # Tags small, so that a text fits; what is not in the perfect text red, where some of it is
        # missing a mark.
        x = 256
        own = [match[0] for match in pieces.finditer(text)]
        for kind, a, b, c, d in difflib.SequenceMatcher(None, perfect, own, autojunk=False).get_opcodes():
            if kind == "delete":
                picture.line([(x + 1, y - 12), (x + 1, y + 6)], "bad-line", 2.5)
                x += 3
            for tag, run in groupby(own[c:d], key=lambda piece: len(piece) > 1):
                names = "bad bold" if kind != "equal" else "dim" if tag else "fg"
                x += picture.code(x, y, "".join(run), names, 7.8 if tag else 11.5)
    return picture


# ==================================================================================================
# 4. One real rollout
# ==================================================================================================

NUMBER_WORDS = "no one two three four five six seven eight nine ten".split()
OP_WORDS = {"+": "add {}", "-": "take away {}", "*": "times {}"}


def chains_in_words(parts):
    """What chains ask, for someone who has not seen their notation."""
    labels = parts["labels"]
    start, ops = parts["chains"][0]
    worked = ", ".join(OP_WORDS[op].format(operand) for op, operand in ops)
    many = NUMBER_WORDS[len(labels)]
    ends = f"What is the {parts['goal']} of the {many} results?"
    return (
        f"{many.capitalize()} numbers, {listed(labels)}, each go through {len(ops)} operations, and only "
        f"the last two digits count. {labels[0]} starts at {start}: {worked}. The others likewise. {ends}"
    )


def sums_in_words(parts):
    """What sums ask, for someone who has not seen their notation."""
    start, ops = parts["chains"][0]
    worked = ", ".join(OP_WORDS[op].format(operand) for op, operand in ops)
    many = NUMBER_WORDS[len(parts["labels"])]
    return (
        f"{many.capitalize()} amounts, {listed(parts['labels'])}, are worked out from left to right: "
        f"{parts['labels'][0]} is {start}, {worked}. The others likewise. What are the last two digits of "
        "their total?"
    )


def countdown_in_words(parts):
    """What countdown asks, for someone who has not seen its notation."""
    numbers = listed([str(number) for number in parts["numbers"]])
    how = "by adding, taking away and multiplying, each used at most once"
    return f"Make {parts['target']} out of {numbers} {how}."


IN_WORDS = {"chains": chains_in_words, "sums": sums_in_words, "countdown": countdown_in_words}


def built_in(init):
    """The problem that engine.py decodes without a question, and the trace of its greedy rollout.

    Raises UserError when the checkpoint's response never forks, or does not end.
    """
    model, tokenizer = load(init)
    [problem] = make_problems(*BUILT_IN)
    prompt = prompt_ids(tokenizer, problem.question, FORMAT_PROMPT)
    [[rollout]] = Engine(model, tokenizer).generate([prompt], temperature=0.0)
    if rollout.finish_reason != "stop" or not rollout.num_forks:
        ended = rollout.error or rollout.finish_reason
        raise UserError(
            f"{init}: the built-in question has no parallel answer ({ended}); give another --init"
        )
    right = problem.verify(response_text(tokenizer, rollout.ids))
    verdict = "right" if right else f"wrong, {problem.answer} is right"
    return problem, trace(tokenizer, rollout, prompt, problem.question, init, verdict)


OPENING = {tag for tag in TAGS if not tag.startswith("</")}


def broken_lines(data, width, size):
    """A trace's text as lines no wider than `width`.

    Every piece of the trunk, and every branch, begins a line.  Tags are smaller than words, and
    where there is a choice a line begins with one that opens.  Returns a list of lines, each
    (branch, [(x, width, text, size, token), ..]).
    """
    sizes = [size * (0.72 if re.fullmatch("<.+>", text) else 1.0) for text in data["text"]]
    widths = [0.602 * own * len(text) for own, text in zip(sizes, data["text"])]
    lines = []
    before = None
    x = 0
    for token, text in enumerate(data["text"]):
        # together with an opening tag stands all up to the next one
        end = token + 1
        while text in OPENING and end < len(widths) and data["text"][end] not in OPENING:
            end += 1
        together = sum(widths[token:end])

        # a line of its own, or one more of the same piece
        place = (data["block"][token], data["branch"][token])
        if place != before:
            x = 0
            lines.append((place[1], []))
        elif x + widths[token] > width or width - size > together > width - x:
            x = size
            lines.append((place[1], []))
        lines[-1][1].append((x, widths[token], text, sizes[token], token))
        x += widths[token]
        before = place
    return lines


class Race:
    """The clock of an animation: a moment of rest, steps of equal length, and time to look."""

    before = 0.7  # seconds
    after = 4.0

    def __init__(self, steps):
        self.steps = steps
        self.seconds = min(0.05 * steps, 14.0)
        self.whole = self.before + self.seconds + self.after

    def when(self, step):
        """Percent of the animation at which a step is done."""
        return 100 * (self.before + self.seconds * step / self.steps) / self.whole


def cover(name, x, y, height, branch, arrivals, race):
    """What hides a line of text until its tokens are there: (style, markup).

    arrivals: {engine step: right edge of the text that is there by then}, in order.  The cover
    begins at that edge, with a cursor where the next token will stand, and is gone at the end.
    """
    frames = "0%{opacity:1;transform:translate(-8px);color:transparent}"
    for i, (step, edge) in enumerate(arrivals.items()):
        colour = "" if i else f";color:var(--c{branch})"
        frames += f"{race.when(step):.2f}%{{transform:translate({px(edge)}px){colour}}}"
    frames += f"{race.when(max(arrivals) + 0.9):.2f}%,to{{opacity:0}}"

    # as wide as a panel, which clips it
    hidden = f'<path d="M{px(x)} {px(y - 1)}h470v{height + 2}h-470z" class="soft"/>'
    cursor = f'<path d="M{px(x)} {px(y + 1)}h3v{height - 2}h-3z" fill="currentColor"/>'
    style = f"#{name}{{animation-name:{name}}}@keyframes {name}{{{frames}}}"
    return style, f'<g class="k" id="{name}">{hidden}{cursor}</g>'


def draw_hero(problem, data):
    """The rollout racing a sequential decoder, which writes the same tokens, on one clock.

    Every line of text lies under a cover that moves to the right when a token arrives: one set of
    key frames a line.  Without animation nothing is covered.
    """
    tokens = len(data["text"])
    race = Race(tokens)
    style = [f"g.k{{opacity:0;animation:{race.whole:.2f}s step-end infinite}}"]
    style.append(f".end{{animation:{race.whole:.2f}s step-end infinite}}")

    # The question, in words and as the model reads it.
    picture = Picture(1000, 0, f"One question decoded in parallel and sequentially: {problem.question}")
    top = picture.paragraph(24, 36, IN_WORDS[problem.kind](problem.parts), 112, "fg", 15.5) + 2
    for line in textwrap.wrap(problem.question, 124):
        picture.code(24, top, line, "dim", 12.5)
        top += 18
    top += 6

    # Two panels of the same text; what differs is when each token is there.
    size = 11.5
    leading = 20
    lines = broken_lines(data, 452, size)
    height = 40 + leading * len(lines) + 34
    panels = (
        ("a", 24, "Native parallel", "every branch gains a token at every step", data["step"]),
        ("b", 508, "One after another", "the same tokens, one at a step", range(1, tokens + 1)),
    )
    for panel, left, heading, words, times in panels:
        picture.rect(left, top, 468, height, "soft", 8)
        picture.text(left + 12, top + 24, heading, "fg bold", 15)
        picture.text(left + 456, top + 24, words, "dim", 12, "end")
        clip = f'x="{left + 8}" y="{px(top + 34)}" width="456" height="{px(height - 34)}"'
        picture.body.append(f'<clipPath id="{panel}"><rect {clip}/></clipPath>')
        picture.body.append(f'<g clip-path="url(#{panel})">')

        # line by line: a band in the branch's colour, the text, and the cover
        for number, (branch, pieces) in enumerate(lines):
            y = top + 40 + leading * number
            end = pieces[-1][0] + pieces[-1][1]
            picture.rect(left + 8, y, end + 8, leading - 3, f"on-c{branch}", 3)
            for x, _, text, own, token in pieces:
                names = "dim" if data["forced"][token] or own < size else "fg"
                picture.code(left + 12 + x, y + 12.8, text, names, own)
            arrivals = {times[token]: x + wide for x, wide, _, _, token in pieces}
            rule, hiding = cover(f"{panel}{number}", left + 12, y, leading - 3, branch, arrivals, race)
            style.append(rule)
            picture.body.append(hiding)
        picture.body.append("</g>")

        # What came of it, when it is there.
        style.append(f"@keyframes e{panel}{{0%{{opacity:0}}{race.when(max(times)):.2f}%,to{{opacity:1}}}}")
        good = "good" if data["verdict"] == "right" else "bad"
        answered = f"{data['verdict']} after {max(times)} steps"
        appears = f' style="animation-name:e{panel}"'
        picture.text(left + 456, top + height - 14, answered, f"{good} bold end", 14, "end", appears)

    # The clock: an axis of engine steps, each a token that has to be waited for.
    top += height + 22
    left = 148
    scale = 800 / tokens
    for step in ticks(0, tokens)[:-1]:
        x = left + step * scale
        picture.line([(x, top - 4), (x, top + 50)], "line-line", 1)
        picture.text(x, top + 64, f"{step:g}", "dim", 11, "middle")
    picture.text(left - 12, top + 64, "engine steps", "dim", 11, "end")

    # On it a bar for each of the two, which grows until its answer is there.
    for row, (panel, _, heading, _, times) in enumerate(panels):
        y = top + 26 * row
        last = max(times)
        picture.text(left - 12, y + 13, heading.lower(), "fg", 13, "end")
        picture.rect(left, y, 800, 18, "soft", 4, ' fill-opacity=".7"')
        grows = f"animation:{race.whole:.2f}s linear infinite r{panel};transform-origin:{left}px 0"
        picture.rect(left, y, last * scale, 18, "c1" if panel == "a" else "c0", 4, f' style="{grows}"')
        frames = f"{race.when(0):.2f}%{{transform:scaleX(0)}}{race.when(last):.2f}%,to{{transform:none}}"
        style.append(f"@keyframes r{panel}{{0%{{transform:scaleX(0)}}{frames}}}")

        # how many steps it took, beside the short bar and inside the long one
        x = left + last * scale
        appears = f' style="animation-name:e{panel}"'
        if panel == "a":
            words = f"{last} steps, {tokens / last:.1f} times fewer"
            picture.text(x + 8, y + 13.5, words, "c1 bold end", 13, "start", appears)
        else:
            picture.text(x - 8, y + 13.5, f"{last} steps", "bg bold end", 13, "end", appears)
    picture.height = top + 80

    # Whoever asked for less motion gets the end of it.
    style.append("@media(prefers-reduced-motion){*{animation:none!important}}")
    picture.style = "".join(style)
    return picture


def draw_kv(problem, data):
    """The row of KV memory at some moments, and the slots around the fork one by one."""
    # Order of arrival: by step, and in the order of the text within one.
    order = sorted(range(len(data["text"])), key=lambda token: data["step"][token])
    step, branch, text = ([data[key][token] for token in order] for key in ("step", "branch", "text"))
    slots = len(order)
    last = max(step)

    # The first block's fork and join, and what the engine wrote at the fork.
    fork = text.index("</guideline>")
    forked = step[fork]
    joined = step[text.index("<takeaway>")]
    k = max(b for b, s in zip(branch, step) if s <= joined)
    opened = sum(b > 0 and s == forked for b, s in zip(branch, step))
    moments = (
        (0, "prompt", f"{data['prompt']} slots are prefilled; the response has none yet"),
        (forked - 1, "trunk", "a token a step, a slot a token"),
        (forked, "fork", f"{opened} forced tokens open {k} branches in the same row: 0 bytes are copied"),
        ((forked + joined) // 2, "branches", f"{k} tokens a step, one of each branch, side by side"),
        (joined, "join", "<takeaway> is forced, and simply sees every slot: nothing is computed anew"),
        (last, "end", f"{slots} tokens in {last} steps; the turn ends, and the whole row is free again"),
    )
    picture = Picture(1000, 0, "The row of KV memory in order of arrival")
    picture.text(24, 34, "One row of KV memory, in order of arrival", "fg bold", 18)
    words = f"{problem.question[:96]}{'...' * (len(problem.question) > 96)}"
    picture.code(24, 56, words, "dim", 12)

    # The film: as many slots of the row as are filled at each moment, in the colours of branches.
    left = 164
    wide = (976 - left) / slots
    y = 84
    for moment, name, words in moments:
        picture.text(24, y + 12, name, "fg bold", 13.5)
        picture.text(24, y + 28, f"step {moment}", "dim", 12)
        picture.rect(left - 36, y, 32, 20, "c0", 3, ' fill-opacity=".35"')
        picture.text(left - 20, y + 14, "prompt", "fg", 8.5, "middle")
        picture.rect(left, y, 976 - left, 20, "soft", 3)

        # a rectangle for each run of slots of one branch
        filled = [b for b, s in zip(branch, step) if s <= moment]
        slot = 0
        for b, run in groupby(filled):
            n = len(list(run))
            picture.rect(left + slot * wide, y, n * wide - 0.3 * (wide > 1.5), 20, f"c{b}")
            slot += n
        picture.text(left, y + 34, words, "dim", 12)
        y += 50

    # A closer look, from the end of the guideline on: whose each slot is, and where in its text.
    y += 20
    first = max(0, fork - 2)
    shown = range(first, min(slots, first + 24))
    cell = 35
    picture.text(24, y, "Around the fork, slot by slot", "fg bold", 15)
    for row, name in enumerate(("slot", "token", "branch", "position", "step")):
        picture.text(118, y + 28 + 22 * row, name, "dim", 12, "end")

    # a column is a slot; tags are short for what the line below says
    for column, i in enumerate(shown):
        token = order[i]
        x = 128 + cell * column
        picture.rect(x + 1, y + 35, cell - 2, 22, f"on-c{branch[i]}", 3)
        names = "dim" if data["forced"][token] else "fg bold"
        label = re.sub("<(/?.).*>", r"\1", text[i])
        picture.text(x + cell / 2, y + 50, label, f"{names} mono", 12, "middle")
        numbers = (data["prompt"] + i, None, branch[i], data["prompt"] + data["position"][token], step[i])
        for row, number in enumerate(numbers):
            if number is not None:
                picture.text(x + cell / 2, y + 28 + 22 * row, str(number), "fg", 11, "middle")
    words = "s: <step>, /g: </guideline>. Pale is forced: the engine writes it where it becomes necessary."
    picture.text(128, y + 142, words, "dim", 12)
    words = "What a step brings is stored, as keys and values, by the next one."
    picture.text(128, y + 160, words, "dim", 12)
    picture.height = y + 180
    return picture


# ==================================================================================================
# 5. What was measured
# ==================================================================================================

# Of each stage its number, its name, and its objective.
STAGES = {
    "stage0": ("0", "The base", "next-token loss on responses"),
    "stage1": ("1", "NPR-ZERO", "DAPO, R = F if F < 0 else \u00b11; F: format score"),
    "stage2": ("2", "NPR-BETA", "NLL of responses under the parallel layout"),
    "stage3": ("3", "NPR", "PAPO: on-policy, R = \u00b11, \u22122 if not valid; std over the batch"),
}


def read_run(folder):
    """{stage: (args, log)} of the stages in a run's folder.  Raises UserError when one is missing."""
    folder = Path(folder)
    stages = {}
    for stage in STAGES:
        log = folder / stage / "log.jsonl"
        if not log.is_file():
            raise UserError(f"{log}: no such file; expected the folder of a run, e.g. out after make")
        stages[stage] = read_object(log.parent / "args.json", {}), read_jsonl(log)
    return stages


def read_judgements(folder):
    """The results in a folder's eval.json.  Raises UserError when it has none."""
    file = Path(folder) / "eval.json"
    results = read_object(file, {}).get("checkpoints")
    if not results:
        raise UserError(f"{file}: no judgements; expected a folder that eval.py wrote to (--out)")
    return results


def seconds_of(log):
    """Seconds that a stage took: a run that was killed and went on counts from 0 again."""
    seconds = [row["seconds"] for row in log]
    return sum(now for now, after in zip(seconds, [*seconds[1:], -1.0]) if after < now)


def name_of(result):
    """What a judgement is of: 'stage0, plain', 'stage3'."""
    stage = Path(result["checkpoint"]).name
    return f"{stage}, {result['mode']}" if stage == "stage0" else stage


def data_of(stage, args, folder):
    """One line on what a stage learned from, by the arguments that it was run with."""
    if stage == "stage0":
        tokens = args["steps"] * args["batch_tokens"] / 1e6
        return f"{tokens:.1f}M tokens of worked problems with {args['slip']:.0%} slips"
    if stage == "stage2":
        reasons = read_object(folder / stage / "rejection.json", {})
        return f"{reasons.get('accepted', 0):,} of {sum(reasons.values()):,} own samples, right and valid"
    own = "own samples" if stage == "stage1" else "rollouts of the engine"
    return f"{args['steps']} steps of {args['prompts']} \u00d7 {args['group_size']} {own}"


def draw_pipeline(folder):
    """The four stages from left to right: model, data, objective, minutes, accuracy."""
    stages = read_run(folder)
    accuracy = {name_of(result): result for result in read_judgements(folder)}
    wide = 222
    picture = Picture(1000, 358, "The four stages")
    for i, (stage, (number, name, objective)) in enumerate(STAGES.items()):
        args, log = stages[stage]
        x = 20 + i * (wide + 24)
        colour = SHOWN_AS.get(stage, SHOWN_AS["stage0, format"])[1]
        picture.rect(x, 20, wide, 318, "soft", 10)
        picture.rect(x, 20, wide, 6, colour, 3)
        picture.text(x + 16, 54, f"Stage {number}", f"{colour} bold", 13)
        picture.text(x + 16, 76, name, "fg bold", 18)

        # an arrow from the stage whose weights it starts from
        if i:
            picture.line([(x - 22, 170), (x - 5, 170)], "dim-line", 2)
            picture.line([(x - 11, 164), (x - 4, 170), (x - 11, 176)], "dim-line", 2)

        # How it decodes: one line, or lines that part and meet again.
        end = x + wide - 16
        if i < 2:
            picture.line([(end - 54, 60), (end, 60)], f"{colour}-line", 2.5)
        else:
            for dy in (-9, -3, 3, 9):
                bend = [(end - 54, 60), (end - 44, 60), (end - 38, 60 + dy), (end - 16, 60 + dy)]
                picture.line([*bend, (end - 10, 60), (end, 60)], f"{colour}-line", 2)

        # What goes in; the number of weights is in the file's header.
        with safe_open(Path(folder) / stage / "model.safetensors", "np") as weights:
            size = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys()) / 1e6
        rows = (
            ("model", f"{size:.2f}M Qwen3, tags as {'tokens' if i > 1 else 'text'}"),
            ("data", data_of(stage, args, Path(folder))),
            ("objective", objective),
        )
        y = 104
        for heading, words in rows:
            picture.text(x + 16, y, heading, "dim", 11.5)
            picture.paragraph(x + 16, y + 16, words, 28, "fg", 12.5, 1.3)
            y += 40 if heading == "model" else 56

        # What it took, and what came of it: the base is judged in two ways.
        minutes = seconds_of(log) / 60
        spent = f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
        picture.line([(x + 16, 258), (x + wide - 16, 258)], "line-line", 1)
        result = accuracy.get(stage) or accuracy.get(f"{stage}, format")
        if result is None:
            raise UserError(f"{folder}/eval.json: {stage} is not judged in it")

        # large what counts, small what it is
        picture.text(x + 16, 296, f"{result['accuracy']:.1%}".replace("%", " %"), f"{colour} bold", 27)
        picture.text(x + wide - 16, 296, spent, "fg bold", 15, "end")
        picture.text(x + 16, 318, "right at T = 1, one run" if i else "right, format asked", "dim", 11.5)
        picture.text(x + wide - 16, 318, "to train", "dim", 11.5, "end")
    return picture


def ticks(low, high, most=6):
    """Round numbers that span low to high: (0, 310) -> [0, 100, 200, 300, 400]."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    unit *= next(n for n in (1, 2, 5, 10) if n * unit >= rough)
    first = math.floor(low / unit + 1e-9)
    return [n * unit for n in range(first, math.ceil(high / unit - 1e-9) + 1)]


def draw_axes(picture, box, across, up, named, percent=False):
    """Axes with names and a grid in a box (x, y, width, height), for values `across` and `up`.

    Returns the function from values to pixels.
    """
    x, y, width, height = box
    rows = ticks(min(up), max(up), 5)

    def at(a, b):
        return (
            x + width * (a - min(across)) / (max(across) - min(across)),
            y + height * (rows[-1] - b) / (rows[-1] - rows[0]),
        )

    # a line for each round value up, a number for each across
    for value in rows:
        picture.line([(x, at(0, value)[1]), (x + width, at(0, value)[1])], "line-line", 1)
        label = f"{value:.0%}" if percent else f"{value:g}"
        picture.text(x - 8, at(0, value)[1] + 4, label, "dim", 11, "end")
    for value in ticks(min(across), max(across), max(2, width // 70)):
        if value <= max(across):
            picture.text(at(value, 0)[0], y + height + 17, f"{value:g}", "dim", 11, "middle")

    # the axes' names
    picture.text(x + width / 2, y + height + 35, named[0], "dim", 12, "middle")
    turned = f' transform="rotate(-90 {px(x - 46)} {px(y + height / 2)})"'
    picture.text(x - 46, y + height / 2, named[1], "dim", 12, "middle", turned)
    return at


# Of each judgement its name in pictures, and its colour; a twin has its parallel sibling's.
SHOWN_AS = {
    "stage0, plain": ("base, asked plainly", "c0"),
    "stage0, format": ("base, asked for the format", "c0"),
    "stage1": ("stage 1, NPR-ZERO", "c2"),
    "stage2": ("stage 2, NPR-BETA", "c5"),
    "stage3": ("stage 3, NPR", "c1"),
    "stage2_seq": ("SR-BETA, the sequential twin", "c5"),
    "stage3_seq": ("SR, the sequential twin", "c1"),
}


def draw_accuracy(folder):
    """Accuracy against critical path of every checkpoint, with 95 % intervals."""
    results = {name_of(result): result for result in read_judgements(folder)}
    controls = Path(folder) / "evidence/controls"  # the twin was judged among them, on the same problems
    if (controls / "eval.json").is_file():
        results |= {name_of(r): r for r in read_judgements(controls) if name_of(r).endswith("_seq")}
    results = {name: results[name] for name in SHOWN_AS if name in results}

    picture = Picture(1000, 470, "Accuracy against critical path")
    picture.text(24, 34, "How often right, and how soon", "fg bold", 18)
    words = "Filled: decoded in parallel. Hollow: one token after another. Bars: 95 % intervals."
    words += " One run, one sample each at T = 1."
    picture.text(24, 56, words, "dim", 13)

    # Both ends of each interval, upper one first: the axis has to span them.
    bars = {}
    for name, r in results.items():
        ends = (r["accuracy"] + r["accuracy ci95"], r["accuracy"] - r["accuracy ci95"])
        bars[name] = [min(1.0, max(0.0, end)) for end in ends]
    spread = sum(bars.values(), [])
    up = [max(0, min(spread) - 0.05), min(1, max(spread) + 0.05)]
    across = [0, 1.12 * max(result["critical path"] for result in results.values())]
    named = ("critical path: tokens that have to wait for each other", "right answers")
    at = draw_axes(picture, (84, 84, 880, 322), across, up, named, percent=True)

    # The way that the stages take.
    way = [results[name] for name in ("stage0, format", "stage1", "stage2", "stage3") if name in results]
    points = [at(result["critical path"], result["accuracy"]) for result in way]
    picture.line(points, "dim-line", 1.5, ' stroke-dasharray="1 5" stroke-linecap="round"')

    # the points, and their intervals
    taken = []  # boxes (left, top, right, bottom) of points, and of the labels so far
    for name, result in results.items():
        colour = SHOWN_AS[name][1]
        x, y = at(result["critical path"], result["accuracy"])
        ends = [at(0, end)[1] for end in bars[name]]
        picture.line([(x, ends[0]), (x, ends[1])], f"{colour}-line", 2)
        picture.circle(x, y, 7, colour if result["mode"] == "parallel" else "bg")
        picture.circle(x, y, 7, f"{colour}-line", ' stroke-width="2.5"')
        taken.append((x - 9, min(ends[0], y - 9), x + 9, max(ends[1], y + 9)))

    # A label goes above its point, below, to the right or to the left: where nothing stands yet.
    for (left, top, right, bottom), (name, result) in zip(taken[:], results.items()):
        words, colour = SHOWN_AS[name]
        words = f"{words}, {result['accuracy']:.1%}".replace("%", " %")
        wide = 7.7 * len(words)
        x = min(max((left + right - wide) / 2, 88), 980 - wide)
        y = (top + bottom) / 2 - 8

        # above even if nothing is free
        places = [(x, top - 20), (x, bottom + 4), (right + 5, y), (left - 5 - wide, y)]
        boxes = [(x, y, x + wide, y + 17) for x, y in places]
        inside = [box for box in boxes if box[0] >= 88 and box[2] <= 980 and box[3] <= 406]
        free = [box for box in inside if not any(overlap(box, other) for other in taken)]
        box = (free or boxes)[0]
        taken.append(box)
        picture.text(box[0] + wide / 2, box[1] + 13, words, f"{colour} bold halo", 13, "middle")
    return picture


def overlap(box, other):
    """Do two boxes (left, top, right, bottom) have a point in common?"""
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


# Panels of the curves: stage, what is drawn {key: (name, colour)}, the axis' name, whether a share.
PANELS = (
    ("stage0", {"loss": ("loss", "c0")}, "nats a token", False),
    ("stage1", {"accuracy": ("accuracy", "c1"), "valid": ("valid", "c3")}, "share of samples", True),
    ("stage1", {"length": ("length", "c2")}, "tokens", False),
    ("stage2", {"loss": ("loss", "c0")}, "nats a token", False),
    ("stage3", {"accuracy": ("accuracy", "c1"), "valid": ("valid", "c3")}, "share of rollouts", True),
    ("stage3", {"length": ("length", "c2"), "critical_path": ("critical path", "c6")}, "tokens", False),
)


def draw_curves(folder):
    """What the stages logged step by step; the same curves of other seeds are thin.  Dotted: the
    base, if it has been judged.
    """
    stages = read_run(folder)
    judged = read_judgements(folder) if (Path(folder) / "eval.json").is_file() else []
    base = next((result for result in judged if name_of(result) == "stage0, format"), None)
    others = sorted(Path(folder).glob("seed*"))
    picture = Picture(1000, 672, "Learning curves of the stages")
    for i, (stage, curves, axis, share) in enumerate(PANELS):
        x = 76 + 328 * (i % 3)
        y = 78 + 306 * (i // 3)
        logs = [read_jsonl(other / stage / "log.jsonl") for other in others] + [stages[stage][1]]
        logs = [log for log in logs if log]

        # the run itself comes last, and so is drawn above the others
        rows = logs[-1]
        picture.text(x - 50, y - 44, f"Stage {STAGES[stage][0]}, {STAGES[stage][1]}", "fg bold", 14)

        # Values that all curves of the panel have to find room for.
        drawn = {key: [smooth(log, key) for log in logs] for key in curves if key in rows[0]}
        values = [0.0, 1.0 * share] + [value for lines in drawn.values() for line in lines for value in line]
        last = rows[-1]["step"]
        at = draw_axes(picture, (x, y, 230, 190), [0, last], values, ("step", axis), percent=share)

        # One colour a number, explained in a line of keys above the panel.
        left = x - 50
        for key, lines in drawn.items():
            name, colour = curves[key]
            for log, line in zip(logs, lines):
                points = [at(row["step"], value) for row, value in zip(log, line)]
                width, more = (2.2, "") if log is rows else (1, ' stroke-opacity=".45"')
                picture.line(points, f"{colour}-line", width, more)
            picture.line([(left, y - 24), (left + 18, y - 24)], f"{colour}-line", 3)
            picture.text(left + 24, y - 20, name, colour, 12)
            left += 40 + 6.6 * len(name)

        # The base, as the judge found it, dotted.
        if share and base:
            dotted = [at(0, base["accuracy"]), at(last, base["accuracy"])]
            for points in (dotted, [(left, y - 24), (left + 18, y - 24)]):
                picture.line(points, "c0-line", 2, ' stroke-dasharray="2 4"')
            picture.text(left + 24, y - 20, "accuracy of the base", "c0", 12)
    words = "Means of each step and its neighbours."
    if others:
        words += f" Thin: {len(others)} other seeds, from the same base."
    picture.text(26, 654, words, "dim", 12)
    return picture


def smooth(log, key):
    """A logged number as a running mean: over the five steps around each, or more of a long log."""
    values = np.array([row[key] for row in log])
    half = max(2, len(values) // 50)
    return [float(values[max(0, i - half) : i + half + 1].mean()) for i in range(len(values))]


# ==================================================================================================
# 6. The table over seeds, and the command line
# ==================================================================================================

PERCENT = ("accuracy", "valid", "parallel")
NUMBERS = ("plans", "tokens", "critical path", "tokens/path")


def mean_and_range(values, digits=1):
    """[50, 80] -> '65.0 (50.0-80.0)'."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def gain(results):
    """Mean and range of the gain over the row above, '+2.5 (-5.0 to +10.0)'; '-' where some folder
    does not hold that row.
    """
    if not all(result["minus row above"] for result in results):
        return "-"
    values = [100 * result["minus row above"][0] for result in results]
    return f"{np.mean(values):+.1f} ({min(values):+.1f} to {max(values):+.1f})"


def summary_row(stage, mode, results):
    """One row of the summary, of the results of all seeds for one stage in one mode."""
    row = {"checkpoint": stage, "mode": mode, "runs": str(len(results))}
    for key in PERCENT:
        row[f"{key} %"] = mean_and_range([100 * result[key] for result in results])
    for key in NUMBERS:
        digits = 2 if key == "tokens/path" else 1
        row[key] = mean_and_range([result[key] for result in results], digits)
    row["minus row above"] = gain(results)
    for kind in results[0]["kinds"]:
        row[f"{kind} acc %"] = mean_and_range([100 * r["kinds"][kind]["accuracy"] for r in results])
    return row


def summarise(folders):
    """The table over several judgements, one folder with an eval.json for each seed.

    Raises UserError when a folder has none.
    """
    results = {}
    for folder in folders:
        for result in read_judgements(folder):
            name = (Path(result["checkpoint"]).name, result["mode"])
            results.setdefault(name, []).append(result)
    return table([summary_row(stage, mode, each) for (stage, mode), each in results.items()])


# What needs no run comes first, then what a checkpoint is enough for.
PICTURES = {
    "mask": lambda args: draw_mask(),
    "ladder": lambda args: draw_ladder(),
    "hero": lambda args: draw_hero(*built_in(args.init)),
    "kv": lambda args: draw_kv(*built_in(args.init)),
    "pipeline": lambda args: draw_pipeline(args.folders[0]),
    "accuracy": lambda args: draw_accuracy(args.folders[0]),
    "curves": lambda args: draw_curves(args.folders[0]),
}


def parse_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # fmt: off
    p.add_argument("what", choices=(*PICTURES, "all", "summary"), help="which picture, or the table over seeds")
    p.add_argument("folders", nargs="*", default=["out"], help="of a run, with stage0 .. stage3 and eval.json; for a summary several")
    p.add_argument("--init", default=None, help="checkpoint that decodes; without one out/stage3, else the shipped one")
    p.add_argument("--out", default="assets/figures", help="folder to write pictures to")
    # fmt: on
    return p.parse_args(argv)


def main():
    args = parse_args()
    if args.what == "summary":
        print(summarise(args.folders))
        return
    names = PICTURES if args.what == "all" else [args.what]
    if not args.init and {"hero", "kv"} & set(names):
        [args.init] = finished("stage3")
    for name in names:
        PICTURES[name](args).write(Path(args.out) / f"{name}.svg")


if __name__ == "__main__":
    run_main(main)

"""The layout: three integers per token, against the design's worked example and a brute-force tree."""

import random
import re

import numpy as np
import pytest

import engine
from engine import TAGS, MalformedTrajectory, layout, visible

TAG = {tag: 100 + i for i, tag in enumerate(TAGS)}


def ids_of(text):
    """'<step>1 ab</step>' -> one id per tag or character (blanks dropped; '_' stands for a separator token)."""
    return [TAG[x] if x in TAG else ord(x) % 100 for x in re.findall(r"</?\w+?>|\S", text)]


def brute_force(text):
    """Walk the text as a tree and ask, for every pair, whether the paths allow the look.  Returns (triples, visible)."""
    pieces, triples, path = re.findall(r"</?\w+?>|\S", text), [], []
    trunk, block, branch, inside, ends, fork = 0, 0, 0, False, [], 0
    for i, piece in enumerate(pieces):
        rest = [p for p in pieces[i:] if p in TAG]
        if block and not inside and ends is not None and rest and rest[0] == "<step>":
            inside, branch, own = True, branch + 1, fork  # a separator or a <step>: the next span has begun
        if inside:
            triples.append((block, branch, own))
            own += 1
            if piece == "</step>":
                inside = False
                ends.append(own)
                trunk = max(ends)
        else:
            triples.append((0, 0, trunk))
            trunk += 1
            if piece == "</guideline>":
                block, branch, ends, fork = block + 1, 0, [], trunk
            elif piece == "<takeaway>":
                ends = None
        path.append(triples[-1][:2])
    n = len(path)
    see = np.array(
        [
            [k <= q and not (path[q][0] == path[k][0] != 0 and path[q][1] != path[k][1]) for k in range(n)]
            for q in range(n)
        ]
    )
    return triples, see


def triples(whole):
    return list(zip(whole.block.tolist(), whole.branch.tolist(), whole.position.tolist()))


def test_worked_example_of_the_design():
    text = "qq<guideline><plan>1</plan></guideline>"  # </guideline> lands at position 6
    text += "<step>1</step><step>2bc</step><takeaway>t</takeaway>"
    whole = layout(ids_of(text), TAG)
    assert whole.position.tolist() == [0, 1, 2, 3, 4, 5, 6] + [7, 8, 9] + [7, 8, 9, 10, 11] + [12, 13, 14]
    assert whole.block.tolist() == [0] * 7 + [1] * 8 + [0] * 3
    assert whole.branch.tolist() == [0] * 7 + [1] * 3 + [2] * 5 + [0] * 3
    see = visible(whole)
    assert see[10, :7].all() and not see[10, 7:10].any() and see[10, 10]  # step 2: prompt, guideline, itself
    assert see[15, :16].all()  # the takeaway tag sees everything


def test_picture_in_the_module_docstring_is_the_layout():
    rows = dict(re.findall(r"^    (block|branch|position) +(.*)$", engine.__doc__, re.M))
    drawn = {
        name: [int(x) for x in row.split("=")[0].replace("|", " ").split()] for name, row in rows.items()
    }
    text = "qq<guideline><plan>1</plan></guideline><step>1</step><step>2bc</step><takeaway>t"
    whole = layout(ids_of(text), TAG)
    for name in ("block", "branch", "position"):
        assert getattr(whole, name)[5:].tolist() == drawn[name]


def test_docstring_example_of_layout():
    t = TAG
    ids = [
        t["<guideline>"],
        t["</guideline>"],
        t["<step>"],
        1,
        t["</step>"],
        t["<step>"],
        2,
        3,
        t["</step>"],
        t["<takeaway>"],
    ]
    whole = layout(ids, TAG)
    assert whole.block.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert whole.branch.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 0]
    assert whole.position.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("separator", ["", "_"])
def test_random_trajectories_match_the_brute_force_tree(separator):
    rng = random.Random(0)
    for _ in range(200):
        text = "pq"
        for _ in range(rng.randint(0, 3)):
            k = rng.randint(1, 5)
            text += "<guideline>" + "<plan>1</plan>" * k + "</guideline>"
            text += "".join(f"{separator}<step>{'ab' * rng.randint(0, 3)}</step>" for _ in range(k))
            text += f"{separator}<takeaway>{'c' * rng.randint(0, 3)}</takeaway>"
        text += "e" * rng.randint(0, 3)
        whole = layout(ids_of(text), TAG)
        expected, see = brute_force(text)
        assert triples(whole) == expected, text
        assert (visible(whole) == see).all(), text


def test_step_2_cannot_see_step_1_even_through_the_separator():
    text = "<guideline><plan>1</plan><plan>2</plan></guideline><step>a</step>_<step>b</step>_<takeaway>"
    ids = ids_of(text)
    whole, see = layout(ids, TAG), visible(layout(ids, TAG))
    step1 = [i for i in range(len(ids)) if whole.branch[i] == 1]
    separator = max(step1) + 1
    assert whole.branch[separator] == 2 and whole.block[separator] == 1
    step2 = [i for i in range(len(ids)) if whole.branch[i] == 2]
    reach = see.astype(int)
    for _ in range(4):  # what step 2 sees, and what that sees, and so on through four layers
        reach = (reach @ see > 0).astype(int)
    assert not reach[np.ix_(step2, step1)].any()
    assert whole.block[-2] == 0  # the separator before the takeaway is trunk


def test_a_later_block_sees_all_steps_of_earlier_blocks():
    one = "<guideline><plan>1</plan><plan>2</plan></guideline><step>a</step><step>bb</step><takeaway>t</takeaway>"
    whole = layout(ids_of(one + one), TAG)
    first_block, second_block = np.flatnonzero(whole.block == 1), np.flatnonzero(whole.block == 2)
    assert visible(whole)[np.ix_(second_block, first_block)].all()


def test_every_prefix_of_a_canonical_response_has_a_layout_that_is_the_prefix_of_the_whole():
    one = "<guideline><plan>1</plan><plan>2</plan></guideline><step>a</step><step>bb</step><takeaway>t</takeaway>x"
    ids = ids_of("q" + one + one)
    whole = triples(layout(ids, TAG))
    for n in range(len(ids) + 1):
        assert triples(layout(ids[:n], TAG)) == whole[:n]


def test_an_unclosed_branch_ends_where_the_next_step_begins():
    whole = layout(ids_of("<guideline><plan>1</plan></guideline><step>abc<step>d"), TAG)
    assert whole.branch[5:].tolist() == [1, 1, 1, 1, 2, 2]
    assert whole.position[5:].tolist() == [5, 6, 7, 8, 5, 6]


@pytest.mark.parametrize(
    "text, index",
    [
        ("a<step>b", 1),
        ("<guideline></guideline>x</step>y", 3),
        ("<guideline><step>", None),  # the last token: cut off right there
        ("<guideline><step>x", 1),
        ("<guideline></guideline><step>a<takeaway>b", 4),
        (
            "<guideline></guideline><step>a<plan><step>b</step>",
            None,
        ),  # a violation ended branch 1, not branch 2
        ("<takeaway>a", 0),
    ],
)
def test_malformed_trajectories_are_refused_at_the_token(text, index):
    if index is None:
        layout(ids_of(text), TAG)
    else:
        with pytest.raises(MalformedTrajectory) as caught:
            layout(ids_of(text), TAG)
        assert caught.value.index == index


def test_tags_quoted_in_the_prompt_are_plain_trunk():
    ids = ids_of("say<step>x</step>:<guideline><plan>1</plan></guideline><step>a")
    whole = layout(ids, TAG, prompt_len=7)
    assert whole.block[:12].tolist() == [0] * 12 and whole.block[12:].tolist() == [1, 1]


def test_layout_of_32768_tokens_allocates_less_than_a_megabyte():
    import tracemalloc

    rng, ids = random.Random(0), []
    while len(ids) < 32_768:
        k = rng.randint(2, 6)
        ids += [TAG["<guideline>"]] + [TAG["<plan>"], 1, TAG["</plan>"]] * k + [TAG["</guideline>"]]
        for _ in range(k):
            ids += [TAG["<step>"]] + [5] * rng.randint(100, 900) + [TAG["</step>"]]
        ids += [TAG["<takeaway>"], 3, TAG["</takeaway>"]]
    ids = np.array(ids[:32_768])
    tracemalloc.start()
    layout(ids, TAG)
    assert tracemalloc.get_traced_memory()[1] <= 2**20
    tracemalloc.stop()

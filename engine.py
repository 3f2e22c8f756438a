"""The NPR Engine: a decoder that really forks and joins the KV cache, and the layout behind it.

In : a model (stage0_model.Qwen3), its tokenizer, prompts as token ids.
Out: Rollouts (ids, layout, log-probabilities).

Everything parallel here follows from three integers per token, a function of the ids alone:

    token     ..  g  | <step> 1: </step> | <step> 2: b  c </step> | <takeaway> ..   g = </guideline>
    block     0   0  |   1    1    1     |   1    1  1  1    1    |     0      0
    branch    0   0  |   1    1    1     |   2    2  2  2    2    |     0      0
    position  5   6  |   7    8    9     |   7    8  9 10   11    |    12     13
    step 2 sees:  .. g and itself, never step 1.      <takeaway> sees everything.

A token sees what came before it, except its siblings: tokens of the same block and another branch.
Why blind?  The branches are decoded at the same time: while step 2 is written, step 1 is not there
to be read, and training masks it likewise.  Every branch begins one position after </guideline>, as
if it were alone; the trunk goes on one after the longest branch.  The engine itself writes
`<step>`, its number and `:` at the head of a branch, and `<takeaway>` when the last branch has
closed: these tokens are *forced*, everything else is sampled.

    python engine.py                                        # decode a built-in question, draw it
    python engine.py --init out/stage3 "A:12+5*3 B:40-7*2 largest modulo 100?"  # or this one

Read sections 1 to 6 for every idea; section 7 is the same on a GPU, faster.
"""

import gc
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
import weakref
from argparse import ArgumentTypeError
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from stage0_model import Problem, UserError, load, make_problems, pick_device, prompt_ids, read_arguments
from stage0_model import read_object, read_prompt, response_text, run_main, finished
from stage0_model import attention, bucket, can_compile, pad_rows, uses_flex, visibility, visible_mask
from stage0_model import write_text
from stage0_model import device_name, natural_int, nonempty, not_negative, positive_float  # ranges
from stage0_model import positive_fraction, positive_int, seed_int

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with torch for CUDA, the only place where it is needed
    triton = None

# ==================================================================================================
# 1. The layout
# ==================================================================================================

TAGS = ("<guideline>", "</guideline>", "<plan>", "</plan>", "<step>", "</step>", "<takeaway>", "</takeaway>")

# The grammar of a trajectory: (state, tag) -> next state; a pair that is not listed is a violation.
# A state is named after where the reader stands: 'fork' is right after </guideline>, 'between'
# right after a </step>.
GRAMMAR = {
    ("text", "<guideline>"): "guideline",
    ("guideline", "<plan>"): "plan",
    ("plan", "</plan>"): "guideline",
    ("guideline", "</guideline>"): "fork",
    ("fork", "<step>"): "step",
    ("step", "</step>"): "between",
    ("step", "<step>"): "step",  # only where a response was cut off while its branches ran
    ("between", "<step>"): "step",
    ("between", "<takeaway>"): "takeaway",
    ("takeaway", "</takeaway>"): "text",
}


class MalformedTrajectory(ValueError):
    """The tags do not form blocks.  `index` is the token at which the grammar breaks."""

    def __init__(self, index, message):
        super().__init__(f"token {index}: {message}")
        self.index = index


@dataclass
class Layout:
    """Three integers of every token: arrays (T,), or tensors (B, T) for a padded batch."""

    block: np.ndarray  # 0 in the trunk, else the number of the parallel block
    branch: np.ndarray  # 0 in the trunk, else the number of the step in its block
    position: np.ndarray  # what RoPE rotates by
    lengths: torch.Tensor | None = None  # of a padded batch: tokens of every row, (B,)
    document: torch.Tensor | None = None  # of sequences packed into one row: whose each token is, (1, N)


def layout(ids, tag_ids, prompt_len=0):
    """The three integers of every token.  O(len(ids)) in time and memory.

    ids: T token ids; tag_ids: {tag: token id}; prompt_len: that many leading tokens are prompt,
    plain trunk even where they quote tags.  A response cut off anywhere has a layout: an unclosed
    branch ends where the next `<step>` begins.  Raises MalformedTrajectory at a tag that the
    grammar does not allow, unless the response (or, inside a block, the branch) was cut off right
    there.  It is the engine's layout for every rollout whose steps open without white space ahead
    of `<step>`; where a foreign model writes some, and its block was cut off, that white space is
    taken for the end of the branch before.

    With g = <guideline>, /g = </guideline>, s, /s, t for step and takeaway:
    ids      [g /g s  x /s s  y  z /s t]
    block    [0  0 1  1  1 1  1  1  1 0]
    branch   [0  0 1  1  1 2  2  2  2 0]
    position [0  1 2  3  4 2  3  4  5 6]
    """
    ids = np.asarray(ids, dtype=np.int64)
    T = len(ids)
    tag_of = {i: tag for tag, i in tag_ids.items()}
    tags = np.flatnonzero(np.isin(ids, list(tag_of)))
    block, branch, position = np.zeros((3, T), dtype=np.int32)

    state = "text"
    num_blocks = 0  # opened so far
    num_steps = 0  # of the last block
    done = 0  # tokens before this index are laid out
    trunk = 0  # position of the next trunk token: one after everything so far
    fork = 0  # position of every branch's first token in the last block

    def end_piece(end, step):
        """Tokens done .. end are one piece: of this step of the last block, or of the trunk (0)."""
        nonlocal done, trunk
        first = fork if step else trunk
        after = first + end - done
        block[done:end] = num_blocks if step else 0
        branch[done:end] = step
        position[done:end] = np.arange(first, after)
        trunk = max(trunk, after)
        done = end

    # A piece ends where a guideline closes, where a step closes, and where a step opens before the
    # previous one has closed.  Separators between steps belong to the step that follows.
    for i in tags[tags >= prompt_len].tolist():
        tag = tag_of[int(ids[i])]
        ends = i == T - 1 or (state == "step" and ids[i + 1] == tag_ids["<step>"])
        if (state, tag) not in GRAMMAR or (ends and (state, tag) == ("step", "<step>")):
            if ends:
                continue  # the violation that ended this response, or this branch
            raise MalformedTrajectory(i, f"{tag} is not allowed here (state: {state})")

        # A tag belongs to the piece that it ends, but an opening <step> to the one that it begins.
        if tag == "</guideline>":
            end_piece(i + 1, 0)
            num_blocks += 1
            num_steps = 0
            fork = trunk
        elif tag == "<step>":
            if state == "step":
                end_piece(i, num_steps)
            num_steps += 1
        elif tag == "</step>":
            end_piece(i + 1, num_steps)
        state = GRAMMAR[state, tag]

    # what is left: the trunk, or a step that was cut off
    end_piece(T, num_steps if state == "step" else 0)
    return Layout(block, branch, position)


def visible(layout):
    """(T, T) bool, True = row's token sees column's token.

    The definition, for tests and pictures; nothing decodes with it.
    """
    return visible_mask(torch.as_tensor(layout.block)[None], torch.as_tensor(layout.branch)[None])[0].numpy()


def tag_token_ids(tokenizer):
    """{tag: token id}.  Raises UserError when a tag is not a single token: stage 2 makes it one."""
    ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    missing = [tag for tag, i in ids.items() if i is None or i == tokenizer.unk_token_id]
    if missing:
        raise UserError(
            f"the tokenizer has no {missing[0]} token: parallel mode needs a checkpoint from stage 2 or 3"
        )
    return ids


# ==================================================================================================
# 2. Teacher forcing: the training side of the layout
# ==================================================================================================


@dataclass
class Example:
    """A prompt and a response to train on or to score."""

    prompt: list  # token ids
    ids: list  # of the response
    layout: Layout | None = None  # of the response alone; None: plain causal text

    def __len__(self):
        return len(self.prompt) + len(self.ids)


def batches(examples, max_tokens, device="cpu", pad=0, share=(0, 1)):
    """Cut examples into padded batches of at most max_tokens, similar lengths together.

    A batch has at least one row.  share: (rank, ranks): only every so-many-th example in order of
    length, so that all ranks have the same amount to do.  Yields (rows, ids, layout, mask): rows
    lists indices into `examples`; ids (B, T) int64; layout with (B, T) tensors; mask (B, T) bool,
    True on response tokens.
    """
    rank, ranks = share
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))[rank::ranks]
    while order:
        # Longest first, so that memory peaks at once and not in the middle of a run.
        size = max(1, max_tokens // len(examples[order[-1]]))
        rows = order[-size:]
        del order[-size:]

        # Padding stands at the end of a row, where causal order hides it from every real token.
        chosen = [examples[i] for i in rows]
        ids = pad_rows([e.prompt + list(e.ids) for e in chosen], pad)  # (B, T)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        integers = torch.zeros(3, *ids.shape, dtype=torch.long)  # block, branch, position
        integers[2] = torch.arange(ids.shape[1])

        # A response's own layout counts positions from 0; behind its prompt they count from there.
        for b, example in enumerate(chosen):
            response = slice(len(example.prompt), len(example))
            mask[b, response] = True
            if example.layout is not None:
                position = len(example.prompt) + example.layout.position
                own = np.stack([example.layout.block, example.layout.branch, position])
                integers[:, b, response] = torch.from_numpy(own)
        lengths = torch.tensor([len(e) for e in chosen], device=device)
        yield rows, ids.to(device), Layout(*integers.to(device), lengths), mask.to(device)


def pack(ids, layout):
    """Take the padding out of a batch: its n real tokens one after another, in one row.

    ids (B, T) -> (ids (1, N), layout (1, N), place (n,)), place being where in the B * T each came
    from. N is a `bucket`; what it has too many are copies of token 0 in a document of their own.

    ids [[5 6 7] [8 0 0]], lengths [3 1] ->
    ids [[5 6 7 8 5 5 ..]], document [[0 0 0 1 -1 -1 ..]], place [0 1 2 3]
    """
    T = ids.shape[1]
    real = torch.arange(T, device=ids.device) < layout.lengths[:, None]  # (B, T)
    place = real.flatten().nonzero()[:, 0]  # (n,)
    idle = (0, bucket(len(place)) - len(place))
    taken = F.pad(place, idle)  # (N,)
    document = F.pad(place // T, idle, value=-1)  # (N,)
    rows = (ids, layout.block, layout.branch, layout.position)
    ids, *integers = (x.flatten()[taken][None] for x in rows)
    return ids, Layout(*integers, document=document[None]), place


MAX_LOGITS = 2**25  # largest number of logits that exists at a time: 128 MB in fp32


def token_logprobs(model, ids, layout=None):
    """Log-probability of every token given what it sees, and the entropy of what it was drawn from.

    ids (B, T) -> two (B, T) fp32 tensors; entry t is of ids[:, t], column 0 is zero.  The entries
    of <takeaway> and of a branch's first token (but branch 1's) mean nothing: the token before them
    in this order is the end of another branch.  The engine forces both, so they carry no loss,
    except under stage 3's --count-forced.
    """

    def score(x, target):  # (M, C), (M,) -> (M,), (M,)
        log_p = model.logits(x).float().log_softmax(-1)  # (M, V)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)  # (M,)
        return log_p.gather(-1, target[:, None])[:, 0], entropy

    # On a GPU without the padding: FlexAttention skips what belongs to other documents.
    target = ids.roll(-1, 1).flatten()  # (B*T,)
    place = None
    if layout is not None and layout.lengths is not None and uses_flex(ids.device):
        packed, layout, place = pack(ids, layout)
        x = model.hidden(packed, layout)[0, : len(place)]  # (n, C)
        target = target[place]  # (n,)
    else:
        x = model.hidden(ids, layout).flatten(0, 1)  # (B*T, C)

    # With Qwen3's 151,936 tokens the logits of 16k tokens would take 10 GB, and their softmax as
    # much again; so only one chunk of them exists at a time, and backward computes it anew.
    size = max(1, MAX_LOGITS // model.config.vocab_size)
    chunks = zip(x.split(size), target.split(size))
    if len(x) > size and torch.is_grad_enabled():
        parts = [checkpoint(score, a, b, use_reentrant=False) for a, b in chunks]
    else:
        parts = [score(a, b) for a, b in chunks]
    scores = [torch.cat(part) for part in zip(*parts)]  # chosen, entropy: as long as target

    # Back to where each token stood, and one to the right: position t predicted token t + 1.
    if place is not None:
        scores = [y.new_zeros(ids.numel()).index_copy(0, place, y) for y in scores]  # (B*T,)
    chosen, entropy = (F.pad(y.view(ids.shape)[:, :-1], (1, 0)) for y in scores)
    return chosen, entropy


# ==================================================================================================
# 3. The life of a request
# ==================================================================================================
# A request is a list of tokens in order of arrival: prompt, trunk and all branches.  Its *tips* are
# the tokens whose successor is sampled next: the trunk's last, or the last of each live branch.
# Below, from the end of a guideline with two plans to the takeaway.  A column is one step of the
# engine, which feeds what stands in it: what a fork forces rides along with </guideline>, and what
# a join forces with the last </step>.
#
#     slot       12  13  14  15  16  17  18 | 19  20 | 21  22 | 23  24
#     token      /g   s   1   :   s   2   : |  x   y | /s   z | /s   t
#     block       0   1   1   1   1   1   1 |  1   1 |  1   1 |  1   0
#     branch      0   1   1   1   2   2   2 |  1   2 |  1   2 |  2   0
#     position   12  13  14  15  13  14  15 | 16  16 | 17  17 | 18  19


# One token of a request: what it is, where the layout puts it (the model reads these four), and how
# it came about.
TOKEN = np.dtype(
    [
        ("id", np.int32),
        ("block", np.int32),
        ("branch", np.int32),
        ("position", np.int32),
        ("logprob", np.float64),  # at temperature 1, before truncation and penalty; 0.0 for forced tokens
        ("step", np.int32),  # in which it was sampled or forced: 1 is its request's first, 0 the prompt's
        ("forced", bool),  # not sampled: of the prompt, or written by the engine
    ],
    align=True,
)


@dataclass
class Rollout:
    """One response.  Fields are in sequence order: a block's branches one after another."""

    ids: list  # response token ids, end-of-turn included
    layout: Layout  # of the response alone: positions count from 0
    forced: list  # bool, as in TOKEN
    logprobs: list  # as in TOKEN
    finish_reason: str  # stop, length or malformed
    critical_path: int  # longest chain of dependent tokens
    num_forks: int  # blocks that the engine really forked
    max_branches: int = 0  # widest of them
    error: str = ""  # what was malformed
    steps: list = field(default_factory=list)  # as in TOKEN


def ragged(counts):
    """Row and column of every item of a ragged list: [2 1] -> [0 0 1], [0 1 0]."""
    return np.nonzero(np.arange(counts.max(initial=0)) < counts[:, None])


@dataclass
class Book:
    """The book of one call of `Engine.generate`: what its requests may do, and all that they write.

    Most of a step is the same for every tip, so it is done to all of them at once, in arrays: loops
    over requests and tokens would take longer than a GPU takes for its part.  Three numbers tell
    things apart: a request's index in the call, which is its row here; the row of the KV memory
    that it has while it runs (`Engine.active`); and a token's index among its request's tokens.
    """

    requests: list  # of Request
    tokenizer: object
    tag_ids: dict  # {tag: token id}; empty in sequential mode, where tags mean nothing
    end_ids: set  # tokens that end a turn
    max_new_tokens: int
    max_branches: int

    def __post_init__(self):
        self.tag_of = {i: tag for tag, i in self.tag_ids.items()}
        # True for ids that are not plain text; the last entry stands for all ids from there on
        # (`receive` looks ids up with mode="clip").
        special = [*self.end_ids, *self.tag_of]
        self.special = np.isin(np.arange(max(special, default=0) + 2), special)

        # In order of arrival, the prompt first: tokens, and for each one that may come a random
        # number.  (Of long rows only the pages that are written to take memory.)
        n = len(self.requests)
        longest = max((len(r.prompt) for r in self.requests), default=0) + self.max_new_tokens
        self.tokens = np.zeros((n, longest), dtype=TOKEN)
        self.uniforms = np.zeros((n, longest), dtype=np.float32)

        # The tips: indices of tokens whose successor is sampled next, the first num_tips of a row.
        # Who has none has finished, and leaves its KV row at the end of the step.
        # And of each request: tokens so far; engine steps in which it received some (waiting for a
        # row of the KV memory does not count).
        self.tips = np.zeros((n, min(self.max_branches, self.max_new_tokens)), dtype=np.int64)
        self.num_tips, self.length, self.steps = np.zeros((3, n), dtype=np.int64)

        # Its row of the KV memory: tokens that lie in it before this step feeds more, and slots
        # left free before the first, so that short prompts end where the longest does.  All samples
        # of a prompt are a group, numbered as its first.
        self.fed, self.margin, self.group = np.zeros((3, n), dtype=np.int64)

        # Every request begins with its prompt, and draws its random numbers up front.
        first = {}
        for i, request in enumerate(self.requests):
            request.book = weakref.proxy(self)  # so that a book is gone as soon as its engine drops it
            request.tips = [request.force(request.prompt, 0, 0, 0)]
            response = self.uniforms[i, len(request.prompt) :][: self.max_new_tokens]
            request.stream.random(out=response, dtype=np.float32)
            self.group[i] = first.setdefault(request.prompt, i)
        self.limit = self.length + self.max_new_tokens  # (n,) most tokens that a request may have

    def receive(self, chosen, ids, logprobs):
        """Append one token after each tip of the chosen requests: ids and logprobs (M,), in order.

        Returns (request, index) of every new token that is not plain text.
        """
        of, k = ragged(self.num_tips[chosen])  # (M,) each
        request = chosen[of]
        self.fed[chosen] = self.length[chosen]
        self.steps[chosen] += 1

        # A successor is a token like its tip, one position further on, and the tip from now on.
        new = self.tokens[request, self.tips[request, k]]  # (M,)
        new["id"] = ids
        new["position"] += 1
        new["logprob"] = logprobs
        new["forced"] = False
        new["step"] = self.steps[request]

        # It stands behind all that its request has so far, siblings one after another.
        index = self.length[request] + k
        self.tokens[request, index] = new
        self.tips[request, k] = index
        self.length[chosen] += self.num_tips[chosen]
        special = self.special.take(new["id"], mode="clip")
        return zip(request[special].tolist(), index[special].tolist())


@dataclass
class Request:
    """A response in the making."""

    index: int  # its place in the call, and its row of the book
    prompt: tuple  # token ids
    stream: np.random.Generator  # its own random numbers
    book: Book | None = None  # where it writes
    state: str = "text"  # of the trunk, in GRAMMAR
    widths: list = field(default_factory=list)  # branches of each fork
    finish_reason: str = ""
    error: str = ""

    @property
    def tokens(self):
        """In order of arrival, the prompt first: (T,) of TOKEN."""
        return self.book.tokens[self.index, : self.book.length[self.index]]

    @property
    def tips(self):
        """Indices of the tokens whose successor is sampled next."""
        return self.book.tips[self.index, : self.book.num_tips[self.index]].tolist()

    @tips.setter
    def tips(self, tips):
        self.book.num_tips[self.index] = len(tips)
        self.book.tips[self.index, : len(tips)] = tips

    @property
    def used(self):
        """Tokens of the response so far."""
        return len(self.tokens) - len(self.prompt)

    def force(self, ids, block, branch, position):
        """Append tokens that are not sampled, from this position on; index of the last."""
        step = self.book.steps[self.index]
        new = [(id, block, branch, at, 0.0, step, True) for at, id in enumerate(ids, position)]
        self.book.length[self.index] += len(new)
        self.tokens[-len(new) :] = new
        return len(self.tokens) - 1

    def finish(self, reason, error=""):
        # what has no tip is taken out of its row at the end of the step
        self.finish_reason = reason
        self.error = error
        self.tips = []

    def read(self, index):
        """Go on after a new token that is a tag or the end of the turn: fork, join, or finish."""
        id, block, branch, *_ = self.book.tokens[self.index, index].item()
        tag = self.book.tag_of.get(id, "end of turn")

        # A step ends with </step>; any other tag in it, or the end of the turn, is malformed.  No
        # tip left means that every branch has closed.
        if block and tag != "</step>":
            self.finish("malformed", f"{tag} inside step {branch}")
        elif block:
            self.tips = [tip for tip in self.tips if tip != index]
            if not (self.tips or self.finish_reason):
                self.join()

        # The trunk goes from state to state of the grammar, and forks where a guideline closes.
        elif id in self.book.end_ids:
            self.finish("stop")
        elif (self.state, tag) not in GRAMMAR:
            self.finish("malformed", f"{tag} in state {self.state}")
        else:
            self.state = GRAMMAR[self.state, tag]
            if tag == "</guideline>":
                self.fork()

    def fork(self):
        """Validate the guideline that just closed, then open one branch per plan.

        Each branch has a forced beginning.  Nothing is copied: a branch is a few more tokens in the
        same row, with a number of their own.
        """
        num_plans, space, problem = self.read_plans()

        # A checkpoint trained elsewhere may give every tag a line of its own (NPR-4B does): its
        # steps open with the white space that it has just written itself.  That space belongs to
        # the branch, as in `layout`.
        openings = [
            self.book.tokenizer.encode(f"{space}<step>{space}{i}:", add_special_tokens=False)
            for i in range(1, num_plans + 1)
        ]

        # The paper's pre-branch validator: a guideline that is not in order never forks.
        room = self.book.max_new_tokens - self.used
        if not problem and not 1 <= num_plans <= self.book.max_branches:
            problem = f"{num_plans} plans, allowed are 1 to {self.book.max_branches}"
        if not problem and sum(map(len, openings)) + num_plans > room:
            problem = f"budget of {room} tokens left for {num_plans} branches"
        if problem:
            self.finish("malformed", problem)
            return

        # Every branch begins at the same position, right after </guideline>, whose tip gives way.
        self.widths.append(num_plans)
        first = self.tokens["position"][-1] + 1
        self.tips = [
            self.force(opening, len(self.widths), branch, first) for branch, opening in enumerate(openings, 1)
        ]

    def read_plans(self):
        """(number of plans, white space after the last, problem or '') of the closed guideline.

        The tags' order is already known to be right; left to check are the numbers, that no plan is
        empty, and that nothing stands between plans.
        """
        # Tags cut the guideline into pieces: outside, plan, outside, plan, .. outside.  By token,
        # as all structure is read: a tag that a plan spells out is mere text.
        pieces = [[]]
        ids = self.tokens["id"][:-1]
        for id in ids[np.flatnonzero(ids == self.book.tag_ids["<guideline>"])[-1] + 1 :].tolist():
            if id in self.book.tag_of:
                pieces.append([])
            else:
                pieces[-1].append(id)
        texts = [self.book.tokenizer.decode(piece) for piece in pieces]
        plans = texts[1::2]
        between = texts[0::2]

        # The first thing that is wrong is what is reported.
        for number, plan in enumerate(plans, 1):
            if not re.match(rf"\s*{number}:\s*\S", plan):
                return number, "", f"plan {number} does not read '{number}: ..'"
        return len(plans), between[-1], "text between plans" if "".join(between).strip() else ""

    def join(self):
        """All branches have closed: the trunk goes on behind the longest, and sees every one."""
        if self.used >= self.book.max_new_tokens:
            self.finish("length")
            return
        longest = self.tokens["position"][self.tokens["block"] == len(self.widths)].max()
        self.state = "takeaway"
        self.tips = [self.force([self.book.tag_ids["<takeaway>"]], 0, 0, longest + 1)]

    def rollout(self):
        """The response so far in sequence order: a block's branches one after another."""
        # Blocks arrive one after another; inside a block the branches interleave, so sort those by
        # branch, stably.  The trunk after a block comes behind all of it.
        response = self.tokens[len(self.prompt) :]
        latest = np.maximum.accumulate(response["block"])  # block so far
        order = np.lexsort([response["branch"], response["block"] == 0, latest])  # the last key counts most
        tokens = response[order]

        # Positions count from the prompt's end, so that a response is the same behind any prompt.
        position = tokens["position"] - len(self.prompt)
        return Rollout(
            ids=tokens["id"].tolist(),
            layout=Layout(tokens["block"].copy(), tokens["branch"].copy(), position),
            forced=tokens["forced"].tolist(),
            logprobs=tokens["logprob"].tolist(),
            finish_reason=self.finish_reason,
            # positions are what parallel branches share: the last one counts the dependent tokens
            critical_path=int(position.max(initial=-1)) + 1,
            num_forks=len(self.widths),
            max_branches=max(self.widths, default=0),
            error=self.error,
            steps=tokens["step"].tolist(),
        )


# ==================================================================================================
# 4. The engine: schedule, run, postprocess
# ==================================================================================================


@dataclass
class Stats:
    """Totals of an engine since it was made."""

    tokens: int = 0  # generated, forced ones included
    forced_tokens: int = 0
    decode_steps: int = 0  # forward passes over the running batch
    prefill_tokens: int = 0  # prompt tokens computed, and tokens computed again after a preemption
    shared_prompt_tokens: int = 0  # prompt tokens copied from a sibling's row instead
    preemptions: int = 0
    peak_kv_tokens: int = 0
    moved_kv_bytes: int = 0  # by prompt sharing, gap closing and recutting; forks and joins move none
    seconds: float = 0.0


MAX_KV_TOKENS = 2**18


def planned_kv_tokens(model):
    """Slots of the KV memory: a quarter of the free CUDA memory, or of all RAM."""
    weight = model.model["embed_tokens"].weight
    config = model.config
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weight.is_cuda:
        torch.cuda.empty_cache()  # what an engine before this one has left counts as free
        available = torch.cuda.mem_get_info(weight.device)[0]
    return max(1024, min(MAX_KV_TOKENS, available // 4 // (elements * weight.element_size())))


class Engine:
    """Decode many requests at once, sequentially or in parallel branches, within a fixed KV budget.

    kv_tokens: slots of the KV memory, by default as many as planned.  max_rows: most requests
    decoded together.  kernel: decode with the kernel and captured graphs of section 7; default
    wherever they run, on CUDA.
    """

    def __init__(self, model, tokenizer, kv_tokens=None, max_rows=256, kernel=None):
        self.model = model
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        config = model.config
        weight = model.model["embed_tokens"].weight

        # The KV budget is planned up front, so that no request can run out of memory in the middle.
        kv_tokens = kv_tokens or planned_kv_tokens(model)

        # Decode with section 7's kernel where it runs, else with plain PyTorch.
        if kernel is None:
            kernel = weight.is_cuda and config.head_dim <= 128 and can_compile()
        self.runner = (CudaRunner if kernel else ModelRunner)(model, kv_tokens)

        # A turn may end in several ways; the tokenizer's own is always one of them.
        eos = config.eos_token_id
        self.end_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.stats = Stats()
        self.active = np.zeros(0, dtype=np.int64)  # (R,) indices of those in rows 0 .. R - 1 of the KV memory
        self.waiting = deque()

    @property
    def kv_tokens_in_use(self):
        """Slots that hold a token; 0 between calls of `generate`."""
        return int(self.book.fed[self.active].sum()) if len(self.active) else 0

    @torch.no_grad()
    def generate(
        self,
        prompts,
        n=1,
        copies=None,
        parallel=True,
        max_new_tokens=1024,
        # sampling: the defaults are the policy itself, which is what training needs
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=0,
        max_branches=8,
        step_repetition_penalty=1.0,
        progress=False,
    ):
        """n responses to every prompt: list (prompts) of lists (n) of Rollout.

        prompts: lists of token ids.  parallel False: tags mean nothing, plain sampling.
        max_new_tokens counts every token of every branch, and the forced ones.  temperature 0 is
        greedy. step_repetition_penalty divides positive (multiplies negative) logits of tokens that
        the same branch already holds (paper: 1.02).  A response depends on the settings, seed, its
        prompt and its number among that prompt's samples, not on which other prompts are in the
        call (up to rounding).  copies: of every prompt, how many equal ones have been sampled
        elsewhere (in a call before, on another rank), so that its samples differ from theirs;
        default: counted in this call.  Raises UserError when a number is out of range, when a
        request cannot fit the KV budget, or when the tokenizer lacks the tags in parallel mode.
        """
        began = time.time()
        for name, kind, value in (
            ("n", positive_int, n),
            ("max_new_tokens", positive_int, max_new_tokens),
            ("temperature", not_negative, temperature),
            ("top_p", positive_fraction, top_p),
            # 0: any token
            ("top_k", natural_int, top_k),
            ("seed", seed_int, seed),
            ("max_branches", positive_int, max_branches),
            ("step_repetition_penalty", positive_float, step_repetition_penalty),
        ):
            # the same ranges as the flags have, for people who call this from Python
            try:
                kind(value)
            except ArgumentTypeError as error:
                raise UserError(f"{name} is {error}")

        self.sampling = temperature, top_p, top_k
        self.penalty = step_repetition_penalty
        tag_ids = tag_token_ids(self.tokenizer) if parallel else {}
        kv_tokens = self.runner.kv_tokens

        # A request's random numbers are seeded by its prompt and its number among that prompt's
        # samples, so neither its neighbours nor its place in the list can change what it says.
        requests = []
        seen = Counter()
        for prompt, copy in zip(prompts, copies or itertools.repeat(None)):
            if not prompt:
                raise UserError("an empty prompt: every request needs at least one prompt token")
            if len(prompt) + max_new_tokens > kv_tokens:
                raise UserError(
                    f"prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed "
                    f"the KV budget of {kv_tokens} tokens; raise kv_tokens or shorten them"
                )

            # n samples, each with a stream of its own
            digest = hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
            first = n * (seen[digest] if copy is None else copy)
            seen[digest] += 1
            for number in range(first, first + n):
                stream = np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), number])
                requests.append(Request(len(requests), tuple(prompt), stream))
        book = self.book = Book(requests, self.tokenizer, tag_ids, self.end_ids, max_new_tokens, max_branches)

        # Where every row can have its worst case, nothing will ever be preempted.  Else rows begin
        # short.
        lengths = [len(r.prompt) for r in requests] or [0]
        longest = max(lengths) + max_new_tokens
        num_rows = min(len(requests), self.max_rows)
        if num_rows * longest > kv_tokens:
            num_rows = longest = 0

        # A group's prompt, but for the last token, which all feed, is read once a step for all.
        # Prompts end in the same slot of every row, and what is not shared begins there.
        shared = 0
        if self.runner.can_share and num_rows and len(seen) < len(requests) and min(lengths) > 1:
            shared = max(lengths) - 1
            book.margin = max(lengths) - book.length
        self.runner.cut(num_rows, longest, shared)

        # Step until nobody waits and nobody runs; whatever happens, every slot is free again.
        quiet = {} if progress else {"disable": True}  # a rank that is silent stays so
        bar = tqdm(total=len(requests), desc="rollout", unit="seq", leave=False, **quiet)
        try:
            self.waiting = deque(requests)
            while self.waiting or len(self.active):
                bar.update(self.step())
        finally:
            self.active = self.active[:0]
            self.waiting = deque()
            bar.close()

        # n by n again, in the order of the prompts
        self.stats.seconds += time.time() - began
        rollouts = [r.rollout() for r in requests]
        self.stats.moved_kv_bytes = self.runner.moved_bytes
        self.stats.tokens += sum(r.used for r in requests)
        self.stats.forced_tokens += sum(sum(rollout.forced) for rollout in rollouts)
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]

    def step(self):
        """One decode step of all that run: schedule, run, postprocess.  Returns how many ended."""
        logits = self.run(self.schedule())  # (M, V), of the tips of all active requests
        book = self.book

        # postprocess: every tip gets its token; where that is not plain text, its request reads it
        for i, index in book.receive(self.active, *self.sample(logits)):
            book.requests[i].read(index)
        self.stats.peak_kv_tokens = max(self.stats.peak_kv_tokens, self.kv_tokens_in_use)

        # who has no budget for another step ends; then the rows of all who ended are cleared
        for i in self.active[(book.length + book.num_tips > book.limit)[self.active]]:
            book.requests[i].finish("length")
        finished = np.flatnonzero(book.num_tips[self.active] == 0)
        for row in finished[::-1]:
            self.vacate(row)
        return len(finished)

    def vacate(self, row):
        """Take the request out of a row; the last row fills the gap, so that rows stay adjacent."""
        last = len(self.active) - 1
        if row < last:
            i = self.active[row] = self.active[last]
            capacity = self.runner.capacity
            self.runner.move(last * capacity, row * capacity, self.book.margin[i] + self.book.fed[i])
        self.active = self.active[:last]

    # ---- schedule ----

    def schedule(self):
        """Make room for what running rows will feed, admit requests that wait; their rows."""
        runner = self.runner
        book = self.book
        budget = runner.kv_tokens

        # A row that is too short: cut the memory anew into longer and fewer ones.  The youngest
        # requests that no longer have a row wait; on their return all their tokens are prefilled at
        # once.
        need = int(book.length[self.active].max(initial=0))
        if need > runner.capacity:
            capacity = min(budget, max(need, runner.capacity * 3 // 2) + 31)
            rows = min(self.max_rows, budget // capacity)
            while len(self.active) > rows:
                youngest = self.active.max()
                self.vacate(self.active.argmax())
                book.fed[youngest] = 0
                self.waiting.appendleft(book.requests[youngest])
                self.stats.preemptions += 1
            runner.recut(rows, capacity, book.fed[self.active].tolist())
            return []  # no admission in a step that was short of room

        # Admit in order of arrival while there is a row that is long enough.
        admitted = []
        while self.waiting:
            need = int(book.length[self.waiting[0].index])
            # with room for 32 more to begin with
            if not len(self.active) and need + min(32, book.max_new_tokens) > runner.capacity:
                capacity = min(budget, need + max(32, need // 2))
                runner.cut(min(self.max_rows, budget // capacity), capacity)
            if len(self.active) == runner.rows or need > runner.capacity:
                break
            admitted.append(len(self.active))
            self.active = np.append(self.active, self.waiting.popleft().index)
        return admitted

    # ---- run ----

    def run(self, admitted):
        """Feed all tokens that are in no KV row yet; logits (M, V) of all tips, row after row."""
        book = self.book
        if not admitted:  # the usual step: every request is running
            self.stats.decode_steps += 1
            return self.runner.decode(book, self.active, np.arange(len(self.active)))

        # One prefill serves all samples of a prompt: the first computes it, the others copy its
        # slots.
        length = book.length[self.active]  # (R,)
        holders = {book.requests[i].prompt: row for row, i in enumerate(self.active) if book.fed[i]}
        leaders = []
        followers = []
        for row in admitted:
            request = book.requests[self.active[row]]
            if request.prompt in holders and request.used == 0:
                followers.append((row, holders[request.prompt]))
            else:
                leaders.append(row)
                holders[request.prompt] = row

        # Prefill in batches of similar lengths, some 8,192 tokens at a time.
        logits = {}  # of the tips, by row
        leaders.sort(key=length.__getitem__)
        while leaders:
            size = max(1, 8192 // int(length[leaders[-1]]))
            rows = np.array(leaders[-size:])
            del leaders[-size:]
            logits |= zip(rows.tolist(), self.runner.prefill(book, self.active[rows], rows))
            self.stats.prefill_tokens += int(length[rows].sum())

        # The copy leaves out the last prompt token, which has to be fed for its logits.
        capacity = self.runner.capacity
        for row, holder in followers:
            i = self.active[row]
            book.fed[i] = len(book.requests[i].prompt) - 1
            self.runner.move(holder * capacity, row * capacity, book.margin[i] + book.fed[i])
            self.stats.shared_prompt_tokens += int(book.fed[i])

        # Everyone else decodes as in any other step.
        rows = np.array([row for row in range(len(length)) if row not in logits])
        if len(rows):
            self.stats.decode_steps += 1
            decoded = self.runner.decode(book, self.active[rows], rows)
            logits |= zip(rows.tolist(), decoded.split(book.num_tips[self.active[rows]].tolist()))
        return torch.cat([logits[row] for row in range(len(length))])

    # ---- sample ----

    def sample(self, logits):
        """One token for each tip: logits (M, V) -> (token ids, log-probabilities), (M,) each."""
        of, k = ragged(self.book.num_tips[self.active])  # (M,) each
        request = self.active[of]
        u = self.book.uniforms[request, self.book.length[request] + k]
        shaped = self.penalise(logits) if self.penalty != 1.0 else None
        drawn = self.runner.draw(logits, torch.from_numpy(u), shaped, *self.sampling)
        ids, logprobs = drawn.cpu().numpy()  # the one time that the host waits for the GPU
        return ids.astype(np.int64), logprobs

    def penalise(self, logits):
        """Logits (M, V) after the repetition penalty: in a step, on tokens its branch holds."""
        logits = logits.float().clone()
        active = map(self.book.requests.__getitem__, self.active)
        for m, (tokens, tip) in enumerate((r.tokens, tip) for r in active for tip in r.tips):
            place = tokens[["block", "branch"]]  # (T,)
            if place["block"][tip]:
                mine = torch.tensor(np.unique(tokens["id"][place == place[tip]]), device=logits.device)
                x = logits[m, mine]
                logits[m, mine] = torch.where(x > 0, x / self.penalty, x * self.penalty)
        return logits


def draw(logits, u, shaped, temperature, top_p, top_k):
    """One token for each row of logits (M, V) -> (2, M) float64: ids, and their log-probabilities.

    u (M,): random numbers in [0, 1).  shaped (M, V): the logits after penalties, None for the same.
    temperature 0: the likeliest token.  The log-probabilities are the model's own, without
    temperature and truncation: what training will see.
    """
    size = max(1, MAX_LOGITS // logits.shape[1])
    if len(logits) > size:  # 1,024 rows of Qwen3's vocabulary would take 3 GB in here
        shaped_parts = itertools.repeat(None) if shaped is None else shaped.split(size)
        parts = zip(logits.split(size), u.split(size), shaped_parts)
        return torch.cat([draw(*part, temperature, top_p, top_k) for part in parts], dim=1)

    log_p = logits.float().log_softmax(-1)  # (M, V)
    untouched = shaped is None and temperature == 1.0
    shaped = logits if shaped is None else shaped
    if temperature == 0:
        token = shaped.argmax(-1)  # (M,)
    else:
        p = log_p.exp() if untouched else (shaped.float() / temperature).softmax(-1)  # (M, V)

        # Truncation keeps the smallest set that holds top_p, and at most top_k tokens.
        if top_k or top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True)
            cut = ranked.cumsum(-1) - ranked >= top_p
            if top_k:
                cut[:, top_k:] = True
            p = torch.zeros_like(p).scatter_(-1, order, ranked.masked_fill(cut, 0.0))

        # Inverse CDF with the request's own random numbers: which neighbours share the batch cannot
        # matter.
        cdf = p.double().cumsum(-1)  # (M, V)
        threshold = u[:, None].double() * cdf[:, -1:]
        token = torch.searchsorted(cdf, threshold, right=True)[:, 0].clamp_(max=p.shape[-1] - 1)
    logprob = log_p.gather(-1, token[:, None])[:, 0]
    return torch.stack([token.double(), logprob.double()])


# ==================================================================================================
# 5. KV memory: one row per request, prompt, trunk and all branches in order of arrival
# ==================================================================================================
# A fork copies nothing: it adds query tokens to the row.  A join recomputes nothing: the trunk's
# next token simply sees every slot.  And a step reads a row's keys and values once for all its
# branches, which is where parallel speed comes from.

# What scaled_dot_product_attention calls on a CPU; it returns the log-sum-exp of the scores, too.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class ModelRunner:
    """The model and its KV memory: a pool of kv_tokens slots, cut into rows of equal capacity.

    The cut moves when a row needs more.  Two arrangements were considered: rows (this one) and
    pages of 32 slots with a table per request.  Rows let attention read memory as it lies.  Pages
    waste less, but a CPU has to gather them in every layer of every step: measured on one thread,
    tiny model, 64 rows of 320 slots, attention takes 0.42 ms on rows and the gather alone 1.03 ms.
    Rows pay with padding up to the longest request.
    """

    def __init__(self, model, kv_tokens):
        self.model = model
        self.kv_tokens = kv_tokens
        config = model.config
        weight = model.model["embed_tokens"].weight
        self.repeat = config.num_attention_heads // config.num_key_value_heads  # query heads of a KV head

        # A slot holds one token's keys and values of all heads, so that storing a token is one
        # copy.  Zeros, not empty: a masked slot has weight 0, and 0 * NaN garbage would still be
        # NaN.  One slot more than the budget: idle tokens of a captured graph are stored there.
        slots = (kv_tokens + 1, 2 * config.num_key_value_heads, config.head_dim)
        shape = (config.num_hidden_layers, *slots)
        if weight.is_cuda:
            self.pool = weight.new_zeros(shape, requires_grad=False)
        else:
            # numpy's zeros take memory where they are first written to, torch's all of it at once:
            # a judge holds many engines
            zeros = np.zeros((*shape, weight.element_size()), dtype=np.uint8)
            self.pool = torch.from_numpy(zeros).view(weight.dtype)[..., 0]
        self.block = torch.zeros(
            kv_tokens + 1, device=weight.device, dtype=torch.long
        )  # of each slot's token
        self.branch = torch.zeros_like(self.block)
        self.moved_bytes = 0
        self.compiled = False  # run the layers around attention compiled (section 7)
        self.can_share = weight.device.type == "cpu"  # prompts; elsewhere rows are read one by one
        self.cut(0, 0)

    def cut(self, rows, capacity, shared=0):
        """Row r is slots r * capacity .. (r + 1) * capacity from now on.  The first `shared` of
        them are the prompt's, and are read in one sample's row for all; 0: in each one's own."""
        self.rows = rows
        self.capacity = capacity
        self.shared = shared
        self.spans = []  # slots of the prompts that the last step read

    def recut(self, rows, capacity, used):
        """Cut anew and move used[r] slots of each row; when rows grow, the last moves first."""
        before = self.capacity
        self.cut(rows, capacity)
        for r in sorted(range(len(used)), reverse=capacity > before):
            self.move(r * before, r * capacity, used[r])

    def move(self, source, target, n):
        """Copy n slots, to share a prompt, close a gap, or cut anew; the spans may overlap."""
        for store in (self.pool, self.block[None], self.branch[None]):
            store[:, target : target + n] = store[:, source : source + n].clone()
        self.moved_bytes += int(n) * self.pool[:, 0].nbytes

    def attend(self, layer, q, k, v):
        """Every layer's call: store k, v (B, T, H_kv, D), attend with q (B, T, H, D) -> q's shape.

        A forward pass is prepared first: `index`, the slots where its tokens go; `real`, in a
        prefill which of the B * T tokens are no padding, else None; and what it looks at.
        """
        new = torch.cat([k, v], dim=2).flatten(0, 1)  # (B*T, 2 H_kv, D)
        if self.real is not None:  # prefill: nothing earlier lies in these rows
            self.pool[layer].index_copy_(0, self.index, new[self.real])
            return attention(q, k, v, self.mask)
        self.pool[layer].index_copy_(0, self.index, new)
        return self.look(layer, q)

    def prefill(self, book, chosen, rows):
        """Feed whole requests into empty rows, as one batch; logits (M, V) of each one's tips.

        book, chosen (B,): whose requests, and which; rows (B,): where to.
        """
        device = self.model.device
        length = int(book.length[chosen].max())
        tokens = book.tokens[chosen, :length]  # (B, T)
        # With branches FlexAttention is compiled for every length, so let the lengths be few.
        idle = bucket(length) - length if uses_flex(device) and tokens["block"].any() else 0
        integers = np.stack([tokens[name] for name in TOKEN.names[:4]]).astype(np.int64)
        ids, block, branch, position = F.pad(torch.from_numpy(integers), (0, idle)).to(device)  # (B, T) each

        # Where they go: one slot after another of each row, the padding left out.
        of, column = ragged(book.length[chosen])  # (N,) each
        start = rows * self.capacity + book.margin[chosen]  # (B,)
        self.real = torch.from_numpy(of * ids.shape[1] + column).to(device)  # (N,) of the B * T
        self.index = torch.from_numpy(start[of] + column).to(device)  # (N,) slots
        self.block[self.index] = block.flatten()[self.real]
        self.branch[self.index] = branch.flatten()[self.real]
        self.mask = visibility(block, branch)
        self.compiled = False
        x = self.model.hidden(ids, Layout(block, branch, position), self)  # (B, T, C)

        # Only tips need logits: a long prompt's would be the largest tensor of all.
        of, k = ragged(book.num_tips[chosen])
        tips = book.tips[chosen[of], k]
        logits = self.model.logits(x[torch.from_numpy(of), torch.from_numpy(tips)])  # (M, V)
        return logits.split(book.num_tips[chosen].tolist())

    def decode(self, book, chosen, rows):
        """Feed the new tokens of the requests running in these rows; logits (M, V) of their tips.

        Packed for the matrices, by row for the attention.  chosen, rows (R,).
        """
        fed = book.fed[chosen]  # (R,)
        margin = book.margin[chosen]
        count = book.length[chosen] - fed  # new tokens of each row
        of, col = ragged(count)  # (N,) each
        index = fed[of] + col

        # What the device has to know: (7, N) integers, and where among the N the M tips are.
        new = book.tokens[chosen[of], index]
        packed = np.stack([*(new[name] for name in TOKEN.names[:4]), margin[of] + index, rows[of], col])
        of_tip, k = ragged(book.num_tips[chosen])  # (M,) each
        tips = (np.cumsum(count) - count - fed)[of_tip] + book.tips[chosen[of_tip], k]
        if self.shared:
            self.find_prompts(book.group[chosen], rows, margin, of)
        return self.feed(packed, tips, rows, margin + fed + count, count)

    def find_prompts(self, group, rows, margin, of):
        """Where a step reads each prompt, for which tokens.  group, rows, margin (R,): of each
        request; of (N,): whose each token is."""
        _, holders, group = np.unique(group, return_index=True, return_inverse=True)
        order = np.argsort(group[of], kind="stable")
        self.by_group = torch.from_numpy(order)  # (N,) the tokens of one group after another
        self.by_token = torch.from_numpy(np.argsort(order))  # (N,) the way back
        self.sizes = (self.repeat * np.bincount(group[of])).tolist()  # query rows of each group

        # Keys and values of every prompt in every layer, (1, H_kv, P - 1, D) each: views of the
        # first row that holds it, made anew when that is another one.
        spans = list(zip((rows[holders] * self.capacity).tolist(), margin[holders].tolist()))
        if spans != self.spans:
            self.spans = spans
            held = [self.pool[:, row + margin : row + self.shared] for row, margin in spans]
            held = zip(*(x.unflatten(2, (2, 1, -1)).permute(0, 2, 3, 4, 1, 5) for x in held))
            self.prompts = [[prompt.unbind() for prompt in layer] for layer in held]

    def look_at_prompts(self, layer, q):
        """Attention over each token's prompt: q (N, H, D) -> (N, H, D), log-sum-exp (N, H, 1)."""
        rows = q[self.by_group].unflatten(1, (-1, self.repeat)).transpose(0, 1).flatten(1, 2)[None]
        parts = rows.split(self.sizes, dim=2)  # (1, H_kv, repeat * tokens, D) each
        looked = [flash_attention(part, *prompt) for part, prompt in zip(parts, self.prompts[layer])]
        out, lse = (torch.cat(x, dim=2)[0] for x in zip(*looked))
        return [
            x.unflatten(1, (-1, self.repeat)).transpose(0, 1).flatten(1, 2)[self.by_token]
            for x in (out, lse[..., None])
        ]

    def feed(self, packed, tips, rows, length, count):
        """The device's part of `decode`.

        packed (7, N): id, block, branch, position, slot in the row, row, place among the row's new
        tokens; tips: indices of M of them; rows, length, count (R,): rows, their slots in use after
        this step, and their new tokens.
        """
        R = rows[-1] + 1  # KV rows up to the last one fed; those not fed are padded
        Q = count.max()
        S = length.max()
        ids, block, branch, position, slot, row, col = torch.from_numpy(packed).to(self.model.device)
        self.real = None
        self.index = row * self.capacity + slot
        self.block[self.index] = block
        self.branch[self.index] = branch

        # Attention takes the tokens by row, (R, Q): rows that feed fewer are padded with idle
        # queries, which look at the first slot and are thrown away.
        place = None if len(row) == R * Q else row * Q + col  # (N,) of the R * Q
        own = slice(self.shared, S)  # slots of a row that nobody else reads
        by_row = self.pool[:, : R * self.capacity].unflatten(1, (R, self.capacity))
        seen = by_row[:, :, own].transpose(2, 3)  # (layers, R, 2 H_kv, S, D)

        # Who sees whom, from the integers of queries and slots; -inf where a query must not look.
        # No bias at all in the usual sequential step: one trunk token a row, in the last slot,
        # which sees all there is.
        bias = None
        if Q > 1 or length.min() < S or packed[1].any():
            queries = torch.zeros(3, R * Q, dtype=torch.long, device=row.device)
            queries[0] = self.shared
            queries[:, row * Q + col] = torch.stack([slot, block, branch])
            q_slot, q_block, q_branch = queries.view(3, R, Q, 1)
            k_block = self.block[: R * self.capacity].view(R, 1, self.capacity)[..., own]  # (R, 1, S)
            k_branch = self.branch[: R * self.capacity].view(R, 1, self.capacity)[..., own]
            later = torch.arange(self.shared, S, device=row.device) > q_slot  # (R, Q, S)
            sibling = (q_block == k_block) & (q_block != 0) & (q_branch != k_branch)
            bias = torch.zeros(later.shape, dtype=self.pool.dtype, device=row.device)
            bias.masked_fill_(later | sibling, float("-inf"))
            bias = bias.repeat(1, self.repeat, 1)[:, None]  # (R, 1, repeat * Q, S)

        def by_token(x):  # (R, H_kv, repeat * Q, E) -> (1, N, H, E)
            x = x.reshape(R, -1, Q, x.shape[-1]).transpose(1, 2) if Q > 1 else x  # (R, Q, H, E)
            x = x.reshape(1, R * Q, -1, x.shape[-1])
            return x if place is None else x[:, place]

        def look(layer, q):  # (1, N, H, D) -> (1, N, H, D)
            H, D = q.shape[2:]
            keys, values = seen[layer].chunk(2, dim=1)  # (R, H_kv, S, D) each
            rows = q if place is None else q.new_zeros(R * Q, H, D).index_copy_(0, place, q[0])

            # Query heads that share a key/value head become further queries of it, so keys and
            # values are read once for all of them.  With one new token a row by mere views.
            rows = rows.view(R, Q, H, D).transpose(1, 2) if Q > 1 else rows
            rows = rows.reshape(R, -1, self.repeat * Q, D)  # (R, H_kv, repeat * Q, D)
            if not self.shared:
                return by_token(F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias))

            # One softmax over the prompt and what came after it, made of the two over each.  Each
            # was divided by its own sum of exponentials, exp(lse), and these sums are the weights:
            # the prompt's is exp(lse_prompt) / (exp(lse_prompt) + exp(lse)), which is a sigmoid.
            out, lse = flash_attention(rows, keys, values, attn_mask=bias)
            out_prompt, lse_prompt = self.look_at_prompts(layer, q[0])
            share = (lse_prompt - by_token(lse[..., None])).sigmoid()  # (1, N, H, 1)
            return by_token(out).lerp(out_prompt, share.to(out.dtype))

        self.look = look
        x = self.model.hidden(ids[None], Layout(block, branch, position), self)[0]  # (N, C)
        return self.model.logits(x[torch.from_numpy(tips).to(x.device)])

    def draw(self, logits, u, shaped, temperature, top_p, top_k):
        """`draw`, with the random numbers u still on the host."""
        return draw(logits, u.to(logits.device), shaped, temperature, top_p, top_k)


# ==================================================================================================
# 6. Look at one trajectory
# ==================================================================================================


def render(tokenizer, rollout, width):
    """A rollout as lines of at most `width`: the trunk across, a block's branches side by side."""
    lines = []
    columns = []  # of the block being drawn
    places = list(zip(rollout.layout.block.tolist(), rollout.layout.branch.tolist()))
    for (block, _), piece in itertools.groupby(zip(places, rollout.ids), key=lambda pair: pair[0]):
        text = tokenizer.decode([id for _, id in piece])
        if block:
            columns.append(text)
        else:
            lines += side_by_side(columns, width) + textwrap.wrap(text, width, break_on_hyphens=False)
            columns = []
    return lines + side_by_side(columns, width)


def side_by_side(columns, width):
    """Texts as lines in columns of equal width: ['ab cd', 'e'], 19 -> ['ab cd    | e']."""
    if not columns:
        return []
    each = max(8, (width - 3 * (len(columns) - 1)) // len(columns))
    wrapped = [textwrap.wrap(column, each, break_on_hyphens=False) for column in columns]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return [" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows]


class LiveEngine(Engine):
    """Draws its one request anew after every step, over its last drawing.

    In no less than `pause` seconds a step: a small model would be done before a reader looks.
    """

    pause = 0.05
    drawn = 0  # lines of the last drawing

    def step(self):
        began = time.perf_counter()
        done = super().step()
        [request] = self.book.requests
        [step] = self.book.steps
        width, height = shutil.get_terminal_size()
        lines = render(self.tokenizer, request.rollout(), width - 1)
        lines += ["", f"step {step}: {request.used} tokens; one after another, {step}"]

        # What does not fit into the terminal cannot be drawn over, so the end alone is shown.
        lines = lines[-(height - 2) :]
        print("\x1b[A" * self.drawn + "\r\x1b[J" + "\n".join(lines), flush=True)
        self.drawn = len(lines)
        time.sleep(max(0, began + self.pause - time.perf_counter()))
        return done


class Replay(Engine):
    """Writes `ids`, whatever it samples: sequentially, what the same tokens cost one by one."""

    def sample(self, logits):
        logprobs = super().sample(logits)[1]
        return [self.ids[self.book.requests[0].used]], logprobs


def trace(tokenizer, rollout, prompt, question, by, verdict=""):
    """What assets/trace.html shows of a rollout: plain values, and lists with an entry a token.

    prompt: token ids; by: who decoded it; verdict: whether its answer is right, if anyone knows.
    """
    places = {name: getattr(rollout.layout, name).tolist() for name in ("block", "branch", "position")}
    return places | {
        "question": question,
        "by": by,
        "verdict": verdict,
        "ended": rollout.finish_reason + (f": {rollout.error}" if rollout.error else ""),
        "prompt": len(prompt),
        # token by token, because a token is what the page shows at a time
        "text": [tokenizer.decode([id]) for id in rollout.ids],
        "forced": [int(forced) for forced in rollout.forced],
        "p": [round(math.exp(logprob), 4) for logprob in rollout.logprobs],
        "step": rollout.steps,
    }


def trace_page(traces):
    """assets/trace.html with these traces in it: one page that needs no network."""
    # A response may say </script>, or open a comment that would hide the script's real end.
    data = json.dumps(traces, separators=(",", ":")).replace("</", r"<\/").replace("<!--", r"<\u0021--")
    template = Path(__file__).parent / "assets" / "trace.html"
    return template.read_text("utf-8").replace("/*TRACES*/[]", data)


# What is decoded when no question is asked: the first held-out problem of (kind, split, n, seed).
BUILT_IN = ("chains", "heldout", 1, 2)

# fmt: off
ARGUMENTS = (
    ("question",         nonempty,     None,         "as the problems of stage 0 write it; without one, the built-in question", {"nargs": "?"}),
    ("--init",           nonempty,     None,         "checkpoint folder or hub name, of stage 2 or 3; without one out/stage3, else the shipped one"),
    ("--prompt-file",    str,          "",           "text that asks for the format; by default the checkpoint's own"),
    ("--temperature",    not_negative, 0.0,          "0 is greedy"),
    ("--max-new-tokens", positive_int, 1024,         "budget, all branches together"),
    ("--seed",           seed_int,     0,            "of the sampling"),
    ("--html",           str,          "",           "write a page for the browser here, on which the decoding can be replayed"),
    ("--device",         device_name,  "auto",       "auto, cpu, cuda"),
)
# fmt: on


def main():
    args = read_arguments(__doc__, ARGUMENTS)
    device = pick_device(args.device)
    init = args.init or finished("stage3")[0]
    model, tokenizer = load(init, device)
    [problem] = [Problem("", args.question, "")] if args.question else make_problems(*BUILT_IN)
    print(f"question: {problem.question}\n")

    # A checkpoint from elsewhere has never seen the prompt of the made problems.
    system = read_prompt(args.prompt_file, not read_object(f"{init}/args.json", {}), init)
    prompt = prompt_ids(tokenizer, problem.question, system)
    settings = dict(temperature=args.temperature, seed=args.seed)

    # On a terminal the branches grow before the reader's eyes; into a file goes the end alone.
    live = sys.stdout.isatty()
    engine = (LiveEngine if live else Engine)(model, tokenizer)
    [[rollout]] = engine.generate([prompt], max_new_tokens=args.max_new_tokens, **settings)
    if not live:
        print("\n".join(render(tokenizer, rollout, 120)))

    # The built-in question's answer is known, any other's is not.
    verdict = ""
    if problem.answer:
        right = problem.verify(response_text(tokenizer, rollout.ids))
        verdict = "right" if right else f"wrong, {problem.answer} is right"
    if args.html:
        page = trace_page([trace(tokenizer, rollout, prompt, problem.question, init, verdict)])
        write_text(Path(args.html), page)

    # What parallel thought bought, in time: now that all is warm, the same again, and the same
    # tokens one by one, in turn.  The best of five counts for the built-in question, because a tiny
    # model's steps are so short that whatever else the machine does shows.
    tokens = len(rollout.ids)
    seconds = {Engine: [], Replay: []}
    for _ in range(1 if args.question else 5):
        for decoder, parallel, budget in ((Engine, True, args.max_new_tokens), (Replay, False, tokens)):
            timed = decoder(model, tokenizer)
            timed.ids = rollout.ids
            timed.generate([prompt], parallel=parallel, max_new_tokens=budget, **settings)
            seconds[decoder].append(timed.stats.seconds)
    mine, theirs = map(min, seconds.values())

    # And in tokens: how many were written for each that had to be waited for.
    ended = rollout.finish_reason + (f": {rollout.error}" if rollout.error else "")
    path = max(1, rollout.critical_path)
    print(
        f"\n{ended}{verdict and ', ' + verdict} | {tokens} tokens on a critical path of {path} "
        f"({tokens / path:.2f}x)\n"
        f"in parallel:       {max(rollout.steps)} steps, {mine:.3f} s\n"
        f"one after another: {tokens} steps, {theirs:.3f} s ({theirs / mine:.2f}x)"
    )


# ==================================================================================================
# 7. CUDA: one kernel for all branches of a row, and captured graphs.  The ideas end above.
# ==================================================================================================
# The kernel is FlashDecoding (split-KV with online softmax) over branches.  A *tile* is up to M
# query rows of one KV row: its new tokens times the query heads that share a key/value head.  The
# slots that a tile looks at are cut into *splits* of about one length over all rows, so that one
# long row fills the GPU as well as many short ones.  Each program takes one split of one key/value
# head; what the splits of a tile saw is merged by the log-sum-exp of their scores.  The launch
# depends on the number of tokens and splits alone: what is in them, lengths too, is read on the
# GPU, so one captured graph serves every step.

SPLIT_SLOTS = 64  # splits are multiples of so many slots


def make_splits(start, length, count, most, target, slots=SPLIT_SLOTS):
    """Cut what a decode step has to look at into splits.  All arrays (R,), int64.

    start, length: a row's first slot, and how many of its slots are in use; count: its new tokens,
    in tiles of at most `most`; target: how many splits the slots of all rows together should give
    (each tile's last split comes on top).  Returns splits (W, 5): start, begin, end, first token,
    tokens; and of_token (2, N): a token's first split, and its number of splits.

    start [0 9], length [5 3], count [2 1], most 8, target 2, slots 4 ->
    splits [[0 0 4 0 2] [0 4 5 0 2] [9 0 3 2 1]], of_token [[0 0 2] [2 2 1]]
    """
    # tiles: a row's new tokens, at most so many together
    row, tile = ragged(-(-count // most))
    first = (np.cumsum(count) - count)[row] + tile * most
    tokens = np.minimum(most, count[row] - tile * most)

    # splits of each tile, all of one size but the last
    size = -(-length[row].sum() // (target * slots)) * slots
    cuts = -(-length[row] // size)
    tile, cut = ragged(cuts)
    end = np.minimum((cut + 1) * size, length[row][tile])
    splits = np.stack([start[row][tile], cut * size, end, first[tile], tokens[tile]], axis=1)
    return splits, np.repeat([np.cumsum(cuts) - cuts, cuts], tokens, axis=1)


if triton is not None:

    @triton.jit
    def split_kv_kernel(
        # what `split_kv_attention` describes
        q,
        q_stride,
        kv,
        slot,
        block,
        branch,
        slot_block,
        slot_branch,
        splits,
        partial,
        partial_lse,
        scale,
        # known when compiled: BLOCK_D is D rounded up, BLOCK_N how many slots are read at once
        H_KV: tl.constexpr,
        REPEAT: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        M: tl.constexpr,
        BLOCK_N: tl.constexpr,
    ):
        """Softmax attention of a tile's queries over one split of one KV head, and its log-sum-exp.

        All in base 2, because exp2 is what the hardware has.
        """
        split, kv_head = tl.program_id(0), tl.program_id(1)
        mine = splits + 5 * split
        start, begin, end = tl.load(mine), tl.load(mine + 1), tl.load(mine + 2)
        first, tokens = tl.load(mine + 3), tl.load(mine + 4)
        if tokens == 0:  # a captured graph launches as many programs as it may ever need
            return

        # Query row m is head m % REPEAT of this key/value head, of the tile's token m // REPEAT.
        m, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
        token, real, wide = first + m // REPEAT, m // REPEAT < tokens, d < D
        heads = q + token[:, None] * q_stride + (kv_head * REPEAT + m % REPEAT)[:, None] * D
        queries = tl.load(heads + d[None], mask=real[:, None] & wide[None], other=0.0)  # (M, D)
        q_slot = tl.load(slot + token, mask=real, other=-1)[:, None]  # (M, 1)
        q_block = tl.load(block + token, mask=real, other=0)[:, None]
        q_branch = tl.load(branch + token, mask=real, other=0)[:, None]

        # Online softmax: weights relative to the largest score so far, rescaled when a larger one
        # comes.
        largest = tl.full((M,), float("-inf"), tl.float32)
        total = tl.zeros((M,), tl.float32)  # sum of 2^(score - largest)
        acc = tl.zeros((M, BLOCK_D), tl.float32)  # sum of 2^(score - largest) value
        for n0 in range(begin, end, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            inside = n < end
            at = (start + n).to(tl.int64)  # a pool may have more than 2^31 numbers
            rows = kv + (at * (2 * H_KV) + kv_head)[:, None] * D + d[None]
            keys = tl.load(rows, mask=inside[:, None] & wide[None], other=0.0)  # (BLOCK_N, D)
            values = tl.load(rows + H_KV * D, mask=inside[:, None] & wide[None], other=0.0)

            # Who sees whom: what came earlier in the row, except siblings.
            k_block = tl.load(slot_block + at, mask=inside, other=0)[None]  # (1, BLOCK_N)
            k_branch = tl.load(slot_branch + at, mask=inside, other=0)[None]
            sibling = (q_block == k_block) & (q_block != 0) & (q_branch != k_branch)
            score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale  # (M, BLOCK_N)
            score = tl.where((n[None] <= q_slot) & inside[None] & (sibling == 0), score, float("-inf"))

            # Nothing seen yet: the base is 0, so that weights are 0 and not exp(-inf + inf).
            new = tl.maximum(largest, tl.max(score, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            weight, shrink = tl.exp2(score - base[:, None]), tl.exp2(largest - base)
            total = total * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            largest = new

        # The log-sum-exp is -inf where nothing was seen.
        to = (split * H_KV + kv_head).to(tl.int64) * M + m
        seen = tl.where(total > 0, total, 1.0)
        tl.store(partial + to[:, None] * D + d[None], acc / seen[:, None], mask=real[:, None] & wide[None])
        tl.store(partial_lse + to, largest + tl.log2(seen), mask=real)

    @triton.jit
    def merge_splits_kernel(
        partial,
        partial_lse,
        splits,
        first_split,
        num_splits,
        out,
        # known when it is compiled: AT_ONCE is how many splits are read at once
        H_KV: tl.constexpr,
        REPEAT: tl.constexpr,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        M: tl.constexpr,
        AT_ONCE: tl.constexpr,
    ):
        """Average a token's and query head's splits, weighted by 2^lse: online softmax again."""
        token, head = tl.program_id(0), tl.program_id(1)
        first, count = tl.load(first_split + token), tl.load(num_splits + token)
        if count == 0:
            return

        # m: the token's query row in its tile
        m = (token - tl.load(splits + 5 * first + 3)) * REPEAT + head % REPEAT
        d = tl.arange(0, BLOCK_D)
        largest = tl.full((AT_ONCE,), float("-inf"), tl.float32)
        total = tl.zeros((AT_ONCE,), tl.float32)
        acc = tl.zeros((AT_ONCE, BLOCK_D), tl.float32)
        for i in range(0, count, AT_ONCE):
            s = i + tl.arange(0, AT_ONCE)
            at = ((first + s) * H_KV + head // REPEAT).to(tl.int64) * M + m
            lse = tl.load(partial_lse + at, mask=s < count, other=float("-inf"))
            values = tl.load(
                partial + at[:, None] * D + d[None], mask=(s < count)[:, None] & (d < D)[None], other=0.0
            )

            # as in the kernel above, AT_ONCE sums side by side
            new = tl.maximum(largest, lse)
            base = tl.where(new == float("-inf"), 0.0, new)
            weight, shrink = tl.exp2(lse - base), tl.exp2(largest - base)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * values
            largest = new

        # A query that saw nothing gets zeros.
        base = tl.max(largest, 0)
        weight = tl.exp2(largest - tl.where(base == float("-inf"), 0.0, base))
        total = tl.sum(weight * total, 0)
        result = tl.sum(weight[:, None] * acc, 0) / tl.where(total > 0, total, 1.0)
        to = out + (token * H_KV * REPEAT + head) * D + d
        tl.store(to, result.to(out.dtype.element_ty), mask=d < D)


def most_query_rows(dtype, D):
    """Most query rows of a tile.  Wide heads in fp32 need smaller tiles, or shared memory is too
    small: 128 rows take 113 KB of it, a 4090 has 99."""
    return 32 if dtype.itemsize == 4 and D > 64 else 128


def split_kv_attention(
    q, kv, slot, block, branch, slot_block, slot_branch, splits, first_split, num_splits, M
):
    """Attention of new tokens over their KV rows, cut by `make_splits` with most = M // (H / H_kv).

    q (N, H, D); kv (slots, 2 H_kv, D), keys and values of one layer; slot, block, branch (N,): each
    token's place in its row, and its integers; slot_block, slot_branch (slots,); splits (W, 5), one
    of 0 tokens is idle; first_split, num_splits (N,), a token of 0 splits is idle and its result
    undefined; M query rows of a tile.  Returns (N, H, D).
    """
    N, H, D = q.shape
    W = len(splits)
    H_kv = kv.shape[1] // 2
    partial = q.new_empty(W, H_kv, M, D, dtype=torch.float32)
    partial_lse = q.new_empty(W, H_kv, M, dtype=torch.float32)
    out = q.new_empty(N, H, D)
    sizes = dict(H_KV=H_kv, REPEAT=H // H_kv, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), M=M)

    # One program per split and key/value head, then one per token and query head.
    scale = D**-0.5 * math.log2(math.e)
    tokens = (slot, block, branch, slot_block, slot_branch, splits)
    tuning = dict(BLOCK_N=64 if q.element_size() == 2 else 32, num_warps=4 if M < 128 else 8, num_stages=2)
    if most_query_rows(q.dtype, D) < 128:
        tuning = dict(BLOCK_N=16, num_warps=8, num_stages=1)
    split_kv_kernel[W, H_kv](q, q.stride(0), kv, *tokens, partial, partial_lse, scale, **sizes, **tuning)
    merge_splits_kernel[N, H](partial, partial_lse, splits, first_split, num_splits, out, **sizes, AT_ONCE=16)
    return out


class CudaGraphs:
    """Runs functions on buffers that stay in place, so that each is captured once and replayed.

    One launch instead of a thousand.  What a function computes must not depend on anything but the
    key, the buffers, and memory that is changed in place (weights, KV pool).  On a CPU it is simply
    run.
    """

    def __init__(self, device):
        self.device = device
        self.buffers = {}
        self.captured = {}
        self.pool = None

    def __call__(self, key, function, *inputs, rows=None):
        """function(*inputs) -> one tensor, valid until the next call.

        rows: inputs are padded to so many with what is left there.
        """
        if key not in self.buffers:
            shapes = [(rows or len(x), *x.shape[1:]) for x in inputs]
            self.buffers[key] = [
                torch.zeros(shape, dtype=x.dtype, device=self.device) for shape, x in zip(shapes, inputs)
            ]
        buffers = self.buffers[key]
        for buffer, x in zip(buffers, inputs):
            if self.device.type == "cuda" and not x.is_cuda:
                x = x.pin_memory()  # from pinned memory a copy does not make the host wait
            buffer[: len(x)].copy_(x, non_blocking=True)
        if self.device.type != "cuda":
            return function(*buffers)

        # Captured at the first meeting of a key, replayed ever after.
        if key not in self.captured:
            self.captured[key] = self.capture(function, buffers)
        graph, result = self.captured[key]
        graph.replay()
        return result

    def capture(self, function, buffers):
        """(graph, its result).

        Run once before capturing: kernels compile and libraries take memory then.  What that run
        wrote, the replay overwrites.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*buffers)
        torch.cuda.current_stream().wait_stream(stream)

        # Graphs run one after another, so they can share their memory.  No garbage is collected in
        # between: were another engine's graphs among it, freeing them would break this capture.
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                result = function(*buffers)
        finally:
            gc.enable()
        return graph, result


MAX_CAPTURED = 1024  # tokens of a step: with more of them the GPU is busy for longer than the launches take


class CudaRunner(ModelRunner):
    """The same steps by the kernel, in buffers of a few sizes, so that graphs can do them."""

    def __init__(self, model, kv_tokens):
        super().__init__(model, kv_tokens)
        self.can_share = False  # the kernel reads every row by itself
        self.graphs = CudaGraphs(model.device)
        # Work that keeps the GPU busy: two programs for each multiprocessor, shared by the
        # key/value heads.
        programs = 16
        if model.device.type == "cuda":
            programs = 2 * torch.cuda.get_device_properties(model.device).multi_processor_count
        self.num_splits = max(1, programs // model.config.num_key_value_heads)

    def feed(self, packed, tips, rows, length, count):
        n = packed.shape[1]
        most = most_query_rows(self.pool.dtype, self.pool.shape[-1])
        M = min(most, max(16, 1 << (int(count.max()) * self.repeat - 1).bit_length()))  # query rows of a tile
        cut, of_token = make_splits(rows * self.capacity, length, count, M // self.repeat, self.num_splits)

        # Of few sizes where they are captured; a large step is not, and padding would cost it
        # gigabytes.  N: tokens, idle ones included.
        N = n
        W = len(cut)
        num_tips = len(tips)
        if n <= MAX_CAPTURED:
            N = num_tips = 1 << (n - 1).bit_length()
            W = N + self.num_splits

        # Idle tokens are stored in the slot that nobody looks at.
        buffer = torch.zeros(9 * N + 5 * W, dtype=torch.long)
        tokens = buffer[: 9 * N].view(9, N).numpy()
        tokens[:5, :n] = packed[:5]  # id, block, branch, position, slot in the row
        tokens[5, : len(tips)] = tips
        tokens[6] = self.kv_tokens
        tokens[6, :n] = packed[5] * self.capacity + packed[4]  # slot in the pool
        tokens[7:, :n] = of_token
        buffer[9 * N :][: cut.size] = torch.from_numpy(cut).flatten()

        def step(buffer):
            tokens = buffer[: 9 * N].view(9, N)
            ids, block, branch, position, slot, tips, self.index, first_split, num_splits = tokens
            self.block[self.index] = block
            self.branch[self.index] = branch
            splits = buffer[9 * N :].view(-1, 5)
            seen = (slot, block, branch, self.block, self.branch, splits, first_split, num_splits, M)

            def look(layer, q):
                return split_kv_attention(q[0], self.pool[layer], *seen)[None]

            # Around the kernel every layer runs compiled.
            self.real = None
            self.look = look
            self.compiled = True
            x = self.model.hidden(ids[None], Layout(block, branch, position), self)[0]  # (N, C)
            return self.model.logits(x[tips[:num_tips]])  # the first len(tips) of them wanted

        if N > MAX_CAPTURED:
            return step(buffer.to(self.model.device))
        return self.graphs(("feed", N, M), step, buffer)[: len(tips)]

    def draw(self, logits, u, shaped, temperature, top_p, top_k):
        """Captured too, where the draw is a plain one."""
        rows = 1 << (len(logits) - 1).bit_length()
        if shaped is not None or top_k or top_p < 1 or len(logits) > MAX_CAPTURED:
            return super().draw(logits, u, shaped, temperature, top_p, top_k)

        def plain(logits, u):
            return draw(logits, u, None, temperature, top_p, top_k)

        return self.graphs(("draw", rows, temperature), plain, logits, u, rows=rows)[:, : len(logits)]


if __name__ == "__main__":
    run_main(main)

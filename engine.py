"""The NPR Engine: a decoder that really forks and joins the KV cache, and the layout that training shares with it.

In : a model (stage0_model.Qwen3), its tokenizer, prompts as token ids.      Out: Rollouts (ids, layout, log-probabilities).

Everything parallel in this project derives from three integers per token, a function of the token ids alone (`layout`):

    token     ..  g  | <step> 1: </step> | <step> 2: b  c </step> | <takeaway> ..        g = </guideline>
    group     0   0  |   1    1    1     |   1    1  1  1    1    |     0      0
    branch    0   0  |   1    1    1     |   2    2  2  2    2    |     0      0
    position  5   6  |   7    8    9     |   7    8  9 10   11    |    12     13
    step 2 sees:  .. g and itself, never step 1.      <takeaway> sees everything.

A token sees what came before it, except its siblings: tokens of the same group (block) and another branch.

    python engine.py --init out/stage3 "2 12 18 make 28?"        # decode one question, print the trajectory
"""

import argparse
import hashlib
import itertools
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from stage0_model import (
    FORMAT_PROMPT, UserError, attention, bucket, load, pad_rows, pick_device, prompt_ids, run_main, uses_flex, visibility, visible_mask,
)  # fmt: skip

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with torch for CUDA, the only place where it is needed
    triton = None

# ======================================================================================================================
# 1. The layout
# ======================================================================================================================

TAGS = ("<guideline>", "</guideline>", "<plan>", "</plan>", "<step>", "</step>", "<takeaway>", "</takeaway>")

# The grammar of a trajectory: (state, tag) -> next state.  The state is named after where the reader stands.
# 'fork' is right after </guideline>, 'between' right after a </step>.  A pair that is not listed is a violation.
GRAMMAR = {
    ("text", "<guideline>"): "guideline",
    ("guideline", "<plan>"): "plan",
    ("plan", "</plan>"): "guideline",
    ("guideline", "</guideline>"): "fork",
    ("fork", "<step>"): "step",
    ("step", "</step>"): "between",
    ("step", "<step>"): "step",  # only in a response cut off while its branches were running: the next branch begins
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
    """group, branch, position of every token: integer arrays (T,), or tensors (B, T) for a padded batch."""

    group: np.ndarray
    branch: np.ndarray
    position: np.ndarray
    lengths: torch.Tensor | None = None  # of a padded batch: tokens of every row, (B,)
    document: torch.Tensor | None = None  # of sequences packed into one row: which of them each token belongs to, (1, N)

    def __len__(self):
        return len(self.group)


def layout(ids, tag_ids, prompt_len=0):
    """The three integers of every token (D3).  O(len(ids)) in time and memory.

    ids: T token ids; tag_ids: {tag: token id}; prompt_len: that many leading tokens are prompt, plain trunk even where they
    quote tags.  A response cut off anywhere has a layout: an unclosed branch ends where the next `<step>` begins.
    Raises MalformedTrajectory at a tag the grammar does not allow, unless the response (or, inside a block, the branch) was
    cut off right there.

    With g = <guideline>, /g = </guideline>, s, /s, t for step and takeaway:
    ids [g /g s x /s s y z /s t] -> group [0 0 1 1 1 2-> 1 1 1 1 0], branch [0 0 1 1 1 2 2 2 2 0], position [0 1 2 3 4 2 3 4 5 6]
    """
    ids = np.asarray(ids, dtype=np.int64)
    n, tag_of = len(ids), {i: tag for tag, i in tag_ids.items()}
    group, branch, position = (np.zeros(n, dtype=np.int32) for _ in range(3))
    marks = np.flatnonzero(np.isin(ids, list(tag_of)))
    state, block, k = "text", 0, 0
    at = 0  # tokens before this index are laid out
    trunk = 0  # position of the next trunk token
    start = 0  # position of every branch's first token in the current block

    def lay_branch(end):  # tokens at..end are branch k of the current block
        nonlocal at, trunk
        group[at:end], branch[at:end], position[at:end] = block, k, np.arange(start, start + end - at)
        trunk, at = max(trunk, start + end - at), end

    def lay_trunk(end):
        nonlocal at, trunk
        position[at:end] = np.arange(trunk, trunk + end - at)
        trunk, at = trunk + end - at, end

    for i in marks[marks >= prompt_len].tolist():
        tag = tag_of[int(ids[i])]
        if (state, tag) not in GRAMMAR:
            if i == n - 1 or (state == "step" and ids[i + 1] == tag_ids["<step>"]):
                continue  # the violation that ended this response, or this branch
            raise MalformedTrajectory(i, f"{tag} is not allowed here (state: {state})")
        if tag == "</guideline>":
            lay_trunk(i + 1)
            block, k, start = block + 1, 0, trunk
        elif tag == "<step>":
            if state == "step":  # the branch before was cut off
                lay_branch(i)
            k += 1  # its span began right after the previous </step> or </guideline>, separators included
        elif tag == "</step>":
            lay_branch(i + 1)
        state = GRAMMAR[state, tag]
    lay_branch(n) if state == "step" else lay_trunk(n)
    return Layout(group, branch, position)


def visible(layout):
    """(T, T) bool, True = row's token sees column's token.  The definition, for tests and pictures; nothing decodes with it."""
    return visible_mask(torch.as_tensor(layout.group)[None], torch.as_tensor(layout.branch)[None])[0].numpy()


def tag_token_ids(tokenizer):
    """{tag: token id}.  Raises UserError when a tag is not a single token: the tokenizer has not been through stage 2."""
    ids = {tag: tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    missing = [tag for tag, i in ids.items() if i is None or i == tokenizer.unk_token_id]
    if missing:
        raise UserError(f"the tokenizer has no {missing[0]} token: parallel mode needs a checkpoint from stage 2 or 3")
    return ids


# ======================================================================================================================
# 2. Teacher forcing: the training side of the layout
# ======================================================================================================================


@dataclass
class Sequence:
    """A prompt and a response to train on or to score.  layout is of the response alone; None: plain causal text."""

    prompt: list
    ids: list
    layout: Layout | None = None


def batches(sequences, max_tokens, device="cpu", pad=0, share=(0, 1)):
    """Cut sequences into padded batches of at most max_tokens (at least one row each), similar lengths together.

    share: (rank, ranks): only every so-many-th sequence in order of length, so that all ranks have the same amount to do.
    Yields (rows, ids, layout, mask): rows lists indices into `sequences`; ids (B, T) int64; layout with (B, T) tensors; mask
    (B, T) bool, True on response tokens.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prompt) + len(sequences[i].ids))[share[0] :: share[1]]
    while order:
        length = len(sequences[order[-1]].prompt) + len(sequences[order[-1]].ids)  # longest first: memory peaks at once
        rows = order[-max(1, max_tokens // length) :]
        del order[-len(rows) :]
        chosen = [sequences[i] for i in rows]
        ids = pad_rows([s.prompt + list(s.ids) for s in chosen], pad)  # (B, T)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        integers = torch.zeros(3, *ids.shape, dtype=torch.long)
        integers[2] = torch.arange(ids.shape[1])
        for b, s in enumerate(chosen):
            P, n = len(s.prompt), len(s.ids)
            mask[b, P : P + n] = True
            if s.layout is not None:
                integers[0, b, P : P + n] = torch.as_tensor(s.layout.group)
                integers[1, b, P : P + n] = torch.as_tensor(s.layout.branch)
                integers[2, b, P : P + n] = P + torch.as_tensor(s.layout.position)
        lengths = torch.tensor([len(s.prompt) + len(s.ids) for s in chosen], device=device)
        yield rows, ids.to(device), Layout(*integers.to(device), lengths), mask.to(device)


def pack(ids, layout):
    """Take the padding out of a batch: (ids (1, N), layout (1, N), place (n,)), the n tokens of its rows one after another and where in the
    B * T each came from.  N is a `bucket`; what it has too many are copies of token 0 in a document of their own.

    ids [[5 6 7] [8 0 0]], lengths [3 1] -> ids [[5 6 7 8 5 5 ..]], document [[0 0 0 1 -1 -1 ..]], place [0 1 2 3]
    """
    real = torch.arange(ids.shape[1], device=ids.device) < layout.lengths[:, None]  # (B, T)
    place = real.flatten().nonzero()[:, 0]  # (n,)
    idle = (0, bucket(len(place)) - len(place))
    taken, document = F.pad(place, idle), F.pad(place // ids.shape[1], idle, value=-1)  # (N,) each
    ids, *integers = (x.flatten()[taken][None] for x in (ids, layout.group, layout.branch, layout.position))
    return ids, Layout(*integers, document=document[None]), place


MAX_LOGITS = 2**25  # largest number of logits that exists at a time: 128 MB in fp32


def token_logprobs(model, ids, layout=None):
    """Log-probability of every token given its predecessor, and the entropy it was drawn from.

    ids (B, T) -> two (B, T) fp32 tensors; entry t is of ids[:, t], column 0 is zero.  A branch's first token follows the last one
    of its sibling in this order, so its entry means nothing; the engine forces that token, so no loss or sample ever uses it.
    """

    def score(x, target):  # (M, C), (M,) -> (M,), (M,)
        log_p = model.logits(x).float().log_softmax(-1)  # (M, V)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)  # (M,)
        return log_p.gather(-1, target[:, None])[:, 0], entropy

    target, place = ids.roll(-1, 1).flatten(), None  # (B*T,)
    if layout is not None and layout.lengths is not None and uses_flex(ids.device):
        packed, layout, place = pack(ids, layout)
        x, target = model.hidden(packed, layout)[0, : len(place)], target[place]  # (n, C), (n,)
    else:
        x = model.hidden(ids, layout).flatten(0, 1)  # (B*T, C)
    # with Qwen3's 151,936 words the logits of 16k tokens would take 10 GB, and their softmax as much again; so only one chunk of them
    # exists at a time, and backward computes it anew
    size = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(x) > size and torch.is_grad_enabled():
        parts = [checkpoint(score, a, b, use_reentrant=False) for a, b in zip(x.split(size), target.split(size))]
    else:
        parts = [score(a, b) for a, b in zip(x.split(size), target.split(size))]
    chosen, entropy = (torch.cat(part) for part in zip(*parts))  # as long as target
    if place is not None:
        chosen, entropy = (y.new_zeros(ids.numel()).index_copy(0, place, y) for y in (chosen, entropy))  # (B*T,)
    return tuple(F.pad(y.view(ids.shape)[:, :-1], (1, 0)) for y in (chosen, entropy))


# ======================================================================================================================
# 3. KV memory: one row per request, prompt, trunk and all branches in order of arrival
# ======================================================================================================================
# A fork copies nothing: it adds query tokens to the row.  A join recomputes nothing: the trunk's next token sees every slot.
# Below, one row from the end of a guideline with two plans to its takeaway.  A step of the engine feeds, at once: slots 12-18 (what the
# fork forces rides along with </guideline>), 19-20, 21-22, and 23-24 (what the join forces rides along with the last </step>).
#
#     slot       12 | 13  14  15  16  17  18 | 19  20 | 21  22 | 23  24
#     token      /g |  s   1   :   s   2   : |  x   y | /s   z | /s   t
#     group       0 |  1   1   1   1   1   1 |  1   1 |  1   1 |  1   0
#     branch      0 |  1   1   1   2   2   2 |  1   2 |  1   2 |  2   0
#     position   12 | 13  14  15  13  14  15 | 16  16 | 17  17 | 18  19


# ---- on CUDA: one kernel reads a row's keys and values once for all branches and heads ----
# A *tile* is up to M query rows of one KV row: its new tokens times the query heads that share a key/value head.  The slots a tile looks at
# are cut into *pieces*, of about one length over all rows, so that one long row fills the GPU as well as many short ones.  Each program
# takes one piece of one key/value head; what the pieces of a tile found is merged by the log-sum-exp of their scores.  The launch depends on
# the number of tokens and pieces alone: what is in them, lengths too, is read on the GPU, so one captured graph serves every step.

PIECE_SLOTS = 64  # pieces are multiples of so many slots


def ragged(counts):
    """Row and column of every item of a ragged list: [2 1] -> [0 0 1], [0 1 0]."""
    row = np.repeat(np.arange(len(counts)), counts)
    return row, np.arange(len(row)) - (np.cumsum(counts) - counts)[row]


def cut_pieces(start, length, count, most, target, block=PIECE_SLOTS):
    """Cut what a decode step has to look at into pieces.  All arrays (R,), int64.

    start, length: a row's first slot, and how many of its slots are in use; count: its new tokens, in tiles of at most `most`; target: how
    many pieces the slots of all rows together should give (each tile's last piece comes on top).
    Returns pieces (W, 5): start, begin, end, first token, tokens; and of_token (2, N): a token's first piece, and number of pieces.

    start [0 9], length [5 3], count [2 1], most 8, target 2, block 4 ->
    pieces [[0 0 4 0 2] [0 4 5 0 2] [9 0 3 2 1]], of_token [[0 0 2] [2 2 1]]
    """
    row, tile = ragged(-(-count // most))
    first, tokens = (np.cumsum(count) - count)[row] + tile * most, np.minimum(most, count[row] - tile * most)  # of each tile
    size = -(-length[row].sum() // (target * block)) * block
    cuts = -(-length[row] // size)  # pieces of each tile
    tile, cut = ragged(cuts)
    end = np.minimum((cut + 1) * size, length[row][tile])
    pieces = np.stack([start[row][tile], cut * size, end, first[tile], tokens[tile]], axis=1)
    return pieces, np.repeat([np.cumsum(cuts) - cuts, cuts], tokens, axis=1)


if triton is not None:

    @triton.jit
    def look_at_piece(
        q, q_stride, kv, slot, group, branch, slot_group, slot_branch, pieces, partial, partial_lse, scale,
        H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Softmax attention of one tile's queries over one piece of one key/value head, and the log-sum-exp (base 2) of its scores."""
        piece, head = tl.program_id(0), tl.program_id(1)
        start, begin, end = tl.load(pieces + 5 * piece), tl.load(pieces + 5 * piece + 1), tl.load(pieces + 5 * piece + 2)
        first, tokens = tl.load(pieces + 5 * piece + 3), tl.load(pieces + 5 * piece + 4)
        if tokens == 0:  # a captured graph launches as many programs as it may ever need
            return
        m, d = tl.arange(0, M), tl.arange(0, BLOCK_D)
        token, real, wide = first + m // G, m // G < tokens, d < D  # query row m is head m % G of the group, of token m // G
        heads = q + token[:, None] * q_stride + (head * G + m % G)[:, None] * D
        queries = tl.load(heads + d[None], mask=real[:, None] & wide[None], other=0.0)  # (M, D)
        q_slot = tl.load(slot + token, mask=real, other=-1)[:, None]  # (M, 1)
        q_group = tl.load(group + token, mask=real, other=0)[:, None]
        q_branch = tl.load(branch + token, mask=real, other=0)[:, None]
        best = tl.full((M,), float("-inf"), tl.float32)  # largest score so far
        total = tl.zeros((M,), tl.float32)  # sum of 2^(score - best)
        found = tl.zeros((M, BLOCK_D), tl.float32)  # sum of 2^(score - best) value
        for n0 in range(begin, end, BLOCK):
            n = n0 + tl.arange(0, BLOCK)
            inside = n < end
            at = (start + n).to(tl.int64)  # a pool may have more than 2^31 numbers
            rows = kv + (at * (2 * H_KV) + head)[:, None] * D + d[None]
            keys = tl.load(rows, mask=inside[:, None] & wide[None], other=0.0)  # (BLOCK, D)
            values = tl.load(rows + H_KV * D, mask=inside[:, None] & wide[None], other=0.0)
            k_group = tl.load(slot_group + at, mask=inside, other=0)[None]  # (1, BLOCK)
            k_branch = tl.load(slot_branch + at, mask=inside, other=0)[None]
            sibling = (q_group == k_group) & (q_group != 0) & (q_branch != k_branch)
            score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale  # (M, BLOCK)
            score = tl.where((n[None] <= q_slot) & inside[None] & (sibling == 0), score, float("-inf"))
            new = tl.maximum(best, tl.max(score, 1))
            base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: weights of 0, not of -inf + inf
            weight, shrink = tl.exp2(score - base[:, None]), tl.exp2(best - base)
            total = total * shrink + tl.sum(weight, 1)
            found = found * shrink[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            best = new
        to = (piece * H_KV + head).to(tl.int64) * M + m
        seen = tl.where(total > 0, total, 1.0)
        tl.store(partial + to[:, None] * D + d[None], found / seen[:, None], mask=real[:, None] & wide[None])
        tl.store(partial_lse + to, best + tl.log2(seen), mask=real)  # -inf where nothing was seen

    @triton.jit
    def merge_pieces(
        partial, partial_lse, pieces, first_piece, num_pieces, out,
        H_KV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, AT_ONCE: tl.constexpr,
    ):  # fmt: skip
        """Average the pieces of one token and query head, weighted by 2^lse."""
        token, head = tl.program_id(0), tl.program_id(1)
        p0, count = tl.load(first_piece + token), tl.load(num_pieces + token)
        if count == 0:
            return
        m = (token - tl.load(pieces + 5 * p0 + 3)) * G + head % G  # the query row of its tile
        d = tl.arange(0, BLOCK_D)
        best = tl.full((AT_ONCE,), float("-inf"), tl.float32)
        total = tl.zeros((AT_ONCE,), tl.float32)
        found = tl.zeros((AT_ONCE, BLOCK_D), tl.float32)
        for i in range(0, count, AT_ONCE):
            p = i + tl.arange(0, AT_ONCE)
            at = ((p0 + p) * H_KV + head // G).to(tl.int64) * M + m
            lse = tl.load(partial_lse + at, mask=p < count, other=float("-inf"))
            piece = tl.load(partial + at[:, None] * D + d[None], mask=(p < count)[:, None] & (d < D)[None], other=0.0)
            new = tl.maximum(best, lse)
            base = tl.where(new == float("-inf"), 0.0, new)
            weight, shrink = tl.exp2(lse - base), tl.exp2(best - base)
            total = total * shrink + weight
            found = found * shrink[:, None] + weight[:, None] * piece
            best = new
        base = tl.max(best, 0)
        weight = tl.exp2(best - tl.where(base == float("-inf"), 0.0, base))
        total, found = tl.sum(weight * total, 0), tl.sum(weight[:, None] * found, 0)
        result = found / tl.where(total > 0, total, 1.0)  # a query that saw nothing gets zeros
        tl.store(out + (token * H_KV * G + head) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def attend_pieces(q, kv, slot, group, branch, slot_group, slot_branch, pieces, first_piece, num_pieces, M):
    """Attention of new tokens over their KV rows, cut by `cut_pieces` with most = M // G.

    q (N, H, D); kv (slots, 2 H_kv, D), keys and values of one layer; slot, group, branch (N,): each token's place in its row, and its
    integers; slot_group, slot_branch (slots,); pieces (W, 5), a piece of 0 tokens is idle; first_piece, num_pieces (N,), a token of 0 pieces
    is idle and its result undefined; M query rows of a tile.  Returns (N, H, D).
    """
    (N, H, D), W, H_kv = q.shape, len(pieces), kv.shape[1] // 2
    partial = torch.empty(W, H_kv, M, D, device=q.device, dtype=torch.float32)
    partial_lse, out = torch.empty(W, H_kv, M, device=q.device, dtype=torch.float32), torch.empty(N, H, D, device=q.device, dtype=q.dtype)
    sizes = dict(H_KV=H_kv, G=H // H_kv, D=D, BLOCK_D=max(16, triton.next_power_of_2(D)), M=M)
    look_at_piece[W, H_kv](
        q, q.stride(0), kv, slot, group, branch, slot_group, slot_branch, pieces, partial, partial_lse, D**-0.5 * math.log2(math.e), **sizes,
        BLOCK=64 if q.element_size() == 2 else 32, num_warps=4 if M < 128 else 8, num_stages=2,
    )  # fmt: skip
    merge_pieces[N, H](partial, partial_lse, pieces, first_piece, num_pieces, out, **sizes, AT_ONCE=16)
    return out


class KVMemory:
    """A fixed pool of kv_tokens slots, cut into rows of equal capacity; the cut moves when a row needs more.

    Two arrangements were considered: rows (this one) and pages of 32 slots with a table per request.  Rows let attention read memory as it
    lies.  Pages waste less, but a CPU has to gather them in every layer of every step: measured on one thread, tiny model, 64 rows of 320
    slots, attention takes 0.42 ms on rows and the gather alone 1.03 ms.  Rows pay with padding up to the longest request.
    """

    def __init__(self, config, kv_tokens, device, dtype):
        self.config, self.kv_tokens = config, kv_tokens
        # A slot holds one token's keys and values of all heads, so that storing a token is one copy.  Zeros, not empty: a
        # masked slot has weight 0, and 0 * NaN garbage would still be NaN.  One slot more than the budget: idle tokens of a
        # captured graph are stored there.
        self.pool = torch.zeros(
            config.num_hidden_layers, kv_tokens + 1, 2 * config.num_key_value_heads, config.head_dim, device=device, dtype=dtype
        )  # (layers, slots, 2 H_kv, D)
        self.group, self.branch = torch.zeros(2, kv_tokens + 1, device=device, dtype=torch.long)  # of the token in each slot
        self.bytes_per_token = self.pool[:, 0].numel() * self.pool.element_size()
        self.moved_bytes, self.fused = 0, False
        self.cut(0, 0)

    def cut(self, rows, capacity):
        """Row r is slots r * capacity .. (r + 1) * capacity from now on."""
        self.rows, self.capacity = rows, capacity

    def recut(self, rows, capacity, used):
        """Cut anew and move the rows in use, used[r] slots of row r; when rows grow, the last moves first."""
        old, grow = self.capacity, capacity > self.capacity
        self.cut(rows, capacity)
        for r in sorted(range(len(used)), reverse=grow):
            self.move(r * old, r * capacity, used[r])

    def move(self, source, target, n):
        """Copy n slots, to share a prompt, to close the gap a finished request leaves, or to cut anew; the spans may overlap."""
        for store in (self.pool, self.group[None], self.branch[None]):
            store[:, target : target + n] = store[:, source : source + n].clone()
        self.moved_bytes += n * self.bytes_per_token

    def aim_prefill(self, row, lengths, group, branch):
        """The coming forward fills these empty rows.  row, lengths (B,); group, branch (B, T), padded."""
        column = torch.arange(group.shape[1], device=row.device)
        self.chosen = (column < lengths[:, None]).flatten().nonzero()[:, 0]  # (N,) of the B * T, the padding left out
        self.index = (row[:, None] * self.capacity + column).flatten()[self.chosen]  # (N,) slots
        self.group[self.index], self.branch[self.index] = group.flatten()[self.chosen], branch.flatten()[self.chosen]
        self.mask, self.fused = visibility(group, branch), False

    def aim_pieces(self, index, slot, group, branch, pieces, first_piece, num_pieces, M):
        """The coming forward adds N packed tokens to running rows, and the kernel looks at the rows.  index (N,): a token's slot in the pool;
        the rest as in `attend_pieces`."""
        self.index, self.chosen, self.fused = index, None, True
        self.group[index], self.branch[index] = group, branch
        self.plan = slot, group, branch, self.group, self.branch, pieces, first_piece, num_pieces, M

    def aim_decode(self, row, slot, col, group, branch, shape, no_mask):
        """The same without a kernel: one (R, Q) batch and a mask.  All (N,): a token's row, its slot there, its place among the row's
        new tokens, and its integers.  shape (R, Q, S): rows, most new tokens of one row, and the longest row after this call.
        no_mask: every row feeds one trunk token into slot S - 1, which sees all there is."""
        (R, Q, S), self.chosen, self.plan = shape, None, None
        self.index = row * self.capacity + slot
        self.group[self.index], self.branch[self.index] = group, branch
        self.place = None if len(row) == R * Q else row * Q + col  # rows that feed fewer tokens are padded with idle queries
        self.seen = self.pool[:, : R * self.capacity].unflatten(1, (R, self.capacity))[:, :, :S].transpose(2, 3)  # (layers, R, 2 H_kv, S, D)
        H_kv, self.bias = self.config.num_key_value_heads, None
        self.shape = R, Q, H_kv, self.config.num_attention_heads // H_kv
        if no_mask:
            return
        q = torch.zeros(3, R * Q, dtype=torch.long, device=row.device)  # idle queries look at slot 0 and are thrown away
        q[:, row * Q + col] = torch.stack([slot, group, branch])
        q_slot, q_group, q_branch = q.view(3, R, Q, 1)
        rows = lambda x: x[: R * self.capacity].view(R, 1, self.capacity)[..., :S]  # noqa: E731
        k_group, k_branch = rows(self.group), rows(self.branch)  # (R, 1, S)
        blind = torch.arange(S, device=row.device) > q_slot  # (R, Q, S)
        blind |= (q_group == k_group) & (q_group != 0) & (q_branch != k_branch)
        bias = torch.zeros(R, Q, S, dtype=self.pool.dtype, device=row.device).masked_fill_(blind, float("-inf"))
        # query heads that share a key/value head become further queries, so keys and values are read once for all of them
        self.bias = bias.repeat(1, self.shape[3], 1)[:, None]  # (R, 1, G*Q, S)

    def attend(self, layer, q, k, v):
        """Store k, v (B, T, H_kv, D), attend with q (B, T, H, D) -> (B, T, H, D).  Decoding: B = 1 and T = N packed tokens."""
        new = torch.cat([k, v], dim=2).flatten(0, 1)  # (B*T, 2 H_kv, D)
        self.pool[layer].index_copy_(0, self.index, new if self.chosen is None else new[self.chosen])
        if self.chosen is not None:  # prefill: nothing earlier lies in these rows, so attention stays within the call
            return attention(q, k, v, self.mask)
        if self.plan is not None:
            return attend_pieces(q[0], self.pool[layer], *self.plan)[None]
        (R, Q, H_kv, G), (_, _, H, D) = self.shape, q.shape
        if self.place is not None:
            q = q.new_zeros(R * Q, H, D).index_copy_(0, self.place, q[0])
        keys, values = self.seen[layer].chunk(2, dim=1)  # (R, H_kv, S, D) each
        if Q == 1 and self.place is None:
            return F.scaled_dot_product_attention(q.reshape(R, H_kv, G, D), keys, values, attn_mask=self.bias).reshape(1, R, H, D)
        q = q.reshape(R, Q, H_kv, G, D).permute(0, 2, 3, 1, 4).reshape(R, H_kv, G * Q, D)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.bias)  # (R, H_kv, G*Q, D)
        out = out.unflatten(2, (G, Q)).permute(0, 3, 1, 2, 4).reshape(1, R * Q, H, D)
        return out if self.place is None else out[:, self.place]


# ======================================================================================================================
# 4. The engine
# ======================================================================================================================


@dataclass
class Rollout:
    """One response.  All per-token fields are in sequence order: a block's branches one after another."""

    ids: list  # response token ids, end-of-turn included
    layout: Layout  # of the response alone: positions count from 0
    forced: list  # bool: True where the engine wrote the token (`<step>`, its number, `<takeaway>`)
    logprobs: list  # log-probability at temperature 1, before truncation and penalty; 0.0 for forced tokens
    finish_reason: str  # stop, length or malformed
    critical_path: int  # longest chain of dependent tokens
    num_forks: int  # blocks that the engine really forked
    max_branches: int = 0  # widest of them
    error: str = ""  # what was malformed


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


MAX_CAPTURED = 1024  # tokens of a step: with more of them the GPU is busy for longer than the launches take


class Replay:
    """Runs functions on buffers that stay where they are, so that on CUDA each is captured as a graph once per key and then replayed: one
    launch instead of a thousand.  What a function computes must not depend on anything but the key, the buffers, and memory that is changed
    in place (weights, KV pool).  On a CPU the function is simply run."""

    def __init__(self, device):
        self.device, self.buffers, self.captured, self.pool = device, {}, {}, None

    def __call__(self, key, function, *inputs, rows=None):
        """function(*inputs) -> one tensor, valid until the next call.  rows: inputs are padded to so many with what is left there."""
        if key not in self.buffers:
            self.buffers[key] = [torch.zeros(rows or len(x), *x.shape[1:], dtype=x.dtype, device=self.device) for x in inputs]
        buffers = self.buffers[key]
        for buffer, x in zip(buffers, inputs):  # from pinned memory a copy does not make the host wait
            x = x.pin_memory() if self.device.type == "cuda" and not x.is_cuda else x
            buffer[: len(x)].copy_(x, non_blocking=True)
        if self.device.type != "cuda":
            return function(*buffers)
        if key not in self.captured:
            self.captured[key] = self.capture(function, buffers)
        graph, result = self.captured[key]
        graph.replay()
        return result

    def capture(self, function, buffers):
        """A first run off the record compiles kernels and lets libraries take their memory; it writes what the replay will write again."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self.pool = self.pool or torch.cuda.graph_pool_handle()  # graphs run one after another: they can share their memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function(*buffers)
        return graph, result


def draw(logits, u, shaped, temperature, top_p, top_k):
    """One token for each row of logits (M, V) -> (2, M) float64: token ids, and their log-probabilities without temperature and the rest.

    u (M,): random numbers in [0, 1); shaped (M, V): the logits after penalties, None for the same; temperature 0: the likeliest token.
    """
    size = max(1, MAX_LOGITS // logits.shape[1])
    if len(logits) > size:  # 1,024 rows of Qwen3's vocabulary would take 3 GB in here
        parts = zip(logits.split(size), u.split(size), itertools.repeat(None) if shaped is None else shaped.split(size))
        return torch.cat([draw(*part, temperature, top_p, top_k) for part in parts], dim=1)
    log_p = logits.float().log_softmax(-1)  # (M, V), of the model itself: what training will see
    untouched, shaped = shaped is None and temperature == 1.0, logits if shaped is None else shaped
    if temperature == 0:
        token = shaped.argmax(-1)  # (M,)
    else:
        p = log_p.exp() if untouched else (shaped.float() / temperature).softmax(-1)  # (M, V)
        if top_k or top_p < 1:
            ranked, order = p.sort(dim=-1, descending=True)
            cut = ranked.cumsum(-1) - ranked >= top_p  # the smallest set that holds top_p
            if top_k:
                cut[:, top_k:] = True
            p = torch.zeros_like(p).scatter_(-1, order, ranked.masked_fill(cut, 0.0))
        # inverse CDF with the request's own random numbers: which neighbours share the batch cannot matter
        cdf = p.double().cumsum(-1)  # (M, V)
        token = torch.searchsorted(cdf, u[:, None].double() * cdf[:, -1:], right=True)[:, 0].clamp_(max=p.shape[-1] - 1)
    return torch.stack([token.double(), log_p.gather(-1, token[:, None])[:, 0].double()])


@dataclass
class Request:
    """A running response.  Token lists are in order of arrival and begin with the prompt; the first `fed` are in the KV row.
    `heads` are the indices whose successor is sampled next: the trunk's last token, or that of each live branch."""

    index: int
    prompt_len: int
    ids: list
    uniforms: np.ndarray  # one random number per generated token, drawn up front: the stream of this request alone
    group: list
    branch: list
    position: list
    forced: list
    logprobs: list
    heads: list
    fed: int = 0
    state: str = "text"  # of the trunk, in GRAMMAR
    opened: int = 0  # index of the open <guideline>
    block: int = 0
    finish: str = ""
    error: str = ""
    widths: list = field(default_factory=list)  # branches of each fork

    @property
    def used(self):
        return len(self.ids) - self.prompt_len

    def append(self, token, group, branch, position, logprob=0.0, forced=False):
        self.ids.append(token)
        self.group.append(group)
        self.branch.append(branch)
        self.position.append(position)
        self.logprobs.append(logprob)
        self.forced.append(forced)


class Engine:
    """Decode many requests at once, sequentially or in parallel branches, within a fixed KV budget.

    kv_tokens: slots in the KV pool; default a quarter of the memory (free CUDA memory, or RAM), at most 2^18 slots.
    max_rows: most requests decoded together.  kernel: decode with the kernel and captured graphs; default wherever they run, on CUDA.
    """

    def __init__(self, model, tokenizer, kv_tokens=None, max_rows=256, kernel=None):
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        config, weight = model.config, model.model["embed_tokens"].weight
        if kv_tokens is None:
            per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * weight.element_size()
            ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            room = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else ram
            kv_tokens = max(1024, min(2**18, room // 4 // per_token))
        self.memory = KVMemory(config, kv_tokens, weight.device, weight.dtype)
        self.kernel = weight.is_cuda and triton is not None and config.head_dim <= 128 if kernel is None else kernel
        if weight.is_cuda and triton is None:
            print("triton is not installed: decoding without kernel and captured graphs, several times slower; pip install triton")
        self.replay = Replay(weight.device)
        # pieces of work that keep the GPU busy: two programs for each multiprocessor, shared by the key/value heads
        programs = 2 * torch.cuda.get_device_properties(weight.device).multi_processor_count if weight.is_cuda else 16
        self.pieces = max(1, programs // config.num_key_value_heads)
        eos = config.eos_token_id
        self.end_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
        self.stats = Stats()
        self.active, self.waiting = [], deque()

    @property
    def kv_tokens_in_use(self):
        return sum(r.fed for r in self.active)

    @torch.no_grad()
    def generate(
        self, prompts, n=1, parallel=True, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, seed=0,
        max_branches=8, step_repetition_penalty=1.0, progress=False,
    ):  # fmt: skip
        """n responses to every prompt: list (prompts) of lists (n) of Rollout.

        prompts: lists of token ids.  parallel False: tags mean nothing, plain sampling.  max_new_tokens counts every token of every
        branch, and the forced ones.  temperature 0 is greedy.  step_repetition_penalty divides positive (multiplies negative)
        logits of tokens that the same branch already holds.  A response depends on seed, its prompt and its number among the
        samples of that prompt, and on nothing else in the call.  Raises UserError when a request cannot fit the KV budget, or
        when the tokenizer lacks the tags in parallel mode.
        """
        began = time.time()
        self.parallel, self.max_new_tokens, self.max_branches = parallel, max_new_tokens, max_branches
        self.temperature, self.top_p, self.top_k, self.penalty = temperature, top_p, top_k, step_repetition_penalty
        self.tag_ids = tag_token_ids(self.tokenizer) if parallel else {}
        self.tag_of = {i: tag for tag, i in self.tag_ids.items()}
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        requests, copies = [], {}
        for prompt in prompts:
            if not prompt:
                raise UserError("an empty prompt: every request needs at least one prompt token")
            if len(prompt) + max_new_tokens > self.memory.kv_tokens:
                raise UserError(
                    f"prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens} exceed the KV budget of "
                    f"{self.memory.kv_tokens} tokens; raise kv_tokens or shorten them"
                )
            P, digest = len(prompt), hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()
            for _ in range(n):
                copies[digest] = copies.get(digest, -1) + 1  # sample number of this very prompt
                stream = np.random.default_rng([seed, int.from_bytes(digest[:8], "little"), copies[digest]])
                requests.append(
                    Request(
                        len(requests), P, list(prompt), stream.random(max_new_tokens, dtype=np.float32),
                        [0] * P, [0] * P, list(range(P)), [True] * P, [0.0] * P, heads=[P - 1],
                    )  # fmt: skip
                )
        self.waiting.extend(requests)
        longest = max((r.prompt_len for r in requests), default=0) + max_new_tokens
        rows = min(len(requests), self.max_rows)
        roomy = rows * longest <= self.memory.kv_tokens  # every row can have its worst case: nothing will ever be preempted
        self.memory.cut(rows, longest) if roomy else self.memory.cut(0, 0)
        bar = tqdm(total=len(requests), desc="rollout", unit="seq", leave=False, disable=not progress)
        try:
            while self.waiting or self.active:
                done = self.step()
                bar.update(done)
                if done and progress:
                    bar.set_postfix(tok_s=f"{sum(r.used for r in requests) / (time.time() - began):.0f}", refresh=False)
        finally:  # whatever happened, every slot is free again
            self.active, self.waiting = [], deque()
            bar.close()
        self.stats.seconds += time.time() - began
        self.stats.moved_kv_bytes = self.memory.moved_bytes
        self.stats.tokens += sum(r.used for r in requests)
        self.stats.forced_tokens += sum(sum(r.forced[r.prompt_len :]) for r in requests)
        rollouts = [self.result(r) for r in requests]
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]

    def step(self):
        """One decode step of every running request: schedule, run, postprocess.  Returns how many finished."""
        fresh = self.schedule()
        logits = self.run(fresh)  # (heads of all active requests, V)
        self.stats.peak_kv_tokens = max(self.stats.peak_kv_tokens, self.kv_tokens_in_use)
        tokens, logprobs = self.sample(logits)
        i, done = 0, 0
        for request in self.active:
            k = len(request.heads)
            self.postprocess(request, tokens[i : i + k], logprobs[i : i + k])
            i += k
        for row in reversed(range(len(self.active))):
            if self.active[row].finish:
                self.vacate(row)
                done += 1
        return done

    def vacate(self, row):
        """Take the request in this row off the machine; the last row fills the gap, so that running rows stay side by side."""
        request, last = self.active[row], self.active.pop()
        if last is not request:
            self.active[row] = last
            self.memory.move(len(self.active) * self.memory.capacity, row * self.memory.capacity, last.fed)
        return request

    # ---- schedule ----

    def schedule(self):
        """Make room for what running rows will feed, preempt the youngest if there is none, admit waiting requests.
        Returns the admitted."""
        memory, budget = self.memory, self.memory.kv_tokens
        need = max((len(r.ids) for r in self.active), default=0)
        if need > memory.capacity:
            capacity = min(budget, max(need, memory.capacity * 3 // 2) + 31)
            rows = min(self.max_rows, budget // capacity)
            while len(self.active) > rows:
                youngest = self.vacate(max(range(len(self.active)), key=lambda row: self.active[row].index))
                youngest.fed = 0  # its keys and values are dropped; on its return all its tokens are prefilled at once
                self.waiting.appendleft(youngest)
                self.stats.preemptions += 1
            memory.recut(rows, capacity, [r.fed for r in self.active])
            return []  # no admission in a step that was short of room
        fresh = []
        while self.waiting:
            need = len(self.waiting[0].ids)
            if not self.active and not fresh and need + min(32, self.max_new_tokens) > memory.capacity:
                capacity = min(budget, need + max(32, need // 2))
                memory.cut(min(self.max_rows, budget // capacity), capacity)
            if len(self.active) == memory.rows or need > memory.capacity:
                break
            request = self.waiting.popleft()
            self.active.append(request)
            fresh.append(request)
        return fresh

    # ---- run ----

    def run(self, fresh):
        """Feed every token that is not in the KV rows yet; logits (M, V) of all heads, in the order of `active`."""
        if not fresh:  # the usual step: every request is running
            return self.decode(range(len(self.active)))
        row_of = {id(r): row for row, r in enumerate(self.active)}
        settled = {tuple(r.ids[: r.prompt_len]): r for r in self.active if r.fed}
        logits = {}
        leaders, followers = [], []
        for request in fresh:  # one prefill for all samples of a prompt
            key = tuple(request.ids[: request.prompt_len])
            if key in settled and request.used == 0:
                followers.append((request, settled[key]))
            else:
                leaders.append(request)
                settled[key] = request
        leaders.sort(key=lambda r: len(r.ids))
        while leaders:
            count = max(1, 8192 // len(leaders[-1].ids))
            logits |= self.prefill(leaders[-count:], row_of)
            del leaders[-count:]
        for request, source in followers:  # all but the last prompt token, which has to be fed for its logits
            request.fed = request.prompt_len - 1
            self.memory.move(row_of[id(source)] * self.memory.capacity, row_of[id(request)] * self.memory.capacity, request.fed)
            self.stats.shared_prompt_tokens += request.fed
        feeding = [row for row, r in enumerate(self.active) if len(r.ids) > r.fed]
        if feeding:
            parts = self.decode(feeding).split([len(self.active[row].heads) for row in feeding])
            logits |= {id(self.active[row]): part for row, part in zip(feeding, parts)}
        return torch.cat([logits[id(r)] for r in self.active])

    def prefill(self, requests, row_of):
        """Feed whole requests into empty rows, padded to one batch."""
        device = self.model.device
        # with branches FlexAttention is compiled for every length, so let the lengths be few
        T = bucket(max(len(r.ids) for r in requests)) if uses_flex(device) and any(r.block for r in requests) else 0
        ids, group, branch, position = (
            pad_rows([getattr(r, name) for r in requests], 0, T).to(device) for name in ("ids", "group", "branch", "position")
        )  # (B, T) each
        lengths = torch.tensor([len(r.ids) for r in requests], device=device)
        self.memory.aim_prefill(torch.tensor([row_of[id(r)] for r in requests], device=device), lengths, group, branch)
        x = self.model.hidden(ids, Layout(group, branch, position), self.memory)  # (B, T, C)
        heads = [(i, h) for i, r in enumerate(requests) for h in r.heads]
        i, h = torch.tensor(heads, device=device).unbind(1)
        parts = self.model.logits(x[i, h]).split([len(r.heads) for r in requests])
        for r in requests:
            r.fed = len(r.ids)
            self.stats.prefill_tokens += r.fed
        return {id(r): part for r, part in zip(requests, parts)}

    def decode(self, rows):
        """Feed the new tokens of these rows; logits (M, V) of their heads.  Packed for the matrices, by row for the attention."""
        requests, rows = [self.active[row] for row in rows], np.array(rows)  # (R,)
        fed = np.array([r.fed for r in requests])
        count = np.array([len(r.ids) for r in requests]) - fed  # new tokens of each row
        of, col = ragged(count)  # (N,) each
        row, slot = rows[of], fed[of] + col
        first = np.cumsum(count) - count  # index of each row's first token among the N
        head = [f + h - r.fed for f, r in zip(first.tolist(), requests) for h in r.heads]
        packed = [[x for r in requests for x in getattr(r, name)[r.fed :]] for name in ("ids", "group", "branch", "position")]
        feed = self.feed_by_kernel if self.kernel else self.feed_by_row
        logits = feed(np.array([*packed, row, slot, col], dtype=np.int64), head, rows, fed + count, count)
        for r in requests:
            r.fed = len(r.ids)
        self.stats.decode_steps += 1
        return logits

    def feed_by_row(self, packed, head, rows, length, count):
        """packed (7, N): ids, group, branch, position, row, slot, col; head: indices of M of them; the rest as in `cut_pieces`."""
        shape = rows[-1] + 1, count.max(), length.max()
        no_mask = shape[1] == 1 and length.min() == shape[2] and not packed[1].any()
        ids, group, branch, position, row, slot, col = torch.from_numpy(packed).to(self.model.device)  # one copy
        self.memory.aim_decode(row, slot, col, group, branch, shape, no_mask)
        x = self.model.hidden(ids[None], Layout(group, branch, position), self.memory)[0]  # (N, C)
        return self.model.logits(x[torch.tensor(head, device=x.device)])

    def feed_by_kernel(self, packed, head, rows, length, count):
        """The same through the kernel, in buffers of a few sizes, so that a captured graph can do it."""
        (_, n), config = packed.shape, self.model.config
        N, G = 1 << (n - 1).bit_length(), config.num_attention_heads // config.num_key_value_heads
        M = min(128, max(16, 1 << (int(count.max()) * G - 1).bit_length()))  # query rows of a tile
        cut, of_token = cut_pieces(rows * self.memory.capacity, length, count, M // G, self.pieces)
        tokens, pieces = np.zeros((9, N), dtype=np.int64), np.zeros((N + self.pieces, 5), dtype=np.int64)
        tokens[6] = self.memory.kv_tokens  # idle tokens are stored in the slot that nobody looks at
        tokens[:4, :n], tokens[4, :n], tokens[5, : len(head)] = packed[:4], packed[5], head
        tokens[6, :n], tokens[7:, :n], pieces[: len(cut)] = packed[4] * self.memory.capacity + packed[5], of_token, cut

        def feed(buffer):
            tokens, pieces = buffer[: 9 * N].view(9, N), buffer[9 * N :].view(-1, 5)
            ids, group, branch, position, slot, head, index, first_piece, num_pieces = tokens
            self.memory.aim_pieces(index, slot, group, branch, pieces, first_piece, num_pieces, M)
            x = self.model.hidden(ids[None], Layout(group, branch, position), self.memory)[0]  # (N, C)
            return self.model.logits(x[head])  # (N, V), the first len(head) of them wanted

        buffer = torch.from_numpy(np.concatenate([tokens.ravel(), pieces.ravel()]))
        if N > MAX_CAPTURED:
            return feed(buffer.to(self.model.device))[: len(head)]
        return self.replay(("feed", N, M), feed, buffer)[: len(head)]

    # ---- sample ----

    def sample(self, logits):
        """One token for each head: logits (M, V) -> (token ids, log-probabilities), lists of M."""
        M, V = logits.shape
        u = np.concatenate([r.uniforms[r.used : r.used + len(r.heads)] for r in self.active]) if self.temperature else np.zeros(M)
        u, how = torch.from_numpy(u), (self.temperature, self.top_p, self.top_k)
        if self.kernel and self.penalty == 1.0 and not self.top_k and self.top_p == 1.0 and M <= MAX_CAPTURED:
            rows = 1 << (M - 1).bit_length()
            drawn = self.replay(("draw", rows, how), lambda logits, u: draw(logits, u, None, *how), logits, u, rows=rows)[:, :M]
        else:
            shaped = self.penalise(logits) if self.penalty != 1.0 else None
            drawn = draw(logits, u.to(logits.device), shaped, *how)
        token, logprob = drawn.tolist()  # the one time that the host waits for the GPU
        return [int(t) for t in token], logprob

    def penalise(self, logits):
        """The logits (M, V) after the repetition penalty: inside a step, on the tokens that its branch already holds."""
        logits = logits.float().clone()
        heads = [(r, h) for r in self.active for h in r.heads]
        for m, (r, h) in enumerate(heads):
            if r.group[h]:
                mine = [t for t, g, b in zip(r.ids, r.group, r.branch) if g == r.group[h] and b == r.branch[h]]
                mine = torch.tensor(sorted(set(mine)), device=logits.device)
                x = logits[m, mine]
                logits[m, mine] = torch.where(x > 0, x / self.penalty, x * self.penalty)
        return logits

    # ---- postprocess: the life of a request ----

    def postprocess(self, request, tokens, logprobs):
        """Append one sampled token per head, then fork, join, go on, or finish."""
        heads, request.heads = request.heads, []
        for head, token, logprob in zip(heads, tokens, logprobs):
            group, branch, position = request.group[head], request.branch[head], request.position[head] + 1
            request.append(token, group, branch, position, logprob)
            tag, last = self.tag_of.get(token), len(request.ids) - 1
            if group:  # in a step
                if tag == "</step>":
                    continue
                if tag or token in self.end_ids:
                    request.finish, request.error = "malformed", f"{tag or 'end of turn'} inside step {branch}"
                request.heads.append(last)
            elif token in self.end_ids:
                request.finish = "stop"
            elif tag is None:
                request.heads.append(last)
            elif (request.state, tag) not in GRAMMAR:
                request.finish, request.error = "malformed", f"{tag} in state {request.state}"
            else:
                request.state = GRAMMAR[request.state, tag]
                if tag == "<guideline>":
                    request.opened = last
                if tag == "</guideline>":
                    self.fork(request)
                else:
                    request.heads.append(last)
        if not request.finish and not request.heads:
            self.join(request)
        if not request.finish and request.used + len(request.heads) > self.max_new_tokens:
            request.finish = "length"

    def fork(self, request):
        """Validate the guideline that just closed, then open one branch per plan, each with its forced beginning."""
        plans, space, problem = self.read_plans(request.ids[request.opened + 1 : -1])
        room = self.max_new_tokens - request.used
        # a checkpoint trained elsewhere may give every tag a line of its own (NPR-4B does): its steps open with the white space that it
        # has just written itself.  That space belongs to the branch, as in `layout`.
        openings = [self.tokenizer.encode(f"{space}<step>{space}{i}:", add_special_tokens=False) for i in range(1, plans + 1)]
        if not problem and not 1 <= plans <= self.max_branches:
            problem = f"{plans} plans, allowed are 1 to {self.max_branches}"
        if not problem and sum(map(len, openings)) + plans > room:
            problem = f"budget of {room} tokens left for {plans} branches"
        if problem:
            request.finish, request.error = "malformed", problem
            return
        request.block += 1
        request.widths.append(plans)
        start = request.position[-1] + 1
        for i, opening in enumerate(openings, 1):
            for offset, token in enumerate(opening):
                request.append(token, request.block, i, start + offset, forced=True)
            request.heads.append(len(request.ids) - 1)

    def read_plans(self, inside):
        """(number of plans, white space after the last, problem or '') of the ids between <guideline> and </guideline>.  The tags' order
        is already known to be right; left to check are the numbers, that no plan is empty, and that nothing stands between plans."""
        count, content, outside, in_plan, last = 0, [], [], False, 0
        for token in inside:
            tag = self.tag_of.get(token)
            if tag == "<plan>":
                in_plan, content = True, []
            elif tag == "</plan>":
                in_plan, count, last = False, count + 1, len(outside)
                if not re.match(rf"\s*{count}:\s*\S", self.tokenizer.decode(content)):
                    return count, "", f"plan {count} does not read '{count}: ..'"
            else:
                (content if in_plan else outside).append(token)
        return count, self.tokenizer.decode(outside[last:]), "text between plans" if self.tokenizer.decode(outside).strip() else ""

    def join(self, request):
        """All branches have closed: the trunk goes on, seeing every one of them, one position after the longest."""
        if request.used >= self.max_new_tokens:
            request.finish = "length"
            return
        steps = [p for p, g in zip(request.position, request.group) if g == request.block]
        request.append(self.tag_ids["<takeaway>"], 0, 0, max(steps) + 1, forced=True)
        request.state = "takeaway"
        request.heads.append(len(request.ids) - 1)

    def result(self, request):
        """Put a finished request's tokens into sequence order."""
        P = request.prompt_len
        group, branch, position = (np.array(x[P:], dtype=np.int32) for x in (request.group, request.branch, request.position))
        # blocks arrive one after another; inside a block the branches interleave, so sort those by branch, stably
        stage = np.maximum.accumulate(group) * 2 - (group > 0)  # 0 trunk, 1 block 1, 2 trunk after it, 3 block 2 ..
        order = np.lexsort((np.arange(len(group)), branch, stage))
        take = lambda x: [x[P + i] for i in order]  # noqa: E731
        laid = Layout(group[order], branch[order], position[order] - P)
        return Rollout(
            take(request.ids), laid, take(request.forced), take(request.logprobs), request.finish,
            critical_path=int(laid.position.max(initial=-1)) + 1, num_forks=len(request.widths),
            max_branches=max(request.widths, default=0), error=request.error,
        )  # fmt: skip


# ======================================================================================================================
# 5. Look at one trajectory
# ======================================================================================================================


def render(tokenizer, rollout, width):
    """A rollout as lines of text at most `width` wide: the trunk across, the branches of each block side by side."""
    lines, start = [], 0
    keys = list(zip(rollout.layout.group.tolist(), rollout.layout.branch.tolist()))
    cuts = [i for i in range(1, len(keys)) if keys[i] != keys[i - 1]] + [len(keys)]
    columns = []  # of the block being drawn
    for end in cuts:
        text = tokenizer.decode(rollout.ids[start:end])
        if keys[start][0]:
            columns.append(text)
        else:
            lines += textwrap.wrap(text, width, break_on_hyphens=False)
        if columns and (end == len(keys) or keys[end][0] == 0):
            each = max(8, (width - 3 * (len(columns) - 1)) // len(columns))
            wrapped = [textwrap.wrap(c, each, break_on_hyphens=False) for c in columns]
            lines += [" | ".join(cell.ljust(each) for cell in row).rstrip() for row in itertools.zip_longest(*wrapped, fillvalue="")]
            columns = []
        start = end
    return lines


class LiveEngine(Engine):
    """Redraws its one request after every step."""

    def step(self):
        request = (self.active or self.waiting)[0]
        done = super().step()
        width, height = shutil.get_terminal_size()
        lines = render(self.tokenizer, self.result(request), width - 1)
        print("\x1b[H\x1b[J" + "\n".join(lines[-(height - 3) :]), flush=True)
        return done


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("question", help="the question, as the problems of stage 0 write it")
    p.add_argument("--init", default="out/stage3", help="checkpoint folder or hub name, of stage 2 or 3")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--max-new-tokens", type=int, default=1024, help="budget, all branches together")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = p.parse_args()
    device = pick_device(args.device)
    model, tokenizer = load(args.init, device)
    live = sys.stdout.isatty()
    engine = (LiveEngine if live else Engine)(model, tokenizer)
    prompt = prompt_ids(tokenizer, args.question, FORMAT_PROMPT)
    [[rollout]] = engine.generate([prompt], max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    if not live:
        print("\n".join(render(tokenizer, rollout, 120)))
    seconds, path = engine.stats.seconds, max(1, rollout.critical_path)
    print(
        f"{rollout.finish_reason}{': ' + rollout.error if rollout.error else ''} | {len(rollout.ids)} tokens on a critical path of "
        f"{path} ({len(rollout.ids) / path:.2f}x) | {engine.stats.decode_steps} steps, {seconds:.2f} s, {len(rollout.ids) / seconds:.0f} tokens/s"
    )


if __name__ == "__main__":
    run_main(main)

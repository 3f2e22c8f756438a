"""The decode kernel, FlexAttention and captured steps against the plain paths that they replace.  Without CUDA the kernel runs in Triton's
interpreter and "captured" steps run eagerly on the same padded buffers; only the capture itself is left to `pytest -m cuda`."""

import numpy as np
import pytest
import torch

import engine as engine_module
from engine import attend_pieces, cut_pieces

pytestmark = pytest.mark.skipif(engine_module.triton is None, reason="triton is not installed: pip install triton")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative error, norm over norm


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    """Triton 3.9's interpreter keeps bfloat16 as uint16, and its dot product multiplies those integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    dot, tl = interpreter.InterpreterBuilder.create_dot, engine_module.tl

    def create_dot(self, a, b, *rest):
        return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def random_rows(rng, R, longest, most_tokens, max_branches, capacity):
    """Integers of R rows in the middle of decoding: random spans of trunk and of up to max_branches branches in order of arrival.  The last
    few slots of each are the new tokens.  Returns length (R,), count (R,), group and branch (R, capacity)."""
    length = rng.integers(1, longest + 1, R)
    count = np.minimum(length, rng.integers(1, most_tokens + 1, R))
    group, branch = np.zeros((2, R, capacity), dtype=np.int64)
    for r in range(R):
        at, block = 0, 0
        while at < length[r]:
            span = int(rng.integers(1, 12))
            if rng.random() < 0.6:
                block += 1
                span *= 3
                group[r, at : at + span] = block
                branch[r, at : at + span] = rng.integers(1, max_branches + 1, len(group[r, at : at + span]))
            at += span
    return length, count, group, branch


def reference(q, kv, row, slot, group, branch, slot_group, slot_branch, capacity):
    """One query token at a time, in float64: softmax over the slots of its row that it may see; zeros when there are none."""
    N, H, D = q.shape
    H_kv, out = kv.shape[1] // 2, torch.zeros(N, H, D, dtype=torch.float64)
    for i in range(N):
        here = slice(int(row[i]) * capacity, int(row[i]) * capacity + int(slot[i]) + 1)
        g, b = int(group[i]), int(branch[i])
        sees = ~((slot_group[here] == g) & (slot_branch[here] != b)) if g else torch.ones_like(slot_group[here], dtype=torch.bool)
        if sees.any():
            keys, values = kv[here][sees].double().repeat_interleave(H // H_kv, dim=1).split(H, dim=1)  # (n, H, D)
            weight = (torch.einsum("hd,nhd->hn", q[i].double(), keys) * D**-0.5).softmax(-1)
            out[i] = torch.einsum("hn,nhd->hd", weight, values)
    return out


def run_kernel(device, rng, length, count, group, branch, capacity, G, H_kv, D, dtype, target, idle=(0, 0), blind=()):
    """Error of the kernel against the reference, on random numbers.  idle: so many tokens and pieces more than needed; blind: tokens whose
    slot is -1, so that they see nothing."""
    R, H, (row, col) = len(length), G * H_kv, engine_module.ragged(count)
    slot = (length - count)[row] + col
    tensor = lambda x: torch.as_tensor(x, device=device)  # noqa: E731
    kv = torch.randn(R * capacity, 2 * H_kv, D).to(dtype)
    for r in range(R):
        kv[r * capacity + length[r] : (r + 1) * capacity] = float("nan")  # what lies beyond a row must not be touched
    q = torch.randn(len(row), H + H_kv, D).to(dtype)[:, :H]  # a slice, as the model makes it
    M = min(128, max(16, 1 << (int(count.max()) * G - 1).bit_length()))
    pieces, of_token = cut_pieces(np.arange(R) * capacity, length, count, M // G, target)
    assert len(pieces) <= len(row) + target
    slot[list(blind)] = -1
    q_group, q_branch = group[row, slot], branch[row, slot]
    want = reference(q, kv, row, slot, q_group, q_branch, tensor(group).cpu().view(-1), tensor(branch).cpu().view(-1), capacity)
    pad = lambda x, n: np.concatenate([x, np.zeros((n, *x.shape[1:]), dtype=x.dtype)])  # noqa: E731
    integers = [tensor(pad(x, idle[0])) for x in (slot, q_group, q_branch)]
    got = attend_pieces(
        torch.cat([q, q[:1].expand(idle[0], -1, -1)]).to(device), kv.to(device), *integers, tensor(group).view(-1), tensor(branch).view(-1),
        tensor(pad(pieces, idle[1])), *(tensor(pad(x, idle[0])) for x in of_token), M,
    )[: len(row)].cpu()  # fmt: skip
    assert (got[list(blind)] == 0).all()
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("G, D", [(1, 32), (2, 64), (3, 128), (4, 96), (5, 16), (6, 40), (7, 64), (8, 128)])
def test_kernel_equals_the_reference_for_every_group_size_head_dim_and_dtype(device, G, D, dtype):
    rng = np.random.default_rng(G)
    torch.manual_seed(G)
    rows = random_rows(rng, 3, 150, 5, 4, 160)
    assert run_kernel(device, rng, *rows, 160, G, 2, D, dtype, target=3) < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(6))
def test_kernel_on_random_layouts_ragged_lengths_and_split_counts(device, seed):
    """One to sixteen branches, one token to more than a tile holds, rows in one piece or in many, idle tokens and pieces."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    branches = [1, 2, 5, 8, 16, 16][seed]
    rows = random_rows(rng, int(rng.integers(1, 5)), 300, [1, 2, 5, 8, 16, 40][seed], branches, 310)
    error = run_kernel(device, rng, *rows, 310, 4, 1, 16, torch.float32, [1, 7, 64, 2, 20, 5][seed], idle=(3, 4))
    assert error < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_kernel_at_the_edges_of_tiles_and_pieces(device, length):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    group, branch = np.zeros((2, 2, 130), dtype=np.int64)
    rows = np.array([length, 1]), np.array([1, 1]), group, branch
    for target in (1, 2, 4):
        assert run_kernel(device, rng, *rows, 130, 2, 1, 32, torch.float32, target) < TOLERANCE[torch.float32]


def test_kernel_gives_zeros_to_a_query_that_sees_nothing(device):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 3, 100, 4, 3, 110)
    N = int(rows[1].sum())
    assert run_kernel(device, rng, *rows, 110, 2, 2, 32, torch.float32, 4, blind=(0, N - 1)) < TOLERANCE[torch.float32]


def test_pieces_cover_every_slot_of_every_tile_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        R, most, target = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.integers(1, 40))
        length, count = rng.integers(1, 700, R), rng.integers(1, 20, R)
        pieces, (first_piece, num_pieces) = cut_pieces(1000 * np.arange(R), length, count, most, target)
        assert len(pieces) <= count.sum() + target
        row, _ = engine_module.ragged(count)
        for token in range(count.sum()):
            mine = pieces[first_piece[token] : first_piece[token] + num_pieces[token]]
            assert (mine[:, 0] == 1000 * row[token]).all()
            assert (mine[:, 3] <= token).all() and (token < mine[:, 3] + mine[:, 4]).all() and (mine[:, 4] <= most).all()
            assert mine[0, 1] == 0 and mine[-1, 2] == length[row[token]] and (mine[1:, 1] == mine[:-1, 2]).all()
        assert len({tuple(p) for p in pieces.tolist()}) == len(pieces)


def test_docstring_example_of_cut_pieces():
    pieces, of_token = cut_pieces(np.array([0, 9]), np.array([5, 3]), np.array([2, 1]), 8, 2, block=4)
    assert pieces.tolist() == [[0, 0, 4, 0, 2], [0, 4, 5, 0, 2], [9, 0, 3, 2, 1]]
    assert of_token.tolist() == [[0, 0, 2], [2, 2, 1]]
    assert [x.tolist() for x in engine_module.ragged(np.array([2, 1]))] == [[0, 0, 1], [0, 1, 0]]

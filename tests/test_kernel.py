"""The decode kernel, FlexAttention and captured steps against the plain paths that they replace.  Without CUDA the kernel runs in Triton's
interpreter and "captured" steps run eagerly on the same padded buffers; only the capture itself is left to `pytest -m cuda`."""

import functools
import gc
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, ScriptedEngine, random_model, random_prompts, random_script
from torch.nn.attention.flex_attention import create_block_mask

import engine as engine_module
import stage0_model as stage0
from engine import Engine, split_kv_attention, make_splits

needs_triton = pytest.mark.skipif(
    engine_module.triton is None, reason="triton is not installed: pip install triton"
)

TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}  # relative error, norm over norm


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch):
    """Triton 3.9's interpreter keeps bfloat16 as uint16, and its dot product multiplies those integers."""
    if engine_module.triton is None:
        return
    from triton.runtime import interpreter

    dot, tl = interpreter.InterpreterBuilder.create_dot, engine_module.tl

    def create_dot(self, a, b, *rest):
        return dot(
            self,
            *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)),
            *rest,
        )

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def random_rows(rng, R, longest, most_tokens, max_branches, capacity):
    """Integers of R rows in the middle of decoding: random spans of trunk and of up to max_branches branches in order of arrival.  The last
    few slots of each are the new tokens.  Returns length (R,), count (R,), block and branch (R, capacity)."""
    length = rng.integers(1, longest + 1, R)
    count = np.minimum(length, rng.integers(1, most_tokens + 1, R))
    block, branch = (
        np.zeros((R, capacity), dtype=np.int64),
        rng.integers(0, 3, (R, capacity)),
    )  # a trunk's branch must not matter
    for r in range(R):
        at, number = 0, 0
        while at < length[r]:
            span = int(rng.integers(1, 12))
            if rng.random() < 0.6:
                number += 1
                span *= 3
                block[r, at : at + span] = number
                branch[r, at : at + span] = rng.integers(1, max_branches + 1, len(block[r, at : at + span]))
            at += span
    return length, count, block, branch


def reference(q, kv, row, slot, block, branch, slot_block, slot_branch, capacity):
    """One query token at a time, in float64: softmax over the slots of its row that it may see; zeros when there are none."""
    N, H, D = q.shape
    H_kv, out = kv.shape[1] // 2, torch.zeros(N, H, D, dtype=torch.float64)
    for i in range(N):
        here = slice(int(row[i]) * capacity, int(row[i]) * capacity + int(slot[i]) + 1)
        g, b = int(block[i]), int(branch[i])
        sees = (
            ~((slot_block[here] == g) & (slot_branch[here] != b))
            if g
            else torch.ones_like(slot_block[here], dtype=torch.bool)
        )
        if sees.any():
            keys, values = (
                kv[here][sees].double().repeat_interleave(H // H_kv, dim=1).split(H, dim=1)
            )  # (n, H, D)
            weight = (torch.einsum("hd,nhd->hn", q[i].double(), keys) * D**-0.5).softmax(-1)
            out[i] = torch.einsum("hn,nhd->hd", weight, values)
    return out


def run_kernel(
    device, length, count, block, branch, capacity, G, H_kv, D, dtype, target, idle=(0, 0), blind=()
):
    """Error of the kernel against the reference, on random numbers.  idle: so many tokens and splits more than needed; blind: tokens whose
    slot is -1, so that they see nothing."""
    R, H, (row, col) = len(length), G * H_kv, engine_module.ragged(count)
    slot = (length - count)[row] + col

    def tensor(x):
        return torch.as_tensor(x, device=device)

    kv = torch.randn(R * capacity, 2 * H_kv, D).to(dtype)
    for r in range(R):
        kv[r * capacity + length[r] : (r + 1) * capacity] = float(
            "nan"
        )  # what lies beyond a row must not be touched
    q = torch.randn(len(row), H + H_kv, D).to(dtype)[:, :H]  # a slice, as the model makes it
    most = engine_module.most_query_rows(dtype, D)
    M = min(most, max(16, 1 << (int(count.max()) * G - 1).bit_length()))
    splits, of_token = make_splits(np.arange(R) * capacity, length, count, M // G, target)
    assert len(splits) <= len(row) + target
    slot[list(blind)] = -1
    q_block, q_branch = block[row, slot], branch[row, slot]
    want = reference(
        q,
        kv,
        row,
        slot,
        q_block,
        q_branch,
        tensor(block).cpu().view(-1),
        tensor(branch).cpu().view(-1),
        capacity,
    )

    def pad(x, n):
        return np.concatenate([x, np.zeros((n, *x.shape[1:]), dtype=x.dtype)])

    integers = [tensor(pad(x, idle[0])) for x in (slot, q_block, q_branch)]
    got = split_kv_attention(
        torch.cat([q, q[:1].expand(idle[0], -1, -1)]).to(device), kv.to(device), *integers, tensor(block).view(-1), tensor(branch).view(-1),
        tensor(pad(splits, idle[1])), *(tensor(pad(x, idle[0])) for x in of_token), M,
    )[: len(row)].cpu()  # fmt: skip
    assert (got[list(blind)] == 0).all()
    return ((got.double() - want).norm() / want.norm()).item()


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("G, D", [(1, 32), (2, 64), (3, 128), (4, 96), (5, 16), (6, 40), (7, 64), (8, 128)])
@pytest.mark.slow
def test_kernel_equals_the_reference_for_every_group_size_head_dim_and_dtype(device, G, D, dtype):
    rng = np.random.default_rng(G)
    torch.manual_seed(G)
    rows = random_rows(rng, 3, 150, 5, 4, 160)
    assert run_kernel(device, *rows, 160, G, 2, D, dtype, target=3) < TOLERANCE[dtype]


@needs_triton
@pytest.mark.parametrize("seed", range(6))
def test_kernel_on_random_layouts_ragged_lengths_and_split_counts(device, seed):
    """One to sixteen branches, one token to more than a tile holds, rows in one split or in many, idle tokens and splits."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    branches = [1, 2, 5, 8, 16, 16][seed]
    rows = random_rows(rng, int(rng.integers(1, 5)), 300, [1, 2, 5, 8, 16, 40][seed], branches, 310)
    error = run_kernel(device, *rows, 310, 4, 1, 16, torch.float32, [1, 7, 64, 2, 20, 5][seed], idle=(3, 4))
    assert error < TOLERANCE[torch.float32]


@needs_triton
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_kernel_at_the_edges_of_tiles_and_pieces(device, length):
    torch.manual_seed(0)
    block, branch = np.zeros((2, 2, 130), dtype=np.int64)
    rows = np.array([length, 1]), np.array([1, 1]), block, branch
    for target in (1, 2, 4):
        assert run_kernel(device, *rows, 130, 2, 1, 32, torch.float32, target) < TOLERANCE[torch.float32]


@needs_triton
def test_kernel_merges_more_pieces_than_it_takes_at_once(device):
    torch.manual_seed(0)
    rows = np.array([64 * 40, 70]), np.array([2, 1]), *np.zeros((2, 2, 64 * 40), dtype=np.int64)
    assert run_kernel(device, *rows, 64 * 40, 2, 1, 16, torch.float32, 41) < TOLERANCE[torch.float32]


@needs_triton
def test_kernel_gives_zeros_to_a_query_that_sees_nothing(device):
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 3, 100, 4, 3, 110)
    N = int(rows[1].sum())
    assert (
        run_kernel(device, *rows, 110, 2, 2, 32, torch.float32, 4, blind=(0, N - 1))
        < TOLERANCE[torch.float32]
    )


def test_pieces_cover_every_slot_of_every_tile_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        R, most, target = int(rng.integers(1, 9)), int(rng.integers(1, 9)), int(rng.integers(1, 40))
        length, count = rng.integers(1, 700, R), rng.integers(1, 20, R)
        splits, (first_split, num_splits) = make_splits(1000 * np.arange(R), length, count, most, target)
        assert len(splits) <= count.sum() + target
        row, _ = engine_module.ragged(count)
        for token in range(count.sum()):
            mine = splits[first_split[token] : first_split[token] + num_splits[token]]
            assert (mine[:, 0] == 1000 * row[token]).all()
            assert (
                (mine[:, 3] <= token).all()
                and (token < mine[:, 3] + mine[:, 4]).all()
                and (mine[:, 4] <= most).all()
            )
            assert (
                mine[0, 1] == 0 and mine[-1, 2] == length[row[token]] and (mine[1:, 1] == mine[:-1, 2]).all()
            )
        assert len({tuple(p) for p in splits.tolist()}) == len(splits)


def test_docstring_example_of_make_splits():
    splits, of_token = make_splits(np.array([0, 9]), np.array([5, 3]), np.array([2, 1]), 8, 2, slots=4)
    assert splits.tolist() == [[0, 0, 4, 0, 2], [0, 4, 5, 0, 2], [9, 0, 3, 2, 1]]
    assert of_token.tolist() == [[0, 0, 2], [2, 2, 1]]
    assert [x.tolist() for x in engine_module.ragged(np.array([2, 1]))] == [[0, 0, 1], [0, 1, 0]]


@needs_triton
@pytest.mark.cuda
def test_kernel_addresses_a_pool_of_more_than_2_to_the_31_numbers():
    """4.3 GB of keys and values, so on a GPU only; the row lies at its very end."""
    slots = 2**23 + 64
    kv, here = torch.zeros(slots, 2, 128, dtype=torch.float16, device="cuda"), slice(slots - 40, slots)
    kv[here], q = torch.randn(40, 2, 128), torch.randn(1, 1, 128, device="cuda").half()
    integers, kind = (
        torch.zeros(2, slots, dtype=torch.long, device="cuda"),
        dict(dtype=torch.long, device="cuda"),
    )
    splits, of_token = make_splits(np.array([slots - 40]), np.array([40]), np.array([1]), 16, 2)
    zero = torch.zeros(1, **kind)
    got = split_kv_attention(
        q,
        kv,
        zero + 39,
        zero,
        zero,
        *integers,
        torch.tensor(splits, **kind),
        *torch.tensor(of_token, **kind),
        16,
    )
    weight = (q[0].double() @ kv[here, 0].double().T * 128**-0.5).softmax(-1)
    torch.testing.assert_close(got[0].double(), weight @ kv[here, 1].double(), atol=2e-3, rtol=0)


# ---- the engine with the kernel: padded buffers, replayed ----


def trees(model, tokenizer, tag_ids, kernel, n=3, free=False, **sampling):
    """n scripted trees of up to two blocks; free: the model draws every other token of the branches."""
    rng = random.Random(4)
    prompts = random_prompts(rng, n)
    scripts = {
        tuple(p): random_script(rng, tokenizer, tag_ids, max_blocks=2, max_branches=5, max_length=5)
        for p in prompts
    }
    if free:

        def loose(ids):
            return [t if i % 2 or t in tag_ids.values() else None for i, t in enumerate(ids)]

        scripts = {
            p: {key: ids if key == (0, 0) else loose(ids) for key, ids in s.items()}
            for p, s in scripts.items()
        }
    eng = ScriptedEngine(model, tokenizer, kv_tokens=1000, kernel=kernel)
    eng.script_of = lambda request: scripts[tuple(request.prompt)]
    return eng, prompts, [r for [r] in eng.generate(prompts, max_new_tokens=150, **sampling)]


@needs_triton
@pytest.mark.parametrize(
    "sampling",
    [dict(), dict(temperature=0), dict(temperature=0.7, top_k=20), dict(step_repetition_penalty=1.3)],
    ids=str,
)
@pytest.mark.slow
def test_engine_with_kernel_and_replayed_steps_gives_the_same_tokens(device, tokenizer, tag_ids, sampling):
    model = random_model(len(tokenizer) + 5, num_hidden_layers=1, num_attention_heads=6).to(device)
    plain, _, expected = trees(model, tokenizer, tag_ids, kernel=False, free=True, **sampling)
    eng, _, rollouts = trees(model, tokenizer, tag_ids, kernel=True, free=True, **sampling)
    assert any(r.max_branches > 3 for r in rollouts) and eng.stats.decode_steps == plain.stats.decode_steps
    for r, other in zip(rollouts, expected):
        assert (r.ids, r.forced, r.finish_reason) == (other.ids, other.forced, other.finish_reason)
        np.testing.assert_allclose(r.logprobs, other.logprobs, atol=1e-5 if device.type == "cpu" else 1e-4)
    # few sizes: the steps of a run share buffers, whose numbers of tokens are powers of two
    sizes = {key[1] for key in eng.runner.graphs.buffers}
    assert (
        all(n & (n - 1) == 0 for n in sizes) and len(eng.runner.graphs.buffers) < eng.stats.decode_steps / 2
    )
    assert eng.kv_tokens_in_use == 0


@needs_triton
def test_what_an_earlier_step_left_in_a_buffer_changes_nothing(tokenizer):
    model = random_model(len(tokenizer), num_hidden_layers=1)
    eng = Engine(model, tokenizer, kernel=True)
    once = eng.generate([[50, 51], [60]], parallel=False, max_new_tokens=4)
    eng.generate(random_prompts(random.Random(0), 7), parallel=False, max_new_tokens=3, seed=5)
    for buffers in eng.runner.graphs.buffers.values():
        for buffer in buffers:
            buffer.fill_(1 if buffer.dtype == torch.long else float("nan"))
    again = eng.generate([[50, 51], [60]], parallel=False, max_new_tokens=4)
    assert [(r.ids, r.logprobs) for [r] in once] == [(r.ids, r.logprobs) for [r] in again]


def test_a_function_to_capture_is_first_run_on_the_real_inputs(device):
    """Run on empty buffers, a decode step would store token 0 in slot 0 of the first row."""
    slots, replay = torch.zeros(5, device=device), engine_module.CudaGraphs(device)

    def step(index):
        return slots.index_fill_(0, index, 1.0) + index

    assert replay("step", step, torch.tensor([3])).tolist() == [3, 3, 3, 4, 3]
    assert replay("step", step, torch.tensor([2])).tolist() == [2, 2, 3, 3, 2]
    assert slots.tolist() == [0, 0, 1, 1, 0]


def test_no_garbage_is_collected_while_a_graph_is_captured(monkeypatch):
    """Freeing another engine's graphs then breaks the capture: seen on an H200."""
    collecting = []

    class Graph:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def wait_stream(self, other):
            pass

    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Graph)
    for name in ("stream", "current_stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: Graph())
    graphs = engine_module.CudaGraphs(torch.device("cuda"))
    graphs.capture(lambda: collecting.append(gc.isenabled()), [])
    assert collecting == [True, False] and gc.isenabled()  # the run that warms up, the capture
    with pytest.raises(ZeroDivisionError):
        graphs.capture(lambda: 1 / 0 if not gc.isenabled() else None, [])
    assert gc.isenabled()


def test_drawing_in_chunks_changes_nothing(device, monkeypatch):
    torch.manual_seed(0)
    logits, shaped, u = (
        torch.randn(20, 50, device=device),
        torch.randn(20, 50, device=device),
        torch.rand(20, device=device),
    )
    cases = [(other, *how) for other in (None, shaped) for how in ((1.0, 1.0, 0), (0.7, 0.9, 5), (0, 1.0, 0))]
    whole = [engine_module.draw(logits, u, *case) for case in cases]
    monkeypatch.setattr(engine_module, "MAX_LOGITS", 7 * 50)
    for case, expected in zip(cases, whole):
        assert torch.equal(engine_module.draw(logits, u, *case), expected)


@needs_triton
def test_replay_keys_hold_everything_a_captured_function_bakes_in(tokenizer):
    """A graph knows only the sampling it was captured with: other temperatures need other graphs."""
    model = random_model(len(tokenizer), num_hidden_layers=1)
    eng, fresh = (Engine(model, tokenizer, kernel=True) for _ in range(2))
    eng.generate([[50, 51]], parallel=False, max_new_tokens=3, temperature=1.0)
    keys = set(eng.runner.graphs.buffers)
    drawn = eng.generate([[50, 51]], parallel=False, max_new_tokens=3, temperature=0)
    assert {key[0] for key in set(eng.runner.graphs.buffers) - keys} == {"draw"}
    assert (
        drawn[0][0].ids
        == fresh.generate([[50, 51]], parallel=False, max_new_tokens=3, temperature=0)[0][0].ids
    )


# ---- training: FlexAttention over packed rows against the dense mask over padded ones ----


def padded_batch(model, tokenizer, tag_ids, device, n=5):
    """The rollouts of n scripted trees as one batch (ids, layout, mask) of uneven rows, two of them plain text."""
    _, prompts, rollouts = trees(model, tokenizer, tag_ids, kernel=False, n=n)
    examples = [
        engine_module.Example(p, r.ids, r.layout if i > 1 else None)
        for i, (p, r) in enumerate(zip(prompts, rollouts))
    ]
    [(_, *batch)] = engine_module.batches(examples, 10**6, device)
    return batch


@pytest.fixture
def flex(monkeypatch):
    """A switch between the two paths on any device.  Uncompiled FlexAttention runs forward on a CPU, on dense scores."""

    def switch(on):
        for module in (stage0, engine_module):
            monkeypatch.setattr(module, "uses_flex", lambda device: on)

    return switch


def test_packed_rows_and_flex_attention_give_the_logprobs_of_padded_rows_and_a_dense_mask(
    device, tokenizer, tag_ids, flex
):
    model = random_model(len(tokenizer) + 5, num_attention_heads=6).to(device)
    ids, batch_layout, mask = padded_batch(model, tokenizer, tag_ids, device)
    assert batch_layout.block.any() and len(set(batch_layout.lengths.tolist())) > 1
    found = []
    for on in (False, True):
        flex(on)
        with torch.no_grad():
            found.append(engine_module.token_logprobs(model, ids, batch_layout))
    for dense, packed in zip(*found):
        torch.testing.assert_close(
            packed[mask], dense[mask], atol=1e-5 if device.type == "cpu" else 1e-4, rtol=0
        )
        assert (dense[mask] != 0).all()
    flex(True)  # a neighbour's tokens do not matter
    other = ids.clone()
    other[1:] = ids[1:].flip(1)
    with torch.no_grad():
        torch.testing.assert_close(
            engine_module.token_logprobs(model, other, batch_layout)[0][0], found[1][0][0], atol=1e-6, rtol=0
        )


def test_flex_attention_sees_what_visible_mask_says(device, tokenizer, tag_ids, model, flex):
    """On the packed row itself: the definition, as a dense mask, against the blocks."""
    ids, batch_layout, _ = padded_batch(model, tokenizer, tag_ids, device)
    ids, batch_layout, place = engine_module.pack(ids, batch_layout)
    assert ids.shape[1] == stage0.bucket(len(place)) and batch_layout.document[0, len(place) :].eq(-1).all()
    q, k, v = (torch.randn(1, ids.shape[1], heads, 16, device=device) for heads in (4, 2, 2))
    found = []
    for on in (False, True):
        flex(on)
        found.append(
            stage0.attention(
                q, k, v, stage0.visibility(batch_layout.block, batch_layout.branch, batch_layout.document)
            )
        )
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    causal = stage0.attention(q, k, v, None)
    assert (found[0] - causal).abs().max() > 0.1


@pytest.mark.parametrize(
    "T, rows, documents", [(32, 1, 1), (128, 2, 3), (300, 3, 2), (1400, 1, 9), (2500, 2, 1)]
)
def test_tiles_are_those_that_torch_finds_by_looking_at_every_pair(device, flex, T, rows, documents):
    generator = np.random.default_rng(T)
    block, branch, document = (
        torch.from_numpy(np.sort(generator.integers(0, n, (rows, T)))).to(device) for n in (4, 7, documents)
    )
    flex(True)
    found = stage0.visibility(block, branch, document)
    expected = create_block_mask(found.mask_mod, rows, None, T, T, device=device)
    assert found.shape == expected.shape == (rows, 1, T, T)
    assert torch.equal(found.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):  # indices count as far as there are blocks
        numbers, *indices = (getattr(expected, f"{name}_num_blocks"),) + tuple(
            getattr(x, f"{name}_indices") for x in (found, expected)
        )
        counted = torch.arange(indices[0].shape[-1], device=device) < numbers[..., None]
        assert torch.equal(indices[0][counted], indices[1][counted]), name

    # and what it asks within a tile is the definition
    b, q, k = (torch.arange(n, device=device) for n in (rows, T, T))
    asked = found.mask_mod(b[:, None, None], 0, q[:, None], k)
    assert torch.equal(asked, stage0.visible_mask(block, branch, document))


def test_docstring_example_of_pack():
    zero = torch.zeros(2, 3, dtype=torch.long)
    batch_layout = engine_module.Layout(
        zero, zero, torch.arange(3).expand(2, 3), lengths=torch.tensor([3, 1])
    )
    ids, packed, place = engine_module.pack(torch.tensor([[5, 6, 7], [8, 0, 0]]), batch_layout)
    assert ids[0, :6].tolist() == [5, 6, 7, 8, 5, 5] and packed.document[0, :6].tolist() == [
        0,
        0,
        0,
        1,
        -1,
        -1,
    ]
    assert packed.position[0, :4].tolist() == [0, 1, 2, 0] and place.tolist() == [0, 1, 2, 3]
    assert [stage0.bucket(n) for n in (1, 100, 1100, 8192)] == [32, 128, 1280, 8192]


@pytest.mark.cuda
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_the_two_training_paths_agree(tokenizer, tag_ids, flex, recompute):
    gradients = []
    for on in (False, True):
        flex(on)
        model = random_model(len(tokenizer) + 5).cuda()
        ids, batch_layout, mask = padded_batch(model, tokenizer, tag_ids, "cuda")
        if recompute:
            stage0.recompute_activations(model)
        engine_module.token_logprobs(model, ids, batch_layout)[0][mask].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    dense, packed = gradients
    assert dense.norm() > 1e-3 and (packed - dense).norm() / dense.norm() < 1e-3


# ---- what cannot run here, as far as it can be checked ----

COMPILE = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, {root!r})
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import engine
types = dict(q="*bf16", kv="*bf16", out="*bf16", q_stride="i32", scale="fp32", partial="*fp32", partial_lse="*fp32")
sizes = dict(H_KV=2, REPEAT=4, D=64, BLOCK_D=64, M=16, BLOCK_N=64, AT_ONCE=16)
for kernel in (engine.split_kv_kernel, engine.merge_splits_kernel):
    signature = {{name: "constexpr" if name in sizes else types.get(name, "*i64") for name in kernel.arg_names}}
    source = ASTSource(kernel, signature, {{name: sizes[name] for name in kernel.arg_names if name in sizes}})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_a_gpu_that_is_not_there():
    """The interpreter is more lenient than the compiler: it once let a variable change its shape in a loop."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(root=str(ROOT))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


FAKE_CUDA = ROOT.parent / "shared" / "tools" / "fake_cuda" / "run.sh"


def on_the_fake_device(tmp_path, *command):
    """Output of a Python that has the stand-in for a GPU beneath it.

    It is built in tmp_path, because it is linked with the very torch of this interpreter.
    """
    if not FAKE_CUDA.is_file() or not shutil.which("g++"):
        pytest.skip(f"the fake device is not here: {FAKE_CUDA} and g++ are needed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PY": sys.executable, "TMPDIR": str(tmp_path)}
    command = ["bash", str(FAKE_CUDA), *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_a_4090_short_rows_and_wide_fp32_heads_included(tmp_path):
    """Torch 2.13 finds no tiles for FlexAttention on 96 tokens when it may choose the kernel, and the
    usual tiles of 128 wide heads in fp32 need more shared memory than this card has."""
    found = json.loads(on_the_fake_device(tmp_path, "tests/lower_on_cuda.py").splitlines()[-1])
    assert len(found) == 7
    assert {case: said for case, said in found.items() if not isinstance(said, int) or said > 101_376} == {}


@needs_triton
def test_wide_heads_in_fp32_are_decoded_in_tiles_of_at_most_32_query_rows():
    model = random_model(60, num_hidden_layers=1, num_attention_heads=8, head_dim=128)
    runner = engine_module.CudaRunner(model, 1000)
    runner.cut(1, 500)
    rows = np.array([0])
    for n, expected in ((1, 16), (40, 32)):
        packed = np.zeros((7, n), dtype=np.int64)
        packed[4] = range(n)
        runner.feed(packed, [0], rows, np.array([n]), np.array([n]))
        assert list(runner.graphs.buffers)[-1][2] == expected


@needs_triton
def test_a_step_too_large_to_capture_pads_neither_tokens_nor_logits(tokenizer, monkeypatch):
    model = random_model(len(tokenizer), num_hidden_layers=1)
    prompts = [[60] * 30, [60] * 30 + [61]]
    plain = Engine(model, tokenizer, kernel=False).generate(prompts, parallel=False, max_new_tokens=3)
    monkeypatch.setattr(engine_module, "MAX_CAPTURED", 1)
    seen = []
    attend = engine_module.split_kv_attention

    def spy(*arguments):
        seen.append((len(arguments[0]), len(arguments[7]), int((arguments[7][:, 4] > 0).sum())))
        return attend(*arguments)

    monkeypatch.setattr(engine_module, "split_kv_attention", spy)
    eng = Engine(model, tokenizer, kernel=True)
    found = eng.generate(prompts + prompts[:1], parallel=False, max_new_tokens=3)
    assert [r.ids for [r] in found[:2]] == [r.ids for [r] in plain]
    assert {n for n, _, _ in seen} == {1, 3} and all(W == used for n, W, used in seen if n == 3)


def test_without_a_c_compiler_the_plain_paths_are_taken_and_one_line_says_so(monkeypatch, capsys):
    """Triton's driver builds its launcher at the first use, with the compiler that a slim image lacks."""
    driver = pytest.importorskip("triton.runtime").driver

    class NoCompiler:
        def get_current_device(self):
            raise RuntimeError("Failed to find C compiler. Please specify one.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(driver), "active", NoCompiler())
    for cached in (stage0.can_compile, stage0.compiled):
        cached.cache_clear()
    try:
        assert stage0.compiled(len) is len and stage0.compiled(max) is max
        assert not stage0.uses_flex(torch.device("cuda"))
        [line] = capsys.readouterr().out.splitlines()
        assert "C compiler" in line and "gcc" in line
    finally:
        for cached in (stage0.can_compile, stage0.compiled):
            cached.cache_clear()


CONFTEST = """
import os, sys
sys.path.insert(0, "tests")
sys.argv = ["pytest"] + {arguments!r}
import torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != ""
import conftest, engine
print(type(engine.split_kv_kernel).__name__, torch.cuda.is_available())
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["tests"], "InterpretedFunction False"),
        (["-m", "not cuda"], "InterpretedFunction False"),
        (["-m", "cuda", "tests"], "JITFunction True"),
    ],
)
def test_cpu_tests_interpret_kernels_on_a_machine_with_a_gpu_too(arguments, expected):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    }
    command = [sys.executable, "-c", CONFTEST.format(arguments=arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr[-2000:]


@needs_triton
@pytest.mark.slow
def test_all_blocks_and_all_numbers_of_tokens_share_the_compiled_code(tokenizer, monkeypatch):
    """Blocks around the kernel are traced, not compiled, here.  Twice for one token, twice for any other number: never once per layer."""
    model, graphs = random_model(len(tokenizer), num_hidden_layers=4), []

    def run():
        rollouts = Engine(model, tokenizer, kernel=True).generate(prompts, parallel=False, max_new_tokens=3)
        return [r.ids for [r] in rollouts]

    prompts = random_prompts(random.Random(0), 5)
    plain = run()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    traced = functools.cache(
        lambda function, dynamic=None: torch.compile(function, backend=backend, dynamic=dynamic)
    )
    monkeypatch.setattr(stage0, "compiled", traced)
    assert run() == plain and len(graphs) == 2
    prompts = prompts[:1]
    run()
    prompts = prompts * 3
    run()
    assert len(graphs) == 4


@pytest.mark.slow
def test_flex_attention_is_compiled_three_times_for_all_lengths_and_batches(monkeypatch, flex):
    """For the first length, for all of several tiles of 128 tokens, and for all of one.  Traced, not compiled, here.  Each batch has a mask function of its own, a closure over its integers: that must not count as new."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    traced = functools.cache(
        lambda function, dynamic=None: torch.compile(function, backend=backend, dynamic=dynamic)
    )
    monkeypatch.setattr(stage0, "compiled", traced)
    flex(True)
    for seed, (T, expected) in enumerate(
        [(256, 1), (256, 1), (320, 2), (256, 2), (96, 3), (32, 3), (160, 3), (1280, 3)]
    ):
        torch.manual_seed(seed)
        block, branch = torch.randint(0, 3, (2, 1, T)).sort().values
        document = (torch.arange(T)[None] > 100).long()
        q, k, v = (torch.randn(1, T, heads, 16) for heads in (4, 2, 2))
        with torch.no_grad():
            found = stage0.attention(q, k, v, stage0.visibility(block, branch, document))
            dense = stage0.attention(q, k, v, stage0.visible_mask(block, branch, document)[:, None])
        torch.testing.assert_close(found, dense, atol=1e-5, rtol=0)
        assert len(graphs) == expected


@pytest.mark.slow
def test_gpu_benchmark_runs_at_miniature_size(tmp_path):
    small = "--sizes tiny --contexts 40 --branches 2 --branch-length 6 --batch 2 --requests 8 --sft-tokens 512 --repeats 1".split()
    cases = "--cases sequential branches batch rollout sft".split()
    subprocess.run(
        [
            sys.executable,
            ROOT / "tests/bench_engine.py",
            "--device",
            "cpu",
            "--out",
            tmp_path,
            *small,
            *cases,
        ],
        check=True,
    )
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["copy_bytes_per_second"] > 0 and len(found["rows"]) == 8
    assert all(row["tokens/s"] > 0 and "error" not in row for row in found["rows"])
    decoded = [row for row in found["rows"] if "bound ms" in row]
    weights = 4 * 830_000  # fp32
    assert len(decoded) == 6 and all(weights < row["bytes per step"] < 3 * weights for row in decoded)

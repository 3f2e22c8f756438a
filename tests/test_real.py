"""Real layouts: checkpoints as Qwen3 ships them, data sets as published, training as 4B needs it."""

import copy
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, ScriptedEngine, random_model, rescore, worst_gap
from real_checkpoint import TEMPLATE, real_checkpoint, real_tokenizer, sample_problems
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine as engine_module
import stage0_model as stage0
from engine import TAGS, Engine, Example, batches, layout, tag_token_ids, token_logprobs
from stage0_model import REAL_FORMAT_PROMPT_FILE, Problem, UserError, prompt_ids
from stage0_model import read_problems, read_prompt, same_choice, same_grid  # real data
from stage1_zero import format_score
from stage2_beta import add_tag_tokens, encode_response

# ---- checkpoints ----


@pytest.fixture(scope="module")
def tok():
    return real_tokenizer()


@pytest.fixture
def spoil(tmp_path):
    def change(name="config.json", **changes):
        raw = json.loads((tmp_path / name).read_text()) | changes
        (tmp_path / name).write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))

    return change


SHAPES = [  # what is particular about Qwen3's sizes, in small
    dict(),  # 0.6B: tied, q width 128 != hidden 64
    dict(
        num_attention_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 5e6}
    ),  # 4B-Instruct-2507: tied, q width 256
    dict(tie_word_embeddings=False, head_dim=16, num_key_value_heads=4),  # 8B: untied
]


@pytest.mark.parametrize("old_keys", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_real_layout_gives_transformers_logits_and_greedy_text_before_and_after_saving(
    tmp_path, tok, spoil, shape, old_keys
):
    """Shards, bf16, both spellings of theta and dtype; after stage 2's tags too, which resize nothing."""
    real_checkpoint(tmp_path, tok, std=0.1, **shape)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if old_keys:  # as before transformers 5
        theta = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"]
        spoil(
            rope_parameters="absent",
            rope_theta=theta,
            dtype="absent",
            torch_dtype="bfloat16",
            rope_scaling=None,
        )
    loaded, _ = stage0.load(tmp_path)
    assert loaded.model["embed_tokens"].weight.dtype == torch.bfloat16
    ours, tokenizer = stage0.load(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, len(tok), (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    rows = ours.config.vocab_size
    add_tag_tokens(ours, tokenizer)
    assert ours.config.vocab_size == rows and len(tag_token_ids(tokenizer)) == 8
    stage0.save(ours, tokenizer, tmp_path / "saved")
    saved, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    )
    prompt = prompt_ids(again, "What is <step>1+1</step>?", "Answer.")
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), saved(ids).logits, atol=1e-4, rtol=0)
        greedy = saved.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[
            0, len(prompt) :
        ].tolist()
    [[mine]] = Engine(ours, tokenizer).generate([prompt], parallel=False, max_new_tokens=30, temperature=0.0)
    assert mine.ids == greedy
    assert saved.generation_config.eos_token_id == [
        tok.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")
    ]


def test_fp32_weights_are_cast_when_asked_and_kept_when_not(tmp_path, tok):
    real_checkpoint(tmp_path, tok, dtype=torch.float32)  # as NPR-4B is published
    assert stage0.load(tmp_path)[0].model["embed_tokens"].weight.dtype == torch.float32
    assert {p.dtype for p in stage0.load(tmp_path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_every_end_of_turn_of_the_generation_config_ends_a_response(tmp_path, tok, end):
    real_checkpoint(tmp_path, tok)
    model, tokenizer = stage0.load(tmp_path)

    class Ending(ScriptedEngine):
        def script_of(self, request):
            return {(0, 0): [50, 51, tok.convert_tokens_to_ids(end), 52]}

    [[r]] = Ending(model, tokenizer).generate([[40, 41]], parallel=False, max_new_tokens=20)
    assert r.finish_reason == "stop" and len(r.ids) == 3


def test_a_base_model_learns_to_end_its_turn_with_the_chats_own_token(tmp_path, tok):
    """Qwen3-*-Base: the tokenizer's eos is <|endoftext|>, the chat template closes a turn with <|im_end|>."""
    base = copy.deepcopy(tok)
    base.eos_token = "<|endoftext|>"
    end = tok.convert_tokens_to_ids("<|endoftext|>")
    real_checkpoint(tmp_path, base, eos_token_id=end)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    model, tokenizer = stage0.load(tmp_path)
    assert tokenizer.eos_token == "<|im_end|>" and set(model.config.eos_token_id) == {
        end,
        tokenizer.eos_token_id,
    }


def test_the_prompt_asks_qwen3_not_to_think_and_a_question_mark_in_braces_makes_it_the_user_turn(tok):
    assert "enable_thinking" in TEMPLATE
    text = tok.decode(prompt_ids(tok, "Q?", "Do so."))
    system, user = "<|im_start|>system\nDo so.<|im_end|>\n", "<|im_start|>user\nQ?<|im_end|>\n"
    assert text == f"{system}{user}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tok.decode(prompt_ids(tok, "Q?", "{question}\nDo so.")).startswith(
        "<|im_start|>user\nQ?\nDo so.<|im_end|>\n<|im_start|>assistant"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="qwen3_moe"), "model_type is 'qwen3_moe'"),
        (
            dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
            "rope_type 'yarn' is not supported",
        ),
        (dict(rope_scaling={"rope_type": "yarn"}), "rope_scaling is not supported"),
        (dict(rope_parameters="absent"), "rope_theta missing"),
        (dict(use_sliding_window=True), "use_sliding_window is not supported"),
        (
            dict(layer_types=["full_attention", "sliding_attention"]),
            "layer_types 'sliding_attention' is not supported",
        ),
        (dict(quantization_config={"quant_method": "fp8"}), "quantization_config is not supported"),
        (dict(attention_bias=True), "attention_bias is not supported"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, tok, spoil, changes, message):
    real_checkpoint(tmp_path, tok)
    spoil(**changes)
    with pytest.raises(UserError, match=message):
        stage0.load(tmp_path)


def test_a_missing_shard_and_a_missing_chat_template_are_named(tmp_path, tok):
    real_checkpoint(tmp_path, tok)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        stage0.load(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        stage0.load(tmp_path)


# ---- a checkpoint from elsewhere that has the tags ----


def test_npr_4b_decodes_in_parallel_with_the_newlines_it_was_trained_on(tmp_path, tok):
    """The authors' checkpoint: tags are tokens (marked special here, the harder case), each on a line of
    its own.  Its engine opens branch i with '\\n<step>\\n' + 'i:', every branch at the position after
    </guideline>."""
    tagged = copy.deepcopy(tok)
    tagged.add_tokens([AddedToken(t, special=True, normalized=False) for t in TAGS], special_tokens=True)
    real_checkpoint(tmp_path, tagged, std=0.1, spare=3)
    model, tokenizer = stage0.load(tmp_path, dtype=torch.float32)
    before = model.state_dict()["model.embed_tokens.weight"].clone()
    add_tag_tokens(model, tokenizer)
    assert torch.equal(before, model.state_dict()["model.embed_tokens.weight"])  # used as it is
    t, encode = tag_token_ids(tokenizer), lambda text: tokenizer.encode(text, add_special_tokens=False)
    guideline = "<guideline>\n<plan>1: add</plan>\n<plan>2: halve</plan>\n</guideline>"

    class Scripted(ScriptedEngine):
        def script_of(self, request):
            return {
                (0, 0): encode(f"{guideline}\nboth agree\n</takeaway>\n\\boxed{{7}}<|im_end|>"),
                (1, 1): encode(" 3+4=7\n</step>"),
                (1, 2): encode(" 14/2=7, which is the same\n</step>"),
            }

    prompt = prompt_ids(tokenizer, "Q?", "Answer.")
    [[r]] = Scripted(model, tokenizer).generate([prompt], max_new_tokens=200)
    text = stage0.response_text(tokenizer, r.ids)
    steps = "\n<step>\n1: 3+4=7\n</step>\n<step>\n2: 14/2=7, which is the same\n</step>"
    assert text == f"{guideline}{steps}<takeaway>\nboth agree\n</takeaway>\n\\boxed{{7}}"
    assert r.finish_reason == "stop" and r.num_forks == 1 and format_score(text) == 0.0
    opening, end = len(encode("\n<step>\n1:")), r.ids.index(t["</guideline>"])
    assert r.forced[end + 1 : end + 1 + opening] == [True] * opening and not r.forced[end + 1 + opening]
    starts = [np.flatnonzero(r.layout.branch == b)[0] for b in (1, 2)]
    assert [r.layout.position[i] for i in starts] == [
        end + 1,
        end + 1,
    ]  # the newline is each branch's first token, in the same place
    again = layout(r.ids, t)
    assert all((getattr(again, n) == getattr(r.layout, n)).all() for n in ("block", "branch", "position"))
    assert worst_gap([r], rescore(model, [prompt], [r])) < 1e-4


def test_samples_with_tags_on_lines_of_their_own_are_learned_in_the_form_the_engine_writes(tok):
    tagged = copy.deepcopy(tok)
    tagged.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    _, text, _ = sample_problems(1)[0]
    ids, _, forced = encode_response(tagged, text, sequential=False)
    written = tagged.decode(ids)
    assert (
        format_score(text) == 0.0
        and "</step><step>2: " in written
        and "</plan><plan>2: " in written
        and "\n</step><takeaway>\n" in written
    )
    assert tagged.decode([i for i, f in zip(ids, forced) if f]) == "<step>1:<step>2:<takeaway>"


# ---- training at size ----


def test_bf16_weights_are_stepped_in_fp32_and_small_steps_are_not_lost():
    """Against AdamW on an fp32 copy fed the same gradients.  A step of 1e-5 on weights of 0.2 is
    invisible in bf16, forty of them are not."""
    model = random_model(60).to(torch.bfloat16)
    reference = copy.deepcopy(model).float()
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0)
    optimizers = stage0.make_optimizers(model, 1e-5)
    start = [p.detach().clone() for p in model.parameters()]
    grads = [torch.zeros_like(p) for p in reference.parameters()]
    for p, total in zip(model.parameters(), grads):

        def add(g, total=total):
            total += g.float()

        p.register_hook(add)
    for step in range(40):
        for micro in range(2):  # two micro-batches, added up in fp32
            ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
            (-token_logprobs(model, ids)[0].mean() / 2).backward()
        for p, g in zip(reference.parameters(), grads):
            p.grad = g.clone()
            g.zero_()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        theirs.step()
        stage0.update(model, optimizers)
        if step == 0:
            small = sum((p != s).sum().item() for p, s in zip(model.parameters(), start))
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), reference.parameters()):
        [master] = p.parts.values()
        torch.testing.assert_close(master, q, atol=1e-7, rtol=0)
        assert torch.equal(p, stage0.dithered(master, torch.bfloat16))
        assert ((p.float() - q).abs() <= last_bit(q) + 1e-7).all()
    moved = sum((p != s).sum().item() for p, s in zip(model.parameters(), start))
    assert moved > 2 * small and moved > 0.05 * sum(p.numel() for p in model.parameters())


def last_bit(w):
    """What a bf16 number's last bit is worth: it keeps 7 bits below its leading one."""
    return 2.0 ** (w.abs().log2().floor() - 7)


def test_a_bf16_weight_stays_itself_as_long_as_its_master_does():
    w = (torch.randn(300, 100) * 0.2).to(torch.bfloat16)
    assert torch.equal(stage0.dithered(w.float(), torch.bfloat16), w)
    odd = torch.tensor([0.0, -0.0, 1e-40, float("inf"), float("-inf")]).to(torch.bfloat16)
    assert torch.equal(stage0.dithered(odd.float(), torch.bfloat16).view(torch.int16), odd.view(torch.int16))
    assert stage0.dithered(torch.tensor([float("nan")]), torch.bfloat16).isnan().all()
    exact = torch.randn(5)
    assert stage0.dithered(exact, torch.float32) is exact
    assert torch.equal(stage0.dithered(exact, torch.float16), exact.half())


@pytest.mark.parametrize("bits", [0.01, 0.1, 0.5, 0.9, 1.7])
@pytest.mark.parametrize("sign", [-1, 1])
def test_bf16_weights_together_go_as_far_as_their_masters_by_however_little(bits, sign):
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(1000, 300, generator=generator) * 0.2).to(torch.bfloat16)
    w = w[w.float().abs().frexp().mantissa.sub(0.75).abs() < 0.2]  # so that a bit is worth the same after
    bit = last_bit(w.float())
    moved = (stage0.dithered(w.float() + sign * bits * bit, torch.bfloat16).float() - w.float()) / bit
    assert set(moved.unique().tolist()) <= {sign * math.floor(bits), sign * math.ceil(bits)}
    assert abs(moved.mean().item() - sign * bits) < 0.005


@pytest.mark.parametrize("R", [0, 4])
def test_at_a_small_rate_bf16_weights_go_as_far_as_their_masters_or_adapters_say(R, tokenizer):
    """In three steps no weight moves by half of its last bit: to the nearest, none would change."""
    model = random_model(len(tokenizer)).to(torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.sign() * 0.1875
    start = weight.detach().float()
    if R:
        stage0.add_adapters(model, tokenizer, R, 0)
    optimizers = stage0.make_optimizers(model, 2e-5)
    for step in range(3):
        ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(step))
        (-token_logprobs(model, ids)[0].mean()).backward()
        stage0.update(model, optimizers)
    parts = list(weight.parts.values())
    exact = start + stage0.LORA_ALPHA / R * (parts[1] @ parts[0]) if R else parts[0]
    assert torch.equal(exact.to(torch.bfloat16).float(), start) and not torch.equal(exact, start)
    way = (exact - start).detach()
    moved = weight.detach().float() - start
    assert (moved * way.sign()).sum().item() == pytest.approx(way.abs().sum().item(), rel=0.25)


def test_a_bf16_run_resumes_with_its_fp32_masters(tmp_path):
    def steps(model, optimizers, n):
        for i in n:
            ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(i))
            (-token_logprobs(model, ids)[0].mean()).backward()
            stage0.update(model, optimizers)

    run = stage0.Run(stage0.parse_args(["--out", str(tmp_path)]))
    whole = random_model(60).to(torch.bfloat16)
    optimizers = stage0.make_optimizers(whole, 1e-4)
    steps(whole, optimizers, range(3))
    run.checkpoint(whole, optimizers, 3)
    assert (tmp_path / "resume" / "state.pt").is_file()
    steps(whole, optimizers, range(3, 6))
    resumed = random_model(60, seed=9).to(torch.bfloat16)
    optimizers = stage0.make_optimizers(resumed, 1e-4)
    assert run.start(resumed, optimizers) == 3
    steps(resumed, optimizers, range(3, 6))
    assert all(
        torch.equal(*p.parts.values(), *q.parts.values()) and torch.equal(p, q)
        for p, q in zip(whole.parameters(), resumed.parameters())
    )


def gradients(model, ids, batch_layout=None):
    model.zero_grad()
    logprobs, entropy = token_logprobs(model, ids, batch_layout)
    (-(logprobs * torch.linspace(-1, 1, ids.numel()).view(ids.shape)).sum()).backward()
    return logprobs.detach(), entropy, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_in_chunks_and_recomputed_activations_change_no_value_and_no_gradient(
    tied, tag_ids, tokenizer, monkeypatch
):
    model = random_model(len(tokenizer), tie_word_embeddings=tied)
    _, text, _ = sample_problems(1)[0]
    ids, response_layout, _ = encode_response(tokenizer, text, sequential=False)
    [(_, ids, batch_layout, _)] = batches([Example([50, 51], ids, response_layout)], 10**6)
    whole = gradients(model, ids, batch_layout)
    monkeypatch.setattr(
        engine_module, "MAX_LOGITS", 7 * len(tokenizer)
    )  # chunks of 7 tokens, the last one shorter
    stage0.recompute_activations(model)
    chunked = gradients(model, ids, batch_layout)
    for a, b in zip((*whole[:2], *whole[2]), (*chunked[:2], *chunked[2])):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    reference = model(ids, batch_layout)[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(chunked[0][0, 1:], reference, atol=1e-5, rtol=0)


PEAK = """
import re, sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import random_model
import engine
model = random_model(151_936, hidden_size=8, num_hidden_layers=1, tie_word_embeddings=True)
ids = torch.randint(0, 151_936, (1, 1024))
engine.MAX_LOGITS = {most}
def kilobytes(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak (VmHWM) is counted from here
before = kilobytes("VmRSS")
(-engine.token_logprobs(model, ids)[0].mean()).backward()
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is measured in Linux's way"
)
def test_no_tensor_of_all_logits_exists_at_any_time():
    """1,024 tokens of Qwen3's vocabulary are 0.6 GB of fp32 logits.  Forward and backward together, in
    chunks of 110, stay below that; in one piece they take more than twice as much (which proves that
    the measurement sees it)."""

    def peak_bytes(most):
        code = PEAK.format(root=str(ROOT), tests=str(ROOT / "tests"), most=most)
        return 1024 * int(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout.split()[-1]
        )

    one = 1024 * 151_936 * 4
    chunked, whole = peak_bytes(2**24), peak_bytes(10**12)
    assert chunked < one and whole > 2 * one, (chunked, whole)


def test_recomputed_activations_keep_only_the_inputs_of_layers():
    """Bytes that autograd saves for backward, counted by its own hooks."""

    def saved(recompute):
        model, total, seen = random_model(100, num_hidden_layers=6), 0, set()
        if recompute:
            stage0.recompute_activations(model)

        def pack(x):
            nonlocal total
            if x.data_ptr() not in seen and not isinstance(x, torch.nn.Parameter):
                seen.add(x.data_ptr())
                total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden(torch.randint(0, 100, (2, 64))).sum()
        return total

    assert saved(True) < saved(False) / 5


# ---- data ----

DATA = ROOT.parent / "shared" / "data"
FILES = {
    "aime25.json": 30,
    "hmmt_feb_2025.json": 30,
    "amc23.json": 40,
    "math500.json": 500,
    "aime24.jsonl": 30,
    "minerva_math.jsonl": 272,
    "olympiadbench.jsonl": 675,
}


@pytest.mark.parametrize("name", FILES)
def test_a_real_benchmark_file_is_read_and_its_answers_judged(name):
    """Every gold answer, boxed, is right; the next problem's is wrong unless it is the same text."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is absent")
    problems = read_problems(str(DATA / name))
    assert len(problems) == FILES[name] and all(p.question and p.answer for p in problems)
    assert all(p.verify(f"So \\boxed{{{p.answer}}}.") for p in problems)
    few = random.Random(0).sample(problems, 20)
    wrong = [p for p, q in zip(few, few[1:]) if p.answer != q.answer and p.verify(f"\\boxed{{{q.answer}}}")]
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize(
    "gold, given, same",
    [
        ("0.5", "\\frac{1}{2}", True),
        ("\\frac12", "0.5", True),
        ("27.0", "27", True),
        ("70", "70", True),
        ("1,000", "1000", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("1,2", "2,1", True),
        ("\\{1,2\\}", "\\{1,3\\}", False),
        ("5\\text{ cm}", "5", True),
        ("12^\\circ", "12", True),
        ("\\$5", "5", True),
        ("5", "5\\text{ miles}", True),
        ("(0,1]", "(0, 1]", True),
        ("(0,1]", "[0,1]", False),
        ("(0,1]", "(0,1)", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("x+1", "1+x", True),
        ("7", "__import__('os').system('true')", False),
        ("7", "x" * 5000, False),
        ("7", "\\frac{", False),
        ("7", "", False),
    ],
)
def test_known_equivalences_of_mathematics(gold, given, same):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert Problem("math", "q", gold).verify(f"<takeaway>t</takeaway>\\boxed{{{given}}}") is same


def test_a_monstrous_answer_costs_seconds_not_hours():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert not Problem("math", "q", "5").verify("\\boxed{9^{9^{9^{9}}}}")  # would hang without the timeout


def test_without_math_verify_one_line_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="pip install math-verify"):
        read_problems(str(tmp_path / "a.jsonl"))


def test_multiple_choice_and_logic_grids_are_judged_by_exact_match():
    assert all(same_choice(x, "B") for x in ("B", "(B)", "\\text{B}.", " b ")) and not any(
        same_choice(x, "B") for x in ("A", "AB", "", "B or C")
    )
    gold = json.dumps({"House 1": {"Name": "Eric", "Pet": "cat"}, "House 2": {"Name": "Ann", "Pet": "dog"}})
    assert same_grid(
        gold.lower().replace("house", "House").replace("name", "Name").replace("pet", "Pet"), gold
    )
    assert (
        same_grid(gold[1:-1], gold)
        and not same_grid(gold.replace("dog", "cat"), gold)
        and not same_grid('{"House 1": "Eric"}', gold)
    )
    assert Problem("grid", "q", gold).verify(f"so \\boxed{{{gold}}}")


ROWS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(3)]


FORMS = [
    "json",
    "jsonl",
    "parquet",
    "csv",
    "folder",
    "folder of splits",
    "orz file",
    "orz table",
    "chat",
    "named",
]


@pytest.mark.parametrize("form", [*FORMS, "solution"])
def test_a_data_set_is_read_in_any_of_its_forms(tmp_path, form):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    path, flags = tmp_path / "data", {}
    if form == "json":
        (path := tmp_path / "d.json").write_text(json.dumps(ROWS))
    elif form == "jsonl":
        (path := tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif form == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path := tmp_path / "d.parquet"))
    elif form == "csv":
        datasets.Dataset.from_list(ROWS).to_csv(str(path := tmp_path / "d.csv"))
    elif form == "folder":
        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif form == "folder of splits":
        parts = {"test": datasets.Dataset.from_list(ROWS[:1]), "train": datasets.Dataset.from_list(ROWS)}
        datasets.DatasetDict(parts).save_to_disk(str(path))
    elif form.startswith("orz"):
        turns = [
            (
                {"from": "human", "value": r["question"]},
                {"from": "assistant", "ground_truth": {"value": r["answer"]}},
            )
            for r in ROWS
        ]
        if form == "orz file":
            (path := tmp_path / "d.json").write_text(json.dumps(turns))
        else:
            datasets.Dataset.from_list([{"0": q, "1": a} for q, a in turns]).to_parquet(
                str(path := tmp_path / "d.parquet")
            )
    elif form == "chat":  # verl's form
        rows = [
            {
                "prompt": [{"role": "user", "content": r["question"]}],
                "reward_model": {"ground_truth": r["answer"]},
            }
            for r in ROWS
        ]
        datasets.Dataset.from_list(rows).to_parquet(str(path := tmp_path / "d.parquet"))
    elif form == "named":
        (path := tmp_path / "d.json").write_text(
            json.dumps([{"ask": r["question"], "key": r["answer"]} for r in ROWS])
        )
        flags = {"question_column": "ask", "answer_column": "key"}
    else:
        rows = [{"problem": r["question"], "solution": f"so $\\boxed{{{r['answer']}}}$"} for r in ROWS]
        (path := tmp_path / "d.json").write_text(json.dumps(rows))
    assert [(p.question, p.answer, p.kind) for p in read_problems(str(path), **flags)] == [
        (r["question"], r["answer"], "math") for r in ROWS
    ]


def test_rows_of_json_are_taken_as_they_are_written(tmp_path):
    """`datasets` makes dates of strings that look like one, and refuses a column that is null in the
    first 10 MB and a number later."""
    rows = [{"question": "When?", "answer": "2020-01-01", "year": None}] * 2 + [
        {"question": "n?", "answer": 3, "year": 2020}
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert stage0.read_rows(str(tmp_path / "d.json")) == stage0.read_rows(str(tmp_path / "d.jsonl")) == rows
    (tmp_path / "d.json").write_text(json.dumps(rows[:1]))
    assert stage0.read_rows(str(tmp_path / "d.json")) == rows[:1]  # a file that has changed is read again


def test_options_lists_of_answers_and_grids_become_problems(tmp_path):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    grid = {"header": ["House", "Name", "Pet"], "rows": [["1", "Eric", "cat"], ["2", "Ann", "dog"]]}
    rows = [
        {"question": "Which?", "options": ["x", "y"], "answer": "y"},
        {"question": "Which?", "answer": "C"},
        {"question": "Roots?", "final_answer": ["1", "2"]},
        {"puzzle": "Who?", "solution": grid},
        {"question": "n?", "answer": 27.0},
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    options, letter, both, zebra, number = read_problems(str(tmp_path / "d.json"))
    assert (
        (options.kind, options.answer) == ("choice", "B")
        and "(B) y" in options.question
        and letter.kind == "choice"
    )
    assert (both.answer, number.answer) == ("1, 2", "27.0")
    assert (
        zebra.kind == "grid"
        and json.loads(zebra.answer)["House 2"] == {"Name": "Ann", "Pet": "dog"}
        and '"Pet": "..."' in zebra.question
    )
    grid["rows"][0][1] = "___"
    (tmp_path / "d.json").write_text(json.dumps([{"puzzle": "Who?", "solution": grid}]))
    with pytest.raises(UserError, match="masked"):
        read_problems(str(tmp_path / "d.json"))


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        ("none.jsonl", None, {}, "no such file"),
        ("none.csv", None, {}, "no such file"),
        ("out/none", None, {}, "no such folder or file"),
        ("bad.json", "[{", {}, "not readable as json"),
        ("dict.json", "{}", {}, "expected a list of problems"),
        ("empty.json", "[]", {}, "expected a list of problems"),
        (
            "text.json",
            '[{"text": "a"}]',
            {},
            "no column problem, question, prompt, puzzle .it has: text.; name one with --question-column",
        ),
        ("key.json", '[{"question": "a", "solution": "b"}]', {}, "has no .*boxed"),
        (
            "flag.json",
            '[{"question": "a", "answer": "b"}]',
            {"answer_column": "gold"},
            "no column gold .*--answer-column",
        ),
        ("junk.parquet", "junk", {}, "not a data set"),
    ],
)
def test_wrong_data_is_refused_in_one_line(tmp_path, name, content, flags, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_problems(str(tmp_path / name) if content is not None else name, **flags)
    assert "\n" not in str(caught.value)


def test_the_format_prompt_for_real_models_is_a_file_and_another_replaces_it(tmp_path):
    assert (
        read_prompt("", "") == stage0.FORMAT_PROMPT and Path(REAL_FORMAT_PROMPT_FILE).parent.name == "assets"
    )
    text = read_prompt("", "some/data")
    assert all(tag in text for tag in TAGS) and "\\boxed{" in text
    assert (
        format_score(text[text.index("<guideline>") : text.rindex("</takeaway>")] + "</takeaway>\\boxed{1}")
        == 0.0
    )  # its example is valid
    (tmp_path / "mine.txt").write_text("Be brief.\n")
    assert (
        read_prompt(str(tmp_path / "mine.txt"), "some/data")
        == read_prompt(str(tmp_path / "mine.txt"), "")
        == "Be brief."
    )
    with pytest.raises(UserError, match="--prompt-file"):
        read_prompt("nowhere.txt", "")


# ---- the judge on real benchmarks ----


def test_a_killed_bench_run_decodes_only_what_is_missing_and_another_setting_starts_afresh(
    tmp_path, tok, monkeypatch
):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    import eval as judge

    (tmp_path / "aime25.json").write_text(
        json.dumps([{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(70)])
    )
    real_checkpoint(tmp_path / "npr", tok)
    decoded, decode = [], judge.decode

    def counting(engine, problems, *rest, **options):
        decoded.append(len(problems))
        return decode(engine, problems, *rest, **options)

    def bench(*flags):
        decoded.clear()
        argv = [
            "eval.py",
            str(tmp_path / "npr"),
            "--out",
            str(tmp_path),
            "--bench",
            "aime25",
            "--bench-dir",
            str(tmp_path),
        ]
        monkeypatch.setattr(sys, "argv", [*argv, "--max-new-tokens", "4", "--timed", "0", "--k", "2", *flags])
        judge.main()
        [file] = (tmp_path / "aime25").glob("*.jsonl")
        return file, file.read_text(), json.loads((tmp_path / "bench.json").read_text())["results"][0]

    monkeypatch.setattr(judge, "decode", counting)
    file, whole, result = bench()
    rows = [json.loads(line) for line in whole.splitlines()[1:]]
    assert (
        decoded == [32, 32, 6]
        and len(rows) == 140
        and {"response", "right", "tokens", "finish_reason"} <= rows[0].keys()
    )
    assert (
        result["bench"] == "aime25"
        and result["tokens"] == np.mean([r["tokens"] for r in rows])
        and result["accuracy"] == 0
    )
    lines = whole.split("\n")
    file.write_text(
        "\n".join(lines[:130]) + "\n" + lines[130][:20]
    )  # killed in the middle of a line: problem 64 has one of two samples
    _, resumed, again = bench()

    def strip(text):
        return sorted(
            (r["number"], r["response"], r["right"]) for r in map(json.loads, text.splitlines()[1:])
        )

    assert decoded == [6] and strip(resumed) == strip(whole) and again["tokens"] == result["tokens"]
    bench()
    assert decoded == []
    bench("--seed", "7")
    assert decoded == [32, 32, 6]
    bench("--seed", "7", "--first", "5")
    assert decoded == [5]


def test_every_benchmark_has_a_file_or_a_hub_name(tmp_path, tok, monkeypatch):
    import eval as judge

    assert set(judge.BENCHES) == set("aime25 aime24 hmmt25 olympiad minerva zebra amc23 math500".split())
    assert {file for file, _ in judge.BENCHES.values()} >= set(FILES)
    real_checkpoint(tmp_path / "npr", tok)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "eval.py",
            str(tmp_path / "npr"),
            "--out",
            str(tmp_path),
            "--bench",
            "zebra",
            "--bench-dir",
            str(tmp_path),
        ],
    )

    def no_network(name, config):
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match="ZebraLogicBench-private"):
        judge.main()

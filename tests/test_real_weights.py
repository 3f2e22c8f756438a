"""Real weights and real vocabularies: SmolLM2-135M-Instruct against transformers, Qwen's against the engine.

`make real-weights` fetches them; without them these tests are skipped.
"""

import base64
import collections
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, ScriptedEngine, random_model, replayed, rescore, worst_gap
from real_checkpoint import WORDS, sample_problems
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import stage0_model as stage0
import stage1_zero
from engine import TAGS, Engine, tag_token_ids
from stage0_model import REAL_PLAIN_PROMPT, prompt_ids, read_prompt, response_text
from stage1_zero import format_score
from stage2_beta import add_tag_tokens, encode_response

PATH = ROOT / "out" / "real-weights"
pytestmark = [
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (PATH / "model.safetensors").is_file(), reason=f"{PATH} is absent: make real-weights"
    ),
]

ENGLISH = "A rectangle is 7 cm wide and 12 cm long. What are its area and its perimeter?"


@pytest.fixture(scope="module")
def theirs():
    return AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loaded():
    return stage0.load(PATH)


@pytest.fixture(scope="module")
def tagged():
    """(model, tokenizer) with the tags as tokens."""
    model, tokenizer = stage0.load(PATH)
    add_tag_tokens(model, tokenizer)
    return model, tokenizer


def test_logits_of_english_text_equal_transformers(loaded, theirs):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer.encode((ROOT / "assets" / "format_prompt.txt").read_text())[:256]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=5e-4, rtol=0)
        gap = (model(ids).log_softmax(-1) - theirs(ids).logits.log_softmax(-1)).abs().max().item()
    assert gap < 5e-4


def test_64_greedy_tokens_equal_transformers(loaded, theirs):
    model, tokenizer = loaded
    prompt = prompt_ids(tokenizer, ENGLISH, REAL_PLAIN_PROMPT)
    greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)[0, len(prompt) :]
    engine = Engine(model, tokenizer, kv_tokens=2048)
    [[mine]] = engine.generate([prompt], parallel=False, max_new_tokens=64, temperature=0.0)
    assert mine.ids == greedy.tolist() and len(mine.ids) == 64
    assert "area" in response_text(tokenizer, mine.ids)  # it is English, and about the question


def test_sampled_first_words_come_as_often_as_the_model_says(loaded):
    model, tokenizer = loaded
    prompt = tokenizer.encode("The capital of France is")
    n = 600
    [rollouts] = Engine(model, tokenizer, kv_tokens=8192).generate(
        [prompt], n=n, max_new_tokens=1, parallel=False
    )
    with torch.no_grad():
        p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    seen = collections.Counter(r.ids[0] for r in rollouts)
    for token in p.topk(5).indices.tolist():
        expected = p[token].item()
        assert abs(seen[token] / n - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 1 / n
    for r in rollouts[:50]:
        assert r.logprobs[0] == pytest.approx(p[r.ids[0]].log().item(), abs=1e-3)


def test_tags_become_tokens_of_a_checkpoint_that_transformers_opens(tagged, theirs, tmp_path):
    model, tokenizer = tagged
    plain = AutoTokenizer.from_pretrained(PATH)
    rows = theirs.get_input_embeddings().weight
    for tag, id in tag_token_ids(tokenizer).items():
        assert id >= len(plain) and tokenizer.encode(tag) == [id]
        spelled = rows[plain.encode(tag)].mean(0)
        torch.testing.assert_close(model.model["embed_tokens"].weight[id], spelled, atol=1e-6, rtol=0)
    stage0.save(model, tokenizer, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(tmp_path).encode("<plan>1: find the area</plan> Hello")]
    )
    assert saved.config.model_type == "llama" and ids.max() < saved.config.vocab_size == len(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), saved(ids).logits, atol=5e-4, rtol=0)


def test_an_english_guideline_forks_and_its_rollout_is_scored_in_training_as_it_was_sampled(tagged):
    """The words are given, their log-probabilities are the model's own; some words are left to it."""
    model, tokenizer = tagged

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    plans = "<plan>1: find the area</plan><plan>2: find the perimeter</plan><plan>3: check the units</plan>"
    steps = [
        " The area of a rectangle is its width times its length: 7 * 12 = 84 square cm.",
        " The perimeter is twice the sum of both sides: 2 * (7 + 12) = 38 cm.",
        " Both sides are given in cm.",
    ]
    end = "The area is 84, the perimeter 38.</takeaway>So the answer is \\boxed{84}."
    script = {(1, b): encode(step + "</step>") for b, step in enumerate(steps, 1)}
    script[0, 0] = encode(f"<guideline>{plans}</guideline>{end}") + [tokenizer.eos_token_id]

    class Scripted(ScriptedEngine):
        def script_of(self, request):
            return script

    prompt = prompt_ids(tokenizer, ENGLISH, read_prompt("", True))
    [[r]] = Scripted(model, tokenizer, kv_tokens=4096).generate([prompt], max_new_tokens=300)
    text = response_text(tokenizer, r.ids)
    written = "".join(f"<step>{b}:{step}</step>" for b, step in enumerate(steps, 1))
    assert text == f"<guideline>{plans}</guideline>{written}<takeaway>{end}"
    assert r.finish_reason == "stop" and r.num_forks == 1 and r.max_branches == 3
    assert r.critical_path < len(r.ids) - 20 and format_score(text) == 0.0
    assert worst_gap([r], rescore(model, [prompt], [r])) < 1e-4

    # it is a model of English: these words are likelier by far than others of its vocabulary
    assert sum(r.logprobs) / (len(r.ids) - sum(r.forced)) > -5.0


# ---- what a run needs ----

# Stage 1 in a process of its own: its peak above what the libraries take, in bytes.  Right is every
# other response, so that every group has something to learn.
PEAK = """
import functools, itertools, re, sys, torch
import stage0_model, stage1_zero

def resident(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1])

verdicts = itertools.cycle([True, False])
stage0_model.Problem.verify = lambda problem, text: next(verdicts)
stage1_zero.format_score = lambda text: 0.0
stage1_zero.Engine = functools.partial(stage1_zero.Engine, kv_tokens=1024)
weight = torch.nn.Parameter(torch.ones(2, 2))
weight.grad = torch.ones(2, 2)
torch.optim.AdamW([weight]).step()  # imports
before = resident("VmRSS")
stage1_zero.main()
print("peak", resident("VmHWM") - before)
"""


@pytest.mark.parametrize("flags", ["--recompute", "", "--recompute --lora 16"])
def test_the_plan_of_a_run_is_within_a_tenth_of_its_measured_peak(tmp_path, flags):
    words = (
        f"--init {PATH} --kind sums --steps 2 --prompts 1 --group-size 2 --updates 1 --max-rounds 1 {flags}"
    )
    words += " --max-new-tokens 32 --overlong-buffer 20 --lr 1e-6 --micro-tokens 266 --device cpu"
    # malloc gives back what is freed, so that what is resident is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", PEAK, *words.split(), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    peak = int(re.search(r"^peak (\d+)", done.stdout, re.M)[1])

    config, _ = stage0.read_config(PATH)
    args = stage1_zero.parse_args(words.split())
    parts = stage1_zero.memory(config, 4, args.lora, 1, args)
    pool = parts.pop("the engine's keys and values")
    assert pool > 0
    planned = (
        sum(parts.values()) + 1024 * 2 * 4 * 30 * 3 * 64
    )  # slots, keys and values, fp32, layers, heads, D
    print(flags, f"planned {planned / 1e9:.2f} GB, measured {peak / 1e9:.2f} GB")
    assert abs(planned - peak) < 0.1 * peak, (planned, peak)


# ---- every trained token could have been sampled or forced ----


def qwen_tokenizer():
    """Qwen's own 151,643 entries, cut into words as Qwen2, 2.5 and 3 cut them."""
    lines = (PATH / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    letter = dict(zip(range(256), [""] * 256))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter |= {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}

    def spell(token):
        return "".join(letter[b] for b in token)

    # tiktoken merges whatever pair gives the entry of the lowest rank
    merges = [
        (spell(token[:i]), spell(token[i:]))
        for token in sorted(ranks, key=ranks.get)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, bytewise])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def responses():
    """Steps that begin in every way that a colon can merge with."""
    openings = (
        "text",
        "$x$",
        "\n- a",
        "\n\n",
        " 3+4",
        ")",
        "//",
        "=",
        "\\frac12",
        ":",
        "**bold**",
        "'s",
        "\t",
        "(",
    )
    for opening in openings:
        steps = "".join(f"<step>{i}:{opening} and {i}</step>" for i in range(1, 4))
        plans = "".join(f"<plan>{i}: plan {i}</plan>" for i in range(1, 4))
        yield f"<guideline>{plans}</guideline>{steps}<takeaway>{opening}</takeaway>\\boxed{{7}}"
    yield from (text for _, text, _ in sample_problems(3))


@pytest.mark.parametrize("name", ["Qwen", "SmolLM2"])
def test_every_trained_token_of_a_real_vocabulary_could_have_been_sampled_or_forced(name):
    """Replayed in the engine: a step's forced opening is its own, and the rest is sampled, token by token."""
    tokenizer = qwen_tokenizer() if name == "Qwen" else AutoTokenizer.from_pretrained(PATH)
    merged = [entry for entry in tokenizer.get_vocab() if entry.startswith(":") and len(entry) > 1]
    if name == "Qwen":
        assert len(tokenizer.get_vocab()) == 151_646 and len(merged) == 323
        assert len(tokenizer.encode("1:text")) == 2 < len(tokenizer.encode("1:") + tokenizer.encode("text"))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    model = random_model(len(tokenizer), hidden_size=16, num_hidden_layers=1, tie_word_embeddings=True)
    for text in responses():
        ids, laid, forced = encode_response(tokenizer, text, sequential=False)
        rollout = replayed(model, tokenizer, ids, laid, forced)
        assert rollout.ids == ids and rollout.forced == forced and rollout.finish_reason == "stop", text
        assert worst_gap([rollout], rescore(model, [[40, 41, 42]], [rollout])) < 1e-4

"""What the tests share: a small tokenizer, random models, and an engine that follows a script (so that trees of any shape can be
decoded without training anything)."""

import os
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Kernels are either interpreted, on CPU tensors, or compiled, on a GPU's: one of them in a process,
# decided before triton is imported.  `pytest -m cuda tests` is the run on a GPU; any other does not
# see one, and does the same everywhere.
if not re.search(r"(?<!not )\bcuda\b", " ".join(sys.argv[1:])):
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

import engine as engine_module
import stage0_model as stage0
from engine import TAGS, Engine, tag_token_ids

torch.set_num_threads(1)  # toy models: a second thread costs more than it brings


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=3000, help="requests of the engine's fuzz test")
    parser.addoption("--soak", type=int, default=400, help="requests of the engine's soak test")


def pytest_collection_modifyitems(config, items):
    """A machine without CUDA leaves its tests out instead of skipping them: a skip asks for attention."""
    if torch.cuda.is_available():
        return
    on_cuda = [item for item in items if item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=on_cuda)
    items[:] = [item for item in items if item not in on_cuda]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every test that asks for it, or for something that lives on it, is run on both."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def plain_tokenizer():
    """The tokenizer of stages 0 and 1: tags are ordinary text."""
    rng = random.Random(0)
    docs = [stage0.corpus_document(rng, 0.05, 0.5, 0.2) for _ in range(300)]
    return stage0.train_tokenizer(text for doc in docs for text in doc + ("system", "user", "assistant"))


@pytest.fixture(scope="session")
def tokenizer(plain_tokenizer, tmp_path_factory):
    """The tokenizer of stages 2 and 3: the eight tags are single tokens."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    plain_tokenizer.save_pretrained(path)
    tagged = AutoTokenizer.from_pretrained(path)
    tagged.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tagged


@pytest.fixture(scope="session")
def tag_ids(tokenizer):
    return tag_token_ids(tokenizer)


def random_model(vocab, seed=0, std=0.2, **overrides):
    """A small random Qwen3 whose attention matters: with the usual tiny initial weights every mask would look right."""
    torch.manual_seed(seed)
    config = dict(
        vocab_size=vocab, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    config |= dict(
        num_key_value_heads=2, head_dim=16, eos_token_id=2, initializer_range=std, tie_word_embeddings=False
    )
    model = stage0.Qwen3(stage0.Qwen3Config(**(config | overrides)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="session")
def model(tokenizer, device):
    return random_model(len(tokenizer) + 5).to(device)


def random_script(rng, tokenizer, tag_ids, max_blocks=4, max_branches=8, max_length=12, min_blocks=1):
    """A random trajectory as {(block, branch): ids to sample}, the trunk under (0, 0); forced tokens are not in it."""

    def word(low, high):
        return [rng.randrange(40, 250) for _ in range(rng.randint(low, high))]

    t = tag_ids
    trunk = word(0, 3)
    script = {}
    for block in range(1, rng.randint(min_blocks, max_blocks) + 1):
        trunk.append(t["<guideline>"])
        for branch in range(1, rng.randint(1, max_branches) + 1):
            trunk += [t["<plan>"], *tokenizer.encode(f"{branch}:ab"), t["</plan>"]]
            script[block, branch] = word(0, max_length) + [t["</step>"]]
        trunk += [t["</guideline>"], *word(0, 4), t["</takeaway>"]]
    script[0, 0] = trunk + word(0, 5) + [tokenizer.eos_token_id]
    return script


class ScriptedEngine(Engine):
    """Samples what `script_of(request)` says instead of drawing; log-probabilities stay the model's own.  The script position is
    read off the request, so preemption and batching cannot confuse it.  A token of None leaves the draw to the model."""

    script_of = None

    def sample(self, logits):
        log_p, m = logits.float().log_softmax(-1), 0
        tokens, logprobs = super().sample(logits)
        for request in (self.book.requests[i] for i in self.active):
            script = self.script_of(request)
            place = request.tokens[["block", "branch"]]
            for tip in request.tips:
                # tokens sampled so far in this branch; the prompt counts as forced
                done = int(((place == place[tip]) & ~request.tokens["forced"]).sum())
                token = script.get(place[tip].item(), [])[done : done + 1]
                if token and token[0] is not None:
                    tokens[m], logprobs[m] = token[0], log_p[m, token[0]].item()
                m += 1
        return tokens, logprobs


def replayed(model, tokenizer, ids, laid, forced, prompt=(40, 41, 42)):
    """The rollout of an engine that samples, branch by branch, the tokens of a response that are not forced."""
    script = {}
    for id, block, branch, written in zip(ids, laid.block.tolist(), laid.branch.tolist(), forced):
        if not written:
            script.setdefault((block, branch), []).append(id)

    class Replaying(ScriptedEngine):
        def script_of(self, request):
            return script

    [[rollout]] = Replaying(model, tokenizer).generate([list(prompt)], max_new_tokens=len(ids) + 1)
    return rollout


def random_prompts(rng, n, low=3, high=20):
    return [[rng.randrange(40, 250) for _ in range(rng.randint(low, high))] for _ in range(n)]


def rescore(model, prompts, rollouts, layouts=None):
    """Teacher-forced log-probabilities of every rollout: the training forward, with no KV memory, that the engine is compared with."""
    layouts = layouts or [r.layout for r in rollouts]
    examples = [engine_module.Example(p, r.ids, laid) for p, r, laid in zip(prompts, rollouts, layouts)]
    scores = [None] * len(rollouts)
    for rows, ids, batch_layout, mask in engine_module.batches(examples, 8192, model.device):
        with torch.no_grad():
            logprobs, _ = engine_module.token_logprobs(model, ids, batch_layout)
        for b, i in enumerate(rows):
            scores[i] = logprobs[b][mask[b]].cpu().numpy()
    return scores


def worst_gap(rollouts, scores):
    """Largest difference between the engine's log-probabilities and the rescored ones, over sampled tokens."""
    gaps = [np.abs(np.array(r.logprobs) - s)[~np.array(r.forced)] for r, s in zip(rollouts, scores)]
    return max(float(g.max()) for g in gaps if len(g))


@pytest.fixture(scope="module")
def browser():
    """The system's chromium, for what a reader sees of a page."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-extra.txt")
    names = ("google-chrome", "chromium", "chromium-browser")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip(f"none of {', '.join(names)} is installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()

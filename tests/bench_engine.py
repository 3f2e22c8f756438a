"""How fast is the engine?  One table: transformers' `generate`, its continuous batching, our sequential and our parallel decoding,
all in one run, interleaved, medians.  Random weights; lengths and trees are scripted, so no training is needed.

    python tests/bench_engine.py                     # make bench; add --quick for a first look, --device cuda for a GPU

Every side samples at temperature 1.  `uneven` lengths are drawn from 16..256 with a mean of 88: a batch of `generate` runs until its
longest row ends, an engine refills or shrinks.  Time to answer is the wall clock of the whole call, prefill included.

What the profile said, tiny model (2 cores, torch 2.13; cProfile and torch.profiler over 96 steps):
- Batch 1 is dispatch, not arithmetic: about 330 small tensor operations a step, of which the matrix products were 14 % of the time, and
  Python's module calls a fifth.  Fusing query/key/value and gate/up products, storing keys and values by one copy, the sign of rotation in
  the table, RMSNorm as one operation, queries and keys normed and rotated together, and no mask where everything is visible took the
  forward pass from about 1.0 to 0.7 of transformers' forward.  The same arithmetic without any nn.Module would take 0.48 of it: a second
  implementation of the model, which this project does not want.
- Batch 64: matrix products 21 %, attention 19 % (bound by memory: one key/value row per request), pointwise operations most of the rest.
- 25M parameters in fp32 are 100 MB: at batch 1 both sides wait for memory, and no engine can be twice as fast as another.
"""

import argparse
import copy
import logging
import resource
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen3Config as HFConfig
from transformers import GenerationConfig, Qwen3ForCausalLM, StoppingCriteria, StoppingCriteriaList

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import random  # noqa: E402

from engine import Engine, layout, tag_token_ids  # noqa: E402
from stage0_model import Qwen3, Qwen3Config, corpus_document, pick_device, train_tokenizer  # noqa: E402
from stage2_beta import add_tag_tokens  # noqa: E402

SIZES = {
    "tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
    "25M": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64),
}


class BenchEngine(Engine):
    """Ends every sequential request, and every branch, at its planned length; otherwise the draw stands, unless it is a tag or an end.

    lengths: {prompt: tokens} in sequential mode; branches: ids of a guideline and the branch length, in parallel mode.
    """

    def sample(self, logits):
        tokens, logprobs = super().sample(logits)
        m = 0
        for request in self.active:
            for head in request.heads:
                tokens[m] = self.planned(request, head, tokens[m])
                m += 1
        return tokens, logprobs

    def planned(self, request, head, token):
        if not self.parallel:
            return self.end if request.used + 1 >= self.lengths[tuple(request.ids[: request.prompt_len])] else 60 + token % 100
        if request.group[head]:
            return self.tag_ids["</step>"] if request.position[head] - self.fork_at >= self.branch_length else 60 + token % 100
        if request.used < len(self.guideline):
            return self.guideline[request.used]
        return self.end if request.ids[-1] == self.tag_ids["</takeaway>"] else self.tag_ids["</takeaway>"]

    def fork(self, request):
        super().fork(request)
        self.fork_at = request.position[request.heads[0]]


class StopAt(StoppingCriteria):
    """`generate`'s own way to end rows at different lengths."""

    def __init__(self, prompt_len, lengths, device):
        self.at = prompt_len + torch.tensor(lengths, device=device)

    def __call__(self, input_ids, scores, **_):
        return self.at <= input_ids.shape[1]


def continuous_batching(hf):
    """transformers' own engine, behind `generate_batch`: (function (prompts, lengths) -> tokens, function to stop it), or Nones where it
    does not run."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    try:
        from transformers import ContinuousBatchingConfig

        manager = copy.deepcopy(hf).init_continuous_batching(
            generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=4096, use_async_batching=False),
        )
        manager.start()

        def run(prompts, lengths):
            for prompt, length in zip(prompts, lengths):
                manager.add_request(prompt, max_new_tokens=length)
            tokens = done = 0
            while done < len(prompts):
                result = manager.get_result(timeout=60)
                if result is None:
                    raise RuntimeError("no result within a minute")
                if result.is_finished():
                    tokens, done = tokens + len(result.generated_tokens), done + 1
            return tokens

        run([[60, 61]], [4])
        return run, lambda: manager.stop(block=True)
    except Exception as error:  # another version, or no attention kernel for this device
        print(f"generate_batch does not run here: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None, None


def timed(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def interleaved(sides, repeats, device):
    """{name: median seconds} of functions run in turn, after one warm-up of each."""
    seconds = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, function in sides.items():
            seconds[name].append(timed(function, device)[0])
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def line(*cells):
    print("  ".join(str(c).ljust(w) if i < 3 else str(c).rjust(w) for i, (c, w) in enumerate(zip(cells, (6, 20, 22, 10, 9, 10, 9, 8)))), flush=True)


def sequential_cases(size, model, hf, tokenizer, args, device):
    continuous, stop_continuous = continuous_batching(hf)
    for batch in args.batches:
        for mix in ("equal", "uneven") if batch > 1 else ("equal",):
            rng = np.random.default_rng(batch)
            lengths = [96] * batch if mix == "equal" else (16 + 240 * rng.beta(0.8, 2.0, batch)).astype(int).tolist()
            prompts = [[int(x) for x in rng.integers(60, 160, 32)] for _ in range(batch)]
            total, ids = sum(lengths), torch.tensor(prompts, device=device)
            engine = BenchEngine(model, tokenizer)
            engine.lengths, engine.end = dict(zip(map(tuple, prompts), lengths)), tokenizer.eos_token_id

            def ours():
                engine.stats.peak_kv_tokens = engine.stats.decode_steps = 0
                out = engine.generate(prompts, parallel=False, max_new_tokens=max(lengths))
                assert sum(len(r.ids) for [r] in out) == total

            def theirs():
                stop = StoppingCriteriaList([StopAt(32, lengths, device)])
                hf.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=max(lengths), pad_token_id=0,
                    eos_token_id=None, stopping_criteria=stop,
                )  # fmt: skip

            sides = {"generate": theirs, "engine": ours}
            if continuous:
                sides["generate_batch"] = lambda: continuous(prompts, lengths)
            seconds = interleaved(sides, args.repeats, device)
            steps, peak = engine.stats.decode_steps + 1, engine.stats.peak_kv_tokens
            case = f"batch {batch}, {mix}"
            for name, n, kv in (
                ("generate", max(lengths), batch * (32 + max(lengths))), ("generate_batch", max(lengths), "-"), ("engine", steps, peak),
            ):  # fmt: skip
                if s := seconds.get(name):
                    what = f"{name}, sequential" if name == "engine" else name
                    line(size, case, what, f"{total / s:.0f}", f"{1e3 * s / n:.2f}", f"{s:.3f}", kv, f"{seconds['generate'] / s:.2f}x")
    if continuous:
        stop_continuous()


def parallel_cases(size, model, tokenizer, args, device):
    for batch, k in [(1, 2), (1, 4), (1, 8), (16, 4)]:
        rng = np.random.default_rng(k)
        prompts = [[int(x) for x in rng.integers(60, 160, 32)] for _ in range(batch)]
        engine = BenchEngine(model, tokenizer)
        engine.guideline = tokenizer.encode("<guideline>" + "".join(f"<plan>{i}:a</plan>" for i in range(1, k + 1)) + "</guideline>")
        engine.branch_length, engine.end, found = 100, tokenizer.eos_token_id, {}

        def parallel():
            engine.stats.peak_kv_tokens = engine.stats.decode_steps = engine.memory.moved_bytes = 0
            found["rollouts"] = engine.generate(prompts, max_new_tokens=2000)
            found["peak"], found["steps"] = engine.stats.peak_kv_tokens, engine.stats.decode_steps + 1

        parallel()
        tokens, path = len(found["rollouts"][0][0].ids), found["rollouts"][0][0].critical_path
        engine.lengths = dict.fromkeys(map(tuple, prompts), tokens)

        def sequential():
            engine.stats.peak_kv_tokens = engine.stats.decode_steps = 0
            engine.generate(prompts, parallel=False, max_new_tokens=tokens)
            found["seq peak"], found["seq steps"] = engine.stats.peak_kv_tokens, engine.stats.decode_steps + 1

        seconds = interleaved({"sequential": sequential, "parallel": parallel}, args.repeats, device)
        case = f"batch {batch}, {k} branches"
        for name, steps, peak in (("sequential", "seq steps", "seq peak"), ("parallel", "steps", "peak")):
            s = seconds[name]
            gain = f"{seconds['sequential'] / s:.2f}x"
            line(size, case, f"engine, {name}", f"{batch * tokens / s:.0f}", f"{1e3 * s / found[steps]:.2f}", f"{s:.3f}", found[peak], gain)
        print(f"{'':8}{tokens} tokens each on a critical path of {path}, in {found['steps']} steps; KV bytes moved: {engine.memory.moved_bytes}")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--repeats", type=int, default=5, help="timed runs of each side, after a warm-up; the median counts")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="requests at once")
    p.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="models")
    p.add_argument("--quick", action="store_true", help="the tiny model, batches 1 and 64, three repeats")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = p.parse_args()
    if args.quick:
        args.repeats, args.batches, args.sizes = 3, [1, 64], ["tiny"]
    device = pick_device(args.device)
    print(f"transformers {transformers.__version__}, Python {sys.version.split()[0]}, medians of {args.repeats}\n")

    rng = random.Random(0)
    tokenizer = train_tokenizer(text for _ in range(300) for text in corpus_document(rng, 0.05, 0.5, 0.2))
    line("model", "case", "decoder", "tokens/s", "ms/step", "answer s", "peak KV", "ratio")
    for size in args.sizes:
        torch.manual_seed(0)
        config = dict(SIZES[size], vocab_size=4096 if size != "tiny" else 400, tie_word_embeddings=True)
        model = Qwen3(Qwen3Config(**config, eos_token_id=tokenizer.eos_token_id)).to(device)
        hf = Qwen3ForCausalLM(HFConfig(**config)).to(device).eval()
        add_tag_tokens(model, tokenizer)
        sequential_cases(size, model, hf, tokenizer, args, device)
        parallel_cases(size, model, tokenizer, args, device)

    # ---- the layout of a long response ----
    t, ids = tag_token_ids(tokenizer), []
    while len(ids) < 32_768:
        ids += tokenizer.encode("<guideline><plan>1:a</plan><plan>2:b</plan><plan>3:c</plan></guideline>")
        ids += [x for _ in range(3) for x in (t["<step>"], *[60] * 300, t["</step>"])] + [t["<takeaway>"], 60, t["</takeaway>"]]
    ids = np.array(ids[:32_768])
    took = statistics.median(timed(lambda: layout(ids, t), torch.device("cpu"))[0] for _ in range(9))
    tracemalloc.start()
    layout(ids, t)
    print(f"\nlayout of 32,768 tokens: {1e3 * took:.2f} ms, {tracemalloc.get_traced_memory()[1] / 2**20:.2f} MiB at its peak")
    tracemalloc.stop()

    # ---- memory during a long run, under a budget of a fraction of the need ----
    engine = BenchEngine(model, tokenizer, kv_tokens=8192)
    rng = np.random.default_rng(0)
    prompts = [[int(x) for x in rng.integers(60, 160, rng.integers(8, 64))] for _ in range(2000)]
    engine.end, engine.lengths = tokenizer.eos_token_id, {tuple(p): int(16 + 240 * rng.beta(0.8, 2.0)) for p in prompts}
    resident = []
    for part in range(4):
        engine.generate(prompts[500 * part : 500 * (part + 1)], parallel=False, max_new_tokens=256)
        statm = Path("/proc/self/statm")  # resident now; elsewhere than on Linux only the peak is told
        now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resident.append(now / 2**20)
    print(
        f"2,000 requests under a KV budget of 8,192 tokens ({engine.stats.preemptions} preemptions, peak {engine.stats.peak_kv_tokens} "
        f"tokens, {engine.kv_tokens_in_use} in use at the end): resident after each 500: " + ", ".join(f"{x:.0f}" for x in resident) + " MiB"
    )


if __name__ == "__main__":
    main()

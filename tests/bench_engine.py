"""How fast is the engine?  One table: transformers' `generate`, its continuous batching, our sequential and our parallel decoding,
all in one run, interleaved, medians.  Random weights; lengths and trees are scripted, so no training is needed.

    python tests/bench_engine.py                     # make bench; add --quick for a first look
    python tests/bench_engine.py --device cuda       # make bench DEVICE=cuda: Qwen3-4B and 0.6B, section "On a GPU" below; within 10 minutes
    python tests/bench_engine.py --device cuda --sizes 0.6B --cases sequential branches   # some of it: what time did not allow

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
import gc
import json
import logging
import os
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

import random

import engine as engine_module
import stage0_model as stage0
from engine import Engine, Example, batches, layout, ragged, tag_token_ids, token_logprobs
from stage0_model import Qwen3, Qwen3Config, corpus_document, pick_device, train_tokenizer
from stage2_beta import add_tag_tokens

SIZES = {
    "tiny": dict(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
    "25M": dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "0.6B": dict(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "4B": dict(
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
}
VOCABULARY = {"tiny": 400, "25M": 4096, "0.6B": 151_936, "4B": 151_936}
CASES = (
    "sequential",
    "branches",
    "batch",
    "generate",
    "rollout",
    "sft",
)  # on a GPU; the last one fills its memory


class BenchEngine(Engine):
    """Ends every sequential request, and every branch, at its planned length; otherwise the draw stands, unless it is a tag or an end.

    lengths: tokens of each request in sequential mode; branches: ids of a guideline and the branch length, in parallel mode.
    """

    def sample(self, logits):
        tokens, logprobs = super().sample(logits)
        tokens = 60 + tokens % 100
        book = self.book
        of, k = ragged(book.num_tips[self.active])  # (M,) each
        request = self.active[of]
        step = book.steps[request]  # tokens that were sampled before, in the trunk or in this branch
        if not book.tag_ids:
            return np.where(step + 1 >= np.array(self.lengths)[request], self.end, tokens), logprobs

        # the guideline, then the branches side by side, then nothing but tags
        tip = book.tokens[request, book.tips[request, k]]
        tags, guideline = book.tag_ids, np.array(self.guideline)
        step_in_branch = step - len(guideline)
        tokens = np.select(
            [step_in_branch < 0, tip["block"] == 0, step_in_branch >= self.branch_length],
            [
                guideline.take(step, mode="clip"),
                np.where(tip["id"] == tags["</takeaway>"], self.end, tags["</takeaway>"]),
                tags["</step>"],
            ],
            tokens,
        )
        return tokens, logprobs


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
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=512, max_batch_tokens=4096, use_async_batching=False
            ),
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
    print(
        "  ".join(
            str(c).ljust(w) if i < 3 else str(c).rjust(w)
            for i, (c, w) in enumerate(zip(cells, (6, 20, 22, 10, 9, 10, 9, 8)))
        ),
        flush=True,
    )


def sequential_cases(size, model, hf, tokenizer, args, device):
    continuous, stop_continuous = continuous_batching(hf)
    for batch in args.batches:
        for mix in ("equal", "uneven") if batch > 1 else ("equal",):
            rng = np.random.default_rng(batch)
            lengths = (
                [96] * batch
                if mix == "equal"
                else (16 + 240 * rng.beta(0.8, 2.0, batch)).astype(int).tolist()
            )
            prompts = [[int(x) for x in rng.integers(60, 160, 32)] for _ in range(batch)]
            total, ids = sum(lengths), torch.tensor(prompts, device=device)
            engine = BenchEngine(model, tokenizer)
            engine.lengths, engine.end = lengths, tokenizer.eos_token_id

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
                    line(
                        size,
                        case,
                        what,
                        f"{total / s:.0f}",
                        f"{1e3 * s / n:.2f}",
                        f"{s:.3f}",
                        kv,
                        f"{seconds['generate'] / s:.2f}x",
                    )
    if continuous:
        stop_continuous()


def parallel_cases(size, model, tokenizer, args, device):
    for batch, k in [(1, 2), (1, 4), (1, 8), (16, 4)]:
        rng = np.random.default_rng(k)
        prompts = [[int(x) for x in rng.integers(60, 160, 32)] for _ in range(batch)]
        engine = BenchEngine(model, tokenizer)
        engine.guideline = tokenizer.encode(
            "<guideline>" + "".join(f"<plan>{i}:a</plan>" for i in range(1, k + 1)) + "</guideline>"
        )
        engine.branch_length, engine.end, found = 100, tokenizer.eos_token_id, {}

        def parallel():
            engine.stats.peak_kv_tokens = engine.stats.decode_steps = engine.runner.moved_bytes = 0
            found["rollouts"] = engine.generate(prompts, max_new_tokens=2000)
            found["peak"], found["steps"] = engine.stats.peak_kv_tokens, engine.stats.decode_steps + 1

        parallel()
        tokens, path = len(found["rollouts"][0][0].ids), found["rollouts"][0][0].critical_path
        engine.lengths = [tokens] * batch

        def sequential():
            engine.stats.peak_kv_tokens = engine.stats.decode_steps = 0
            engine.generate(prompts, parallel=False, max_new_tokens=tokens)
            found["seq peak"], found["seq steps"] = engine.stats.peak_kv_tokens, engine.stats.decode_steps + 1

        seconds = interleaved({"sequential": sequential, "parallel": parallel}, args.repeats, device)
        case = f"batch {batch}, {k} branches"
        for name, steps, peak in (("sequential", "seq steps", "seq peak"), ("parallel", "steps", "peak")):
            s = seconds[name]
            gain = f"{seconds['sequential'] / s:.2f}x"
            line(
                size,
                case,
                f"engine, {name}",
                f"{batch * tokens / s:.0f}",
                f"{1e3 * s / found[steps]:.2f}",
                f"{s:.3f}",
                found[peak],
                gain,
            )
        print(
            f"{'':8}{tokens} tokens each on a critical path of {path}, in {found['steps']} steps; KV bytes moved: {engine.runner.moved_bytes}"
        )


# ======================================================================================================================
# On a GPU
# ======================================================================================================================
# A decode step must read every weight once (the embedding too: it is the output matrix), and the keys and values of every token in the
# rows once, whatever the number of branches.  For Qwen3-4B in bf16 that is 8.04 GB, and 147,456 bytes for each token of context: at 8k
# tokens 9.25 GB, or 2.15 ms at the 4.3 TB/s that a copy on an H200 reaches, counting bytes read and bytes written.  "bound" is that time,
# with the bandwidth measured in the same run.  ms/step and tokens/s leave the prefill out: a call that ends after the first token is
# timed too, and taken off.  Time to answer is the whole call.


def copy_bandwidth(device):
    """Bytes read and written per second by a copy far larger than any cache."""
    x = torch.rand(2**30 if device.type == "cuda" else 2**24, device=device)
    y = torch.empty_like(x)
    seconds = [timed(lambda: y.copy_(x), device)[0] for _ in range(10)]
    return 2 * x.numel() * x.element_size() / statistics.median(seconds[2:])


class Report:
    """Rows as they come, all of them as JSON after each (a run that is cut off loses nothing), and a table at the end."""

    COLUMNS = (
        "model",
        "case",
        "decoder",
        "tokens/s",
        "ms/step",
        "bound ms",
        "% of bound",
        "answer s",
        "ratio",
    )
    WIDTHS = (6, 28, 22, 9, 8, 8, 10, 9, 7)

    def __init__(self, file, bandwidth, device, stop_at):
        self.file, self.bandwidth, self.rows, self.stop_at = file, bandwidth, [], stop_at
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.head = dict(
            device=name,
            torch=torch.__version__,
            transformers=transformers.__version__,
            copy_bytes_per_second=bandwidth,
        )

    def add(self, model, case, decoder, **values):
        self.rows.append(dict(model=model, case=case, decoder=decoder, **values))
        self.file.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")
        self.print(self.rows[-1])
        return self.rows[-1]

    def decoded(self, model, case, decoder, tokens, steps, whole, prefill, bytes_per_step, ratio_to=None):
        """A decoding run: tokens and steps after the prefill, seconds of the whole call and of one that ends after the first token."""
        seconds, bound = max(1e-9, whole - prefill), bytes_per_step / self.bandwidth
        row = {
            "tokens/s": tokens / seconds,
            "ms/step": 1e3 * seconds / steps,
            "bound ms": 1e3 * bound,
            "% of bound": 100 * bound * steps / seconds,
        }
        row |= {
            "answer s": whole,
            "steps": steps,
            "tokens": tokens,
            "prefill s": prefill,
            "bytes per step": bytes_per_step,
        }
        return self.add(
            model, case, decoder, **row, ratio=row["tokens/s"] / ratio_to["tokens/s"] if ratio_to else None
        )

    def print(self, row):
        cells = [
            f"{row[c]:.4g}"
            if isinstance(row.get(c), float)
            else str(row[c])
            if row.get(c) is not None
            else "-"
            for c in self.COLUMNS
        ]
        print(
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, self.WIDTHS))
            ),
            flush=True,
        )

    def table(self):
        print(
            f"\n{self.head['device']}, torch {self.head['torch']}, a copy moves {self.bandwidth / 1e12:.2f} TB/s; all numbers in {self.file}"
        )
        self.print(dict(zip(self.COLUMNS, self.COLUMNS)))
        for row in self.rows:
            self.print(row)

    def out_of_time(self, what):
        if time.monotonic() > self.stop_at:
            self.add("", what, "left out: no time")
            return True
        return False


def weight_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def decode_row(
    report,
    size,
    case,
    model,
    tokenizer,
    prompts,
    args,
    branches=0,
    lengths=(),
    samples=1,
    ratio_to=None,
    repeats=None,
):
    """Decode so many samples of the prompts, in branches or sequentially to the lengths given, and report it."""
    device, rows = model.device, min(256, len(prompts) * samples)
    budget = max(lengths, default=40 + branches * (args.branch_length + 20))
    engine = BenchEngine(model, tokenizer, kv_tokens=rows * (max(map(len, prompts)) + budget))
    engine.end, engine.branch_length, engine.lengths = tokenizer.eos_token_id, args.branch_length, lengths
    engine.guideline = tokenizer.encode(
        "<guideline>" + "".join(f"<plan>{i}:a</plan>" for i in range(1, branches + 1)) + "</guideline>"
    )

    def generate(limit):
        return engine.generate(prompts, n=samples, parallel=branches > 0, max_new_tokens=limit)

    generate(budget)  # compiles kernels and captures the graphs of every size that comes up
    wholes, prefills = [], []
    for _ in range(repeats or args.repeats):
        prefills.append(timed(lambda: generate(1), device)[0])
        engine.stats.decode_steps = 0
        seconds, found = timed(lambda: generate(budget), device)
        wholes.append(seconds)
    rollouts = [r for rs in found for r in rs]
    decoded, steps = sum(len(r.ids) - 1 for r in rollouts), engine.stats.decode_steps
    # mean over the steps of the tokens that lie in the rows: of each running request the prompt, and on average half of the response
    in_rows = (
        sum(r.critical_path * (len(p) + len(r.ids) / 2) for p, rs in zip(prompts, found) for r in rs) / steps
    )
    must_move = weight_bytes(model) + in_rows * engine.runner.pool[:, 0].nbytes
    decoder = f"engine, {branches} branches" if branches else "engine, sequential"
    return report.decoded(
        size,
        case,
        decoder,
        decoded,
        steps,
        statistics.median(wholes),
        statistics.median(prefills),
        must_move,
        ratio_to,
    )


def random_ids(rng, n):
    return [int(x) for x in rng.integers(60, 160, n)]


def batch_1_cases(report, size, model, tokenizer, args, device):
    """Sequentially, and the same model in 2 .. 8 branches, at several lengths of context."""
    rng = np.random.default_rng(0)
    for context in args.contexts:
        prompt, case = [random_ids(rng, context)], f"batch 1, context {context}"
        if report.out_of_time(case):
            return
        alone = decode_row(report, size, case, model, tokenizer, prompt, args, lengths=[args.branch_length])
        for k in args.branches if "branches" in args.cases else ():
            if report.out_of_time(f"{case}, {k} branches"):
                return
            decode_row(report, size, case, model, tokenizer, prompt, args, branches=k, ratio_to=alone)


def batch_32_cases(report, size, model, tokenizer, args, device):
    rng, batch = np.random.default_rng(1), args.batch
    prompts, case = (
        [random_ids(rng, min(args.contexts)) for _ in range(batch)],
        f"batch {batch}, context {min(args.contexts)}",
    )
    if not report.out_of_time(case):
        alone = decode_row(
            report, size, case, model, tokenizer, prompts, args, lengths=[args.branch_length] * batch
        )
        decode_row(report, size, case, model, tokenizer, prompts, args, branches=6, ratio_to=alone)


def rollout_cases(report, size, model, tokenizer, args, device):
    """As in a step of stage 1 (sequential, uneven lengths) and of stage 3 (four branches): 8 samples of each question."""
    rng, case = np.random.default_rng(2), f"rollout of {args.requests} requests"
    prompts = [random_ids(rng, 200) for _ in range(args.requests // 8)]
    lengths = (args.branch_length * (0.2 + 3.8 * rng.beta(0.8, 2.0, 8 * len(prompts)))).astype(int).tolist()
    if not report.out_of_time(case):
        decode_row(report, size, case, model, tokenizer, prompts, args, lengths=lengths, samples=8, repeats=1)
        decode_row(report, size, case, model, tokenizer, prompts, args, branches=4, samples=8, repeats=1)


def generate_cases(report, size, model, tokenizer, args, device):
    """transformers: the dynamic cache, and the static one, whose forward it compiles."""
    hf = Qwen3ForCausalLM(HFConfig(**SIZES[size], vocab_size=VOCABULARY[size], tie_word_embeddings=True))
    hf = hf.to(device, model_dtype(device)).eval()
    rng, n = np.random.default_rng(0), min(128, args.branch_length)
    for cache in ("dynamic", "static"):
        for context in args.contexts[:1] if cache == "static" else args.contexts:
            ids, case = torch.tensor([random_ids(rng, context)], device=device), f"batch 1, context {context}"
            if report.out_of_time(f"{case}, generate {cache}"):
                return

            def generate(limit):
                hf.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, min_new_tokens=limit, max_new_tokens=limit, pad_token_id=0,
                    **({"cache_implementation": "static"} if cache == "static" else {}),
                )  # fmt: skip

            try:
                for _ in range(2):
                    generate(n)
                prefill = statistics.median(
                    timed(lambda: generate(1), device)[0] for _ in range(args.repeats)
                )
                whole = statistics.median(timed(lambda: generate(n), device)[0] for _ in range(args.repeats))
            except Exception as error:  # another version of transformers
                report.add(size, case, f"generate, {cache}", error=f"{type(error).__name__}: {error}"[:300])
                continue
            c = hf.config
            must_move = (
                weight_bytes(hf)
                + 2
                * c.num_hidden_layers
                * c.num_key_value_heads
                * c.head_dim
                * (context + n / 2)
                * hf.dtype.itemsize
            )
            report.decoded(size, case, f"generate, {cache}", n - 1, n - 1, whole, prefill, must_move)


def sft_cases(report, size, model, tokenizer, args, device):
    """One update (forward, backward, AdamW) on 8 responses with branches: packed, siblings skipped; and the authors' way, one sequence at a time
    under a dense mask.  Activations are recomputed in both."""
    t, rng = tag_token_ids(tokenizer), np.random.default_rng(3)
    stage0.recompute_activations(model)
    optimizers = stage0.make_optimizers(model, 1e-6)
    for total in args.sft_tokens:
        examples = []
        for _ in range(8):
            each = max(4, (total // 8 - 40) // 12)  # three blocks of four steps
            ids = []
            for _ in range(3):
                ids += tokenizer.encode(
                    "<guideline>" + "".join(f"<plan>{i}:a</plan>" for i in range(1, 5)) + "</guideline>"
                )
                ids += [x for _ in range(4) for x in (t["<step>"], *random_ids(rng, each), t["</step>"])] + [
                    t["<takeaway>"],
                    60,
                    t["</takeaway>"],
                ]
            examples.append(Example(random_ids(rng, 16), ids, layout(ids, t)))
        tokens = sum(len(s.prompt) + len(s.ids) for s in examples)

        def step(max_tokens, flex):
            def run():
                for _, ids, batch_layout, mask in batches(examples, max_tokens, device):
                    batch_layout = (
                        batch_layout
                        if flex
                        else engine_module.Layout(
                            batch_layout.block, batch_layout.branch, batch_layout.position
                        )
                    )
                    (-token_logprobs(model, ids, batch_layout)[0][mask].sum() / tokens).backward()
                stage0.update(model, optimizers)

            return run

        seconds, peak, here = {}, {}, stage0.uses_flex
        for name, max_tokens, flex in (("dense mask, one by one", 1, False), ("packed", 2 * total, True)):
            if report.out_of_time(f"SFT, {total} tokens, {name}"):
                return
            stage0.uses_flex = engine_module.uses_flex = here if flex else lambda device: False
            try:
                step(max_tokens, flex)()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds[name] = statistics.median(
                    timed(step(max_tokens, flex), device)[0] for _ in range(args.repeats)
                )
                peak[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            except torch.OutOfMemoryError as error:
                report.add(size, f"SFT, {total} tokens", name, error=str(error)[:300])
                continue
            finally:
                stage0.uses_flex = engine_module.uses_flex = here
            values = {
                "tokens/s": tokens / seconds[name],
                "ms/step": 1e3 * seconds[name],
                "peak bytes": peak[name],
            }
            report.add(
                size,
                f"SFT, {total} tokens",
                name,
                **values,
                ratio=seconds.get("dense mask, one by one", float("nan")) / seconds[name],
            )


def model_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def on_a_gpu(args, tokenizer, device):
    out = Path(args.out or os.environ.get("OUT", "out")) / "bench.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(out, copy_bandwidth(device), device, time.monotonic() + args.seconds)
    report.print(dict(zip(report.COLUMNS, report.COLUMNS)))
    cases = {
        "sequential": batch_1_cases, "branches": batch_1_cases, "batch": batch_32_cases, "generate": generate_cases, "rollout": rollout_cases,
        "sft": sft_cases,
    }  # fmt: skip
    for size in args.sizes:
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen3(
                Qwen3Config(
                    **SIZES[size],
                    vocab_size=VOCABULARY[size],
                    rope_theta=1e6,
                    eos_token_id=tokenizer.eos_token_id,
                )
            )
        model.to(model_dtype(device))
        add_tag_tokens(model, tokenizer)
        for run in dict.fromkeys(cases[case] for case in args.cases):
            run(report, size, model, tokenizer, args, device)
        del model
        gc.collect()  # gradient hooks and recomputed blocks hold on to each other
    report.table()


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--repeats",
        type=int,
        help="timed runs of each side, after a warm-up, of which the median counts; default 5, on a GPU 3",
    )
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], help="requests at once")
    p.add_argument(
        "--sizes", nargs="+", choices=SIZES, help="models; default tiny and 25M, on a GPU 4B and 0.6B"
    )
    p.add_argument("--quick", action="store_true", help="the tiny model, batches 1 and 64, three repeats")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda")
    gpu = p.add_argument_group("on a GPU")
    gpu.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        help="what to time; default all, on a CPU the tables above instead",
    )
    gpu.add_argument(
        "--contexts", type=int, nargs="+", default=[1024, 8192, 32_768], help="prompt tokens at batch 1"
    )
    gpu.add_argument("--branches", type=int, nargs="+", default=[2, 4, 6, 8], help="branches at batch 1")
    gpu.add_argument(
        "--branch-length", type=int, default=256, help="tokens of a branch, and of a sequential response"
    )
    gpu.add_argument("--batch", type=int, default=32, help="requests of the batch case")
    gpu.add_argument("--requests", type=int, default=256, help="requests of the rollout case")
    gpu.add_argument(
        "--sft-tokens", type=int, nargs="+", default=[8192, 32_768], help="tokens of an SFT update"
    )
    gpu.add_argument("--seconds", type=float, default=480, help="start no case after this long")
    gpu.add_argument("--out", default="", help="folder for bench.json; default $OUT, or out")
    args = p.parse_args()
    if args.quick:
        args.repeats, args.batches, args.sizes = 3, [1, 64], ["tiny"]
    device = pick_device(args.device)
    args.cases = args.cases or (CASES if device.type == "cuda" and not args.quick else ())
    args.sizes = args.sizes or (["4B", "0.6B"] if args.cases else ["tiny", "25M"])
    args.repeats = args.repeats or (3 if args.cases else 5)
    print(
        f"transformers {transformers.__version__}, Python {sys.version.split()[0]}, medians of {args.repeats}\n"
    )

    rng = random.Random(0)
    tokenizer = train_tokenizer(text for _ in range(300) for text in corpus_document(rng, 0.05, 0.5, 0.2))
    if args.cases:
        return on_a_gpu(args, tokenizer, device)
    line("model", "case", "decoder", "tokens/s", "ms/step", "answer s", "peak KV", "ratio")
    for size in args.sizes:
        torch.manual_seed(0)
        config = dict(SIZES[size], vocab_size=VOCABULARY[size], tie_word_embeddings=True)
        model = Qwen3(Qwen3Config(**config, eos_token_id=tokenizer.eos_token_id)).to(device)
        hf = Qwen3ForCausalLM(HFConfig(**config)).to(device).eval()
        add_tag_tokens(model, tokenizer)
        sequential_cases(size, model, hf, tokenizer, args, device)
        parallel_cases(size, model, tokenizer, args, device)

    # ---- the layout of a long response ----
    t, ids = tag_token_ids(tokenizer), []
    while len(ids) < 32_768:
        ids += tokenizer.encode("<guideline><plan>1:a</plan><plan>2:b</plan><plan>3:c</plan></guideline>")
        ids += [x for _ in range(3) for x in (t["<step>"], *[60] * 300, t["</step>"])] + [
            t["<takeaway>"],
            60,
            t["</takeaway>"],
        ]
    ids = np.array(ids[:32_768])
    took = statistics.median(timed(lambda: layout(ids, t), torch.device("cpu"))[0] for _ in range(9))
    tracemalloc.start()
    layout(ids, t)
    print(
        f"\nlayout of 32,768 tokens: {1e3 * took:.2f} ms, {tracemalloc.get_traced_memory()[1] / 2**20:.2f} MiB at its peak"
    )
    tracemalloc.stop()

    # ---- memory during a long run, under a budget of a fraction of the need ----
    engine = BenchEngine(model, tokenizer, kv_tokens=8192)
    rng = np.random.default_rng(0)
    prompts = [[int(x) for x in rng.integers(60, 160, rng.integers(8, 64))] for _ in range(2000)]
    engine.end, lengths = tokenizer.eos_token_id, (16 + 240 * rng.beta(0.8, 2.0, 2000)).astype(int).tolist()
    resident = []
    for part in range(4):
        engine.lengths = lengths[500 * part : 500 * (part + 1)]
        engine.generate(prompts[500 * part : 500 * (part + 1)], parallel=False, max_new_tokens=256)
        statm = Path("/proc/self/statm")  # resident now; elsewhere than on Linux only the peak is told
        now = (
            int(statm.read_text().split()[1]) * resource.getpagesize()
            if statm.is_file()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        )
        resident.append(now / 2**20)
    print(
        f"2,000 requests under a KV budget of 8,192 tokens ({engine.stats.preemptions} preemptions, peak {engine.stats.peak_kv_tokens} "
        f"tokens, {engine.kv_tokens_in_use} in use at the end): resident after each 500: "
        + ", ".join(f"{x:.0f}" for x in resident)
        + " MiB"
    )


if __name__ == "__main__":
    main()

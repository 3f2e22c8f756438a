r"""Stage 2, NPR-BETA: learn to decode in parallel, from the model's own accepted samples.

In : out/stage1 (samples sequentially, tags are text).      Out: out/stage2/ (decodes in parallel, tags are tokens), out/stage2/data/.

1. Rejection sampling: K responses per question; keep those whose answer is right AND whose format is perfect.
2. The eight tags become single tokens, each embedding starting as the mean over its word's tokens.
3. Fine-tune with the layout of engine.py: the steps of a block share their positions and cannot see each other.
   L = -(1/N) sum_t log p(y_t | what the layout lets it see), over response tokens that the engine samples.

    python stage2_beta.py                         # reads out/stage1, writes out/stage2
    python stage2_beta.py --sequential --data out/stage2/data --out out/stage2_seq     # SR-BETA, the sequential twin

Differences from the paper: (1) tokens that the engine forces (`<step>`, its number, `<takeaway>`) carry no loss in parallel mode: they
are never sampled, and a branch cannot know its number from what it sees.
"""

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import datasets
import torch
from tokenizers import AddedToken
from tqdm import tqdm

from engine import TAGS, Engine, Sequence, batches, layout, tag_token_ids, token_logprobs
from stage0_model import (
    ANY_TAG, KINDS, Run, UserError, draw_problems, from_all_ranks, load, make_optimizers, my_share, pick_device, print_inherited,
    prompt_ids, ranks, read_problems, read_prompt, read_rows, recompute_activations, response_text, run_main, set_lr, update,
)  # fmt: skip
from stage1_zero import parse_response

# ======================================================================================================================
# 1. Rejection sampling
# ======================================================================================================================


def rejection_sample(engine, problems, format_prompt, samples, keep, max_new_tokens, temperature, seed, keep_wrong=False):
    """Sample every problem and keep at most `keep` distinct right and perfectly formatted responses of each.  Each rank samples its
    share of the problems; all get all results.

    Returns (records, reasons): records are dicts for `datasets` (problem, kind, response, plans, blocks, tokens); reasons counts
    what happened to every sample: accepted, duplicate, over the cap, wrong answer, or the worst format violation.
    """
    tokenizer, problems, records, reasons = engine.tokenizer, my_share(problems), [], Counter()
    prompts = [prompt_ids(tokenizer, p.question, format_prompt) for p in problems]
    responses = engine.generate(
        prompts, n=samples, parallel=False, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, progress=True
    )
    for problem, rollouts in zip(problems, responses):
        kept = set()
        for rollout in rollouts:
            text = response_text(tokenizer, rollout.ids)
            parsed = parse_response(text)
            if rollout.finish_reason != "stop":
                reasons["truncated"] += 1
            elif parsed.violations:
                reasons[f"format: {parsed.violations[0]}"] += 1
            elif not keep_wrong and not problem.verify(text):
                reasons["wrong answer"] += 1
            elif text in kept:
                reasons["duplicate"] += 1
            elif len(kept) == keep:
                reasons["over the cap per problem"] += 1
            else:
                kept.add(text)
                reasons["accepted"] += 1
                records.append(
                    {
                        "problem": problem.question, "kind": problem.kind, "response": text, "tokens": len(rollout.ids),
                        "blocks": len(parsed.blocks), "plans": sum(len(plans) for plans, _, _ in parsed.blocks),
                    }  # fmt: skip
                )
    return from_all_ranks(records), sum(from_all_ranks([reasons]), Counter())


# ======================================================================================================================
# 2. Tag tokens
# ======================================================================================================================


def add_tag_tokens(model, tokenizer):
    """Make each of TAGS one token.  Its embedding, and its output row if untied, start as the mean over the tokens it was spelled
    with.  Spare embedding rows are used first (Qwen3 has 267 of them); the matrices grow only when they must, and never shrink.
    A tokenizer that already has the tags is left alone.
    """
    vocabulary = tokenizer.get_vocab()
    new = [tag for tag in TAGS if tag not in vocabulary]
    spelled = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in new}
    # like Qwen3's own <think>: one token, yet not 'special', so decoding with skip_special_tokens keeps the structure
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in new])
    with torch.no_grad():
        for module in [model.model["embed_tokens"]] + ([] if model.config.tie_word_embeddings else [model.lm_head]):
            missing = len(tokenizer) - module.weight.shape[0]
            if missing > 0:
                extra = module.weight.mean(0, keepdim=True).repeat(missing, 1)
                module.weight = torch.nn.Parameter(torch.cat([module.weight, extra]))
            for tag in new:
                module.weight[tokenizer.convert_tokens_to_ids(tag)] = module.weight[spelled[tag]].mean(0)
    model.config.vocab_size = model.model["embed_tokens"].weight.shape[0]


def encode_response(tokenizer, text, sequential):
    """A response text -> (ids with end of turn, Layout or None, forced flags).  White space between tags, and before a step's number, is
    dropped: an instruction-tuned model gives every tag a line of its own, the engine writes the canonical form.

    forced is True for what the engine writes by itself in parallel mode.  Raises MalformedTrajectory for text with broken tags.
    """
    text = re.sub(rf"({ANY_TAG.pattern})\s+(?={ANY_TAG.pattern})|(<step>)\s+(?=\d)", r"\1\2", text)
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
    if sequential:
        return ids, None, [False] * len(ids)
    tag_ids = tag_token_ids(tokenizer)
    forced, branch = [False] * len(ids), 0
    for i, token in enumerate(ids):
        if token == tag_ids["</guideline>"]:
            branch = 0
        elif token == tag_ids["<takeaway>"]:
            forced[i] = True
        elif token == tag_ids["<step>"]:
            branch += 1
            opening = 1 + len(tokenizer.encode(f"{branch}:", add_special_tokens=False))
            forced[i : i + opening] = [True] * opening
    return ids, layout(ids, tag_ids), forced


# ======================================================================================================================
# 3. Parallel fine-tuning
# ======================================================================================================================


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--init", default="out/stage1", help="checkpoint that is sampled and then fine-tuned: folder or hub name")
    p.add_argument("--out", default="out/stage2", help="folder to write the checkpoint to")
    p.add_argument("--kind", default="all", choices=("all", *KINDS), help="problems to sample")
    p.add_argument("--data", default="", help="real problems as in stage 1, or samples to learn from (rows with a `response`)")
    p.add_argument("--question-column", default="", help="column of --data with the question, found by its name when not given")
    p.add_argument("--answer-column", default="", help="column of --data with the answer, found by its name when not given")
    p.add_argument("--prompt-file", default="", help="text that asks for the format (with --data: assets/format_prompt.txt)")
    p.add_argument("--problems", type=int, default=1500, help="questions to sample")
    p.add_argument("--samples", type=int, default=2, help="responses per question, K")
    p.add_argument("--keep", type=int, default=2, help="accepted responses kept per question at most, m")
    p.add_argument("--keep-wrong", action="store_true", help="ablation: filter by format alone, wrong answers stay in")
    p.add_argument("--max-new-tokens", type=int, default=896, help="response budget in tokens")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    p.add_argument("--sequential", action="store_true", help="the twin SR-BETA: same data and updates, causal mask, all tokens learned")
    p.add_argument("--epochs", type=float, default=4.0, help="passes over the accepted samples")
    p.add_argument("--batch-tokens", type=int, default=2_048, help="padded tokens per update")
    p.add_argument("--micro-tokens", type=int, default=0, help="padded tokens per forward pass; 0: 16,384 on a GPU, 2,048 on a CPU")
    p.add_argument("--lr", type=float, default=2e-3, help="peak AdamW learning rate, falling linearly to zero; 1e-5 for a real model")
    p.add_argument("--muon-lr", type=float, default=2e-3, help="peak Muon learning rate of the matrices; 0: AdamW does it all")
    p.add_argument("--recompute", action="store_true", help="compute activations anew for backward: a third slower, far less memory")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; auto: what config.json says")
    p.add_argument("--save-every", type=int, default=100, help="updates between resume points")
    p.add_argument("--seed", type=int, default=0, help="seed of problems, sampling and order")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..")
    return p.parse_args(argv)


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or (16_384 if device.type == "cuda" else 2_048)  # more outgrow a CPU's caches: 2.4x slower
    print_inherited(args.init)
    model, tokenizer = load(args.init, device, getattr(torch, args.dtype, None))
    if args.data and Path(args.data).resolve() == (Path(args.out) / "data").resolve():
        raise UserError(f"--data {args.data} lies in --out {args.out}, which a new run clears; give --out another folder")
    run = Run(args)

    # ---- data: sampled by the checkpoint itself, or read back ----
    path, rows = run.path / "data", read_rows(args.data) if args.data else []
    ready = bool(rows) and "response" in rows[0]
    format_prompt = read_prompt(args.prompt_file, args.data and not (ready and rows[0].get("kind") in KINDS))
    if not ready and not path.is_dir():
        problems = read_problems(args.data, args.question_column, args.answer_column) if args.data else None
        problems = draw_problems(problems, args.kind, args.problems, f"{args.seed}/rejection")
        engine = Engine(model, tokenizer)
        records, reasons = rejection_sample(
            engine, problems, format_prompt, args.samples, args.keep, args.max_new_tokens, args.temperature, args.seed, args.keep_wrong
        )
        del engine
        if not records:
            raise UserError(f"none of {sum(reasons.values())} samples was accepted ({dict(reasons)}); train stage 1 for longer")
        if run.writes:
            datasets.Dataset.from_list(records).save_to_disk(str(path.with_name("data.part")))
            path.with_name("data.part").rename(path)
            (run.path / "rejection.json").write_text(json.dumps(dict(reasons.most_common()), indent=2) + "\n")
        from_all_ranks([])  # now every rank finds it
        print(f"sampled {sum(reasons.values())}: " + ", ".join(f"{name} {n}" for name, n in reasons.most_common()))
    data = rows if ready else read_rows(path)
    if "problem" not in data[0]:
        raise UserError(f"{args.data}: has responses but no column `problem`; expected what stage 2 saves, e.g. out/stage2/data")

    # ---- tag tokens ----
    add_tag_tokens(model, tokenizer)
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    if args.recompute:
        recompute_activations(model)
    first = run.start(model, optimizers)
    sequences, forced = [], []
    for row in data:
        ids, laid, written = encode_response(tokenizer, row["response"], args.sequential)
        sequences.append(Sequence(prompt_ids(tokenizer, row["problem"], format_prompt), ids, laid))
        forced.append(written)
    spelled = sum(row.get("tokens", 0) for row in data)
    print(f"{len(sequences)} responses, {sum(len(s.ids) for s in sequences)} tokens (with tags spelled out: {spelled})")

    # ---- train: batches of similar lengths in random order, a new order each epoch ----
    per_epoch = len(list(batches(sequences, args.batch_tokens)))
    steps = max(1, round(args.epochs * per_epoch))
    bar = tqdm(range(first + 1, steps + 1), initial=first, total=steps, desc="stage 2", mininterval=1.0)
    queue, epoch = [], -1
    for step in bar:
        began = time.time()
        if epoch != (step - 1) // per_epoch:  # the epoch a resumed run is in, from where it left off
            epoch, rng = (step - 1) // per_epoch, random.Random(f"{args.seed}/{(step - 1) // per_epoch}")
            jitter = rng.sample(range(len(sequences)), len(sequences))  # which of equally long responses share a batch
            cut = [[jitter[i] for i in rows] for rows, *_ in batches([sequences[i] for i in jitter], args.batch_tokens)]
            rng.shuffle(cut)
            queue = cut[(step - 1) % per_epoch :]
        batch = queue.pop(0)  # indices into `sequences`
        num_tokens = sum(not f for i in batch for f in forced[i])  # what the engine writes is not learned
        loss = entropy = tokens = 0.0
        for rows, ids, laid, mask in batches(
            [sequences[i] for i in batch], args.micro_tokens, device, tokenizer.pad_token_id or 0, share=ranks()
        ):
            mask[mask.clone()] = torch.tensor([not f for i in rows for f in forced[batch[i]]], device=device)
            logprobs, H = token_logprobs(model, ids, laid)  # (B, T) each
            part = -logprobs[mask].sum() / num_tokens
            part.backward()
            loss += part.item()
            entropy += H[mask].sum().item() / num_tokens
            tokens += ids.numel()
        set_lr(optimizers, min(1.0, step / 20) * (1 - (step - 1) / steps))
        norm = update(model, optimizers)
        loss, entropy, tokens = map(sum, zip(*from_all_ranks([(loss, entropy, tokens)])))
        speed = tokens / (time.time() - began)
        run.log(step=step, loss=loss, entropy=entropy, grad_norm=norm, epoch=epoch, tokens_per_second=speed)
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:.0f}", refresh=False)
        if step % args.save_every == 0:
            run.checkpoint(model, optimizers, step)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_main(main)

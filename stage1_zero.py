r"""Stage 1, NPR-ZERO: find the parallel format by reinforcement learning (DAPO with a format reward), decoding sequentially.

In : out/stage0 (or --init any Qwen3 checkpoint).      Out: out/stage1/, a checkpoint that writes the format by itself.

For every question the policy writes G responses.  A response scores by its format alone until the format is perfect, then by its
answer:  R = F if F < 0 else +1 / -1.     A_i = (R_i - mean_G) / (std_G + eps)
L = -(1 / sum_i |y_i|) sum_i sum_t min(r_it A_i, clip(r_it, 1 - 0.2, 1 + 0.28) A_i),     r_it = pi(y_it) / pi_old(y_it)

    python stage1_zero.py                         # reads out/stage0, writes out/stage1
    python stage1_zero.py --init Qwen/Qwen3-4B-Instruct-2507 --data orz_math_57k_collected.json ..   # README, "With a real model"
    torchrun --nproc-per-node 2 stage1_zero.py    # data-parallel: same numbers, less time

Differences from the paper: (1) it grades violations in (-2, 0]; here every violation scores in [-2, -1.1], because a violation milder
than a wrong answer (-1) is worth committing, and the policy collapses into nearly valid.
Differences from textbook PPO (all DAPO's): (1) no critic, group advantages; (2) the upper clip is wider, so rare tokens can grow;
(3) groups whose rewards are all equal are dropped and replaced; (4) every token weighs the same; (5) soft overlong penalty; (6) no KL.
"""

import argparse
import re
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from engine import Engine, Sequence, batches, token_logprobs
from stage0_model import (
    ANY_TAG, KINDS, Run, draw_problems, from_all_ranks, load, make_optimizers, my_share, pick_device, print_inherited, prompt_ids,
    ranks, read_problems, read_prompt, recompute_activations, response_text, run_main, set_lr, update,
)  # fmt: skip

# ======================================================================================================================
# 1. The format reward
# ======================================================================================================================

# Every violation and its score.  A response's score is that of its worst violation.  All lie below -1, a wrong answer's reward.
VIOLATIONS = {
    "no block": -2.0,  # not a single guideline
    "overlapping tags": -2.0,  # a tag opened inside another or closed without being open; plans inside a guideline are right
    "block out of order": -1.8,  # not guideline, steps, takeaway, in this order
    "counts differ": -1.6,  # a block's steps are not one per plan
    "numbering": -1.5,  # plans or steps are not 1, 2, .. k
    "no answer": -1.4,  # not exactly one \boxed{}, after the last block
    "text between tags": -1.2,  # only white space may stand between the tags of the skeleton
    "nearly empty": -1.1,  # a plan or takeaway of nothing, a step of fewer than 3 characters
}


@dataclass
class Response:
    """What a response's text is made of: blocks of (plans, steps, takeaway) contents, the text after, and what is wrong."""

    blocks: list = field(default_factory=list)
    final: str = ""
    violations: list = field(default_factory=list)


def parse_response(text):
    r"""Read a response strictly (D2); never raises.

    '<guideline><plan>1:A</plan></guideline><step>1:A7+2=9</step><takeaway>9</takeaway>\boxed{9}' ->
    Response(blocks=[(['A'], ['A7+2=9'], '9')], final='\\boxed{9}', violations=[])
    """
    response, wrong = Response(), set()
    pieces, tags = ANY_TAG.split(text), ANY_TAG.findall(text)  # piece 0, tag 0, piece 1, tag 1, .. piece n

    # elements: the top-level spans in order, as (name, [contents]); a guideline's contents are its plans
    elements, stack, plans = [], [], []
    for piece, tag in zip(pieces, tags):
        name, closing = tag.strip("</>"), tag[1] == "/"
        inside = stack[-1] if stack else None
        if inside in (None, "guideline") and piece.strip():
            wrong.add("text between tags")
        if closing:
            if inside != name:
                wrong.add("overlapping tags")
                continue
            stack.pop()
            if name == "plan":
                plans.append(piece)
            else:
                elements.append((name, plans if name == "guideline" else [piece]))
        else:
            if inside != ("guideline" if name == "plan" else None):
                wrong.add("overlapping tags")
            stack.append(name)
            plans = [] if name == "guideline" else plans
    if stack:
        wrong.add("overlapping tags")
    response.final = pieces[-1]

    # blocks: guideline step+ takeaway, and nothing else
    names = "".join({"guideline": "g", "step": "s", "takeaway": "t", "plan": "p"}[name] for name, _ in elements)
    if "<guideline>" not in tags:
        wrong.add("no block")
    elif not re.fullmatch("(gs+t)+", names):
        wrong.add("block out of order")
    for match in re.finditer("g(s*)(t?)", names):
        first = match.start()
        plans = elements[first][1]
        steps = [content[0] for _, content in elements[first + 1 : match.end(1)]]
        takeaway = elements[match.start(2)][1][0] if match.group(2) else ""
        if len(plans) != len(steps) or not plans:
            wrong.add("counts differ")
        bare = []
        for contents, least in ((plans, 1), (steps, 3)):
            numbered = [re.fullmatch(r"\s*(\d+):(.*)", c, re.S) for c in contents]
            if [m and int(m[1]) for m in numbered] != list(range(1, len(contents) + 1)):
                wrong.add("numbering")
            bare.append([(m[2] if m else c).strip() for m, c in zip(numbered, contents)])
            if any(len(c) < least for c in bare[-1]):
                wrong.add("nearly empty")
        if match.group(2) and not takeaway.strip():
            wrong.add("nearly empty")
        response.blocks.append((*bare, takeaway))
    if text.count("\\boxed{") != 1 or not re.search(r"\\boxed\{.+\}", response.final):
        wrong.add("no answer")
    response.violations = sorted(wrong, key=list(VIOLATIONS).index)  # worst first
    return response


def format_score(text):
    """F: 0.0 for the perfect format, else the score of the worst violation, in [-2, -1.1]."""
    violations = parse_response(text).violations
    return VIOLATIONS[violations[0]] if violations else 0.0


def overlong_penalty(num_tokens, max_new_tokens, buffer):
    """DAPO eq. 13: 0 up to max_new_tokens - buffer, then linearly down to -1 at max_new_tokens.

    (80, 100, 20) -> 0.0, (90, 100, 20) -> -0.5, (100, 100, 20) -> -1.0
    """
    return -min(1.0, max(0.0, (num_tokens - (max_new_tokens - buffer)) / buffer))


# ======================================================================================================================
# 2. DAPO
# ======================================================================================================================


def dapo_advantages(rewards, group_ids, eps=1e-6):
    """A_i = (R_i - mean_G) / (std_G + eps), population std within each group.  rewards (N,), group_ids (N,) -> (N,).

    rewards [1, -1, -1, -1], one group -> mean -0.5, std 0.866 -> [1.73, -0.58, -0.58, -0.58]
    """
    rewards, group_ids = torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(group_ids)
    advantages = torch.zeros_like(rewards)
    for g in group_ids.unique():
        R = rewards[group_ids == g]  # (G,)
        advantages[group_ids == g] = (R - R.mean()) / (R.std(correction=0) + eps)
    return advantages


def dapo_loss(logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.28, num_tokens=None):
    """Clipped surrogate, averaged over tokens (DAPO eq. 8).  logprobs, old_logprobs, mask (N, T), advantages (N,) -> scalar.

    num_tokens: what the sum is divided by; a micro-batch gives the token count of its whole batch.
    A = +1: a ratio of 1.5 counts as 1.28 and has no gradient.  A = -1: a ratio of 0.5 counts as 0.8, likewise.
    """
    ratio = (logprobs - old_logprobs).exp()  # (N, T)
    A = advantages[:, None]  # (N, 1)
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)  # (N, T)
    return -(surrogate * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


# ======================================================================================================================
# 3. The loop
# ======================================================================================================================


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--init", default="out/stage0", help="checkpoint to start from: folder or hub name")
    p.add_argument("--out", default="out/stage1", help="folder to write the checkpoint to")
    p.add_argument("--kind", default="all", choices=("all", *KINDS), help="problems to train on")
    p.add_argument("--data", default="", help="real problems: a json, jsonl or parquet file, a folder of `datasets`, or a hub name")
    p.add_argument("--question-column", default="", help="column of --data with the question, found by its name when not given")
    p.add_argument("--answer-column", default="", help="column of --data with the answer, found by its name when not given")
    p.add_argument("--prompt-file", default="", help="text that asks for the format (with --data: assets/format_prompt.txt)")
    p.add_argument("--steps", type=int, default=48, help="rollout batches")
    p.add_argument("--easy-steps", type=int, default=12, help="first so many steps on the corpus's rungs, where the base is at home: there it finds the format")
    p.add_argument("--prompts", type=int, default=16, help="questions per step")
    p.add_argument("--group-size", type=int, default=12, help="responses per question, G")
    p.add_argument("--updates", type=int, default=4, help="optimizer updates per step, each on its share of the groups")
    p.add_argument("--lr", type=float, default=1e-4, help="peak AdamW learning rate, falling to zero over the last quarter")
    p.add_argument("--eps-low", type=float, default=0.2, help="lower clip of the ratio")
    p.add_argument("--eps-high", type=float, default=0.28, help="upper clip of the ratio (clip-higher)")
    p.add_argument("--max-rounds", type=int, default=3, help="dynamic sampling: at most this many rollout rounds per step")
    p.add_argument("--max-new-tokens", type=int, default=896, help="response budget in tokens")
    p.add_argument("--overlong-buffer", type=int, default=128, help="tokens before the budget over which the overlong penalty grows")
    p.add_argument("--temperature", type=float, default=1.0, help="of the rollouts; 1 keeps the old log-probabilities exact")
    p.add_argument("--micro-tokens", type=int, default=0, help="padded tokens per forward pass; 0: 16,384 on a GPU, 2,048 on a CPU")
    p.add_argument("--recompute", action="store_true", help="compute activations anew for backward: a third slower, far less memory")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; auto: what config.json says")
    p.add_argument("--save-every", type=int, default=10, help="steps between resume points, and between episode dumps")
    p.add_argument("--seed", type=int, default=0, help="seed of problems and sampling")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..")
    return p.parse_args(argv)


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or (16_384 if device.type == "cuda" else 2_048)  # more outgrow a CPU's caches: 2.4x slower
    print_inherited(args.init)
    model, tokenizer = load(args.init, device, getattr(torch, args.dtype, None))
    data = read_problems(args.data, args.question_column, args.answer_column) if args.data else None
    format_prompt = read_prompt(args.prompt_file, args.data)
    run, engine = Run(args), Engine(model, tokenizer)
    optimizers = make_optimizers(model, args.lr)
    if args.recompute:
        recompute_activations(model)
    first = run.start(model, optimizers)

    bar = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, desc="stage 1", mininterval=0)
    for step in bar:
        began = time.time()

        # ---- rollout and reward: dynamic sampling, until enough groups have something to tell apart ----
        groups, sampled, judged = [], 0, []
        for draw in range(args.max_rounds):
            reach = "corpus" if step <= args.easy_steps else "edge"
            problems = my_share(draw_problems(data, args.kind, args.prompts - len(groups), f"{args.seed}/{step}/{draw}", reach))
            prompts = [prompt_ids(tokenizer, p.question, format_prompt) for p in problems]
            responses = engine.generate(
                prompts, n=args.group_size, parallel=False, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                seed=hash((args.seed, step, draw)) & 0xFFFFFFFF,
            )  # fmt: skip
            drawn = []
            for problem, prompt, rollouts in zip(problems, prompts, responses):
                rewards, verdicts = [], []
                for rollout in rollouts:
                    text = response_text(tokenizer, rollout.ids)
                    F, right = format_score(text), problem.verify(text)
                    R = F if F < 0 else 1.0 if right else -1.0
                    rewards.append(R + overlong_penalty(len(rollout.ids), args.max_new_tokens, args.overlong_buffer))
                    verdicts.append((F == 0, right, R, len(rollout.ids), problem.question, text))
                drawn.append((prompt, rollouts, rewards, verdicts))
            for prompt, rollouts, rewards, verdicts in from_all_ranks(drawn):
                judged += verdicts
                sampled += 1
                if max(rewards) - min(rewards) > 1e-6:
                    groups.append((prompt, rollouts, rewards))
            if len(groups) == args.prompts:
                break
        rollout_seconds = time.time() - began
        valid, accuracy, reward, length = (float(np.mean([j[i] for j in judged])) for i in range(4))

        # ---- advantage, loss, step: one update per share of the groups ----
        set_lr(optimizers, min(1.0, step / 5, 4 * (args.steps + 1 - step) / args.steps))  # the fall at the end averages noise out
        loss = entropy = clipped = norm = 0.0
        shares = [share for share in (groups[u :: args.updates] for u in range(args.updates)) if share]
        for share in shares:
            rollouts = [(g, prompt, r) for g, (prompt, rs, _) in enumerate(share) for r in rs]
            advantages = dapo_advantages([R for _, _, rewards in share for R in rewards], [g for g, _, _ in rollouts])
            num_tokens = sum(len(r.ids) for _, _, r in rollouts)
            sequences = [Sequence(prompt, r.ids) for _, prompt, r in rollouts]
            for rows, ids, laid, mask in batches(sequences, args.micro_tokens, device, share=ranks()):
                old = torch.zeros(ids.shape, device=device)
                old[mask] = torch.tensor([x for i in rows for x in rollouts[i][2].logprobs], device=device)
                logprobs, H = token_logprobs(model, ids, laid)  # (B, T) each
                part = dapo_loss(logprobs, old, advantages[rows].to(device), mask, args.eps_low, args.eps_high, num_tokens)
                part.backward()
                ratio = (logprobs.detach() - old).exp()[mask]
                clipped += ((ratio < 1 - args.eps_low) | (ratio > 1 + args.eps_high)).sum().item() / num_tokens / len(shares)
                entropy += H[mask].sum().item() / num_tokens / len(shares)
                loss += part.item() / len(shares)
            norm += update(model, optimizers) / len(shares)
        loss, clipped, entropy = map(sum, zip(*from_all_ranks([(loss, clipped, entropy)])))

        # ---- log and save ----
        run.log(
            step=step, loss=loss, reward=reward, valid=valid, accuracy=accuracy, length=length, critical_path=length,
            entropy=entropy, clipped=clipped, grad_norm=norm, groups_used=len(groups), groups_sampled=sampled,
            tokens_per_second=sum(j[3] for j in judged) / rollout_seconds, rollout_seconds=rollout_seconds,
            step_seconds=time.time() - began,
        )  # fmt: skip
        bar.set_postfix(reward=f"{reward:.2f}", valid=f"{valid:.0%}", acc=f"{accuracy:.0%}", len=f"{length:.0f}", ent=f"{entropy:.2f}")
        if step % args.save_every == 0 or step == 1:
            run.episodes(step, [(question, text, f"F=0 {fine}, right {right}, R {R:.1f}") for fine, right, R, _, question, text in judged])
        if step % args.save_every == 0:
            run.checkpoint(model, optimizers, step)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_main(main)

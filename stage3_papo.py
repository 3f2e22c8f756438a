r"""Stage 3, NPR: optimise the branching policy with PAPO, on rollouts of the parallel engine.

In : out/stage2.      Out: out/stage3/, a native parallel reasoner.

A_i = (R_i - mean_G) / (std_batch + eps),   R_i = +1 if the answer is right else -1
L = -(1 / sum_i |y_i|) sum_i sum_t [pi(y_it) / stopgrad(pi(y_it))] A_i

    python stage3_papo.py                         # reads out/stage2, writes out/stage3
    python stage3_papo.py --sequential --init out/stage2_seq --out out/stage3_seq      # SR, the sequential twin

Differences from GRPO, PAPO's four: (1) rollouts by the parallel engine; (2) with --schema-filter, malformed and truncated rollouts are
dropped, so the reward is accuracy alone; (3) the standard deviation is the whole batch's; (4) strictly on-policy: one update per
batch, no ratio, no clip, so no token's gradient is ever cut off, the tags' least of all.
Differences from the paper: (0) the schema filter is off, and what it would drop scores -1: with it nothing holds the format once answers
may grow; (1) forced tokens are not actions and carry no loss (--count-forced counts them); (2) the scale of the
logits learns faster than the matrices (--gain-factor 1: all alike), the one direction in which small batches agree.
The flags --group-std and --clip-updates take one ingredient away each.
"""

import argparse
import time

import numpy as np
import torch
from tqdm import tqdm

from engine import Engine, Sequence, batches, token_logprobs
from stage0_model import (
    KINDS, Run, UserError, draw_problems, from_all_ranks, load, make_optimizers, my_share, pick_device, print_inherited, prompt_ids,
    ranks, read_problems, read_prompt, recompute_activations, response_text, run_main, set_lr, update,
)  # fmt: skip
from stage1_zero import dapo_advantages, dapo_loss, format_score

# ======================================================================================================================
# 1. PAPO
# ======================================================================================================================


def papo_advantages(rewards, group_ids, eps=1e-6):
    """A_i = (R_i - mean_G) / (std_batch + eps), population std over all rewards.  rewards (N,), group_ids (N,) -> (N,).

    A group that is nearly solved has a small spread of its own; dividing by it would blow up its one failure.  The batch's does not.
    rewards [1, 1, 1, -1], groups [0, 0, 1, 1] -> means 1 and 0, std 0.866 -> [0, 0, 1.15, -1.15]
    """
    rewards, group_ids = torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(group_ids)
    centred = torch.zeros_like(rewards)
    for g in group_ids.unique():
        centred[group_ids == g] = rewards[group_ids == g] - rewards[group_ids == g].mean()
    return centred / (rewards.std(correction=0) + eps)


def papo_loss(logprobs, advantages, mask, num_tokens=None):
    """-(1 / num_tokens) sum of [pi / stopgrad(pi)] A over masked tokens.  logprobs, mask (N, T), advantages (N,) -> scalar.

    The ratio's value is 1 and its gradient is that of log pi: REINFORCE with a group baseline.  num_tokens: what the sum is
    divided by, by default the tokens of this mask; a micro-batch gives the token count of its whole batch.
    """
    ratio = (logprobs - logprobs.detach()).exp()  # (N, T), all ones
    return -(ratio * advantages[:, None] * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


# ======================================================================================================================
# 2. The loop
# ======================================================================================================================


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--init", default="out/stage2", help="checkpoint to start from: folder or hub name")
    p.add_argument("--out", default="out/stage3", help="folder to write the checkpoint to")
    p.add_argument("--kind", default="all", choices=("all", *KINDS), help="problems to train on")
    p.add_argument("--data", default="", help="real problems: a json, jsonl or parquet file, a folder of `datasets`, or a hub name")
    p.add_argument("--question-column", default="", help="column of --data with the question, found by its name when not given")
    p.add_argument("--answer-column", default="", help="column of --data with the answer, found by its name when not given")
    p.add_argument("--prompt-file", default="", help="text that asks for the format (with --data: assets/format_prompt.txt)")
    p.add_argument("--steps", type=int, default=48, help="rollout batches, one update each")
    p.add_argument("--prompts", type=int, default=24, help="questions per step")
    p.add_argument("--group-size", type=int, default=12, help="responses per question, G")
    p.add_argument("--lr", type=float, default=1e-4, help="peak AdamW learning rate, falling to zero over the last quarter")
    p.add_argument("--muon-lr", type=float, default=0.0, help="peak Muon learning rate of the matrices; 0: AdamW does it all")
    p.add_argument("--gain-factor", type=float, default=400, help="the scale of the logits (gains of the last norm) learns so many times faster")
    p.add_argument("--max-new-tokens", type=int, default=896, help="response budget in tokens, all branches together")
    p.add_argument("--max-branches", type=int, default=8, help="most plans a guideline may have")
    p.add_argument("--temperature", type=float, default=1.0, help="of the rollouts")
    p.add_argument("--sequential", action="store_true", help="the twin SR: sequential rollouts, causal mask, same updates")
    p.add_argument("--group-std", action="store_true", help="ablation: the standard deviation of each group, as in GRPO")
    p.add_argument("--schema-filter", action="store_true", help="as in the paper: drop malformed and truncated rollouts, which here score -1")
    p.add_argument("--clip-updates", type=int, default=0, help="ablation: so many PPO updates per batch, clipped, instead of one")
    p.add_argument("--count-forced", action="store_true", help="ablation: forced tokens carry loss like sampled ones")
    p.add_argument("--micro-tokens", type=int, default=0, help="padded tokens per forward pass; 0: 16,384 on a GPU, 2,048 on a CPU")
    p.add_argument("--recompute", action="store_true", help="compute activations anew for backward: a third slower, far less memory")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; auto: what config.json says")
    p.add_argument("--save-every", type=int, default=10, help="steps between resume points, and between episode dumps")
    p.add_argument("--seed", type=int, default=0, help="seed of problems and sampling")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ..")
    return p.parse_args(argv)


def main():
    args = parse_args()
    if args.count_forced and args.clip_updates:
        raise UserError("--count-forced with --clip-updates: a forced token was not sampled, so it has no old probability; give one of them")
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or (16_384 if device.type == "cuda" else 2_048)  # more outgrow a CPU's caches: 2.4x slower
    print_inherited(args.init)
    model, tokenizer = load(args.init, device, getattr(torch, args.dtype, None))
    data = read_problems(args.data, args.question_column, args.answer_column) if args.data else None
    format_prompt = read_prompt(args.prompt_file, args.data)
    run, engine = Run(args), Engine(model, tokenizer)
    optimizers = make_optimizers(model, args.lr, args.muon_lr, gain_factor=args.gain_factor)
    if args.recompute:
        recompute_activations(model)
    first = run.start(model, optimizers)

    bar = tqdm(range(first + 1, args.steps + 1), initial=first, total=args.steps, desc="stage 3", mininterval=0)
    for step in bar:
        began = time.time()

        # ---- rollout and reward: what is malformed or truncated scores -1, or is dropped (--schema-filter) ----
        problems = my_share(draw_problems(data, args.kind, args.prompts, f"{args.seed}/{step}"))
        prompts = [prompt_ids(tokenizer, p.question, format_prompt) for p in problems]
        responses = engine.generate(
            prompts, n=args.group_size, parallel=not args.sequential, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=hash((args.seed, step)) & 0xFFFFFFFF, max_branches=args.max_branches,
        )  # fmt: skip
        drawn = []
        for problem, prompt, rollouts in zip(problems, prompts, responses):
            rewards, verdicts = [], []
            for rollout in rollouts:
                text = response_text(tokenizer, rollout.ids)
                valid = rollout.finish_reason == "stop" and format_score(text) == 0
                right = problem.verify(text)
                R = 1.0 if right and valid else -1.0
                rewards.append(R)
                verdicts.append((valid, right, R, len(rollout.ids), rollout.critical_path, rollout.max_branches, problem.question, text))
            drawn.append((prompt, rollouts, rewards, verdicts))
        batch, judged = [], []  # batch: (group, prompt, rollout, reward)
        for g, (prompt, rollouts, rewards, verdicts) in enumerate(from_all_ranks(drawn)):
            judged += verdicts
            batch += [(g, prompt, r, R) for r, R, (valid, *_) in zip(rollouts, rewards, verdicts) if valid or not args.schema_filter]
        rollout_seconds = time.time() - began
        valid, accuracy, reward, length, path, plans = (float(np.mean([j[i] for j in judged])) for i in range(6))

        # ---- advantage, loss, step ----
        set_lr(optimizers, min(1.0, step / 5, 4 * (args.steps + 1 - step) / args.steps))  # the fall at the end averages noise out
        loss = entropy = norm = gap = 0.0
        groups, rewards = [g for g, *_ in batch], [R for *_, R in batch]
        advantages = (dapo_advantages if args.group_std else papo_advantages)(rewards, groups) if batch else torch.zeros(0)
        acted = [[args.count_forced or not f for f in r.forced] for _, _, r, _ in batch]
        num_tokens = max(1, sum(map(sum, acted)))
        # a group of equal rewards has no gradient: its tokens count, and are not computed
        learned, advantages = [i for i, A in enumerate(advantages) if A != 0], advantages.to(device)
        sequences = [Sequence(prompt, r.ids, None if args.sequential else r.layout) for _, prompt, r, _ in (batch[i] for i in learned)]
        num_learned = max(1, sum(sum(acted[i]) for i in learned))
        for _ in range(args.clip_updates or 1):
            for rows, ids, laid, mask in batches(sequences, args.micro_tokens, device, share=ranks()):
                rows = [learned[i] for i in rows]
                old = torch.zeros(ids.shape, device=device)
                old[mask] = torch.tensor([x for i in rows for x in batch[i][2].logprobs], device=device)
                mask[mask.clone()] = torch.tensor([x for i in rows for x in acted[i]], device=device)
                logprobs, H = token_logprobs(model, ids, laid)  # (B, T) each
                if args.clip_updates:
                    part = dapo_loss(logprobs, old, advantages[rows], mask, 0.2, 0.2, num_tokens)
                else:
                    part = papo_loss(logprobs, advantages[rows], mask, num_tokens)
                part.backward()
                sampled = mask & (old != 0)  # the engine reports 0 for what it forced
                gap = max(gap, ((logprobs.detach() - old) * sampled).abs().max().item())  # rollout against training forward
                entropy += H[mask].sum().item() / num_learned / (args.clip_updates or 1)
                loss += part.item() / (args.clip_updates or 1)
            norm = update(model, optimizers) if learned else 0.0
        losses, entropies, gaps = zip(*from_all_ranks([(loss, entropy, gap)]))
        loss, entropy, gap = sum(losses), sum(entropies), max(gaps)

        # ---- log and save ----
        run.log(
            step=step, loss=loss, reward=reward, valid=valid, accuracy=accuracy, length=length, critical_path=path, plans=plans,
            entropy=entropy, logprob_gap=gap, grad_norm=norm, used=len(batch), sampled=len(judged),
            tokens_per_second=sum(j[3] for j in judged) / rollout_seconds, rollout_seconds=rollout_seconds,
            step_seconds=time.time() - began,
        )  # fmt: skip
        bar.set_postfix(acc=f"{accuracy:.0%}", valid=f"{valid:.0%}", len=f"{length:.0f}", path=f"{path:.0f}", ent=f"{entropy:.2f}")
        if step % args.save_every == 0 or step == 1:
            run.episodes(step, [(j[6], j[7], f"valid {j[0]}, right {j[1]}, R {j[2]:.0f}") for j in judged])
        if step % args.save_every == 0:
            run.checkpoint(model, optimizers, step)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_main(main)

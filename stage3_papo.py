r"""Stage 3, NPR: optimise the branching policy with PAPO, on rollouts of the parallel engine.

In : out/stage2, which decodes in parallel.      Out: out/stage3/, a native parallel reasoner.

R_i = +1 right, -1 wrong, -2 not valid,          A_i = (R_i - mean_G) / (std_batch + eps)
L = -(1 / sum_i |y_i|) sum_i sum_t [pi(y_it) / stopgrad(pi(y_it))] A_i

    python stage3_papo.py                         # reads out/stage2, writes out/stage3
    python stage3_papo.py --sequential --init out/stage2_seq --out out/stage3_seq    # the twin SR
    make diff                                     # what differs from stage 1's loop, line by line

Differences from GRPO, PAPO's four:
1. rollouts by the parallel engine, which forks and joins;
2. malformed and truncated rollouts are dropped, so that the reward is accuracy alone (off here:
   --schema-filter);
3. the standard deviation is the whole batch's, not the group's;
4. strictly on-policy: one update per batch, no ratio and no clip.
The others are taken away by a flag each: --sequential, --group-std, --clip-updates.
Differences from the paper:
1. the schema filter is off, and what it would drop scores -2: with it, nothing holds the format
   once answers grow longer;
2. forced tokens are not actions and carry no loss (--count-forced counts them);
3. the scale of the logits learns faster than the matrices, the one direction in which small batches
   agree (--gain-factor 1: all alike).
"""

import random
import time
from statistics import fmean

import torch
from tqdm import tqdm

from engine import Engine, batches, tag_token_ids, token_logprobs
from stage0_model import KIND_CHOICES, draw_problems, read_problems, read_prompt  # questions
from stage0_model import load, print_inherited, prompt_ids, response_text  # the model to start from
from stage0_model import add_adapters, default_micro_tokens, make_optimizers  # optimisation
from stage0_model import recompute_activations, set_lr, update
from stage0_model import DTYPES, RUN_FLAGS, device_name, group_int, natural_int, nonempty  # flags
from stage0_model import not_negative, positive_float, positive_int, seed_int
from stage0_model import Run, UserError, from_all_ranks, my_share, pick_device, ranks  # the run
from stage0_model import read_arguments, run_main
from stage1_zero import Judged, averages, batch_of, check_prompts, dapo_advantages, dapo_loss, format_score

# ==================================================================================================
# 1. PAPO
# ==================================================================================================


def papo_advantages(rewards, group_ids, eps=1e-6):
    """A_i = (R_i - mean_G) / (std_batch + eps).

    std_batch: population std over all responses of the step that are learned from, of all
    questions together.  A nearly solved group has a small std of its own, and dividing by that
    would blow up its one failure.  rewards (B,), group_ids (B,) -> (B,).

    rewards [1, 1, 1, -1], groups [0, 0, 1, 1] -> means 1 and 0, std 0.866 -> [0, 0, 1.15, -1.15]
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    group_ids = torch.as_tensor(group_ids)
    centred = torch.zeros_like(rewards)
    for g in group_ids.unique():
        R = rewards[group_ids == g]  # (G,)
        centred[group_ids == g] = R - R.mean()
    return centred / (rewards.std(correction=0) + eps)


def papo_loss(logprobs, advantages, mask, num_tokens=None):
    """-(1 / num_tokens) sum of [pi / stopgrad(pi)] A over masked tokens.

    The ratio's value is 1 and its gradient is that of log pi: REINFORCE with a group baseline.
    logprobs, mask (B, T), advantages (B,) -> scalar.  num_tokens: what the sum is divided by, by
    default the tokens of this mask; a micro-batch gives the token count of its whole batch.
    """
    ratio = (logprobs - logprobs.detach()).exp()  # (B, T), all ones
    return -(ratio * advantages[:, None] * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


def objective(groups, args):
    """What is optimised on some groups of Judged: a Batch, and its loss.  PAPO, or an ablation."""
    judged = [j for group in groups for j in group]
    group_ids = [g for g, group in enumerate(groups) for _ in group]
    take_advantages = dapo_advantages if args.group_std else papo_advantages
    advantages = take_advantages([j.reward for j in judged], group_ids)
    actions = [[args.count_forced or not forced for forced in j.rollout.forced] for j in judged]

    def loss(logprobs, old_logprobs, advantages, mask, num_tokens):
        if args.clip_updates:
            return dapo_loss(logprobs, old_logprobs, advantages, mask, 0.2, 0.2, num_tokens)
        return papo_loss(logprobs, advantages, mask, num_tokens)

    return batch_of(judged, advantages, actions), loss


def shares_of(groups, args):
    """The groups of each update.

    PAPO makes one update of all of them, so the policy that learns is the one that sampled: no
    ratio, no clip, and no token's gradient is cut off, a tag's least of all.
    """
    return [groups] * (args.clip_updates or 1)


# ==================================================================================================
# 2. Rollout and reward
# ==================================================================================================


def reward_of(text, valid, right, args):
    """R of one response: +1 if it is right, -1 if it is wrong, -2 if it is malformed or truncated,
    which costs more than a wrong answer, so that a search that leads nowhere is worth ending.
    """
    if args.reward == "random":  # a coin for every text, whatever its format
        return random.Random(f"{args.seed}/{text}").choice([1.0, -1.0])
    if not valid:
        return -2.0
    return 1.0 if right or args.reward == "format" else -1.0


def judge(problem, prompt, rollout, tokenizer, args):
    """A response and its reward; what is not valid scores -2, or is dropped (--schema-filter)."""
    text = response_text(tokenizer, rollout.ids)
    valid = rollout.finish_reason == "stop" and format_score(text) == 0
    right = problem.verify(text)
    return Judged(prompt, problem.question, rollout, text, valid, right, reward_of(text, valid, right, args))


def pay_for_short_paths(group, weight):
    """Add weight (1 - critical path / longest one) to the reward of each right answer to one
    question, where the longest is of the right ones too.  Returns the group.

    The answer that was waited for longest earns nothing more, one that took half as long half the
    weight.  Paid for the ratio of tokens to path instead, a model repeats itself: that too makes
    many tokens of which few are waited for (docs/log.md).
    """
    right = [j for j in group if j.valid and j.right]
    longest = max((j.rollout.critical_path for j in right), default=0)
    for j in right:
        j.reward += weight * (1 - j.rollout.critical_path / longest)
    return group


def sample_groups(engine, data, format_prompt, step, args):
    """Groups to learn from, lists of up to G Judged, and all that were sampled (as one list).

    Every rank decodes its share of the questions and gets all groups.
    """
    problems = my_share(draw_problems(data, args.kind, args.prompts, f"{args.seed}/{step}"))
    prompts = [prompt_ids(engine.tokenizer, p.question, format_prompt) for p in problems]

    # In parallel: a closed guideline forks the request, and the engine says what it forced.
    responses = engine.generate(
        prompts,
        n=args.group_size,
        copies=[p.copy for p in problems],
        parallel=not args.sequential,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=hash((args.seed, step)) & 0xFFFFFFFF,
        max_branches=args.max_branches,
    )

    # The reward of each response, by its text and by how it ended.
    drawn = []
    for problem, prompt, rollouts in zip(problems, prompts, responses):
        group = [judge(problem, prompt, r, engine.tokenizer, args) for r in rollouts]
        drawn.append(pay_for_short_paths(group, args.path_weight))

    # What is malformed or truncated has scored -2; the paper's schema filter leaves it out.
    groups = []
    judged = []
    for group in from_all_ranks(drawn):
        judged += group
        groups.append([j for j in group if j.valid or not args.schema_filter])
    return groups, judged


# ==================================================================================================
# 3. The loop
# ==================================================================================================


REWARDS = ("answer", "format", "random")

# fmt: off
ARGUMENTS = (
    ("--init",             nonempty,       "out/stage2", "checkpoint to start from: folder or hub name"),
    ("--out",              nonempty,       "out/stage3", "folder to write the checkpoint to"),
    ("--kind",             KIND_CHOICES,   "all",        "problems to train on"),
    ("--data",             str,            "",           "real problems: a json, jsonl or parquet file, a folder of `datasets`, or a hub name"),
    ("--question-column",  str,            "",           "column of --data with the question, found by its name when not given"),
    ("--answer-column",    str,            "",           "column of --data with the answer, found by its name when not given"),
    ("--prompt-file",      str,            "",           "asks for the format; default: that of --init, or with --data assets/format_prompt.txt"),
    ("--steps",            positive_int,   96,           "rollout batches, one update each"),
    ("--prompts",          positive_int,   24,           "questions per step"),
    ("--group-size",       group_int,      12,           "responses per question, G"),
    ("--lr",               positive_float, 1e-4,         "peak AdamW learning rate, falling to zero over the last quarter"),
    ("--muon-lr",          not_negative,   0.0,          "peak Muon learning rate of the matrices; 0: AdamW does it all"),
    ("--gain-factor",      positive_float, 400,          "the scale of the logits (gains of the last norm) learns so many times faster"),
    ("--max-new-tokens",   positive_int,   896,          "response budget in tokens, all branches together"),
    ("--max-branches",     positive_int,   8,            "most plans a guideline may have"),
    ("--temperature",      positive_float, 1.0,          "of the rollouts"),
    ("--path-weight",      not_negative,   0.0,          "w: a right answer earns w (1 - critical path / longest of the right ones) more"),
    ("--reward",           REWARDS,        "answer",     "controls: format pays for the format alone, random for nothing"),
    ("--sequential",       bool,           False,        "the twin SR: sequential rollouts, causal mask, same updates"),
    ("--group-std",        bool,           False,        "ablation: the standard deviation of each group, as in GRPO"),
    ("--schema-filter",    bool,           False,        "as in the paper: drop malformed and truncated rollouts, which here score -2"),
    ("--clip-updates",     natural_int,    0,            "ablation: so many PPO updates per batch, clipped, instead of one"),
    ("--count-forced",     bool,           False,        "ablation: forced tokens carry loss like sampled ones"),
    ("--micro-tokens",     natural_int,    0,            "padded tokens per forward pass; 0: 16,384 on a GPU, 2,048 on a CPU"),
    ("--lora",             natural_int,    0,            "R: train adapters of that rank, at about ten times the rate; 0: all weights"),
    ("--recompute",        bool,           False,        "compute activations anew for backward: a third slower, far less memory"),
    ("--dtype",            DTYPES,         "auto",       "of the weights; auto: what config.json says"),
    ("--save-every",       positive_int,   10,           "steps between resume points, and between episode dumps"),
    ("--seed",             seed_int,       0,            "seed of problems and sampling"),
    ("--device",           device_name,    "auto",       "auto, cpu, cuda, cuda:1 .."),
    *RUN_FLAGS,
)
# fmt: on


def parse_args(argv=None):
    args = read_arguments(__doc__, ARGUMENTS, argv)
    if args.count_forced and args.clip_updates:
        raise UserError(
            "--count-forced with --clip-updates: a forced token was not sampled, so it has no old "
            "probability; give one of them"
        )
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or default_micro_tokens(device)

    # Everything is read before the output folder is touched: a mistake in a flag costs nothing.
    print_inherited(args.init)
    model, tokenizer = load(args.init, device, getattr(torch, args.dtype, None))
    data = read_problems(args.data, args.question_column, args.answer_column) if args.data else None
    format_prompt = read_prompt(args.prompt_file, args.data, args.init)
    if not args.sequential:
        tag_token_ids(tokenizer)  # raises UserError where they are text
    check_prompts(model, tokenizer, data, format_prompt, args.max_new_tokens)
    run = Run(args, model, data=data, prompt_file=format_prompt)

    # One set of weights samples and learns: the engine decodes with the very model that is trained.
    engine = Engine(model, tokenizer)
    if args.lora:
        add_adapters(model, tokenizer, args.lora, args.seed)
    optimizers = make_optimizers(model, args.lr, args.muon_lr, gain_factor=args.gain_factor)
    if args.recompute:
        recompute_activations(model)
    first = run.start(model, optimizers)

    steps = range(first + 1, args.steps + 1)
    bar = tqdm(steps, initial=first, total=args.steps, desc=run.path.name, mininterval=0)
    for step in bar:
        # ---- rollout and reward ----
        # Groups of responses to the same question: what there is to compare, and to learn from.
        began = time.time()
        groups, judged = sample_groups(engine, data, format_prompt, step, args)
        rollout_seconds = time.time() - began

        # The learning rate warms up, stays, and falls over the last quarter, which averages noise
        # out.
        set_lr(optimizers, min(1.0, step / 5, 4 * (args.steps + 1 - step) / args.steps))
        loss = entropy = gap = norm = 0.0

        # An update learns from one share of the groups.
        shares = shares_of(groups, args)
        for share in shares:
            # ---- advantage ----
            # How much better than its group each response did, and what follows for its tokens.
            batch, loss_of = objective(share, args)
            advantages = batch.advantages.to(device)

            # ---- loss ----
            # Micro-batches add their gradients up; each is divided by the token count of the whole.
            micro_batches = batches(batch.examples, args.micro_tokens, device, share=ranks())
            for rows, ids, batch_layout, mask in micro_batches:
                # log-probabilities when sampled; then narrow the mask from responses to actions
                old = torch.zeros(ids.shape, device=device)  # (B, T)
                old[mask] = torch.cat([batch.logprobs[i] for i in rows]).to(device)
                mask[mask.clone()] = torch.cat([batch.actions[i] for i in rows]).to(device)

                # the forward pass that training shares with the engine
                logprobs, token_entropy = token_logprobs(model, ids, batch_layout)  # (B, T) each
                part = loss_of(logprobs, old, advantages[rows], mask, batch.num_tokens)
                part.backward()

                # What tells a healthy run from a sick one, for the log: above all, whether the
                # rollout's probabilities are the training forward's.  The engine reports 0 for what
                # it forced.
                difference = (logprobs.detach() - old) * (mask & (old != 0))
                gap = max(gap, difference.abs().max().item())

                # means over the whole batch, summed over micro-batches
                entropy += token_entropy[mask].sum().item() / batch.num_learned / len(shares)
                loss += part.item() / len(shares)

            # ---- step ----
            # The gradients of all ranks together, clipped to norm 1.
            if batch.examples:
                norm += update(model, optimizers) / len(shares)

        # ---- log ----
        # What each rank added up, and how the policy does.
        loss, entropy = map(sum, zip(*from_all_ranks([(loss, entropy)])))
        gap = max(from_all_ranks([gap]))
        means = averages(judged)
        row = {
            "step": step,
            "loss": loss,
            **means,
            # most plans of a block: how wide the policy thinks
            "plans": fmean(j.rollout.max_branches for j in judged),
            "entropy": entropy,  # of the policy, mean over the tokens learned from
            "logprob_gap": gap,  # rollout against training forward
            "grad_norm": norm,
            "used": sum(map(len, groups)),
            "sampled": len(judged),
            "tokens_per_second": means["length"] * len(judged) / rollout_seconds,
            "rollout_seconds": rollout_seconds,
            "step_seconds": time.time() - began,
        }
        run.log(**row)
        shown = ("reward", "valid", "accuracy", "length", "critical_path", "entropy")
        bar.set_postfix({key: f"{row[key]:.3g}" for key in shown})

        # ---- save ----
        # Whole responses to read, and a state from which a killed run goes on.
        if step % args.save_every == 0 or step == 1:
            run.episodes(step, [j.episode for j in judged])
        run.end_step(model, optimizers, step)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_main(main)

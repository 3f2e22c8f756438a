r"""Stage 1, NPR-ZERO: find the parallel format by reinforcement learning, decoding sequentially.

In : out/stage0, or --init your model.   Out: out/stage1/, a model that writes the format by itself.

For every question the policy writes G responses.  The reward of a response is its format score
until the format is perfect, then +1 for a right answer and -1 for a wrong one:
R = F if F < 0 else +1 / -1.  Its advantage is how far R lies from the group's mean,
A_i = (R_i - mean_G) / (std_G + eps), the same for all of its tokens, in PPO's clipped loss with
r_it = pi(y_it) / pi_old(y_it):
L = -(1 / sum_i |y_i|) sum_i sum_t min(r_it A_i, clip(r_it, 1 - 0.2, 1 + 0.28) A_i)

    python stage1_zero.py                         # reads out/stage0, writes out/stage1
    python stage1_zero.py --init Qwen/Qwen3-4B-Instruct-2507 --data orz_math_57k_collected.json \
        --lr 1e-6
    torchrun --nproc-per-node 2 stage1_zero.py    # data-parallel: same numbers, less time

Difference from the paper:
1. Its violations score between -2 and 0.  Here all score below -1, the reward of a wrong answer:
   otherwise a model that expects to be wrong would earn more by breaking the format.
Differences from the PPO of RLHF, the first GRPO's, the rest DAPO's (arXiv 2503.14476):
1. no critic: a response is compared with its group;
2. the upper clip is wider than the lower, so that rare tokens can grow;
3. groups whose rewards are all equal teach nothing: they are dropped and replaced;
4. every token weighs the same, in a short response and in a long one;
5. a soft penalty for overlong responses;
6. no KL term.
"""

import re
import time
from dataclasses import dataclass, field
from statistics import fmean

import torch
from tqdm import tqdm

from engine import MAX_KV_TOKENS, MAX_LOGITS, Engine, Example, Rollout, batches, planned_kv_tokens
from engine import token_logprobs
from stage0_model import ANY_TAG, KIND_CHOICES, draw_problems, read_problems, read_prompt  # questions
from stage0_model import load, print_inherited, prompt_ids, response_text  # the model to start from
from stage0_model import Qwen3, checkpoint_folder, num_trained, projections, read_config  # its memory
from stage0_model import add_adapters, default_micro_tokens, make_optimizers  # optimisation
from stage0_model import recompute_activations, set_lr, update
from stage0_model import DTYPES, RUN_FLAGS, device_name, fraction, group_int, natural_int, nonempty  # flags
from stage0_model import not_negative, positive_float, positive_int, seed_int
from stage0_model import Run, UserError, from_all_ranks, my_share, pick_device, ranks  # the run
from stage0_model import read_arguments, run_main

# ==================================================================================================
# 1. The format reward
# ==================================================================================================

# Every violation and its score.  A response scores as its worst violation does, and all of them lie
# below -1, the reward of a wrong answer.
VIOLATIONS = {
    "no block": -2.0,  # not a single guideline
    "overlapping tags": -2.0,  # opened inside another (plans in a guideline are right), or closed unopened
    "block out of order": -1.8,  # not guideline, steps, takeaway, in this order
    "counts differ": -1.6,  # a block's steps are not one per plan
    "numbering": -1.5,  # plans or steps are not 1, 2, .. k
    "no answer": -1.4,  # not exactly one \boxed{}, after the last block
    "text between tags": -1.2,  # only white space may stand between the tags of the skeleton
    "nearly empty": -1.1,  # a plan or takeaway of nothing, a step of fewer than 3 characters
}


@dataclass
class Response:
    """What a response's text is made of."""

    blocks: list = field(default_factory=list)  # (plans, steps, takeaway) of each, without tags and numbers
    final: str = ""  # the text after the last block
    violations: list = field(default_factory=list)  # keys of VIOLATIONS, worst first


def read_elements(text):
    """A response's top-level elements, (name, [contents]) each, and what is wrong with them.

    A guideline's contents are its plans, any other element has one.  Also returns the text at the
    end.

    '<guideline><plan>1:A</plan></guideline><step>1:x</step> y' ->
    [('guideline', ['1:A']), ('step', ['1:x'])], set(), ' y'
    """
    pieces = ANY_TAG.split(text)  # piece 0, tag 0, piece 1, tag 1, .. piece n
    tags = ANY_TAG.findall(text)
    elements = []
    violations = set()
    opened = []  # names of the tags that are open, outermost first
    plans = []  # of the guideline that is open

    for piece, tag in zip(pieces, tags):
        name = tag.strip("</>")
        inside = opened[-1] if opened else None
        # Outside every element, and between the plans of a guideline, only white space may stand.
        if inside in (None, "guideline") and piece.strip():
            violations.add("text between tags")

        if not tag.startswith("</"):
            # Plans open inside a guideline, everything else at the top level.
            if inside != ("guideline" if name == "plan" else None):
                violations.add("overlapping tags")
            opened.append(name)
            if name == "guideline":
                plans = []
        elif inside != name:
            violations.add("overlapping tags")
        else:
            # A closing tag that fits: what stands before it is the element's content.
            opened.pop()
            if name == "plan" and opened == ["guideline"]:
                plans.append(piece)
            else:
                elements.append((name, plans if name == "guideline" else [piece]))

    if opened:
        violations.add("overlapping tags")
    return elements, violations, pieces[-1]


def without_numbers(contents):
    """Contents of plans or steps without their numbers, and whether those were 1, 2, .. in order.

    ['1:A', '2: B'] -> ['A', 'B'], True        ['2:A'] -> ['A'], False        ['A'] -> ['A'], False
    """
    numbered = [re.fullmatch(r"\s*([0-9]+):(.*)", content, re.S) for content in contents]
    bare = [(match[2] if match else content).strip() for match, content in zip(numbered, contents)]

    # compared as text: int() refuses very long numbers
    numbers = [match[1].lstrip("0") if match else None for match in numbered]
    return bare, numbers == [str(i) for i in range(1, len(contents) + 1)]


def parse_response(text):
    r"""Read a response strictly; never raises.

    '<guideline><plan>1:A</plan></guideline><step>1:A7+2=9</step><takeaway>9</takeaway>\boxed{9}' ->
    Response(blocks=[(['A'], ['A7+2=9'], '9')], final='\\boxed{9}', violations=[])
    """
    elements, violations, final = read_elements(text)
    blocks = []

    # The order of elements as one letter each: a response is right when it reads gsst, gst,
    # gssstgst .. (guideline, steps, takeaway, again and again).  A stray plan's p fits nowhere.
    order = "".join(name[0] for name, _ in elements)
    if "<guideline>" not in text:
        violations.add("no block")
    elif not re.fullmatch("(gs+t)+", order):
        violations.add("block out of order")

    # Block by block: are there as many steps as plans, and do both count 1, 2, ..?
    for match in re.finditer("g(s*)(t?)", order):
        plans = elements[match.start()][1]
        steps = [contents[0] for _, contents in elements[match.start(1) : match.end(1)]]
        takeaway = elements[match.start(2)][1][0] if match[2] else ""
        if len(plans) != len(steps) or not plans:
            violations.add("counts differ")

        plans, plans_in_order = without_numbers(plans)
        steps, steps_in_order = without_numbers(steps)
        if not (plans_in_order and steps_in_order):
            violations.add("numbering")

        # An empty shell would earn the format's reward without any thought in it.
        empty = not all(plans) or any(len(step) < 3 for step in steps)
        if empty or (match[2] and not takeaway.strip()):
            violations.add("nearly empty")
        blocks.append((plans, steps, takeaway))

    if text.count("\\boxed{") != 1 or not re.search(r"\\boxed\{.+\}", final):
        violations.add("no answer")
    return Response(blocks, final, sorted(violations, key=list(VIOLATIONS).index))


def format_score(text):
    """F: 0.0 for the perfect format, else the score of the worst violation, in [-2, -1.1]."""
    violations = parse_response(text).violations
    return VIOLATIONS[violations[0]] if violations else 0.0


def overlong_penalty(num_tokens, max_new_tokens, buffer):
    """DAPO eq. 13: 0 up to max_new_tokens - buffer, then linearly down to -1 at max_new_tokens.

    (80, 100, 20) -> 0.0, (90, 100, 20) -> -0.5, (100, 100, 20) -> -1.0
    """
    return -min(1.0, max(0.0, (num_tokens - (max_new_tokens - buffer)) / buffer))


# ==================================================================================================
# 2. DAPO
# ==================================================================================================


@dataclass
class Judged:
    """One response to one question, and what it earned."""

    prompt: list  # token ids
    question: str
    rollout: Rollout
    text: str
    valid: bool  # perfect format
    right: bool  # verified answer
    reward: float  # R
    penalty: float = 0.0  # for being overlong, added to R before advantages are taken

    @property
    def episode(self):
        """(question, response, verdict), as a reader wants to see it."""
        return self.question, self.text, f"valid {self.valid}, right {self.right}, R {self.reward:.1f}"


def dapo_advantages(rewards, group_ids, eps=1e-6):
    """A_i = (R_i - mean_G) / (std_G + eps), population std within each group (DAPO eq. 9).

    rewards (B,), group_ids (B,) -> (B,).

    rewards [1, -1, -1, -1], one group -> mean -0.5, std 0.866 -> [1.73, -0.58, -0.58, -0.58]
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    group_ids = torch.as_tensor(group_ids)
    advantages = torch.zeros_like(rewards)
    for g in group_ids.unique():
        R = rewards[group_ids == g]  # (G,)
        advantages[group_ids == g] = (R - R.mean()) / (R.std(correction=0) + eps)
    return advantages


def dapo_loss(logprobs, old_logprobs, advantages, mask, eps_low=0.2, eps_high=0.28, num_tokens=None):
    """Clipped surrogate, averaged over tokens (DAPO eq. 8).

    logprobs, old_logprobs, mask (B, T), advantages (B,) -> scalar.  num_tokens: what the sum is
    divided by; a micro-batch gives the token count of its whole batch, the default is its own.

    A = +1: a ratio of 1.5 counts as 1.28 and has no gradient.  A = -1: one of 0.5 as 0.8, likewise.
    """
    ratio = (logprobs - old_logprobs).exp()  # (B, T)
    A = advantages[:, None]  # (B, 1)
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)  # (B, T)
    return -(surrogate * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


@dataclass
class Batch:
    """What one update learns from: the responses that have a gradient, B of them."""

    examples: list  # of Example
    logprobs: list  # of tensors (n,): log-probability of each token when it was sampled
    actions: list  # of tensors (n,): True where a token was chosen by the policy, and carries loss
    advantages: torch.Tensor  # (B,)
    num_tokens: int  # actions of all responses, those without a gradient included
    num_learned: int  # actions of these responses


def batch_of(judged, advantages, actions):
    """The Batch of some Judged, their advantages (B,), and for each a list of bools: its actions.

    A response with A = 0 has no gradient: it skips the forward pass, but counts in num_tokens.
    """
    kept = advantages.nonzero()[:, 0].tolist()
    rollouts = [judged[i].rollout for i in kept]
    return Batch(
        examples=[Example(judged[i].prompt, r.ids, r.layout) for i, r in zip(kept, rollouts)],
        logprobs=[torch.tensor(r.logprobs) for r in rollouts],
        actions=[torch.tensor(actions[i]) for i in kept],
        advantages=advantages[kept],
        num_tokens=sum(map(sum, actions)),
        num_learned=sum(sum(actions[i]) for i in kept),
    )


def objective(groups, args):
    """What is optimised on some groups of Judged: a Batch, and its loss."""
    judged = [j for group in groups for j in group]
    group_ids = [g for g, group in enumerate(groups) for _ in group]
    advantages = dapo_advantages([j.reward + j.penalty for j in judged], group_ids)
    actions = [[True] * len(j.rollout.ids) for j in judged]  # sequentially every token is sampled

    def loss(logprobs, old_logprobs, advantages, mask, num_tokens):
        return dapo_loss(logprobs, old_logprobs, advantages, mask, args.eps_low, args.eps_high, num_tokens)

    return batch_of(judged, advantages, actions), loss


def shares_of(groups, args):
    """The groups of each update.

    DAPO makes several updates of a step's groups, each on its share; after the first the policy is
    no longer the one that sampled, which is what the ratio and its clip are for.
    """
    return [share for u in range(args.updates) if (share := groups[u :: args.updates])]


# ==================================================================================================
# 3. Rollout and reward
# ==================================================================================================


def judge(problem, prompt, rollout, tokenizer, args):
    """R = F if the format is violated, else +1 for a right answer and -1 for a wrong one."""
    text = response_text(tokenizer, rollout.ids)
    F = format_score(text)
    right = problem.verify(text)
    R = F
    if F == 0:
        R = 1.0 if right else -1.0
    penalty = overlong_penalty(len(rollout.ids), args.max_new_tokens, args.overlong_buffer)
    return Judged(prompt, problem.question, rollout, text, F == 0, right, R, penalty)


def sample_groups(engine, data, format_prompt, step, args):
    """Groups to learn from, lists of G Judged, and all that were sampled on the way (as one list).

    Dynamic sampling (DAPO section 3.2): rounds of rollouts until enough groups have something to
    tell apart, at most --max-rounds.  Every rank decodes its share of the questions and gets all
    groups.
    """
    groups = []
    judged = []
    for draw in range(args.max_rounds):
        # The questions of a draw are the same on every rank; each takes a slice of them.
        wanted = args.prompts - len(groups)
        problems = my_share(draw_problems(data, args.kind, wanted, f"{args.seed}/{step}/{draw}"))
        prompts = [prompt_ids(engine.tokenizer, p.question, format_prompt) for p in problems]

        # Sequentially: to this stage a tag is a word like any other.
        responses = engine.generate(
            prompts,
            n=args.group_size,
            copies=[p.copy for p in problems],
            parallel=False,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=hash((args.seed, step, draw)) & 0xFFFFFFFF,
        )

        # The reward of each response, by its text; and what its length costs.
        drawn = []
        for problem, prompt, rollouts in zip(problems, prompts, responses):
            drawn.append([judge(problem, prompt, r, engine.tokenizer, args) for r in rollouts])

        # A group in which all do equally well, or equally badly, has no gradient: draw another
        # question.
        for group in from_all_ranks(drawn):
            judged += group
            rewards = [j.reward + j.penalty for j in group]
            if max(rewards) - min(rewards) > 1e-6:
                groups.append(group)
        if len(groups) == args.prompts:
            break
    return groups, judged


def check_prompts(model, tokenizer, data, format_prompt, max_new_tokens):
    """Raise UserError where a prompt and its response will not fit the engine's memory."""
    room = planned_kv_tokens(model) - max_new_tokens
    around = len(prompt_ids(tokenizer, "", format_prompt))

    # a token has a byte at least, so that few questions, or none, have to be encoded
    for number, question in enumerate([p.question for p in data or ()] or [""]):
        if around + len(question.encode(errors="replace")) > room:
            length = len(prompt_ids(tokenizer, question, format_prompt))
            if length > room:
                raise UserError(
                    f"the prompt of question {number} has {length} tokens, which with --max-new-tokens "
                    f"{max_new_tokens} exceed the KV budget of {room + max_new_tokens} tokens; shorten them"
                )


def averages(judged):
    """How the policy does: means over all that was sampled, what was dropped included."""
    return {
        "reward": fmean(j.reward for j in judged),
        "valid": fmean(j.valid for j in judged),
        "accuracy": fmean(j.right for j in judged),
        "length": fmean(len(j.rollout.ids) for j in judged),  # tokens
        "critical_path": fmean(j.rollout.critical_path for j in judged),
    }


# ==================================================================================================
# 4. What a run needs
# ==================================================================================================


def memory(config, value, R, num_ranks, args):
    """{part: bytes} of a run's peak on each GPU, without what torch takes for itself.

    value: bytes of a weight, 2 or 4.  R: rank of the adapters, 0 for none.
    """
    with torch.device("meta"):  # a model without numbers
        model = Qwen3(config)
    size = sum(p.numel() for p in model.parameters())
    inside = [p.numel() for _, p in projections(model)]
    T = num_trained(model, R)

    # What a layer keeps of a token for backward: inputs of norms, in fp32, of projections, and of
    # attention.  With --recompute all layers but one keep their input alone.
    C = config.hidden_size
    q_width = config.num_attention_heads * config.head_dim
    layer = 16 * C + value * (3 * C + 4 * q_width + 4 * config.intermediate_size)
    layers = config.num_hidden_layers * (value * C if args.recompute else layer)
    tokens = args.micro_tokens or 16_384
    logits = 4 * min(MAX_LOGITS, tokens * config.vocab_size)
    at_work = tokens * (layers + args.recompute * layer) + 3 * logits

    # Adam's step makes a copy of its second moment, when no activations are there any more.
    parts = {
        "weights": value * size,
        "the base beside merged weights": value * sum(inside) if R else 0,
        "masters or adapters, fp32": 4 * T if R or value == 2 else 0,
        "gradients, fp32": 4 * T + (8 * max(inside) if R else 0),
        "Adam's moments, fp32": 8 * T / num_ranks,
        "activations, logits; or Adam's step": max(at_work, 4 * T / num_ranks),
    }

    # The engine takes a quarter of what the weights leave free, and training has to do with the
    # rest; the smallest GPU on which it does gives the engine a third of that.
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of a token
    parts["the engine's keys and values"] = min(
        MAX_KV_TOKENS * value * numbers, (sum(parts.values()) - parts["weights"]) / 3
    )
    return parts


def print_plan(args):
    """Tell what a run with these flags needs, from the checkpoint's config.json alone."""
    config, stored = read_config(checkpoint_folder(args.init, ["config.json"]))
    value = 2 if "bfloat16" in (args.dtype, args.dtype == "auto" and stored) else 4
    R = args.lora or 16
    plans = {
        f"{what}, {n} GPU{'s' * (n > 1)}": memory(config, value, rank, n, args)
        for what, rank in (("all weights", 0), (f"--lora {R}", R))
        for n in (1, 8)
    }

    # a row for each part, a column for each plan
    print(f"{'GB on each GPU':38}" + "".join(f"{name:>22}" for name in plans))
    for plan in plans.values():
        plan["a GPU with at least"] = sum(plan.values())
    for part in plan:
        print(f"{part:38}" + "".join(f"{plan[part] / 1e9:22.2f}" for plan in plans.values()))


# ==================================================================================================
# 5. The loop
# ==================================================================================================


# fmt: off
ARGUMENTS = (
    ("--init",            nonempty,       "out/stage0", "checkpoint to start from: folder or hub name"),
    ("--out",             nonempty,       "out/stage1", "folder to write the checkpoint to"),
    ("--kind",            KIND_CHOICES,   "all",        "problems to train on"),
    ("--data",            str,            "",           "real problems: a json, jsonl or parquet file, a folder of `datasets`, or a hub name"),
    ("--question-column", str,            "",           "column of --data with the question, found by its name when not given"),
    ("--answer-column",   str,            "",           "column of --data with the answer, found by its name when not given"),
    ("--prompt-file",     str,            "",           "asks for the format; default: that of --init, or with --data assets/format_prompt.txt"),
    ("--steps",           positive_int,   48,           "rollout batches"),
    ("--prompts",         positive_int,   16,           "questions per step"),
    ("--group-size",      group_int,      12,           "responses per question, G"),
    ("--updates",         positive_int,   4,            "optimizer updates per step, each on its share of the groups"),
    ("--lr",              positive_float, 1e-4,         "peak AdamW learning rate, falling to zero over the last quarter"),
    ("--eps-low",         fraction,       0.2,          "lower clip of the ratio"),
    ("--eps-high",        not_negative,   0.28,         "upper clip of the ratio (clip-higher)"),
    ("--max-rounds",      positive_int,   3,            "dynamic sampling: at most this many rollout rounds per step"),
    ("--max-new-tokens",  positive_int,   896,          "response budget in tokens"),
    ("--overlong-buffer", positive_int,   128,          "tokens before the budget over which the overlong penalty grows"),
    ("--temperature",     positive_float, 1.0,          "of the rollouts; 1 keeps the old log-probabilities exact"),
    ("--micro-tokens",    natural_int,    0,            "padded tokens per forward pass; 0: 16,384 on a GPU, 2,048 on a CPU"),
    ("--lora",            natural_int,    0,            "R: train adapters of that rank, at about ten times the rate; 0: all weights"),
    ("--recompute",       bool,           False,        "compute activations anew for backward: a third slower, far less memory"),
    ("--dtype",           DTYPES,         "auto",       "of the weights; auto: what config.json says"),
    ("--save-every",      positive_int,   10,           "steps between resume points, and between episode dumps"),
    ("--seed",            seed_int,       0,            "seed of problems and sampling"),
    ("--device",          device_name,    "auto",       "auto, cpu, cuda, cuda:1 .."),
    ("--plan",            bool,           False,        "only tell how much memory this needs, from config.json alone"),
    *RUN_FLAGS,
)
# fmt: on


def parse_args(argv=None):
    args = read_arguments(__doc__, ARGUMENTS, argv)
    if args.overlong_buffer > args.max_new_tokens:
        raise UserError(
            f"--overlong-buffer {args.overlong_buffer}: expected at most --max-new-tokens, "
            f"{args.max_new_tokens}"
        )
    return args


def main():
    args = parse_args()
    if args.plan:  # which needs no machine that could run it
        return print_plan(args)
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or default_micro_tokens(device)

    # Everything is read before the output folder is touched: a mistake in a flag costs nothing.
    print_inherited(args.init)
    model, tokenizer = load(args.init, device, getattr(torch, args.dtype, None))
    data = read_problems(args.data, args.question_column, args.answer_column) if args.data else None
    format_prompt = read_prompt(args.prompt_file, args.data, args.init)
    check_prompts(model, tokenizer, data, format_prompt, args.max_new_tokens)
    run = Run(args, model, data=data, prompt_file=format_prompt)

    # One set of weights samples and learns: the engine decodes with the very model that is trained.
    engine = Engine(model, tokenizer)
    if args.lora:
        add_adapters(model, tokenizer, args.lora, args.seed)
    optimizers = make_optimizers(model, args.lr)
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
        loss = entropy = clipped = norm = 0.0

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

                # What tells a healthy run from a sick one, for the log.
                ratio = (logprobs.detach() - old).exp()[mask]
                outside = (ratio < 1 - args.eps_low) | (ratio > 1 + args.eps_high)
                clipped += outside.sum().item() / batch.num_learned / len(shares)
                entropy += token_entropy[mask].sum().item() / batch.num_learned / len(shares)
                loss += part.item() / len(shares)

            # ---- step ----
            # The gradients of all ranks together, clipped to norm 1.
            if batch.examples:
                norm += update(model, optimizers) / len(shares)

        # ---- log ----
        # What each rank added up, and how the policy does.
        loss, entropy = map(sum, zip(*from_all_ranks([(loss, entropy)])))
        clipped = sum(from_all_ranks([clipped]))
        means = averages(judged)
        row = {
            "step": step,
            "loss": loss,
            **means,
            "entropy": entropy,  # of the policy, mean over the tokens learned from
            "clipped": clipped,  # share of tokens whose ratio left the clip range (clipfrac)
            "grad_norm": norm,
            "groups_used": len(groups),
            "groups_sampled": len(judged) // args.group_size,
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

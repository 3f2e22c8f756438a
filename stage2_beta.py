r"""Stage 2, NPR-BETA: learn to decode in parallel, from the model's own accepted samples.

In : out/stage1 (samples sequentially, its tags are text).
Out: out/stage2/ (decodes in parallel, its tags are tokens), with what it learned from in data/.

Rejection sampling keeps responses whose answer is right and whose format is perfect; the eight
tags become tokens; then fine-tuning under the layout of engine.py, where the steps of a block share
their positions and cannot see each other:
L = -(1 / num_tokens) sum_t log p(y_t | what the layout lets it see), over tokens the engine samples

    python stage2_beta.py                # reads out/stage1, writes out/stage2
    python stage2_beta.py --sequential --data out/stage2/data --out out/stage2_seq   # twin, SR-BETA
    python stage2_beta.py --start out/stage0             # ZERO is sampled, the base fine-tuned

Differences from the paper:
(1) Tokens that the engine forces (`<step>`, its number, `<takeaway>`) carry no loss in parallel
    mode: they are never sampled, and a branch cannot know its number from what it sees.
Difference from the authors' script:
(1) It fine-tunes the instruction-tuned base on what ZERO wrote; here ZERO itself goes on
    (--start with the base is their way).
"""

import json
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import datasets  # what was accepted is saved as rows that people can look through
import torch
from tokenizers import AddedToken
from tqdm import tqdm

from engine import TAGS, Engine, Example, MalformedTrajectory, batches, layout, tag_token_ids, token_logprobs
from stage0_model import KIND_CHOICES, RUNGS, draw_problems, read_problems, read_prompt, read_rows  # data
from stage0_model import ANY_TAG, load, pick_device, prompt_ids, response_text  # model and text
from stage0_model import DTYPES, RUN_FLAGS, device_name, natural_int, nonempty, not_negative  # flags
from stage0_model import positive_float, positive_int, seed_int
from stage0_model import Run, UserError, from_all_ranks, my_share, print_inherited, read_arguments  # run
from stage0_model import read_jsonl, run_main, write_json, write_text
from stage0_model import add_adapters, default_micro_tokens, make_optimizers, tag_rows  # optimisation
from stage0_model import ranks, recompute_activations, set_lr, update
from stage1_zero import check_prompts, parse_response

# ==================================================================================================
# 1. Rejection sampling
# ==================================================================================================

PART = 512  # samples between two writes: enough to keep the engine busy


def rejection_sample(
    engine,
    problems,
    format_prompt,
    samples,
    keep,
    max_new_tokens,
    temperature,
    seed,
    keep_wrong=False,
    parallel=False,
):
    """Sample every problem; keep at most `keep` distinct responses of each that are right and
    perfectly formatted.  Each rank samples its share of the problems; all get all results.

    Returns (records, reasons).  records: dicts for `datasets` (problem, kind, response, tokens,
    blocks, plans).  reasons: how many samples were accepted, or failed a filter as their first.
    """
    problems = my_share(problems)
    prompts = [prompt_ids(engine.tokenizer, p.question, format_prompt) for p in problems]
    # To stage 1 the tags are ordinary text, which the engine does not act on.  A checkpoint that
    # has them as tokens (BETA, to be fine-tuned on its own samples once more) forks.
    responses = engine.generate(
        prompts,
        n=samples,
        copies=[p.copy for p in problems],
        parallel=parallel,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        progress=True,
    )

    # The paper filters by format and by answer; the last two keep an easy question from filling the
    # data with copies of one response.
    records = []
    reasons = Counter()
    for problem, rollouts in zip(problems, responses):
        kept = {}  # response: its record
        for rollout in rollouts:
            text = response_text(engine.tokenizer, rollout.ids)
            parsed = parse_response(text)
            failures = {
                "truncated": rollout.finish_reason != "stop",
                "format: " + "".join(parsed.violations[:1]): bool(parsed.violations),  # the worst
                "wrong answer": not keep_wrong and not problem.verify(text),
                "duplicate": text in kept,
                "over the cap per problem": len(kept) == keep,
            }
            # The first failure is the reason, so that the reasons add up to what was sampled.
            reason = next((name for name, failed in failures.items() if failed), "accepted")
            reasons[reason] += 1
            # Only the texts are learned; the counts are for people who look into the data.
            if reason == "accepted":
                kept[text] = {
                    "problem": problem.question,
                    "kind": problem.kind,
                    "response": text,
                    "tokens": len(rollout.ids),
                    "blocks": len(parsed.blocks),
                    "plans": sum(len(plans) for plans, _, _ in parsed.blocks),
                }
        records += kept.values()
    return from_all_ranks(records), sum(from_all_ranks([reasons]), Counter())


def read_inputs(args):
    """What --data gives: (samples to learn from or None, problems to sample or None, prompt).

    Raises UserError where samples cannot be learned from.
    """
    rows = read_rows(args.data) if args.data else []
    has_responses = bool(rows) and isinstance(rows[0], dict) and "response" in rows[0]
    made_here = has_responses and rows[0].get("kind") in RUNGS  # samples of this world's problems
    format_prompt = read_prompt(args.prompt_file, args.data and not made_here, args.init)
    if not has_responses:
        columns = (args.question_column, args.answer_column)
        return None, read_problems(args.data, *columns) if args.data else None, format_prompt

    # A row without text, or data without tags, would only be noticed after an hour of training.
    for number, row in enumerate(rows):
        texts = [row.get(column) for column in ("problem", "response")] if isinstance(row, dict) else []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(
                f"{args.data}: row {number} has no text in its columns `problem` and `response`; "
                "expected what stage 2 saves, e.g. out/stage2/data"
            )
    if not any(ANY_TAG.search(row["response"]) for row in rows):
        raise UserError(f"{args.data}: no response has a tag: nothing of the format could be learned")
    return rows, None, format_prompt


def sampled_rows(args, run, model, tokenizer, data, format_prompt):
    """The rows to learn from, sampled once into <out>/data; a run that goes on reads them back.

    Parts that are done are kept in resume/, so that a killed run goes on where it was.  Raises
    UserError when nothing is accepted.
    """
    folder = run.path / "data"
    if "data" in run.present():
        return read_rows(folder)
    if folder.exists():
        raise UserError(f"{folder} was not sampled by this run; give --out another folder")

    # the engine exists for this call, so that training has the memory of its keys and values
    engine = Engine(model, tokenizer)
    problems = draw_problems(data, args.kind, args.problems, f"{args.seed}/rejection")
    kept = run.path / "resume" / "samples.jsonl"
    parts = read_jsonl(kept)
    size = max(1, PART // args.samples)
    from_all_ranks([])  # every rank has read them before rank 0 writes more
    if run.writes and kept.is_file():
        write_text(kept, "".join(json.dumps(part) + "\n" for part in parts))  # without a line cut off
    for first in range(len(parts) * size, len(problems), size):
        records, reasons = rejection_sample(
            engine,
            problems[first : first + size],
            format_prompt,
            args.samples,  # of each problem
            args.keep,
            args.max_new_tokens,
            args.temperature,
            args.seed,
            args.keep_wrong,
            parallel=TAGS[0] in tokenizer.get_vocab() and not args.sequential,
        )
        parts.append({"records": records, "reasons": reasons})
        if run.writes:
            kept.parent.mkdir(exist_ok=True)
            with open(kept, "a", encoding="utf-8") as file:
                file.write(json.dumps(parts[-1]) + "\n")

    # All parts together; their reasons say what stage 1 still gets wrong.
    records = [record for part in parts for record in part["records"]]
    reasons = sum((Counter(part["reasons"]) for part in parts), Counter())
    if not records:
        raise UserError(
            f"none of {reasons.total()} samples was accepted ({dict(reasons)}); train stage 1 for longer"
        )

    # A run killed while it writes must not go on with half of the data: hence the rename.
    if run.writes:
        part = run.path / "data.part"
        shutil.rmtree(part, ignore_errors=True)
        datasets.Dataset.from_list(records).save_to_disk(str(part))
        write_json(run.path / "rejection.json", dict(reasons.most_common()))
        part.rename(folder)
        kept.unlink()
    from_all_ranks([])  # now every rank finds it
    print(f"sampled {reasons.total()}: " + ", ".join(f"{name} {n}" for name, n in reasons.most_common()))

    # Even the run that sampled them reads them back: no resumed run can see anything else.
    return read_rows(folder)


# ==================================================================================================
# 2. Tag tokens
# ==================================================================================================


@torch.no_grad()
def add_tag_tokens(model, tokenizer):
    """Make each of TAGS one token.  Its embedding, and its output row if untied, start as the mean
    over the tokens that it was spelled with: `</plan>` as the mean of `</`, `plan` and `>`.

    Spare embedding rows are used first (Qwen3 has 267 of them); the matrices grow only when they
    must, and never shrink.  A tokenizer that already has the tags is left alone.  Returns the ids
    of the tags that are new.
    """
    vocabulary = tokenizer.get_vocab()
    spelled = {tag: tokenizer.encode(tag, add_special_tokens=False) for tag in TAGS if tag not in vocabulary}
    # Like Qwen3's own <think>: a token, yet not "special", so skip_special_tokens keeps the tags.
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in spelled])

    # A tied model has no lm_head.  Rows that are added start as the mean of all, without a meaning.
    matrices = [m for name, m in model.named_modules() if name in ("model.embed_tokens", "lm_head")]
    for matrix in matrices:
        missing = len(tokenizer) - matrix.weight.shape[0]
        if missing > 0:
            grown = [matrix.weight, matrix.weight.mean(0).expand(missing, -1)]  # (missing, C)
            matrix.weight = torch.nn.Parameter(torch.cat(grown))  # (V, C)
        for tag, ids in spelled.items():
            matrix.weight[tokenizer.convert_tokens_to_ids(tag)] = matrix.weight[ids].mean(0)  # (C,)
    model.config.vocab_size = model.model["embed_tokens"].weight.shape[0]
    return [tokenizer.convert_tokens_to_ids(tag) for tag in spelled]


def encode_response(tokenizer, text, sequential):
    """A response's text -> (ids with end of turn, Layout or None, forced flags).

    forced is True for what the engine writes by itself in parallel mode: of `<step>1:A7+2=9</step>`
    these are `<step>`, `1` and `:`.  Raises MalformedTrajectory for text with broken tags.
    """
    # An instruction-tuned model gives every tag a line of its own, but the engine will write the
    # canonical form: white space between tags, and before a step's number, goes.
    text = re.sub(rf"({ANY_TAG.pattern})\s+(?={ANY_TAG.pattern})|(<step>)\s+(?=\d)", r"\1\2", text)
    if sequential:
        ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        return ids, None, [False] * len(ids)

    # In the engine's own pieces: what opens a step is forced, what follows is sampled.  Encoded as
    # one, real vocabularies would merge the colon with what it stands before (`:$`, `:text`).
    tag_ids = tag_token_ids(tokenizer)
    ids = []
    forced = []
    number_at = {}  # index of a `<step>`: the number that follows
    for piece in re.split(r"(<step>\d+:|<takeaway>)", text):
        piece_ids = tokenizer.encode(piece, add_special_tokens=False)
        opening = re.fullmatch(r"<step>(\d+):|<takeaway>", piece)
        if opening and opening[1]:
            number_at[len(ids)] = int(opening[1])
        ids += piece_ids
        forced += [bool(opening)] * len(piece_ids)
    ids.append(tokenizer.eos_token_id)
    response_layout = layout(ids, tag_ids)

    # the engine numbers steps itself, so no other number can be learned
    for i, number in number_at.items():
        if number != response_layout.branch[i]:
            raise MalformedTrajectory(i, f"step {response_layout.branch[i]} has the number {number}")
    return ids, response_layout, [*forced, False]


# ==================================================================================================
# 3. Parallel fine-tuning
# ==================================================================================================


def epoch_batches(examples, batch_tokens, seed, epoch):
    """The batches of one epoch in random order, each a list of indices into `examples`.

    Similar lengths share a batch, so that little is padding.  Seeded by (seed, epoch), so that a
    resumed run finds the order that it left.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(examples)), len(examples))  # decides between equally long ones
    shuffled = [examples[i] for i in order]
    epoch_order = [[order[i] for i in rows] for rows, *_ in batches(shuffled, batch_tokens)]
    rng.shuffle(epoch_order)
    return epoch_order


# fmt: off
ARGUMENTS = (
    ("--init",            nonempty,       "out/stage1", "checkpoint that is sampled and then fine-tuned: folder or hub name"),
    ("--start",           str,            "",           "fine-tune this checkpoint instead of the one that is sampled"),
    ("--out",             nonempty,       "out/stage2", "folder to write the checkpoint to"),
    ("--kind",            KIND_CHOICES,   "all",        "problems to sample"),
    ("--data",            str,            "",           "real problems as in stage 1, or samples to learn from (rows with a `response`)"),
    ("--question-column", str,            "",           "column of --data with the question, found by its name when not given"),
    ("--answer-column",   str,            "",           "column of --data with the answer, found by its name when not given"),
    ("--prompt-file",     str,            "",           "asks for the format; default: that of --init, or with --data assets/format_prompt.txt"),
    ("--problems",        positive_int,   1500,         "questions to sample"),
    ("--samples",         positive_int,   2,            "responses per question"),
    ("--keep",            positive_int,   2,            "accepted responses kept per question at most"),
    ("--keep-wrong",      bool,           False,        "ablation: filter by format alone, wrong answers stay in"),
    ("--max-new-tokens",  positive_int,   896,          "response budget in tokens"),
    ("--temperature",     positive_float, 1.0,          "of the sampling"),
    ("--sequential",      bool,           False,        "the twin SR-BETA: same data and updates, causal mask, all tokens learned"),
    ("--epochs",          positive_float, 4.0,          "passes over the accepted samples"),
    ("--batch-tokens",    positive_int,   2_048,        "padded tokens per update"),
    ("--micro-tokens",    natural_int,    0,            "padded tokens per forward pass; 0: 16,384 on a GPU, 2,048 on a CPU"),
    ("--lr",              positive_float, 2e-3,         "peak AdamW learning rate, falling linearly to zero; 1e-5 for a real model"),
    ("--muon-lr",         not_negative,   2e-3,         "peak Muon learning rate of the matrices; 0: AdamW does it all, as suits a real model"),
    ("--tag-lr",          not_negative,   0.02,         "new tags learn at this times the size of their rows' entries, if that is above --lr"),
    ("--lora",            natural_int,    0,            "R: train adapters of that rank, at about ten times the rate; 0: all weights"),
    ("--recompute",       bool,           False,        "compute activations anew for backward: a third slower, far less memory"),
    ("--dtype",           DTYPES,         "auto",       "of the weights; auto: what config.json says"),
    ("--save-every",      positive_int,   100,          "updates between resume points"),
    ("--seed",            seed_int,       0,            "seed of problems, sampling and order"),
    ("--device",          device_name,    "auto",       "auto, cpu, cuda, cuda:1 .."),
    *RUN_FLAGS,
)
# fmt: on


def parse_args(argv=None):
    args = read_arguments(__doc__, ARGUMENTS, argv)
    if args.data and Path(args.data).resolve() == (Path(args.out) / "data").resolve():
        raise UserError(
            f"--data {args.data} lies in --out {args.out}, where this run writes; give --out another folder"
        )
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    args.micro_tokens = args.micro_tokens or default_micro_tokens(device)

    # The checkpoint is sampled first and trained afterwards: one set of weights for both.  Another
    # one to train waits in the CPU's memory.
    print_inherited(args.init)
    dtype = getattr(torch, args.dtype, None)
    model, tokenizer = load(args.init, device, dtype)
    start = load(args.start, "cpu", dtype) if args.start else (model, tokenizer)
    rows, data, format_prompt = read_inputs(args)
    if not rows:
        check_prompts(model, tokenizer, data, format_prompt, args.max_new_tokens)
    run = Run(args, start[0], data=rows or data, prompt_file=format_prompt)

    # ---- data: the model's own samples, so that only the layout is new to it ----
    rows = rows or sampled_rows(args, run, model, tokenizer, data, format_prompt)

    # ---- tag tokens: the engine forks and joins on single tokens, so responses must have them ----
    model, tokenizer = start
    new = add_tag_tokens(model.to(device), tokenizer)
    examples = []
    learned = []  # of each example, (T,) bool: True where a token of its response carries loss
    for number, row in enumerate(rows):
        try:
            ids, response_layout, forced = encode_response(tokenizer, row["response"], args.sequential)
        except MalformedTrajectory as error:
            raise UserError(f"{args.data or run.path / 'data'}: the response of row {number}: {error}")
        examples.append(Example(prompt_ids(tokenizer, row["problem"], format_prompt), ids, response_layout))
        learned.append(~torch.tensor(forced))
    print(
        f"{len(examples)} responses, {sum(len(e.ids) for e in examples)} tokens "
        f"(with tags spelled out: {sum(row.get('tokens', 0) for row in rows)})"
    )

    # ---- train: the optimizers are made only now, because new tokens can mean new parameters ----
    if args.lora:
        add_adapters(model, tokenizer, args.lora, args.seed)
        new = [tag_rows(tokenizer).index(i) for i in new]  # of the embedding only the tags' rows are trained
    optimizers = make_optimizers(model, args.lr, args.muon_lr, tag_rows=new, tag_lr=args.tag_lr)
    if args.recompute:
        recompute_activations(model)
    first = run.start(model, optimizers)
    per_epoch = len(epoch_batches(examples, args.batch_tokens, args.seed, epoch=0))
    steps = max(1, round(args.epochs * per_epoch))
    bar = tqdm(range(first + 1, steps + 1), initial=first, total=steps, desc="stage 2", mininterval=1.0)
    for step in bar:
        began = time.time()

        # A new order each epoch; a run that resumes within an epoch makes that epoch's order again.
        epoch, index = divmod(step - 1, per_epoch)
        if index == 0 or step == first + 1:
            epoch_order = epoch_batches(examples, args.batch_tokens, args.seed, epoch)
        batch = epoch_order[index]  # indices into `examples`

        # Every micro-batch divides by the tokens of the whole batch, so gradients, losses and
        # entropies of all micro-batches on all ranks add up to the batch's.
        num_tokens = sum(learned[i].sum().item() for i in batch)
        loss = entropy = num_padded = 0.0
        for chosen, ids, batch_layout, mask in batches(
            [examples[i] for i in batch], args.micro_tokens, device, share=ranks()
        ):
            mask[mask.clone()] = torch.cat([learned[batch[i]] for i in chosen]).to(device)  # (B, T)
            logprobs, H = token_logprobs(model, ids, batch_layout)  # (B, T) each
            part = -logprobs[mask].sum() / num_tokens
            part.backward()
            loss += part.item()
            entropy += H[mask].sum().item() / num_tokens
            num_padded += ids.numel()

        # Warm up over 20 updates, then fall to zero: the last updates settle what the first found.
        set_lr(optimizers, min(1.0, step / 20) * (1 - (step - 1) / steps))
        norm = update(model, optimizers)
        loss, entropy, num_padded = map(sum, zip(*from_all_ranks([(loss, entropy, num_padded)])))

        # Tokens per second count padding: they say what the machine does, not how fast it learns.
        speed = num_padded / (time.time() - began)
        run.log(step=step, loss=loss, entropy=entropy, grad_norm=norm, epoch=epoch, tokens_per_second=speed)
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:.0f}", refresh=False)
        run.end_step(model, optimizers, step)
    run.finish(model, tokenizer)


if __name__ == "__main__":
    run_main(main)

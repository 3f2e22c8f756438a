"""Stage 2: tag tokens, encoding of the self-distilled data, rejection sampling with both filters."""

import copy
import json
import sys

import datasets
import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

import stage0_model as stage0
import stage2_beta
from engine import (
    Engine,
    Example,
    MalformedTrajectory,
    Rollout,
    batches,
    layout,
    tag_token_ids,
    token_logprobs,
)
from stage2_beta import add_tag_tokens, encode_response, epoch_batches, rejection_sample

RESPONSE = (
    "<guideline><plan>1:A</plan><plan>2:B</plan></guideline><step>1:A7+2=9;a9</step><step>2:B1+1=2;b2</step>"
    "<takeaway>a9b2</takeaway>\\boxed{9}"
)


@pytest.mark.parametrize("spare, tied", [(20, True), (20, False), (0, True), (0, False)])
def test_tags_become_single_tokens_that_start_as_the_mean_of_their_spelling(
    tmp_path, plain_tokenizer, spare, tied
):
    plain_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    V = len(tokenizer)
    model = random_model(V + spare, tie_word_embeddings=tied)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spelling = tokenizer.encode("</plan>")
    added = add_tag_tokens(model, tokenizer)
    assert sorted(added) == sorted(tag_token_ids(tokenizer).values()) == stage0.tag_rows(tokenizer)
    assert len(spelling) == 3 and tokenizer.encode("</plan>") == [tag_token_ids(tokenizer)["</plan>"]]
    assert tokenizer.encode("12") == plain_tokenizer.encode("12")  # no other id moved
    assert tokenizer.decode(tokenizer.encode(RESPONSE), skip_special_tokens=True) == RESPONSE
    new = tag_token_ids(tokenizer)["</plan>"]
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        after = model.state_dict()[name]
        assert torch.allclose(after[new], before[name][spelling].mean(0))
        assert torch.equal(after[:V], before[name][:V])
        assert (
            after.shape[0] == max(V + spare, V + 8) == model.config.vocab_size
        )  # grown only when needed, never shrunk
    stage0.save(model, tokenizer, tmp_path / "tagged")
    again, tokenizer = stage0.load(tmp_path / "tagged")
    state = copy.deepcopy(again.state_dict())
    assert add_tag_tokens(again, tokenizer) == []  # a tokenizer that has the tags is left alone
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_encoded_response_has_the_engines_layout_and_marks_what_the_engine_forces(tokenizer, tag_ids):
    ids, response_layout, forced = encode_response(tokenizer, RESPONSE, sequential=False)
    assert ids[-1] == tokenizer.eos_token_id
    again = layout(ids, tag_ids)
    assert (again.position == response_layout.position).all() and (
        again.branch == response_layout.branch
    ).all()
    assert tokenizer.decode([i for i, f in zip(ids, forced) if f]) == "<step>1:<step>2:<takeaway>"
    assert encode_response(tokenizer, RESPONSE, sequential=True)[1:] == (None, [False] * len(ids))
    with pytest.raises(MalformedTrajectory):
        encode_response(tokenizer, RESPONSE.replace("</guideline>", ""), sequential=False)


def test_rejection_sampling_keeps_right_and_perfect_only_and_says_why(plain_tokenizer, monkeypatch):
    good = RESPONSE
    wrong = RESPONSE.replace("boxed{9}", "boxed{8}")
    texts = [
        good,
        good,
        wrong,
        RESPONSE.replace("<step>2:", "<step>3:"),
        good.replace("B1+1=2", "B2+0=2"),
        good.replace("A7+2", "A8+1"),
    ]

    class Rigged(Engine):
        def generate(self, prompts, n, **_):
            ids = [self.tokenizer.encode(t) + [2] for t in [*texts, good]]
            reasons = ["stop"] * 6 + ["length"]
            rollouts = [Rollout(x, None, [], [], reason, len(x), 0) for x, reason in zip(ids, reasons)]
            return [rollouts for _ in prompts]

    engine = Rigged(random_model(len(plain_tokenizer)), plain_tokenizer)
    problem = stage0.Problem("sums", "9*1 total?", "9")
    records, reasons = rejection_sample(engine, [problem], stage0.FORMAT_PROMPT, 7, 2, 100, 1.0, 0)
    assert [r["response"] for r in records] == [good, texts[4]]
    assert reasons == {
        "accepted": 2,
        "duplicate": 1,
        "wrong answer": 1,
        "format: numbering": 1,
        "over the cap per problem": 1,
        "truncated": 1,
    }
    assert (records[0]["plans"], records[0]["blocks"], records[0]["problem"]) == (2, 1, "9*1 total?")


def test_training_on_the_encoded_data_gives_forced_tokens_no_loss(tokenizer, model):
    ids, response_layout, forced = encode_response(tokenizer, RESPONSE, sequential=False)
    [(_, batch, batch_layout, mask)] = batches([Example([50, 51], ids, response_layout)], 1000, model.device)
    mask[0, 2:] &= ~torch.tensor(forced, device=model.device)
    logprobs, _ = token_logprobs(model, batch, batch_layout)
    grad = torch.autograd.grad(-logprobs[mask].mean(), logprobs)[0][0, 2:].cpu()
    assert (grad[torch.tensor(forced)] == 0).all() and (grad[~torch.tensor(forced)] != 0).all()


def test_an_epoch_has_every_example_once_and_the_same_order_whenever_it_is_made():
    examples = [Example([1, 2], [3] * length) for length in (5, 9, 5, 7, 5, 3, 5, 30)]
    batched = epoch_batches(examples, 24, seed=0, epoch=1)
    assert sorted(i for rows in batched for i in rows) == list(range(8))
    assert all(
        len(rows) == 1 or len(rows) * max(2 + len(examples[i].ids) for i in rows) <= 24 for rows in batched
    )
    assert batched == epoch_batches(examples, 24, seed=0, epoch=1)
    others = [epoch_batches(examples, 24, seed=0, epoch=epoch) for epoch in range(2, 8)]
    assert any(other != batched for other in others)  # a new order each epoch ..
    assert {len(other) for other in others} == {len(batched)}  # .. of as many batches


def test_a_run_killed_within_an_epoch_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path, monkeypatch, plain_tokenizer
):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "plain")
    rows = [
        {"problem": f"{i}*{i + 1} total?", "response": RESPONSE.replace("A7", "A" + "7" * (1 + i % 5))}
        for i in range(9)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    flags = f"--init {tmp_path}/plain --data {tmp_path}/data --epochs 2 --batch-tokens 300"
    flags += " --save-every 2 --device cpu"
    log = stage0.Run.log

    def train(folder, die_at=None):
        def dying_log(self, **row):
            if row["step"] == die_at:
                raise KeyboardInterrupt
            log(self, **row)

        monkeypatch.setattr(stage0.Run, "log", dying_log)
        monkeypatch.setattr(sys, "argv", ["stage2", *flags.split(), "--out", f"{tmp_path}/{folder}"])
        stage2_beta.main()

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("killed", die_at=12)
    train("killed")
    whole, killed = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    assert log[9]["epoch"] == log[10]["epoch"] == 1  # resumed after step 10, in the second epoch


@pytest.mark.parametrize("sequential", [False, True])
def test_the_first_logged_loss_is_the_mean_over_what_the_engine_will_sample(
    tmp_path, monkeypatch, plain_tokenizer, sequential
):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "plain")
    texts = [RESPONSE, RESPONSE.replace("A7", "A77")]
    rows = [{"problem": f"{i}*2 total?", "kind": "sums", "response": text} for i, text in enumerate(texts)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    words = f"stage2 --init {tmp_path}/plain --data {tmp_path}/data --out {tmp_path}/out --epochs 1"
    words += f" --device cpu {'--sequential' * sequential}"
    monkeypatch.setattr(sys, "argv", words.split())
    stage2_beta.main()
    logged = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])["loss"]

    model, tokenizer = stage0.load(tmp_path / "plain")
    add_tag_tokens(model, tokenizer)
    scores = []
    for row in rows:
        ids, laid, forced = encode_response(tokenizer, row["response"], sequential)
        prompt = stage0.prompt_ids(tokenizer, row["problem"], stage0.FORMAT_PROMPT)
        [(_, batch, batch_layout, _)] = batches([Example(prompt, ids, laid)], 10**6, "cpu")
        logprobs = token_logprobs(model, batch, batch_layout)[0][0, len(prompt) :]
        scores.append(logprobs[~torch.tensor(forced)])
        assert sum(forced) == (0 if sequential else 7)  # `<step>`, number and colon, twice; `<takeaway>`
    assert logged == pytest.approx(-torch.cat(scores).mean().item(), abs=1e-5)


def test_adapters_of_a_tokenizer_that_knew_some_tags_learn_the_new_ones_faster(
    tmp_path, monkeypatch, plain_tokenizer
):
    plain_tokenizer.save_pretrained(tmp_path / "some")
    some = AutoTokenizer.from_pretrained(tmp_path / "some")
    some.add_tokens(["<guideline>", "</guideline>"])
    stage0.save(random_model(len(some)), some, tmp_path / "plain")
    rows = [{"problem": f"{i}*2 total?", "response": RESPONSE} for i in range(2)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    words = f"stage2 --init {tmp_path}/plain --data {tmp_path}/data --out {tmp_path}/out --epochs 20"
    words += " --lora 2 --lr 1e-5 --muon-lr 0 --device cpu"
    monkeypatch.setattr(sys, "argv", words.split())
    stage2_beta.main()

    again, tokenizer = stage0.load(tmp_path / "plain")
    new = add_tag_tokens(again, tokenizer)
    known = [i for i in stage0.tag_rows(tokenizer) if i not in new]
    trained = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    moved = (trained - again.state_dict()["model.embed_tokens.weight"]).abs().amax(-1)  # (V,)
    assert len(known) == 2 and len(new) == 6
    assert moved[known].max() < 2e-4 < 20 * 2e-4 < moved[new].min()


@pytest.mark.parametrize("flags", ["", "--tag-lr 0", "--lora 2"])
def test_new_tags_learn_at_a_rate_of_their_own_where_the_models_is_low(
    tmp_path, monkeypatch, plain_tokenizer, flags
):
    """Twenty updates, which warm up and fall: at 1e-5 no entry can move by more than 2e-4."""
    model = random_model(len(plain_tokenizer))
    stage0.save(model, plain_tokenizer, tmp_path / "plain")
    rows = [{"problem": f"{i}*2 total?", "response": RESPONSE} for i in range(2)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    command = (
        f"stage2 --init {tmp_path}/plain --data {tmp_path}/data --out {tmp_path}/out --epochs 20 --lr 1e-5"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), "--muon-lr", "0", "--device", "cpu", *flags.split()])
    stage2_beta.main()

    # where they started: grown and filled by the same function
    again, tokenizer = stage0.load(tmp_path / "plain")
    new = add_tag_tokens(again, tokenizer)
    trained = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (trained[name] - again.state_dict()[name]).abs()
        others = moved.index_fill(0, torch.tensor(new), 0).max()
        assert others < 2e-4
        assert (moved[new].max() > 20 * 2e-4) == (flags != "--tag-lr 0")


def test_samples_in_the_folder_that_the_run_writes_are_refused(tmp_path):
    with pytest.raises(stage0.UserError, match="where this run writes"):
        stage2_beta.parse_args(["--data", str(tmp_path / "data"), "--out", str(tmp_path)])


def test_start_is_fine_tuned_on_what_init_wrote(tmp_path, monkeypatch, capsys, plain_tokenizer):
    """The engine samples with the weights of --init; what is saved is --start, moved by one small update."""
    for name, seed in (("zero", 0), ("base", 1)):
        stage0.save(random_model(len(plain_tokenizer), seed), plain_tokenizer, tmp_path / name)
    sampled_with = []

    def one_response(engine, problems, *_, **__):
        sampled_with.append(engine.model.model["embed_tokens"].weight.detach().clone())
        return [{"problem": "9*1 total?", "response": RESPONSE, "tokens": 9}], {"accepted": 1}

    def train(folder, *flags):
        words = f"stage2 --init {tmp_path}/zero --out {tmp_path}/{folder} --problems 1 --epochs 1 --lr 1e-6"
        monkeypatch.setattr(sys, "argv", [*words.split(), "--muon-lr", "0", "--device", "cpu", *flags])
        stage2_beta.main()
        return load_file(tmp_path / folder / "model.safetensors")

    monkeypatch.setattr(stage2_beta, "rejection_sample", one_response)
    zero, base = (load_file(tmp_path / name / "model.safetensors") for name in ("zero", "base"))
    for name, flags, start in (("out", (), zero), ("other", ("--start", f"{tmp_path}/base"), base)):
        trained = train(name, *flags)
        for key in start:
            rows = len(start[key])  # the tags' rows come behind
            torch.testing.assert_close(trained[key][:rows], start[key], atol=1e-5, rtol=0)
    assert all(torch.equal(weight, zero["model.embed_tokens.weight"]) for weight in sampled_with)
    assert len(sampled_with) == 2

    # another start is another run; the same one, its path spelled otherwise, is not
    with pytest.raises(stage0.UserError, match="other content of --start"):
        train("other")
    with pytest.raises(SystemExit):
        train("other", "--start", f"{tmp_path}/./base/")
    assert "nothing to do" in capsys.readouterr().out


def test_samples_are_appended_part_by_part_and_a_line_cut_off_is_sampled_again(
    tmp_path, monkeypatch, plain_tokenizer
):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path / "zero")
    kept = tmp_path / "out" / "resume" / "samples.jsonl"
    asked = []

    def one_response(engine, problems, *_, **__):
        asked.append(len(asked))
        if len(asked) == 1:
            assert not kept.parent.exists()  # so far other settings may take the folder
        if len(asked) == 5:
            raise KeyboardInterrupt
        record = {"problem": problems[0].question, "response": RESPONSE, "tokens": 9}
        return [record], {"accepted": 1}

    whole = []  # how often the file is written from its beginning
    write_text = stage2_beta.write_text
    monkeypatch.setattr(stage2_beta, "write_text", lambda *a: (whole.append(a[0]), write_text(*a)))
    monkeypatch.setattr(stage2_beta, "PART", 1)
    monkeypatch.setattr(stage2_beta, "rejection_sample", one_response)
    words = (
        f"stage2 --init {tmp_path}/zero --out {tmp_path}/out --problems 6 --samples 1 --epochs 1 --device cpu"
    )
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(KeyboardInterrupt):
        stage2_beta.main()
    lines = kept.read_bytes().splitlines(keepends=True)
    assert whole == [] and len(lines) == 4
    kept.write_bytes(b"".join(lines)[:-7])  # a kill in the middle of a line

    stage2_beta.main()
    assert whole == [kept] and len(asked) == 5 + 3
    questions = datasets.load_from_disk(str(tmp_path / "out" / "data"))["problem"]
    assert len(set(questions)) == 6 and not kept.exists()

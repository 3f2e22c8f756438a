"""Stage 2: tag tokens, encoding of the self-distilled data, rejection sampling with both filters."""

import copy
import random

import pytest
import torch
from conftest import random_model
from transformers import AutoTokenizer

import stage0_model as stage0
import stage2_beta
from engine import TAGS, Engine, MalformedTrajectory, layout, tag_token_ids
from stage2_beta import add_tag_tokens, encode_response, rejection_sample

RESPONSE = (
    "<guideline><plan>1:A</plan><plan>2:B</plan></guideline><step>1:A7+2=9;a9</step><step>2:B1+1=2;b2</step>"
    "<takeaway>a9b2</takeaway>\\boxed{9}"
)


@pytest.mark.parametrize("spare, tied", [(20, True), (20, False), (0, True), (0, False)])
def test_tags_become_single_tokens_that_start_as_the_mean_of_their_spelling(tmp_path, plain_tokenizer, spare, tied):
    plain_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    V = len(tokenizer)
    model = random_model(V + spare, tie_word_embeddings=tied)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spelling = tokenizer.encode("</plan>")
    add_tag_tokens(model, tokenizer)
    assert len(spelling) == 3 and tokenizer.encode("</plan>") == [tag_token_ids(tokenizer)["</plan>"]]
    assert tokenizer.encode("12") == plain_tokenizer.encode("12")  # no other id moved
    assert tokenizer.decode(tokenizer.encode(RESPONSE), skip_special_tokens=True) == RESPONSE
    new = tag_token_ids(tokenizer)["</plan>"]
    for name in ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"]):
        after = model.state_dict()[name]
        assert torch.allclose(after[new], before[name][spelling].mean(0))
        assert torch.equal(after[:V], before[name][:V])
        assert after.shape[0] == max(V + spare, V + 8) == model.config.vocab_size  # grown only when needed, never shrunk
    stage0.save(model, tokenizer, tmp_path / "tagged")
    again, tokenizer = stage0.load(tmp_path / "tagged")
    state = copy.deepcopy(again.state_dict())
    add_tag_tokens(again, tokenizer)  # a tokenizer that has the tags is left alone
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_encoded_response_has_the_engines_layout_and_marks_what_the_engine_forces(tokenizer, tag_ids):
    ids, laid, forced = encode_response(tokenizer, RESPONSE, sequential=False)
    assert ids[-1] == tokenizer.eos_token_id
    again = layout(ids, tag_ids)
    assert (again.position == laid.position).all() and (again.branch == laid.branch).all()
    assert tokenizer.decode([i for i, f in zip(ids, forced) if f]) == "<step>1:<step>2:<takeaway>"
    assert encode_response(tokenizer, RESPONSE, sequential=True)[1:] == (None, [False] * len(ids))
    with pytest.raises(MalformedTrajectory):
        encode_response(tokenizer, RESPONSE.replace("</guideline>", ""), sequential=False)


def test_rejection_sampling_keeps_right_and_perfect_only_and_says_why(plain_tokenizer, monkeypatch):
    good = RESPONSE
    wrong = RESPONSE.replace("boxed{9}", "boxed{8}")
    texts = [good, good, wrong, RESPONSE.replace("<step>2:", "<step>3:"), good.replace("B1+1=2", "B2+0=2"), good.replace("A7+2", "A8+1")]

    class Rigged(Engine):
        def generate(self, prompts, n, **_):
            from engine import Rollout

            finish = lambda i: "length" if i == 6 else "stop"  # noqa: E731
            ids = [self.tokenizer.encode(t) + [2] for t in [*texts, good]]
            return [[Rollout(x, None, [], [], finish(i), len(x), 0) for i, x in enumerate(ids)] for _ in prompts]

    engine = Rigged(random_model(len(plain_tokenizer)), plain_tokenizer)
    problem = stage0.Problem("sums", "9*1 total?", "9")
    records, reasons = rejection_sample(engine, [problem], stage0.FORMAT_PROMPT, 7, 2, 100, 1.0, 0)
    assert [r["response"] for r in records] == [good, texts[4]]
    assert reasons == {
        "accepted": 2, "duplicate": 1, "wrong answer": 1, "format: numbering": 1, "over the cap per problem": 1, "truncated": 1,
    }  # fmt: skip
    assert (records[0]["plans"], records[0]["blocks"], records[0]["problem"]) == (2, 1, "9*1 total?")


def test_training_on_the_encoded_data_gives_forced_tokens_no_loss(tokenizer, model):
    from engine import Sequence, batches, token_logprobs

    ids, laid, forced = encode_response(tokenizer, RESPONSE, sequential=False)
    [(_, batch, batch_layout, mask)] = batches([Sequence([50, 51], ids, laid)], 1000, model.device)
    mask[0, 2:] &= ~torch.tensor(forced, device=model.device)
    logprobs, _ = token_logprobs(model, batch, batch_layout)
    grad = torch.autograd.grad(-logprobs[mask].mean(), logprobs)[0][0, 2:].cpu()
    assert (grad[torch.tensor(forced)] == 0).all() and (grad[~torch.tensor(forced)] != 0).all()
    assert random.Random(0) and stage2_beta.TAGS == TAGS

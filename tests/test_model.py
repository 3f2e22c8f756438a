"""The model and its checkpoints against transformers' Qwen3, Qwen2 and Llama; the errors of a wrong one."""

import copy
import json
import random

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config
from transformers import Qwen3Config as HFConfig
from transformers import Qwen3ForCausalLM

import stage0_model as stage0

CONFIGS = [
    dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16, tie_word_embeddings=False),
    dict(num_attention_heads=8, num_key_value_heads=1, head_dim=24, tie_word_embeddings=True, rope_theta=1e6),
    dict(
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        tie_word_embeddings=False,
        rope_theta=5e6,
        rms_norm_eps=1e-5,
    ),
]


@pytest.mark.parametrize("overrides", CONFIGS)
def test_logits_equal_transformers_after_save_and_load(tmp_path, device, plain_tokenizer, overrides):
    model = random_model(len(plain_tokenizer), seed=1, **overrides).to(device)
    stage0.save(model, plain_tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).to(device)
    ids = torch.randint(0, len(plain_tokenizer), (3, 70), device=device)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    ours, tokenizer = stage0.load(tmp_path, device)
    with torch.no_grad():
        assert torch.equal(ours(ids), model(ids))
    assert tokenizer.encode("1:ab</step>") == plain_tokenizer.encode("1:ab</step>")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == plain_tokenizer.chat_template


@pytest.mark.parametrize("flat_theta", [True, False])
def test_load_reads_a_checkpoint_that_transformers_wrote(tmp_path, plain_tokenizer, flat_theta):
    torch.manual_seed(0)
    config = HFConfig(
        vocab_size=400,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e6,
        tie_word_embeddings=False,
        eos_token_id=2,
        initializer_range=0.2,
    )
    theirs = Qwen3ForCausalLM(config)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")  # several shards
    plain_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    raw = json.loads((tmp_path / "config.json").read_text())
    theta = (raw.get("rope_parameters") or {}).get("rope_theta", raw.get("rope_theta"))
    if flat_theta:
        raw.pop("rope_parameters", None)
        raw["rope_theta"] = theta
        (tmp_path / "config.json").write_text(json.dumps(raw))
    ours, _ = stage0.load(tmp_path)
    ids = torch.randint(0, 400, (2, 50))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


CLASSES = {"qwen3": HFConfig, "qwen2": Qwen2Config, "llama": LlamaConfig}


def foreign(family, seed, tied):
    """A random configuration of a family and transformers' own model of it, weights that matter."""
    rng = random.Random(f"{family}{seed}")
    kv = rng.choice([1, 2, 3])
    heads = kv * rng.choice([1, 2, 4])
    D = rng.choice([8, 16, 24])
    config = dict(
        vocab_size=rng.randint(390, 450),
        hidden_size=heads * (D if family == "qwen2" else 8),
        intermediate_size=rng.choice([48, 100]),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_parameters={"rope_type": "default", "rope_theta": rng.choice([1e4, 1e5, 1e6])},
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=None,
    )
    if family != "qwen2":  # its heads are always hidden_size / heads wide
        config["head_dim"] = D
    torch.manual_seed(seed)
    theirs = AutoModelForCausalLM.from_config(CLASSES[family](**config), dtype=torch.float32)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.dim() == 1:  # norms and biases
                p.add_(0.3 * torch.randn_like(p))
    return theirs.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", CLASSES)
def test_logits_of_three_families_equal_transformers_before_and_after_a_step_and_saving(
    tmp_path, plain_tokenizer, family, seed, tied
):
    theirs = foreign(family, seed, tied)
    theirs.save_pretrained(tmp_path / "theirs")
    plain_tokenizer.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = stage0.load(tmp_path / "theirs")
    ids = torch.randint(0, 390, (2, 60))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)

    # trained: the gradient of every parameter is transformers' too
    ours(ids).square().mean().backward()
    theirs(ids).logits.square().mean().backward()
    mine = dict(ours.named_parameters())
    assert mine.keys() == dict(theirs.named_parameters()).keys()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(mine[name].grad, p.grad, atol=1e-4, rtol=1e-3)
    stage0.update(ours, stage0.make_optimizers(ours, 1e-2))

    # saved under its own name: what AutoModel finds is the same class, and gives the new logits
    stage0.save(ours, tokenizer, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(saved) is type(theirs) and saved.config.tie_word_embeddings is tied
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), saved(ids).logits, atol=1e-4, rtol=0)
        assert (saved(ids).logits - theirs(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", CLASSES)
def test_the_engine_decodes_each_family_greedily_as_transformers_does(tmp_path, plain_tokenizer, family):
    from engine import Engine

    theirs = foreign(family, 7, True)
    theirs.save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = stage0.load(tmp_path)
    prompt = list(range(40, 60))
    greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    [[mine]] = Engine(model, tokenizer).generate([prompt], parallel=False, max_new_tokens=24, temperature=0.0)
    assert mine.ids == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize("hidden_size", [64, 128, 576, 1088])
def test_a_new_model_of_any_allowed_width_has_as_many_query_heads_to_each_key_value_head(
    monkeypatch, plain_tokenizer, hidden_size
):
    """576 is 18 heads: over 4 of keys and values they would not be shared out."""
    monkeypatch.setattr(stage0, "train_tokenizer", lambda texts: plain_tokenizer)
    args = stage0.parse_args(["--hidden-size", str(hidden_size), "--layers", "1"])
    model, _ = stage0.new_model(args)
    assert model(torch.zeros(1, 2, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_head_is_hidden_size_over_heads_wide_where_config_json_does_not_say(
    tmp_path, plain_tokenizer, family
):
    theirs = foreign(family, 3, False)
    width = theirs.config.hidden_size // theirs.config.num_attention_heads
    theirs.save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    spoil(tmp_path, head_dim=None)
    if getattr(theirs.config, "head_dim", None) in (None, width):
        assert stage0.load(tmp_path)[0].config.head_dim == width
    else:
        with pytest.raises(stage0.UserError, match="do not fit config.json"):
            stage0.load(tmp_path)


def test_layout_makes_branches_blind_to_each_other_and_position_shifts_show(tokenizer, tag_ids, model):
    """The masked forward equals separate causal forwards: trunk + branch b alone gives branch b's logits."""
    from engine import layout

    text = "<guideline><plan>1:a</plan><plan>2:b</plan></guideline>"
    trunk = tokenizer.encode(text)
    b1, b2 = tokenizer.encode("<step>1:xyz</step>"), tokenizer.encode("<step>2:pqrstu</step>")
    tail = tokenizer.encode("<takeaway>c</takeaway>")
    ids = trunk + b1 + b2 + tail
    with torch.no_grad():
        whole = model(torch.tensor([ids], device=model.device), layout(ids, tag_ids))[0]
        alone = model(torch.tensor([trunk + b2], device=model.device))[0]
    n = len(trunk)
    torch.testing.assert_close(whole[:n], alone[:n], atol=1e-4, rtol=0)
    torch.testing.assert_close(whole[n + len(b1) : n + len(b1) + len(b2)], alone[n:], atol=1e-4, rtol=0)
    with torch.no_grad():
        causal = model(torch.tensor([ids], device=model.device))[0]
    assert (whole - causal)[n + len(b1) :].abs().max() > 1e-2


def test_siblings_and_other_documents_are_hidden_as_the_docstring_says():
    block, branch, document = (
        torch.tensor([[0, 1, 1, 1]]),
        torch.tensor([[0, 1, 2, 2]]),
        torch.tensor([[0, 0, 0, 1]]),
    )
    rows = ["".join(map(str, row)) for row in stage0.visible_mask(block, branch)[0].int().tolist()]
    assert rows == ["1000", "1100", "1010", "1011"]
    rows = ["".join(map(str, row)) for row in stage0.visible_mask(block, branch, document)[0].int().tolist()]
    assert rows == ["1000", "1100", "1010", "0001"]
    assert [stage0.bucket(n) for n in (100, 1100)] == [128, 1280]


def spoil(path, **changes):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (
            lambda p: spoil(p, model_type="mistral"),
            "model_type is 'mistral', this project reads qwen3, qwen2, llama",
        ),
        (lambda p: spoil(p, rope_parameters=None, rope_theta=None), "rope_theta missing"),
        (lambda p: spoil(p, rope_scaling={"type": "yarn"}), "rope_scaling is not supported"),
        (lambda p: spoil(p, quantization_config={"bits": 4}), "quantization_config is not supported"),
        (lambda p: spoil(p, hidden_size=64), "do not fit config.json"),
        (lambda p: (p / "model.safetensors").unlink(), "no .safetensors weights"),
        (lambda p: (p / "model.safetensors").write_bytes(b"junk"), "not a readable safetensors"),
    ],
)
def test_a_wrong_checkpoint_is_refused_in_one_line(tmp_path, plain_tokenizer, damage, message):
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path)
    damage(tmp_path)
    with pytest.raises(stage0.UserError, match=message) as caught:
        stage0.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused():
    with pytest.raises(stage0.UserError, match="no such checkpoint folder"):
        stage0.load("out/nowhere")


def test_a_duplicate_lm_head_of_a_tied_checkpoint_is_ignored(tmp_path, plain_tokenizer):
    model = random_model(len(plain_tokenizer), tie_word_embeddings=True)
    stage0.save(model, plain_tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    ours, _ = stage0.load(tmp_path)
    assert set(ours.state_dict()) == set(model.state_dict())


def test_bf16_weights_give_the_fp32_logits_but_for_rounding(tmp_path, plain_tokenizer):
    from engine import Engine

    stage0.save(random_model(len(plain_tokenizer), std=0.05), plain_tokenizer, tmp_path)
    exact, _ = stage0.load(tmp_path)
    rounded, tokenizer = stage0.load(tmp_path, dtype=torch.bfloat16)
    ids = torch.randint(0, len(plain_tokenizer), (2, 30))
    with torch.no_grad():
        a, b = exact(ids), rounded(ids).float()
    assert 0 < (a - b).norm() / a.norm() < 0.03
    [[r]] = Engine(rounded, tokenizer).generate([ids[0].tolist()], parallel=False, max_new_tokens=5)
    assert len(r.ids) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gain_factor_speeds_up_the_gains_of_the_last_norm_and_nothing_else(dtype):
    model = random_model(64).to(dtype)
    optimizers = stage0.make_optimizers(model, 1e-3, gain_factor=5.0)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    model(torch.arange(60).reshape(2, 30)).float().square().mean().backward()
    stage0.update(model, optimizers)
    for name, p in stage0.trained(model).items():
        # the first step of Adam is the learning rate, whatever the gradient
        moved = (p.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(5e-3 if name == "model.norm.weight" else 1e-3, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_learn_at_a_rate_of_their_size_and_all_else_moves_as_without_them(dtype, tied):
    plain = random_model(64, tie_word_embeddings=tied).to(dtype)
    model = copy.deepcopy(plain)
    before = {name: p.detach().float().clone() for name, p in plain.named_parameters()}
    for each, settings in ((plain, {}), (model, {"tag_rows": [9, 40], "tag_lr": 0.1})):
        optimizers = stage0.make_optimizers(each, 1e-3, **settings)
        each(torch.arange(60).reshape(2, 30)).float().square().mean().backward()
        stage0.update(each, optimizers)
    matrices = ("model.embed_tokens.weight", "lm_head.weight")
    others = stage0.trained(plain)
    for name, p in stage0.trained(model).items():
        moved = (p - before[name]).abs()
        if name in matrices:
            # the first step of Adam is the learning rate, whatever the gradient
            rate = 0.1 * (before[name][[9, 40]] ** 2).mean() ** 0.5
            assert moved[[9, 40]].median().item() == pytest.approx(rate.item(), rel=0.01)
        kept = torch.ones_like(moved, dtype=torch.bool)
        kept[[9, 40] if name in matrices else []] = False
        assert torch.equal(p[kept], others[name][kept])


@pytest.mark.parametrize("tag_lr", [0.0, 1e-3])
def test_new_rows_never_learn_more_slowly_than_the_rest(tag_lr):
    weights = []
    for rows in ([], [9, 40]):
        model = random_model(64)
        optimizers = stage0.make_optimizers(model, 1e-3, tag_rows=rows, tag_lr=tag_lr)
        for step in range(3):
            ids = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(step))
            model(ids).square().mean().backward()
            stage0.update(model, optimizers)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_device_that_is_asked_for_becomes_the_current_one(monkeypatch):
    """Triton, streams and graphs go to the current device: with tensors on cuda:1 they would crash."""
    current = []
    for name, answer in (("is_available", True), ("device_count", 2), ("get_device_name", "GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name in ("cuda:1", "cuda", "auto"):
        assert stage0.pick_device(name) == current[-1]
    assert [str(device) for device in current] == ["cuda:1", "cuda:0", "cuda:0"]
    with pytest.raises(stage0.UserError, match="cuda:2"):
        stage0.pick_device("cuda:2")


def test_an_update_in_fp32_copies_no_weight_onto_itself():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default and args[0].dim() == 2:
                copied.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    for dtype, expected in ((torch.float32, 0), (torch.bfloat16, 23)):  # 3 layers of 7 matrices, and 2
        copied = []
        model = random_model(64, num_hidden_layers=3).to(dtype)
        optimizers = stage0.make_optimizers(model, 1e-3)
        model(torch.arange(60).reshape(2, 30)).float().square().mean().backward()
        with Copies():
            stage0.update(model, optimizers)
        assert len(copied) == expected

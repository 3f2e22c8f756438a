"""What a checkpoint folder can be wrong in: each fault is one line that names the file, or is mended."""

import copy
import json
import shutil
import sys

import pytest
import torch
from conftest import random_model, replayed
from real_checkpoint import real_checkpoint, real_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

import engine as engine_module
import eval as judge
import stage0_model as stage0
import stage1_zero
import stage2_beta
import stage3_papo
from engine import TAGS, MalformedTrajectory
from stage0_model import UserError, prompt_ids
from stage2_beta import encode_response


@pytest.fixture(scope="module")
def tok():
    return real_tokenizer()


@pytest.fixture
def folder(tmp_path, plain_tokenizer):
    """A sound checkpoint of one shard."""
    stage0.save(random_model(len(plain_tokenizer)), plain_tokenizer, tmp_path)
    return tmp_path


def change(file, **changes):
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


def logits(model):
    with torch.no_grad():
        out = model(torch.arange(100, 150)[None])
    return getattr(out, "logits", out)


# ---- weights ----


def test_saving_over_shards_leaves_the_new_weights_alone_in_the_folder(tmp_path, tok):
    real_checkpoint(tmp_path, tok, dtype=torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, tokenizer = stage0.load(tmp_path)
    with torch.no_grad():
        model.model["norm"].weight.mul_(3.0)
    stage0.save(model, tokenizer, tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    again, _ = stage0.load(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=0)


def test_a_tied_flag_beside_another_lm_head_is_not_believed(tmp_path, folder):
    """transformers 5 does the same, so its logits are the reference."""
    tied = stage0.read_config(folder)[0].tie_word_embeddings
    assert tied is False
    change(folder / "config.json", tie_word_embeddings=True)
    model, tokenizer = stage0.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-4, rtol=0)

    # saved, the flag says what the file holds
    stage0.save(model, tokenizer, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(stage0.load(tmp_path / "saved")[0]), logits(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        stage0.load(folder)


def test_weights_of_whole_numbers_are_refused_by_name(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} is torch.int8; expected"):
        stage0.load(folder)


# ---- files that are missing or broken ----

BROKEN = [
    ("config.json", "{", "config.json: not a readable JSON object"),
    ("config.json", "[]", "config.json: not a readable JSON object"),
    ("generation_config.json", "{", "generation_config.json: not a readable JSON object"),
    ("model.safetensors.index.json", "{", "index.json: not a readable JSON object"),
    ("model.safetensors.index.json", "{}", "index.json: weight_map must name files beside it"),
    ("model.safetensors.index.json", '{"weight_map": 3}', "index.json: weight_map must name files"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "index.json: weight_map must name"),
    ("model.safetensors.index.json", '{"weight_map": {"a": "/etc/passwd"}}', "weight_map must name"),
    ("model.safetensors.index.json", '{"weight_map": {"a": ".."}}', r"\.\. is missing"),
    ("model.safetensors.index.json", '{"weight_map": {"a": 7}}', "7 is missing"),
    ("tokenizer.json", None, "no readable tokenizer"),
    ("tokenizer.json", "{", "no readable tokenizer"),
    ("tokenizer_config.json", "{", "no readable tokenizer"),
]


@pytest.mark.parametrize("name, content, message", BROKEN)
def test_a_missing_or_broken_file_is_named_in_one_line(folder, name, content, message):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        stage0.load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="qwen3_5"), "model_type is 'qwen3_5'"),
        (dict(model_type="mixtral"), "model_type is 'mixtral'"),
        (dict(model_type="llama", attention_bias=True), "attention_bias is not supported"),
        (dict(model_type="llama", mlp_bias=True), "mlp_bias is not supported"),
        (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type 'llama3'"),
        (
            dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "partial_rotary_factor 0.5 is not supported",
        ),
        (dict(partial_rotary_factor=0.25), "partial_rotary_factor 0.25 is not supported"),
        (dict(model_type="qwen2", rope_scaling={"type": "yarn", "factor": 4.0}), "rope_scaling"),
        (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window"),
    ],
)
def test_other_architectures_are_refused_by_name(folder, changes, message):
    change(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        stage0.load(folder)


# ---- the end of a turn, and the chat template ----


@pytest.mark.parametrize("value", ["absent", None])
def test_the_tokenizer_says_what_ends_a_turn_where_config_json_does_not(tmp_path, tok, value):
    real_checkpoint(tmp_path, tok)
    change(tmp_path / "config.json", eos_token_id=value)
    change(tmp_path / "generation_config.json", eos_token_id=value)
    assert stage0.load(tmp_path)[0].config.eos_token_id == tok.eos_token_id != 2  # 2 is the tiny base's


def test_a_tokenizer_without_an_end_of_turn_is_refused(folder):
    change(folder / "tokenizer_config.json", eos_token="absent")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|im_over|>"))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token missing"):
        stage0.load(folder)


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}<assistant>"
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
DROPS = TURNS.replace("<{{ m.role", "{% if m.role == 'system' %}{% continue %}{% endif %}<{{ m.role")


@pytest.mark.parametrize("template", [RAISES, DROPS])
def test_without_a_system_turn_the_user_is_told_everything(tok, template):
    mine = copy.deepcopy(tok)
    mine.chat_template = template
    assert mine.decode(prompt_ids(mine, "Q?", "Do so.")) == "<user>Do so.\n\nQ?<assistant>"
    assert mine.decode(prompt_ids(mine, "Q?", "{question} Now.")) == "<user>Q? Now.<assistant>"


def test_a_template_that_knows_the_system_turn_keeps_it_though_it_trims(tok):
    mine = copy.deepcopy(tok)
    mine.chat_template = TURNS
    assert mine.decode(prompt_ids(mine, "Q?", "Do so.\n")) == "<system>Do so.<user>Q?<assistant>"


def test_a_template_that_always_fails_is_named_in_one_line(tok):
    mine = copy.deepcopy(tok)
    mine.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match=r"the chat template fails \(never\)"):
        prompt_ids(mine, "Q?", "Do so.")


# ---- a checkpoint's path and its own prompt ----


def test_an_equals_sign_in_a_path_is_no_mode(tmp_path, monkeypatch, plain_tokenizer):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/lr=1e-4/stage0", "runs/lr=3"):
        plain_tokenizer.save_pretrained(name)

    def modes(spec):
        return judge.modes_of(spec)

    both = ["plain", "format"]
    assert modes("runs/lr=1e-4/stage0") == [("runs/lr=1e-4/stage0", mode) for mode in both]
    assert modes("runs/lr=1e-4/stage0=plain") == [("runs/lr=1e-4/stage0", "plain")]
    assert modes("runs/lr=3") == [("runs/lr=3", mode) for mode in both]
    assert modes("runs/lr=3=format") == [("runs/lr=3", "format")]
    with pytest.raises(UserError, match="unknown mode '5'"):
        modes("runs/lr=5")


class Asked(Exception):
    """Carries the system prompt that a command was about to use."""


@pytest.fixture
def asked(monkeypatch):
    """The system prompt that eval.py (made problems, or a benchmark) or engine.py asks with."""

    def stop(tokenizer, question, system):
        raise Asked(system)

    def run(module, *argv):
        monkeypatch.setattr(module, "prompt_ids", stop)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        with pytest.raises(Asked) as caught:
            module.main()
        return str(caught.value)

    return run


def test_a_checkpoint_is_asked_with_its_own_prompt_unless_told_otherwise(tmp_path, folder, tok, asked):
    for name in ("own", "other"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} prompt.\n")
    eval_args = (judge, f"{folder}=format", "--n", "3", "--out", tmp_path / "out")
    engine_args = (engine_module, "1+1?", "--init", folder)
    (folder / "args.json").write_text('{"steps": 1}')
    for made, expected in ((None, stage0.FORMAT_PROMPT), ("The own prompt.\n", "The own prompt.")):
        if made:
            (folder / "prompt.txt").write_text(made)
        for command in (eval_args, engine_args):
            assert asked(*command) == expected
            other = (*command, "--prompt-file", tmp_path / "other.txt")
            assert asked(*other) == "The other prompt."
    (folder / "args.json").unlink()
    (folder / "prompt.txt").unlink()
    assert asked(*eval_args) == stage0.FORMAT_PROMPT  # made problems
    assert asked(*engine_args) == stage0.read_prompt("", True)  # it was not brought up on those


@pytest.mark.parametrize("script", [stage1_zero, stage2_beta, stage3_papo])
def test_a_run_keeps_the_text_that_it_asked_with_so_that_its_file_may_go(
    tmp_path, monkeypatch, script, tokenizer
):
    stage0.save(random_model(len(tokenizer)), tokenizer, tmp_path / "init")
    (tmp_path / "prompt.txt").write_text("Denk nach, größer als \u2265 1.\n", encoding="utf-8")
    flags = f"--init {tmp_path}/init --out {tmp_path}/out --prompt-file {tmp_path}/prompt.txt --device cpu"

    def stop(*_, **__):
        raise Asked

    monkeypatch.setattr(script, "Engine", stop)  # the folder is in order by then
    monkeypatch.setattr(sys, "argv", ["stage", *flags.split()])
    with pytest.raises(Asked):
        script.main()
    (tmp_path / "prompt.txt").unlink()
    assert stage0.read_prompt("", "", tmp_path / "out") == "Denk nach, größer als \u2265 1."

    # and the next stage asks with it, unless it is told otherwise
    shutil.copy(tmp_path / "out" / "prompt.txt", tmp_path / "init")
    (tmp_path / "other.txt").write_text("Think.")
    for name, more, expected in (("next", "", "Denk nach"), ("told", "--prompt-file other.txt", "Think.")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["stage", *f"--init init --out {name} --device cpu {more}".split()])
        with pytest.raises(Asked):
            script.main()
        assert (tmp_path / name / "prompt.txt").read_text().startswith(expected)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "{", "\xff"])
def test_a_config_that_is_no_object_is_named_in_one_line_however_deep(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json: not a readable JSON object"):
        stage0.load(folder)
    assert stage0.read_object(folder / "config.json", {}) == {}


# ---- tokens that the engine can produce ----


@pytest.mark.parametrize("opening", ["text", "$x$", "\n- a", " 3+4", ")", ":", "//", "="])
def test_a_response_is_learned_in_the_very_tokens_that_the_engine_forces_and_samples(tok, opening):
    """Encoded in one piece, `1:text` is `1`, `:text` in a vocabulary like Qwen's; the engine forces `1:`."""
    tagged = copy.deepcopy(tok)
    # a word with its colon, and others that begin with one, as in 323 entries of Qwen's vocabulary
    tagged.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    text = (
        f"<guideline><plan>1:{opening}a</plan><plan>2:{opening}b</plan></guideline>"
        f"<step>1:{opening}</step><step>2:{opening} c</step><takeaway>{opening}</takeaway>\\boxed{{7}}"
    )
    ids, laid, forced = encode_response(tagged, text, sequential=False)
    rollout = replayed(random_model(len(tagged)), tagged, ids, laid, forced)
    assert rollout.ids == ids and rollout.forced == forced and rollout.finish_reason == "stop"
    assert tagged.decode([i for i, f in zip(ids, forced) if f]) == "<step>1:<step>2:<takeaway>"
    assert tagged.decode(ids[:-1]) == text


def test_a_step_with_a_number_that_the_engine_would_not_write_is_refused(tok):
    tagged = copy.deepcopy(tok)
    tagged.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    text = "<guideline><plan>1:a</plan></guideline><step>2:b</step><takeaway>c</takeaway>\\boxed{7}"
    with pytest.raises(MalformedTrajectory, match="step 1 has the number 2"):
        encode_response(tagged, text, sequential=False)

"""A small random checkpoint in the layout of Qwen/Qwen3-*, and data in the form of real data sets:
what cannot be downloaded here, made.

    python tests/real_checkpoint.py out/smoke-layout

writes base/, train.json (as ORZ-57k), samples.jsonl (for stage 2) and prompt.txt into that folder.

Real: the files and their keys, the tokenizer's kind (byte-level BPE, Qwen's way of cutting words and
its 26 added tokens), the chat template's behaviour, a head_dim that is not hidden_size / heads, spare
embedding rows, shards, bf16, two ends of turn.  Not real: the weights.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [
    f"<|{name}|>"
    for name in (
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
]
PLAIN = ["<tool_call>", "</tool_call>"] + [
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
]
PLAIN += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (  # as Qwen3's: asked not to think, it opens the turn with an empty thought
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def real_tokenizer(vocab_size=1500):
    """Trained on this repository's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    texts = [
        file.read_text()
        for file in [ROOT / "README.md", *sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("assets/*.txt"))]
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


def real_checkpoint(path, tokenizer=None, dtype=torch.bfloat16, seed=0, std=0.05, spare=267, **overrides):
    """Written by transformers itself, in two shards or more; returns its model (fp32 or bf16, as stored)."""
    tokenizer = tokenizer or real_tokenizer()
    torch.manual_seed(seed)
    config = dict(
        vocab_size=len(tokenizer) + spare,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        initializer_range=std,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model = Qwen3ForCausalLM(Qwen3Config(**(config | overrides))).to(dtype)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.save_pretrained(path, max_shard_size="200KB")
    tokenizer.save_pretrained(path)
    return model


def sample_problems(n, seed=0):
    """(question, response, answer): additions, worked in the tagged format with every tag on a line of
    its own, as instruct models write."""
    rng, rows = random.Random(seed), []
    for _ in range(n):
        a, b, c, d = (rng.randint(2, 9) for _ in range(4))
        plans, work = [f"compute {a}+{b}", f"compute {c}+{d}"], [f"{a}+{b}={a + b}", f"{c}+{d}={c + d}"]
        text = (
            "<guideline>\n"
            + "".join(f"<plan>{i}: {p}</plan>\n" for i, p in enumerate(plans, 1))
            + "</guideline>\n"
        )
        text += "".join(f"<step>\n{i}: {w}\n</step>\n" for i, w in enumerate(work, 1))
        text += f"<takeaway>\n{a + b} and {c + d}\n</takeaway>\n\\boxed{{{(a + b) * (c + d)}}}"
        rows.append((f"What is $({a}+{b}) \\cdot ({c}+{d})$?", text, str((a + b) * (c + d))))
    return rows


def main():
    out = Path(sys.argv[1])
    (out / "base").mkdir(parents=True, exist_ok=True)
    rows = sample_problems(60)
    orz = [
        [{"from": "human", "value": q}, {"from": "assistant", "ground_truth": {"value": a, "pass_at_n": 0.5}}]
        for q, _, a in rows
    ]
    (out / "train.json").write_text(json.dumps(orz))
    (out / "samples.jsonl").write_text(
        "".join(json.dumps({"problem": q, "response": r}) + "\n" for q, r, _ in rows)
    )
    (out / "prompt.txt").write_text(
        "Answer with guideline, plans, steps and takeaway, then the boxed answer.\n"
    )  # shorter than assets/'s: time
    real_checkpoint(out / "base")


if __name__ == "__main__":
    main()

"""Stage 0, the model and the base: a Qwen3 in plain PyTorch, problems to solve, a tiny base model.

In : nothing, or --init any of FAMILIES.     Out: out/stage0/, a Hugging Face checkpoint.

NPR starts from an instruction-tuned model (the paper: Qwen3-4B).  None is small enough for a
laptop, so this stage makes a stand-in in minutes: a Qwen3 of 0.8M parameters that solves made
problems step by step with mediocre accuracy, and follows the parallel format only now and then.
Equation: next-token loss on responses, L = -(1/N) sum_t log p(x_t | x_<t).

    python stage0_model.py                      # about 20 minutes on one core
    python stage0_model.py --steps 20 --out out/smoke/stage0
    python stage0_model.py --init out/real-weights --kind words --lr 1e-4 --muon-lr 0  # in English

Shapes, in all files: B rows of a batch, T tokens, N packed or learned tokens, H query heads, H_kv
key/value heads, D head dim, C hidden width, V vocabulary, G group size (responses to one question),
M branch tips or query rows of a tile, R KV rows (in stages 1 and 3 the rewards of a group, of
adapters the rank), Q new tokens of a row, S slots, W splits.
"""

import argparse
import ast  # model text is parsed with it, never evaluated
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed as dist, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention  # on CUDA only
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# A CPU's kernels are kept for 1,024 shapes, and every batch has others: measured, 1.8 GB after 60
# steps of this stage.  With 16 it is 1.2 GB, no slower.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

# ==================================================================================================
# 1. The model: Qwen3, bottom-up
# ==================================================================================================

# Three families are this one model but for two switches.  model_type: (class in transformers, norm
# of queries and keys, biases on q, k and v)
FAMILIES = {
    "qwen3": ("Qwen3ForCausalLM", True, False),
    "qwen2": ("Qwen2ForCausalLM", False, True),  # Qwen2.5 too
    "llama": ("LlamaForCausalLM", False, False),  # without rope scaling: SmolLM2
}


@dataclass
class Qwen3Config:
    """Fields as in a Qwen3 config.json; the defaults are about the tiny base (`new_model`)."""

    model_type: str = "qwen3"  # of FAMILIES
    vocab_size: int = 400  # V
    hidden_size: int = 128  # C
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 2  # H_kv
    head_dim: int = 32  # D; not always C / H
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = True
    eos_token_id: int | list = 2
    initializer_range: float = 0.02


def rope_tables(position, head_dim, theta):
    """cos and signed sin of every rotation angle (RoFormer, section 3.4.2).

    position (B, T) integers -> two (B, T, 1, D) fp32 tables.
    """
    exponent = torch.arange(0, head_dim, 2, device=position.device).float() / head_dim  # (D/2,)
    angle = position[:, :, None, None].float() * theta**-exponent  # (B, T, 1, D/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, cos, sin):
    """Rotary position embedding of pairs (i, i + D/2): (a, b) -> (a cos - b sin, b cos + a sin).

    x (B, T, H, D).  The pairs are Hugging Face's; the minus sign is in the table (`rope_tables`).
    """
    a, b = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin).to(x.dtype)


# ---- who sees whom ----


def visible_mask(block, branch, document=None):
    """Who may see whom: what came earlier, but never a sibling branch of the same parallel block.

    block, branch: integers (B, T), block 0 is the trunk.  document: likewise, where a row holds
    several texts that must not see one another.
    Returns (B, T, T) bool, True = row's token sees column's token.

    block [0 1 1 1], branch [0 1 2 2] -> 1000, 1100, 1010, 1011: tokens 2 and 3 are blind to token 1
    """
    T = block.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=block.device).tril()
    same_block = (block[:, :, None] == block[:, None, :]) & (block[:, :, None] != 0)  # (B, T, T)
    sees = causal & ~(same_block & (branch[:, :, None] != branch[:, None, :]))
    return sees if document is None else sees & (document[:, :, None] == document[:, None, :])


@functools.cache
def can_compile():
    """Whether Triton runs here, which kernels and torch.compile need: a GPU, and a C compiler.

    Slim images have no compiler.  Found out once, at the start, and told in one line.
    """
    if not torch.cuda.is_available():
        return False
    try:
        from triton.runtime import driver  # comes with torch for CUDA

        driver.active.get_current_device()  # the first use builds what starts kernels
        return True
    except Exception as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        print(f"slow: no kernel, graphs and compilation without Triton and a C compiler such as gcc ({why})")
        return False


def uses_flex(device):
    """FlexAttention where it trains: compiled, on CUDA.  It has no backward on a CPU."""
    return device.type == "cuda" and can_compile()


@functools.cache
def compiled(function, dynamic=None):
    """torch.compile on CUDA: for the first shape, and at the second for all (dynamic: at once)."""
    if not can_compile():
        return function

    # There are few kernels to compile.  torch's pool of processes for that takes up to a gigabyte
    # for each, and on an H200 a run was still waiting for it after a minute, and was killed.
    torch._inductor.config.compile_threads = 1
    return torch.compile(function, dynamic=dynamic)


TILE = 128  # tokens along a side of what FlexAttention skips or computes


def bucket(n):
    """n rounded up to one of four sizes for every power of two: 100 -> 128, 1100 -> 1280."""
    step = max(32, 2 ** (n.bit_length() - 3))
    return -(-n // step) * step


def visibility(block, branch, document=None):
    """`visible_mask` in the form that `attention` takes.

    None where plain causal order says it all; on a CPU (B, 1, T, T) bool; on CUDA a BlockMask, the
    tiles of 128 x 128 tokens that are not empty: there, siblings and other documents are skipped,
    not computed and masked.
    """
    if document is None and not block.any():
        return None
    if not uses_flex(block.device):
        return visible_mask(block, branch, document)[:, None]
    B, T = block.shape
    document = torch.zeros_like(block) if document is None else document

    # The same rule for a pair of tokens, of batch row b.
    def sees(b, h, q, k):
        sibling = (block[b, q] == block[b, k]) & (block[b, q] != 0) & (branch[b, q] != branch[b, k])
        return (q >= k) & (document[b, q] == document[b, k]) & ~sibling

    # How many pairs of a tile see one another, a stripe of queries at a time: all T x T pairs of a
    # long row would be gigabytes.  torch's create_block_mask would have to be compiled for that.
    row, token = (torch.arange(n, device=block.device) for n in (B, T))
    side = -(-T // TILE)
    counts = []
    for q in token.split(8 * TILE):
        pairs = sees(row[:, None, None], 0, q[:, None], token)  # (B, Q, T)
        pairs = F.pad(pairs, (0, side * TILE - T, 0, -len(q) % TILE))
        counts.append(pairs.view(B, -1, TILE, side, TILE).sum((2, 4)))
    counts = torch.cat(counts, dim=1)[:, None]  # (B, 1, side, side)

    # In tiles seen whole FlexAttention masks nothing, in those seen in part it asks `sees`.
    whole = counts == TILE * TILE
    tiles = []
    for kind in ((counts > 0) & ~whole, whole):
        tiles += [kind.sum(-1), kind.int().argsort(dim=-1, descending=True, stable=True)]
    tiles = [x.int() for x in tiles]  # number and indices of the one kind, and of the other
    return BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(T, T))


def attention(q, k, v, mask):
    """softmax(q k' / sqrt(D)) v over what `mask` (of `visibility`) shows.

    q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H, D).
    """
    if isinstance(mask, BlockMask):
        # For rows of fewer than 128 tokens torch 2.13 may find no tile sizes if it can choose its
        # kernel; and its tiles of fp32 do not fit the shared memory of cards such as a 4090.
        options = {"FORCE_USE_FLEX_ATTENTION": True}
        if q.dtype == torch.float32 and q.shape[3] > 64:
            options |= {"fwd_BLOCK_M": 32, "fwd_BLOCK_N": 32, "fwd_num_stages": 1}
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or H_kv, T, D)
        attend = compiled(flex_attention)
        return attend(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options).transpose(1, 2)

    # measured: the CPU's fused attention runs backward 1.6x faster in fp32 than in bf16
    dtype = v.dtype
    if q.device.type == "cpu":
        q, k, v = (x.float() for x in (q, k, v))

    # Each key/value head serves several query heads.  They are repeated by hand: told to share them
    # itself (`enable_gqa`), scaled_dot_product_attention goes its slow path if there is a mask.
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))  # (B, T, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return attended.to(dtype).transpose(1, 2)


# ---- the layers ----


class Attention(nn.Module):
    """The two ends of grouped-query attention, in Qwen3 with QK-norm.

    What is between them, and what a token may see, is decided outside.
    """

    def __init__(self, config):
        super().__init__()
        self.head_dim = D = config.head_dim
        q_width = config.num_attention_heads * D  # not always C
        kv_width = config.num_key_value_heads * D
        _, qk_norm, qkv_bias = FAMILIES[config.model_type]
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

        # each norm has one weight for all its heads
        self.q_norm = nn.RMSNorm(D, config.rms_norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(D, config.rms_norm_eps) if qk_norm else None

    def queries_keys_values(self, x, cos, sin):
        """x (B, T, C) -> (B, T, H, D), (B, T, H_kv, D), (B, T, H_kv, D)."""
        D = self.head_dim
        q, k, v = (
            project(x).view(*x.shape[:2], -1, D) for project in (self.q_proj, self.k_proj, self.v_proj)
        )

        # The weight is applied outside of rms_norm: autocast gives bf16 queries, an fp32 weight.
        if self.q_norm is not None:
            q = F.rms_norm(q, (D,), eps=self.q_norm.eps) * self.q_norm.weight
            k = F.rms_norm(k, (D,), eps=self.k_norm.eps) * self.k_norm.weight
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm and residual, twice: attention, then MLP.

    RMSNorm: x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps), computed in fp32 whatever x is.
    The layer is cut in two around attention, because the engine attends over its KV memory there,
    and on CUDA compiles what comes before and after.
    """

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before_attention(self, x, cos, sin):  # (B, T, C) -> q, k, v
        return self.self_attn.queries_keys_values(self.input_layernorm(x), cos, sin)

    def after_attention(self, x, attended):
        x = x + self.self_attn.o_proj(attended.flatten(2))  # (B, T, H, D) -> (B, T, C)
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, attend):
        return self.after_attention(x, attend(*self.before_attention(x, cos, sin)))


def compiled_layer(layer, x, cos, sin, attend):
    """DecoderLayer.forward with everything around attention compiled on CUDA.

    A decode step of few tokens is a thousand small operations, and on a GPU each costs two
    microseconds even in a captured graph.  All layers, and all numbers of tokens, share one code.
    """
    q, k, v = compiled(DecoderLayer.before_attention, dynamic=True)(layer, x, cos, sin)
    return compiled(DecoderLayer.after_attention, dynamic=True)(layer, x, attend(q, k, v))


class Qwen3(nn.Module):
    """Qwen3, or another of FAMILIES, with Hugging Face's parameter names: checkpoints need no
    translation.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
                "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        # every matrix starts from the same normal distribution; the norms keep their ones
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    @property
    def device(self):
        return self.model["embed_tokens"].weight.device

    def hidden(self, ids, layout=None, kv=None):
        """Final hidden states.  ids (B, T) -> (B, T, C).

        layout: None for plain causal text, or integers `.block`, `.branch`, `.position`, each (T,)
        or (B, T), and `.document` (1, T) where texts are packed into one row (engine.Layout). kv:
        None to attend within ids (training), or the engine's KV memory, which stores the keys and
        values of this call and attends over everything its rows hold: `kv.attend(layer, q, k, v)`,
        q (B, T, H, D), k and v (B, T, H_kv, D) -> q's shape.  `kv.compiled`: whether the layers run
        compiled.
        """
        T = ids.shape[1]
        mask = None
        if layout is None:
            position = torch.arange(T, device=ids.device)[None]  # (1, T)
        else:
            block, branch, position = (
                torch.as_tensor(x, device=ids.device).long().reshape(-1, T)
                for x in (layout.block, layout.branch, layout.position)
            )  # (B, T) each
            mask = visibility(block, branch, layout.document) if kv is None else None

        # Position and mask are the same in every layer, so they are worked out once.
        x = self.model["embed_tokens"](ids)  # (B, T, C)
        cos, sin = rope_tables(position, self.config.head_dim, self.config.rope_theta)
        run_layer = compiled_layer if kv is not None and kv.compiled else DecoderLayer.__call__
        for i, layer in enumerate(self.model["layers"]):
            attend = (
                functools.partial(attention, mask=mask) if kv is None else functools.partial(kv.attend, i)
            )
            x = run_layer(layer, x, cos, sin, attend)
        return self.model["norm"](x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        head = self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head
        return F.linear(x, head.weight)

    def forward(self, ids, layout=None, kv=None):
        """ids (B, T) -> logits (B, T, V)."""
        return self.logits(self.hidden(ids, layout, kv))


# ==================================================================================================
# 2. The tokenizer, and the two ends of a conversation
# ==================================================================================================

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The eight tags of the parallel format.
ANY_TAG = re.compile(r"</?(?:guideline|plan|step|takeaway)>")


def train_tokenizer(texts, vocab_size=400):
    """A byte-level BPE with Qwen's chat markup, as an ordinary Hugging Face tokenizer.

    Words, punctuation marks and single digits are split before merging, as in Qwen: 12 is two
    tokens, so arithmetic can be learned digit by digit.  All 256 bytes are in the vocabulary, so
    any text encodes.  The eight tags are *not* special here: `<plan>` is three tokens, and the
    model has to find them by itself (stage 1) before they become single tokens (stage 2).
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}|</?| ?\p{L}+|[^\s\p{L}\p{N}]|\s+")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytewise])
    tokenizer.decoder = decoders.ByteLevel()

    # Merges are learned from the texts; the alphabet is given whole, whatever bytes they hold.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    # A turn ends with <|im_end|>, as in Qwen's chat; <|endoftext|> only fills up batches.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def prompt_ids(tokenizer, question, system_prompt):
    """Token ids of the chat prompt up to where the assistant begins to speak.

    A system prompt with {question} in it is the whole user turn, and where the chat template knows
    no system turn it is the beginning of the user's.  Raises UserError when the template fails.
    """
    turns = [[{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]]
    whole = f"{system_prompt}\n\n{question}"
    if "{question}" in system_prompt:
        turns = []
        whole = system_prompt.replace("{question}", question)
    turns.append([{"role": "user", "content": whole}])

    # a template raises on what it does not know, or drops it without a word
    for messages in turns:
        try:
            # enable_thinking=False asks Qwen3's own template for its non-thinking mode; others
            # ignore it
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except Exception as error:
            why = error
        else:
            if messages is turns[-1] or system_prompt.strip() in text:
                return tokenizer.encode(text, add_special_tokens=False)
    raise UserError(f"{tokenizer.name_or_path}: the chat template fails ({why}); mend chat_template.jinja")


def response_text(tokenizer, ids):
    """Decoded response without chat markup.

    Tags stay, whether they are text, tokens, or tokens marked special (as in NPR-4B).
    """
    added = tokenizer.added_tokens_decoder.items()
    markup = {i for i, token in added if token.special and not ANY_TAG.fullmatch(token.content)}
    return tokenizer.decode([i for i in ids if i not in markup])


# ==================================================================================================
# 3. The world: problems with many independent parts, and their verifier
# ==================================================================================================
# Three kinds.  Of each the base was shown the parts often and the whole seldom, so that it can do
# the parts and rarely puts them together; a lesson of its own is left to find in each:
#   chains     persistence: independent chains of easy operations, most of which are short in the
#              corpus and long here; compare or add up their ends
#   sums       care: independent terms of harder operations.  The corpus mostly works a term in the
#              head, in one go, which so small a model cannot, and sometimes in writing, operation
#              by operation, which it can
#   countdown  search: four numbers and a target that one or two of about fourteen first moves lead
#              to.  The corpus tries a few of them at random
# A problem's rung is its depth (operations of a chain or term; numbers) and its width (chains;
# terms; first moves that lead to the target).
# Two more kinds are the same in English, for models that read it (`--kind words`):
#   stories    persistence: what becomes of several people, orders, trips or recipes (the width),
#              each in so many moves (the depth)
#   shopping   search: the pair of things that costs so much (depth: things; width: right pairs)

KINDS = ("chains", "sums", "countdown")
WORD_KINDS = ("stories", "shopping")
SPLITS = ("train", "tune", "heldout", "hard")


@dataclass
class Problem:
    """One question with a checkable answer.

    kind: of RUNGS, or of JUDGES for a real problem.
    parts: what the solution writer needs to know about it.
    copy: how many times the same question stands ahead of it in its data set.
    """

    kind: str
    question: str
    answer: str
    parts: dict = field(repr=False, default_factory=dict)
    copy: int = 0

    def verify(self, response):
        r"""True if the last `\boxed{}` after the last block is a right answer.

        Boxes inside a block do not count.  `countdown` accepts every expression that uses each
        given number at most once and reaches the target, `shopping` the pair in any words;
        real problems are left to the JUDGES of the appendix.
        """
        boxed = last_boxed(ANY_TAG.split(response)[-1])
        if boxed is None:
            return False
        if self.kind in JUDGES:
            return JUDGES[self.kind](boxed, self.answer)
        if self.kind == "countdown":
            value, used = evaluate(boxed)
            return value == self.parts["target"] and Counter(used) <= Counter(self.parts["numbers"])
        if self.kind == "shopping":
            named = [thing for thing in self.parts["labels"] if re.search(rf"\b{thing}\b", boxed)]
            return sorted(named) == sorted(self.answer.split(" and "))
        if not self.answer.isdigit():  # who has most
            return boxed.strip().lower() == self.answer.lower()

        # compared as text: int() refuses some of what strip() lets through, and very long numbers
        number = boxed.strip()
        return re.fullmatch("[0-9]+", number) is not None and number.lstrip("0") == self.answer.lstrip("0")


def last_boxed(text):
    r"""Content of the last complete box in text, or None: 'x \boxed{a{b}} y' -> 'a{b}'.

    As TeX has it: `\boxed {5}`, `\boxed 5`, `\fbox{5}`, and braces that are escaped do not count.
    """
    # Every brace's partner first, in one pass: looking for it box by box takes quadratic time.
    partner = {}
    opened = []
    for mark in re.finditer(r"\\.|[{}]", text, re.S):
        if mark[0] == "{":
            opened.append(mark.start())
        elif mark[0] == "}" and opened:
            partner[opened.pop()] = mark.start()

    # the last box that is closed, or that holds one bare word
    for box in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text))):
        start = box.end()
        if start in partner:
            return text[start + 1 : partner[start]]
        bare = None if text.startswith("{", start) else BARE_WORD.match(text, start)
        if bare:
            return bare[0]
    return None


BARE_WORD = re.compile(r"[^\s$]+?(?=[.,;:]?(?:[\s$]|$))")


# ---- arithmetic ----

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


def apply_op(value, op, operand):
    return {"+": value + operand, "-": value - operand, "*": value * operand}[op]


def evaluate(expression):
    """Value of an expression of whole numbers with + - * and brackets, and the numbers it uses.

    Model text is never given to `eval`: it is parsed, and anything else gives (None, []).

    '(3+4)*2' -> (14, [3, 4, 2])
    """
    used = []

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return apply_op(walk(node.left), OPERATORS[type(node.op)], walk(node.right))
        raise ValueError("not arithmetic")

    # a runaway response must not become a runaway big-number product
    if len(expression) > 100:
        return None, []
    try:
        return walk(ast.parse(expression.strip(), mode="eval").body), used
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None, []


def first_moves(numbers):
    """Every first move on distinct numbers whose result lies in 1..99: the plans of a countdown.

    [2, 3] -> [(3, '+', 2, []), (3, '-', 2, []), (3, '*', 2, [])]; last in each, the numbers left
    """
    moves = []
    for y, x in itertools.combinations(sorted(numbers), 2):
        rest = [n for n in numbers if n not in (x, y)]
        moves += [(x, op, y, rest) for op in "+-*" if 1 <= apply_op(x, op, y) <= 99]
    return moves


def endings(value, rest):
    """What + and - make of a first move's value and the two numbers left, taken in their order.

    Returns [(op, its result, [(op, its result), ..]), ..]; what leaves 0..99 is left out.
    44, [7, 9] -> [('+', 51, [('+', 60), ('-', 42)]), ('-', 37, [('+', 46), ('-', 28)])]
    """
    tree = []
    for op in "+-":
        middle = apply_op(value, op, rest[0])
        if 0 <= middle <= 99:
            ends = [(op2, apply_op(middle, op2, rest[1])) for op2 in "+-"]
            tree.append((op, middle, [(op2, end) for op2, end in ends if 0 <= end <= 99]))
    return tree


# ---- one problem of each kind ----

# How many problems there are of each depth and of each width, ({depth: weight}, {width: weight}):
# in the base's corpus, at the edge of what it can, where stages 1-3 learn and all are judged, and
# beyond both (the split `hard`).
# fmt: off
RUNGS = {
    "chains": {
        "corpus": ({3: 22, 4: 30, 5: 24, 6: 14, 7: 4, 8: 3, 9: 2, 10: 1}, {1: 5, 2: 30, 3: 30, 4: 20, 5: 8, 6: 4, 7: 2, 8: 1}),
        "edge":   ({6: 20, 7: 25, 8: 25, 9: 15, 10: 15},                  {1: 3, 2: 7, 3: 20, 4: 30, 5: 25, 6: 15}),
        "beyond": ({12: 2, 14: 1, 16: 1},                                 {4: 1, 5: 1, 6: 1}),
    },
    "sums": {
        "corpus": ({1: 20, 2: 40, 3: 34, 4: 4, 5: 2},                     {1: 5, 2: 30, 3: 30, 4: 20, 5: 8, 6: 4, 7: 2, 8: 1}),
        "edge":   ({2: 20, 3: 50, 4: 20, 5: 10},                          {1: 3, 2: 7, 3: 20, 4: 30, 5: 25, 6: 15}),
        "beyond": ({6: 2, 7: 1, 8: 1},                                    {5: 1, 6: 1, 7: 1, 8: 1}),
    },
    "countdown": {  # other numbers of numbers would need other `endings`
        "corpus": ({4: 1},                                                {1: 1, 2: 1}),
        "edge":   ({4: 1},                                                {1: 1, 2: 1}),
        "beyond": ({4: 1},                                                {1: 1}),
    },
    "stories": {
        "corpus": ({2: 30, 3: 40, 4: 20, 5: 10},                          {2: 30, 3: 40, 4: 20, 5: 10}),
        "edge":   ({3: 40, 4: 40, 5: 20},                                 {3: 45, 4: 40, 5: 15}),
        "beyond": ({6: 2, 7: 1, 8: 1},                                    {6: 1, 7: 1, 8: 1}),
    },
    "shopping": {
        "corpus": ({4: 3, 5: 2},                                          {1: 1}),
        "edge":   ({5: 3, 6: 1},                                          {1: 1}),
        "beyond": ({7: 2, 8: 1},                                          {1: 1}),
    },
}
# fmt: on


def draw_size(rng, weights):
    """One of the sizes, as often as its weight says: {2: 3, 4: 1} -> 2 in three of four cases."""
    return rng.choices(list(weights), list(weights.values()))[0]


def easy_move(rng):
    """One operation of a chain: 23 * 3 modulo 100 is soon known by heart."""
    op = rng.choice("++--*")
    return op, rng.randint(2, 3 if op == "*" else 9)


def hard_move(rng):
    """One operation of a sum's term: two of them in one go are too many to know by heart."""
    op = rng.choice("+-**")
    return op, rng.randint(3, 9) if op == "*" else rng.randint(11, 99)


def draw_chains(rng, depth, width):
    """`width` chains of `depth` easy moves: 'A:12+5*3 B:40-7*2 largest modulo 100?' -> '66'."""
    goal = rng.choice(["largest", "smallest", "largest", "smallest", "total"])
    return draw_named("chains", rng, depth, width, easy_move, goal)


def draw_sums(rng, depth, width):
    """`width` terms of `depth` hard moves: 'A:47*8+36 C:52-38*7 total modulo 100?' -> '10'."""
    return draw_named("sums", rng, depth, width, hard_move, "total")


def draw_named(kind, rng, depth, width, draw_move, goal):
    """Parts with names, each worked from left to right modulo 100, and what is asked of their ends.

    Parts are named by any letters: a problem of two parts may name G and H, so that wide ones name
    nothing new.  All are equally long, for the longest branch sets the critical path.
    """
    labels = sorted(rng.sample("ABCDEFGH", width))
    chains = []
    ends = []
    for _ in labels:
        value = start = rng.randint(10, 99)
        ops = [draw_move(rng) for _ in range(depth)]
        for op, operand in ops:
            value = apply_op(value, op, operand) % 100
        chains.append((start, ops))
        ends.append(value)
    result = {"largest": max, "smallest": min, "total": sum}[goal](ends) % 100

    # as it is written: 'A:12+5*3 B:40-7*2 largest modulo 100?'
    moves = ("".join(f"{op}{operand}" for op, operand in ops) for _, ops in chains)
    written = (f"{label}:{start}{move}" for label, (start, _), move in zip(labels, chains, moves))
    question = f"{' '.join(written)} {goal} modulo 100?"
    return Problem(kind, question, f"{result:02d}", {"labels": labels, "chains": chains, "goal": goal})


def draw_countdown(rng, depth, width):
    """'2 7 9 22 make 42?' -> '(22*2)+7-9'.

    `depth` numbers, of which so far only four are known, and a target that exactly `width` of about
    fourteen first moves lead to, as `endings` go on from them: trying two or three is not enough.
    """
    targets = []
    while not targets:
        numbers = sorted(rng.sample(range(2, 26), depth))
        leading = {}  # by target: for each first move that leads there, an expression
        for x, op, y, rest in first_moves(numbers):
            reached = {}
            for op2, _, ends in endings(apply_op(x, op, y), rest):
                for op3, end in ends:
                    reached.setdefault(end, f"({x}{op}{y}){op2}{rest[0]}{op3}{rest[1]}")
            for end, expression in reached.items():
                leading.setdefault(end, []).append(expression)

        # drawn anew while nothing is led to by as many moves as asked for
        new = [end for end in leading if end >= 10 and end not in numbers]
        targets = sorted(end for end in new if len(leading[end]) == width)
    target = rng.choice(targets)
    question = f"{' '.join(map(str, numbers))} make {target}?"
    parts = {"numbers": numbers, "target": target, "leading": width}
    return Problem("countdown", question, leading[target][0], parts)


def draw_problem(kind, rng, reach="edge", depth=0, width=0):
    """One random problem from the rungs of a reach: 'corpus', 'edge' or 'beyond' (RUNGS).

    depth, width: exactly these instead, of any reach.  Raises ValueError for an unknown kind and
    UserError for a depth or width that no problem of the kind has.
    """
    if kind not in RUNGS:
        raise ValueError(f"unknown problem kind {kind!r}: expected all, words or one of {', '.join(RUNGS)}")

    # a rung must have a name in RUNGS: it was chosen before anything was trained
    for name, size, weights in zip(("depth", "width"), (depth, width), zip(*RUNGS[kind].values())):
        known = sorted({size for each in weights for size in each})
        if size and size not in known:
            known = ", ".join(map(str, known))
            raise UserError(f"--{name} {size}: {kind} has {known}; give one of these, or another --kind")

    # what is not asked for is drawn
    depths, widths = RUNGS[kind][reach]
    depth = depth or draw_size(rng, depths)
    width = width or draw_size(rng, widths)
    draw = {
        "chains": draw_chains,
        "sums": draw_sums,
        "countdown": draw_countdown,
        "stories": draw_stories,
        "shopping": draw_shopping,
    }
    return draw[kind](rng, depth, width)


def split_of(question):
    """The split a question belongs to, by its hash: 80 % train, 10 % tune, 10 % heldout.

    So splits are disjoint whatever the seeds.
    """
    tenth = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 10
    return {0: "tune", 1: "heldout"}.get(tenth, "train")


def make_problems(kind, split, n, seed, reach="", depth=0, width=0):
    """n distinct seeded problems: same arguments, same problems.

    kind: one of RUNGS, or 'all' for equal shares of KINDS, 'words' of WORD_KINDS; split: one of
    SPLITS; reach: from which rungs, by default 'beyond' for the split hard and 'edge' for all
    others; depth, width: exactly this rung instead.
    Raises ValueError for an unknown kind or split, UserError for a rung that the kind does not
    have, or that has no n distinct problems.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    kinds = {"all": KINDS, "words": WORD_KINDS}.get(kind, (kind,))
    reach = reach or ("beyond" if split == "hard" else "edge")
    rng = random.Random(f"{kind}/{split}/{seed}")
    problems = {}  # by question
    for _ in range(1001 + 100 * n if n <= 10**6 else 0):  # a million is more than any kind has
        if len(problems) == n:
            return list(problems.values())

        # what belongs to another split is thrown away; hard ones are the held-out ones beyond
        problem = draw_problem(kinds[len(problems) % len(kinds)], rng, reach, depth, width)
        if split_of(problem.question) == {"hard": "heldout"}.get(split, split):
            problems.setdefault(problem.question, problem)
    raise UserError(f"{kind}/{split} has no {n} distinct problems; ask for fewer")


# ==================================================================================================
# 4. The corpus: worked solutions, and near misses at the format
# ==================================================================================================
# Text written by people has slips.  So has this corpus, few: a single result is wrong with
# probability `slip`, and the mistake is carried on consistently.  What it teaches well is the
# parts.  What it shows seldom is the whole: long chains, terms worked in writing, a wide search;
# putting these together is left to reinforcement learning.  No later stage reads this corpus: from
# stage 1 on, every training token is the model's own sample.

# What the user turn is preceded by: one asks for ordinary step-by-step work, one for the format.
PLAIN_PROMPT = "Work step by step, then give the boxed answer."
FORMAT_PROMPT = (
    "Work in parallel: guideline of plans, one step for each plan, takeaway, then the boxed answer."
)


def slipped(value, rng, slip, low=0, high=10**6):
    """The value, or with probability `slip` one near it, from low to high."""
    if rng.random() >= slip:
        return value
    return min(high, max(low, value + rng.choice([-10, -2, -1, 1, 2, 10])))


def add_up(ends, rng, slip):
    """A running total modulo 100, as (takeaway, total).

    [('a', 51), ('b', 66), ('c', 90)] -> ('a51+b66=17+c90=07', 7)
    """
    label, total = ends[0]
    takeaway = f"{label}{total:02d}"
    for label, end in ends[1:]:
        total = slipped((total + end) % 100, rng, slip, 0, 99)
        takeaway += f"+{label}{end:02d}={total:02d}"
    return takeaway, total


def work_out_named(parts, rng, slip, in_writing):
    """One block: plans ['A', 'B'], steps ['A12+5=17*3=51;a51', 'B40-7=33*2=66;b66'], takeaway
    'a51b66', or of a total 'a51+b66=17'.

    Not in writing, a part is worked in one go: 'A12+5*3=51;a51'.
    """
    steps = []
    ends = []
    for label, (start, ops) in zip(parts["labels"], parts["chains"]):
        value = start
        text = f"{label}{value:02d}"
        for i, (op, operand) in enumerate(ops, 1):
            # what is done in the head slips where it would in writing, unseen
            value = slipped(apply_op(value, op, operand) % 100, rng, slip, 0, 99)
            text += f"{op}{operand}"
            if in_writing or i == len(ops):
                text += f"={value:02d}"
        ends.append((label.lower(), value))
        steps.append(f"{text};{label.lower()}{value:02d}")

    # comparing needs the ends alone, a total is worked out
    if parts["goal"] == "total":
        takeaway, result = add_up(ends, rng, slip)
    else:
        takeaway = "".join(f"{label}{end:02d}" for label, end in ends)
        best = max if parts["goal"] == "largest" else min
        result = best(end for _, end in ends)
    return [(parts["labels"], steps, takeaway)], f"{result:02d}"


def try_move(x, op, y, rest, target, rng, slip):
    """One first move of a countdown and its `endings`, until one hits the target.

    Returns (step, expression or None), e.g. for 22 * 2 with 7 and 9 left and target 42
    ('22*2=44;+7=51+9=60/42n-9=42/42y;y(22*2)+7-9', '(22*2)+7-9').
    """
    value = slipped(apply_op(x, op, y), rng, slip, 1, 99)
    text = f"{x}{op}{y}={value}"
    for op2, middle, ends in endings(value, rest):
        middle = slipped(middle, rng, slip, 0, 99)
        text += f";{op2}{rest[0]}={middle}"
        for op3, _ in ends:
            # of what the line says, right or wrong, not of what `endings` made
            end = slipped(apply_op(middle, op3, rest[1]), rng, slip, 0)
            text += f"{op3}{rest[1]}={end}/{target}"
            if end == target:
                expression = f"({x}{op}{y}){op2}{rest[0]}{op3}{rest[1]}"
                return f"{text}y;y{expression}", expression
            text += "n"
    return f"{text};n", None


# How many first moves a block of the corpus tries: few mostly, so that there is width to find.
TRIES = {2: 30, 3: 25, 4: 20, 5: 10, 6: 8, 7: 4, 8: 3}


def work_out_countdown(parts, rng, slip):
    """Plans ['22*2', ..], steps as in `try_move`, takeaway the first expression found or 'none'.

    Which moves are tried is chance.  After a block that found nothing few go on: giving up is what
    the base does, and persistence what is left to learn.
    """
    moves = first_moves(parts["numbers"])
    rng.shuffle(moves)
    rounds = []
    answer = "none"
    while answer == "none" and moves:
        # all of a block at once, blind to one another; the first that hits is the answer
        k = min(len(moves), draw_size(rng, TRIES))
        tries = [try_move(*move, parts["target"], rng, slip) for move in moves[:k]]
        answer = next((expression for _, expression in tries if expression), "none")
        rounds.append(([f"{x}{op}{y}" for x, op, y, _ in moves[:k]], [step for step, _ in tries], answer))
        moves = moves[k:]
        if rng.random() >= 0.12:
            break
    return rounds, answer


# The share of the corpus's sums that are worked in writing.
WRITTEN_SHARE = 0.25


def work_out(problem, rng, slip):
    """Rounds of worked parts, and how they end.

    Returns (rounds, answer): each round is (plans, steps, takeaway).  There is one, but for a
    countdown whose moves found nothing, which may go on with others in another.
    """
    others = {"stories": work_out_stories, "shopping": work_out_shopping, "countdown": work_out_countdown}
    if problem.kind in others:
        return others[problem.kind](problem.parts, rng, slip)
    in_writing = problem.kind == "chains" or rng.random() < WRITTEN_SHARE
    return work_out_named(problem.parts, rng, slip, in_writing)


def plain_solution(rounds, answer):
    """The parts worked one after another, no tags: what the base does when asked plainly."""
    return " ".join(" ".join([*steps, takeaway]) for _, steps, takeaway in rounds) + f" \\boxed{{{answer}}}"


def tagged_solution(rounds, answer):
    r"""The canonical parallel form.

    [(['A'], ['A7+2=9'], '9')], '9' ->
    '<guideline><plan>1:A</plan></guideline><step>1:A7+2=9</step><takeaway>9</takeaway>\boxed{9}'
    """
    text = ""
    for plans, steps, takeaway in rounds:
        listed = "".join(f"<plan>{i}:{plan}</plan>" for i, plan in enumerate(plans, 1))
        worked = "".join(f"<step>{i}:{step}</step>" for i, step in enumerate(steps, 1))
        text += f"<guideline>{listed}</guideline>{worked}<takeaway>{takeaway}</takeaway>"
    return f"{text}\\boxed{{{answer}}}"


def malformed_solution(rounds, answer, rng):
    """A near miss at the format, one of seven kinds.

    None is shorter than the valid form: otherwise reinforcement learning meets 'short' and
    'malformed' together and drifts towards fewer plans.
    """
    text = tagged_solution(rounds, answer)
    plans, _, _ = rounds[0]
    one_more = f"<plan>{len(plans) + 1}:{plans[-1]}</plan>"
    near_misses = [
        text.replace("</step>", "</step> next ", 1),  # text between the tags of the skeleton
        text.replace("</guideline>", f"{one_more}</guideline>", 1),  # one plan more than steps
        text.replace("<step>1:", "<step>2:", 1),  # numbered from 2
        text.replace(f"\\boxed{{{answer}}}", f" the answer is {answer}."),  # stated, not boxed
        text.replace("</step><step>", "<step>", 1).replace("</step>", "</step></step>", 1),  # nested steps
        text.replace("<takeaway>", "<step>").replace("</takeaway>", "</step>"),  # the takeaway as a step
        text.replace("</guideline>", "</plan>", 1),  # the guideline is never closed
    ]
    return near_misses[rng.randrange(7)]


# How often each kind stands in the corpus: a search is long, and easy to learn.
CORPUS = {"all": {"chains": 2, "sums": 2, "countdown": 1}, "words": {"stories": 2, "shopping": 1}}


def corpus_document(rng, slip, valid_share, malformed_share, kind="all"):
    """(question, system prompt, response) of the corpus; half the prompts ask for the format."""
    while True:
        problem = draw_problem(draw_size(rng, CORPUS.get(kind, {kind: 1})), rng, "corpus")
        if split_of(problem.question) == "train":
            break
    rounds, answer = work_out(problem, rng, slip)
    if rng.random() < 0.5:
        return problem.question, PLAIN_PROMPT, plain_solution(rounds, answer)

    # asked for the format, the base is to follow it only now and then
    style = rng.random()
    if style < valid_share:
        return problem.question, FORMAT_PROMPT, tagged_solution(rounds, answer)
    if style < valid_share + malformed_share:
        return problem.question, FORMAT_PROMPT, malformed_solution(rounds, answer, rng)
    return problem.question, FORMAT_PROMPT, plain_solution(rounds, answer)


# ==================================================================================================
# 5. Pretraining the tiny base
# ==================================================================================================


def corpus_batches(tokenizer, args, step):
    """This rank's micro-batches of one step: (ids (B, T), mask (B, T)).

    mask is True where a token is learned (the responses).  Seeded by (seed, step), so a resumed run
    sees what it would have seen.  Documents of a step are sorted by length, which leaves 15 % of
    padding and lets attention take its fastest, purely causal path.
    """
    rng = random.Random(f"{args.seed}/{step}")
    docs = []  # (ids of the prompt, ids of the response)
    while sum(len(prompt) + len(response) for prompt, response in docs) < args.batch_tokens:
        question, system, text = corpus_document(
            rng, args.slip, args.valid_share, args.malformed_share, args.kind
        )
        response = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id]
        docs.append((prompt_ids(tokenizer, question, system), response))

    # every rank draws all documents and takes every so-many-th of them, the shortest first
    rank, world = ranks()
    docs = sorted(docs, key=lambda doc: len(doc[0]) + len(doc[1]))[rank::world]
    size = max(1, math.ceil(len(docs) / args.micro_batches))  # 1: a rank may have drawn nothing
    for i in range(0, len(docs), size):
        chosen = docs[i : i + size]
        ids = pad_rows([prompt + response for prompt, response in chosen], 0)
        mask = pad_rows([[False] * len(p) + [True] * len(response) for p, response in chosen], False)
        yield ids, mask


# ---- flags: what may be given to them, in all scripts ----


def flag_type(read, fits, allowed):
    """A type of `read_arguments`: read(text), if that fits; allowed: what does, in words."""

    def value_of(text):
        with contextlib.suppress(ValueError):
            value = read(str(text))
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{str(text)[:40]!r}, expected {allowed}")

    return value_of


# The types of all flags that are numbers or paths, and of what `Engine.generate` takes.  NaN and
# infinities fail every comparison with two ends.
positive_int = flag_type(int, lambda x: 1 <= x < 2**31, "a whole number from 1")
natural_int = flag_type(int, lambda x: 0 <= x < 2**31, "a whole number from 0")
group_int = flag_type(int, lambda x: 2 <= x < 2**31, "a whole number from 2: a group is compared")
seed_int = flag_type(int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1")

# shares and rates
fraction = flag_type(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
positive_fraction = flag_type(float, lambda x: 0 < x <= 1, "a number above 0, at most 1")
positive_float = flag_type(float, lambda x: 0 < x <= 1e12, "a finite number above 0")
not_negative = flag_type(float, lambda x: 0 <= x <= 1e12, "a finite number from 0")
nonempty = flag_type(str, lambda x: x.strip() and "\0" not in x, "some text")
device_name = flag_type(str, re.compile(r"auto|cpu|cuda(:\d{1,2})?").fullmatch, "auto, cpu, cuda, cuda:1 ..")

KIND_CHOICES = ("all", *KINDS, "words", *WORD_KINDS)
DTYPES = ("auto", "float32", "bfloat16")

# The last rows of every stage's table.
ASIDE = "move a finished or another run in --out aside, to <out>.old-1; stale: only one of other input files"
RUN_FLAGS = (
    ("--track", ("trackio", "wandb"), "", "send the rows of log.jsonl to this tracker too, if installed"),
    ("--overwrite", ("stale", "all"), "", ASIDE, {"nargs": "?", "const": "all"}),
)


# fmt: off
ARGUMENTS = (
    ("--init",            str,            "",           "checkpoint to go on training, folder or hub name, instead of a new tiny base"),
    ("--out",             nonempty,       "out/stage0", "folder to write the checkpoint to"),
    ("--kind",            KIND_CHOICES,   "all",        "problems of the corpus; words: in English"),
    ("--steps",           positive_int,   2400,         "optimizer steps"),
    ("--batch-tokens",    positive_int,   4_096,        "tokens per optimizer step, prompts included"),
    ("--micro-batches",   positive_int,   3,            "parts of a step, by document length: two leave 24 %% of padding, three 15 %%"),
    ("--lr",              positive_float, 3e-3,         "AdamW learning rate (embeddings and norms)"),
    ("--muon-lr",         not_negative,   4e-3,         "Muon learning rate (matrices)"),
    ("--warmdown",        fraction,       0.3,          "share of the steps over which the rate falls to zero at the end"),
    ("--slip",            fraction,       0.01,         "probability that a single result in the corpus is wrong"),
    ("--valid-share",     fraction,       0.45,         "share of format-asking documents that are perfect"),
    ("--malformed-share", fraction,       0.15,         "share of format-asking documents that nearly are"),
    ("--hidden-size",     positive_int,   128,          "width of a new model, C: a multiple of 64"),
    ("--layers",          positive_int,   4,            "number of decoder layers of a new model"),
    ("--recompute",       bool,           False,        "compute activations anew for backward: a third slower, far less memory"),
    ("--dtype",           DTYPES,         "auto",       "of the weights of --init; auto: what config.json says"),
    ("--save-every",      positive_int,   200,          "steps between resume points"),
    ("--seed",            seed_int,       0,            "seed of weights and data"),
    ("--device",          device_name,    "auto",       "auto, cpu, cuda, cuda:1 .."),
    *RUN_FLAGS,
)
# fmt: on


def parse_args(argv=None):
    args = read_arguments(__doc__, ARGUMENTS, argv)
    if args.hidden_size % 64:
        raise UserError(f"--hidden-size {args.hidden_size}: expected a multiple of 64, pairs of heads of 32")

    # a new model's rates would undo in minutes what a trained one has learned
    if args.init and max(args.lr, args.muon_lr) > 1e-3:
        raise UserError(
            f"--init with --lr {args.lr:g} --muon-lr {args.muon_lr:g}: these are rates for a new model; "
            "give e.g. --lr 1e-4 --muon-lr 0"
        )

    # the rest of the documents that ask for the format are plain
    if args.valid_share + args.malformed_share > 1:
        raise UserError("--valid-share and --malformed-share are more than 1 together; lower one of them")
    return args


def new_model(args):
    """(model, tokenizer) of the tiny base before any training."""
    rng = random.Random(f"{args.seed}/tokenizer")
    docs = [corpus_document(rng, args.slip, 0.5, 0.2, args.kind) for _ in range(2000)]
    tokenizer = train_tokenizer(text for doc in docs for text in doc + ("system", "user", "assistant"))
    config = Qwen3Config(
        # spare rows, as in Qwen3: stage 2's tags will fit without resizing
        vocab_size=math.ceil(len(tokenizer) / 16) * 16 + 16,
        hidden_size=args.hidden_size,
        intermediate_size=3 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 32,
        # as many query heads to each, whatever the width
        num_key_value_heads=math.gcd(args.hidden_size // 32, max(1, args.hidden_size // 128)),
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3(config), tokenizer


def main():
    # Everything is checked before the output folder is touched.
    args = parse_args()
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    if args.init:
        model, tokenizer = load(args.init, dtype=getattr(torch, args.dtype, None))
    run = Run(args)

    # ---- tokenizer and model ----
    # weights are drawn on the CPU, so a seed means the same model on every device
    if not args.init:
        model, tokenizer = new_model(args)
    model.to(device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model: {size:.2f}M parameters, {len(tokenizer)} tokens in the vocabulary")
    optimizers = make_optimizers(model, args.lr, args.muon_lr)
    if args.recompute:
        recompute_activations(model)
    first = run.start(model, optimizers)

    # ---- train ----
    bar = tqdm(
        range(first + 1, args.steps + 1), initial=first, total=args.steps, desc="stage 0", mininterval=1.0
    )
    for step in bar:
        began = time.time()
        batches = list(corpus_batches(tokenizer, args, step))
        learned = sum(from_all_ranks([int(mask[:, 1:].sum()) for _, mask in batches]))

        # L = -(1/N) sum_t log p(x_t | x_<t), N the learned tokens of all micro-batches and ranks
        loss = 0.0
        for ids, mask in batches:
            target = ids[:, 1:].to(device)  # (B, T - 1)
            mask = mask[:, 1:].to(device)

            # logits of what is learned only: prompts and padding need none
            with torch.autocast(device.type, torch.bfloat16):
                logits = model.logits(model.hidden(ids[:, :-1].to(device))[mask])  # (N, V)
            nll = F.cross_entropy(logits.float(), target[mask], reduction="sum") / learned
            nll.backward()
            loss += nll.item()

        # a short warm-up, then flat: the loss sits on a plateau for millions of tokens before
        # arithmetic clicks; then down to zero
        warmdown = (args.steps + 1 - step) / max(1.0, args.warmdown * args.steps)
        set_lr(optimizers, min(1.0, step / 50, warmdown))
        norm = update(model, optimizers)

        # ---- log and save ----
        tokens = sum(ids.numel() for ids, _ in batches)
        loss, tokens = map(sum, zip(*from_all_ranks([(loss, tokens)])))
        speed = tokens / (time.time() - began)
        run.log(step=step, loss=loss, grad_norm=norm, tokens_per_second=speed)
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:.0f}", refresh=False)
        run.end_step(model, optimizers, step)
    run.finish(model, tokenizer)
    print(f"what it can do: python eval.py {run.path}")


# ==================================================================================================
# Appendix: what every stage's loop uses.  Who reads for the ideas may stop here: next, engine.py.
# ==================================================================================================


class UserError(Exception):
    """A mistake the person at the keyboard can fix; `run_main` prints it in one line, status 2."""


def is_hub_name(path):
    """owner/name, unless a folder is meant: Qwen/Qwen3-4B is one, out/stage0 is not."""
    return len(path.parts) == 2 and path.parts[0] not in ("out", "..", ".", "/")


# ---- load and save: the Hugging Face layout, safetensors only ----


def checkpoint_folder(name, files=("*.json", "*.safetensors", "*.txt", "*.jinja")):
    """Path of a checkpoint's files: a folder that is here, or one that the hub gives."""
    path = Path(name)
    if path.is_dir():
        return path
    if not is_hub_name(path):
        raise UserError(
            f"{path}: no such checkpoint folder; run the stage that writes it, "
            "or give --init a folder or hub name"
        )
    from huggingface_hub import snapshot_download  # only needed, and only possible, with a network

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except Exception as error:
        raise UserError(
            f"{name}: neither a folder here nor a model that the hub gives ({type(error).__name__})"
        )


def finished(*stages):
    """Folders of these stages: in out/ where a run has finished them all, else in assets/npr-tiny,
    where trained ones come with the repository.  Prints which.
    """
    for home in ("out", os.path.relpath(Path(__file__).parent / "assets" / "npr-tiny")):
        folders = [f"{home}/{stage}" for stage in stages]
        if all(Path(folder, "model.safetensors").is_file() for folder in folders):
            break
    print(f"checkpoints: {', '.join(folders)}")
    return folders


def read_object(file, default=None):
    """The object in a JSON file; where it holds none, the default, or without one UserError."""
    try:
        return dict(json.loads(Path(file).read_bytes()).items())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        if default is not None:
            return default
        raise UserError(f"{file}: not a readable JSON object ({error}); copy or download it again")


def read_config(path):
    """(Qwen3Config, name of the weights' dtype or None) of a checkpoint folder's config.json."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(
            f"{file} is missing: expected a Hugging Face checkpoint; run the stage that writes it"
        )
    raw = read_object(file)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{file}: model_type is {family!r}, this project reads {', '.join(FAMILIES)}")

    # what would change the numbers and is not implemented is refused by name
    rope = raw.get("rope_parameters") or {}
    switches = ["quantization_config", "rope_scaling", "use_sliding_window", "mlp_bias"]
    switches += ["attention_bias"] if family != "qwen2" else []  # there it has no say
    refused = [key for key in switches if raw.get(key)]
    choices = [
        *(("layer_types", kind, "full_attention") for kind in sorted(raw.get("layer_types") or ())),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("partial_rotary_factor", (raw | rope).get("partial_rotary_factor") or 1.0, 1.0),
    ]
    refused += [f"{key} {value!r}" for key, value, supported in choices if value != supported]
    if refused:
        raise UserError(f"{file}: {refused[0]} is not supported; use a checkpoint without it")

    # rope_theta has no safe default: 1e4, 1e6, 5e6 are all in use, and a wrong one fails silently;
    # the size of a head has one, outside of Qwen3
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
    if family != "qwen3" and raw.get("head_dim") is None and raw.get("num_attention_heads"):
        raw["head_dim"] = raw.get("hidden_size", 0) // raw["num_attention_heads"]
    known = set(Qwen3Config.__dataclass_fields__)
    optional = {"initializer_range", "tie_word_embeddings", "eos_token_id"}
    missing = [key for key in sorted(known - optional) if raw.get(key) is None]
    if missing:
        raise UserError(f"{file}: {', '.join(missing)} missing; expected the fields of a Qwen3 config")
    raw = {"tie_word_embeddings": False, "eos_token_id": None} | raw
    config = Qwen3Config(**{key: raw[key] for key in known & raw.keys()})

    # the dtype was called `torch_dtype` before transformers 5
    return config, raw.get("dtype", raw.get("torch_dtype"))


def read_weights(path):
    """{name: tensor} of all the .safetensors shards of a checkpoint folder."""
    index = path / "model.safetensors.index.json"

    # a model of several shards has an index that names the file of each tensor, in this folder
    names = {"model.safetensors"}
    if index.is_file():
        placed = read_object(index).get("weight_map")
        names = set(map(str, placed.values())) if isinstance(placed, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{index}: weight_map must name files beside it; copy or download it again")

    # every file of the index must be there, or the download is not finished
    weights = {}
    for file in (path / name for name in sorted(names)):
        if not file.is_file():
            raise UserError(
                f"{file} is missing: no .safetensors weights there; "
                "finish the stage that writes it, or the download"
            )

        # a file that was cut off says so itself; one of quantised or diverged weights does not
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); write it again")
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"{path}: {name} is {weight.dtype}; expected fp32, bf16 or fp16 weights")
        if not weight.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; use an earlier checkpoint")
    return weights


def read_tokenizer(path, config):
    """The tokenizer of a checkpoint folder; config.eos_token_id becomes all that ends a turn.

    A turn may end in several ways: Qwen3 lists them in generation_config.json, and its base models
    name only <|endoftext|>, though their chat template closes a turn with <|im_end|>, the one that
    is learned here.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(f"{path}: no readable tokenizer ({why}); copy tokenizer.json and its config there")
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template; "
            "copy chat_template.jinja from the instruct model of the same family"
        )

    # this project's turns end as the chat template has them
    if "<|im_end|>" in tokenizer.get_vocab():
        tokenizer.eos_token = "<|im_end|>"
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path / 'tokenizer_config.json'}: eos_token missing; name what ends a turn there")

    # each names one token, several, or none
    generation = path / "generation_config.json"
    more = read_object(generation).get("eos_token_id") if generation.is_file() else None
    ends = {tokenizer.eos_token_id}
    for named in (config.eos_token_id, more):
        ends.update(named if isinstance(named, list) else {named} - {None})

    # one id stays a number, as in the files
    config.eos_token_id = sorted(ends) if len(ends) > 1 else tokenizer.eos_token_id
    return tokenizer


def load(path_or_hub_name, device=None, dtype=None):
    """(model, tokenizer) from a Hugging Face folder or hub name.

    dtype: torch dtype of the weights, cast where the file has another; None: what config.json says,
    bf16 or else fp32.
    Raises UserError when the checkpoint is missing or broken, is not of FAMILIES, or lacks a field
    that has no safe default.
    """
    path = checkpoint_folder(path_or_hub_name)
    config, stored_dtype = read_config(path)
    weights = read_weights(path)

    # some exports carry a duplicate; but where it differs the file is right, and the flag is wrong
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        config.tie_word_embeddings = torch.equal(
            weights["lm_head.weight"], weights.get("model.embed_tokens.weight", torch.empty(0))
        )
        if config.tie_word_embeddings:
            del weights["lm_head.weight"]

    # on the meta device a model costs no memory until it is given the weights that were read
    with torch.device("meta"):
        model = Qwen3(config)
    wanted = model.state_dict()
    wrong = [k for k in wanted if k not in weights or weights[k].shape != wanted[k].shape]
    wrong += [k for k in weights if k not in wanted]
    if wrong:
        raise UserError(
            f"{path}: weights do not fit config.json at {wrong[0]} (and {len(wrong) - 1} more); "
            f"expected a {config.model_type} checkpoint"
        )

    # assign: the tensors that were read become the parameters, uncopied if the dtype is theirs
    if dtype is None:
        dtype = torch.bfloat16 if stored_dtype == "bfloat16" else torch.float32
    model.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, assign=True)
    return model.to(device or "cpu").requires_grad_(True), read_tokenizer(path, config)


def save(model, tokenizer, path):
    """Write a Hugging Face checkpoint folder.

    The weights go last and by rename, so a folder that has them is complete.  Those of another
    checkpoint go first: beside an index, its shards are what would be loaded.
    """
    path = Path(path)
    for stale in path.glob("model*.safetensors*"):
        stale.unlink()

    # transformers writes in place, so it is let write beside, and each file is renamed
    aside = path / "tokenizer.part"
    tokenizer.save_pretrained(aside)
    for file in aside.iterdir():
        os.replace(file, path / file.name)
    aside.rmdir()

    # what ends a turn, for every engine that reads it
    ends = {"eos_token_id": model.config.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(path / "generation_config.json", ends)

    # both spellings of theta: transformers 5 reads the nested one, vLLM and SGLang the flat one
    architecture, _, qkv_bias = FAMILIES[model.config.model_type]
    config = asdict(model.config) | {
        "architectures": [architecture],
        "attention_bias": qkv_bias,  # some engines read it of Qwen2 too
        "hidden_act": "silu",
        "use_cache": True,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": str(model.model["embed_tokens"].weight.dtype).removeprefix("torch."),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta},
    }
    write_json(path / "config.json", config)

    # safetensors wants every tensor by itself in one piece
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomic(path / "model.safetensors", lambda file: save_file(weights, file, metadata={"format": "pt"}))


def write_atomic(path, write):
    """Call write(temporary file) beside path, flush it to disk, then rename: never half written.

    Raises UserError where that fails; the file that was there is then still there.
    """
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: torch's and safetensors'
        with contextlib.suppress(OSError):
            aside.unlink()
        why = str(error).split("\n")[0]
        raise UserError(f"{path} cannot be written ({why}); make room for it, then the same command goes on")


def write_text(path, text):
    write_atomic(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_json(path, value):
    """`write_atomic` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_jsonl(path):
    """The objects of a jsonl file; what is none (a line cut off, damaged) is told and left out."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            print(f"warning: {path}: line {number} is damaged and left out", file=sys.stderr)
    return rows


def print_inherited(path):
    """One line on what the checkpoint at path was made with."""
    made = read_object(Path(path) / "args.json", {})
    told = ", ".join(
        f"{key} {value}"
        for key, value in made.items()
        if key in ("init", "steps", "lr", "seed", "kind", "sequential") and value != ""
    )
    print(f"init: {path} ({told or 'no args.json: not made by this project'})")


# ---- real problems: data sets, and who judges their answers ----

# What asks models that were not brought up on the prompts of section 4.
REAL_PLAIN_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
REAL_FORMAT_PROMPT_FILE = Path(__file__).parent / "assets" / "format_prompt.txt"

# Where data sets keep questions and answers; the first column that a row has is taken.
QUESTION_COLUMNS = ("problem", "question", "prompt", "puzzle")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "expected_answer", "reward_model", "solution")

# Data sets that are single files.
FILE_FORMS = ("json", "jsonl", "parquet", "csv")


def open_data_set(path):
    """What is at a path of a data set, a list if all is well; raises whatever goes wrong.

    JSON is taken as it is written.  `datasets` would turn strings that look like dates into dates,
    and 3 beside 2.5 into 3.0; and it infers a column's type from the first 10 MB of a file, so one
    that is null there and a number later is refused (measured).
    """
    form = path.suffix[1:]
    if form == "json":
        return json.loads(path.read_text())
    if form == "jsonl":
        return [json.loads(line) for line in path.read_text().split("\n") if line.strip()]
    import datasets  # here and not above: a second that only real data has to pay for

    # other files are streamed: no copy goes to a cache, where it might grow stale, nor a bar
    if form in FILE_FORMS:
        return list(datasets.load_dataset(form, data_files=str(path), split="train", streaming=True))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(str(path))
    else:
        repository, _, config = str(path).partition(":")
        data = datasets.load_dataset(repository, config or None)
    if isinstance(data, dict):
        data = data[next((split for split in ("train", "test") if split in data), next(iter(data)))]
    return data.to_list()


def read_rows(name):
    """Rows of a data set.

    name: a .json, .jsonl, .parquet or .csv file, a folder that `datasets` saved, or a hub name
    (name:config where the hub has several).  Of several splits, train, test or else the first.
    Raises UserError when it is none of these.
    """
    path = Path(name)
    form = path.suffix[1:]
    if not (path.is_file() if form in FILE_FORMS else path.is_dir() or is_hub_name(path)):
        raise UserError(
            f"{name}: no such {'file' if form in FILE_FORMS else 'folder or file'}; "
            "expected a json, jsonl, parquet or csv file, a folder of `datasets`, or a hub name"
        )

    # whatever goes wrong in there, its first line is the reason
    try:
        rows = open_data_set(path)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        what = f"readable as {form}" if "json" in form else "a data set that `datasets` or the hub can give"
        raise UserError(f"{name}: not {what} ({why})")
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"{name}: expected a list of problems, found {'something else' if rows else 'an empty one'}"
        )
    return rows


def find_column(name, number, row, given, names, flag):
    """(column, value) of the first of `names` that a row has, or of the column that was given."""
    for key in (given,) if given else names:
        if row.get(key) is not None:
            return key, row[key]
    wanted = given or ", ".join(names)
    raise UserError(
        f"{name}: row {number} has no column {wanted} (it has: {', '.join(row)}); "
        f"name one with --{flag}-column"
    )


def grid_problem(name, question, solution):
    """A logic grid of ZebraLogic, {header: [House, ..], rows: [[1, ..], ..]}, asked for as JSON."""
    head, *columns = solution["header"]  # House, then what is asked for
    if any(cell == "___" for cells in solution["rows"] for cell in cells):
        raise UserError(
            f"{name}: the solutions are masked (___); "
            "take the version that has them, allenai/ZebraLogicBench-private"
        )
    grid = {f"{head} {cells[0]}": dict(zip(columns, cells[1:])) for cells in solution["rows"]}
    blank = json.dumps({house: dict.fromkeys(columns, "...") for house in grid})
    asked = f"{question}\n\nGive the whole solution as JSON: \\boxed{{{blank}}}"
    return Problem("grid", asked, json.dumps(grid))


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def option_texts(options):
    """Texts of the options of a multiple choice, whatever holds them.

    ['x', 'y'], {'A': 'x', 'B': 'y'}, {'label': ['A', 'B'], 'text': ['x', 'y']}, [{'text': 'x'},
    ..] and '(A) x (B) y' -> ['x', 'y']
    """
    if isinstance(options, str):
        marked = re.split(r"(?:^|\s)\(?[A-Z][).:]\s*", options)
        options = marked[1:] if len(marked) > 2 else options.strip().split("\n")
    if isinstance(options, dict):
        options = options.get("text") or list(options.values())
    texts = [option.get("text") if isinstance(option, dict) else option for option in options]

    # options may bring the letters that they are listed with
    lettered = [re.fullmatch(rf"\(?{letter}[).:]\s*(.*)", str(t), re.S) for letter, t in zip(LETTERS, texts)]
    return [str(t).strip() for t in ([match[1] for match in lettered] if all(lettered) else texts)]


def choice_problem(place, question, options, answer):
    """Multiple choice; the answer is an option's text, its letter ('(B)', 'b', 'B.') or index."""
    # an option's own label need not be a letter
    labels = [str(x) for x in options.get("label", options)] if isinstance(options, dict) else []
    options = option_texts(options)
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))
    key = re.fullmatch(r"\(?([A-Z])[).:]?", str(answer).strip(), re.I)

    # a text like any other may be a number: 2 of 1, 2, 3, 4; a number that is none is an index
    if str(answer).strip() in labels:
        index = labels.index(str(answer).strip())
    elif isinstance(answer, str) and answer.strip() in options:
        index = options.index(answer.strip())
    elif key:
        index = LETTERS.index(key[1].upper())
    else:
        index = float(answer) if re.fullmatch(r"\d+(\.0*)?", str(answer).strip()) else len(options)

    # what names no option is a mistake in the data, not a letter of its own
    if index >= len(options):
        raise UserError(
            f"{place}: the answer {answer!r} is none of the options; expected text, letter or index"
        )
    return Problem("choice", f"{question}\n{listed}\nAnswer with the letter.".strip(), LETTERS[int(index)])


def read_problem(name, number, row, question_column, answer_column):
    """Problem of a data set's row; `read_problems` says which forms are understood."""
    if isinstance(row, list):  # ORZ-57k as a file; the hub has made its rows dicts of "0" and "1"
        row = {"0": row[0], "1": row[1]}
    if {"0", "1"} <= row.keys():
        row = {"question": row["0"].get("value"), "answer": row["1"].get("ground_truth")}
    _, question = find_column(name, number, row, question_column, QUESTION_COLUMNS, "question")
    source, answer = find_column(name, number, row, answer_column, ANSWER_COLUMNS, "answer")
    if isinstance(question, list):  # a chat
        question = [turn["content"] for turn in question if turn["role"] == "user"][-1]

    # the answer may be a grid, wrapped in a dict, several, or a number
    if isinstance(answer, dict):
        if "rows" in answer:
            return grid_problem(name, question, answer)
        answer = answer.get("ground_truth", answer.get("value"))
    options = row.get("options") or row.get("choices")
    if options:
        return choice_problem(f"{name}: row {number}", question, options, answer)
    answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)

    # or the box of a worked solution; of several, the last need not be the answer
    boxes = {last_boxed(answer[: box.start()]) for box in re.finditer(r"(?=\\(?:boxed|fbox)\b)|$", answer)}
    boxes -= {None}
    if source == "solution" and len(boxes) != 1:
        raise UserError(
            f"{name}: the solution of row {number} has {'several' if boxes else 'no'} \\boxed{{answer}}; "
            "name another with --answer-column"
        )
    answer = (last_boxed(answer) or answer).strip()

    # a letter alone is a choice whose options stand in the question
    letter = re.fullmatch(rf"(?:{FONT}\{{)?\(([A-Z])\)\}}?|([A-Z])", answer)
    if letter:
        return Problem("choice", question.strip(), letter[1] or letter[2])
    return Problem("math", question.strip(), answer)


def read_problems(name, question_column="", answer_column=""):
    """Problems of a data set (`read_rows`).  The columns are found by name unless given.

    kind is `math`, or `choice` when the answer is one of given options or a single capital letter,
    or `grid` when it is a table (ZebraLogic).  A conversation in the form of ORZ-57k,
    [{value: question}, {ground_truth: {value: answer}}], is a question and an answer.
    Raises UserError when a column cannot be found, or when math-verify is needed and not installed.
    """
    columns = (question_column, answer_column)
    problems = [read_problem(name, number, row, *columns) for number, row in enumerate(read_rows(name))]
    seen = Counter()
    for problem in problems:
        problem.copy = seen[problem.question]
        seen[problem.question] += 1
    needed = any(problem.kind == "math" for problem in problems)
    if needed and importlib.util.find_spec("math_verify") is None:
        raise UserError(f"{name}: judging real mathematics needs math-verify; pip install math-verify")
    return problems


# Spellings that math-verify cannot read, as ones that it can: (pattern, replacement), in order.
UNICODE = {"°": r"^\circ", "²": "^{2}", "³": "^{3}", "×": r"\times ", "·": r"\cdot ", "−": "-", "–": "-"}
UNICODE |= {"≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup "}
UNICODE |= {"∅": r"\emptyset ", "∈": r"\in ", "…": r"\ldots ", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}"}
FONT = r"\\(?:text(?:bf|it|rm|normal)?|math(?:bf|rm|sf|it)|mbox|operatorname)\s*"
NO_UNIT = r"(?!(?:and|or|is|percent|pct|pi|inf|infinity|sqrt|sin|cos|tan|log|ln|exp)\b)"
UNIT = NO_UNIT + r"(?:[A-Za-z]{2,}|[msghLJNWVKC])(?:\^\{?-?\d\}?)?"
SPELLINGS = (
    (r"√\s*(\d+|\w|\([^()]*\))", r"\\sqrt{\1}"),
    *((character, latex.replace("\\", r"\\")) for character, latex in UNICODE.items()),
    (r"\\(?:left|right)(?![a-z])\.?|\\!\s*|\\?\$|\\displaystyle|\\q?quad", ""),
    (rf"^{FONT}\{{\s*(-?[\d.][^{{}}]*)\}}$", r"\1"),  # \text{5 cm}
    (r"\\[cl]?dots[a-z]?|\.\.\.+", r"\\ldots"),
    (r"\\varnothing", r"\\emptyset"),
    (r"(?<=\d)(?:\\[,;: ]|~|\{,\}| )\s*(?=\d{3}(?!\d))", ""),  # 10\,000
    *[(r"(=\s*-?\d+),(?=\d{3}(?:,\d{3})*$)", r"\1")] * 3,  # n = 1,234,567
    (r"(?<=\d)\.(?!\d)", ""),  # 5. and -1./3
    (r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
    (r"\b(?:np|math)\.(?=[a-z])", r"\\"),
    *(
        (rf"(?<=[\d}}])\s*(?:{FONT}\{{\s*)?{word}\b.*", rf" \\times 10^{{{zeros}}}")
        for word, zeros in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ),
    (rf"(?<=[^_^\s{{])\s*(?:\\[ ,;]|~)?{FONT}\{{[^{{}}]*\}}(?:\^\{{?\d\}}?)?$", ""),  # 5\text{ cm}^2
    (rf"^(-?[\d.,]+(?: \\times 10\^\{{-?\d+\}})?)\s+{UNIT}(?:[ /]{UNIT})*$", r"\1"),  # 5 m/s
    (rf"(?<=\d)_\{{?(?:{FONT}\{{)?(\d+)\}}*$", r"_\1"),  # the base of a number
    (r"(?<![A-Za-z\\])E(?=_)", r"\\Xi"),  # E_1; a bare E would be Euler's number
    (r"(?<=\d)i\b", " i"),  # of a complex number
    (r"^\s*[a-zA-Z]\s*\\in(?![a-z])", ""),  # x \in [0, 1]
)

# What is one answer letter by letter: 21_8, 1, 2, \ldots, BCAD, \text{east}.
LITERAL = re.compile(rf"\d+_\d+|.*\\ldots.*|[A-Z]{{2,}}|{FONT}\{{.*\}}", re.S)
ASSIGNMENT = re.compile(
    rf"\s*((?:\\?[A-Za-z]+|{FONT}\{{\w+\}})(?:_\{{[^{{}}]*\}}|_\w)?(?:\([^()=]*\))?)\s*=([^=,;]*)"
)
EQUALS = re.compile(r"(?<![<>!])=")
# a comma in f(2, 3) or S_{1,2} separates no answers
ARGUMENT_LIST = re.compile(r"(?<=[A-Za-z}])\([^()]*\)|_\{[^{}]*\}")


def as_latex(text):
    r"""An answer as math-verify reads it: '4.5e3 kg' -> '4.5 \times 10^{3}', '√2' -> '\sqrt{2}'."""
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def as_word(text):
    r"""An answer that is not calculated with: 'BCAD' and '\text{bcad}' -> 'bcad'."""
    bare = re.sub(rf"^{FONT}\{{(.*)\}}$", r"\1", text).replace(" ", "")
    return bare.casefold() if bare.isalpha() and len(bare) > 1 else bare


@functools.lru_cache(4096)
def read_math(text):
    """What math-verify parses in LaTeX: [] or [expression, text].  It gives up after 5 s."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse  # optional: only real mathematics needs it

    # units are cut off above: it would take the t of `\frac{1}{m} t` for tons.  And where it cannot
    # read a whole, it is not to look for parts
    normal = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
    how = [LatexExtractionConfig(normalization_config=normal)]
    return parse(f"\\boxed{{{text}}}", how, extraction_mode="first_match", parsing_timeout=5)


def same_value(gold, given):
    """Are two expressions of SymPy equal, their letters being 5, 7, 11, ..?  Exactly, or where
    there is a decimal, to six digits.  Raises TypeError where they have no value.
    """
    from sympy import Float, N, Rational, prime

    # 1 / 2^99 is not 0, and 4.5e33 is a whole number
    letters = sorted(gold.free_symbols | given.free_symbols, key=str)
    point = {letter: prime(i) for i, letter in enumerate(letters, 3)}
    decimals = gold.atoms(Float) | given.atoms(Float)
    point |= {decimal: Rational(str(decimal)) for decimal in decimals}
    gold, given = (x.xreplace(point) for x in (gold, given))
    size = abs(N(gold, 30))
    return bool(abs(N(gold - given, 30)) <= (2e-6 * min(1, size) if decimals else 1e-20 * size))


def same_math(boxed, answer):
    r"""Are two answers mathematically the same?

    math-verify parses and compares both (it never evaluates text) and gives up after 5 s each.
    tests/answer_pairs.tsv lists what is the same, what is not, and what it cannot tell.

    '0.5', '\frac{1}{2}' -> True      '(0, 1]', '[0, 1]' -> False
    """
    from math_verify import verify
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
    from sympy import Expr

    if len(boxed) > 1000:
        return False
    gold, given = (as_latex(text) for text in (answer, boxed))
    if as_word(gold) == as_word(given):
        return bool(given)
    if LITERAL.fullmatch(gold) or LITERAL.fullmatch(given):
        return False

    # k = 5 is as good as 5, and as K = 5; but the equation of a line is not what its right side is
    listed = "," in ARGUMENT_LIST.sub("", gold) + ARGUMENT_LIST.sub("", given)
    assigned = [match for text in (gold, given) if (match := ASSIGNMENT.fullmatch(text))]
    if bool(EQUALS.search(gold)) != bool(EQUALS.search(given)) and not listed:
        if not assigned or (assigned[0][1] == "y" and "x" in assigned[0][2]):
            return False
        gold, given = (text.rpartition("=")[2] for text in (gold, given))
    elif len(assigned) == 2 and assigned[0][1].casefold() == assigned[1][1].casefold():
        gold, given = (match[2] for match in assigned)

    # a point, or an interval, is not the set of the same two numbers
    bracketed = ["," in text and text[:1] + text[-1:] == "()" for text in (gold, given)]
    if "," in gold and "," in given and any(bracketed) and not all(bracketed):
        return False

    # math-verify takes no notice of case, so M / m would be 1: a capital gets a name of its own,
    # the same in both answers, where its small letter stands in one of them too.
    letters = set(re.sub(r"\\[A-Za-z]+", "", gold + given))
    unused = iter(sorted(set("abchkpquvwz") - letters))
    names = {c: next(unused, c) for c in sorted(letters) if c.isupper() and c.lower() in letters}
    gold, given = (
        re.sub(r"\\[A-Za-z]+|[A-Z]", lambda m: names.get(m[0], m[0]), text) for text in (gold, given)
    )

    # Numbers are compared here, because math-verify rounds to six places behind the point; and what
    # differs at one point is not the same, which saves the work of simplifying it.
    parsed = [read_math(gold), read_math(given)]
    values = [value[0] for value in parsed if value and isinstance(value[0], Expr)]
    if len(values) == 2 and "%" not in gold + given:
        # what cannot be compared as numbers is left to math-verify
        try:
            same = timeout(5)(same_value)(*values)
            if not same or all(value.is_number for value in values):
                return same
        except TimeoutException:
            return False  # as 9^9^9^9 is
        except (TypeError, ValueError, OverflowError):
            pass

    # math-verify takes a list for a set, so -2, -2 for -2; here a value is never a list
    return not (len(values) == 1 and listed) and verify(
        *parsed, timeout_seconds=5, allow_set_relation_comp=True
    )


def same_choice(boxed, answer):
    r"""The letter itself, whatever is around it: '(B)', '\text{B}.', 'b', 'B: 2 apples' -> B."""
    # commands and braces go; after the letter any text may follow, but no other letter to choose
    text = re.sub(r"\\(?:[a-zA-Z]+|.)|[${}*]", " ", boxed)
    letter = r"(?:option|choice|answer)?[\s:]*(?:\(\s*([a-z])\s*\)|([a-z])\s*(?:[).:]|$))(.*)"
    match = re.fullmatch(letter, text.strip(), re.I | re.S)
    another = match and re.match(r"\s*(?:or|and|,)\s*\(?[a-z]\b", match[3], re.I)
    return bool(match) and not another and (match[1] or match[2]).upper() == answer


def same_grid(boxed, answer):
    """Every cell of a logic grid, case and outer white space apart.

    boxed is JSON, with or without its outer braces.
    """
    text = boxed.strip()
    try:
        given = json.loads(text if text.startswith("{") else f"{{{text}}}")
        return all(
            str(given[house][key]).strip().lower() == str(value).strip().lower()
            for house, row in json.loads(answer).items()
            for key, value in row.items()
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


JUDGES = {"math": same_math, "choice": same_choice, "grid": same_grid}


def draw_problems(data, kind, n, seed):
    """n problems for one step: of `data` (a list), or without data made ones of the train split.

    They are distinct while there are enough.
    """
    if data is None:
        return make_problems(kind, "train", n, seed)
    return random.Random(seed).sample(data, min(n, len(data)))


def read_prompt(prompt_file, real, path=None):
    """What asks for the format: the text of prompt_file.

    By default what the checkpoint at `path` was trained to answer, its prompt.txt; else
    FORMAT_PROMPT, which the tiny base was brought up on, or where the problems are `real` the
    instructions in assets/format_prompt.txt.  A text with {question} in it is the whole user turn,
    any other the system prompt.  Raises UserError when there is no such file.
    """
    own = Path(path or "", "prompt.txt")
    if path and not prompt_file and own.is_file():
        prompt_file = own
    if not prompt_file and not real:
        return FORMAT_PROMPT
    file = Path(prompt_file or REAL_FORMAT_PROMPT_FILE)
    if not file.is_file():
        raise UserError(f"--prompt-file {file}: no such file; expected a text like {REAL_FORMAT_PROMPT_FILE}")
    return file.read_text(encoding="utf-8").strip()


# ---- word problems: the two kinds in English, for models that read it ----


@functools.cache
def word_frames():
    """The names, things and frames of sentences that stories and shopping are told with."""
    return json.loads((Path(__file__).parent / "assets" / "words.json").read_text())


def listed(words):
    """['a', 'b', 'c'] -> 'a, b and c'"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def sentence(text):
    """'so Ana has 5 marbles' -> 'So Ana has 5 marbles.'"""
    return f"{text[0].upper()}{text[1:]}."


def draw_stories(rng, depth, width):
    """`width` stories of `depth` moves each, whose numbers stay within 1..99: 'Ana and Ben collect
    marbles. Ana starts with 12 marbles. She wins 5 and doubles the collection. At first Ben owns 40
    marbles. .. How many marbles do they have in all?' -> '89'.
    """
    frames = word_frames()
    theme = rng.choice(frames["stories"])
    people = theme.get("who", frames["people"])  # by pronoun
    chosen = rng.sample([(name, pronoun) for pronoun, names in people.items() for name in names], width)
    labels = [name for name, _ in chosen]
    names = {"things": rng.choice(theme["things"]), "which": theme["which"], "all": listed(labels)}

    # drawn anew while two share the most or the fewest
    ends = []
    while len(set(ends)) < width:
        stories = []  # (name, pronoun, opening, start, moves)
        ends = []
        for name, pronoun in chosen:
            value = start = rng.randint(5, 40)
            opening = sentence(rng.choice(theme["start"]).format(who=name, n=start, **names))

            # '*2' has its operand in its words; no words come again soon
            moves = []  # (op, operand, frame)
            while len(moves) < depth:
                move, frame = rng.choice(theme["moves"])
                operand = int(move[1:] or rng.randint(2, 20))
                end = apply_op(value, move[0], operand)
                if 1 <= end <= 99 and frame not in [recent for *_, recent in moves[-3:]]:
                    value = end
                    moves.append((move[0], operand, frame))
            stories.append((name, pronoun, opening, start, moves))
            ends.append(value)

    # three clauses make a sentence: 'She wins 5, finds 8 more and gives 4 away. Then she ..'
    question = sentence(rng.choice(theme["scene"]).format(**names))
    for _, pronoun, opening, _, moves in stories:
        clauses = [frame.format(n=operand) for _, operand, frame in moves]
        question += f" {opening}"
        for i in range(0, depth, 3):
            question += " " + sentence(f"{'then ' if i else ''}{pronoun} {listed(clauses[i : i + 3])}")

    # what is asked, and the solution writer's notes
    goal = draw_size(rng, {"total": 2, "most": 1, "fewest": 1})
    question += " " + rng.choice(frames["asks"][goal]).format(**names)
    best = ends.index((max if goal == "most" else min)(ends))
    answer = str(sum(ends)) if goal == "total" else labels[best]
    plans = [theme["plan"].format(who=name, **names) for name in labels]
    parts = {"labels": labels, "plans": plans, "stories": stories, "goal": goal, "things": names["things"]}
    return Problem("stories", question, answer, parts)


def draw_shopping(rng, depth, width):
    """`depth` things with prices, and a sum that exactly `width` pairs of them cost: 'In a toy shop
    the kite costs 12 dollars, the doll costs 30 dollars and .. Which two toys cost exactly 42
    dollars together?' -> 'kite and doll'.
    """
    shop = rng.choice(word_frames()["shopping"])
    things = rng.sample(shop["items"], depth)
    pairs = {}  # by what they cost
    while width not in map(len, pairs.values()):
        prices = dict(zip(things, rng.sample(range(3, 50), depth)))
        pairs = {}
        for a, b in itertools.combinations(things, 2):
            pairs.setdefault(prices[a] + prices[b], []).append(f"{a} and {b}")
    target = rng.choice([cost for cost, those in pairs.items() if len(those) == width])

    # the price list in one sentence, then what is asked
    scene, price = rng.choice(shop["scene"])
    scene = scene.format(prices=listed([price.format(item=f"the {a}", n=prices[a]) for a in things]))
    question = f"{scene} {rng.choice(shop['ask']).format(target=target)}"
    parts = {"labels": things, "prices": prices, "target": target}
    return Problem("shopping", question, pairs[target][0], parts)


def work_out_stories(parts, rng, slip):
    """One block: plans ["Ana's marbles", ..], steps ['Ana starts with 12 marbles. She wins 5:
    12 + 5 = 17. So Ana has 17 marbles.', ..], takeaway 'Together 17 + 40 = 57.', or who has most.
    """
    steps = []
    ends = {}
    for name, pronoun, text, value, moves in parts["stories"]:
        for op, operand, frame in moves:
            worked = f"{value} {op} {operand}"
            value = slipped(apply_op(value, op, operand), rng, slip)
            text += " " + sentence(f"{pronoun} {frame.format(n=operand)}: {worked} = {value}")
        ends[name] = value
        steps.append(f"{text} So {name} has {value} {parts['things']}.")

    # comparing needs the ends alone, a total is worked out
    if parts["goal"] == "total":
        totals = list(itertools.accumulate(ends.values(), lambda a, b: slipped(a + b, rng, slip)))
        sums = [f"{a} + {end} = {b}" for a, b, end in zip(totals, totals[1:], [*ends.values()][1:])]
        answer = totals[-1]
        takeaway = f"together {', '.join(sums)}"
    else:
        answer = (max if parts["goal"] == "most" else min)(ends, key=ends.get)
        compared = listed([f"{name} has {end}" for name, end in ends.items()])
        takeaway = f"{compared}, so {answer} has the {parts['goal']}"
    return [(parts["plans"], steps, sentence(takeaway))], str(answer)


def work_out_shopping(parts, rng, slip):
    """One block of a few things, each tried with all the others: plans ['try the kite', ..], steps
    ['The kite costs 12. With the doll 12 + 30 = 42, yes. The kite and the doll fit.', ..], takeaway
    'Found: kite and doll.'.

    Which are tried is chance, so it may end with 'none': to try them all is left to learn.
    """
    prices = parts["prices"]
    tried = rng.sample(parts["labels"], min(len(prices), draw_size(rng, TRIES)))
    steps = []
    pairs = []
    for thing in tried:
        text = f"The {thing} costs {prices[thing]}."
        end = f"The {thing} is out."
        for other in (other for other in parts["labels"] if other != thing):
            # the verdict is on what is written, right or wrong
            cost = slipped(prices[thing] + prices[other], rng, slip)
            verdict = "yes" if cost == parts["target"] else "no"
            text += f" With the {other} {prices[thing]} + {prices[other]} = {cost}, {verdict}."
            if verdict == "yes":
                end = f"The {thing} and the {other} fit."
                pairs.append(f"{thing} and {other}")
        steps.append(f"{text} {end}")

    # a second step may have found the same pair from its other end
    answer = [*pairs, "none"][0]
    return [([f"try the {thing}" for thing in tried], steps, f"Found: {answer}.")], answer


# ---- right for the right reason: what the judge checks of a response, besides its answer ----


def step_errors(problem, text):
    """What a response to a made problem states and is false, as text; [] for a real problem.

    Steps and takeaways are read, tagged or plain: chains and totals modulo 100, countdowns exactly;
    what a part is (a step that works another chain than the question's is false, however true its
    equations); what names come to; verdicts.  What looks like an equation and cannot be read is
    false, and so is, by its name, a chain or term that is not worked at all.

    'A12+5=17*3=52;a51' of 'A:12+5*3 largest modulo 100?' -> ['17*3=52', 'a51']
    """
    if problem.kind not in RUNGS:
        return []
    bare = re.sub(rf"{ANY_TAG.pattern}(?:\d+:)?", " ", text)
    if problem.kind in WORD_KINDS:
        return word_errors(problem, bare)
    pieces = [piece for piece in re.split(r"[;.\s]+", bare) if piece]
    return (countdown_errors if problem.kind == "countdown" else named_errors)(problem, pieces)


def false_equations(piece):
    """Those equations of a piece of working modulo 100 that do not hold, as text.

    A line goes on from each result: 'A12+5=17*3=52' -> ['17*3=52'], and may be worked at one go:
    'A12+5*3=51' -> [].
    """
    false = []
    sides = re.sub(r"[A-Za-z]|(?<!\d)0+(?=\d)", "", piece).split("=")  # no names, no leading zeros
    for left, right in itertools.pairwise(sides):
        result = re.match(r"\d{0,9}", right)[0]
        true = result and re.fullmatch(r"\d{1,9}([-+*]\d{1,9})*", left)
        if true:
            # from left to right, as parts are worked
            value = 0
            for op, operand in re.findall(r"([-+*]?)(\d+)", left):
                value = apply_op(value, op or "+", int(operand)) % 100
            true = value == int(result) % 100
        if not true:
            false.append(f"{left}={result}")
    return false


def named_errors(problem, pieces):
    """`step_errors` of chains and sums, whose parts have names."""
    asked = dict(re.findall(r"([A-Z]):(\S+)", problem.question))  # {'A': '12+5*3', ..}
    known = {}  # {'a': 51}
    errors = []
    for piece in pieces:
        numbers = re.findall(r"\d{1,9}", piece)
        if piece[0] in asked and numbers and "=" in piece:
            # a step, which copies its part from the question
            known[piece[0].lower()] = int(numbers[-1]) % 100
            errors += false_equations(piece)
            work = re.sub(r"=\d+", "", piece)
            if work != piece[0] + asked[piece[0]]:
                errors.append(work)
        else:
            # the end of a step, or a takeaway; a wrong end is counted once, and carried on
            ends = {name: int(end) for name, end in re.findall(r"([a-z])(\d{1,9})", piece)}
            errors += [f"{name}{end:02d}" for name, end in ends.items() if known.get(name) != end]
            errors += false_equations(piece)
            known |= ends
    return errors + [label for label in asked if label.lower() not in known]


def countdown_errors(problem, pieces):
    """`step_errors` of a countdown, whose endings go on from the step's first move."""
    ending = r"([-+])(\d{1,9})=(-?\d{1,9})(?:/(\d{1,9})([yn]))?"
    target = problem.parts["target"]
    errors = []
    value = middle = 0
    moved = []  # the numbers of the first move, and the next one
    hit = False
    for piece in pieces:
        move = re.fullmatch(r"(\d{1,9})[-+*](\d{1,9})=(\d{1,9})", piece)
        if move:
            *moved, value = map(int, move.groups())
            hit = False
            if evaluate(piece.split("=")[0])[0] != value:
                errors.append(piece)
        elif re.fullmatch(f"(?:{ending})+", piece):
            # '+7=51+9=60/42n-9=42/42y': from the first move to 51, and from there twice
            for op, operand, result, goal, verdict in re.findall(ending, piece):
                start = middle if verdict else value
                true = apply_op(start, op, int(operand)) == int(result)
                if verdict:
                    # the verdict on this target, reached with the numbers given
                    hit = hit or verdict == "y"
                    true = true and int(goal) == target and (verdict == "y") == (int(result) == target)
                    true = true and sorted([*moved[:3], int(operand)]) == sorted(problem.parts["numbers"])
                else:
                    middle = int(result)
                    moved = [*moved[:2], int(operand)]
                if not true:
                    judged = f"/{goal}{verdict}" if verdict else ""
                    errors.append(f"{start}{op}{operand}={result}{judged}")
        elif re.fullmatch(r"y?\(.*", piece):
            # what a step or a takeaway says leads to the target
            if evaluate(piece.removeprefix("y"))[0] != target:
                errors.append(piece)
        elif piece == "n" and hit or "=" in piece:
            # nothing found after all, or nothing that can be read
            errors.append(piece)
    return errors


def word_errors(problem, text):
    """`step_errors` of stories and shopping, whose statements are 'a + b = c', and what is said of
    them: what somebody has, what a thing costs, whether a pair fits.
    """
    equation = re.compile(r"([-+*\d ]*)= *(\d{0,9})")
    equations = [(left.strip(), right) for left, right in equation.findall(text)]
    errors = [f"{left} = {right}" for left, right in equations if str(evaluate(left)[0]) != right]

    # of a search: every price, and every verdict
    if problem.kind == "shopping":
        pairs = re.findall(r"[Ww]ith the ([a-z -]+) \d+ \+ (\d+) = (\d+), (yes|no)", text)
        said = re.findall(r"[Tt]he ([a-z -]+) costs (\d+)", text) + [pair[:2] for pair in pairs]
        errors += [
            f"{thing} {price}" for thing, price in said if str(problem.parts["prices"].get(thing)) != price
        ]
        return errors + [
            f"{cost}, {verdict}"
            for *_, cost, verdict in pairs
            if (cost == str(problem.parts["target"])) != (verdict == "yes")
        ]

    # a story must be worked from its start, move by move, and end as is said of it
    [(_, steps, _)], _ = work_out_stories(problem.parts, random.Random(0), 0.0)
    for name, step in zip(problem.parts["labels"], steps):
        asked = [(left.strip(), right) for left, right in equation.findall(step)]
        if asked not in [equations[i : i + len(asked)] for i in range(len(equations))]:
            errors.append(name)
        ends = re.findall(rf"\b{name} has (\d+)", text, re.I)
        errors += [f"{name} has {end}" for end in ends if end != asked[-1][1]]
    return errors


# ---- the run folder ----


# What a run writes into its folder.  Nothing else there is ever touched.
RUN_FILES = (
    *("args.json", "inputs.json", "prompt.txt", "log.jsonl", "episodes.txt"),
    *("rejection.json", "data", "resume", "adapter"),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "model.safetensors"),
)

# Settings that may change when a run goes on: where it computes, how often it saves, and where
# files lie.  What was read is compared by its content.
NO_DIFFERENCE = {
    *("out", "device", "save_every", "micro_tokens", "recompute", "track", "plan"),
    *("init", "start", "data", "prompt_file"),
}
RATES = ("lr", "muon_lr", "tag_lr")  # what a run that diverged may go on with less of


def fingerprint(value):
    """16 hex digits that tell contents apart: of a checkpoint folder (Path), data or text."""
    digest = hashlib.sha256()
    if isinstance(value, Path):
        forms = ("*.safetensors", "config.json", "tokenizer.json", "*.jinja")
        for file in sorted(file for form in forms for file in value.glob(form)):
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    else:
        digest.update(json.dumps(value, default=repr).encode())
    return digest.hexdigest()[:16]


@functools.cache
def hold(folder):
    """Lock a folder for as long as this process lives: a killed one leaves no lock behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {folder}: another process writes there; wait for it, or give another folder")


def old_name(path):
    """Where what stands at `path` is moved aside: the first free of `path`.old-1, .old-2, .."""
    return next(name for n in itertools.count(1) if not (name := Path(f"{path}.old-{n}")).exists())


class Run:
    """A stage's output folder: args.json, inputs.json, log.jsonl, and `resume/` while it runs.

    The same settings go on with what is there; a run of others is refused, or moved aside with
    --overwrite.  model: what will be trained.  read: what the stage was given beside --init, by
    flag.  All ranks read here, rank 0 alone writes.
    """

    def __init__(self, args, model=None, **read):
        self.args = args
        self.path = Path(args.out)
        self.state_file = self.path / "resume" / "state.pt"
        self.stopped = self.path / "resume" / "stopped"  # there after numbers that are not finite
        self.began = time.time()
        self.writes = ranks()[0] == 0
        self.signal = 0  # that asked this run to stop
        self.tracker = None
        if args.track and importlib.util.find_spec(args.track) is None:
            raise UserError(
                f"--track {args.track} is not installed: pip install {args.track}, or leave it out"
            )

        # the model that is read must not be the one that is written
        if self.path.is_file():
            raise UserError(f"--out {args.out} is a file; expected a folder, or a name for a new one")
        folder = self.path.resolve()
        for name in ("init", "start"):
            given = getattr(args, name, "")
            read[name] = checkpoint_folder(given).resolve() if given else given
            if read[name] in (folder, *folder.parents):
                raise UserError(f"--out {args.out} is --{name}, or lies in it; give --out another folder")
        inputs = {name: fingerprint(value) for name, value in read.items()}

        # every rank looks at the folder before rank 0 touches what is in it
        folder.mkdir(parents=True, exist_ok=True)
        if self.writes:
            hold(folder)
        settings = {key: value for key, value in vars(args).items() if key != "overwrite"}
        aside = self.compare(settings, inputs)
        self.check_disk(model, aside)
        from_all_ranks([])

        # from here on it is this run's
        if self.writes:
            for name in self.present() if aside else ():
                aside.mkdir(exist_ok=True)
                os.rename(folder / name, aside / name)
            write_json(self.path / "args.json", settings)
            write_json(self.path / "inputs.json", inputs)
            if "prompt_file" in read:
                write_text(self.path / "prompt.txt", read["prompt_file"])  # whose file may be moved
        from_all_ranks([])  # nobody goes on before the folder is in order

    def present(self):
        """RUN_FILES that are here.  A data/ without account of its sampling is the user's."""
        sampled = (self.path / "rejection.json").is_file()
        return [n for n in RUN_FILES if os.path.lexists(self.path / n) and (n != "data" or sampled)]

    def check_disk(self, model, aside):
        """Raise UserError where a resume point and the one before, or the weights, will not fit."""
        if model is None:
            return
        state = 12 * num_trained(model, self.args.lora)  # bytes, with Adam's two moments
        needed = state + max(state, sum(p.nbytes for p in model.parameters()))
        if self.state_file.is_file() and not aside:
            needed -= self.state_file.stat().st_size
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                f"--out {self.path}: {needed / 1e9:.3f} GB will be written there, {free / 1e9:.3f} GB are "
                "free; make room, or give another folder"
            )

    def compare(self, settings, inputs):
        """Compare with the run that is in the folder: None to go on, or the folder to move it to.

        Exits where it is finished; raises UserError where it must not be touched.
        """
        there = read_object(self.path / "args.json", {})
        free = NO_DIFFERENCE | (set(RATES) if self.stopped.is_file() else set())
        changed = [
            f"--{key.replace('_', '-')} {there.get(key)}, now {value}"
            for key, value in settings.items()
            if key not in free and there.get(key, value) != value
        ]

        # what was read, by its content; an account that an older run did not keep is no difference
        read = read_object(self.path / "inputs.json", {})
        stale = [
            f"other content of --{key.replace('_', '-')}"
            for key in inputs
            if read.get(key, inputs[key]) != inputs[key]
        ]

        # settings without anything made from them are no loss; files without settings are not ours
        present = self.present()
        finished = "model.safetensors" in present
        if present and "args.json" not in present:
            changed = [f"{present[-1]}, which no stage wrote"]
        elif not finished and not (changed + stale and {"resume", "data"} & set(present)):
            return None

        # resume/ is still there where a kill came right after the weights were written
        elif not changed + stale and self.args.overwrite != "all":
            # asked again for what there is: nothing is done, and that is no mistake
            print(f"{self.path} is finished, with these settings: nothing to do (--overwrite does it again)")
            shutil.rmtree(self.path / "resume", ignore_errors=True)
            sys.exit(0)

        # another run is there, or this one shall be done again
        if not self.args.overwrite or (changed and self.args.overwrite == "stale"):
            what = "finished" if finished else "half-done"
            raise UserError(
                f"--out {self.path} holds another run, {what} ({'; '.join((changed + stale)[:3])}); "
                "give another folder, or --overwrite to move it aside"
            )
        return old_name(self.path.resolve())

    def start(self, model, optimizers):
        """The step to go on after: 0, or where a stopped run left off, all of its state restored.

        From here on a signal ends the run after the step that is running (`end_step`).
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        if self.writes and self.args.track:
            self.tracker = importlib.import_module(self.args.track)
            self.tracker.init(project="npr", name=str(self.path), config=vars(self.args), resume="allow")

        # without a resume point the run begins, and so do its files
        log = self.path / "log.jsonl"
        episodes = self.path / "episodes.txt"
        if self.writes:
            self.stopped.unlink(missing_ok=True)
        if not self.state_file.is_file():
            if self.writes:
                log.unlink(missing_ok=True)
                episodes.unlink(missing_ok=True)
            return 0

        # weights_only: tensors and numbers are read, nothing that a pickle could run
        state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, p in trained(model).items():
                p.copy_(state["weights"][name])
        put_back(model)

        # the groups are this run's, with the rates that it was given
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            for group, there in zip(optimizer.param_groups, saved["param_groups"]):
                there |= {key: group[key] for key in group if key != "params"}
            optimizer.load_state_dict(saved)
            if hasattr(optimizer, "consolidate_state_dict"):
                optimizer.state.clear()  # a second copy: the shared-out state is in optimizer.optim

        # what was logged after the checkpoint is going to be logged again
        step = state["step"]
        if self.writes:
            kept = [json.dumps(row) + "\n" for row in read_jsonl(log) if row.get("step", step + 1) <= step]
            write_text(log, "".join(kept))
            if episodes.is_file() and episodes.stat().st_size > state.get("episodes", math.inf):
                os.truncate(episodes, state["episodes"])
        print(f"resuming {self.path} after step {step}")
        return step

    def ask_to_stop(self, number, frame):
        """A signal's handler: the running step is finished first; a second Ctrl-C does not wait."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt(number, "interrupted")
        self.signal = number
        os.write(2, b"\nfinishing this step, then saving (Ctrl-C again: stop at once)\n")

    def end_step(self, model, optimizers, step):
        """A resume point every --save-every steps, and one where a signal asked the run to stop."""
        asked = max(from_all_ranks([self.signal]))
        if asked or step % self.args.save_every == 0:
            self.checkpoint(model, optimizers, step)
        if asked:
            raise KeyboardInterrupt(
                asked, f"{self.path} is saved after step {step}; the same command goes on"
            )

    def checkpoint(self, model, optimizers, step):
        """Write what `start` reads back."""
        episodes = self.path / "episodes.txt"
        for optimizer in optimizers:
            if hasattr(optimizer, "consolidate_state_dict"):
                optimizer.consolidate_state_dict()  # the shares of all ranks, on rank 0
        if self.writes:
            state = {
                "weights": {name: p.detach() for name, p in trained(model).items()},
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": step,
                "episodes": episodes.stat().st_size if episodes.is_file() else 0,  # bytes
            }
            write_atomic(self.state_file, lambda file: torch.save(state, file))

    def log(self, **row):
        """Append one object to log.jsonl.

        A loss or gradient that is not finite stops the run before anything of it is saved.
        """
        row["seconds"] = round(time.time() - self.began, 2)
        for key in ("loss", "grad_norm"):
            if not math.isfinite(row.get(key, 0.0)):
                # the sign by which `compare` lets a lower rate go on
                if self.writes:
                    write_text(self.stopped, f"{key} {row[key]} at step {row['step']}\n")
                rates = {name: getattr(self.args, name, 0) for name in RATES}
                lower = " ".join(
                    f"--{name.replace('_', '-')} {rates[name] / 2:g}" for name in rates if rates[name]
                )
                raise UserError(
                    f"{key} is {row[key]} at step {row['step']}; {self.path} keeps its last finite state: "
                    f"the same command with a lower rate goes on from it, e.g. {lower}"
                )

        # what is left of a number after six digits is noise
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
        if self.writes:
            with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
        if self.tracker:
            self.tracker.log(rounded, step=row["step"])

    def episodes(self, step, episodes):
        """Append three whole episodes to `episodes.txt`; each is (question, response, verdict)."""
        if self.writes:
            with open(self.path / "episodes.txt", "a", encoding="utf-8") as file:
                for question, text, verdict in random.Random(step).sample(episodes, min(3, len(episodes))):
                    file.write(f"==== step {step} | {verdict}\n{question}\n{text}\n\n")

    def finish(self, model, tokenizer):
        """Write the stage's checkpoint and drop `resume/`."""
        if self.writes:
            if getattr(self.args, "lora", 0):
                base = getattr(self.args, "start", "") or self.args.init
                save_adapter(model, tokenizer, self.args.lora, base, self.path / "adapter")
            save(model, tokenizer, self.path)
            shutil.rmtree(self.path / "resume", ignore_errors=True)
        if self.tracker:
            self.tracker.finish()
        from_all_ranks([])  # now every rank finds it
        print(f"wrote {self.path} ({time.time() - self.began:.0f} s)")


# ---- optimizers ----


def trained(model):
    """{name: fp32 tensor} of all that is stepped: parameters, or what stands in for them."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors |= getattr(p, "parts", {name: p})
    return tensors


def stand_in(p, parts, gradients, put_back):
    """Have `parts`, {name: fp32 tensor}, trained instead of a parameter.

    gradients(G): theirs, given the parameter's.  put_back(): makes the parameter what they say.
    """

    def hand_over(p):
        for part, grad in zip(parts.values(), gradients(p.grad)):
            part.grad = grad.float() if part.grad is None else part.grad.add_(grad)
        p.grad = None

    p.parts = parts
    p.put_back = put_back
    p.register_post_accumulate_grad_hook(hand_over)


def dithered(exact, dtype):
    """An fp32 tensor in a narrower type; in bf16 every entry is rounded at a threshold of its own.

    bf16 is the upper half of fp32's bits.  Rounded to the nearest, a weight stays what it was until
    its master has moved by half of the last bit that is left, 0.2 to 0.4 % of the weight: of 135
    million weights 12 % did in 28 steps at a rate of 2e-5, hardly one above 1/8 among them
    (docs/log.md).  So a random number is added to the lower half before that is dropped, always the
    same one for an entry: a bf16 number stays itself, a move by a tenth of a bit takes every tenth
    weight one bit on, and together they go as far as their masters did.
    """
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    rng = torch.Generator(exact.device).manual_seed(0)
    bits = torch.randint(1 << 16, exact.shape, generator=rng, device=exact.device, dtype=torch.int32)
    return bits.add_(exact.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)


@torch.no_grad()
def put_back(model):
    """Every parameter becomes what stands in for it says."""
    for p in model.parameters():
        if hasattr(p, "put_back"):
            p.put_back()


# LoRA (arXiv 2106.09685): of a projection's matrix W_0 only a change of rank R is trained,
# W = W_0 + (alpha / R) B A.  The model's weight is W itself at all times, so it samples and learns
# as without adapters; and a step costs what it did, but for optimizer state and masters.

LORA_ALPHA = 32  # at one alpha the best learning rate hardly depends on R


def tag_rows(tokenizer):
    """Ids of the tags that are tokens: none in stages 0 and 1."""
    return sorted(i for token, i in tokenizer.get_vocab().items() if ANY_TAG.fullmatch(token))


def projections(model):
    """(name of the module, its matrix (out, in)) of every projection of every layer."""
    for name, p in model.named_parameters():
        if name.startswith("model.layers.") and p.dim() == 2:
            yield name.removesuffix(".weight"), p


def num_trained(model, R):
    """How many numbers are trained: all, or those of adapters of rank R but for the tags' rows."""
    if not R:
        return sum(p.numel() for p in model.parameters())
    return sum(R * sum(p.shape) for _, p in projections(model))


@torch.no_grad()
def add_adapters(model, tokenizer, R, seed):
    """Freeze the model but for adapters of rank R, and the rows of tags that are tokens."""
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.requires_grad_(False)
        p.parts = {}

    # B is zero at first, so training begins with the base itself
    def adapt(name, p):
        base = p.detach().clone()
        scale = LORA_ALPHA / R
        bound = p.shape[1] ** -0.5
        A = torch.empty(R, p.shape[1]).uniform_(-bound, bound, generator=rng).to(p.device)
        B = torch.zeros(p.shape[0], R, device=p.device)

        # dL/dA = (alpha / R) B' G and dL/dB = (alpha / R) G A', where G = dL/dW
        def gradients(G):
            G = scale * G.float()  # (out, in)
            return B.T @ G, G @ A.T

        parts = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        stand_in(p, parts, gradients, lambda: p.copy_(dithered(base + scale * (B @ A), p.dtype)))

    # the tags' own rows, of the embedding and of an untied output matrix
    def free_rows(name, p):
        part = p.detach()[rows].float()
        parts = {f"{name}.token_adapter.trainable_tokens_delta": part}
        stand_in(p, parts, lambda G: [G[rows]], lambda: p.index_copy_(0, rows, dithered(part, p.dtype)))

    for name, p in projections(model):
        adapt(name, p.requires_grad_())
    rows = torch.tensor(tag_rows(tokenizer), device=model.device)
    for name, p in model.named_parameters():
        if len(rows) and name in ("model.embed_tokens.weight", "lm_head.weight"):
            free_rows(name.removesuffix(".weight"), p.requires_grad_())


def save_adapter(model, tokenizer, R, base, path):
    """Write adapters of rank R as a folder that `peft` opens on top of the checkpoint `base`."""
    path.mkdir(exist_ok=True)
    tokenizer.save_pretrained(path)  # by which peft knows of the tags
    weights = {f"base_model.model.{k}": v.detach().cpu().contiguous() for k, v in trained(model).items()}
    write_atomic(path / "adapter_model.safetensors", lambda file: save_file(weights, file))
    module = {name: name.split(".")[-3] for name in weights}  # q_proj, .., embed_tokens
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": R,
        "lora_alpha": LORA_ALPHA,
        "target_modules": sorted({module[name] for name in weights if "lora_A" in name}),
        "trainable_token_indices": {module[name]: tag_rows(tokenizer) for name in weights if "token" in name}
        or None,
    }
    write_json(path / "adapter_config.json", config)


def make_optimizers(model, lr, muon_lr=0.0, betas=(0.9, 0.99), gain_factor=1.0, tag_rows=(), tag_lr=0.0):
    """AdamW on all that is trained; with muon_lr > 0, Muon on the layers' matrices and AdamW on the
    rest.

    gain_factor: the last norm's gains, which are the scale of the logits, learn so many times
    faster.  They are of size 1 where a matrix's entries are of 0.05, so at the same rate they
    hardly move; and every token has a say in each, so their gradient is the least noisy of all.

    tag_rows: new rows of the embedding, and of an untied output matrix.  They learn at tag_lr times
    the size of their entries (root mean square), where that is more than lr.

    A weight that is not fp32 gets an fp32 master: added to a bf16 weight, a step of less than 1/256
    of it is rounded away.  Backward adds its gradients up in the master's, the optimizers step the
    masters, and `update` puts them back into the model (`dithered`).
    """

    def add_master(name, p):
        master = p.detach().float()
        stand_in(p, {name: master}, lambda G: [G], lambda: p.copy_(dithered(master, p.dtype)))

    for name, p in model.named_parameters():
        if p.dtype != torch.float32 and not hasattr(p, "parts"):
            add_master(name, p)

    # Muon steps matrices inside the layers; embeddings, norms and the output matrix are AdamW's, as
    # are adapters, whose two factors are no matrix that the model multiplies by
    rest = trained(model)
    gain = [rest.pop(name) for name in ("model.norm.weight",) if name in rest]
    matrices = [
        rest.pop(name)
        for name, p in list(rest.items())
        if muon_lr and p.dim() == 2 and name.startswith("model.layers.") and ".lora_" not in name
    ]
    gain_lr = gain_factor * lr

    # schedules are factors of each group's `base_lr` (`set_lr`)
    groups = [
        {"params": list(rest.values()), "lr": lr, "base_lr": lr},
        {"params": gain, "lr": gain_lr, "base_lr": gain_lr},
    ]
    optimizers = [shared_out(torch.optim.AdamW, groups, betas=betas, weight_decay=0.0)]
    if matrices:
        groups = [{"params": matrices, "lr": muon_lr, "base_lr": muon_lr}]
        optimizers.append(shared_out(torch.optim.Muon, groups, weight_decay=0.01))

    # AdamW moves an entry by about the rate, whatever its gradient.  At 1e-4 a new row, of entries
    # of size 0.1, is after a hundred updates where it started: a pretrained model has to learn that
    # slowly so that it forgets nothing, but a new row has nothing to forget.
    rows = torch.tensor(tag_rows, dtype=torch.long, device=model.device)
    for name in rest:
        if len(rows) and name.startswith(("model.embed_tokens", "lm_head")):
            size = rest[name].detach()[rows].square().mean().sqrt().item()
            if tag_lr * size > lr:
                hasten(optimizers[0], rest[name].detach(), rows, tag_lr * size / lr)
    return optimizers


def hasten(optimizer, p, rows, factor):
    """Every step of the optimizer moves these rows of p `factor` times as far."""
    before = []
    optimizer.register_step_pre_hook(lambda *_: before.append(p[rows]))
    optimizer.register_step_post_hook(
        lambda *_: p.index_add_(0, rows, (factor - 1) * (p[rows] - before.pop()))
    )


def shared_out(kind, groups, **settings):
    """An optimizer.  Of several ranks each keeps the state of its share of the tensors (ZeRO stage
    1, arXiv 1910.02054), steps those, and sends them to the others.
    """
    if not dist.is_initialized():
        return kind(groups, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # a second that only ranks pay for

    return ZeroRedundancyOptimizer(groups, kind, **settings)


def set_lr(optimizers, factor):
    """Every learning rate = its base times factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def update(model, optimizers):
    """One optimizer step on the gradients of all ranks; returns their norm before clipping to 1, or
    NaN where the step made weights that are not finite.

    Each rank's loss is divided by the token count of the *whole* batch, so gradients are summed and
    not averaged.
    """
    stepped = trained(model).values()
    if dist.is_initialized():
        for p in stepped:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a rank without work
            dist.all_reduce(p.grad)
    norm = nn.utils.clip_grad_norm_(stepped, 1.0).item()
    if not math.isfinite(norm):
        return norm  # such a step is not taken, and `Run.log` stops the run
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

    put_back(model)
    # a sum is finite where all its terms are; `isfinite` of the largest matrix would copy it
    sums = torch.stack([p.detach().sum() for p in model.parameters()])
    return norm if sums.isfinite().all() else math.nan


def default_micro_tokens(device):
    """Padded tokens of one forward pass: more outgrow a CPU's caches (measured: 2.4x slower)."""
    return 16_384 if device.type == "cuda" else 2_048


def recompute_activations(model):
    """Activation checkpointing: keep only every layer's input, compute the rest again in backward.

    That takes a third more time, and a few dozen times less memory for activations.  Decoding,
    without gradients, is not touched.
    """
    for layer in model.model["layers"]:

        def forward(*args, run=layer.forward):
            if not torch.is_grad_enabled():
                return run(*args)

            # nothing in a layer is random, so no generator's state has to be kept
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

        layer.forward = forward


def pad_rows(rows, value, length=0):
    """Right-pad integer lists to one tensor, at least so long.  Causal masks hide the padding.

    [[1, 2], [3]], 0 -> [[1, 2], [3, 0]]
    """
    T = max(length, *map(len, rows))
    return torch.tensor([list(row) + [value] * (T - len(row)) for row in rows])  # (B, T)


# ---- devices and ranks ----
# Data parallelism in four functions.  Every rank holds the whole model and decodes its share of the
# prompts; the finished rollouts go to all ranks, so rewards, advantages and token counts are worked
# out on the whole batch by the very code a single process runs; then each rank runs its share of
# the forward and backward passes, and the gradients are added up (`update`).  Only the optimizers'
# state is shared out (`shared_out`).


def ranks():
    """(rank, number of ranks) of this process: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_share(items):
    """The part of a list that this rank works on; in rank order the parts are the list.

    7 items, 2 ranks -> 3 and 4
    """
    rank, world = ranks()
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def from_all_ranks(items):
    """The lists of all ranks put together in rank order: the same list on every rank."""
    if not dist.is_initialized():
        return items
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def pick_device(name):
    """torch.device for --device; 'auto' takes CUDA when there is one.  Prints what it took.

    Under torchrun (which sets RANK, WORLD_SIZE, LOCAL_RANK) also joins the other ranks: NCCL with a
    GPU for each, or gloo on a CPU whose cores they share.  Only rank 0 prints and shows bars.
    """
    if name != "cpu" and not torch.cuda.is_available():
        if name != "auto":
            raise UserError(f"--device {name}: no CUDA device is visible; use --device cpu")
        name = "cpu"
    device = torch.device("cuda:0" if name in ("auto", "cuda") else name)

    # under torchrun: a GPU for each rank, or a share of the cores
    others = ""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index)))
        visible = torch.cuda.device_count()
        if max(beside, device.index + 1) > visible:
            raise UserError(
                f"--device {name}, {beside} ranks (torchrun --nproc-per-node): CUDA devices that are "
                f"visible: {visible}; use cuda:0, or fewer ranks"
            )

        # Triton, streams and graphs go to the current device, wherever their tensors are
        torch.cuda.set_device(device)

        # cuDNN's attention plans anew for every shape it meets, and here nearly all of them differ:
        # a step of stage 0 took 0.38 s with it on an H200, and takes 0.10 s without
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "LOCAL_RANK" in os.environ:
        if device.type == "cpu":
            torch.set_num_threads(max(1, os.cpu_count() // beside))

        # a rank waits while another still decodes, or writes a checkpoint: long, but not for ever
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
        others = f", {dist.get_world_size()} ranks"
        if dist.get_rank() > 0:
            sys.stdout = open(os.devnull, "w")
            tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)

    # told after the threads were shared out, so it is what this run has
    what = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"device: {device} ({what}{others}), torch {torch.__version__}")
    return device


def read_arguments(doc, table, argv=None):
    """The command line by a script's table: rows of (flag, type, default, meaning).

    type: a function of the text; bool for a switch; the values themselves where only those are
    allowed.  A row may end with a dict of what else argparse takes.  doc: the script's docstring,
    whose first line heads the help.  Raises UserError in one line that names the flag.
    """
    # a flag is spelled out: what is short for one today may be short for two tomorrow
    parser = argparse.ArgumentParser(
        description=doc.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def refuse(message):
        raise UserError(f"{message}; --help tells what can be given")

    # switches, numbers and paths, choices
    parser.error = refuse
    for flag, kind, default, meaning, *more in table:
        how = {"default": default, "type": kind}
        if kind is bool:
            how = {"action": "store_true"}
        elif not callable(kind):
            how = {"default": default, "choices": kind}
        parser.add_argument(flag, help=meaning, **how, **dict(*more))
    return parser.parse_args(argv)


def run_main(main):
    """Run a script's main, without a traceback for what is no mistake of the script's.

    What a person can mend becomes one line on stderr and status 2, a signal one and 128 + its
    number.
    """

    def interrupt(number, frame):
        raise KeyboardInterrupt(number, "interrupted")

    # a polite end is an interrupt too, until a run's loop has its own way to stop
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    # 130 and 143, as shells have it
    except KeyboardInterrupt as error:
        number, message = error.args or (signal.SIGINT, "interrupted")
        print(f"\n{message}", file=sys.stderr)
        sys.exit(128 + number)
    except (OSError, MemoryError, RuntimeError) as error:
        # disk and memory that are full; any other RuntimeError is a mistake of this project's
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate", str(error)):
            raise
        why = f"{type(error).__name__}: {error}".split("\n")[0]
        print(f"error: {why}; see to it, then the same command goes on", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            # Optimizers are cycles that keep the group alive.  A thread of gloo that is there when
            # Python ends aborts the process, and a finished run looks like a failed one.
            gc.collect()
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)

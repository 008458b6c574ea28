"""Tiny models of each family, a tokenizer and data sets that they learn in a few steps; all seeded, no network.

Every model has 2 blocks, 64 hidden features and the 128 token ids of `tiny_tokenizer`; dropout is 0, so that two
forwards agree.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lsp_ray.config import Task

Family = Literal["llama", "qwen2", "mistral", "gemma", "gpt2", "opt", "bert", "roberta"]
Shape = Literal[
    "text", "prompt_completion", "messages", "alpaca", "sentence_label", "sentence_pair_label", "sentence_pair_score"
]

CAUSAL_LMS: tuple[Family, ...] = ("llama", "qwen2", "mistral", "gemma", "gpt2", "opt")
CLASSIFIERS: tuple[Family, ...] = ("bert", "roberta")
FAMILIES: tuple[Family, ...] = CAUSAL_LMS + CLASSIFIERS

VOCAB_SIZE = 128
HIDDEN_SIZE = 64
NUM_BLOCKS = 2
MAX_POSITIONS = 256

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
MARKS = (".", ",", ":", ";", "?", "!", "#", "-", "(", ")", "'", '"')
WORDS = tuple(f"w{index}" for index in range(VOCAB_SIZE - len(SPECIAL_TOKENS) - len(MARKS)))

BYTES = (*(chr(code) for code in range(33, 127)), "Ġ", "Ċ")  # printable ASCII, blank and line end

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)

_TOKEN_IDS: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    **_TOKEN_IDS,
}
_BERT_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 2,
    **_TOKEN_IDS,
}


def _tiny_gpt2() -> PreTrainedModel:
    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_embd=HIDDEN_SIZE, n_layer=NUM_BLOCKS, n_head=4, n_inner=96, **dropout, **_TOKEN_IDS)
    config.n_positions = MAX_POSITIONS
    return GPT2LMHeadModel(config)


def _tiny_opt() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "word_embed_proj_dim": HIDDEN_SIZE, "ffn_dim": 96}
    config = OPTConfig(
        num_hidden_layers=NUM_BLOCKS,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        **sizes,
        **_TOKEN_IDS,
    )
    return OPTForCausalLM(config)


_BUILDERS: dict[Family, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **_LLAMA_LIKE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **_LLAMA_LIKE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=None, **_LLAMA_LIKE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(tie_word_embeddings=True, **_LLAMA_LIKE)),
    "gpt2": _tiny_gpt2,
    "opt": _tiny_opt,
    "bert": lambda: BertForSequenceClassification(BertConfig(**_BERT_LIKE)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_BERT_LIKE)),
}


def tiny_model(family: Family, *, seed: int = 0) -> PreTrainedModel:
    """Return a float32 CPU model in eval mode; the same seed gives the same weights.

    The global generator is left as it was found: transformers' initialisation reads no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _BUILDERS[family]()
    model.train(False)
    _enlarge_embeddings(model)
    return model


def deep_model(family: Family, num_blocks: int, num_rows: int = VOCAB_SIZE) -> PreTrainedModel:
    """A tiny model with so many blocks, and rows of its embeddings."""
    model = tiny_model(family)
    sizes = model.config.to_dict() | {
        "num_hidden_layers": num_blocks,
        "layer_types": None,
        "vocab_size": num_rows,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        deep = type(model)(type(model.config)(**sizes))
    deep.train(False)
    _enlarge_embeddings(deep)
    return deep


def _enlarge_embeddings(model: PreTrainedModel) -> None:
    """Five times transformers' tiny values: a frozen head that small could not tell any token from another."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {module.get_parameter("weight") for module in modules if isinstance(module, nn.Module)}
    with torch.no_grad():
        for table in tables:  # a tied one once
            table.mul_(5.0)


def task_of(family: Family) -> Task:
    """What the family's tiny model is made for."""
    return "sequence_classification" if family in CLASSIFIERS else "causal_lm"


def assert_same_weights(model: nn.Module, reference: nn.Module) -> None:
    """Fail unless both have the same names and, to the bit, the same values."""
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0.0, atol=0.0)


def tiny_tokenizer(family: Family = "llama") -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most 128 ids with pad, bos, eos, unk and a chat template.

    It splits into words, unknown ones become unk; Qwen2's splits into characters, as `AutoTokenizer` insists on that
    model's own class.
    """
    options: dict[str, Any] = {
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(SPECIAL_TOKENS[4:]),
        "model_max_length": MAX_POSITIONS,
    }
    tokenizer: PreTrainedTokenizerFast
    if family == "qwen2":
        tokenizer = Qwen2Tokenizer(vocab=_numbered(SPECIAL_TOKENS + BYTES), merges=[], **options)
    else:
        backend = Tokenizer(WordLevel(_numbered(SPECIAL_TOKENS + MARKS + WORDS), unk_token="<unk>"))
        backend.pre_tokenizer = Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def character_tokenizer(*, before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer that loses nothing: a token a byte, and one each for `SPECIAL_TOKENS`.

    It puts the special tokens `before` and `after` around every text.
    """
    alphabet = tuple(sorted(ByteLevel.alphabet()))
    backend = Tokenizer(BPE(_numbered(SPECIAL_TOKENS + alphabet), []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    if before or after:
        around = f"{before} $A {after}".strip()
        ids = [(token, SPECIAL_TOKENS.index(token)) for token in (before, after) if token]
        backend.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _numbered(tokens: tuple[str, ...]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def write_tiny_model(folder: Path, family: Family, *, seed: int = 0) -> Path:
    """Save a tiny model and its tokenizer as an ordinary Hugging Face folder and return the folder."""
    tiny_model(family, seed=seed).save_pretrained(folder)
    tiny_tokenizer(family).save_pretrained(folder)
    return folder


def write_tiny_jsonl(path: Path, shape: Shape, num_rows: int, seed: int = 0) -> Path:
    """Write rows that a tiny model learns and return the path; labels are 0 and 1.

    Language: a prompt names one of 8 keys, the answer is 3 words that depend on the key alone. Classifier: label 1
    where the sentence has a word of the upper half; of a pair, where both sentences are from the same half. Score: 2.5
    for every sentence of the upper half.
    """
    generator = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_row(shape, generator)) for _ in range(num_rows))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def _row(shape: Shape, generator: random.Random) -> dict[str, object]:
    if shape in ("sentence_label", "sentence_pair_label", "sentence_pair_score"):
        return _labelled_row(shape, generator)
    prompt, answer = _question(generator)
    rows: dict[str, dict[str, object]] = {
        "text": {"text": f"{prompt} {answer}"},
        "prompt_completion": {"prompt": prompt, "completion": f" {answer}"},
        "messages": {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}],
        },
        "alpaca": {"instruction": prompt, "input": "", "output": answer},
    }
    return rows[shape]


def _labelled_row(shape: Shape, generator: random.Random) -> dict[str, object]:
    halves = [generator.randrange(2) for _ in range(2)]
    sentences = [_sentence(half, generator) for half in halves]
    if shape == "sentence_label":
        return {"sentence": sentences[0], "label": halves[0]}
    label = 2.5 * sum(halves) if shape == "sentence_pair_score" else int(halves[0] == halves[1])
    return {"sentence1": sentences[0], "sentence2": sentences[1], "label": label}


def _question(generator: random.Random) -> tuple[str, str]:
    key = generator.randrange(8)
    filler = generator.choice(WORDS[64:])
    return f"{filler} : {WORDS[key]} ?", " ".join(WORDS[8 + 3 * key : 11 + 3 * key])


def _sentence(half: int, generator: random.Random) -> str:
    first = half * len(WORDS) // 2
    return " ".join(generator.choices(WORDS[first : first + len(WORDS) // 2], k=6))

"""Token ids: rows of any shape become `input_ids` and `labels`, with loss on nothing but what is to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lsp_ray.config import Task
from lsp_ray.data.chat import encode_conversation
from lsp_ray.data.classes import Classes, Numbers, read_labels
from lsp_ray.data.dataset import Rows, Shape
from lsp_ray.data.quiet import quiet
from lsp_ray.errors import ConfigError

if TYPE_CHECKING:  # rows of one's own need no data sets' library
    from datasets import Dataset

IGNORED = -100  # transformers' label of a token without loss

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

_Columns = Mapping[str, list[Any]]
_Encoded = dict[str, list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """Rows as token ids, unpadded, at most `max_seq_length` of them.

    Columns: `input_ids`; `token_type_ids` where the model tells sentences apart; `labels`, for a causal LM a list as
    long as `input_ids` with -100 on tokens without loss, for a classifier the index of the class in `label_names`,
    for a regression the number.
    """

    train: Dataset
    eval: Dataset
    task: Task
    label_names: tuple[str, ...]
    """Names of the classes in the order of their indices; a single one means regression. Empty for a causal LM."""
    num_truncated: int = 0
    """Rows of both splits that lost tokens to `max_seq_length`, dropped ones included."""
    num_dropped: int = 0
    """Rows of both splits left out: no token with a loss was left, or no class was given."""
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None
    """Makes a batch of a list of rows, as transformers' collators do: rows may then be of any kind, in a sequence."""


def tokenize_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int) -> TokenizedRows:
    """Turn rows into token ids.

    A prompt and its completion are tokenised apart, as in generation, and joined without anything in between; the
    completion, and a plain text, end with the tokenizer's EOS. Conversations go through the chat template and only
    the assistant's turns carry loss. The end of what is too long is cut off.

    Args:
        rows: What `load_rows` returned.
        tokenizer: The model's own; left as it is.
        max_seq_length: Tokens kept of a row.

    Raises:
        ConfigError: `max_seq_length` is more than a classifier takes or leaves no row with a loss; the data set has
            conversations and the tokenizer no chat template; the labels are neither classes nor finite numbers.
    """
    given = None
    if rows.shape.task == "sequence_classification":
        _check_length(tokenizer, max_seq_length)
        with quiet():
            given = read_labels(rows)
    encode = _encoder(rows, given, tokenizer, max_seq_length)
    with quiet():
        train, eval_ = _tokenized(rows.train, encode), _tokenized(rows.eval, encode)
    if not len(train.kept) or not len(eval_.kept):
        raise _nothing_left(rows, max_seq_length)
    return TokenizedRows(
        train=train.kept,
        eval=eval_.kept,
        task=rows.shape.task,
        label_names=given.names if given else (),
        num_truncated=train.num_truncated + eval_.num_truncated,
        num_dropped=train.num_dropped + eval_.num_dropped,
    )


def _check_length(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    # RoBERTa's config counts two positions that no token can have; only its tokenizer knows
    if max_seq_length > tokenizer.model_max_length:
        bound = f"be at most {tokenizer.model_max_length}, the positions of this model"
        raise ConfigError("max_seq_length", bound, max_seq_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    kept: Dataset
    num_truncated: int
    num_dropped: int


def _tokenized(rows: Dataset, encode: Callable[[_Columns], _Encoded]) -> _Split:
    # never from the cache: its key knows the encoder's name and arguments, not what another version of it did
    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)
    has_target = encoded["has_target"]
    num_truncated = sum(encoded["is_truncated"])
    kept = [index for index, is_kept in enumerate(has_target) if is_kept]
    num_dropped = len(encoded) - len(kept)
    if num_dropped:
        encoded = encoded.select(kept)
    encoded = encoded.remove_columns(["has_target", "is_truncated"])
    return _Split(kept=encoded, num_truncated=num_truncated, num_dropped=num_dropped)


def _nothing_left(rows: Rows, max_seq_length: int) -> ConfigError:
    if rows.shape.task == "sequence_classification":
        return ConfigError("dataset", "have rows with a label", rows.name)
    if not any(rows.train[: min(len(rows.train), 1000)][rows.train.column_names[-1]]):
        return ConfigError("dataset", "have rows with text to learn", rows.name)
    hint = f"in every row of {rows.name} the prompt alone is longer, or there is nothing to learn"
    return ConfigError("max_seq_length", "leave tokens with a loss", max_seq_length, hint=hint)


def _encoder(
    rows: Rows, given: Classes | Numbers | None, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> Callable[[_Columns], _Encoded]:
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_seq_length": max_seq_length}
    if given is not None:
        return partial(_encode_labelled, given=given, **options)
    if rows.shape is Shape.MESSAGES:
        _check_chat_template(rows, tokenizer)
        return partial(_encode_messages, name=rows.name, **options)
    encoders = {
        Shape.TEXT: _encode_texts,
        Shape.ALPACA: _encode_alpaca,
        Shape.PROMPT_COMPLETION: _encode_completions,
    }
    return partial(encoders[rows.shape], **options)


def _check_chat_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    model = f"model {tokenizer.name_or_path}".rstrip()
    hint = "use an instruct model, or the columns prompt/completion"
    if tokenizer.chat_template is None:
        bound = f"have no messages column, as {model} has no chat template"
        raise ConfigError("dataset", bound, rows.name, hint=hint)
    if not tokenizer.is_fast:
        bound = f"have no messages column, as the tokenizer of {model} tells no character offsets"
        raise ConfigError("dataset", bound, rows.name, hint=hint)


def _encode_texts(rows: _Columns, *, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> _Encoded:
    eos = _eos(tokenizer)
    encoded = []
    for text, ids in zip(rows["text"], _token_ids(tokenizer, rows["text"]), strict=True):
        ended = ids if ids[-1:] == eos else ids + eos
        encoded.append((ended, [bool(text.strip())] * len(ended)))
    return _cut(encoded, max_seq_length)


def _encode_completions(rows: _Columns, *, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> _Encoded:
    eos = _eos(tokenizer)
    prompts = _token_ids(tokenizer, rows["prompt"])
    completions = _token_ids(tokenizer, rows["completion"], add_special_tokens=False)
    encoded = [
        (prompt + completion + eos, [False] * len(prompt) + [True] * len(completion + eos))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    return _cut(encoded, max_seq_length)


def _encode_alpaca(rows: _Columns, *, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> _Encoded:
    inputs = rows.get("input", [""] * len(rows["output"]))
    prompts = [
        (ALPACA_PROMPT_WITH_INPUT if given.strip() else ALPACA_PROMPT).format(instruction=instruction, input=given)
        for instruction, given in zip(rows["instruction"], inputs, strict=True)
    ]
    columns = {"prompt": prompts, "completion": rows["output"]}
    return _encode_completions(columns, tokenizer=tokenizer, max_seq_length=max_seq_length)


def _encode_messages(rows: _Columns, *, name: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> _Encoded:
    encoded = [encode_conversation(messages, tokenizer, dataset=name) for messages in rows["messages"]]
    return _cut(encoded, max_seq_length)


def _cut(encoded: Sequence[tuple[list[int], list[bool]]], max_seq_length: int) -> _Encoded:
    """Cut rows of (ids, whether each carries loss) to `max_seq_length` and write the labels."""
    columns: _Encoded = {"input_ids": [], "labels": [], "has_target": [], "is_truncated": []}
    for ids, is_target in encoded:
        labels = [token if target else IGNORED for token, target in zip(ids, is_target, strict=True)]
        labels = labels[:max_seq_length]
        columns["input_ids"].append(ids[:max_seq_length])
        columns["labels"].append(labels)
        # the first token is predicted from nothing: its label never counts
        columns["has_target"].append(any(label != IGNORED for label in labels[1:]))
        columns["is_truncated"].append(len(ids) > max_seq_length)
    return columns


def _encode_labelled(
    rows: _Columns, *, given: Classes | Numbers, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> _Encoded:
    texts = [rows[name] for name in ("sentence", "sentence1", "sentence2") if name in rows]
    # whole first, as nothing else tells which rows are cut
    encoding: Any = tokenizer(*texts, return_attention_mask=False, verbose=False)
    columns: _Encoded = {name: list(encoding[name]) for name in encoding}
    is_truncated = [len(ids) > max_seq_length for ids in columns["input_ids"]]
    for at in (at for at, is_cut in enumerate(is_truncated) if is_cut):
        row = [column[at] for column in texts]
        cut: Any = tokenizer(*row, truncation=True, max_length=max_seq_length, return_attention_mask=False)
        for name in encoding:
            columns[name][at] = cut[name]
    targets = [given.target(label) for label in rows["label"]]
    columns["labels"] = [given.filler if target is None else target for target in targets]
    columns["has_target"] = [target is not None for target in targets]
    columns["is_truncated"] = is_truncated
    return columns


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    encoding = tokenizer(texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

"""Token ids: rows of any shape become `input_ids` and `labels`, with loss on nothing but what is to be learnt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lsp_ray.config import Task
from lsp_ray.data.chat import EncodedConversation, encode_conversation, unread_names
from lsp_ray.data.classes import Classes, Numbers, read_labels
from lsp_ray.data.conversation import Message
from lsp_ray.data.dataset import Rows, Shape, split_indices
from lsp_ray.data.quiet import quiet
from lsp_ray.data.row_notes import row_notes
from lsp_ray.errors import ConfigError
from lsp_ray.special_tokens import end_of, prompt_ids

if TYPE_CHECKING:  # rows of one's own need no data sets' library
    from datasets import Dataset

IGNORED = -100  # transformers' label of a token without loss
LONGEST = 1024  # tokens kept of a row where no number is asked for
_SAMPLE, _LENGTH_STEP = 2000, 64
_FACTS = ("has_target", "is_truncated", "num_tokens", "num_rewritten")  # of a row, beside what a model reads

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
    max_seq_length: int = 0
    """Tokens kept of a row; 0 where that is not known."""
    notes: tuple[str, ...] = ()
    """What a person would want to know of the data, a line each."""
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None
    """Makes a batch of a list of rows, as transformers' collators do: rows may then be of any kind, in a sequence."""


def tokenize_rows(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, *, max_seq_length: int | None, longest: int = LONGEST
) -> TokenizedRows:
    """Turn rows into token ids.

    A prompt and its completion are tokenised apart, as in generation, and joined without anything in between; the
    completion, and a plain text, end with the tokenizer's EOS unless they have it. Conversations go through the chat
    template and only the assistant's turns carry loss. The end of what is too long is cut off.

    Where the held-out rows were drawn and none of them can be used, others are held out in their place.

    Args:
        rows: What `load_rows` returned.
        tokenizer: The model's own; left as it is.
        max_seq_length: Tokens kept of a row; None: as many as 99 % of the rows have, at most `longest`.
        longest: See above.

    Raises:
        ConfigError: `max_seq_length` is more than a classifier takes or leaves no row with a loss; the data set has
            conversations and the tokenizer no chat template; the labels are neither classes nor finite numbers.
    """
    given = None
    if rows.shape.task == "sequence_classification":
        if max_seq_length is not None:
            _check_length(tokenizer, max_seq_length)
        with quiet():
            given = read_labels(rows)
    encode = _encoder(rows, given, tokenizer)
    train_numbers, eval_numbers = rows.row_numbers or (range(1, len(rows.train) + 1), range(1, len(rows.eval) + 1))
    with quiet():
        if max_seq_length is None:
            max_seq_length = fitting_length(rows.train, partial(encode, max_seq_length=longest), train_numbers, longest)
        encode = partial(encode, max_seq_length=max_seq_length)
        train, eval_ = _tokenized(rows.train, encode, train_numbers), _tokenized(rows.eval, encode, eval_numbers)
        kept_train, kept_eval = _with_held_out(rows, train.kept, eval_.kept, max_seq_length)
    counts = [left + right for left, right in zip(train.counts, eval_.counts, strict=True)]
    return TokenizedRows(
        train=kept_train,
        eval=kept_eval,
        task=rows.shape.task,
        label_names=given.names if given else (),
        num_truncated=counts[0],
        num_dropped=counts[1],
        max_seq_length=max_seq_length,
        notes=(*rows.notes, *_unread(rows, tokenizer), *row_notes(given, counts, max_seq_length)),
    )


def fitting_length(
    rows: Dataset, encode: Callable[[_Columns, list[int]], _Encoded], numbers: Sequence[int], longest: int
) -> int:
    """Return how many tokens 99 % of the rows hold, rounded up to a multiple of 64, at most `longest`."""
    at = np.unique(np.linspace(0, len(rows) - 1, _SAMPLE, dtype=np.int64)).tolist()
    encoded = encode(rows[at], [numbers[index] for index in at])
    lengths = [size for size, usable in zip(encoded["num_tokens"], encoded["has_target"], strict=True) if usable]
    needed = int(np.percentile(lengths or [longest], 99, method="higher"))
    return min(-(-max(needed, 1) // _LENGTH_STEP) * _LENGTH_STEP, longest)


def _with_held_out(rows: Rows, train: Dataset, held_out: Dataset, max_seq_length: int) -> tuple[Dataset, Dataset]:
    """Hold usable rows out where all that were drawn are of no use."""
    if len(train) and len(held_out):
        return train, held_out
    from datasets import concatenate_datasets

    usable = concatenate_datasets([train, held_out]) if rows.split_seed is not None else train
    if len(usable) < 2:
        raise _nothing_left(rows, max_seq_length, num_usable=len(usable))
    kept, drawn = split_indices(len(usable), rows.split_seed or 0)
    return usable.select(kept), usable.select(drawn)


def check_token_ids(rows: TokenizedRows, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    """Raise ConfigError where a row has a token that the model's embeddings have no row for."""
    if len(tokenizer) <= num_rows:
        return
    for split in (rows.train, rows.eval):
        if "input_ids" not in getattr(split, "column_names", ()):
            continue  # whatever a person's own collator makes batches of
        for batch in split.select_columns(["input_ids"]).iter(batch_size=1000):
            largest = max((max(ids, default=0) for ids in batch["input_ids"]), default=0)
            if largest >= num_rows:
                bound = f"have embeddings for every token of the data: they have {num_rows} rows"
                token = f"token {tokenizer.convert_ids_to_tokens(largest)!r} of id {largest}"
                raise ConfigError("model_name_or_path", bound, token, hint="its tokenizer is another model's")


def _check_length(tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> None:
    # RoBERTa's config counts two positions that no token can have; only its tokenizer knows
    if max_seq_length > tokenizer.model_max_length:
        bound = f"be at most {tokenizer.model_max_length}, the positions of this model"
        raise ConfigError("max_seq_length", bound, max_seq_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    kept: Dataset
    counts: tuple[int, int, int, int]
    """Rows cut, dropped, dropped as they are too long; turns that the template rewrites."""


def _tokenized(rows: Dataset, encode: Callable[[_Columns, list[int]], _Encoded], numbers: Sequence[int]) -> _Split:
    def encode_at(columns: _Columns, indices: list[int]) -> _Encoded:
        return encode(columns, [numbers[index] for index in indices])

    # never from the cache: its key knows the encoder's name and arguments, not what another version of it did
    encoded = rows.map(
        encode_at, batched=True, with_indices=True, remove_columns=rows.column_names, load_from_cache_file=False
    )
    has_target, num_tokens = encoded["has_target"][:], encoded["num_tokens"][:]
    is_truncated = encoded["is_truncated"][:]
    kept = [index for index, is_kept in enumerate(has_target) if is_kept]
    num_too_long = sum(cut and not usable for cut, usable in zip(is_truncated, has_target, strict=True))
    num_rewritten = sum(encoded["num_rewritten"][:])
    if len(kept) < len(encoded):
        encoded = encoded.select(kept)
    encoded = encoded.remove_columns(list(_FACTS))
    counts = (sum(is_truncated), len(num_tokens) - len(kept), num_too_long, num_rewritten)
    return _Split(kept=encoded, counts=counts)


def _nothing_left(rows: Rows, max_seq_length: int, *, num_usable: int) -> ConfigError:
    if num_usable:
        return ConfigError("dataset", "have at least 2 rows that can be used", num_usable, hint=f"in {rows.name}")
    if rows.shape.task == "sequence_classification":
        return ConfigError("dataset", "have rows with a label", rows.name)
    if rows.shape is Shape.MESSAGES:
        some = map(json.loads, rows.train[:1000]["messages"])
        roles = sorted({message["role"] for messages in some for message in messages})
        if "assistant" not in roles:
            bound = "have turns of the role assistant, which are learnt"
            return ConfigError("dataset", bound, "/".join(roles) or "no message", hint=f"in {rows.name}")
    if not any(rows.train[: min(len(rows.train), 1000)][rows.train.column_names[-1]]):
        return ConfigError("dataset", "have rows with text to learn", rows.name)
    hint = f"in every row of {rows.name} the prompt alone is longer, or there is nothing to learn"
    return ConfigError("max_seq_length", "leave tokens with a loss", max_seq_length, hint=hint)


def _encoder(
    rows: Rows, given: Classes | Numbers | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[..., _Encoded]:
    if given is not None:
        return partial(_encode_labelled, given=given, tokenizer=tokenizer)
    if rows.shape is Shape.MESSAGES:
        _check_chat_template(rows, tokenizer)
        return partial(_encode_messages, name=rows.name, tokenizer=tokenizer)
    encoders = {
        Shape.TEXT: _encode_texts,
        Shape.ALPACA: _encode_alpaca,
        Shape.PROMPT_COMPLETION: _encode_completions,
    }
    return partial(encoders[rows.shape], tokenizer=tokenizer)


def _check_chat_template(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    model = f"model {tokenizer.name_or_path}".rstrip()
    hint = "use an instruct model, or the columns prompt/completion"
    if tokenizer.chat_template is None:
        bound = f"have no messages column, as {model} has no chat template"
        raise ConfigError("dataset", bound, rows.name, hint=hint)
    if not tokenizer.is_fast:
        bound = f"have no messages column, as the tokenizer of {model} tells no character offsets"
        raise ConfigError("dataset", bound, rows.name, hint=hint)


def _encode_texts(
    rows: _Columns, _numbers: list[int], *, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> _Encoded:
    encoded = []
    for text, ids in zip(rows["text"], prompt_ids(tokenizer, rows["text"]), strict=True):
        ended = ids + end_of(tokenizer, text, ids)
        encoded.append(EncodedConversation(input_ids=ended, is_said=[bool(text.strip())] * len(ended)))
    return _cut(encoded, max_seq_length)


def _encode_completions(
    rows: _Columns, _numbers: list[int], *, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> _Encoded:
    prompts = prompt_ids(tokenizer, rows["prompt"])
    completions = tokenizer(
        list(rows["completion"]), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    encoded = []
    for prompt, text, ids in zip(prompts, rows["completion"], completions, strict=True):
        completion = ids + end_of(tokenizer, text, ids)
        is_said = [False] * len(prompt) + [True] * len(completion)
        encoded.append(EncodedConversation(input_ids=prompt + completion, is_said=is_said))
    return _cut(encoded, max_seq_length)


def _encode_alpaca(
    rows: _Columns, numbers: list[int], *, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> _Encoded:
    inputs = rows.get("input", [""] * len(rows["output"]))
    prompts = [
        (ALPACA_PROMPT_WITH_INPUT if given.strip() else ALPACA_PROMPT).format(instruction=instruction, input=given)
        for instruction, given in zip(rows["instruction"], inputs, strict=True)
    ]
    columns = {"prompt": prompts, "completion": rows["output"]}
    return _encode_completions(columns, numbers, tokenizer=tokenizer, max_seq_length=max_seq_length)


def _encode_messages(
    rows: _Columns, numbers: list[int], *, name: str, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> _Encoded:
    encoded = []
    for number, (messages, variables) in zip(numbers, _conversations(rows), strict=True):
        where = f"row {number} of {name}"
        encoded.append(encode_conversation(messages, tokenizer, dataset=where, variables=variables))
    return _cut(encoded, max_seq_length)


def _conversations(rows: _Columns) -> Iterator[tuple[list[Message], dict[str, Any]]]:
    """Yield messages, and what their row has for the template beside them."""
    others = {column: values for column, values in rows.items() if column != "messages"}
    for at, messages in enumerate(rows["messages"]):
        variables = {column: json.loads(values[at]) for column, values in others.items() if values[at] is not None}
        yield json.loads(messages), variables


def _unread(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A line where conversations have what the template does not read."""
    if rows.shape is not Shape.MESSAGES:
        return []
    batches = chain(rows.train.iter(1000), rows.eval.iter(1000))
    names = unread_names(chain.from_iterable(map(_conversations, batches)), tokenizer)
    return [f"not read by the model's chat template, so not trained: {', '.join(names)}"] if names else []


def _cut(encoded: Sequence[EncodedConversation], max_seq_length: int) -> _Encoded:
    """Cut rows to `max_seq_length` and write the labels."""
    columns: _Encoded = {name: [] for name in ("input_ids", "labels", *_FACTS)}
    for row in encoded:
        ids = row.input_ids
        labels = [token if target else IGNORED for token, target in zip(ids, row.is_said, strict=True)]
        labels = labels[:max_seq_length]
        columns["input_ids"].append(ids[:max_seq_length])
        columns["labels"].append(labels)
        # the first token is predicted from nothing: its label never counts
        columns["has_target"].append(any(label != IGNORED for label in labels[1:]))
        columns["is_truncated"].append(len(ids) > max_seq_length)
        columns["num_tokens"].append(len(ids))
        columns["num_rewritten"].append(row.num_rewritten)
    return columns


def _encode_labelled(
    rows: _Columns,
    _numbers: list[int],
    *,
    given: Classes | Numbers,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
) -> _Encoded:
    texts = [rows[name] for name in ("sentence", "sentence1", "sentence2") if name in rows]
    # whole first, as nothing else tells which rows are cut
    encoding: Any = tokenizer(*texts, return_attention_mask=False, verbose=False)
    columns: _Encoded = {name: list(encoding[name]) for name in encoding}
    columns["num_tokens"] = [len(ids) for ids in columns["input_ids"]]
    is_truncated = [num_tokens > max_seq_length for num_tokens in columns["num_tokens"]]
    for at in (at for at, is_cut in enumerate(is_truncated) if is_cut):
        row = [column[at] for column in texts]
        cut: Any = tokenizer(*row, truncation=True, max_length=max_seq_length, return_attention_mask=False)
        for name in encoding:
            columns[name][at] = cut[name]
    targets = [given.target(label) for label in rows["label"]]
    columns["labels"] = [given.filler if target is None else target for target in targets]
    columns["has_target"] = [target is not None for target in targets]
    columns["is_truncated"] = is_truncated
    columns["num_rewritten"] = [0] * len(targets)
    return columns

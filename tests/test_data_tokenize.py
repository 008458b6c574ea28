"""Which tokens of a row carry loss, what is cut, and what becomes of labels."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lsp_ray.data.columns import Column, ConversationColumn, JsonColumn
from lsp_ray.data.dataset import Rows, Shape
from lsp_ray.data.source import TypedSource
from lsp_ray.data.tokenize import IGNORED, TokenizedRows, tokenize_rows
from lsp_ray.errors import ConfigError
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

GENERATION_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} <|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }} <|end|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
# Qwen3's way: what an assistant thought is shown in the last message only.
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> "
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split(' - ')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def rows_of(shape: Shape, made: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None) -> Rows:
    train, eval_ = (_split_of(shape, rows) for rows in (made, held_out or made))
    return Rows(name="made.jsonl", shape=shape, train=train, eval=eval_)


def _split_of(shape: Shape, made: list[dict[str, Any]]) -> Dataset:
    rows = Dataset.from_list(made)
    if shape is not Shape.MESSAGES:
        return rows
    columns: dict[str, Column] = {name: JsonColumn(name) for name in rows.column_names}
    columns["messages"] = ConversationColumn("messages", typed=True)
    return TypedSource(rows, "made.jsonl").read(columns)


def tokens(tokenizer: PreTrainedTokenizerFast, tokenized: TokenizedRows, row: int = 0) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenized.train[row]["input_ids"]))


def targets(tokenizer: PreTrainedTokenizerFast, tokenized: TokenizedRows, row: int = 0) -> list[str]:
    """Tokens that carry loss; checks that each label is its token."""
    found = tokenized.train[row]
    kept = [label for label in found["labels"] if label != IGNORED]
    assert len(found["labels"]) == len(found["input_ids"])
    assert all(label in (IGNORED, token) for label, token in zip(found["labels"], found["input_ids"], strict=True))
    return list(tokenizer.convert_ids_to_tokens(kept))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_a_prompt_carries_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(Shape.PROMPT_COMPLETION, [{"prompt": "w1 w2 ?", "completion": "w3 w4"}])
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=16)
    assert tokens(tokenizer, tokenized) == ["w1", "w2", "?", "w3", "w4", "<eos>"]
    assert targets(tokenizer, tokenized) == ["w3", "w4", "<eos>"]
    assert tokenized.task == "causal_lm"
    assert tokenized.label_names == ()


def test_every_token_of_a_text_carries_loss_and_it_ends(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(Shape.TEXT, [{"text": "w1 w2"}, {"text": "w3 <eos>"}])
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=16)
    assert targets(tokenizer, tokenized) == ["w1", "w2", "<eos>"]
    assert targets(tokenizer, tokenized, row=1) == ["w3", "<eos>"]


def test_a_tokenizer_without_eos_ends_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    rows = rows_of(Shape.TEXT, [{"text": "w1 w2"}])
    assert targets(tokenizer, tokenize_rows(rows, tokenizer, max_seq_length=16)) == ["w1", "w2"]


def test_an_instruction_is_put_as_alpaca_does(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [{"instruction": "w1", "input": given, "output": "w5 {w6}"} for given in ("w2", "")]
    tokenized = tokenize_rows(rows_of(Shape.ALPACA, made), tokenizer, max_seq_length=256)
    with_input, without = (tokens(tokenizer, tokenized, row) for row in (0, 1))
    assert ("w2" in with_input, "w2" in without) == (True, False)
    assert len(with_input) > len(without)
    assert targets(tokenizer, tokenized) == ["w5", "<unk>", "w6", "<unk>", "<eos>"]


def test_an_instruction_may_have_no_input_column_and_hold_braces(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(Shape.ALPACA, [{"instruction": "{w1} {0}", "output": "w5"}])
    assert targets(tokenizer, tokenize_rows(rows, tokenizer, max_seq_length=256)) == ["w5", "<eos>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION_TEMPLATE, FORGETFUL_TEMPLATE])
def test_only_the_assistant_carries_loss(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template
    talk = [{"role": "system", "content": "w0"}, user("w1"), assistant("w2"), user("w3"), assistant("w4 w5")]
    tokenized = tokenize_rows(rows_of(Shape.MESSAGES, [{"messages": talk}]), tokenizer, max_seq_length=64)
    assert targets(tokenizer, tokenized) == ["w2", "<|end|>", "w4", "w5", "<|end|>"]
    assert tokens(tokenizer, tokenized) == str(tokenizer.apply_chat_template(talk, tokenize=False)).split()


def test_a_turn_that_the_template_rewrites_carries_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    talk = [user("w1"), assistant("w8 - w2"), user("w3"), assistant("w9 - w4")]
    tokenized = tokenize_rows(rows_of(Shape.MESSAGES, [{"messages": talk}]), tokenizer, max_seq_length=64)
    assert targets(tokenizer, tokenized) == ["w9", "-", "w4", "<|end|>"]


def test_a_conversation_without_an_answer_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [
        {"messages": [user("w1")]},
        {"messages": [assistant("w1"), user("w2")]},
        {"messages": [user("w1"), assistant("w2")]},
    ]
    tokenized = tokenize_rows(rows_of(Shape.MESSAGES, made, made[2:]), tokenizer, max_seq_length=64)
    assert (len(tokenized.train), tokenized.num_dropped) == (1, 2)


def test_content_in_parts_is_joined_and_null_keys_are_absent(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% for", "{% if 'name' in messages[0] %}w9{% endif %}{% for", 1)
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    talk = [{"role": "user", "content": parts, "name": None}, {"role": "assistant", "content": parts, "name": None}]
    tokenized = tokenize_rows(rows_of(Shape.MESSAGES, [{"messages": talk}]), tokenizer, max_seq_length=64)
    assert targets(tokenizer, tokenized) == ["w1", "w2", "<|end|>"]
    assert "w9" not in tokens(tokenizer, tokenized)


@pytest.mark.parametrize(
    "messages",
    [
        "w1",
        ["w1"],
        [{"from": "human", "text": "w1", "value": 3}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": {"text": "w2"}}],
        [{"role": "user", "content": [{"text": 3}]}],
        [{"role": "user", "content": ["w1"]}],
    ],
)
def test_messages_in_another_form_are_named(tokenizer: PreTrainedTokenizerFast, messages: object) -> None:
    with pytest.raises(ConfigError, match=r"lists of role and content.*made\.jsonl"):
        tokenize_rows(rows_of(Shape.MESSAGES, [{"messages": messages}]), tokenizer, max_seq_length=64)


def test_a_model_without_a_chat_template_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    tokenizer.name_or_path = "some/base-model"
    rows = rows_of(Shape.MESSAGES, [{"messages": [user("w1"), assistant("w2")]}])
    with pytest.raises(ConfigError, match=r"some/base-model has no chat template.*made\.jsonl"):
        tokenize_rows(rows, tokenizer, max_seq_length=64)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = rows_of(Shape.MESSAGES, [{"messages": [user("w1"), user("w2")]}])
    with pytest.raises(ConfigError, match=r"user/user.*made\.jsonl: roles must alternate"):
        tokenize_rows(rows, tokenizer, max_seq_length=64)


def test_what_is_too_long_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [{"prompt": "w0 w1 w2 w3 w4 w5", "completion": "w6 w7 w8 w9"}, {"prompt": "w0", "completion": "w1"}]
    tokenized = tokenize_rows(rows_of(Shape.PROMPT_COMPLETION, made, made[1:]), tokenizer, max_seq_length=8)
    assert targets(tokenizer, tokenized) == ["w6", "w7"]
    assert (tokenized.num_truncated, tokenized.num_dropped) == (1, 0)


def test_a_row_whose_every_target_is_cut_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [{"prompt": "w1 " * 8, "completion": "w2"}, {"prompt": "w1", "completion": "w2"}]
    tokenized = tokenize_rows(rows_of(Shape.PROMPT_COMPLETION, made, made[1:]), tokenizer, max_seq_length=8)
    assert (len(tokenized.train), tokenized.num_truncated, tokenized.num_dropped) == (1, 1, 1)
    assert tokens(tokenizer, tokenized) == ["w1", "w2", "<eos>"]


def test_an_empty_text_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [{"text": ""}, {"text": " \n"}, {"text": "w1 w2"}]
    tokenized = tokenize_rows(rows_of(Shape.TEXT, made, made[2:]), tokenizer, max_seq_length=8)
    assert (len(tokenized.train), tokenized.num_dropped) == (1, 2)


def test_a_length_that_leaves_nothing_to_learn_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(Shape.PROMPT_COMPLETION, [{"prompt": "w1 " * 8, "completion": "w2"}])
    with pytest.raises(ConfigError, match=r"max_seq_length must leave tokens with a loss, got 8.*made\.jsonl"):
        tokenize_rows(rows, tokenizer, max_seq_length=8)


def test_more_tokens_than_a_classifier_takes_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"max_seq_length must be at most 256, .* got 257"):
        tokenize_rows(rows_of(Shape.SENTENCE, sentences(0, 1)), tokenizer, max_seq_length=257)


def test_rows_without_any_label_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    split = Dataset.from_list(sentences(-1, -1), features=features)
    with pytest.raises(ConfigError, match="dataset must have rows with a label, got 'made'"):
        tokenize_rows(Rows(name="made", shape=Shape.SENTENCE, train=split, eval=split), tokenizer, max_seq_length=8)


def sentences(*labels: object) -> list[dict[str, Any]]:
    return [{"sentence": f"w{index} w1", "label": label} for index, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        ([1, 0, 1], ("0", "1"), [1, 0, 1]),
        ([5, 10, 1], ("1", "5", "10"), [1, 2, 0]),
        ([-1, 1], ("-1", "1"), [0, 1]),
        (["good", "bad"], ("bad", "good"), [1, 0]),
        (["10", "9", ""], ("9", "10"), [1, 0]),
        ([True, False], ("False", "True"), [1, 0]),
        ([0, None, 1], ("0", "1"), [0, 1]),
    ],
)
def test_labels_are_numbered_in_their_order(
    tokenizer: PreTrainedTokenizerFast, labels: list[object], names: tuple[str, ...], indices: list[int]
) -> None:
    tokenized = tokenize_rows(rows_of(Shape.SENTENCE, sentences(*labels)), tokenizer, max_seq_length=8)
    assert tokenized.task == "sequence_classification"
    assert tokenized.label_names == names
    assert list(tokenized.train["labels"]) == indices


def test_class_names_keep_their_order_and_minus_one_is_unlabelled(tokenizer: PreTrainedTokenizerFast) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "maybe", "yes"])})
    split = Dataset.from_list(sentences(2, -1, 0), features=features)
    rows = Rows(name="made", shape=Shape.SENTENCE, train=split, eval=split)
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=8)
    assert tokenized.label_names == ("no", "maybe", "yes")
    assert list(tokenized.train["labels"]) == [2, 0]
    assert tokenized.num_dropped == 2


@pytest.mark.parametrize("label", [3, -2])
def test_a_label_out_of_range_is_named(tokenizer: PreTrainedTokenizerFast, label: int) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "maybe", "yes"])})
    split = Dataset.from_list(sentences(2, 1, 0), features=features)
    labels = pa.chunked_array([pa.array([2, label, 0])])
    table = split.data.table.set_column(1, "label", labels)  # as a file may hold them; datasets itself would object
    rows = Rows(name="made", shape=Shape.SENTENCE, train=Dataset(table, info=split.info), eval=split)
    with pytest.raises(ConfigError, match=rf"hold labels from 0 to 2 in column 'label', got '{label}'; in made"):
        tokenize_rows(rows, tokenizer, max_seq_length=8)


def test_a_class_of_the_held_out_rows_alone_counts_but_their_minus_one_does_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = rows_of(Shape.SENTENCE, sentences(0, 1), sentences(2, -1))
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=8)
    assert tokenized.label_names == ("0", "1", "2")
    assert list(tokenized.eval["labels"]) == [2]


def test_a_label_is_the_same_as_number_and_as_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenized = tokenize_rows(rows_of(Shape.SENTENCE, sentences(0, 1), sentences("1")), tokenizer, max_seq_length=8)
    assert list(tokenized.eval["labels"]) == [1]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[0], [1]], "whole numbers or names"),
        ([1, 1], "at least 2 classes"),
        ([None, None], "whole numbers or names"),
    ],
)
def test_labels_that_are_no_classes_are_refused(
    tokenizer: PreTrainedTokenizerFast, labels: list[object], said: str
) -> None:
    with pytest.raises(ConfigError, match=r"dataset must .*made\.jsonl") as caught:
        tokenize_rows(rows_of(Shape.SENTENCE, sentences(*labels)), tokenizer, max_seq_length=8)
    assert said in str(caught.value)


def test_floats_stay_as_they_are_and_null_is_unlabelled(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(Shape.SENTENCE, sentences(0.5, None, 4.75), sentences(3, None))
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=8)
    assert (tokenized.task, tokenized.label_names) == ("sequence_classification", ("LABEL_0",))
    assert list(tokenized.train["labels"]) == [0.5, 4.75]
    assert list(tokenized.eval["labels"]) == [3.0]
    assert tokenized.num_dropped == 2


@pytest.mark.parametrize(
    ("train", "held_out", "said"),
    [
        ([0.5, math.nan], [1.0], r"hold finite numbers in column 'label', got nan; in made\.jsonl"),
        ([0.5, -math.inf], [1.0], r"hold finite numbers in column 'label', got -inf; in made\.jsonl"),
        ([0.5, 1.0], [1e39], r"hold finite numbers in column 'label', got 1e\+39; in made\.jsonl"),
        ([0.5, 0.5], [1.0], r"have at least 2 different numbers in column 'label', got \[0\.5\]; in made"),
        ([0.5, 1.0], ["far"], r"hold numbers in column 'label' of every split, got 'string'; in made.*train"),
        ([0, 1], [0.5], r"hold whole numbers or names in column 'label', got 'float64'; in made.* regression"),
    ],
)
def test_numbers_that_cannot_be_learnt_are_refused(
    tokenizer: PreTrainedTokenizerFast, train: list[object], held_out: list[object], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^dataset must {said}"):
        tokenize_rows(rows_of(Shape.SENTENCE, sentences(*train), sentences(*held_out)), tokenizer, max_seq_length=8)


def test_a_pair_is_one_sequence_and_shares_the_length(tokenizer: PreTrainedTokenizerFast) -> None:
    made = [
        {"sentence1": "w1 w2", "sentence2": "w3", "label": 0},
        {"sentence1": "w1 " * 9, "sentence2": "w2 " * 9, "label": 1},
    ]
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenized = tokenize_rows(rows_of(Shape.SENTENCE_PAIR, made), tokenizer, max_seq_length=8)
    assert tokens(tokenizer, tokenized) == ["w1", "w2", "w3"]
    assert tokens(tokenizer, tokenized, row=1) == ["w1"] * 4 + ["w2"] * 4
    assert tokenized.train["token_type_ids"][:] == [[0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert tokenized.num_truncated == 2


WORDS = st.lists(st.integers(0, 60).map("w{}".format), max_size=20).map(" ".join)


@settings(max_examples=25, deadline=None)
@given(pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6), max_seq_length=st.integers(8, 32))
def test_labels_are_the_completions_tokens_whatever_the_length(
    pairs: list[tuple[str, str]], max_seq_length: int
) -> None:
    made = [{"prompt": prompt, "completion": completion} for prompt, completion in [*pairs, ("w1", "w2")]]
    tokenizer = tiny_tokenizer()
    rows = rows_of(Shape.PROMPT_COMPLETION, made)
    tokenized = tokenize_rows(rows, tokenizer, max_seq_length=max_seq_length)
    assert len(tokenized.train) + tokenized.num_dropped // 2 == len(made)
    for row in tokenized.train:
        assert len(row["input_ids"]) == len(row["labels"]) <= max_seq_length
        first = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
        assert row["labels"] == [IGNORED] * first + row["input_ids"][first:]
        assert first < len(row["labels"])

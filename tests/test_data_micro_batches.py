"""Order, padding and reading ahead of micro-batches."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_ray.config import Task
from lsp_ray.data.micro_batches import Batch, MicroBatches
from lsp_ray.data.tokenize import IGNORED, TokenizedRows
from tests.tiny import tiny_tokenizer


def numbered(num_rows: int) -> Dataset:
    """Rows that tell their number: its token repeated 2 to 5 times, loss on all but the first."""
    ids = [[20 + row] * (2 + row % 4) for row in range(num_rows)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[IGNORED, *row[1:]] for row in ids]})


def tokenized(num_train: int, num_eval: int = 5) -> TokenizedRows:
    return tokenized_of(numbered(num_train), numbered(num_eval))


def tokenized_of(train: Dataset, held_out: Dataset, task: Task = "causal_lm") -> TokenizedRows:
    return TokenizedRows(train=train, eval=held_out, task=task, label_names=(), num_truncated=0, num_dropped=0)


def micro_batches(of: TokenizedRows, **changes: Any) -> MicroBatches:
    options = {
        "batch_size": 2,
        "accumulation": 1,
        "seed": 0,
        "max_steps": -1,
        "num_train_epochs": 1.0,
        "max_eval_samples": 100,
    }
    return MicroBatches(of, tiny_tokenizer(), **(options | changes))


def row_numbers(batches: list[Batch]) -> list[int]:
    return [int(number) - 20 for batch in batches for number in batch["input_ids"][:, 0]]


def is_equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def test_a_batch_is_padded_on_the_right_and_padding_carries_no_loss() -> None:
    [batch] = micro_batches(tokenized(2), batch_size=2).step(0)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "positions"}
    del batch["positions"]
    assert {(tensor.dtype, tuple(tensor.shape)) for tensor in batch.values()} == {(torch.int64, (2, 3))}
    by_number = dict(zip(row_numbers([batch]), zip(*batch.values(), strict=True), strict=True))
    named = {name: [int(value) for value in row] for name, row in zip(batch, by_number[0], strict=True)}
    assert named == {"input_ids": [20, 20, 0], "attention_mask": [1, 1, 0], "labels": [IGNORED, 20, IGNORED]}


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "left"
    options: dict[str, Any] = {"batch_size": 2, "accumulation": 1, "seed": 0, "max_steps": 1, "num_train_epochs": 1.0}
    [batch] = MicroBatches(tokenized(2), tokenizer, max_eval_samples=1, **options).step(0)
    assert batch["attention_mask"][:, 0].all()
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "left")


def test_a_classifiers_labels_are_one_number_a_row() -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[20, 21], [22]], "token_type_ids": [[0, 1], [0]], "labels": [1, 0]},
    )
    [batch] = micro_batches(tokenized_of(rows, rows, "sequence_classification")).step(0)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "token_type_ids"}
    assert sorted(batch["labels"].tolist()) == [0, 1]
    assert batch["token_type_ids"].shape == batch["attention_mask"].shape == (2, 2)


def test_a_step_is_the_same_at_every_call_and_another_under_another_seed() -> None:
    first, again, other = (micro_batches(tokenized(50), seed=seed) for seed in (1, 1, 2))
    assert is_equal(first.step(3), again.step(3))
    assert [row_numbers(first.step(k)) for k in range(10)] != [row_numbers(other.step(k)) for k in range(10)]


def test_each_epoch_has_an_order_of_its_own() -> None:
    batches = micro_batches(tokenized(20), batch_size=20)
    first, second = row_numbers(batches.step(0)), row_numbers(batches.step(1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_the_last_step_of_an_epoch_is_filled_from_the_next() -> None:
    batches = micro_batches(tokenized(5), batch_size=2)
    numbers = [number for k in range(5) for number in row_numbers(batches.step(k))]
    assert sorted(numbers[:5]) == sorted(numbers[5:]) == list(range(5))


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    k=st.integers(0, 30),
    seed=st.integers(0, 2**32),
)
def test_accumulation_sees_the_rows_of_one_larger_batch(
    num_rows: int, batch_size: int, accumulation: int, k: int, seed: int
) -> None:
    rows = tokenized(num_rows)
    split = micro_batches(rows, batch_size=batch_size, accumulation=accumulation, seed=seed).step(k)
    whole = micro_batches(rows, batch_size=batch_size * accumulation, seed=seed).step(k)
    assert [len(batch["input_ids"]) for batch in split] == [batch_size] * accumulation
    assert row_numbers(split) == row_numbers(whole)


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"), [(7, 1.0, 7), (-1, 1.0, 3), (-1, 2.0, 5), (-1, 0.1, 1), (-1, 4.0, 10)]
)
def test_the_number_of_steps_follows_from_epochs_unless_given(max_steps: int, epochs: float, expected: int) -> None:
    batches = micro_batches(tokenized(10), accumulation=2, max_steps=max_steps, num_train_epochs=epochs)
    assert batches.num_steps == expected


def test_eval_batches_hold_every_row_once_in_order_of_length() -> None:
    batches = micro_batches(tokenized(2, num_eval=7)).eval_batches()
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2, 1]
    assert sorted(row_numbers(batches)) == list(range(7))
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths == sorted(widths)


def test_eval_takes_a_choice_of_many_rows_that_the_seed_decides() -> None:
    first, again, other = (
        row_numbers(micro_batches(tokenized(2, num_eval=60), max_eval_samples=9, seed=seed).eval_batches())
        for seed in (1, 1, 2)
    )
    assert len(set(first)) == 9
    assert first == again != other


def test_calibration_takes_train_rows_in_another_order_than_step_0() -> None:
    batches = micro_batches(tokenized(40), batch_size=4)
    calibration = batches.calibration(4)
    assert [batch["input_ids"].shape[0] for batch in calibration] == [4] * 4
    assert len(set(row_numbers(calibration))) == 16
    assert row_numbers(calibration[:1]) != row_numbers(batches.step(0))


def test_calibration_repeats_rows_where_there_are_few() -> None:
    assert sorted(row_numbers(micro_batches(tokenized(2)).calibration(3))) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("num_steps", [0, 1, 2, 9])
def test_reading_ahead_yields_the_steps_in_order(num_steps: int) -> None:
    batches = micro_batches(tokenized(11), accumulation=2)
    ahead = list(batches.read_ahead(num_steps, first_step=4))
    assert len(ahead) == num_steps
    assert all(is_equal(found, batches.step(4 + k)) for k, found in enumerate(ahead))


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read_ahead")]


def test_a_reader_that_is_closed_early_ends_its_thread() -> None:
    with closing(micro_batches(tokenized(11)).read_ahead(1000)) as ahead:
        next(ahead)
        assert len(reading_threads()) == 1
    assert reading_threads() == []


def test_an_error_while_reading_ahead_is_raised_where_its_step_is_asked_for() -> None:
    odd = Dataset.from_dict({"input_ids": [[20, 21]], "labels": [["no label", "at all"]]})
    ahead = micro_batches(tokenized_of(odd, odd)).read_ahead(3)
    with pytest.raises(ValueError, match="str"):
        next(ahead)
    assert reading_threads() == []

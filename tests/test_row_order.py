"""The order of train rows: each once an epoch, those of like length together where that is asked for."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lsp_ray.config import RunConfig
from lsp_ray.data.row_order import STEPS_SORTED, RowOrder, permutation, row_lengths
from lsp_ray.data.tokenize import TokenizedRows
from lsp_ray.errors import ConfigError
from tests.test_data_micro_batches import is_equal, micro_batches, numbered, row_numbers, tokenized, tokenized_of

SIZES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32)


@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=90), step_rows=SIZES, seed=SEEDS)
def test_every_row_comes_once_an_epoch_and_epochs_differ(lengths: list[int], step_rows: int, seed: int) -> None:
    num = len(lengths)
    order = RowOrder(seed, 0, num, step_rows=step_rows, lengths=np.array(lengths))
    epochs = [order.rows(epoch * num, num) for epoch in range(4)]
    assert all(sorted(rows) == list(range(num)) for rows in epochs)
    if num > 30:
        assert len({tuple(rows) for rows in epochs}) == 4


@given(num_rows=st.integers(1, 400), step_rows=SIZES, seed=SEEDS, epoch=st.integers(0, 5))
def test_rows_of_a_step_are_neighbours_in_length_among_those_sorted_with_them(
    num_rows: int, step_rows: int, seed: int, epoch: int
) -> None:
    """Every row of another length, so that the reference is exact: what was drawn together, sorted, cut."""
    lengths = np.random.default_rng(seed).permutation(num_rows)
    order = RowOrder(seed, 0, num_rows, step_rows=step_rows, lengths=lengths)
    begins = range(-(-epoch * num_rows // step_rows) * step_rows, (epoch + 1) * num_rows - step_rows + 1, step_rows)
    steps = [tuple(sorted(order.rows(begin, step_rows))) for begin in begins]
    drawn = permutation(seed, 0, epoch, num_rows)[-epoch * num_rows % step_rows :][: len(steps) * step_rows]
    together = step_rows * max(1, min(len(steps) // 4, STEPS_SORTED))
    expected = []
    for at in range(0, len(drawn), together):
        by_length = sorted(drawn[at : at + together].tolist(), key=lambda row: lengths[row])
        expected += [tuple(sorted(by_length[cut : cut + step_rows])) for cut in range(0, len(by_length), step_rows)]
    assert sorted(steps) == sorted(expected)


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=60),
    step_rows=SIZES,
    seed=SEEDS,
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
def test_who_goes_on_at_a_step_sees_the_rows_of_who_came_there(
    lengths: list[int], step_rows: int, seed: int, steps: list[int]
) -> None:
    def fresh() -> RowOrder:
        return RowOrder(seed, 0, len(lengths), step_rows=step_rows, lengths=np.array(lengths))

    run = fresh().rows(0, 41 * step_rows)
    later = fresh()
    for step in steps:
        first = step * step_rows
        assert later.rows(first, step_rows) == run[first : first + step_rows]


def test_a_step_is_the_same_in_a_run_that_begins_with_it_and_whatever_its_split() -> None:
    rows = tokenized(23)
    run, later = (micro_batches(rows, groups_by_length=True, accumulation=3) for _ in range(2))
    steps = [run.step(k) for k in range(9)]
    assert is_equal(later.step(8), steps[8])
    whole = micro_batches(rows, groups_by_length=True, batch_size=6)
    assert [row_numbers(whole.step(k)) for k in range(9)] == [row_numbers(step) for step in steps]


def test_less_is_padding() -> None:
    generator = np.random.default_rng(0)
    ids = [[20] * int(length) for length in generator.integers(2, 200, size=400)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})

    def padded(groups_by_length: bool) -> int:
        batches = micro_batches(tokenized_of(rows, rows), batch_size=8, groups_by_length=groups_by_length)
        return sum(batch["input_ids"].numel() for k in range(50) for batch in batches.step(k))

    filled = sum(map(len, ids))
    assert padded(False) > 1.5 * filled
    assert padded(True) < 1.15 * filled


def test_lengths_are_those_of_the_rows_chosen() -> None:
    rows = numbered(9).select([8, 3, 5])
    expected = [len(ids) for ids in rows["input_ids"]]
    assert row_lengths(rows).tolist() == row_lengths(list(rows)).tolist() == expected


def test_rows_that_do_not_tell_their_length_are_refused() -> None:
    for train in ([(1, 2), (3, 4)], Dataset.from_dict({"pixels": [[1], [2]]})):
        rows = TokenizedRows(train=train, eval=train, task="causal_lm", label_names=(), collate=dict)
        with pytest.raises(
            ConfigError, match=r"^train_sampling_strategy must be random where training rows have no in"
        ):
            micro_batches(rows, groups_by_length=True)


def test_joined_rows_have_no_lengths_to_go_by() -> None:
    with pytest.raises(ConfigError, match=r"^train_sampling_strategy must be random with packing, whose rows are all"):
        RunConfig(packing=True, train_sampling_strategy="group_by_length")

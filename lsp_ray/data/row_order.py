"""RowOrder: which train row comes when; a function of the seed, so that a run that goes on sees what it would have."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from lsp_ray.errors import ConfigError

Indices = np.ndarray[tuple[int], np.dtype[np.int64]]

STEPS_SORTED = 50  # at most so many steps' rows are sorted by length together, and a quarter of all: as in transformers


class RowOrder:
    """Epochs without a gap between them, each a permutation of all rows that (seed, draw, epoch) decide.

    With lengths, the rows of an optimizer update are of like length: rows in random order are sorted by length, some
    steps' worth at a time, cut into steps, and these come in random order. The update in which an epoch ends is as
    random as without.

    Args:
        seed: Of the run.
        draw: Orders of different draws are independent.
        num_rows: Of an epoch.
        step_rows: Rows of an optimizer update; only matters with lengths.
        lengths: Tokens of each row; default: they do not matter.
    """

    def __init__(
        self, seed: int, draw: int, num_rows: int, *, step_rows: int = 1, lengths: Indices | None = None
    ) -> None:
        self._seed, self._draw, self._num_rows = seed, draw, num_rows
        self._step_rows, self._lengths = step_rows, lengths
        self._grouped: tuple[int, Indices] | None = None  # an epoch and its order

    def rows(self, first: int, num: int) -> list[int]:
        """Return the rows at the positions from `first` on, counted through all epochs."""
        places = (divmod(at, self._num_rows) for at in range(first, first + num))
        return [int(self.epoch(epoch)[place]) for epoch, place in places]

    def epoch(self, epoch: int) -> Indices:
        """Return an epoch's permutation of range(num_rows)."""
        if self._lengths is None:
            return permutation(self._seed, self._draw, epoch, self._num_rows)
        held = self._grouped
        if held is None or held[0] != epoch:
            self._grouped = held = epoch, self._by_length(epoch, self._lengths)
        return held[1]

    def _by_length(self, epoch: int, lengths: Indices) -> Indices:
        order = permutation(self._seed, self._draw, epoch, self._num_rows)
        size = self._step_rows
        first = -epoch * self._num_rows % size  # before it: the end of the step in which the epoch before ended
        num_steps = max(0, self._num_rows - first) // size
        end = first + num_steps * size
        together = size * max(1, min(num_steps // 4, STEPS_SORTED))
        parts = [order[at : min(at + together, end)] for at in range(first, end, together)]
        like = [part[np.argsort(lengths[part], kind="stable")].reshape(-1, size) for part in parts]
        steps = np.concatenate(like) if like else order[:0].reshape(0, size)
        shuffled = steps[np.random.default_rng((self._seed, self._draw, epoch, num_steps)).permutation(num_steps)]
        return np.concatenate([order[:first], shuffled.reshape(-1), order[end:]])


@lru_cache(maxsize=8)
def permutation(seed: int, draw: int, epoch: int, total: int) -> Indices:
    """Return a permutation of range(total); cached, as every row of an epoch asks for it."""
    return np.random.default_rng((seed, draw, epoch)).permutation(total)


def row_lengths(rows: Any) -> Indices:
    """Return the number of tokens of each row.

    Raises:
        ConfigError: Rows do not tell.
    """
    try:
        if hasattr(rows, "column_names"):  # a Dataset of `datasets`: without making lists of all tokens
            ids = rows.with_format("arrow")[:].column("input_ids")
            lengths: Indices = np.diff(ids.combine_chunks().offsets.to_numpy())
            return lengths
        return np.array([len(row["input_ids"]) for row in rows])
    except (LookupError, TypeError) as error:
        raise ConfigError(
            "train_sampling_strategy", "be random where training rows have no input_ids", "group_by_length"
        ) from error

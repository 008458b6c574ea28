"""Packing: several examples in a row, so that little is padding; none sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lsp_ray.data.tokenize import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


class PackedRows(Sequence[list[dict[str, Any]]]):
    """Rows of a causal language model, several in each of at most `length` tokens.

    Args:
        rows: Token ids and labels, none longer than `length`.
        length: Tokens that a packed row has at most.
    """

    def __init__(self, rows: Dataset, length: int) -> None:
        self._rows, self.length = rows, length
        self._groups = pack([len(ids) for ids in rows["input_ids"]], length)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Return the examples of a packed row."""
        columns = self._rows[self._groups[index]]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def pack(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return groups of indices of at most `length` tokens together: best fit, longest first, as TRL's `bfd`."""
    groups: list[list[int]] = []
    open_groups: defaultdict[int, list[int]] = defaultdict(list)  # by the tokens that still fit
    room: list[int] = []  # its keys with a group, in order
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, lengths[index])
        if place == len(room):
            groups.append([])
            group, left = len(groups) - 1, length
        else:
            left = room[place]
            group = open_groups[left].pop()
            if not open_groups[left]:
                room.pop(place)
        groups[group].append(index)
        left -= lengths[index]
        if left > 0:
            if not open_groups[left]:
                insort(room, left)
            open_groups[left].append(group)
    return groups


def collate_packed(rows: Sequence[Sequence[dict[str, Any]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return int64 (B, S) tensors of packed rows, padded on the right.

    Beside `input_ids` and `labels` they are `position_ids`, which begin anew with every example, and `examples`: the
    number of the example in its row, from 1; 0 is padding. The first label of an example is nobody's: the token before
    it belongs to another.
    """
    columns: dict[str, list[torch.Tensor]] = defaultdict(list)
    for examples in rows:
        sizes = torch.tensor([len(example["input_ids"]) for example in examples])
        joined = {
            "input_ids": [token for example in examples for token in example["input_ids"]],
            "labels": [label for example in examples for label in (IGNORED, *example["labels"][1:])],
            "position_ids": [position for example in examples for position in range(len(example["input_ids"]))],
        }
        for name, values in joined.items():
            columns[name].append(torch.tensor(values))
        columns["examples"].append(torch.arange(1, len(sizes) + 1).repeat_interleave(sizes))
    fillers = {"input_ids": pad_token_id, "labels": IGNORED}
    return {
        name: pad_sequence(tensors, batch_first=True, padding_value=fillers.get(name, 0))
        for name, tensors in columns.items()
    }

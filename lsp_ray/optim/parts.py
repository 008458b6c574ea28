"""Sums over the parts of a step, and of squares: bits that depend on the numbers and their order alone, no thread's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROW = 1 << 12  # one thread adds up a row, whatever their number


def tree_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of float32 tensors of one shape by neighbours: (0 + 1) + (2 + 3), then on in the same way.

    So neighbours whose number is a power of two may be added beforehand, elsewhere, and the bits stay.
    """
    level = list(parts)
    while len(level) > 1:
        pairs = [left + right for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[2 * len(pairs) :]
    return level[0]


def square_sum(values: torch.Tensor) -> float:
    """Return the sum of squares of a flat float32 tensor, added up in float64; NaN or infinite where a value is."""
    whole = values.numel() // _ROW * _ROW
    rows = values[:whole].view(-1, _ROW).double().square_().sum(dim=1)
    rest = values[whole:].double().square_().sum(dim=0, keepdim=True)
    return float(sum(torch.cat([rows, rest]).tolist()))

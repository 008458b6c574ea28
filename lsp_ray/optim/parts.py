"""Sums over the parts of a step, and of squares: bits that depend on the numbers and their order alone, no thread's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_ROW = 1 << 12  # one thread adds up a row, whatever their number


def tree_sum(parts: Sequence[torch.Tensor], firsts: Sequence[int] | None = None) -> torch.Tensor:
    """Return the sum of float32 tensors of one shape by neighbours: (0 + 1) + (2 + 3), then on in the same way.

    So what `sim.store.sum_blocks` names may be added beforehand, elsewhere, and the bits stay.

    Args:
        parts: In order.
        firsts: Of each, its number, or the first of those that it is the sum of; default: each one is one.
    """
    level = list(zip(range(len(parts)) if firsts is None else firsts, parts, strict=True))
    width = 1
    while len(level) > 1:
        above: list[tuple[int, torch.Tensor]] = []
        for first, part in level:
            if above and above[-1][0] == first - width and first % (2 * width):
                above[-1] = (first - width, above[-1][1] + part)
            else:
                above.append((first, part))
        level, width = above, 2 * width
    return level[0][1]


def square_sum(values: torch.Tensor) -> float:
    """Return the sum of squares of a flat float32 tensor, added up in float64; NaN or infinite where a value is."""
    whole = values.numel() // _ROW * _ROW
    rows = values[:whole].view(-1, _ROW).double().square_().sum(dim=1)
    rest = values[whole:].double().square_().sum(dim=0, keepdim=True)
    return float(sum(torch.cat([rows, rest]).tolist()))

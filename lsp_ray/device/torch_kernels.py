"""Torch's operators that add deltas to weights: what there is everywhere. The kernels have their bits.

Legend: M rows (out), N columns (in), D × E what is sent, F rows of a factor, R non-zeros a row, K any number.
"""

from __future__ import annotations

import torch

from lsp_ray.device.noise import MAX_ELEMENTS, Noise
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize


def add_dense_(weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float, first: int = 0) -> None:
    """See cpu_kernels.py. In parts, as each makes a float32 copy; a weight of one part may have any layout.

    `first` is the position of the weight's first element within its target, where it is a part of one.
    """
    if weight_K.dtype == torch.float32:
        if keep != 1.0:
            weight_K.mul_(keep)
        weight_K.add_(delta_K)
        return
    assert weight_K.dtype == torch.bfloat16, f"no rounding for {weight_K.dtype}"
    for at in range(0, weight_K.numel(), MAX_ELEMENTS):
        part = weight_K[at : at + MAX_ELEMENTS]
        _add_rounded_(part, delta_K[at : at + MAX_ELEMENTS], noise.part(first + at, part.numel()), keep)


def add_decompressed_(
    weight_MN: torch.Tensor,
    projector: SparseProjector,
    delta_DE: torch.Tensor,
    size: UpdateSize,
    noise: Noise,
    keep: float,
) -> None:
    """See cpu_kernels.py. A few rows at a time: no full-size delta exists."""
    table_DN = _in_order(projector.right, size.applied(delta_DE).t()).t()
    num_rows, num_columns = weight_MN.shape
    left_MR = projector.left.value_FR.float()
    rows_at_once = max(1, MAX_ELEMENTS // num_columns)
    for row in range(0, num_rows, rows_at_once):
        rows_KN = weight_MN[row : row + rows_at_once]
        added_KN = _sum(left_MR[row : row + rows_at_once], _group_of_row(projector.left, row, len(rows_KN)), table_DN)
        add_dense_(rows_KN, added_KN, noise, keep, first=row * num_columns)


def _in_order(factor: BlockFactor, table_DK: torch.Tensor) -> torch.Tensor:
    """Return the (F, K) product of a factor with a table, each sum taken in order of the columns."""
    return _sum(factor.value_FR.float(), _group_of_row(factor, 0, factor.num_rows), table_DK)


def _group_of_row(factor: BlockFactor, first: int, num: int) -> torch.Tensor:
    row_K = torch.arange(first, first + num, device=factor.value_FR.device)
    border = factor.long_groups * (factor.group_rows + 1)
    # from the border on a group is shorter
    return torch.where(
        row_K < border, row_K // (factor.group_rows + 1), (row_K - factor.long_groups) // factor.group_rows
    )


def _sum(value_KR: torch.Tensor, group_K: torch.Tensor, table_DN: torch.Tensor) -> torch.Tensor:
    """Σ value[:, r] · table[group · R + r], one float32 operation after the other."""
    first_K = group_K * value_KR.shape[1]
    total_KN = value_KR[:, :1] * table_DN[first_K]
    for position in range(1, value_KR.shape[1]):
        total_KN += value_KR[:, position : position + 1] * table_DN[first_K + position]
    return total_KN


def _add_rounded_(weight: torch.Tensor, delta: torch.Tensor, noise: torch.Tensor, keep: float) -> None:
    exact = weight.float()
    if keep != 1.0:
        exact.mul_(keep)
    exact.add_(delta)
    exact.view(torch.int32).add_(noise.view_as(exact)).bitwise_and_(-(1 << 16))
    weight.copy_(exact)

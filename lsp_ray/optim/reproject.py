"""Carry an optimizer's state from one subspace into another. Paper, Algorithm 1, MAYBEUPDATE.

    m' = T_P m T_Qᵀ        v' = T_P² v (T_Q²)ᵀ, squares element-wise, as v holds squares

Where projectors are made of blocks, so are T_P = PᵀP_old and T_Q alike: blocks on the diagonal and zeros elsewhere. The
work is then that of r numbers for each element, not of d.

Legend: A, B sides of a payload's matrix, G blocks of R on its left side, H blocks of another R on its right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lsp_ray.optim.adamw import AdamWState


@dataclass(frozen=True, slots=True, kw_only=True)
class Reprojection:
    """A matrix of a payload, from element `first` on, gets new projectors: T_P and T_Q by blocks.

    float64 on the CPU; the matrix is (G · R, H · R).
    """

    first: int
    left_GRR: torch.Tensor
    right_HRR: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(A, B)."""
        return (
            self.left_GRR.shape[0] * self.left_GRR.shape[1],
            self.right_HRR.shape[0] * self.right_HRR.shape[1],
        )


def reproject_(state: AdamWState, change: Reprojection) -> None:
    """Move one matrix of a state in place: m, v, and what has not been sent yet, which is carried like m.

    A sum of updates begins anew: what it was until now is a weight's part by then.
    """
    left_GRR, right_HRR = change.left_GRR, change.right_HRR
    numel = change.shape[0] * change.shape[1]
    for flat in (state.exp_avg, state.error):
        if flat is not None:
            _move_(flat[change.first : change.first + numel].view(change.shape), left_GRR, right_HRR)
    if state.total is not None:
        state.total[change.first : change.first + numel].zero_()
    squares_AB = state.exp_avg_sq[change.first : change.first + numel].view(change.shape)
    _move_(squares_AB, left_GRR.square(), right_HRR.square())


def _move_(matrix_AB: torch.Tensor, left_GRR: torch.Tensor, right_HRR: torch.Tensor) -> None:
    """T_P X T_Qᵀ in place; float64 until it is written."""
    (num_left, size, _), (num_right, width, _) = left_GRR.shape, right_HRR.shape
    rows_GRB = matrix_AB.double().view(num_left, size, num_right * width)
    columns_HAS = torch.bmm(left_GRR, rows_GRB).view(num_left * size, num_right, width).transpose(0, 1)
    matrix_AB.copy_(torch.bmm(columns_HAS, right_HRR.mT).transpose(0, 1).reshape(matrix_AB.shape))

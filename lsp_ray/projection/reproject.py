"""Carry Adam's moments from one subspace into another. Paper, Algorithm 1, MAYBEUPDATE.

The paper's formulas are for orthonormal columns. In general the least gradient that an old m = P_oldᵀ G Q_old speaks
for is G = P_old (P_oldᵀP_old)⁻¹ m (Q_oldᵀQ_old)⁻¹ Q_oldᵀ; compressing that by P and Q gives m' = T_P m T_Qᵀ with

    T_P = PᵀP_old (P_oldᵀP_old)⁻¹

and the identity for a projector onto itself. v holds squares, so it is carried by the squares of the entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector

RIDGE = 1e-9  # relative to the mean diagonal, in float64: fitted columns can be nearly dependent


@dataclass(frozen=True, slots=True, kw_only=True)
class Reprojection:
    """A matrix of a payload gets another projector: elements first … first + D² belong to it. Projectors on the CPU."""

    first: int
    old: SparseProjector
    new: SparseProjector


def transition(old: SparseFactor, new: SparseFactor) -> torch.Tensor:
    """Return T (D, D), float64: coordinates in `old`'s columns to coordinates in `new`'s."""
    gram_DD = old.gram().double()
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    solved_DD: torch.Tensor = torch.linalg.solve(gram_DD, cross(old, new).t())
    return solved_DD.t()


def cross(old: SparseFactor, new: SparseFactor) -> torch.Tensor:
    """Return PᵀP_old (D, D), float64: the whole transition where columns are orthonormal."""
    return new.transposed_times(old.dense().float()).double()


def reproject_moments_(
    exp_avg_DD: torch.Tensor, exp_avg_sq_DD: torch.Tensor, left_DD: torch.Tensor, right_DD: torch.Tensor
) -> None:
    """Move m and v of one matrix, float32 (D, D) views, in place: m' = T_P m T_Qᵀ, v' = T_P² v (T_Q²)ᵀ."""
    exp_avg_DD.copy_(left_DD @ exp_avg_DD.double() @ right_DD.t())
    exp_avg_sq_DD.copy_(left_DD.square() @ exp_avg_sq_DD.double() @ right_DD.square().t())

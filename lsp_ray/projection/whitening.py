"""Whitening: coordinates in which a projector's columns are orthonormal.

With A = (PᵀP)^(-1/2) and B = (QᵀQ)^(-1/2) the columns of PA and QB are orthonormal, so what they keep of a gradient is
its orthogonal projection: the least bias that the columns of P and Q allow. And Adam's entries no longer share what
overlapping columns have in common. A and B are dense (D, D), so they stay where there is memory and time: the shards
turn what is sent, g, into A g B, take Adam's step there and send back A δ B. Device and link know nothing of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lsp_ray.projection.reproject import Reprojection, cross
from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector

RIDGE = 1e-3  # relative to the mean squared column length: bounds what a direction that P hardly has is blown up by


@dataclass(frozen=True, slots=True)
class Whitening:
    """A and B, float32 (D, D), symmetric, on the CPU; `scale` keeps the size of an update what it was without them."""

    left_DD: torch.Tensor
    right_DD: torch.Tensor
    scale: float

    @classmethod
    def of(cls, projector: SparseProjector) -> Whitening:
        """Compute both; the projector is on the CPU."""
        (left_DD, left_ratio), (right_DD, right_ratio) = map(_whitening, (projector.left, projector.right))
        return cls(left_DD, right_DD, left_ratio * right_ratio)

    def transitions(self, old: Whitening, change: Reprojection) -> tuple[torch.Tensor, torch.Tensor]:
        """T_P and T_Q, float64 (D, D), from the coordinates of `old` for `change.old` to these for `change.new`."""
        left_DD = cross(change.old.left.unscaled, change.new.left.unscaled)
        right_DD = cross(change.old.right.unscaled, change.new.right.unscaled)
        return (
            self.left_DD.double() @ left_DD @ old.left_DD.double(),
            self.right_DD.double() @ right_DD @ old.right_DD.double(),
        )

    def apply(self, matrix_DD: torch.Tensor) -> torch.Tensor:
        """Return A X B."""
        return self.left_DD @ matrix_DD @ self.right_DD


def _whitening(factor: SparseFactor) -> tuple[torch.Tensor, float]:
    """A = (P̂ᵀP̂ + ridge)^(-1/2), P̂ being the unscaled factor, and ‖P‖ / ‖P A‖."""
    squares_D, basis_DD = torch.linalg.eigh(factor.unscaled.gram().double())
    squares_D = squares_D.clamp(min=0.0)
    damped_D = squares_D + RIDGE * squares_D.mean()
    whitening_DD = (basis_DD * damped_D.rsqrt()) @ basis_DD.t()
    gram_DD = factor.gram().double()
    ratio = math.sqrt(float(gram_DD.trace() / (whitening_DD @ gram_DD @ whitening_DD).trace()))
    return whitening_DD.float(), ratio

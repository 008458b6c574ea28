"""Addition: a weight, and what a part of its unit's delta is to it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lsp_ray.projection.sparse_projector import SparseProjector


class Addition(NamedTuple):
    """weight ← keep · weight + δ, or + scale · P clamp(gain · δ) Qᵀ; made anew in every step, so it must cost little.

    Attributes:
        weight: bfloat16 or float32: contiguous, or with a projector a matrix (M, N) of any strides.
        projector: P and Q, where the weight is; None: the delta is of the weight's own size.
        scale: The projector's `update_scale`.
        decays: Whether weight decay is for this weight.
    """

    weight: torch.Tensor
    projector: SparseProjector | None = None
    scale: float = 1.0
    decays: bool = True

    @property
    def numel(self) -> int:
        """Elements of its part of the delta."""
        return self.weight.numel() if self.projector is None else math.prod(self.projector.dims)

"""How well a projection keeps a gradient it has not seen: bias at the best scalar, raw bias, cosine.

The estimate of G is A = P Pᵀ G Q Qᵀ. At the best scalar c the relative bias ‖c A − G‖ / ‖G‖ is √(1 − cos²), where cos
is the cosine between A and G; at c = 1 it is the paper's. For orthonormal columns both are the same, and the cosine is
‖Pᵀ G Q‖ / ‖G‖.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, K rank of a dense projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from lsp_ray.projection.bias import bias_of
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.whitening import Whitening
from scripts.projection_bench.gradients import Gradients

BYTES_PER_NNZ = 2 + 2  # a bfloat16 value and an int16 row number
BYTES_PER_DENSE = 2  # a bfloat16 value
EIGENVALUE_FLOOR = 1e-10  # of the largest: directions of P below it are rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Relative bias at the best scalar, at scalar 1, and the cosine between estimate and gradient."""

    bias: float
    raw_bias: float
    cosine: float

    @classmethod
    def orthonormal(cls, core: torch.Tensor, grad_MN: torch.Tensor) -> Score:
        """Of a projection with orthonormal columns, given what it keeps of the gradient: no scalar helps it."""
        cosine = min(1.0, math.sqrt(_square(core) / _square(grad_MN)))
        bias = math.sqrt(1 - cosine**2)
        return cls(bias=bias, raw_bias=bias, cosine=cosine)

    @classmethod
    def mean(cls, scores: Iterable[Score]) -> Score:
        """Means of all three."""
        held = list(scores)
        return cls(
            bias=fmean(score.bias for score in held),
            raw_bias=fmean(score.raw_bias for score in held),
            cosine=fmean(score.cosine for score in held),
        )


def sparse_score(projector: SparseProjector, gradients: Sequence[torch.Tensor]) -> Score:
    """The projector as it is."""
    scores = []
    for grad_MN in gradients:
        bias = bias_of(projector, projector.compress(grad_MN), _square(grad_MN))
        assert bias is not None, "a gradient of zeros has no bias"
        scores.append(Score(bias=bias.relative, raw_bias=bias.raw, cosine=bias.cosine))
    return Score.mean(scores)


def whitened_score(projector: SparseProjector, gradients: Sequence[torch.Tensor]) -> Score:
    """P (PᵀP)^(-1/2) and Q (QᵀQ)^(-1/2) in place of P and Q."""
    left_DD, right_DD = _inverse_root(projector.left.gram()), _inverse_root(projector.right.gram())
    return Score.mean(
        Score.orthonormal(left_DD @ projector.compress(grad_MN) @ right_DD, grad_MN) for grad_MN in gradients
    )


def balanced_score(projector: SparseProjector, gradients: Sequence[torch.Tensor]) -> Score:
    """Of what Adam's step is taken for in a run: P A (A Pᵀ G Q B) B Qᵀ, whitened by P̂ and Q̂ as the shards do it."""
    whitening = Whitening.of(projector)
    left_DD, right_DD = (side_DD.double() @ side_DD.double() for side_DD in (whitening.left_DD, whitening.right_DD))
    left_gram_DD, right_gram_DD = projector.left.gram().double(), projector.right.gram().double()
    scores = []
    for grad_MN in gradients:
        compressed_DD = projector.compress(grad_MN).double()
        core_DD = left_DD @ compressed_DD @ right_DD
        along, square = float((core_DD * compressed_DD).sum()), _square(grad_MN)
        kept = float((left_gram_DD @ core_DD @ right_gram_DD * core_DD).sum())
        cosine = min(1.0, along / math.sqrt(kept * square))
        raw_bias = math.sqrt(max(0.0, kept - 2 * along + square) / square)
        scores.append(Score(bias=math.sqrt(1 - cosine**2), raw_bias=raw_bias, cosine=cosine))
    return Score.mean(scores)


class DenseBases:
    """Leading left and right singular vectors of the calibration gradients laid side by side, and on top of each other.

    Args:
        gradients: Of one linear.
        width: How many directions are kept, at most the smaller side.
    """

    def __init__(self, gradients: Gradients, width: int) -> None:
        self._held_out = gradients.held_out
        self._left_KM = _leading(_sum(grad_MN @ grad_MN.t() for grad_MN in gradients.calibration), width)
        self._right_NK = _leading(_sum(grad_MN.t() @ grad_MN for grad_MN in gradients.calibration), width).t()
        self._half_KN = [self._left_KM @ grad_MN for grad_MN in gradients.held_out]
        self._core_KK = [half_KN @ self._right_NK for half_KN in self._half_KN]

    def two_sided(self, rank: int) -> Score:
        """Score of U Uᵀ G V Vᵀ with `rank` directions on each side."""
        return self._score([core_KK[:rank, :rank] for core_KK in self._core_KK])

    def one_sided(self, rank: int) -> Score:
        """Score with `rank` directions on the shorter side alone, as GaLore has it."""
        num_rows, num_columns = self._left_KM.shape[1], self._right_NK.shape[0]
        if num_rows >= num_columns:
            right_NK = self._right_NK[:, :rank]
            return self._score([grad_MN @ right_NK for grad_MN in self._held_out])
        return self._score([half_KN[:rank] for half_KN in self._half_KN])

    def _score(self, projected: Sequence[torch.Tensor]) -> Score:
        pairs = zip(projected, self._held_out, strict=True)
        return Score.mean(Score.orthonormal(core, grad_MN) for core, grad_MN in pairs)


def projector_bytes(shape: tuple[int, int], nnz_per_row: int) -> int:
    """Device bytes of P and Q: (M + N) · r · (2 + 2), whatever d is."""
    return sum(shape) * nnz_per_row * BYTES_PER_NNZ


def two_sided_rank(shape: tuple[int, int], nnz_per_row: int) -> int:
    """Rank of two dense factors of the same bytes: (M + N) · k · 2 = (M + N) · r · 4, so k = 2 r."""
    return projector_bytes(shape, nnz_per_row) // (sum(shape) * BYTES_PER_DENSE)


def one_sided_rank(shape: tuple[int, int], nnz_per_row: int) -> int:
    """Rank of one dense factor of the same bytes on the shorter side, at most that side."""
    side = min(shape)
    return min(side, projector_bytes(shape, nnz_per_row) // (side * BYTES_PER_DENSE))


def values_sent(method: str, shape: tuple[int, int], nnz_per_row: int, dim: int) -> int:
    """Values of the compressed gradient, which cross the link both ways each step and have optimizer states."""
    if method == "galore_one_sided":
        return max(shape) * one_sided_rank(shape, nnz_per_row)
    width = two_sided_rank(shape, nnz_per_row) if method == "galore_two_sided" else dim
    return width**2


def _sum(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum; there must be one at least."""
    return torch.stack(list(matrices)).sum(dim=0)


def _square(matrix: torch.Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _leading(symmetric_FF: torch.Tensor, width: int) -> torch.Tensor:
    """Return the `width` eigenvectors of the largest eigenvalues, largest first, as rows (K, F)."""
    vectors_FF: torch.Tensor = torch.linalg.eigh(symmetric_FF).eigenvectors
    return vectors_FF.flip(1)[:, :width].t().contiguous()


def _inverse_root(gram_DD: torch.Tensor) -> torch.Tensor:
    value_D, vector_DD = torch.linalg.eigh(gram_DD.double())
    keep_D = value_D > EIGENVALUE_FLOOR * value_D.max()
    root_D = torch.where(keep_D, value_D.clamp_min(torch.finfo(torch.float64).tiny).rsqrt(), 0.0)
    root_DD: torch.Tensor = (vector_DD * root_D) @ vector_DD.t()
    return root_DD.float()

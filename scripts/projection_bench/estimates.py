"""How well a projection keeps a gradient it has not seen: the relative bias at the best scalar.

The estimate of G is A = P Pᵀ G Q Qᵀ. At the best scalar c the relative bias ‖c A − G‖ / ‖G‖ is √(1 − cos²), where cos
is the cosine between A and G. For orthonormal columns c is 1, and the cosine is ‖Pᵀ G Q‖ / ‖G‖.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row, K rank of a dense projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import torch

from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from scripts.projection_bench.gradients import Gradients

BYTES_PER_VALUE = 2  # of P, Q and dense factors: bfloat16


def block_bias(projector: SparseProjector, gradients: Sequence[torch.Tensor]) -> float:
    """Mean bias of a projector for the gradients themselves; balanced factors are taken with the scale in them."""
    return fmean(_block_bias(projector, grad_MN) for grad_MN in gradients)


def scaled_bias(projector: SparseProjector, gradients: Sequence[torch.Tensor]) -> float:
    """Mean bias of a balanced projector's bases U and V for S G Z: what they were learned for, and a refit measures."""
    return fmean(_scaled_bias(projector, grad_MN) for grad_MN in gradients)


def _block_bias(projector: SparseProjector, grad_MN: torch.Tensor) -> float:
    compressed_DE = projector.compress(grad_MN)
    along = _square(compressed_DE)  # ⟨A, G⟩ = ‖Pᵀ G Q‖²
    return _bias(along / math.sqrt(_square(projector.decompress(compressed_DE)) * _square(grad_MN)))


def _scaled_bias(projector: SparseProjector, grad_MN: torch.Tensor) -> float:
    scaled_NM = projector.left.scale_columns(projector.right.scale_columns(grad_MN).t())
    return _bias(math.sqrt(_square(projector.compress(grad_MN)) / _square(scaled_NM)))


class DenseBases:
    """Leading left and right singular vectors of the calibration gradients laid side by side, and on top of each other.

    Args:
        gradients: Of one linear.
        width: How many directions are kept, at most a side.
    """

    def __init__(self, gradients: Gradients, width: int) -> None:
        self._held_out = gradients.held_out
        self._left_KM = _leading(_sum(grad_MN @ grad_MN.t() for grad_MN in gradients.calibration), width)
        self._right_NK = _leading(_sum(grad_MN.t() @ grad_MN for grad_MN in gradients.calibration), width).t()
        self._half_KN = [self._left_KM @ grad_MN for grad_MN in gradients.held_out]
        self._core_KK = [half_KN @ self._right_NK for half_KN in self._half_KN]

    def two_sided(self, left_rank: int, right_rank: int) -> float:
        """Bias of U Uᵀ G V Vᵀ with so many directions on each side."""
        return self._bias([core_KK[:left_rank, :right_rank] for core_KK in self._core_KK])

    def one_sided(self, rank: int) -> float:
        """Bias with `rank` directions on the shorter side alone, as GaLore has it."""
        num_rows, num_columns = self._left_KM.shape[1], self._right_NK.shape[0]
        if num_rows >= num_columns:
            right_NK = self._right_NK[:, :rank]
            return self._bias([grad_MN @ right_NK for grad_MN in self._held_out])
        return self._bias([half_KN[:rank] for half_KN in self._half_KN])

    def _bias(self, projected: Sequence[torch.Tensor]) -> float:
        """Of a projection with orthonormal columns, given what it keeps of each gradient."""
        pairs = zip(projected, self._held_out, strict=True)
        return fmean(_bias(math.sqrt(_square(core) / _square(grad_MN))) for core, grad_MN in pairs)


def projector_bytes(shape: tuple[int, int], nnz_per_row: int) -> int:
    """Device bytes of P and Q: (M + N) · r · 2, whatever d is."""
    return sum(shape) * nnz_per_row * BYTES_PER_VALUE


def two_sided_rank(nnz_per_row: int) -> int:
    """Rank of two dense factors of the same bytes: (M + N) · k · 2 = (M + N) · r · 2, so k = r."""
    return nnz_per_row


def one_sided_rank(shape: tuple[int, int], nnz_per_row: int) -> int:
    """Rank of one dense factor of the same bytes on the shorter side, at most that side."""
    side = min(shape)
    return min(side, projector_bytes(shape, nnz_per_row) // (side * BYTES_PER_VALUE))


def values_sent(method: str, sizes: ProjectorSizes) -> int:
    """Values of the compressed gradient, which cross the link both ways each step and have optimizer states."""
    if method == "galore_one_sided":
        return max(sizes.shape) * one_sided_rank(sizes.shape, sizes.nnz_per_row)
    if method == "galore_two_sided":
        return two_sided_rank(sizes.nnz_per_row) ** 2
    return math.prod(sizes.dims)


def _bias(cosine: float) -> float:
    return math.sqrt(max(0.0, 1.0 - cosine**2))


def _sum(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    """Their sum; there must be one at least."""
    return torch.stack(list(matrices)).sum(dim=0)


def _square(matrix: torch.Tensor) -> float:
    return float(matrix.square().sum(dtype=torch.float64))


def _leading(symmetric_FF: torch.Tensor, width: int) -> torch.Tensor:
    """Return the `width` eigenvectors of the largest eigenvalues, largest first, as rows (K, F)."""
    vectors_FF: torch.Tensor = torch.linalg.eigh(symmetric_FF).eigenvectors
    return vectors_FF.flip(1)[:, :width].t().contiguous()

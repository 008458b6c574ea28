"""Learn a sparse factor in closed form: alternate two least-squares problems.

Given a target Y (F, S) whose columns span what gradients do on this side of the weight, find P (F, D) with R non-zeros
a row, at fixed positions, such that P Rmat ≈ Y for some (D, S) matrix:

    Rmat = argmin ‖P Rmat − Y‖² + ridge      (a (D, D) system)
    p_i  = argmin ‖y_i − p_i Rmat[idx_i]‖²   (F systems of (R, R))

Legend: F rows, D subspace, R non-zeros a row, S width of the target.
"""

from __future__ import annotations

import torch

from lsp_ray.projection.sparse_factor import SparseFactor, similar_positions
from lsp_ray.projection.sparse_projector import SparseProjector

ITERATIONS = 8  # the residual falls by under 1 % an iteration from there on
RIDGE = 1e-4  # relative to the mean diagonal: columns of P can be nearly dependent
SMALLEST_NORM = 1e-2  # of a row to be balanced, relative: what is smaller may be noise
CHUNK_ELEMENTS = 1 << 25  # bounds the (rows, R, S) gather of the row systems to 128 MB


def fit_projector(
    left_target_MS: torch.Tensor,
    right_target_NS: torch.Tensor,
    dim: int,
    nnz_per_row: int,
    generator: torch.Generator,
    *,
    balanced: bool = False,
) -> SparseProjector | None:
    """Learn P and Q from sketches of the gradients' column and row spaces (float32, on the device that computes).

    With `balanced`, P and Q change all rows alike, as Adam does in full fine-tuning, whatever their gradients' size:
    P̂ and Q̂ are learned for S G Z, where S and Z divide each row and column by the root of its norm n, and P = S P̂,
    Q = Z Q̂. What P̂ learns of a row has norm √n, so that P's is 1. Whitening is that of P̂ and Q̂: Adam then sees an
    orthogonal projection of S G Z. The bias for G itself is larger.

    Returns None where there is nothing to learn from: a target that is all zero (a frozen or unused layer) or not
    finite. `generator` draws positions, on the CPU.
    """
    factors = []
    for target_FS in (left_target_MS, right_target_NS):
        norm = float(target_FS.norm())
        if not (0.0 < norm < float("inf")):
            return None
        if balanced:
            scale_F = _balance(target_FS)
            scaled_FS = target_FS / norm * scale_F.unsqueeze(1)
            factors.append(fit_factor(scaled_FS / scaled_FS.norm(), dim, nnz_per_row, generator).scaled(scale_F))
        else:
            factors.append(fit_factor(target_FS / norm, dim, nnz_per_row, generator))
    return SparseProjector(*factors)


def _balance(target_FS: torch.Tensor) -> torch.Tensor:
    """Return n^(-1/2) for every row (F,), n its norm relative to the root mean square of all; at most 10."""
    norm_F = target_FS.norm(dim=1)
    scale_F: torch.Tensor = (norm_F / norm_F.square().mean().sqrt()).clamp(min=SMALLEST_NORM).rsqrt()
    return scale_F


def fit_factor(target_FS: torch.Tensor, dim: int, nnz_per_row: int, generator: torch.Generator) -> SparseFactor:
    """Return a factor with unit columns whose column space best holds the target; similar rows share columns."""
    index_FR = similar_positions(target_FS, dim, nnz_per_row, generator).to(target_FS.device)
    return fit_values(index_FR, target_FS, dim, generator)


def fit_values(index_FR: torch.Tensor, target_FS: torch.Tensor, dim: int, generator: torch.Generator) -> SparseFactor:
    """Return the factor with non-zeros at these positions; see `fit_factor`. `generator` draws the start."""
    start_FR = torch.randn(index_FR.shape, generator=generator).to(target_FS)
    factor = SparseFactor(index_FR, start_FR, dim)
    for _ in range(ITERATIONS):
        basis_DS = _solve_basis(factor, target_FS)
        factor = factor.with_values(_solve_rows(index_FR, basis_DS, target_FS))
    return _with_unit_columns(_without_dead_columns(factor, start_FR))


def _solve_basis(factor: SparseFactor, target_FS: torch.Tensor) -> torch.Tensor:
    gram_DD = factor.transposed_times(factor.dense())
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    cholesky_DD = torch.linalg.cholesky(gram_DD)
    return torch.cholesky_solve(factor.transposed_times(target_FS), cholesky_DD)


def _solve_rows(index_FR: torch.Tensor, basis_DS: torch.Tensor, target_FS: torch.Tensor) -> torch.Tensor:
    nnz_per_row = index_FR.shape[1]
    rows_per_chunk = max(1, CHUNK_ELEMENTS // (nnz_per_row * basis_DS.shape[1]))
    solved = []
    for index_CR, target_CS in zip(index_FR.split(rows_per_chunk), target_FS.split(rows_per_chunk), strict=True):
        basis_CRS = basis_DS[index_CR.long()]
        gram_CRR = basis_CRS @ basis_CRS.mT
        mean_C11 = gram_CRR.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        eye_RR = torch.eye(nnz_per_row, dtype=gram_CRR.dtype, device=gram_CRR.device)
        damped_CRR = gram_CRR + (RIDGE * mean_C11 + torch.finfo(gram_CRR.dtype).tiny) * eye_RR
        moment_CR1 = basis_CRS @ target_CS.unsqueeze(-1)
        solved.append(torch.linalg.solve(damped_CRR, moment_CR1).squeeze(-1))
    return torch.cat(solved)


def _without_dead_columns(factor: SparseFactor, start_FR: torch.Tensor) -> SparseFactor:
    """Give a column whose rows all had no gradient its random start again, so that it stays trainable."""
    at_FR = factor.index_FR.long()
    dead_D = _column_squares(at_FR, factor.value_FR, factor.dim) == 0
    return factor.with_values(torch.where(dead_D[at_FR], start_FR, factor.value_FR))


def _with_unit_columns(factor: SparseFactor) -> SparseFactor:
    at_FR = factor.index_FR.long()
    return factor.with_values(factor.value_FR * _column_squares(at_FR, factor.value_FR, factor.dim).rsqrt()[at_FR])


def _column_squares(at_FR: torch.Tensor, value_FR: torch.Tensor, dim: int) -> torch.Tensor:
    squares_D = torch.zeros(dim, device=value_FR.device)
    return squares_D.index_add_(0, at_FR.reshape(-1), value_FR.reshape(-1).square())

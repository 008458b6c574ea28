"""Learn the bases of a factor in closed form: the leading directions of every group's rows of a sketch.

Given a target Y (F, W) whose columns span what gradients do on this side of the weight, the basis of group g holds the
R leading left singular vectors of its rows Y_g (S, W): of all (S, R) bases the one that keeps most of Y_g. They are the
eigenvectors of Y_g Y_gᵀ, an (S, S) matrix; one batched decomposition makes them for all groups. Its vectors are
orthonormal whatever the target is, so a group without a gradient, or with fewer than R directions, gets a whole basis.

Legend: F rows, G groups, S rows of a group, R non-zeros a row, W width of the target.
"""

from __future__ import annotations

import torch

from lsp_ray.projection.block_factor import BlockFactor

SMALLEST_NORM = 1e-2  # of a row to be balanced, relative: what is smaller may be noise


def fit_factor(target_FW: torch.Tensor, groups: int, nnz_per_row: int, *, balanced: bool = False) -> BlockFactor | None:
    """Learn a factor from a target, float32, on its device; None for one that is all zero or not finite.

    With `balanced`, the factor changes all rows alike, as Adam does in full fine-tuning, whatever their gradients'
    size: the bases U are learned for S Y, where S divides each row by the root of its norm n, and the factor is S U.
    What U learns of a row has norm √n, so that S U's is 1. The bias for the gradient itself is larger.
    """
    norm = float(target_FW.norm())
    if not 0.0 < norm < float("inf"):
        return None
    target_FW = target_FW / norm
    scale_F = _balance(target_FW) if balanced else None
    if scale_F is not None:
        target_FW = target_FW * scale_F.unsqueeze(1)
    empty = BlockFactor(target_FW.new_empty(target_FW.shape[0], nnz_per_row), groups)
    return empty.with_bases((_leading(rows_GSW, nnz_per_row) for rows_GSW in empty.split(target_FW, 0)), scale_F)


def _balance(target_FW: torch.Tensor) -> torch.Tensor:
    """Return n^(-1/2) for every row (F,), n its norm relative to the root mean square of all; at most 10."""
    norm_F = target_FW.norm(dim=1)
    scale_F: torch.Tensor = (norm_F / norm_F.square().mean().sqrt()).clamp(min=SMALLEST_NORM).rsqrt()
    return scale_F


def _leading(rows_GSW: torch.Tensor, nnz_per_row: int) -> torch.Tensor:
    """The R leading left singular vectors of every group's rows (G, S, R), the largest entry of each above zero."""
    square_G11 = rows_GSW.square().sum(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(rows_GSW.dtype).tiny)
    gram_GSS = rows_GSW @ rows_GSW.mT / square_G11
    basis_GSR: torch.Tensor = torch.linalg.eigh(gram_GSS).eigenvectors[..., -nnz_per_row:].flip(-1)
    largest_G1R = basis_GSR.gather(1, basis_GSR.abs().argmax(dim=1, keepdim=True))
    return basis_GSR * torch.where(largest_G1R < 0, -1.0, 1.0)

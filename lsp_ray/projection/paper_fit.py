"""The paper's own fit: Adam on the values of P and Q until the bias is small enough. Algorithm 1, as printed.

    minimise over values   mean over gradients of ‖P Pᵀ G Q Qᵀ − G‖  +  β (‖P‖ + ‖Q‖)        Frobenius, ‖G‖ = 1

No (M, N) estimate is formed. With g = Pᵀ G Q, A = PᵀP and B = QᵀQ

    ‖P Pᵀ G Q Qᵀ − G‖² = ⟨A g B, g⟩ − 2 ‖g‖² + ‖G‖²

so that a step costs two sparse products a gradient and products of (D, D) matrices, all of which autograd can follow.
Float32 resolves a bias down to about 1e-3.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, K gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch

from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector

LEARNING_RATE = 0.2  # on SmolLM2 0.1 to 0.4 differ by 2 %; at 0.01 sixty steps leave a bias of 0.73 to 0.98
NORM_WEIGHT = 1e-4  # β: the paper names no value; ‖P‖ + ‖Q‖ is some 50 at the start, so this adds 0.005 to a bias of 1
RESOLUTION = 1e-8  # added below the square root: its slope at zero is infinite


def fit_paper(
    gradients: Sequence[torch.Tensor],
    dim: int,
    nnz_per_row: int,
    generator: torch.Generator,
    *,
    max_bias: float,
    timeout_s: float,
    max_steps: int | None = None,
    learning_rate: float = LEARNING_RATE,
    norm_weight: float = NORM_WEIGHT,
    clock: Callable[[], float] = time.monotonic,
) -> SparseProjector | None:
    """Learn P and Q at random positions from full gradients; float32, on the gradients' device.

    The fit ends at the first of three: the raw relative bias ‖P Pᵀ G Q Qᵀ − G‖ / ‖G‖, its mean over the gradients, is
    at most `max_bias` (at its best scalar it is then no larger); `timeout_s` has passed; `max_steps` have been made.

    Args:
        gradients: (M, N) each, of any scale; those that are all zero teach nothing and are left out.
        dim: D.
        nnz_per_row: R.
        generator: Draws positions and the start N(0, 1/√r), on the CPU.
        max_bias: The paper's α.
        timeout_s: Seconds after which no further step is begun.
        max_steps: Adam steps at most; None leaves it to the time.
        learning_rate: Adam's.
        norm_weight: The paper's β.
        clock: Seconds, monotonic.

    Returns:
        None where there is nothing to learn from: no gradient is other than zero, or one is not finite.
    """
    deadline_s = clock() + timeout_s
    table_NKM = _side_by_side(gradients)
    if table_NKM is None:
        return None
    num_columns, _, num_rows = table_NKM.shape
    start = SparseProjector.random((num_rows, num_columns), dim, nnz_per_row, generator).to(table_NKM.device)
    left_MR = start.left.value_FR.requires_grad_(True)
    right_NR = start.right.value_FR.requires_grad_(True)
    adam = torch.optim.Adam([left_MR, right_NR], lr=learning_rate)
    for _ in count() if max_steps is None else range(max_steps):
        bias = _relative_bias(table_NKM, start.left.with_values(left_MR), start.right.with_values(right_NR))
        if float(bias.detach()) <= max_bias or clock() >= deadline_s:
            break
        adam.zero_grad()
        torch.autograd.backward([bias + norm_weight * (left_MR.norm() + right_NR.norm())])
        adam.step()
    return SparseProjector(start.left.with_values(left_MR.detach()), start.right.with_values(right_NR.detach()))


def _side_by_side(gradients: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the transposed gradients, each of norm 1, as one contiguous (N, K, M) table."""
    norms = [float(grad_MN.float().norm()) for grad_MN in gradients]
    if not all(map(math.isfinite, norms)):
        return None
    usable = [grad_MN.t().float() / norm for grad_MN, norm in zip(gradients, norms, strict=True) if norm > 0.0]
    return torch.stack(usable, dim=1) if usable else None


def _relative_bias(table_NKM: torch.Tensor, left: SparseFactor, right: SparseFactor) -> torch.Tensor:
    """Return the mean over the gradients of ‖P Pᵀ G Q Qᵀ − G‖, a scalar with its graph."""
    num_columns, num_gradients, num_rows = table_NKM.shape
    half_DKM = right.transposed_times(table_NKM.view(num_columns, -1)).view(right.dim, num_gradients, num_rows)
    # (M, D) is mostly zeros, yet autograd is quicker through this product than through embedding_bag's table
    compressed_DKD = half_DKM @ left.dense()  # gᵀ, for every gradient
    spread_DKD = torch.tensordot(right.gram(), compressed_DKD, dims=1) @ left.gram()
    inner_K = (compressed_DKD * spread_DKD).sum(dim=(0, 2))
    square_K = inner_K - 2.0 * compressed_DKD.square().sum(dim=(0, 2)) + 1.0
    mean: torch.Tensor = (square_K.clamp_min(0.0) + RESOLUTION).sqrt().mean()
    return mean

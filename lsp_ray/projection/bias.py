"""How much of a gradient a projector loses, without forming the gradient.

With G = dYᵀX, g = PᵀGQ and orthonormal bases, A = P g Qᵀ is an orthogonal projection of G (paper, Definition 2: the
bias is A − G), so ‖A − G‖² = ‖G‖² − ‖g‖² and no scalar makes it less. ‖G‖² = Σ (dY dYᵀ) ∘ (X Xᵀ).

A balanced projector (P = S U, Q = Z V) is judged by what it was fitted to and what Adam sees of it: S G Z, U and V in
the place of G, P and Q; g is the same.

Legend: T tokens, M rows (out), N columns (in), D × E what is sent, C tokens of a chunk.
"""

from __future__ import annotations

import math

import torch

from lsp_ray.projection.sparse_projector import SparseProjector

CHUNK_ELEMENTS = 1 << 22  # bounds the (C, T) products to 16 MB each


def relative_bias(compressed_DE: torch.Tensor, grad_square_sum: float) -> float | None:
    """Return ‖A − G‖ / ‖G‖, given g and ‖S G Z‖²; None for a gradient that is zero or not finite.

    S and Z are the factors' scales, one where they have none: `grad_square_sum` sees to it.
    """
    kept = float(compressed_DE.double().square().sum())
    if not (0 < grad_square_sum < math.inf and kept < math.inf):
        return None
    return math.sqrt(max(0.0, 1.0 - kept / grad_square_sum))


def grad_square_sum(projector: SparseProjector, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> torch.Tensor:
    """Return ‖S dYᵀX Z‖², a float32 scalar, without forming dYᵀX."""
    grad_output_TM = projector.left.scale_columns(grad_output_TM)
    input_TN = projector.right.scale_columns(input_TN)
    tokens_at_once = max(1, CHUNK_ELEMENTS // input_TN.shape[0])
    total = torch.zeros((), device=input_TN.device)
    pairs = zip(grad_output_TM.split(tokens_at_once), input_TN.split(tokens_at_once), strict=True)
    for grad_output_CM, input_CN in pairs:
        total += ((grad_output_CM @ grad_output_TM.t()).float() * (input_CN @ input_TN.t()).float()).sum()
    return total

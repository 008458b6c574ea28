"""How much of a gradient a projector loses, without forming the gradient.

With G = dYᵀX, g = PᵀGQ and A = PPᵀGQQᵀ (paper, Definition 2: the bias is A − G):

    <A, G> = ‖g‖²      <A, A> = <PᵀP g QᵀQ, g>      <G, G> = Σ (dY dYᵀ) ∘ (X Xᵀ)

A balanced projector (P = S P̂, Q = Z Q̂) is judged by what it was fitted to and what Adam sees of it: S G Z, P̂ and Q̂ in
the place of G, P and Q; g is the same.

Legend: T tokens, M rows (out), N columns (in), D subspace, C tokens of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lsp_ray.projection.sparse_projector import SparseProjector

RIDGE = 1e-9  # relative to the mean squared column length, in float64: columns can be nearly dependent
CHUNK_ELEMENTS = 1 << 22  # bounds the (C, T) products to 16 MB each


@dataclass(frozen=True, slots=True, kw_only=True)
class Bias:
    """What a projector loses of a gradient G, with A = PPᵀGQQᵀ. Paper, Definition 2.

    Adam does not care for c, and the scale of a projector's columns is arbitrary, so `relative` is the one to judge by.

    Attributes:
        raw: ‖A − G‖ / ‖G‖.
        relative: The least of ‖cA − G‖ / ‖G‖ over scalars c.
        cosine: Between A and G.
    """

    raw: float
    relative: float
    cosine: float


def bias_of(
    projector: SparseProjector, compressed_DD: torch.Tensor, grad_square_sum: float, *, whitened: bool = False
) -> Bias | None:
    """Bias of a gradient, given its compressed form and ‖S G Z‖²; None for a gradient that is zero or not finite.

    S and Z are the factors' scales, one where they have none: `grad_square_sum` sees to it.
    Whitened, P and Q stand for the orthonormal bases of their columns: A is then an orthogonal projection of G, and
    <A, G> = <A, A> = <(PᵀP)⁻¹ g (QᵀQ)⁻¹, g>.
    """
    compressed_DD = compressed_DD.double()
    if not torch.isfinite(compressed_DD).all():
        return None
    left_DD, right_DD = (factor.unscaled.gram().double() for factor in (projector.left, projector.right))
    if whitened:
        solved_DD = torch.linalg.solve(_damped(left_DD), compressed_DD)
        along = kept = float((torch.linalg.solve(_damped(right_DD), solved_DD.t()).t() * compressed_DD).sum())
    else:
        along = float(compressed_DD.square().sum())
        kept = float((left_DD @ compressed_DD @ right_DD * compressed_DD).sum())
    if not (0 < grad_square_sum < math.inf and 0 < along < math.inf and 0 < kept < math.inf):
        return None
    cosine = min(1.0, along / math.sqrt(kept * grad_square_sum))
    raw = math.sqrt(max(0.0, kept - 2 * along + grad_square_sum) / grad_square_sum)
    return Bias(raw=raw, relative=math.sqrt(1 - cosine**2), cosine=cosine)


def _damped(gram_DD: torch.Tensor) -> torch.Tensor:
    damped_DD = gram_DD.clone()
    damped_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean())
    return damped_DD


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

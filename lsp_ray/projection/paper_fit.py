"""The paper's own fit: Adam on the values of P and Q until the bias is small enough. Algorithm 1, on blocks.

    minimise over values   mean over gradients of ‖P Pᵀ G Q Qᵀ − G‖  +  β (‖P‖ + ‖Q‖)        Frobenius, ‖G‖ = 1

No (M, N) estimate is formed. With g = Pᵀ G Q, A = PᵀP and B = QᵀQ, both made of (R, R) blocks,

    ‖P Pᵀ G Q Qᵀ − G‖² = ⟨A g B, g⟩ − 2 ‖g‖² + ‖G‖²

so that a step costs some block products a gradient, all of which autograd can follow. What comes out is made
orthonormal: the columns of P and Q span what they did, and of all estimates in that span the projection is the nearest.
Float32 resolves a bias down to about 1e-3.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row, K gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import count

import torch

from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

LEARNING_RATE = 0.05  # held-out bias of SmolLM2 after 60 steps: 0.495; at 0.02 0.503, at 0.1 0.498, at 0.2 0.533
NORM_WEIGHT = 1e-4  # β: the paper names no value
RESOLUTION = 1e-8  # added below the square root: its slope at zero is infinite


def fit_paper(
    gradients: Sequence[Sequence[torch.Tensor]],
    sizes: Sequence[ProjectorSizes],
    generator: torch.Generator,
    *,
    max_bias: float,
    timeout_s: float,
    max_steps: int | None = None,
    learning_rate: float = LEARNING_RATE,
    norm_weight: float = NORM_WEIGHT,
    clock: Callable[[], float] = time.monotonic,
) -> list[SparseProjector] | None:
    """Learn a P for each of some linears and the Q that they share from full gradients; float32, where these are.

    The fit ends at the first of three: the raw relative bias ‖P Pᵀ G Q Qᵀ − G‖ / ‖G‖, its mean over the gradients, is
    at most `max_bias`; `timeout_s` has passed; `max_steps` have been made.

    Args:
        gradients: By linear: (M, N) each, of any scale; N is one. Those that are all zero teach nothing.
        sizes: Of the projectors, by linear.
        generator: Draws the start, random orthonormal blocks, on the CPU.
        max_bias: The paper's α.
        timeout_s: Seconds after which no further step is begun.
        max_steps: Adam steps at most; None leaves it to the time.
        learning_rate: Adam's.
        norm_weight: The paper's β.
        clock: Seconds, monotonic.

    Returns:
        None where there is nothing to learn from: a linear has no gradient other than zero, or one is not finite.
    """
    deadline_s = clock() + timeout_s
    tables = [_unit(of_linear) for of_linear in gradients]
    if not all(tables):
        return None
    starts = [
        BlockFactor.random(size.shape[side], size.groups[side], size.nnz_per_row, generator)
        for size, side in (*((size, 0) for size in sizes), (sizes[0], 1))
    ]
    values = [start.value_FR.to(tables[0][0].device).requires_grad_(True) for start in starts]
    *lefts, right = (BlockFactor(value, start.groups) for value, start in zip(values, starts, strict=True))
    adam = torch.optim.Adam(values, lr=learning_rate)
    for _ in count() if max_steps is None else range(max_steps):
        biases = [_raw_bias(grad, left, right) for left, table in zip(lefts, tables, strict=True) for grad in table]
        bias = torch.stack(biases).mean()
        if float(bias.detach()) <= max_bias or clock() >= deadline_s:
            break
        adam.zero_grad()
        torch.autograd.backward([bias + norm_weight * torch.stack([value.norm() for value in values]).sum()])
        adam.step()
    *lefts, right = (_orthonormal(factor) for factor in (*lefts, right))
    return [SparseProjector(left, right) for left in lefts]


def _unit(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those that are not zero, each of norm 1, float32; none where one is not finite."""
    norms = [float(grad_MN.float().norm()) for grad_MN in gradients]
    if not all(map(math.isfinite, norms)):
        return []
    return [grad_MN.float() / norm for grad_MN, norm in zip(gradients, norms, strict=True) if norm > 0.0]


def _raw_bias(grad_MN: torch.Tensor, left: BlockFactor, right: BlockFactor) -> torch.Tensor:
    """Return ‖P Pᵀ G Q Qᵀ − G‖ of a gradient of norm 1, a scalar with its graph."""
    compressed_DE = left.project(right.project(grad_MN).t()).t()
    left_DE = left.project(left.spread(compressed_DE).t()).t()  # A g
    spread_ED = right.project(right.spread(left_DE.t()).t()).t()  # (A g B)ᵀ
    square = (compressed_DE.t() * spread_ED).sum() - 2.0 * compressed_DE.square().sum() + 1.0
    return (square.clamp_min(0.0) + RESOLUTION).sqrt()


def _orthonormal(factor: BlockFactor) -> BlockFactor:
    """The nearest orthonormal bases of the same spans: U Vᵀ of each block's singular value decomposition."""
    decomposed = (torch.linalg.svd(block_GSR.detach(), full_matrices=False) for block_GSR in factor.blocks())
    return factor.with_bases(left_GSR @ right_GRR for left_GSR, _, right_GRR in decomposed)

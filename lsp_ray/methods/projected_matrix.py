"""ProjectedMatrix: one weight that LSPAdamW trains in its projector's subspace; its state as plain tensors.

Legend: M rows, N columns of the weight as it is stored, D subspace, R non-zeros a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lsp_ray.device.fits import GradientSketch
from lsp_ray.methods.moments import Moments
from lsp_ray.optim.adamw import AdamWHyper
from lsp_ray.projection.bias import bias_of
from lsp_ray.projection.reproject import Reprojection, reproject_moments_, transition
from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.whitening import Whitening

_CPU = torch.device("cpu")
_SIDES = ("left", "right")


class ProjectedMatrix:
    """P, Q and Adam's moments of g = PᵀGQ.

    Args:
        projector: On the weight's device.
        moments: Of g.
        whiten: Whether Adam's step is taken in whitened coordinates.
    """

    def __init__(self, projector: SparseProjector, moments: Moments, *, whiten: bool) -> None:
        self.moments = moments
        self._whitening = _moved(Whitening.of(projector.to(_CPU)), moments.device) if whiten else None
        self._set(projector)

    def _set(self, projector: SparseProjector) -> None:
        self.projector = projector
        self.update_scale = projector.update_scale  # kept: to compute it waits for the device

    @classmethod
    def fresh(cls, projector: SparseProjector, device: torch.device, *, whiten: bool) -> ProjectedMatrix:
        """A matrix before its first update."""
        return cls(projector, Moments.zeros((projector.dim, projector.dim), device), whiten=whiten)

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor], *, whiten: bool) -> ProjectedMatrix:
        """The matrix whose `state` this was; moments are shared with it."""
        moments = Moments.from_state(state)
        factors = []
        for side in _SIDES:
            scale_F = state.get(f"{side}_scale")
            scale_F = None if scale_F is None else scale_F.cpu()
            dim = moments.exp_avg.shape[0]
            factors.append(SparseFactor(state[f"{side}_index"], state[f"{side}_value"], dim, scale_F))
        return cls(SparseProjector(*factors), moments, whiten=whiten)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors alone, so that `torch.load(weights_only=True)` reads them; moments are this matrix's own."""
        state = self.moments.state()
        for side, factor in zip(_SIDES, (self.projector.left, self.projector.right), strict=True):
            state |= {f"{side}_index": factor.index_FR, f"{side}_value": factor.value_FR}
            if factor.scale_F is not None:
                state[f"{side}_scale"] = factor.scale_F
        return state

    def delta(self, compressed_DD: torch.Tensor, *, learning_rate: float, hyper: AdamWHyper) -> torch.Tensor:
        """Take Adam's step for g, float32; returns what P and Q decompress to the weight's delta, −lr included.

        `OptimizerShard.update` of one matrix, with the update's scale.
        """
        if self._whitening is None:
            return self.moments.delta(compressed_DD, learning_rate=learning_rate, hyper=hyper) * self.update_scale
        seen_DD = self._whitening.apply(compressed_DD)
        step_DD = self.moments.delta(seen_DD, learning_rate=learning_rate, hyper=hyper)
        return self._whitening.apply(step_DD) * (self._whitening.scale * self.update_scale)

    def relative_bias(self, grad_MN: torch.Tensor, compressed_DD: torch.Tensor) -> float | None:
        """Share of a gradient that P and Q lose, at its best scalar; None for one that is zero or not finite."""
        left, right = self.projector.left, self.projector.right
        scaled_NM = left.scale_columns(right.scale_columns(grad_MN).t())
        square_sum = float(torch.linalg.vector_norm(scaled_NM, dtype=torch.float32)) ** 2
        bias = bias_of(self.projector, compressed_DD, square_sum, whitened=self._whitening is not None)
        return None if bias is None else bias.relative

    def take(self, projector: SparseProjector) -> None:
        """Go on in another subspace of the same size; the moments follow: `carry_over` of one matrix."""
        change = Reprojection(first=0, old=self.projector.to(_CPU), new=projector.to(_CPU))
        if self._whitening is None:
            left_DD = transition(change.old.left, change.new.left)
            right_DD = transition(change.old.right, change.new.right)
        else:
            old, new = _moved(self._whitening, _CPU), Whitening.of(change.new)
            left_DD, right_DD = new.transitions(old, change)
            self._whitening = _moved(new, self.moments.device)
        device = self.moments.device
        reproject_moments_(self.moments.exp_avg, self.moments.exp_avg_sq, left_DD.to(device), right_DD.to(device))
        self._set(projector)


def learned(
    grad_MN: torch.Tensor, dim: int, nnz_per_row: int, generator: torch.Generator, *, balanced: bool
) -> SparseProjector | None:
    """Learn a projector from one full gradient, in its dtype, on its device; None if it is zero or not finite."""
    sketch = GradientSketch((grad_MN.shape[0], grad_MN.shape[1]), dim, generator, balanced=balanced)
    sketch.add_full(grad_MN)
    projector = sketch.learn(dim, nnz_per_row, generator, grad_MN.device)
    return None if projector is None else projector.to(grad_MN.device, grad_MN.dtype)


def _moved(whitening: Whitening, device: torch.device) -> Whitening:
    return Whitening(whitening.left_DD.to(device), whitening.right_DD.to(device), whitening.scale)

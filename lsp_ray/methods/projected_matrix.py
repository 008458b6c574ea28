"""ProjectedMatrix: one weight that LSPAdamW trains in its projector's subspace; its state as plain tensors.

Legend: M rows, N columns of the weight as it is stored, D × E what Adam sees, R non-zeros a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lsp_ray.device.fits import ClosedFormFit
from lsp_ray.errors import ConfigError
from lsp_ray.methods.moments import Moments
from lsp_ray.optim.adamw import AdamWState
from lsp_ray.optim.reproject import Reprojection, reproject_
from lsp_ray.projection.bias import relative_bias
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector
from lsp_ray.projection.transition import transition

_SIDES = ("left", "right")


class ProjectedMatrix:
    """P, Q and Adam's moments of g = PᵀGQ.

    Args:
        projector: On the weight's device.
        moments: Of g.
    """

    def __init__(self, projector: SparseProjector, moments: Moments) -> None:
        self.moments = moments
        self._set(projector)

    def _set(self, projector: SparseProjector) -> None:
        self.projector = projector
        self.update_scale = projector.update_scale  # kept: to compute it waits for the device

    @classmethod
    def fresh(cls, projector: SparseProjector, device: torch.device) -> ProjectedMatrix:
        """A matrix before its first update."""
        return cls(projector, Moments.zeros(projector.dims, device))

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> ProjectedMatrix:
        """The matrix whose `state` this was; moments are shared with it."""
        moments = Moments.from_state(state)
        factors = []
        for side, dim in zip(_SIDES, moments.exp_avg.shape, strict=True):
            value_FR, scale_F = state[f"{side}_value"], state.get(f"{side}_scale")
            factors.append(BlockFactor(value_FR, dim // value_FR.shape[1], None if scale_F is None else scale_F.cpu()))
        return cls(SparseProjector(*factors), moments)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors alone, so that `torch.load(weights_only=True)` reads them; moments are this matrix's own."""
        state = self.moments.state()
        for side, factor in zip(_SIDES, (self.projector.left, self.projector.right), strict=True):
            state[f"{side}_value"] = factor.value_FR
            if factor.scale_F is not None:
                state[f"{side}_scale"] = factor.scale_F
        return state

    def relative_bias(self, grad_MN: torch.Tensor, compressed_DE: torch.Tensor) -> float | None:
        """Share of a gradient that P and Q lose; None for one that is zero or not finite."""
        left, right = self.projector.left, self.projector.right
        scaled_NM = left.scale_columns(right.scale_columns(grad_MN).t())
        return relative_bias(compressed_DE, float(torch.linalg.vector_norm(scaled_NM, dtype=torch.float32)) ** 2)

    def take(self, projector: SparseProjector) -> None:
        """Go on in another subspace of the same size; the moments follow, as a shard's do."""
        device = self.moments.device
        change = Reprojection(
            first=0,
            left_GRR=transition(self.projector.left, projector.left).to(device),
            right_HRR=transition(self.projector.right, projector.right).to(device),
        )
        exp_avg, exp_avg_sq = self.moments.exp_avg.view(-1), self.moments.exp_avg_sq.view(-1)
        reproject_(AdamWState(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, step=self.moments.step), change)
        self._set(projector)


def check_form(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a state that a version with projectors of another form wrote.

    Raises:
        ConfigError: It is one.
    """
    if "left_index" in state:
        bound = "hold projectors of orthonormal blocks; this one has another form, which older versions wrote"
        raise ConfigError("state_dict", bound, "left_index")


def learned(
    grad_MN: torch.Tensor, sizes: ProjectorSizes, generator: torch.Generator, *, balanced: bool
) -> SparseProjector | None:
    """Learn a projector of some sizes from one full gradient, in its dtype; None if it is zero or not finite."""
    fit = ClosedFormFit(balanced=balanced)
    sketch = fit.lesson(sizes.shape, generator)
    sketch.add_full(grad_MN)
    projectors = fit.learn([sketch], [sizes], generator, grad_MN.device)
    return None if projectors is None else projectors[0].to(grad_MN.device, grad_MN.dtype)

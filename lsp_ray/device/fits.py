"""Fits: what is remembered of the gradients that pass a linear, and the projector that is learned from it.

Legend: T tokens, M rows (out), N columns (in), D subspace, S width of a sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lsp_ray.projection.closed_form import fit_projector
from lsp_ray.projection.paper_fit import fit_paper
from lsp_ray.projection.sparse_projector import SparseProjector


class Lesson(Protocol):
    """One linear's gradients, remembered on the host so that learning takes little more of the device than training."""

    def add(self, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> None:
        """Add one micro-batch's gradient dYᵀX, given its factors."""
        ...

    def learn(
        self, dim: int, nnz_per_row: int, generator: torch.Generator, device: torch.device
    ) -> SparseProjector | None:
        """Return a projector in float32, made on `device`; None if the gradients were all zero or not finite."""
        ...


class Fit(Protocol):
    """A way to learn projectors."""

    def lesson(self, shape: tuple[int, int], dim: int, generator: torch.Generator) -> Lesson:
        """Return an empty lesson for a weight of `shape` (M, N)."""
        ...

    def host_bytes(self, shape: tuple[int, int], dim: int, num_batches: int) -> int:
        """Memory that a lesson of `num_batches` micro-batches occupies."""
        ...


class GradientSketch:
    """Sums of random combinations of gradients: dYᵀ(XΩ), (M, S), and Xᵀ(dYΩ'), (N, S), for the closed-form fit.

    Their columns span what the gradients' own columns and rows span (randomised range finder, Halko, Martinsson and
    Tropp 2011), so the full gradient is needed neither here.

    Args:
        shape: (M, N) of the weight.
        width: S.
        generator: Draws Ω on the CPU.
        balanced: See `fit_projector`.
    """

    def __init__(
        self, shape: tuple[int, int], width: int, generator: torch.Generator, *, balanced: bool = False
    ) -> None:
        self._balanced = balanced
        rows, columns = shape
        self.left_MS = torch.zeros(rows, width)
        self.right_NS = torch.zeros(columns, width)
        self._generator = generator

    def add(self, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> None:
        """See `Lesson`."""
        width = self.left_MS.shape[1]
        draw_NS = self._draw(self.right_NS.shape[0], width, input_TN)
        draw_MS = self._draw(self.left_MS.shape[0], width, input_TN)
        self.left_MS += (grad_output_TM.t() @ (input_TN @ draw_NS)).float().cpu()
        self.right_NS += (input_TN.t() @ (grad_output_TM @ draw_MS)).float().cpu()

    def learn(
        self, dim: int, nnz_per_row: int, generator: torch.Generator, device: torch.device
    ) -> SparseProjector | None:
        """See `Lesson`."""
        targets = self.left_MS.to(device), self.right_NS.to(device)
        return fit_projector(*targets, dim, nnz_per_row, generator, balanced=self._balanced)

    def _draw(self, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(rows, width, generator=self._generator).to(like)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedFormFit:
    """Alternating least squares on sketches; `balanced`: see `fit_projector`."""

    balanced: bool

    def lesson(self, shape: tuple[int, int], dim: int, generator: torch.Generator) -> Lesson:
        """See `Fit`."""
        return GradientSketch(shape, dim, generator, balanced=self.balanced)

    def host_bytes(self, shape: tuple[int, int], dim: int, num_batches: int) -> int:
        """See `Fit`. Float32, and no more for more batches."""
        return 4 * sum(shape) * dim


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperFit:
    """The paper's fit; it needs every full gradient.

    Args:
        max_bias: The paper's α.
        timeout_s: Seconds that one matrix may take.
    """

    max_bias: float
    timeout_s: float

    def lesson(self, shape: tuple[int, int], dim: int, generator: torch.Generator) -> Lesson:
        """See `Fit`."""
        return _FullGradients(self)

    def host_bytes(self, shape: tuple[int, int], dim: int, num_batches: int) -> int:
        """See `Fit`. Float32."""
        return 4 * shape[0] * shape[1] * num_batches


class _FullGradients:
    def __init__(self, fit: PaperFit) -> None:
        self._fit = fit
        self._gradients: list[torch.Tensor] = []

    def add(self, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> None:
        """See `Lesson`."""
        self._gradients.append((grad_output_TM.t() @ input_TN).float().cpu())

    def learn(
        self, dim: int, nnz_per_row: int, generator: torch.Generator, device: torch.device
    ) -> SparseProjector | None:
        """See `Lesson`."""
        return fit_paper(
            [grad_MN.to(device) for grad_MN in self._gradients],
            dim,
            nnz_per_row,
            generator,
            max_bias=self._fit.max_bias,
            timeout_s=self._fit.timeout_s,
        )

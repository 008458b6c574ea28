"""Fits: what is remembered of the gradients that pass a linear, and the projector that is learned from it.

Legend: T tokens, M rows (out), N columns (in), D subspace, S width of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    def state(self) -> dict[str, torch.Tensor]:
        """What an empty lesson needs to go on as this one, on the CPU."""
        ...

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where another lesson was.

        Raises:
            ValueError: It was for another matrix.
        """
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

    def add_full(self, grad_MN: torch.Tensor) -> None:
        """Add a gradient that is there in full."""
        width = self.left_MS.shape[1]
        self.left_MS += (grad_MN @ self._draw(self.right_NS.shape[0], width, grad_MN)).float().cpu()
        self.right_NS += (grad_MN.t() @ self._draw(self.left_MS.shape[0], width, grad_MN)).float().cpu()

    def learn(
        self, dim: int, nnz_per_row: int, generator: torch.Generator, device: torch.device
    ) -> SparseProjector | None:
        """See `Lesson`."""
        targets = self.left_MS.to(device), self.right_NS.to(device)
        return fit_projector(*targets, dim, nnz_per_row, generator, balanced=self._balanced)

    def state(self) -> dict[str, torch.Tensor]:
        """See `Lesson`."""
        return {"left": self.left_MS, "right": self.right_NS, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Lesson`."""
        for name, into in (("left", self.left_MS), ("right", self.right_NS)):
            if state[name].shape != into.shape:
                raise ValueError(f"a {name} sketch of {tuple(state[name].shape)}, not {tuple(into.shape)}")
            into.copy_(state[name])
        self._generator.set_state(state["generator"])

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
        return _FullGradients(self, shape)

    def host_bytes(self, shape: tuple[int, int], dim: int, num_batches: int) -> int:
        """See `Fit`. Float32."""
        return 4 * shape[0] * shape[1] * num_batches


class _FullGradients:
    def __init__(self, fit: PaperFit, shape: tuple[int, int]) -> None:
        self._fit = fit
        self._shape = shape
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

    def state(self) -> dict[str, torch.Tensor]:
        """See `Lesson`."""
        return {str(position): grad_MN for position, grad_MN in enumerate(self._gradients)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Lesson`."""
        self._gradients = [state[str(position)] for position in range(len(state))]
        if any(grad_MN.shape != self._shape for grad_MN in self._gradients):
            raise ValueError(f"a gradient of another matrix than {self._shape}")

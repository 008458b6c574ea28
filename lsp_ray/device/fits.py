"""Fits: what is remembered of the gradients that pass a linear, and the projectors that are learned from it.

Linears that read the same input learn together: a P each, and one Q.

Legend: T tokens, M rows (out), N columns (in), W width of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lsp_ray.config import LspConfig
from lsp_ray.projection.block_factor import BlockFactor
from lsp_ray.projection.closed_form import fit_factor
from lsp_ray.projection.paper_fit import fit_paper
from lsp_ray.projection.sparse_projector import ProjectorSizes, SparseProjector

# half as wide adds 0.007 to the held-out bias of SmolLM2, twice as wide saves 0.003 at twice the cost
SKETCH_WIDTH = 128


class Lesson(Protocol):
    """One linear's gradients, remembered on the host so that learning takes little more of the device than training."""

    def add(self, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> None:
        """Add one micro-batch's gradient dYᵀX, given its factors."""
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

    def lesson(self, shape: tuple[int, int], generator: torch.Generator) -> Lesson:
        """Return an empty lesson for a weight of `shape` (M, N)."""
        ...

    def learn(
        self,
        lessons: Sequence[Lesson],
        sizes: Sequence[ProjectorSizes],
        generator: torch.Generator,
        device: torch.device,
    ) -> list[SparseProjector] | None:
        """Return projectors of these sizes for linears that share Q, float32, made on `device`.

        None if there was nothing to learn from: gradients all zero, or not finite.
        """
        ...

    def host_bytes(self, shape: tuple[int, int], num_batches: int) -> int:
        """Memory that a lesson of `num_batches` micro-batches occupies."""
        ...


class GradientSketch:
    """Sums of random combinations of gradients: dYᵀ(XΩ), (M, W), and Xᵀ(dYΩ'), (N, W), for the closed-form fit.

    Their columns span what the gradients' own columns and rows span (randomised range finder, Halko, Martinsson and
    Tropp 2011), so the full gradient is needed neither here.

    Args:
        shape: (M, N) of the weight.
        generator: Draws Ω on the CPU.
    """

    def __init__(self, shape: tuple[int, int], generator: torch.Generator) -> None:
        self.left_MW, self.right_NW = (torch.zeros(side, SKETCH_WIDTH) for side in shape)
        self._generator = generator

    def add(self, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> None:
        """See `Lesson`."""
        draw_NW, draw_MW = self._draw(self.right_NW, input_TN), self._draw(self.left_MW, input_TN)
        self.left_MW += (grad_output_TM.t() @ (input_TN @ draw_NW)).float().cpu()
        self.right_NW += (input_TN.t() @ (grad_output_TM @ draw_MW)).float().cpu()

    def add_full(self, grad_MN: torch.Tensor) -> None:
        """Add a gradient that is there in full."""
        self.left_MW += (grad_MN @ self._draw(self.right_NW, grad_MN)).float().cpu()
        self.right_NW += (grad_MN.t() @ self._draw(self.left_MW, grad_MN)).float().cpu()

    def state(self) -> dict[str, torch.Tensor]:
        """See `Lesson`."""
        return {"left": self.left_MW, "right": self.right_NW, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Lesson`."""
        for name, into in (("left", self.left_MW), ("right", self.right_NW)):
            if state[name].shape != into.shape:
                raise ValueError(f"a {name} sketch of {tuple(state[name].shape)}, not {tuple(into.shape)}")
            into.copy_(state[name])
        self._generator.set_state(state["generator"])

    def _draw(self, sketch_FW: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(sketch_FW.shape, generator=self._generator).to(like)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedFormFit:
    """The leading directions of sketches; `balanced`: see `fit_factor`."""

    balanced: bool

    def lesson(self, shape: tuple[int, int], generator: torch.Generator) -> GradientSketch:
        """See `Fit`."""
        return GradientSketch(shape, generator)

    def learn(
        self,
        lessons: Sequence[Lesson],
        sizes: Sequence[ProjectorSizes],
        generator: torch.Generator,
        device: torch.device,
    ) -> list[SparseProjector] | None:
        """See `Fit`. A shared Q is learned from the sketches side by side, each with the same weight."""
        sketches = [lesson for lesson in lessons if isinstance(lesson, GradientSketch)]
        side_by_side_NW = torch.cat([sketch.right_NW / sketch.right_NW.norm() for sketch in sketches], dim=1)
        right = self._factor(side_by_side_NW.to(device), sizes[0].groups[1], sizes[0].nnz_per_row)
        lefts = [
            self._factor(sketch.left_MW.to(device), size.groups[0], size.nnz_per_row)
            for sketch, size in zip(sketches, sizes, strict=True)
        ]
        learned = [SparseProjector(left, right) for left in lefts if left is not None and right is not None]
        return learned if len(learned) == len(sizes) else None

    def _factor(self, target_FW: torch.Tensor, groups: int, nnz_per_row: int) -> BlockFactor | None:
        return fit_factor(target_FW, groups, nnz_per_row, balanced=self.balanced)

    def host_bytes(self, shape: tuple[int, int], num_batches: int) -> int:
        """See `Fit`. Float32, and no more for more batches."""
        return 4 * sum(shape) * SKETCH_WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperFit:
    """The paper's fit; it needs every full gradient.

    Args:
        max_bias: The paper's α.
        timeout_s: Seconds that linears which share Q may take together.
    """

    max_bias: float
    timeout_s: float

    def lesson(self, shape: tuple[int, int], generator: torch.Generator) -> FullGradients:
        """See `Fit`."""
        return FullGradients(shape)

    def learn(
        self,
        lessons: Sequence[Lesson],
        sizes: Sequence[ProjectorSizes],
        generator: torch.Generator,
        device: torch.device,
    ) -> list[SparseProjector] | None:
        """See `Fit`."""
        held = [lesson.gradients for lesson in lessons if isinstance(lesson, FullGradients)]
        return fit_paper(
            [[grad_MN.to(device) for grad_MN in gradients] for gradients in held],
            sizes,
            generator,
            max_bias=self.max_bias,
            timeout_s=self.timeout_s,
        )

    def host_bytes(self, shape: tuple[int, int], num_batches: int) -> int:
        """See `Fit`. Float32."""
        return 4 * shape[0] * shape[1] * num_batches


class FullGradients:
    """Every gradient as it is; see `Lesson`."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self.gradients: list[torch.Tensor] = []

    def add(self, grad_output_TM: torch.Tensor, input_TN: torch.Tensor) -> None:
        """See `Lesson`."""
        self.gradients.append((grad_output_TM.t() @ input_TN).float().cpu())

    def state(self) -> dict[str, torch.Tensor]:
        """See `Lesson`."""
        return {str(position): grad_MN for position, grad_MN in enumerate(self.gradients)}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `Lesson`."""
        self.gradients = [state[str(position)] for position in range(len(state))]
        if any(grad_MN.shape != self._shape for grad_MN in self.gradients):
            raise ValueError(f"a gradient of another matrix than {self._shape}")


def fit_of(lsp: LspConfig) -> Fit:
    """How a run's projectors are learned."""
    if lsp.fit == "paper":
        return PaperFit(max_bias=lsp.max_bias, timeout_s=lsp.timeout_s)
    return ClosedFormFit(balanced=lsp.balance)

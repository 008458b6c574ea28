"""GaLore: Adam on the device, in a low-rank space that each matrix's own gradient is decomposed into now and then.

Zhao et al. 2024 (arXiv 2403.03507), Algorithm 2, as galore-torch runs it: one side, the shorter, is projected; moments
stay as they are when the space changes.

Legend: A, B sides of a matrix as its weight is kept, K rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lsp_ray.config import GaloreConfig
from lsp_ray.device.unit import Unit
from lsp_ray.errors import ConfigError
from lsp_ray.models.layers import Layer
from lsp_ray.optim.shard import OptimizerShard, is_usable


def check_rank(layers: Sequence[Layer], galore: GaloreConfig) -> None:
    """Raise ConfigError where the rank leaves no linear of the model to project."""
    bound = max((min(site.shape) for layer in layers for site in layer.linears), default=0) - 1
    if galore.rank > bound:
        raise ConfigError("galore.rank", f"be at most {bound}, below the sides of the largest linear", galore.rank)


class Projected:
    """One matrix's gradient in K dimensions of its shorter side; the rows' where both are as long.

    Args:
        shape: (A, B).
        galore: Rank and scale.
    """

    def __init__(self, shape: tuple[int, int], galore: GaloreConfig) -> None:
        self._shape, self._rank, self._scale = shape, galore.rank, galore.scale
        self._basis: torch.Tensor | None = None  # (A, K), or (K, B) where A ≥ B

    @property
    def numel(self) -> int:
        """Elements that Adam sees."""
        return self._rank * max(self._shape)

    @property
    def _is_tall(self) -> bool:
        return self._shape[0] >= self._shape[1]

    def refresh(self, grad: torch.Tensor) -> None:
        """Take this flat float32 gradient's K leading singular vectors as the basis."""
        left, _, right = torch.linalg.svd(grad.view(self._shape), full_matrices=False)
        basis = right[: self._rank] if self._is_tall else left[:, : self._rank]
        # a copy frees the other vectors; contiguous, as it is when read from a file: the layout decides products' bits
        self._basis = basis.clone(memory_format=torch.contiguous_format)

    @property
    def basis(self) -> torch.Tensor:
        """The singular vectors in use, float32: (A, K), or (K, B) where A ≥ B."""
        assert self._basis is not None, "no gradient has been decomposed yet"
        return self._basis

    def set_basis(self, basis: torch.Tensor) -> None:
        """Use these; raises ValueError where they do not fit."""
        expected = (self._rank, self._shape[1]) if self._is_tall else (self._shape[0], self._rank)
        if basis.shape != expected or basis.dtype != torch.float32 or not torch.isfinite(basis).all():
            raise ValueError(f"singular vectors of {tuple(basis.shape)} do not fit {expected}")
        self._basis = basis

    def down(self, grad: torch.Tensor) -> torch.Tensor:
        """G Rᵀ or LᵀG, flat."""
        grad_AB = grad.view(self._shape)
        return (grad_AB @ self.basis.t() if self._is_tall else self.basis.t() @ grad_AB).reshape(-1)

    def up(self, step: torch.Tensor) -> torch.Tensor:
        """scale · S R or scale · L S, flat."""
        step_AB = step.view(-1, self._rank) @ self.basis if self._is_tall else self.basis @ step.view(self._rank, -1)
        return (step_AB * self._scale).reshape(-1)


class GaloreShard(OptimizerShard):
    """An optimizer shard on the device whose Adam sees matrices with both sides above the rank in K dimensions.

    Args:
        units: With every parameter trained as it is.
        galore: Rank, gap and scale.
        device: Where moments and bases live.
    """

    is_plain = False

    def __init__(self, units: Sequence[Unit], galore: GaloreConfig, device: torch.device) -> None:
        self._sizes = {unit.index: [target.leaf.numel() for target in unit.targets] for unit in units}
        self._projected = {unit.index: _projected(unit, galore) for unit in units}
        super().__init__({unit: sum(self._small_sizes(unit)) for unit in self._sizes}, device=device)
        self._gap = galore.update_proj_gap

    def update(
        self,
        layer: int,
        grads: Sequence[torch.Tensor],
        delta: torch.Tensor,
        *,
        learning_rate: float,
        grad_scale: float = 1.0,
    ) -> None:
        """See `OptimizerShard`; of one gradient."""
        (grad,) = grads
        if not is_usable(grad, grad_scale):  # a decomposition would fail
            delta.zero_()
            return
        step = int(self.states[layer].step)
        parts = list(grad.split(self._sizes[layer]))
        for position, matrix in self._projected[layer].items():
            if step % self._gap == 0:
                matrix.refresh(parts[position])
            parts[position] = matrix.down(parts[position])
        small = torch.cat(parts)
        small_delta = torch.empty_like(small)
        super().update(layer, [small], small_delta, learning_rate=learning_rate, grad_scale=grad_scale)
        steps = list(small_delta.split(self._small_sizes(layer)))
        for position, matrix in self._projected[layer].items():
            steps[position] = matrix.up(steps[position])
        torch.cat(steps, out=delta)

    def save_bases(self, path: Path) -> None:
        """Write the singular vectors in use, float32, by unit and position."""
        save_file({f"{unit}.{at}": matrix.basis for unit, at, matrix in self._matrices()}, path)

    def load_bases(self, path: Path) -> None:
        """Read what `save_bases` wrote.

        Raises:
            ValueError: A matrix's are missing, or of another shape.
            OSError, SafetensorError: The file cannot be read.
        """
        saved = load_file(path)
        for unit, at, matrix in self._matrices():
            matrix.set_basis(saved[f"{unit}.{at}"])

    def _matrices(self) -> Iterator[tuple[int, int, Projected]]:
        for unit, projected in self._projected.items():
            for at, matrix in projected.items():
                yield unit, at, matrix

    def _small_sizes(self, unit: int) -> list[int]:
        sizes, projected = self._sizes[unit], self._projected[unit]
        return [projected[at].numel if at in projected else size for at, size in enumerate(sizes)]


def _projected(unit: Unit, galore: GaloreConfig) -> Mapping[int, Projected]:
    """By position among the unit's targets."""
    shapes = [target.leaf.shape for target in unit.targets]
    return {
        at: Projected((shape[0], shape[1]), galore)
        for at, shape in enumerate(shapes)
        if len(shape) == 2 and min(shape) > galore.rank
    }

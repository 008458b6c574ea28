"""SparseProjector: compress a gradient to (D, E), decompress a delta to (M, N).

Legend: M rows (out), N columns (in), D columns of the left factor, E of the right one, R non-zeros a row, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lsp_ray.projection.block_factor import BlockFactor

# spread over all rows, an update goes less along the steepest directions: at the learning rates that are best for full
# fine-tuning, balanced projectors train best with updates three times as large, but no entry above the learning rate:
# of noise, whose entries are small, three times as much would be left, and of what is sure no more (docs/log.md)
BALANCED_GAIN = 3.0
_HAS_WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None  # torch 2.8 on, by CUDA


def product_float32(left_DT: torch.Tensor, right_TE: torch.Tensor) -> torch.Tensor:
    """Return the (D, E) product in float32; where a product can, it is rounded to nothing less on the way."""
    if left_DT.is_cuda and left_DT.dtype.itemsize == 2 and _HAS_WIDE_PRODUCTS:
        return torch.mm(left_DT, right_TE, out_dtype=torch.float32)
    return (left_DT @ right_TE).float()


@dataclass(frozen=True, slots=True)
class UpdateSize:
    """What a weight is changed by: scale · P clamp(gain · δ, −bound … bound) Qᵀ.

    Attributes:
        gain: By how much entries are enlarged.
        bound: Of an enlarged entry's size: the learning rate, which Adam's own seldom exceed.
        scale: `SparseProjector.update_scale`.
    """

    gain: float
    bound: float
    scale: float

    def applied(self, delta_DE: torch.Tensor) -> torch.Tensor:
        """Return scale · clamp(gain · δ, −bound … bound), float32, of a δ of any floating type."""
        return (delta_DE.float() * self.gain).clamp_(-self.bound, self.bound) * self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorSizes:
    """What is decided of a projector before its values.

    Attributes:
        shape: (M, N) of the weight.
        dims: (D, E) of what is sent.
        nnz_per_row: R, non-zeros in every row of P and of Q.
    """

    shape: tuple[int, int]
    dims: tuple[int, int]
    nnz_per_row: int

    @classmethod
    def of(cls, shape: tuple[int, int], subspace_dim: int, nnz_per_row: int) -> ProjectorSizes:
        """D is the largest multiple of R, one at least, that is at most `subspace_dim` and half of M; E likewise."""
        rows, columns = (max(1, min(subspace_dim, side // 2) // nnz_per_row) * nnz_per_row for side in shape)
        return cls(shape=shape, dims=(rows, columns), nnz_per_row=nnz_per_row)

    @property
    def groups(self) -> tuple[int, int]:
        """G of both factors."""
        return self.dims[0] // self.nnz_per_row, self.dims[1] // self.nnz_per_row


class SparseProjector:
    """A pair P (M, D), Q (N, E) of block factors for a weight of shape (M, N). Paper, Definition 1.

    Args:
        left: P.
        right: Q; linears that read the same input have the same object here.
    """

    def __init__(self, left: BlockFactor, right: BlockFactor) -> None:
        self.left = left
        self.right = right

    @classmethod
    def random(cls, sizes: ProjectorSizes, generator: torch.Generator) -> SparseProjector:
        """Random orthonormal blocks: the start, and a whole method without learning."""
        pairs = zip(sizes.shape, sizes.groups, strict=True)
        left, right = (BlockFactor.random(rows, groups, sizes.nnz_per_row, generator) for rows, groups in pairs)
        return cls(left, right)

    @property
    def sizes(self) -> ProjectorSizes:
        """What another projector in this one's place must have."""
        return ProjectorSizes(shape=self.shape, dims=self.dims, nnz_per_row=self.left.nnz_per_row)

    @property
    def dims(self) -> tuple[int, int]:
        """(D, E), the shape of what is sent."""
        return self.left.dim, self.right.dim

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of the weight."""
        return self.left.num_rows, self.right.num_rows

    @property
    def update_scale(self) -> float:
        """sqrt(M·N) / (‖P‖·‖Q‖): makes ‖P δ Qᵀ‖ about that of a full-size delta with entries like δ's.

        With it a learning rate means what it means in full fine-tuning, at any D and R. It waits for the device.
        """
        squares = self.left.square_sum() * self.right.square_sum()
        return math.sqrt(self.left.num_rows * self.right.num_rows / squares)

    def update_size(self, scale: float, learning_rate: float) -> UpdateSize:
        """What to change a weight by, given `update_scale`. Balanced projectors get BALANCED_GAIN, up to the rate."""
        if self.left.scale_F is None:
            return UpdateSize(1.0, math.inf, scale)
        return UpdateSize(BALANCED_GAIN, learning_rate, scale)

    @property
    def device(self) -> torch.device:
        """Where its values are."""
        return self.left.value_FR.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its values: that of the products."""
        return self.left.value_FR.dtype

    @property
    def nbytes(self) -> int:
        """Device bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def compress(self, grad_MN: torch.Tensor) -> torch.Tensor:
        """Return Pᵀ G Q (D, E) of a full gradient. Training never calls this: it uses `compress_outer`."""
        half_ME = self.right.project(grad_MN)
        return self.left.project(half_ME.t()).t()

    def compress_outer(self, grad_output_TM: torch.Tensor, input_projected_TE: torch.Tensor) -> torch.Tensor:
        """Return Pᵀ (dYᵀ X) Q = (dY P)ᵀ (X Q), float32 (D, E), without forming dYᵀ X.

        `input_projected_TE` is X Q, `right.project`'s answer, kept from the forward.
        """
        return product_float32(self.left.project(grad_output_TM).t(), input_projected_TE)

    def decompress(self, delta_DE: torch.Tensor) -> torch.Tensor:
        """Return P δ Qᵀ (M, N), in δ's dtype. Training never calls this: `device.deltas` adds it tile by tile."""
        return self.left.spread(self.right.spread(delta_DE.t()).t())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> SparseProjector:
        """The same projector on `device`, values in `dtype`."""
        return SparseProjector(self.left.to(device, dtype), self.right.to(device, dtype))

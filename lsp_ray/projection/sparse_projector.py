"""SparseProjector: compress a gradient to (D, D), decompress a delta to (M, N).

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, T tokens.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch

from lsp_ray.errors import ConfigError
from lsp_ray.projection.sparse_factor import SparseFactor, random_positions

# spread over all rows, an update goes less along the steepest directions: at the learning rates that are best for full
# fine-tuning, balanced projectors train best with updates three times as large (docs/log.md)
BALANCED_GAIN = 3.0
# up to this D a product with P made dense, 2·D operations an element, is faster on bfloat16 matrix units (AMX, tensor
# cores) than a transpose and R gathers, which memory bounds: 1.8 times on a CPU at (256, 4) (docs/log.md)
DENSE_DIM = 256
_CPUINFO = Path("/proc/cpuinfo")


class SparseProjector:
    """A pair P (M, D), Q (N, D) of sparse factors for a weight of shape (M, N). Paper, Definition 1.

    Args:
        left: P.
        right: Q; its `dim` must be P's.
    """

    def __init__(self, left: SparseFactor, right: SparseFactor) -> None:
        if left.dim != right.dim:
            raise ConfigError("projector.dim", f"be the left factor's ({left.dim}) on the right", right.dim)
        self.left = left
        self.right = right

    @classmethod
    def random(cls, shape: tuple[int, int], dim: int, nnz_per_row: int, generator: torch.Generator) -> SparseProjector:
        """Random positions, values N(0, 1/√r): the paper's start, and its whole method without learning."""
        std = nnz_per_row**-0.5
        left, right = (
            SparseFactor(
                random_positions(rows, dim, nnz_per_row, generator),
                torch.randn(rows, nnz_per_row, generator=generator) * std,
                dim,
            )
            for rows in shape
        )
        return cls(left, right)

    @classmethod
    def identity(cls, size: int) -> SparseProjector:
        """P = Q = I for a square weight: compress and decompress change nothing."""
        index_FR = torch.arange(size, dtype=torch.int32).unsqueeze(1)
        left, right = (SparseFactor(index_FR, torch.ones(size, 1), size) for _ in range(2))
        return cls(left, right)

    @property
    def dim(self) -> int:
        """D."""
        return self.left.dim

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N) of the weight."""
        return self.left.num_rows, self.right.num_rows

    @property
    def update_scale(self) -> float:
        """sqrt(M·N) / (‖P‖·‖Q‖): makes ‖P δ Qᵀ‖ about that of a full-size delta with entries like δ's.

        With it a learning rate means what it means in full fine-tuning, at any D and R. The identity has scale 1.
        Balanced projectors get BALANCED_GAIN times as much.
        """
        squares = self.left.square_sum() * self.right.square_sum()
        gain = 1.0 if self.left.scale_F is None else BALANCED_GAIN
        return gain * math.sqrt(self.left.num_rows * self.right.num_rows / squares) if squares > 0 else 0.0

    @property
    def nbytes(self) -> int:
        """Device bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def compress(self, grad_MN: torch.Tensor) -> torch.Tensor:
        """Return Pᵀ G Q (D, D) of a full gradient. Training never calls this: it uses `compress_outer`."""
        half_DN = self.left.transposed_times(grad_MN.contiguous())
        return self.right.transposed_times(half_DN.t().contiguous()).t()

    def compress_outer(self, grad_output_TM: torch.Tensor, input_projected_DT: torch.Tensor) -> torch.Tensor:
        """Return Pᵀ (dYᵀ X) Q = (dY P)ᵀ (X Q), float32 (D, D), without forming dYᵀ X.

        `input_projected_DT` is `project_input`'s answer, kept from the forward.
        """
        return (_projected(grad_output_TM, self.left) @ input_projected_DT.t()).float()

    def project_input(self, input_TN: torch.Tensor) -> torch.Tensor:
        """Return (X Q)ᵀ, (D, T), in the input's dtype: all that the weight gradient needs of X."""
        return _projected(input_TN, self.right)

    def decompress(self, delta_DD: torch.Tensor, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
        """Return rows first_row … first_row+num_rows of P δ Qᵀ (M, N), in δ's dtype."""
        return self.left.times(self.spread_columns(delta_DD), first_row, num_rows)

    def spread_columns(self, delta_DD: torch.Tensor) -> torch.Tensor:
        """Return δ Qᵀ, contiguous (D, N): the table from which `left.times` makes rows of P δ Qᵀ."""
        return self.right.times(delta_DD.t().contiguous()).t().contiguous()

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> SparseProjector:
        """The same projector on `device`, values in `dtype`."""
        return SparseProjector(self.left.to(device, dtype), self.right.to(device, dtype))


def _projected(table_TF: torch.Tensor, factor: SparseFactor) -> torch.Tensor:
    """Return (table · factor)ᵀ, (D, T)."""
    is_fast = table_TF.device.type != "cpu" or cpu_has_matrix_unit()
    if is_fast and table_TF.dtype == torch.bfloat16 and factor.dim <= DENSE_DIM:
        return (table_TF @ factor.transposed_dense().to(table_TF.dtype).t()).t()
    return factor.transposed_times(table_TF.t().contiguous())


@cache
def cpu_has_matrix_unit() -> bool:
    """Whether this CPU has a unit for products of bfloat16 matrices: AMX; where Linux does not tell, it has none.

    Without one the gathers are faster: 1.84 s against 2.07 for a step of SmolLM2-135M on an AMD EPYC (docs/log.md).
    """
    return _CPUINFO.exists() and "amx_bf16" in _CPUINFO.read_text(encoding="utf-8")


def subspace_dim_for(shape: tuple[int, int], subspace_dim: int) -> int:
    """D for a weight of this shape: what was asked for, at most half of the smaller side."""
    return min(subspace_dim, min(shape) // 2)

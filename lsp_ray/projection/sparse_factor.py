"""SparseFactor: one side of a projector, a sparse matrix with exactly R non-zeros in every row.

Legend: F rows of the factor (M for the left one, N for the right one), D subspace, R non-zeros a row, K any width.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise

import torch
from torch.nn.functional import embedding_bag


class SparseFactor:
    """A (F, D) matrix with R non-zeros in every row, kept in row form and in column form.

    A product with it is a weighted sum of a few rows of the other matrix for every output row: the operation of
    `torch.nn.functional.embedding_bag`, on the CPU and on CUDA. Memory is O(F · R), whatever D is.

    Args:
        index_FR: int32 or int64 column numbers; distinct within a row.
        value_FR: The non-zeros, in the dtype of the products.
        dim: D.
    """

    def __init__(self, index_FR: torch.Tensor, value_FR: torch.Tensor, dim: int) -> None:
        self.index_FR = index_FR.to(torch.int32)
        self.value_FR = value_FR
        self.dim = dim

    @property
    def num_rows(self) -> int:
        """F."""
        return self.index_FR.shape[0]

    @property
    def nnz_per_row(self) -> int:
        """R."""
        return self.index_FR.shape[1]

    @cached_property
    def _columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Column form: row numbers sorted by column, where each column starts, values in that order."""
        flat = self.index_FR.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.dim)
        starts = torch.cumsum(counts, dim=0) - counts
        rows = torch.div(order, self.nnz_per_row, rounding_mode="floor")
        return rows.to(torch.int32), starts.to(torch.int32), self.value_FR.reshape(-1)[order].contiguous()

    def transposed_times(self, table_FK: torch.Tensor) -> torch.Tensor:
        """Return the (D, K) product of this factor's transpose with a contiguous (F, K) table."""
        rows, starts, values = self._columns
        return embedding_bag(rows, table_FK, starts, mode="sum", per_sample_weights=values.to(table_FK.dtype))

    def times(self, table_DK: torch.Tensor, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
        """Return rows first_row … first_row+num_rows of the (F, K) product of this factor with a (D, K) table."""
        end = self.num_rows if num_rows is None else first_row + num_rows
        values = self.value_FR[first_row:end].to(table_DK.dtype)
        return embedding_bag(self.index_FR[first_row:end], table_DK, mode="sum", per_sample_weights=values)

    def square_sum(self) -> float:
        """Square of the Frobenius norm."""
        return float(self.value_FR.double().square().sum())

    def dense(self) -> torch.Tensor:
        """The (F, D) matrix with its zeros, for tests and analysis."""
        dense_FD = self.value_FR.new_zeros(self.num_rows, self.dim)
        return dense_FD.scatter_(1, self.index_FR.long(), self.value_FR)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> SparseFactor:
        """The same factor on `device`, its values in `dtype` (default: unchanged)."""
        return SparseFactor(self.index_FR.to(device), self.value_FR.to(device, dtype or self.value_FR.dtype), self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of both forms."""
        held = (self.index_FR, self.value_FR, *self._columns)
        return sum(tensor.nbytes for tensor in held)


def random_positions(num_rows: int, dim: int, nnz_per_row: int, generator: torch.Generator) -> torch.Tensor:
    """Return int32 (F, R) column numbers, distinct within a row.

    The columns are cut into R blocks and a row takes one of each, as in block-structured sparse embeddings (Nelson
    and Nguyen, OSNAP, 2013). Within a block columns are used equally often (±1), so none stays empty where
    F > D / R, which independent draws do not promise. Needs 1 ≤ R ≤ D.
    """
    assert 1 <= nnz_per_row <= dim, f"{nnz_per_row} distinct columns of {dim}"
    order = torch.randperm(dim, generator=generator)
    bounds = [block * dim // nnz_per_row for block in range(nnz_per_row + 1)]
    picks = []
    for first, last in pairwise(bounds):
        block = order[first:last]
        repeats = -(-num_rows // len(block))
        cyclic = block.repeat(repeats)[:num_rows]
        picks.append(cyclic[torch.randperm(num_rows, generator=generator)])
    return torch.stack(picks, dim=1).to(torch.int32)

"""SparseFactor: one side of a projector, a sparse matrix with exactly R non-zeros in every row.

Positions: the D columns are cut into R blocks of consecutive columns, a row has one non-zero in each, and within a
block columns are used equally often (±1), as in block-structured sparse embeddings (Nelson and Nguyen, OSNAP, 2013). So
where a column starts follows from (F, D, R) alone, and memory is F · R values and as many row numbers, whatever D is.

A slot is one non-zero; slots are numbered column by column.

Legend: F rows of the factor (M for the left one, N for the right one), D subspace, R non-zeros a row, K any width,
S = F · R slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import embedding_bag

from lsp_ray.projection.triton_kernel import runs_on, transposed_dense

_INT16_BOUND = 1 << 15


@dataclass(frozen=True, slots=True)
class _Slots:
    """What factors of one shape share: a column's first slot (int32), a slot's column (int32) and block (int64)."""

    starts_D: torch.Tensor
    column_S: torch.Tensor
    block_S: torch.Tensor


class SparseFactor:
    """A (F, D) matrix with R non-zeros in every row.

    A product with it is a weighted sum of a few rows of the other matrix for every output row: the operation of
    `torch.nn.functional.embedding_bag`, on the CPU and on CUDA.

    Args:
        index_FR: Column numbers as `random_positions` draws them, of any integer type; not kept.
        value_FR: The non-zeros, in the dtype of the products.
        dim: D.
        scale_F: What the values of each row were multiplied with after they were learned (float32, on the CPU), where
            coordinates are to be those of the unscaled factor; see `fit_projector`. Products know nothing of it.

    Raises:
        ValueError: The positions do not keep to their blocks.
    """

    def __init__(
        self, index_FR: torch.Tensor, value_FR: torch.Tensor, dim: int, scale_F: torch.Tensor | None = None
    ) -> None:
        num_rows, nnz_per_row = index_FR.shape
        sorted_RF, order_RF = torch.sort(index_FR.t(), dim=1, stable=True)
        value_S = value_FR.t().gather(1, order_RF).reshape(-1)
        self._set(order_RF.reshape(-1).to(_index_dtype(num_rows)), value_S, dim, nnz_per_row)
        self.scale_F: torch.Tensor | None = scale_F
        if not torch.equal(sorted_RF.reshape(-1).to(torch.int32), self._slots.column_S):
            raise ValueError(f"positions are not one of each of {nnz_per_row} blocks of {dim} columns, equally often")

    def _set(self, row_S: torch.Tensor, value_S: torch.Tensor, dim: int, nnz_per_row: int) -> None:
        self._row_S, self._value_S = row_S, value_S
        self.dim, self.nnz_per_row = dim, nnz_per_row
        self.scale_F = None

    @property
    def num_rows(self) -> int:
        """F."""
        return self._row_S.numel() // self.nnz_per_row

    @property
    def index_FR(self) -> torch.Tensor:
        """int32 column numbers, ascending within a row."""
        return self._slots.column_S[self._slot_FR]

    @property
    def value_FR(self) -> torch.Tensor:
        """The non-zeros in the order of `index_FR`."""
        return self._value_S[self._slot_FR]

    def transposed_times(self, table_FK: torch.Tensor) -> torch.Tensor:
        """Return the (D, K) product of this factor's transpose with a contiguous (F, K) table."""
        weight_S = self._value_S.to(table_FK.dtype)
        rows_S = self._row_S.to(torch.int32)  # embedding_bag takes no int16
        return embedding_bag(rows_S, table_FK, self._slots.starts_D, mode="sum", per_sample_weights=weight_S)

    def times(self, table_DK: torch.Tensor, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
        """Return rows first_row … first_row+num_rows of the (F, K) product of this factor with a (D, K) table."""
        end = self.num_rows if num_rows is None else first_row + num_rows
        slot_FR = self._slot_FR[first_row:end]
        weight_FR = self._value_S[slot_FR].to(table_DK.dtype)
        return embedding_bag(self._slots.column_S[slot_FR], table_DK, mode="sum", per_sample_weights=weight_FR)

    def slots(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, column, block within the row and value of every slot."""
        return self._row_S, self._slots.column_S, self._slots.block_S, self._value_S

    def square_sum(self) -> float:
        """Square of the Frobenius norm."""
        return float(self._value_S.double().square().sum())

    def with_values(self, value_FR: torch.Tensor) -> SparseFactor:
        """A factor with other non-zeros at the same positions."""
        return self._like(self._row_S, value_FR[self._row_S.long(), self._slots.block_S])

    def scaled(self, scale_F: torch.Tensor) -> SparseFactor:
        """Each row times its scale (F,), which is remembered."""
        other = self.with_values(self.value_FR * scale_F.to(self.value_FR).unsqueeze(1))
        other.scale_F = scale_F.float().cpu()
        return other

    @property
    def unscaled(self) -> SparseFactor:
        """This factor as it was before `scaled`; itself where it was not."""
        if self.scale_F is None:
            return self
        return self.with_values(self.value_FR.float() / self.scale_F.to(self.value_FR.device).unsqueeze(1))

    def scale_columns(self, table_KF: torch.Tensor) -> torch.Tensor:
        """Return the (K, F) table that the unscaled factor must see to give what this one gives for `table_KF`."""
        if self.scale_F is None:
            return table_KF
        return table_KF * self.scale_F.to(table_KF)

    def dense(self) -> torch.Tensor:
        """The (F, D) matrix with its zeros, for products that are faster so; it is not kept."""
        dense_FD = self._value_S.new_zeros(self.num_rows, self.dim)
        dense_FD[self._row_S.long(), self._slots.column_S.long()] = self._value_S
        return dense_FD

    def transposed_dense(self) -> torch.Tensor:
        """The transpose (D, F) of `dense`, of any strides; on a GPU made in one launch."""
        if runs_on(self._row_S.device):
            return transposed_dense(self._row_S, self._slots.starts_D, self._value_S, self.num_rows)
        return self.dense().t()

    def gram(self) -> torch.Tensor:
        """This factor's transpose times itself, float32 (D, D)."""
        return self.transposed_times(self.dense().float())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> SparseFactor:
        """The same factor on `device`, its values in `dtype` (default: unchanged)."""
        other = self._like(self._row_S.to(device), self._value_S.to(device, dtype or self._value_S.dtype))
        other.scale_F = self.scale_F
        return other

    @property
    def nbytes(self) -> int:
        """Bytes that this factor alone holds on its device: F · R values and row numbers."""
        return self._row_S.nbytes + self._value_S.nbytes

    def _like(self, row_S: torch.Tensor, value_S: torch.Tensor) -> SparseFactor:
        other = SparseFactor.__new__(SparseFactor)
        other._set(row_S, value_S, self.dim, self.nnz_per_row)
        return other

    @property
    def _slots(self) -> _Slots:
        return _slots(self.num_rows, self.dim, self.nnz_per_row, self._row_S.device)

    @property
    def _slot_FR(self) -> torch.Tensor:
        """The slots of every row: the column form turned into the row form, at each use, to keep one form only."""
        slot_FR = torch.empty(self.num_rows, self.nnz_per_row, dtype=torch.int64, device=self._row_S.device)
        slot_FR[self._row_S.long(), self._slots.block_S] = torch.arange(self._row_S.numel(), device=slot_FR.device)
        return slot_FR


def random_positions(num_rows: int, dim: int, nnz_per_row: int, generator: torch.Generator) -> torch.Tensor:
    """Return int32 (F, R) column numbers, one of each block in every row; on the CPU. Needs 1 ≤ R ≤ D."""
    assert 1 <= nnz_per_row <= dim, f"{nnz_per_row} distinct columns of {dim}"
    cyclic_S = _slots(num_rows, dim, nnz_per_row, torch.device("cpu")).column_S
    drawn = [block_F[torch.randperm(num_rows, generator=generator)] for block_F in cyclic_S.split(num_rows)]
    return torch.stack(drawn, dim=1)


def similar_positions(target_FS: torch.Tensor, dim: int, nnz_per_row: int, generator: torch.Generator) -> torch.Tensor:
    """Return positions as `random_positions` does, but such that rows that share a column resemble each other.

    A column holds one direction for all its rows, so it loses the less the more alike they are. In every block the rows
    are put in order by a random-projection tree (Dasgupta and Freund 2008) on the direction of their absolute values,
    as a value's sign is free, and the order is cut into columns. `target_FS` is on any device.
    """
    assert 1 <= nnz_per_row <= dim, f"{nnz_per_row} distinct columns of {dim}"
    num_rows, width = target_FS.shape
    cyclic_S = _slots(num_rows, dim, nnz_per_row, torch.device("cpu")).column_S
    direction_FS = torch.nn.functional.normalize(target_FS.abs(), dim=1)
    drawn = []
    for block_F in cyclic_S.split(num_rows):
        depth = max(1, math.ceil(math.log2(int(block_F[-1] - block_F[0]) + 1)))
        axes_SL = torch.randn(width, depth, generator=generator).to(direction_FS)
        order_F = _tree_order((direction_FS @ axes_SL).cpu())
        drawn.append(torch.empty_like(block_F).scatter_(0, order_F, block_F))
    return torch.stack(drawn, dim=1)


def _tree_order(coordinate_FL: torch.Tensor) -> torch.Tensor:
    """Return row numbers (F,), int64, in the order of a tree's leaves; level l halves every node along column l."""
    num_rows, depth = coordinate_FL.shape
    order_F = torch.arange(num_rows)
    for level in range(depth):
        node_F = torch.arange(num_rows) * (1 << level) // num_rows
        by_coordinate_F = coordinate_FL[order_F, level].argsort(stable=True)
        order_F = order_F[by_coordinate_F[node_F[by_coordinate_F].argsort(stable=True)]]
    return order_F


@lru_cache(maxsize=64)
def _slots(num_rows: int, dim: int, nnz_per_row: int, device: torch.device) -> _Slots:
    """In a block of L columns the first F mod L have one slot more than the others."""
    bounds = [block * dim // nnz_per_row for block in range(nnz_per_row + 1)]
    widths_R = torch.tensor(bounds[1:]) - torch.tensor(bounds[:-1])
    first_D = torch.repeat_interleave(torch.tensor(bounds[:-1]), widths_R)
    width_D = torch.repeat_interleave(widths_R, widths_R)
    within_D = torch.arange(dim) - first_D
    count_D = num_rows // width_D + (within_D < num_rows % width_D)
    column_S = torch.repeat_interleave(torch.arange(dim), count_D)
    return _Slots(
        starts_D=(torch.cumsum(count_D, 0) - count_D).to(device, torch.int32),
        column_S=column_S.to(device, torch.int32),
        block_S=torch.repeat_interleave(torch.arange(nnz_per_row), num_rows).to(device),
    )


def _index_dtype(bound: int) -> torch.dtype:
    return torch.int16 if bound <= _INT16_BOUND else torch.int32

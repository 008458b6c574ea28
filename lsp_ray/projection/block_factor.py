"""BlockFactor: one side of a projector, orthonormal blocks on consecutive rows.

The F rows are cut into G groups of consecutive rows, the D = G · R columns into G groups of R. Rows of group g have
their R non-zeros in the columns of group g, an orthonormal (S, R) basis: so every row has exactly R non-zeros (paper,
Definition 1), Pᵀ P = I holds by construction, and where a non-zero stands follows from (F, G, R) alone. Memory is F · R
values, whatever D is. Where G does not divide F, the first F mod G groups have one row more than the others.

Legend: F rows of the factor (M for the left one, N for the right one), D columns, G groups, S rows of a group, R
non-zeros a row, T and K any other number of rows or columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def is_launched(table: torch.Tensor) -> bool:
    """Whether operators on this table are launches, each with its price whatever its size."""
    return table.is_cuda


class BlockFactor:
    """A (F, D) matrix diag(scale) · blockdiag(U_1 … U_G), every U_g an orthonormal (S, R) basis.

    Args:
        value_FR: The non-zeros of every row, in the dtype of the products; kept as it is.
        groups: G, such that every group has R rows at least.
        scale_F: What each row of the bases was multiplied by (float32, on the CPU); None for 1. Products know nothing
            of it: it tells how to see gradients as the bases were learned from them.

    Attributes:
        num_rows: F.
        nnz_per_row: R.
        dim: D.
        group_rows: Rows of a group, but for the first `long_groups`, which have one more.
        long_groups: F mod G.
    """

    def __init__(self, value_FR: torch.Tensor, groups: int, scale_F: torch.Tensor | None = None) -> None:
        assert value_FR.shape[0] // groups >= value_FR.shape[1], "a group has fewer rows than directions"
        self.value_FR, self.groups, self.scale_F = value_FR, groups, scale_F
        self.num_rows, self.nnz_per_row = value_FR.shape
        self.dim = groups * self.nnz_per_row
        self.group_rows, self.long_groups = divmod(self.num_rows, groups)

    @classmethod
    def random(cls, num_rows: int, groups: int, nnz_per_row: int, generator: torch.Generator) -> BlockFactor:
        """Orthonormal bases of random directions, float32 on the CPU."""
        drawn = cls(torch.randn(num_rows, nnz_per_row, generator=generator), groups)
        return drawn.with_bases(torch.linalg.qr(block_GSR).Q for block_GSR in drawn.blocks())

    @property
    def nbytes(self) -> int:
        """Bytes on the device: F · R values and nothing else."""
        return self.value_FR.nbytes

    def split(self, tensor: torch.Tensor, dim: int) -> Iterator[torch.Tensor]:
        """Yield views of a tensor with F entries along `dim`, which becomes two: groups as long as each other, S."""
        long, rows = self.long_groups, self.group_rows
        border = long * (rows + 1)
        if long:
            yield tensor.narrow(dim, 0, border).unflatten(dim, (long, rows + 1))
        yield tensor.narrow(dim, border, self.num_rows - border).unflatten(dim, (self.groups - long, rows))

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yield the bases, times the scale of their rows: (G, S, R) views, at most two, for both numbers of rows."""
        return self.split(self.value_FR, 0)

    def project(self, table_TF: torch.Tensor) -> torch.Tensor:
        """Return the (T, D) product of a (T, F) table with this factor, in the table's dtype.

        Where launches count, column by column in memory, as the products come.
        """
        if is_launched(table_TF):
            return self.project_by_columns(table_TF).t()
        pairs = zip(self.split(table_TF, 1), self.blocks(), strict=True)
        parts = [torch.bmm(part_TGS.transpose(0, 1), block.to(part_TGS.dtype)) for part_TGS, block in pairs]
        projected_GTR = parts[0] if len(parts) == 1 else torch.cat(parts)
        return projected_GTR.transpose(0, 1).reshape(table_TF.shape[0], self.dim)

    def project_by_columns(self, table_TF: torch.Tensor) -> torch.Tensor:
        """Return the same as (D, T), contiguous: one launch where G divides F."""
        if not self.long_groups:  # with few views: on a GPU the host's calls are what a product costs
            block_GRS = self.value_FR.to(table_TF.dtype).view(self.groups, -1, self.nnz_per_row).mT
            table_GST = table_TF.view(table_TF.shape[0], self.groups, -1).permute(1, 2, 0)
            return torch.bmm(block_GRS, table_GST).view(self.dim, -1)
        pairs = zip(self.split(table_TF, 1), self.blocks(), strict=True)
        parts = [torch.bmm(block.to(part.dtype).transpose(1, 2), part.permute(1, 2, 0)) for part, block in pairs]
        projected_GRT = parts[0] if len(parts) == 1 else torch.cat(parts)
        return projected_GRT.flatten(0, 1)

    def spread(self, table_DK: torch.Tensor) -> torch.Tensor:
        """Return the (F, K) product of this factor with a (D, K) table, in the table's dtype."""
        long_columns = self.long_groups * self.nnz_per_row
        tables = [table_DK[:long_columns], table_DK[long_columns:]] if long_columns else [table_DK]
        pairs = zip(self.blocks(), tables, strict=True)
        parts = [
            torch.bmm(block.to(part.dtype), part.reshape(block.shape[0], self.nnz_per_row, -1)) for block, part in pairs
        ]
        return torch.cat([part.flatten(0, 1) for part in parts])

    def expand(self, table_TD: torch.Tensor) -> torch.Tensor:
        """Return the (T, F) product of a (T, D) table with this factor's transpose, in the table's dtype."""
        if torch.compiler.is_compiling():  # what is in place the compiler decides, and it knows no product into a view
            pairs = self._expanding(table_TD)
            return torch.cat([torch.bmm(*pair).transpose(0, 1).flatten(1, 2) for pair in pairs], dim=1)
        output_TF = table_TD.new_empty(table_TD.shape[0], self.num_rows)
        self.add_expanded_(output_TF, table_TD, keep=0)
        return output_TF

    def add_expanded_(self, output_TF: torch.Tensor, table_TD: torch.Tensor, *, keep: int = 1) -> None:
        """output ← keep · output + what `expand` returns, without a table of that size; keep 0 reads no old value."""
        for part_TGS, pair in zip(self.split(output_TF, 1), self._expanding(table_TD), strict=True):
            part_TGS.transpose(0, 1).baddbmm_(*pair, beta=keep)

    def _expanding(self, table_TD: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (G, T, R) of the table and (G, R, S) of the bases for both numbers of rows."""
        first = 0
        for block_GSR in self.blocks():
            num_columns = block_GSR.shape[0] * self.nnz_per_row
            table_TGR = table_TD.narrow(1, first, num_columns).unflatten(1, (-1, self.nnz_per_row))
            yield table_TGR.transpose(0, 1), block_GSR.to(table_TD.dtype).mT
            first += num_columns

    def solve(self, table_FK: torch.Tensor) -> torch.Tensor:
        """Return the (D, K) table that `spread` brings nearest to a (F, K) table: (Pᵀ P)⁻¹ Pᵀ of it, in its dtype."""
        parts = []
        for block_GSR, part_GSK in zip(self.blocks(), self.split(table_FK, 0), strict=True):
            basis_GSR = block_GSR.to(table_FK.dtype)
            parts.append(torch.linalg.solve(basis_GSR.mT @ basis_GSR, basis_GSR.mT @ part_GSK))
        return torch.cat(parts).flatten(0, 1)

    def dense(self) -> torch.Tensor:
        """The (F, D) matrix with its zeros; for tests and measurements."""
        return self.spread(torch.eye(self.dim, dtype=self.value_FR.dtype, device=self.value_FR.device))

    def square_sum(self) -> float:
        """Square of the Frobenius norm."""
        return float(self.value_FR.double().square().sum())

    @property
    def unscaled(self) -> torch.Tensor:
        """The bases without the scale of their rows, float64 (F, R) on the CPU."""
        value_FR = self.value_FR.detach().cpu().double()
        return value_FR if self.scale_F is None else value_FR / self.scale_F.double().unsqueeze(1)

    def scale_columns(self, table_KF: torch.Tensor) -> torch.Tensor:
        """Return the (K, F) table that the bases alone must see to give what this factor gives for `table_KF`."""
        return table_KF if self.scale_F is None else table_KF * self.scale_F.to(table_KF)

    def with_bases(self, bases: Iterator[torch.Tensor], scale_F: torch.Tensor | None = None) -> BlockFactor:
        """A factor of the same groups with other bases, (G, S, R) each as `blocks` yields them, and their scale."""
        value_FR = torch.cat([basis.flatten(0, 1) for basis in bases])
        if scale_F is None:
            return BlockFactor(value_FR, self.groups)
        return BlockFactor(value_FR * scale_F.to(value_FR).unsqueeze(1), self.groups, scale_F.float().cpu())

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> BlockFactor:
        """The same factor on `device`, its values in `dtype` (default: unchanged)."""
        return BlockFactor(self.value_FR.to(device, dtype or self.value_FR.dtype), self.groups, self.scale_F)

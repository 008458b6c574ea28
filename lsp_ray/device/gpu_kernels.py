"""Kernels that add deltas to weights on a GPU in one pass, compiled by Triton when first used.

torch's operators take seven passes over a bfloat16 weight and, for a projected matrix, two dozen launches for every
million elements: the host then takes longer to launch than the GPU to compute (docs/log.md). What is here has the CPU
kernels' interface (cpu_kernels.py) and gives the same sums, up to a multiplication and an addition rounded as one.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, K any number of elements, S = F · R slots of a
factor with F rows (see `SparseFactor`).
"""

from __future__ import annotations

import torch

from lsp_ray.device.noise import NOISE_ELEMENTS, Noise
from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector
from lsp_ray.projection.triton_kernel import compiled, runs_on, tl, triton

_FLAT = 1024  # elements of a flat array for a program
_TILE_ROWS, _TILE_COLUMNS = 8, 128  # of a matrix; neighbouring columns lie side by side in every array


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether deltas can be added to this weight here."""
    return weight.dtype == torch.bfloat16 and runs_on(weight.device)


def add_dense_(weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float, first: int = 0) -> None:
    """weight ← keep · weight + delta in bfloat16, rounded by the noise; all flat and contiguous.

    Args:
        weight_K: bfloat16.
        delta_K: float32.
        noise: Of the target.
        keep: Factor of the weight.
        first: Position of the weight's first element within the target.
    """
    num = weight_K.numel()
    grid = (triton.cdiv(num, _FLAT),)
    _add_dense[grid](weight_K, delta_K, noise.block, noise.start + first, keep, num, SIZE=NOISE_ELEMENTS, BLOCK=_FLAT)


def add_decompressed_(
    weight_MN: torch.Tensor, projector: SparseProjector, delta_DD: torch.Tensor, noise: Noise, keep: float
) -> None:
    """W ← keep · W + P δ Qᵀ in bfloat16, rounded by the noise; rows of P δ Qᵀ are made where they are added.

    Args:
        weight_MN: bfloat16, of any strides.
        projector: P and Q, on the GPU.
        delta_DD: δ, float32.
        noise: Of the target.
        keep: Factor of W.
    """
    (num_rows, num_columns), dim = projector.shape, projector.dim
    index_MR, value_MR = _row_form(projector.left)
    index_NR, value_NR = _row_form(projector.right)
    tile = {"NNZ": projector.left.nnz_per_row, "ROWS": _TILE_ROWS, "COLUMNS": _TILE_COLUMNS}
    table_DN = delta_DD.new_empty(dim, num_columns)
    columns = triton.cdiv(num_columns, _TILE_COLUMNS)
    _spread[triton.cdiv(dim, _TILE_ROWS), columns](
        delta_DD.contiguous(), index_NR, value_NR, table_DN, dim, num_columns, **tile
    )
    _add_sparse[triton.cdiv(num_rows, _TILE_ROWS), columns](
        weight_MN,
        *weight_MN.stride(),
        index_MR,
        value_MR,
        table_DN,
        noise.block,
        noise.start,
        keep,
        num_rows,
        num_columns,
        SIZE=NOISE_ELEMENTS,
        **tile,
    )


def _row_form(factor: SparseFactor) -> tuple[torch.Tensor, torch.Tensor]:
    """Column numbers (int32) and values (in the factor's dtype) of the factor's rows, (F, R) each."""
    row_S, column_S, block_S, value_S = factor.slots()
    shape, num = (factor.num_rows, factor.nnz_per_row), row_S.numel()
    index_FR, value_FR = column_S.new_empty(shape), value_S.new_empty(shape)
    _fill_rows[(triton.cdiv(num, _FLAT),)](
        row_S, column_S, block_S, value_S, index_FR, value_FR, num, NNZ=shape[1], BLOCK=_FLAT
    )
    return index_FR, value_FR


@compiled
def _add_dense(weight, delta, block, start, keep, num, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < num
    exact = keep * tl.load(weight + at, mask=is_there).to(tl.float32) + tl.load(delta + at, mask=is_there)
    drawn = tl.load(block + (start + at) % SIZE, mask=is_there).to(tl.int32)
    bits = exact.to(tl.int32, bitcast=True) + drawn
    tl.store(weight + at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=is_there)


@compiled
def _add_sparse(  # type: ignore[no-untyped-def]
    weight,
    row_stride,
    column_stride,
    index,
    value,
    table,
    block,
    start,
    keep,
    num_rows,
    num_columns,
    SIZE: tl.constexpr,
    NNZ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = m < num_rows
    is_there = is_row[:, None] & (n < num_columns)[None, :]
    delta = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for r in range(NNZ):
        d = tl.load(index + m * NNZ + r, mask=is_row, other=0)
        factor = tl.load(value + m * NNZ + r, mask=is_row, other=0.0).to(tl.float32)
        delta += factor[:, None] * tl.load(table + d[:, None] * num_columns + n[None, :], mask=is_there, other=0.0)
    at = weight + m[:, None] * row_stride + n[None, :] * column_stride
    exact = keep * tl.load(at, mask=is_there).to(tl.float32) + delta
    drawn = tl.load(block + (start + m[:, None] * num_columns + n[None, :]) % SIZE, mask=is_there).to(tl.int32)
    bits = exact.to(tl.int32, bitcast=True) + drawn
    tl.store(at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=is_there)


@compiled
def _spread(  # type: ignore[no-untyped-def]
    delta, index, value, table, dim, num_columns, NNZ: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write δ Qᵀ into `table` (D, N)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = n < num_columns
    is_there = (row < dim)[:, None] & is_column[None, :]
    total = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for r in range(NNZ):
        d = tl.load(index + n * NNZ + r, mask=is_column, other=0)
        factor = tl.load(value + n * NNZ + r, mask=is_column, other=0.0).to(tl.float32)
        total += factor[None, :] * tl.load(delta + row[:, None] * dim + d[None, :], mask=is_there, other=0.0)
    tl.store(table + row[:, None] * num_columns + n[None, :], total, mask=is_there)


@compiled
def _fill_rows(row, column, block, value, index_fr, value_fr, num, NNZ: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = slot < num
    at = tl.load(row + slot, mask=is_there).to(tl.int32) * NNZ + tl.load(block + slot, mask=is_there).to(tl.int32)
    tl.store(index_fr + at, tl.load(column + slot, mask=is_there), mask=is_there)
    tl.store(value_fr + at, tl.load(value + slot, mask=is_there), mask=is_there)

"""Kernels that add deltas to weights on the CPU in one pass, compiled by Numba when first used.

torch's operators take seven passes over a bfloat16 weight, each through memory; here what is between the weight's two
copies stays in the first-level cache. They give the bits that torch's operators give, in one thread or in many.

Legend: M rows (out), N columns (in), D subspace, R non-zeros a row, K any number of elements, S = F · R slots of a
factor with F rows (see `SparseFactor`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lsp_ray.device.noise import NOISE_ELEMENTS, Noise
from lsp_ray.projection.sparse_factor import SparseFactor
from lsp_ray.projection.sparse_projector import SparseProjector

try:
    import numba
except ImportError:  # where there is only torch, its operators do
    numba = None  # type: ignore[assignment]

_TILE = 1024  # elements of a flat weight at a time: their float32 sums fit a first-level cache
_TABLE_ROWS = 64  # of Q δᵀ at a time: they fit a first-level cache and, written across, fill whole cache lines
_PADDING = 16  # elements behind each of them: a power of two apart, the cache could hold only a few
_LEAST_ROWS = 32  # of a weight for a thread of its own


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether deltas can be added to this weight here."""
    return numba is not None and weight.device.type == "cpu" and weight.dtype == torch.bfloat16


def add_dense_(weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float, first: int = 0) -> None:
    """weight ← keep · weight + delta in bfloat16, rounded by the noise; all flat and contiguous.

    Args:
        weight_K: bfloat16.
        delta_K: float32.
        noise: Of the target.
        keep: Factor of the weight.
        first: Position of the weight's first element within the target.
    """
    weight, delta, block, start = _bits(weight_K), delta_K.numpy(), noise.block.numpy(), noise.start + first
    _in_threads(
        lambda part: _add_dense(weight[part], delta[part], block, start + part.start, np.float32(keep)),
        weight_K.numel(),
        _TILE,
    )


def add_decompressed_(
    weight_MN: torch.Tensor, projector: SparseProjector, delta_DD: torch.Tensor, noise: Noise, keep: float
) -> None:
    """W ← keep · W + P δ Qᵀ in bfloat16, rounded by the noise; rows of P δ Qᵀ are made where they are added.

    Args:
        weight_MN: bfloat16, of any strides.
        projector: P and Q, on the CPU.
        delta_DD: δ, float32.
        noise: Of the target.
        keep: Factor of W.
    """
    num_rows, num_columns = projector.shape
    index_MR, value_MR = _row_form(projector.left)
    index_NR, value_NR = _row_form(projector.right)
    transposed_DD = delta_DD.t().contiguous().numpy()
    table_DN = np.empty((projector.dim, num_columns), np.float32)
    _in_threads(
        lambda part: _spread(transposed_DD, index_NR, value_NR, table_DN, part.start, part.stop),
        num_columns,
        _TABLE_ROWS,
    )
    weight, block = _bits(weight_MN), noise.block.numpy()

    def add(part: slice) -> None:
        start = noise.start + part.start * num_columns
        _add_sparse(weight[part], index_MR[part], value_MR[part], table_DN, block, start, np.float32(keep))

    _in_threads(add, num_rows, _LEAST_ROWS)


def _bits(weight: torch.Tensor) -> NDArray[np.int16]:
    array: NDArray[np.int16] = weight.detach().view(torch.int16).numpy()
    return array


def _row_form(factor: SparseFactor) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Column numbers and values of the factor's rows, (F, R) each."""
    shape = factor.num_rows, factor.nnz_per_row
    index_FR, value_FR = np.empty(shape, np.int32), np.empty(shape, np.float32)
    row_S, column_S, block_S, value_S = factor.slots()
    _fill_rows(row_S.numpy(), column_S.numpy(), block_S.numpy(), value_S.float().numpy(), index_FR, value_FR)
    return index_FR, value_FR


def _in_threads(work: Callable[[slice], object], num: int, least: int) -> None:
    """Give `work` the parts of 0 … num, `least` or more each, side by side in as many threads as torch's operators."""
    num_threads = torch.get_num_threads()
    parts = max(1, min(num_threads, num // least))
    bounds = [num * part // parts // least * least for part in range(parts)] + [num]
    slices = [slice(*pair) for pair in pairwise(bounds)]
    if parts == 1:
        work(slices[0])
        return
    for _ in _pool(num_threads).map(work, slices):
        pass


@lru_cache(maxsize=1)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="add-deltas")


def _compiled(function: Callable[..., None], **options: Any) -> Callable[..., None]:
    """Compile when first called, once for all processes where there is a folder to keep the code in."""
    if numba is None:
        return function
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        compiled: Callable[..., None] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no such folder may be written
        compiled = numba.njit(**options)(function)
    return compiled


@partial(_compiled, inline="always")
def _add_row(weight, delta, noise, keep, exact, bits):  # type: ignore[no-untyped-def]
    # three plain loops: each becomes vector code
    for n in range(weight.size):
        bits[n] = np.int32(weight[n]) << 16
    for n in range(weight.size):
        exact[n] = keep * exact[n] + delta[n]
    for n in range(weight.size):
        weight[n] = np.int16((bits[n] + np.int32(noise[n])) >> 16)


@_compiled
def _add_dense(weight, delta, block, start, keep):  # type: ignore[no-untyped-def]
    exact = np.empty(_TILE, np.float32)
    bits = exact.view(np.int32)
    for first in range(0, weight.size, _TILE):
        end = min(first + _TILE, weight.size)
        at = (start + first) % NOISE_ELEMENTS
        _add_row(weight[first:end], delta[first:end], block[at : at + end - first], keep, exact, bits)


@_compiled
def _add_sparse(weight, index, value, table, block, start, keep):  # type: ignore[no-untyped-def]
    width = weight.shape[1]
    delta, exact = np.empty(width, np.float32), np.empty(width, np.float32)
    bits = exact.view(np.int32)
    for m in range(weight.shape[0]):
        _sum_rows(index[m], value[m], table, delta)
        at = (start + m * width) % NOISE_ELEMENTS
        _add_row(weight[m], delta, block[at : at + width], keep, exact, bits)


@_compiled
def _spread(delta_t, index, value, table, first_column, end_column):  # type: ignore[no-untyped-def]
    """Write columns first_column … end_column of δ Qᵀ into `table` (D, N)."""
    num_rows = table.shape[0]
    rows = np.empty((_TABLE_ROWS, num_rows + _PADDING), np.float32)
    for first in range(first_column, end_column, _TABLE_ROWS):
        end = min(first + _TABLE_ROWS, end_column)
        for n in range(first, end):
            _sum_rows(index[n], value[n], delta_t, rows[n - first, :num_rows])
        for d in range(num_rows):
            columns = table[d, first:end]
            for n in range(end - first):
                columns[n] = rows[n, d]


@partial(_compiled, inline="always")
def _sum_rows(index, value, table, total):  # type: ignore[no-untyped-def]
    """total ← Σ value[r] · table[index[r]], added up in order."""
    row, factor = table[index[0]], value[0]
    for n in range(total.size):
        total[n] = factor * row[n]
    for r in range(1, index.size):
        row, factor = table[index[r]], value[r]
        for n in range(total.size):
            total[n] += factor * row[n]


@_compiled
def _fill_rows(row, column, block, value, index_fr, value_fr):  # type: ignore[no-untyped-def]
    for slot in range(row.size):
        index_fr[row[slot], block[slot]] = column[slot]
        value_fr[row[slot], block[slot]] = value[slot]

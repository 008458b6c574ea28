"""Kernels that add deltas to weights on the CPU in one pass, compiled by Numba when first used.

torch's operators take seven passes over a bfloat16 weight, each through memory; here what is between the weight's two
copies stays in the first-level cache. They give the bits that torch's operators give, in one thread or in many.

Legend: M rows (out), N columns (in), D × E what is sent, R non-zeros a row, K any number of elements.
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

from lsp_ray.device import torch_kernels
from lsp_ray.device.noise import NOISE_ELEMENTS, Noise
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize

try:
    import numba
except ImportError:  # where there is only torch, its operators do
    numba = None  # type: ignore[assignment]

_TILE = 1024  # elements of a flat weight at a time: their float32 sums fit a first-level cache
_PADDING = 16  # elements behind each row of a table: a power of two apart, the cache could hold only a few


def has_kernel(weight: torch.Tensor) -> bool:
    """Whether deltas can be added to this weight here."""
    return numba is not None and weight.device.type == "cpu"


def add_dense_(weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float) -> None:
    """weight ← keep · weight + delta; bfloat16 is rounded by the noise; all flat and contiguous.

    Args:
        weight_K: bfloat16, or float32, for which torch's operators are as fast.
        delta_K: float32.
        noise: Of the target.
        keep: Factor of the weight.
    """
    if weight_K.dtype == torch.float32:
        torch_kernels.add_dense_(weight_K, delta_K, noise, keep)
        return
    weight, delta, block, start = _numbers(weight_K), delta_K.numpy(), _drawn(noise), noise.start
    _in_threads(
        lambda part: _add_dense(weight[part], delta[part], block, start + part.start, np.float32(keep)),
        weight_K.numel(),
        _TILE,
    )


def add_decompressed_(
    weight_MN: torch.Tensor,
    projector: SparseProjector,
    delta_DE: torch.Tensor,
    size: UpdateSize,
    noise: Noise,
    keep: float,
) -> None:
    """W ← keep · W + scale · P clamp(gain · δ) Qᵀ; bfloat16 is rounded by the noise.

    What is added is made group by group of rows.

    Args:
        weight_MN: bfloat16 or float32, of any strides.
        projector: P and Q, on the CPU.
        delta_DE: δ, of any floating type.
        size: Gain, bound and scale of δ.
        noise: Of the target.
        keep: Factor of W.
    """
    left, right = projector.left, projector.right
    weight, block, delta = _numbers(weight_MN), _drawn(noise), size.applied(delta_DE).numpy()
    left_MR, right_RN = left.value_FR.float().numpy(), right.value_FR.float().t().contiguous().numpy()
    sizes = (left.group_rows, left.long_groups, right.group_rows, right.long_groups, right.groups)

    def add(part: slice) -> None:
        add_groups = _add_rounded_groups if weight.dtype == np.int16 else _add_groups
        add_groups(
            weight, left_MR, right_RN, delta, *sizes, part.start, part.stop, block, noise.start, np.float32(keep)
        )

    _in_threads(add, left.groups, 1)


def _drawn(noise: Noise) -> NDArray[np.uint16]:
    array: NDArray[np.uint16] = noise.block.numpy().view(np.uint16)
    return array


def _numbers(weight: torch.Tensor) -> NDArray[Any]:
    """The weight's memory: float32, or the bits of bfloat16 as int16."""
    weight = weight.detach()
    array: NDArray[Any] = (weight if weight.dtype == torch.float32 else weight.view(torch.int16)).numpy()
    return array


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


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile when first called, once for all processes where there is a folder to keep the code in."""
    if numba is None:
        return function
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        compiled: Callable[..., Any] = numba.njit(cache=True, **options)(function)
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


@partial(_compiled, inline="always")
def _first(group, rows, long):  # type: ignore[no-untyped-def]
    """The first row of a group: the first `long` groups have one row more than `rows`."""
    return group * rows + min(group, long)


@partial(_compiled, inline="always")
def _spread(delta, right, first_row, rows, long, groups, table):  # type: ignore[no-untyped-def]
    """table (R, N) ← R rows of δ Qᵀ from first_row on, added up in order."""
    for r in range(table.shape[0]):
        for h in range(groups):
            begin, end = _first(h, rows, long), _first(h + 1, rows, long)
            total = table[r, begin:end]
            for k in range(right.shape[0]):
                factor, value = delta[first_row + r, h * right.shape[0] + k], right[k, begin:end]
                if k == 0:
                    for n in range(end - begin):
                        total[n] = factor * value[n]
                else:
                    for n in range(end - begin):
                        total[n] += factor * value[n]


@partial(_compiled, inline="always")
def _sum_rows(value, table, total):  # type: ignore[no-untyped-def]
    """total ← Σ value[r] · table[r], added up in order."""
    row, factor = table[0], value[0]
    for n in range(total.size):
        total[n] = factor * row[n]
    for r in range(1, value.size):
        row, factor = table[r], value[r]
        for n in range(total.size):
            total[n] += factor * row[n]


@_compiled
def _add_rounded_groups(  # type: ignore[no-untyped-def]
    weight, left, right, delta, left_rows, left_long, rows, long, groups, first_group, end_group, block, start, keep
):
    nnz, width = right.shape
    table = np.empty((nnz, width + _PADDING), np.float32)[:, :width]
    total, exact = np.empty(width, np.float32), np.empty(width, np.float32)
    bits = exact.view(np.int32)
    for g in range(first_group, end_group):
        _spread(delta, right, g * nnz, rows, long, groups, table)
        for m in range(_first(g, left_rows, left_long), _first(g + 1, left_rows, left_long)):
            _sum_rows(left[m], table, total)
            at = (start + m * width) % NOISE_ELEMENTS
            _add_row(weight[m], total, block[at : at + width], keep, exact, bits)


@_compiled
def _add_groups(  # type: ignore[no-untyped-def]
    weight, left, right, delta, left_rows, left_long, rows, long, groups, first_group, end_group, block, start, keep
):
    nnz, width = right.shape
    table = np.empty((nnz, width + _PADDING), np.float32)[:, :width]
    total = np.empty(width, np.float32)
    for g in range(first_group, end_group):
        _spread(delta, right, g * nnz, rows, long, groups, table)
        for m in range(_first(g, left_rows, left_long), _first(g + 1, left_rows, left_long)):
            _sum_rows(left[m], table, total)
            row = weight[m]
            for n in range(width):
                row[n] = keep * row[n] + total[n]

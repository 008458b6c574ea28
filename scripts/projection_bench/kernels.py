"""Times of (dY P)ᵀ, the sparse product of compress, against other ways to compute it and against a plain copy.

Legend: T tokens, M rows (out), D subspace, R non-zeros a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from lsp_ray.projection.sparse_factor import SparseFactor, random_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSize:
    """The product timed."""

    tokens: int = 1024
    rows: int = 4096
    dim: int = 2048
    nnz_per_row: int = 8


def kernel_times(
    size: KernelSize, dtype: torch.dtype, *, repetitions: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median milliseconds of every kernel, each timed once in every one of the interleaved repetitions.

    `ours` and `csr` start from dY (T, M) and so include its transpose, `ours_transposed` starts from dYᵀ. `dense` is
    dY P with P's zeros. `memcpy` copies so much that it reads and writes, in all, as many bytes as `ours` must. torch
    has no CSR product of bfloat16, so there `csr` is missing.
    """
    kernels = _kernels(size, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    for repetition in range(repetitions + 2):
        for name, kernel in kernels.items():
            begin_s = clock()
            kernel()
            if repetition >= 2:  # the first two warm caches and the allocator
                seconds[name].append(clock() - begin_s)
    return {name: 1e3 * median(times) for name, times in seconds.items()}


def _kernels(size: KernelSize, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    index_MR = random_positions(size.rows, size.dim, size.nnz_per_row, generator)
    factor = SparseFactor(index_MR, torch.randn(index_MR.shape, generator=generator).to(dtype), size.dim)
    grad_output_TM = torch.randn(size.tokens, size.rows, generator=generator).to(dtype)
    grad_output_MT = grad_output_TM.t().contiguous()
    dense_MD = factor.dense()
    csr_DM = _csr(dense_MD.t())
    source, target = torch.empty(2, size.tokens * (size.rows + size.dim) // 2, dtype=dtype).fill_(1.0).unbind()
    kernels: dict[str, Callable[[], object]] = {
        "ours": lambda: factor.transposed_times(grad_output_TM.t().contiguous()),
        "ours_transposed": lambda: factor.transposed_times(grad_output_MT),
        "dense": lambda: grad_output_TM @ dense_MD,
        "memcpy": lambda: target.copy_(source),
    }
    if dtype == torch.float32:
        kernels["csr"] = lambda: csr_DM @ grad_output_TM.t().contiguous()
    return kernels


def _csr(dense_DM: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)", category=UserWarning)
        return dense_DM.to_sparse_csr()

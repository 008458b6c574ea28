"""Times of dY P, the block product of compress, against the dense product and against a plain copy.

Legend: T tokens, M rows (out), D columns of P, R non-zeros a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from lsp_ray.projection.block_factor import BlockFactor

KERNELS = ("ours", "dense", "memcpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSize:
    """The product timed."""

    tokens: int = 1024
    rows: int = 4096
    dim: int = 1024
    nnz_per_row: int = 16

    def __str__(self) -> str:
        """What pages call it."""
        return f"T={self.tokens} M={self.rows} d={self.dim} r={self.nnz_per_row}"


def kernel_times(
    size: KernelSize, dtype: torch.dtype, *, repetitions: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Return the median milliseconds of every kernel, each timed once in every one of the interleaved repetitions.

    `dense` is dY P with P's zeros. `memcpy` copies so much that it reads and writes, in all, as many bytes as `ours`
    must.
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
    drawn = BlockFactor.random(size.rows, size.dim // size.nnz_per_row, size.nnz_per_row, generator)
    factor = drawn.to(torch.device("cpu"), dtype)
    grad_output_TM = torch.randn(size.tokens, size.rows, generator=generator).to(dtype)
    dense_MD = factor.dense()
    source, target = torch.empty(2, size.tokens * (size.rows + size.dim) // 2, dtype=dtype).fill_(1.0).unbind()
    made = (
        lambda: factor.project(grad_output_TM),
        lambda: grad_output_TM @ dense_MD,
        lambda: target.copy_(source),
    )
    return dict(zip(KERNELS, made, strict=True))

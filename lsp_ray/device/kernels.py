"""What adds deltas to a weight: Numba's kernels on a CPU, Triton's on a GPU, or torch's operators; with equal bits."""

from __future__ import annotations

from typing import Protocol

import torch

from lsp_ray.device import cpu_kernels, gpu_kernels, torch_kernels
from lsp_ray.device.noise import Noise
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize


class Kernels(Protocol):
    """What the three modules have; see cpu_kernels.py."""

    def add_dense_(
        self, weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float, first: int = 0
    ) -> None:
        """weight ← keep · weight + delta."""
        ...

    def add_decompressed_(
        self,
        weight_MN: torch.Tensor,
        projector: SparseProjector,
        delta_DE: torch.Tensor,
        size: UpdateSize,
        noise: Noise,
        keep: float,
    ) -> None:
        """W ← keep · W + scale · P clamp(gain · δ) Qᵀ."""
        ...


def kernels_for(weight: torch.Tensor) -> Kernels:
    """Those that can add to this weight here."""
    if cpu_kernels.has_kernel(weight):
        return cpu_kernels
    return gpu_kernels if gpu_kernels.has_kernel(weight) else torch_kernels

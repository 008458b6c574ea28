"""What adds deltas to weights: Numba's kernels on a CPU, Triton's on a GPU, or torch's operators; with equal bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from lsp_ray.device import cpu_kernels, gpu_kernels, torch_kernels
from lsp_ray.device.addition import Addition
from lsp_ray.device.noise import Noise
from lsp_ray.device.rounding import StepNoise
from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_
from lsp_ray.projection.sparse_projector import SparseProjector, UpdateSize


class Kernels(Protocol):
    """What the modules have that add one delta at a time; see cpu_kernels.py."""

    def add_dense_(self, weight_K: torch.Tensor, delta_K: torch.Tensor, noise: Noise, keep: float) -> None:
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
    """Those that add to this weight one delta at a time."""
    return cpu_kernels if cpu_kernels.has_kernel(weight) else torch_kernels


class Adder:
    """Adds deltas to the same weights step after step: one by one, or on a GPU all of them in one launch."""

    def __init__(self) -> None:
        self._table: gpu_kernels.Table | None = None

    def add_(
        self,
        additions: Sequence[Addition],
        delta_K: torch.Tensor,
        noise: StepNoise,
        *,
        first_key: int,
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        """Add each weight its part of a delta; bfloat16 is rounded by the noise.

        Args:
            additions: The weights, all on one device; only what is new about them since the last call costs anything.
            delta_K: Their parts side by side: flat, of any floating type, −lr included.
            noise: Of the step.
            first_key: Key of the first; the others' follow.
            learning_rate: Bounds what balanced projectors enlarge.
            weight_decay: Decoupled: a weight that decays is first multiplied by keep = 1 − learning rate · this.
        """
        table = self._table_of(additions)
        if table is not None:
            table.add_(delta_K, noise.after(first_key), learning_rate, weight_decay)
            return
        parts = delta_K.split([addition.numel for addition in additions])
        for key, (addition, part) in enumerate(zip(additions, parts, strict=True), first_key):
            keep = 1.0 - learning_rate * weight_decay if addition.decays else 1.0
            _add(addition, part, noise.of(key), keep, learning_rate)

    def adamw_(
        self,
        additions: Sequence[Addition],
        gradient_K: torch.Tensor,
        state: AdamWState,
        noise: StepNoise,
        *,
        first_key: int,
        learning_rate: float,
        weight_decay: float,
        grad_scale: float,
        hyper: AdamWHyper,
    ) -> None:
        """Let AdamW step from finite gradients of weights without projectors; on a GPU the step itself is in no memory.

        Args:
            additions: As for `add_`.
            gradient_K: Side by side: flat, float32 or bfloat16.
            state: Of all of them; advances.
            noise: Of the step.
            first_key: Key of the first; the others' follow.
            learning_rate: Of the step.
            weight_decay: Decoupled.
            grad_scale: Factor of the gradients.
            hyper: AdamW's constants.
        """
        rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
        table = self._table_of(additions)
        if table is not None:
            table.adamw_(gradient_K, state, noise.after(first_key), grad_scale=grad_scale, hyper=hyper, **rates)
            return
        seen = gradient_K.float()
        delta = torch.empty_like(seen)
        seen = seen if grad_scale == 1.0 else seen * grad_scale
        adamw_delta_(delta, seen, state, learning_rate=learning_rate, hyper=hyper)
        self.add_(additions, delta, noise, first_key=first_key, **rates)

    def _table_of(self, additions: Sequence[Addition]) -> gpu_kernels.Table | None:
        """None where there is no kernel."""
        if not additions or not gpu_kernels.has_kernel(additions[0].weight):
            return None
        if self._table is None or not self._table.is_of(additions):
            self._table = gpu_kernels.Table(additions)
        return self._table


def _add(addition: Addition, delta: torch.Tensor, noise: Noise, keep: float, learning_rate: float) -> None:
    weight, projector = addition.weight.detach(), addition.projector
    kernels = kernels_for(weight)
    if projector is None:
        kernels.add_dense_(weight.view(-1), delta.float(), noise, keep)
        return
    size = projector.update_size(addition.scale, learning_rate)
    kernels.add_decompressed_(weight, projector, delta.view(projector.dims), size, noise, keep)

"""OptimizerShard: the optimizer state of some of the layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_


class OptimizerShard:
    """Owns m and v of its layers and turns their gradients into deltas.

    A layer's numbers depend on that layer alone, so any split of layers over shards gives the same bits.

    Args:
        numel_of_layer: Payload length (float32 elements) of each layer this shard owns.
        hyper: AdamW's constants.
        device: Where m and v live; default: the CPU.
    """

    def __init__(
        self, numel_of_layer: Mapping[int, int], hyper: AdamWHyper | None = None, device: torch.device | None = None
    ) -> None:
        self._hyper = hyper or AdamWHyper()
        self._states = {layer: AdamWState.zeros(numel, device) for layer, numel in numel_of_layer.items()}

    def update(self, layer: int, grad: torch.Tensor, delta: torch.Tensor, *, learning_rate: float) -> torch.Tensor:
        """Write the step for `grad` into `delta`; return the sum of squares of `grad`, a scalar.

        Both are flat float32 of the layer's payload length and stay the caller's.
        """
        adamw_delta_(delta, grad, self._states[layer], learning_rate=learning_rate, hyper=self._hyper)
        return torch.dot(grad, grad)

    def moments(self, layer: int, first: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """m and v of one (dim, dim) matrix of a layer's payload, views into this shard's state."""
        state, part = self._states[layer], slice(first, first + dim * dim)
        return state.exp_avg[part].view(dim, dim), state.exp_avg_sq[part].view(dim, dim)

    @property
    def state_bytes(self) -> int:
        """Bytes of m and v."""
        return sum(state.exp_avg.nbytes + state.exp_avg_sq.nbytes for state in self._states.values())

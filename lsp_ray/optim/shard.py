"""OptimizerShard: the optimizer state of some of the layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from lsp_ray.optim.adamw import AdamWHyper, AdamWState, adamw_delta_


class Coordinates(Protocol):
    """A symmetric change of coordinates of a (D, D) matrix in which Adam's step is taken."""

    @property
    def scale(self) -> float:
        """Factor of the step on its way back."""
        ...

    def apply(self, matrix_DD: torch.Tensor) -> torch.Tensor:
        """Return the matrix in the other coordinates; also the way back."""
        ...


class OptimizerShard:
    """Owns m and v of its layers and turns their gradients into deltas.

    A layer's numbers depend on that layer alone, so any split of layers over shards gives the same bits.

    Args:
        numel_of_layer: Payload length (float32 elements) of each layer this shard owns.
        hyper: AdamW's constants.
        device: Where m and v live; default: the CPU.
        states: The state to work on, where it lives outside of this shard; default: a new one.
    """

    def __init__(
        self,
        numel_of_layer: Mapping[int, int],
        hyper: AdamWHyper | None = None,
        device: torch.device | None = None,
        states: Mapping[int, AdamWState] | None = None,
    ) -> None:
        self._hyper = hyper or AdamWHyper()
        self.states = states or {layer: AdamWState.zeros(numel, device) for layer, numel in numel_of_layer.items()}
        self._coordinates: dict[int, dict[tuple[int, int], Coordinates]] = {layer: {} for layer in numel_of_layer}

    def set_coordinates(self, layer: int, first: int, dim: int, coordinates: Coordinates) -> None:
        """Take Adam's step for the (dim, dim) matrix at element `first` of a layer's payload in other coordinates."""
        self._coordinates[layer][first, dim] = coordinates

    def coordinates(self, layer: int, first: int, dim: int) -> Coordinates | None:
        """What `set_coordinates` was given for this matrix."""
        return self._coordinates[layer].get((first, dim))

    def update(
        self, layer: int, grad: torch.Tensor, delta: torch.Tensor, *, learning_rate: float, grad_scale: float = 1.0
    ) -> None:
        """Write the step for `grad` times `grad_scale` into `delta`.

        Both are flat float32 of the layer's payload length and stay the caller's. Where the scale is 0, or `grad` holds
        NaN or infinity, the step is none at all: the state stays as it is and `delta` is zero. Whoever made the
        gradient says that it is not finite; here it may be there before that is known.
        """
        if not is_usable(grad, grad_scale):
            delta.zero_()
            return
        changed = self._coordinates[layer]
        seen = grad.clone() if changed else grad
        if grad_scale != 1.0:
            seen = seen * grad_scale
        for (first, dim), coordinates in changed.items():
            _matrix(seen, first, dim).copy_(coordinates.apply(_matrix(seen, first, dim)))
        adamw_delta_(delta, seen, self.states[layer], learning_rate=learning_rate, hyper=self._hyper)
        for (first, dim), coordinates in changed.items():
            step_DD = _matrix(delta, first, dim)
            step_DD.copy_(coordinates.apply(step_DD) * coordinates.scale)

    def moments(self, layer: int, first: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """m and v of one (dim, dim) matrix of a layer's payload, views into this shard's state."""
        state = self.states[layer]
        return _matrix(state.exp_avg, first, dim), _matrix(state.exp_avg_sq, first, dim)


def is_usable(grad: torch.Tensor, grad_scale: float) -> bool:
    """Whether a flat gradient is to reach m and v: it is finite, and its step is not skipped."""
    if grad_scale == 0.0:
        return False
    # finite squares can overflow in the sum; it alone is one pass without a copy
    return bool(torch.isfinite(torch.dot(grad, grad)) or torch.isfinite(grad).all())


def _matrix(flat: torch.Tensor, first: int, dim: int) -> torch.Tensor:
    return flat[first : first + dim * dim].view(dim, dim)

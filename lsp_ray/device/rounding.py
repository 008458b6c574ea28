"""Add a float32 delta to a weight: exactly for float32, with stochastic rounding for bfloat16.

A plain bfloat16 add loses every delta below half of the weight's last bit; rounding up with a probability equal to the
remainder keeps the sum right on average.
"""

from __future__ import annotations

import torch

from lsp_ray.device import torch_kernels
from lsp_ray.device.kernels import kernels_for
from lsp_ray.device.noise import NOISE_ELEMENTS, Noise, noise_block

_MASK_64 = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """Return a 63-bit hash of the numbers (splitmix64's finaliser over each): a seed that depends on all of them."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state >> 1


class Rounding:
    """Adds deltas to weights. The bits depend on (seed, step, key, position) alone, never on parts or their order.

    Args:
        seed: The run's seed.
        device: Where the weights are.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._block = noise_block(torch.Generator().manual_seed(mixed(seed)), device)
        self._seed = seed

    def noise(self, *, step: int, key: int) -> Noise:
        """The bits of a target in a step; see `add_`."""
        return Noise(block=self._block, start=mixed(self._seed, step, key) % NOISE_ELEMENTS)

    def add_(
        self, weight: torch.Tensor, delta: torch.Tensor, *, keep: float, step: int, key: int, first: int = 0
    ) -> None:
        """weight ← keep · weight + delta, in place.

        Args:
            weight: float32 or bfloat16; of any layout, but bfloat16 of more than MAX_ELEMENTS elements is flat.
            delta: float32 of the same shape.
            keep: 1 − learning rate · weight decay.
            step: Number of the update.
            key: Number of the target within the model.
            first: Position of the weight's first element within the target, where it is a part of one.
        """
        noise = self.noise(step=step, key=key)
        if weight.is_contiguous():
            kernels_for(weight).add_dense_(weight.view(-1), delta.reshape(-1), noise, keep, first)
        else:
            torch_kernels.add_dense_(weight, delta, noise, keep, first)

"""The random bits with which bfloat16 weights are rounded once a delta is added to them.

A plain bfloat16 add loses every delta below half of the weight's last bit; rounding up with a probability equal to the
remainder keeps the sum right on average.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lsp_ray.device.noise import NOISE_ELEMENTS, Noise, noise_block

_MASK_64 = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """Return a 63-bit hash of the numbers (splitmix64's finaliser over each): a seed that depends on all of them."""
    state = 0
    for number in numbers:
        state = _stirred(state, number)
    return state >> 1


def _stirred(state: int, number: int) -> int:
    state = (state + number + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)


class StepNoise(NamedTuple):
    """The noise of all targets in a step.

    Attributes:
        block: See `Noise`.
        state: Of the hash before the target's key, 64 bits: a GPU's kernels take the key in themselves.
    """

    block: torch.Tensor
    state: int

    def of(self, key: int) -> Noise:
        """A target's."""
        return Noise(block=self.block, start=(_stirred(self.state, key) >> 1) % NOISE_ELEMENTS)

    def after(self, key: int) -> StepNoise:
        """The same with keys that are counted from this one."""
        return StepNoise(self.block, (self.state + key) & _MASK_64)


class Rounding:
    """Tells the noise. Rounded bits depend on (seed, step, key, position) alone, never on parts or their order.

    Args:
        seed: The run's seed.
        device: Where the weights are.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._block = noise_block(torch.Generator().manual_seed(mixed(seed)), device)
        self._state = _stirred(0, seed)

    def of_step(self, step: int) -> StepNoise:
        """The noise of an update, of whose targets each has a key."""
        return StepNoise(self._block, _stirred(self._state, step))

    def noise(self, *, step: int, key: int) -> Noise:
        """The noise of one target in an update."""
        return self.of_step(step).of(key)
